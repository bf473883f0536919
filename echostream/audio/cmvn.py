"""Global cepstral mean and variance normalisation: one mean and one deviation per mel bin, from the training set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echostream.constants import NUM_MEL_BINS
from echostream.errors import ManifestError
from echostream.files import replacing
from echostream.loading import read_npz

MIN_STD = 1e-5
MAX_BYTES = 1 << 20  # of its file


@dataclass(frozen=True)
class GlobalCMVN:
    """Attributes: ``mean`` and ``std``, float32 [80]."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def load(cls, path: str | Path) -> GlobalCMVN:
        """Read fairseq's ``gcmvn.npz`` (arrays ``mean`` and ``std``).

        Raises:
            ManifestError: the file is missing, not such an archive, or its numbers cannot be used.
        """
        arrays = read_npz(path, "CMVN file", ManifestError, MAX_BYTES, ("mean", "std"))
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
            mean, std = (arrays[key].astype(np.float32).reshape(-1) for key in ("mean", "std"))
        if mean.shape != std.shape or mean.shape != (NUM_MEL_BINS,):
            raise ManifestError(f"CMVN file {path} has {mean.size} means and {std.size} deviations, not {NUM_MEL_BINS}")
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
            raise ManifestError(f"CMVN file {path} holds NaN, infinite or negative values; compute it anew")
        return cls(mean, np.maximum(std, MIN_STD))

    @classmethod
    def estimate(cls, features: Iterable[np.ndarray]) -> GlobalCMVN:
        """Mean and deviation over all frames of many recordings, each [T, 80]; sums are kept in float64.

        Raises:
            ManifestError: there is not one frame.
        """
        count, total, squares = 0, np.zeros(NUM_MEL_BINS), np.zeros(NUM_MEL_BINS)
        for item in features:
            item = np.asarray(item, dtype=np.float64)
            count += len(item)
            total += item.sum(axis=0)
            squares += (item**2).sum(axis=0)
        if count == 0:
            raise ManifestError("no feature frames to compute the global CMVN from")
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, MIN_STD**2))
        return cls(mean.astype(np.float32), std.astype(np.float32))

    def save(self, path: str | Path) -> None:
        """Raises: OutputError."""
        path = Path(path)
        with replacing(path if path.suffix == ".npz" else path.with_name(path.name + ".npz")) as file:
            np.savez(file, mean=self.mean, std=self.std)

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Normalise ``features`` [T, 80] into a new float32 array."""
        normalised: np.ndarray = (np.asarray(features, dtype=np.float32) - self.mean) / self.std
        return normalised
