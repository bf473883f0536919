"""Reading and writing recordings: any format libsndfile knows, any rate, any number of channels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echostream.audio.resample import Resampler
from echostream.constants import SAMPLE_RATE
from echostream.errors import AudioError

if TYPE_CHECKING:
    import soundfile


def load_audio(path: str | Path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Read a recording as mono samples at ``sample_rate``.

    Channels are averaged. Other rates go through the same filter as the streaming session's, so that a file read at
    once and a file streamed give the same samples.

    Returns:
        float32 [N], full scale is 1.

    Raises:
        AudioError: the file is missing, empty, not audio, or holds NaN or infinite samples.
    """
    samples, rate = read_audio(path)
    return Resampler(rate, sample_rate).resample(samples)


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a recording as mono samples at its own rate: (float32 [N], samples per second).

    Raises:
        AudioError: as for ``load_audio``.
    """
    path = Path(path)
    with open_audio(path) as file:
        rate = file.samplerate
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except (RuntimeError, OSError) as error:
            raise AudioError(f"{path} cannot be read as audio: {_reason(error, path)}") from None
    if samples.shape[0] == 0:
        raise AudioError(f"audio file {path} holds no samples")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    check_finite(mono, str(path))
    return np.ascontiguousarray(mono), int(rate)


def open_audio(path: str | Path) -> soundfile.SoundFile:
    """Open a recording for reading.

    Raises:
        AudioError: the file is missing, empty or not audio.
    """
    import soundfile  # brings libsndfile: kept out of `import echostream.audio`

    path = Path(path)
    if not path.exists():
        raise AudioError(f"audio file {path} does not exist")
    if path.is_dir():
        raise AudioError(f"{path} is a directory, not an audio file")
    if path.stat().st_size == 0:
        raise AudioError(f"audio file {path} is empty (0 bytes)")
    try:
        return soundfile.SoundFile(path)
    except (RuntimeError, TypeError, OSError) as error:  # libsndfile's own errors are RuntimeErrors
        raise AudioError(f"{path} cannot be read as audio: {_reason(error, path)}") from None


def _reason(error: Exception, path: Path) -> str:
    return str(error).splitlines()[0].removeprefix(f"Error opening {str(path)!r}: ")


def write_audio(path: str | Path, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write mono samples (float [N], full scale 1; louder is clipped) as 16-bit PCM, in the format of the suffix."""
    import soundfile  # brings libsndfile: kept out of `import echostream.audio`

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.clip(samples, -1.0, 1.0), sample_rate, subtype="PCM_16")


def check_finite(samples: np.ndarray, name: str) -> None:
    """Refuse NaN and infinite samples.

    Raises:
        AudioError: naming the recording and the first bad position.
    """
    finite = np.isfinite(samples)
    if not finite.all():
        first = int(np.argmin(finite))
        raise AudioError(
            f"{name} has {int((~finite).sum())} NaN or infinite samples, the first at position {first}; "
            "repair it or leave it out"
        )
