"""What a manifest's ``src_audio`` may be: a recording, a ``.npy`` of features, or a slice of an uncompressed zip."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from echostream.audio.fbank import fbank
from echostream.audio.io import check_finite, load_audio
from echostream.constants import NUM_MEL_BINS
from echostream.errors import AudioError
from echostream.loading import inside, read_array, read_bytes

MAX_FEATURES = 256 << 20  # bytes of one utterance's: more than a day


def is_features(audio: str) -> bool:
    """Does ``src_audio`` name ready features, which cannot be resampled?"""
    return audio.endswith(".npy") or ".zip:" in audio


def load_samples(root: Path, audio: str) -> np.ndarray:
    """The recording ``audio`` under ``root``: float32 [N] at 16 kHz.

    Raises:
        AudioError: it is missing, unreadable, empty or holds NaN; the message names the file.
    """
    return load_audio(inside(root, audio, "src_audio", AudioError))


def load_features(root: Path, audio: str) -> np.ndarray:
    """Features of ``audio`` under ``root``, before CMVN: float32 [T, 80], a new array.

    ``features.zip:offset:length`` is fairseq's convention: a ``.npy`` (or a recording) stored without compression,
    ``length`` bytes from byte ``offset``.

    Raises:
        AudioError: as for ``load_samples``, or the archive's slice is not an array of that shape.
    """
    if not is_features(audio):
        return fbank(load_samples(root, audio))
    if audio.endswith(".npy"):
        path = inside(root, audio, "src_audio", AudioError)
        return _array(read_bytes(path, "feature file", AudioError, MAX_FEATURES), str(path))
    name, _, numbers = audio.rpartition(".zip:")
    path = inside(root, f"{name}.zip", "src_audio", AudioError)
    offset, _, length = numbers.partition(":")
    if not all(n.isascii() and n.isdecimal() and len(n) <= 18 for n in (offset, length)):
        raise AudioError(f"{root / audio} is not of the form archive.zip:offset:length")
    if not path.is_file():
        raise AudioError(f"feature archive {path} does not exist")
    if not int(length) <= MAX_FEATURES or int(offset) > path.stat().st_size:
        raise AudioError(f"feature archive {path} has no {length} bytes at {offset}, which {audio} asks for")
    with path.open("rb") as file:
        file.seek(int(offset))
        data = file.read(int(length))
    if len(data) != int(length):
        raise AudioError(f"feature archive {path} ends before byte {int(offset) + int(length)}, which {audio} asks for")
    return _array(data, str(root / audio))


def _array(data: bytes, name: str) -> np.ndarray:
    if not data.startswith(b"\x93NUMPY"):
        raise AudioError(f"{name} does not start as a .npy array does; is the archive compressed, or the offset wrong?")
    features = read_array(data, name, AudioError)
    if features.ndim != 2 or features.shape[1] != NUM_MEL_BINS or len(features) == 0:
        raise AudioError(f"{name} has shape {list(features.shape)}; features are [frames, {NUM_MEL_BINS}]")
    features = features.astype(np.float32)
    check_finite(features.reshape(-1), name)
    return features
