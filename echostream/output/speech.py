"""Translated speech as a recording or through a pipe."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from echostream.audio.io import audio_format
from echostream.audio.stream import to_pcm, wav_stream_header
from echostream.audio.wav import HEADER_SIZE, wav_header
from echostream.errors import AudioError, OutputError
from echostream.files import failure, growing, write_all
from echostream.streaming.events import Event, Waveform


class SpeechFile:
    """A recording, mono 16-bit, in the format of its suffix (``.wav``, ``.flac``, ``.ogg`` ...).

    Args:
        path: of the file; it is written while the speech comes. A WAV is whole at any moment: who kills the program, or
            has no room left on the disk, has what was said until then.
        rate: samples per second.
        gaps: keep the clock of the source: every piece of speech stands where it was spoken by a translator who listens
            to the source at its own pace, with silence before and between. Without, the pieces follow each other.

    Raises:
        AudioError: the file cannot be written, or its suffix is no audio format.
    """

    def __init__(self, path: str | Path, rate: int, gaps: bool = True):
        kind = audio_format(path)
        try:
            file = growing(path)
        except OutputError as error:
            raise AudioError(str(error)) from None
        try:
            writer = _Wav if kind in ("WAV", "WAVEX") else _Encoded
            self.file: _Wav | _Encoded = writer(file, rate, kind)
        except (OSError, RuntimeError, ValueError) as error:
            raise AudioError(failure(path, error)) from None
        self.path, self.rate, self.gaps, self.written, self.broken = path, rate, gaps, 0, False

    def take(self, event: Event) -> None:
        """Raises: AudioError, when the file cannot be written any further."""
        if not isinstance(event, Waveform):
            return
        if self.gaps:
            missing = round(event.source_time_s * self.rate) - self.written
            while missing > 0:  # in pieces: a pause may last an hour
                size = min(missing, 10 * self.rate)
                self._write(np.zeros(size, dtype=np.float32))
                missing -= size
        self._write(np.clip(event.samples, -1.0, 1.0))

    def _write(self, samples: np.ndarray) -> None:
        if not self.broken:
            self._do(lambda: self.file.write(samples))
            self.written += len(samples)

    def close(self) -> None:
        """Raises: AudioError, when the end cannot be written."""
        if self.broken:
            self.file.abandon()
        else:
            self._do(self.file.close)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, RuntimeError, AssertionError) as error:  # soundfile asserts that all was written
            self.broken = True
            self.file.abandon()
            if isinstance(error, AssertionError):
                where = f"beyond {self.written / self.rate:.1f} s"
                raise AudioError(f"{self.path} cannot be written {where}: the disk is full or gone") from None
            raise AudioError(failure(self.path, error)) from None


class _Wav:
    """16-bit WAV whose header always tells how much is there."""

    def __init__(self, file, rate: int, kind: str):
        self.raw, self.rate, self.size = file, rate, 0
        self.regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        try:
            write_all(file, wav_header(rate, 0 if self.regular else None))
        except OSError:
            file.close()
            raise

    def write(self, samples: np.ndarray) -> None:
        data = to_pcm(samples)
        try:
            write_all(self.raw, data)
            self.size += len(data)
        except OSError:
            if self.regular:  # what fitted is kept, to the last whole sample
                self.size = max(0, self.raw.seek(0, os.SEEK_END) - HEADER_SIZE) // 2 * 2
                self.raw.truncate(HEADER_SIZE + self.size)
            raise
        finally:
            if self.regular:
                os.pwrite(self.raw.fileno(), wav_header(self.rate, self.size), 0)

    def close(self) -> None:
        self.raw.close()

    abandon = close


class _Encoded:
    """Any other format, by libsndfile."""

    def __init__(self, file, rate: int, kind: str):
        import soundfile

        self.raw = file
        subtype = "PCM_16" if soundfile.check_format(kind, "PCM_16") else None
        try:
            self.file = soundfile.SoundFile(file.fileno(), "w", rate, 1, subtype, format=kind, closefd=False)
        except BaseException:
            file.close()
            raise

    def write(self, samples: np.ndarray) -> None:
        self.file.write(samples)

    def close(self) -> None:
        self.file.close()
        self.raw.close()

    def abandon(self) -> None:
        try:
            self.file.close()
        except RuntimeError:
            pass
        finally:
            self.raw.close()


class SpeechPipe:
    """Speech as it comes, without gaps: raw signed 16-bit little-endian PCM, or a WAV whose header leaves its end open.

    A reader that goes away (``BrokenPipeError``) ends this output only; ``broken`` says so.

    Raises:
        OutputError: here and in ``take``, when it is a file and cannot be written any further.
    """

    def __init__(self, pipe: BinaryIO, rate: int, header: bool):
        self.pipe, self.broken = pipe, False
        if header:
            self._write(wav_stream_header(rate))

    def take(self, event: Event) -> None:
        if isinstance(event, Waveform):
            self._write(to_pcm(event.samples))

    def _write(self, data: bytes) -> None:
        if self.broken:
            return
        try:
            self.pipe.write(data)
            self.pipe.flush()
        except BrokenPipeError:
            self.broken = True
        except OSError as error:
            self.broken = True
            raise OutputError(failure("standard output", error)) from None

    def close(self) -> None:
        self._write(b"")
