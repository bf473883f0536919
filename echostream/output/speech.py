"""Translated speech as a recording or through a pipe."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from echostream.audio.stream import to_pcm, wav_stream_header
from echostream.errors import AudioError
from echostream.streaming.events import Event, Waveform


class SpeechFile:
    """A recording, mono 16-bit, in the format of its suffix (``.wav``, ``.flac``, ``.ogg`` ...).

    Args:
        path: of the file; it is written while the speech comes.
        rate: samples per second.
        gaps: keep the clock of the source: every piece of speech stands where it was spoken by a translator who listens
            to the source at its own pace, with silence before and between. Without, the pieces follow each other.

    Raises:
        AudioError: the file cannot be written, or its suffix is no audio format.
    """

    def __init__(self, path: str | Path, rate: int, gaps: bool = True):
        import soundfile

        path = Path(path)
        kind = path.suffix[1:].upper()
        kind = {"OGA": "OGG", "AIF": "AIFF"}.get(kind, kind)
        if kind not in soundfile.available_formats():
            raise AudioError(f"{path} has no suffix of an audio format; try {path.stem}.wav or {path.stem}.flac")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            subtype = "PCM_16" if soundfile.check_format(kind, "PCM_16") else None
            self.file = soundfile.SoundFile(path, "w", rate, 1, subtype, format=kind)
        except (OSError, RuntimeError, ValueError) as error:
            raise AudioError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
        self.rate, self.gaps, self.written = rate, gaps, 0

    def take(self, event: Event) -> None:
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
        self.file.write(samples)
        self.written += len(samples)

    def close(self) -> None:
        self.file.close()


class SpeechPipe:
    """Speech as it comes, without gaps: raw signed 16-bit little-endian PCM, or a WAV whose header leaves its end open.

    A reader that goes away (``BrokenPipeError``) ends this output only; ``broken`` says so.
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

    def close(self) -> None:
        self._write(b"")
