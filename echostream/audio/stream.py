"""Audio as it comes: recordings read piece by piece, and pipes.

A pipe that starts as a known format says its own rate; what nothing tells is raw PCM, signed 16-bit, little-endian.
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from echostream.audio.decode import Decoder, Ffmpeg, file_blocks, find_ffmpeg, open_forward, reason_of
from echostream.audio.formats import HEAD, MP3, MPEG_HEAD, mp3_length, next_mp3, sniff, wants_more
from echostream.audio.resample import check_rate
from echostream.audio.wav import MOST_CHANNELS, OPEN_END, PcmStream, read_bytes, sox_stream, wav_header, wav_stream
from echostream.errors import AudioError, MissingAudioError

__all__ = ["OPEN_END", "AudioSource", "open_file", "open_pipe", "to_pcm", "wav_stream_header"]


@dataclass
class AudioSource:
    """Something to translate.

    Attributes:
        name: for messages.
        rate: samples per second.
        blocks: mono float32 [n] pieces in order, each read when it is asked for.
        seconds: how long it is; None for a pipe.
        wav: does it come with a header of its own (files do)?
        close: let go of it.
    """

    name: str
    rate: int
    blocks: Iterator[np.ndarray]
    seconds: float | None
    wav: bool
    close: Callable[[], None] = lambda: None


def open_file(path: str | Path, block_ms: int = 100, rate: int = 16000, channels: int = 1) -> AudioSource:
    """A recording in any format libsndfile or ffmpeg reads, channels averaged; never held in memory as a whole.

    Args:
        rate, channels: of raw PCM, should ``path`` be a named pipe.

    Raises:
        AudioError: it is missing, empty or not audio.
    """
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise AudioError(f"{path} is a directory, not an audio file")
        if not stat.S_ISREG(status.st_mode):
            pipe = open(path, "rb", buffering=0)
            source = open_pipe(pipe, rate, channels, str(path))
            return replace(source, close=_both(source.close, pipe.close))
        if status.st_size == 0:
            raise AudioError(f"audio file {path} is empty (0 bytes)")
        with open(path, "rb") as file:
            form = sniff(file.read(MPEG_HEAD))
    except FileNotFoundError:
        raise MissingAudioError(f"audio file {path} does not exist") from None
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if form is not None and not form.reader:
        raise AudioError(f"{path} cannot be read as audio: it is {form.name}")
    if form is not None and form.name == "a SoX stream":
        return _opened(path, lambda file: sox_stream(file.read, file.read(4), str(path)))
    if form is MP3 and _mp3_behind(path):
        raw = open(path, "rb")
        decoder = Decoder(form, raw.read(HEAD), raw.read, str(path))
        return AudioSource(str(path), decoder.rate, decoder.blocks(), None, True, _both(decoder.close, raw.close))
    try:
        # By number, for a name may be anything but text.
        file = open_forward(os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
    except (RuntimeError, TypeError, OSError) as error:  # libsndfile's own errors are RuntimeErrors
        if (form is None or form.reader != "ffmpeg") and find_ffmpeg() is None:
            raise AudioError(f"{path} cannot be read as audio: {reason_of(error)}") from None
        ffmpeg = Ffmpeg(path, None, str(path), form)
        return AudioSource(str(path), ffmpeg.rate, ffmpeg.blocks(), None, True, ffmpeg.close)
    try:
        check_rate(file.samplerate)
        if form is not None and form.reader == "pcm" and _sound_behind(path, file.frames):
            file.close()
            return _opened(path, lambda file: wav_stream(file.read, file.read(4), str(path)))
        if file.frames <= 0:
            raise AudioError(f"audio file {path} holds no samples")
    except BaseException:
        file.close()
        raise
    seconds = file.frames / file.samplerate if 0 < file.frames < 1 << 60 else None
    blocks = file_blocks(file, str(path), block_ms / 1000)
    return AudioSource(str(path), file.samplerate, blocks, seconds, True, file.close)


def _both(one: Callable[[], None], other: Callable[[], None]) -> Callable[[], None]:
    def close() -> None:
        one()
        other()

    return close


def _opened(path: Path, read: Callable[[BinaryIO], PcmStream]) -> AudioSource:
    """A file read by ourselves."""
    file = open(path, "rb")
    try:
        stream = read(file)
    except BaseException:
        file.close()
        raise
    return AudioSource(str(path), stream.rate, stream.blocks(), None, True, file.close)


def _mp3_behind(path: Path) -> bool:
    """Does another MP3 follow the one that a file begins with? libsndfile stops where the first one says it ends."""
    with open(path, "rb") as raw:
        wanted, _ = mp3_length(raw.read(MPEG_HEAD))
        raw.seek(0)
        _, length = mp3_length(raw.read(min(wanted, 1 << 24)))
        if length is None:
            return False
        raw.seek(length)
        return next_mp3(raw.read(MPEG_HEAD)) is not None


def _sound_behind(path: Path, frames: int) -> bool:
    """Is there more sound in a WAV than its header says? A recorder that died leaves such files."""
    with open(path, "rb") as raw:
        try:
            stream = wav_stream(raw.read, raw.read(4), str(path))
        except AudioError:
            return False
        here = raw.tell()
        there = os.fstat(raw.fileno()).st_size - here
        heard = frames * stream.frame
        if there - heard < stream.frame or (stream.size is not None and stream.size >= there):
            return False
        raw.seek(here + heard)
        with closing(PcmStream(raw.read, b"", stream.kind, stream.channels, stream.rate, 0).blocks()) as rest:
            return next(rest, None) is not None


def open_pipe(
    pipe: BinaryIO, rate: int, channels: int = 1, name: str = "standard input", raw: bool = False
) -> AudioSource:
    """Audio from a pipe: any known format, by its first bytes; else raw PCM of this rate and number of channels.

    Args:
        pipe: a binary stream (``sys.stdin.buffer``).
        raw: it is raw PCM, whatever it looks like.

    Raises:
        AudioError: the rate is impossible, the header is damaged, or what comes is known and no sound.
    """
    check_rate(rate)
    if not isinstance(channels, int) or not 1 <= channels <= MOST_CHANNELS:
        raise AudioError(f"{channels} input channels are not possible; there must be at least 1")
    # Unbuffered where that can be: a thread that waits inside a buffer would hold the interpreter at its end.
    unbuffered = getattr(pipe, "raw", None)
    read = unbuffered.read if unbuffered is not None else getattr(pipe, "read1", pipe.read)

    def more(count: int) -> bytes:
        try:
            while (data := read(count)) is None:  # somebody has made the pipe one that does not wait
                select.select([pipe], [], [])
            return data
        except OSError as error:
            raise AudioError(f"{name} cannot be read: {error.strerror or error}") from None

    head, form = read_bytes(more, 4), None
    if not raw:
        form = sniff(head)
        if form is None or form.reader != "pcm":
            head += read_bytes(more, HEAD - len(head))
            if wants_more(head):
                head += read_bytes(more, MPEG_HEAD - len(head))
            form = sniff(head)
    if form is None:
        stream = PcmStream(more, head, (1, 16), channels, rate, name=name)
        return AudioSource(name, rate, stream.blocks(), None, False)
    if form.reader == "pcm":
        stream = (wav_stream if form.name != "a SoX stream" else sox_stream)(more, head, name)
        return AudioSource(name, stream.rate, stream.blocks(), None, True)
    if not form.reader:
        raise AudioError(f"{name} is {form.name}, not audio")
    decoder = Ffmpeg(head, more, name, form) if form.reader == "ffmpeg" else Decoder(form, head, more, name)
    try:
        check_rate(decoder.rate)
    except AudioError:
        decoder.close()
        raise
    return AudioSource(name, decoder.rate, decoder.blocks(), None, True, decoder.close)


def to_pcm(samples: np.ndarray) -> bytes:
    """Samples (float [N], full scale 1; louder is clipped) as signed 16-bit little-endian PCM."""
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2").tobytes()


def wav_stream_header(rate: int) -> bytes:
    """The header of a mono 16-bit WAV whose end is not known yet."""
    return wav_header(rate, None)
