"""Reading and writing recordings: any format libsndfile or ffmpeg knows, any rate, any number of channels."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from echostream.audio.decode import file_blocks, open_forward
from echostream.audio.level import LevelWatch
from echostream.audio.resample import Resampler
from echostream.audio.stream import AudioSource, open_file, open_pipe
from echostream.constants import SAMPLE_RATE
from echostream.errors import AudioError, AudioWarning, LongAudioError
from echostream.files import replacing, reported

LOUDEST = 2.0**31  # no recording holds more, whatever its full scale; features overflow only far beyond
LONGEST_S = 3 * 3600.0  # of a recording that is read at once; a session takes what comes


def load_audio(path: str | Path, sample_rate: int = SAMPLE_RATE, longest_s: float | None = None) -> np.ndarray:
    """Read a recording as mono samples at ``sample_rate``.

    Channels are averaged. Other rates go through the same filter as the streaming session's, so that a file read at
    once and a file streamed give the same samples.

    Args:
        longest_s: no more is read of it (default: ``LONGEST_S``). A few kilobytes may hold days of silence.

    Returns:
        float32 [N], full scale is 1.

    Raises:
        AudioError: the file is missing, empty, not audio, or holds NaN, infinite or impossibly large samples.
        LongAudioError: it is longer than ``longest_s``.
    """
    with _blocks(path, longest_s) as (source, blocks):
        resampler = Resampler(source.rate, sample_rate)
        state, parts = resampler.init_state(), []
        for block in blocks:
            part, state = resampler.step(block, state)
            parts.append(part)
        parts.append(resampler.step(np.zeros(0, np.float32), state, finished=True)[0])
    return np.concatenate(parts)


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a recording as mono samples at its own rate: (float32 [N], samples per second).

    Raises:
        AudioError: as for ``load_audio``.
    """
    with _blocks(path) as (source, blocks):
        return np.concatenate(list(blocks)), int(source.rate)


def decode_audio(data: bytes, name: str, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """``load_audio`` for a recording that is in memory; ``name`` is for messages.

    Raises:
        AudioError: as for ``load_audio``; and raw PCM is none.
    """
    try:
        file = open_forward(io.BytesIO(data))
        source = AudioSource(name, file.samplerate, file_blocks(file, name), None, True, file.close)
    except (RuntimeError, TypeError):
        source = open_pipe(io.BytesIO(data), SAMPLE_RATE, name=name)
    if not source.wav:
        raise AudioError(f"{name} cannot be read as audio: its format is not known")
    try:
        samples = np.concatenate([np.zeros(0, np.float32), *_checked(source)])
    finally:
        source.close()
    return Resampler(source.rate, sample_rate).resample(samples)


@contextmanager
def _blocks(path: str | Path, longest_s: float | None = None) -> Iterator[tuple[AudioSource, Iterator[np.ndarray]]]:
    source = open_file(path, block_ms=1000)
    try:
        yield source, _checked(source, longest_s)
    finally:
        source.close()


def _checked(source: AudioSource, longest_s: float | None = None) -> Iterator[np.ndarray]:
    """The blocks of a source that has some, not too many and none unusable."""
    longest_s = LONGEST_S if longest_s is None else longest_s
    count, level = 0, LevelWatch()
    for block in source.blocks:
        check_finite(block, source.name, count)
        if (said := level.hear(block, source.rate)) is not None:
            warnings.warn(f"{source.name}: {said}", AudioWarning, stacklevel=3)
        count += len(block)
        if count > longest_s * source.rate:
            raise LongAudioError(f"{source.name} is longer than {longest_s:g} s; cut it")
        yield block
    if count == 0:
        raise AudioError(f"audio file {source.name} holds no samples")


def write_audio(path: str | Path, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write mono samples (float [N], full scale 1; louder is clipped) as 16-bit PCM, in the format of the suffix.

    Raises:
        OutputError: the file cannot be written.
        AudioError: its suffix is no audio format.
    """
    with replacing(path) as file, reported(path):
        try:
            # In memory first: libsndfile does not tell why a disk refused it.
            buffer = io.BytesIO()
            _soundfile().write(
                buffer, np.clip(samples, -1.0, 1.0), sample_rate, subtype="PCM_16", format=audio_format(path)
            )
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, AudioError):
                raise
            raise AudioError(f"{path} cannot be written: {(str(error).splitlines() or [''])[0]}") from None
        file.write(buffer.getvalue())


def audio_format(path: str | Path) -> str:
    """libsndfile's name of the format of a suffix.

    Raises:
        AudioError: it is none.
    """
    path = Path(path)
    kind = path.suffix[1:].upper()
    kind = {"OGA": "OGG", "AIF": "AIFF"}.get(kind, kind)
    if kind not in _soundfile().available_formats() or kind == "RAW":
        raise AudioError(f"{path} has no suffix of an audio format; try {path.stem}.wav or {path.stem}.flac")
    return kind


def _soundfile() -> ModuleType:
    # It brings libsndfile: kept out of `import echostream.audio`.
    return importlib.import_module("soundfile")


def check_finite(samples: np.ndarray, name: str, start: int = 0) -> None:
    """Refuse NaN, infinite and impossibly large samples: what comes behind would overflow and be NaN ever after.

    Args:
        start: position of the first sample in the recording, for the message.

    Raises:
        AudioError: naming the recording and the first bad position.
    """
    with np.errstate(invalid="ignore"):
        usable = np.abs(samples) <= LOUDEST  # not so for NaN
    if usable.all():
        return
    first = int(np.argmin(usable))
    where = f"the first at position {start + first}; repair it or leave it out"
    if np.isfinite(samples).all():
        raise AudioError(f"{name} has {int((~usable).sum())} samples beyond {LOUDEST:.0e} (full scale is 1), {where}")
    raise AudioError(f"{name} has {int((~usable).sum())} NaN or infinite samples, {where}")
