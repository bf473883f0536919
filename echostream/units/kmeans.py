"""k-means over speech features: fitting, saving, reading other people's files without running their code.

Features are first mapped by an affine ``Projection``: standardised, and freed of what tells only *when* a frame
occurs. A Whisper encoder adds absolute positions to its input, and a fifth of its output's variance still says where in
the window a frame is; left in, the same sound half a second later gets another unit.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from echostream.errors import CheckpointError, ConfigError
from echostream.files import replacing
from echostream.loading import check_array, read_npz

FORMAT = "echostream/kmeans/1"
_EDGE = 12  # frames at either end of a recording that say "start" or "end" for good reasons
MAX_BYTES = 256 << 20  # of a file: 50,000 centroids of 1,280 numbers
_MAX_ROWS = 8192  # frames whose distances are held at once


@dataclass(frozen=True)
class Projection:
    """``(x - mean) / scale``, then the directions ``remove`` taken out.

    Attributes:
        mean, scale: float32 [D].
        remove: float32 [P, D], orthonormal rows.
    """

    mean: np.ndarray
    scale: np.ndarray
    remove: np.ndarray

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """float32 [T, D] → float32 [T, D]."""
        frames = (frames - self.mean) / self.scale
        return (frames - (frames @ self.remove.T) @ self.remove).astype(np.float32)

    @classmethod
    def identity(cls, dim: int) -> Projection:
        return cls(np.zeros(dim, np.float32), np.ones(dim, np.float32), np.zeros((0, dim), np.float32))

    @classmethod
    def fit(cls, recordings: Sequence[np.ndarray], positions: int = 0) -> Projection:
        """Standardise, and take out the ``positions`` directions in which the mean changes most with the position.

        Args:
            recordings: features of each recording, float32 [T, D].
        """
        frames = np.concatenate(recordings)
        mean, scale = frames.mean(axis=0), np.maximum(frames.std(axis=0), 1e-5)
        middle = [r[_EDGE : len(r) - _EDGE] for r in recordings]
        by_position = []
        for position in range(max(map(len, middle), default=0)):
            here = [r[position] for r in middle if len(r) > position]
            if len(here) >= 30:
                by_position.append((np.mean(here, axis=0) - mean) / scale)
        remove = np.zeros((0, frames.shape[1]), np.float32)
        if positions and len(by_position) > positions:
            means = np.stack(by_position)
            remove = np.linalg.svd(means - means.mean(axis=0), full_matrices=False)[2][:positions]
        return cls(mean.astype(np.float32), scale.astype(np.float32), remove.astype(np.float32))


@dataclass(frozen=True)
class KMeans:
    """Centroids float32 [K, D] in the projected space, and the name of the extractor they were fitted to."""

    centroids: np.ndarray
    projection: Projection
    features: str = ""

    def __len__(self) -> int:
        return len(self.centroids)

    def units(self, frames: np.ndarray) -> np.ndarray:
        """The nearest centroid of each frame: float32 [T, D] → int64 [T].

        Raises:
            ConfigError: the frames are of another width.
        """
        if frames.ndim != 2 or frames.shape[1] != self.centroids.shape[1]:
            raise ConfigError(
                f"features of shape {frames.shape} do not fit centroids of width {self.centroids.shape[1]}"
                + (f" (fitted on {self.features})" if self.features else "")
            )
        return nearest(self.projection(frames), self.centroids)[0]

    def save(self, path: Path) -> None:
        arrays = {
            "format": np.array(FORMAT),
            "features": np.array(self.features),
            "centroids": self.centroids,
            "mean": self.projection.mean,
            "scale": self.projection.scale,
            "remove": self.projection.remove,
        }
        _save_npz(path, arrays)


def load_kmeans(path: Path) -> KMeans:
    """Read centroids: our ``.npz``, or a joblib file of scikit-learn's KMeans as HuBERT and StreamSpeech publish them.

    Raises:
        CheckpointError: the file is missing, damaged, holds no centroids, or would run code when unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"k-means file {path} does not exist")
    if zipfile.is_zipfile(path):
        arrays = _load_npz(path)
        if str(arrays.get("format")) != FORMAT:
            raise CheckpointError(f"k-means file {path} is not of the format {FORMAT!r}")
        missing = [name for name in ("centroids", "features", "mean", "scale", "remove") if name not in arrays]
        if missing:
            raise CheckpointError(f"k-means file {path} lacks {missing[0]!r}")
        width = arrays["centroids"].shape[-1] if arrays["centroids"].ndim else 0
        shapes = {"centroids": (None, width), "mean": (width,), "scale": (width,), "remove": (None, width)}
        for name, shape in shapes.items():
            check_array(arrays[name], f"k-means file {path}: {name}", CheckpointError, shape=shape)
        if not len(arrays["centroids"]) or not (arrays["scale"] > 0).all():
            raise CheckpointError(f"k-means file {path} has no centroids, or scales that are not above 0")
        centroids, *parts = (arrays[name].astype(np.float32) for name in ("centroids", "mean", "scale", "remove"))
        return KMeans(centroids, Projection(*parts), str(arrays["features"]))
    centroids = read_joblib_centroids(path)
    return KMeans(centroids, Projection.identity(centroids.shape[1]))


def nearest(frames: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid and squared distance of each frame: [T, D], [K, D] → int64 [T], float32 [T]."""
    squares = (centroids**2).sum(axis=1)
    labels, distances = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for start in range(0, len(frames), _MAX_ROWS):
        rows = frames[start : start + _MAX_ROWS]
        scores = squares - 2.0 * (rows @ centroids.T)
        best = scores.argmin(axis=1)
        labels.append(best)
        distances.append(np.maximum(scores[np.arange(len(rows)), best] + (rows**2).sum(axis=1), 0.0))
    return np.concatenate(labels), np.concatenate(distances)


def fit_kmeans(
    frames: np.ndarray,
    count: int,
    seed: int = 1,
    steps: int = 150,
    batch: int = 10_000,
    full_steps: int = 2,
    state: Path | None = None,
    progress: Callable = iter,
) -> np.ndarray:
    """Centroids float32 [count, D] by mini-batch k-means (Sculley, 2010) from a k-means++ start, ending in Lloyd steps.

    Args:
        frames: float32 [N, D], projected.
        steps: mini-batches, each drawn from (seed, step) alone.
        full_steps: passes over all frames at the end, which also revive centroids that stand for nothing.
        state: where to keep the work; a later call with the same arguments goes on from there, to the same result.

    Raises:
        ConfigError: fewer frames than centroids.
    """
    if len(frames) < count:
        raise ConfigError(f"{len(frames)} frames are too few for {count} units")
    key = f"{len(frames)} {count} {seed} {steps} {batch} {full_steps} {zlib.crc32(frames[:1000].tobytes())}"
    saved = _load_npz(state) if state is not None and state.is_file() else {}
    if str(saved.get("key")) == key:
        begun, centroids, counts = int(saved["step"]), saved["centroids"], saved["counts"]
    else:
        begun, counts = 0, np.zeros(count)
        sample = np.random.default_rng([seed, 0]).permutation(len(frames))[: max(20 * count, 2000)]
        centroids = _plus_plus(frames[sample], count, np.random.default_rng([seed, 1]))
    for step in progress(range(begun, steps + full_steps)):
        if step < steps:
            rows = frames[np.random.default_rng([seed, 2, step]).integers(0, len(frames), min(batch, len(frames)))]
            centroids, counts = _mini_batch(rows, centroids, counts)
        else:
            centroids = _lloyd(frames, centroids)
        if state is not None and (step % 25 == 24 or step == steps + full_steps - 1):
            _save_npz(
                state,
                {
                    "key": np.array(key),
                    "step": np.array(step + 1),
                    "centroids": centroids,
                    "counts": counts,
                },
            )
    return centroids


def _plus_plus(frames: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Starting points far from each other (Arthur and Vassilvitskii, 2007)."""
    chosen = [int(rng.integers(len(frames)))]
    squares = (frames**2).sum(axis=1)
    distance = np.full(len(frames), np.inf)
    for _ in range(count - 1):
        last = frames[chosen[-1]]
        distance = np.minimum(distance, np.maximum(squares - 2.0 * (frames @ last) + last @ last, 0.0))
        distance[chosen] = 0.0
        total = np.cumsum(distance, dtype=np.float64)
        if total[-1] > 0.0:
            chosen.append(int(min(np.searchsorted(total, rng.random() * total[-1]), len(frames) - 1)))
        else:  # fewer distinct frames than centroids
            chosen.append(int(rng.integers(len(frames))))
    return frames[chosen].copy()


def _mini_batch(rows: np.ndarray, centroids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each centroid becomes the mean of everything it has been given so far."""
    labels, _ = nearest(rows, centroids)
    sums, new = _sums(rows, labels, len(centroids))
    total = counts + new
    share = (new / np.maximum(total, 1.0))[:, None]
    mean = sums / np.maximum(new, 1.0)[:, None]
    return (centroids + share * (mean - centroids)).astype(np.float32), total


def _lloyd(frames: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    labels, distances = nearest(frames, centroids)
    sums, counts = _sums(frames, labels, len(centroids))
    centroids = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1.0)[:, None], centroids)
    empty = np.flatnonzero(counts == 0)
    centroids[empty] = frames[np.argsort(-distances, kind="stable")[: len(empty)]]
    return centroids.astype(np.float32)


def _sums(rows: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the rows of each label, float64 [count, D], and how many there are."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    sums = np.zeros((count, rows.shape[1]))
    sums[present] = np.add.reduceat(rows[order].astype(np.float64), starts, axis=0)
    return sums, np.bincount(labels, minlength=count).astype(np.float64)


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(path) as file:
        members: dict[str, Any] = {**arrays}
        np.savez(file, **members)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    return read_npz(path, "k-means file", CheckpointError, MAX_BYTES, kinds="biufU")


# --- scikit-learn's KMeans in joblib's format --------------------------------------------------------------------


class _Inert:
    """Stands in for any class of scikit-learn: takes the pickled attributes, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _ArrayHere(_Inert):
    """joblib's note that an array's bytes follow in the file (NumpyArrayWrapper)."""

    def read(self, file: io.BufferedIOBase) -> np.ndarray:
        facts = self.__dict__
        dtype, shape = facts.get("dtype"), facts.get("shape")
        if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(shape, tuple):
            raise pickle.UnpicklingError("an array of Python objects, which could hide code")
        if facts.get("numpy_array_alignment_bytes"):
            padding = file.read(1)
            file.read(padding[0] if padding else 0)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        data = file.read(size)
        if len(data) != size:
            raise EOFError("the file ends within an array")
        return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if facts.get("order") == "F" else "C")


class _PlainArray(_Inert):
    """A numpy array pickled the ordinary way, without joblib's wrapper."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array of Python objects, which could hide code")
        self.array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def _plain_array(*_: Any) -> _PlainArray:
    return _PlainArray()


def _inert_factory(kind: Any = None, *_: Any) -> _Inert:
    return kind() if isinstance(kind, type) and issubclass(kind, _Inert) else _Inert()


def _make_scalar(dtype: np.dtype, data: bytes) -> np.generic:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a scalar that is no number")
    return np.frombuffer(data, dtype=dtype)[0]


def _allowed(module: str, name: str) -> Any:
    """What a pickled name stands for; nothing is ever imported on a file's behalf."""
    root = module.split(".")[0]
    if (module, name) in (("numpy", "dtype"), ("numpy", "ndarray")):
        return np.dtype if name == "dtype" else _Inert
    if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("scalar", "_reconstruct"):
        return _make_scalar if name == "scalar" else _plain_array
    if module == "joblib.numpy_pickle" and name == "NumpyArrayWrapper":
        return _ArrayHere
    if root == "sklearn" or module.startswith("numpy.random"):
        return _Inert if name[:1].isupper() else _inert_factory
    if (module, name) == ("copyreg", "_reconstructor"):
        return _inert_factory
    if (module, name) in (("builtins", "object"), ("__builtin__", "object")):
        return _Inert
    raise pickle.UnpicklingError(f"it refers to {module}.{name}")


class _Reader(pickle._Unpickler):  # the Python one: joblib puts array bytes between the opcodes
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        return _allowed(module, name)

    def load_build(self) -> None:
        super().load_build()  # type: ignore[misc]  # typeshed does not have it
        if isinstance(self.stack[-1], _ArrayHere):
            self.stack[-1] = _ArrayHere.read(self.stack[-1], self._file)

    dispatch[pickle.BUILD[0]] = load_build


def read_joblib_centroids(path: Path) -> np.ndarray:
    """``cluster_centers_`` float32 [K, D] of a pickled scikit-learn KMeans, without importing or running anything.

    Raises:
        CheckpointError: the file refers to anything but scikit-learn's and numpy's data classes, is damaged or
            compressed in a way other than zlib, or holds no centroids.
    """
    data = Path(path).read_bytes()
    try:
        if data[:1] == b"\x78":
            data = zlib.decompress(data)
        model = _Reader(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"k-means file {path} is refused: {error}") from None
    except Exception as error:  # a damaged pickle can stumble anywhere
        raise CheckpointError(f"k-means file {path} is damaged or no k-means file ({type(error).__name__})") from None
    centroids = getattr(model, "cluster_centers_", None)
    if isinstance(centroids, _PlainArray):
        centroids = centroids.array
    if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or not np.isfinite(centroids).all():
        raise CheckpointError(f"k-means file {path} holds no cluster_centers_ [units, width]")
    return centroids.astype(np.float32)
