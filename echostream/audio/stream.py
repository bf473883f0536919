"""Audio as it comes: recordings read piece by piece, raw PCM and WAV through pipes.

Raw PCM is signed 16-bit, little-endian. A pipe that starts with a WAV header (``arecord`` writes one) says its format
itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Callable, Iterator

import numpy as np

from echostream.audio.io import open_audio
from echostream.audio.resample import check_rate
from echostream.errors import AudioError

PIPE_BLOCK = 4096  # bytes asked for at a time; a pipe gives what it has
OPEN_END = 0x7FFFF000  # data size in the header of a WAV whose end is not known; readers take what comes
# Sample types of WAV files: (format tag, bits) -> numpy type, offset, full scale. 24 bits are unpacked to 32.
WAV_TYPES = {
    (1, 8): ("u1", 128, 128),
    (1, 16): ("<i2", 0, 1 << 15),
    (1, 24): ("<i4", 0, 1 << 31),
    (1, 32): ("<i4", 0, 1 << 31),
    (3, 32): ("<f4", 0, 1),
    (3, 64): ("<f8", 0, 1),
}


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


def open_file(path: str | Path, block_ms: int = 100) -> AudioSource:
    """A recording in any format libsndfile reads, channels averaged; never held in memory as a whole.

    Raises:
        AudioError: it is missing, empty or not audio.
    """
    file = open_audio(path)

    def blocks() -> Iterator[np.ndarray]:
        size = max(1, file.samplerate * block_ms // 1000)
        try:
            while len(samples := file.read(size, dtype="float32", always_2d=True)):
                yield samples.mean(axis=1, dtype=np.float32)
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise AudioError(f"{path} cannot be read beyond {file.tell() / file.samplerate:.1f} s: {reason}") from None

    seconds = file.frames / file.samplerate if 0 < file.frames < 1 << 60 else None
    return AudioSource(str(path), file.samplerate, blocks(), seconds, True, file.close)


def open_pipe(pipe: BinaryIO, rate: int, channels: int = 1) -> AudioSource:
    """Audio from a pipe: a WAV stream if it starts as one, else raw PCM of this rate and number of channels.

    Args:
        pipe: a buffered binary stream (``sys.stdin.buffer``).

    Raises:
        AudioError: the rate is impossible, or the WAV header is damaged or of an unknown sample type.
    """
    check_rate(rate)
    if channels < 1:
        raise AudioError(f"{channels} input channels are not possible; there must be at least 1")
    head = _read(pipe, 4)
    if head != b"RIFF":
        return AudioSource("standard input", rate, _blocks(pipe, head, (1, 16), channels, None), None, False)
    kind, channels, rate, size = _wav_header(pipe)
    return AudioSource("standard input", rate, _blocks(pipe, b"", kind, channels, size), None, True)


def _wav_header(pipe: BinaryIO) -> tuple[tuple[int, int], int, int, int | None]:
    """(format tag, bits), channels, rate and bytes of data (None: until the end) of a header after its ``RIFF``."""
    if _read(pipe, 8)[4:] != b"WAVE":
        raise AudioError("standard input starts with RIFF but is not a WAV stream")
    kind = None
    while True:
        chunk = _read(pipe, 8)
        if len(chunk) < 8:
            raise AudioError("the WAV stream on standard input ends inside its header")
        name, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if name == b"data":
            break
        body = _read(pipe, size + size % 2)
        if name == b"fmt " and len(body) >= 16:
            tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
            if tag == 0xFFFE and len(body) >= 26:  # WAVE_FORMAT_EXTENSIBLE names the real tag further on
                tag = struct.unpack("<H", body[24:26])[0]
            kind = (tag, bits)
    if kind not in WAV_TYPES or channels < 1:
        found = "no format" if kind is None else f"format {kind[0]} with {kind[1]} bits and {channels} channels"
        raise AudioError(f"the WAV stream on standard input has {found}; 8 to 32-bit PCM and float are read")
    check_rate(rate)
    return kind, channels, rate, size if 0 < size < OPEN_END else None


def _read(pipe: BinaryIO, count: int) -> bytes:
    """``count`` bytes, fewer at the end."""
    data = b""
    while len(data) < count and (more := pipe.read(count - len(data))):
        data += more
    return data


def _blocks(
    pipe: BinaryIO, head: bytes, kind: tuple[int, int], channels: int, size: int | None
) -> Iterator[np.ndarray]:
    dtype, offset, scale = WAV_TYPES[kind]
    frame = kind[1] // 8 * channels
    held = head
    while True:
        whole = len(held) // frame * frame
        if whole:
            data, held = held[:whole], held[whole:]
            if kind == (1, 24):
                triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
                wide = np.zeros((len(triples), 4), dtype=np.uint8)
                wide[:, 1:] = triples
                data = wide.tobytes()
            values = np.frombuffer(data, dtype).reshape(-1, channels)
            yield ((values.astype(np.float64) - offset) / scale).mean(axis=1).astype(np.float32)
        wanted = PIPE_BLOCK if size is None else min(PIPE_BLOCK, size)
        more = pipe.read1(wanted) if wanted else b""
        if not more:
            return
        size = None if size is None else size - len(more)
        held += more


def to_pcm(samples: np.ndarray) -> bytes:
    """Samples (float [N], full scale 1; louder is clipped) as signed 16-bit little-endian PCM."""
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2").tobytes()


def wav_stream_header(rate: int) -> bytes:
    """The header of a mono 16-bit WAV whose end is not known yet."""
    fmt = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    sizes = [struct.pack("<I", size) for size in (OPEN_END + 36, len(fmt), OPEN_END)]
    return b"RIFF" + sizes[0] + b"WAVEfmt " + sizes[1] + fmt + b"data" + sizes[2]
