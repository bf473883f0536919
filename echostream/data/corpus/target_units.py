"""From target recordings to units: k-means once, then a ledger of units for every recording."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from echostream.audio.io import load_audio
from echostream.data.corpus.rows import Ledger, Skipped, hash_int, take_shard, write_table
from echostream.data.corpus.speech import TARGET_COLUMNS
from echostream.errors import AudioError, ConfigError, ManifestError
from echostream.units.dedup import deduplicate
from echostream.units.features import UnitFeatures
from echostream.units.kmeans import KMeans, Projection, fit_kmeans, load_kmeans

UNIT_COLUMNS = ("id", "audio", "units", "durations")
_BATCH = 128  # recordings taken through the extractor at once
_REFRESH = 4  # batches between two versions of target/units.tsv


def fit_units(
    output: Path,
    features: UnitFeatures,
    recordings: Iterable[Path],
    num_units: int,
    max_frames: int = 300_000,
    positions: int = 16,
    seed: int = 1,
    progress: Callable[..., Iterable] = iter,
) -> KMeans:
    """Fit k-means on recordings drawn by hash, ``max_frames`` frames in all; saved as ``units/kmeans.npz``."""
    sample, total = [], 0
    order = sorted(recordings, key=lambda path: hash_int(seed, "fit", path.stem))
    for paths in _batches(progress(order), _BATCH):
        loaded = [samples for _, samples in _load(paths, None)]
        for frames in features.extract(loaded):
            sample.append(frames)
            total += len(frames)
        if total >= max_frames:
            break
    if not sample:
        raise ManifestError(f"no target recordings of the train split in {output / 'target'}; run the step 'target'")
    projection = Projection.fit(sample, positions)
    frames = projection(np.concatenate(sample)[:max_frames])
    state = output / "units" / "fit.npz"
    centroids = fit_kmeans(frames, num_units, seed, state=state, progress=progress)
    model = KMeans(centroids, projection, features.name)
    model.save(output / "units" / "kmeans.npz")
    state.unlink(missing_ok=True)
    return model


def existing_kmeans(output: Path, features: UnitFeatures, num_units: int) -> KMeans | None:
    """The corpus's own k-means, if it has been fitted. Raises ConfigError when it is of another kind."""
    path = output / "units" / "kmeans.npz"
    if not path.is_file():
        return None
    model = load_kmeans(path)
    if len(model) != num_units or (model.features and model.features != features.name):
        raise ConfigError(
            f"{path} has {len(model)} units of {model.features}, asked for {num_units} of {features.name}; "
            "delete it to fit anew"
        )
    return model


def assign_units(
    output: Path,
    features: UnitFeatures,
    model: KMeans,
    order: list[str],
    shard: int = 0,
    num_shards: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, int]:
    """Units of every target recording, in the ``order`` given (names of targets), refreshed in ``target/units.tsv``."""
    if model.features and model.features != features.name:
        raise ConfigError(f"k-means was fitted on {model.features}, the features are {features.name}")
    recordings = Ledger(output / "target", "speech", TARGET_COLUMNS).read()
    ledger = units_ledger(output, model, shard, num_shards)
    done = ledger.read()
    mine = take_shard([name for name in order if name in recordings], shard, num_shards)
    todo = [name for name in mine if name not in done]
    counts = {"done": len(mine) - len(todo), "converted": 0, "skipped": 0}
    with Skipped(output / "skipped", "units", shard, num_shards) as skipped:
        for number, names in enumerate(_batches(progress(todo), _BATCH)):
            loaded = list(_load([output / "target" / recordings[name]["audio"] for name in names], skipped))
            lines = []
            for (path, _), frames in zip(loaded, features.extract([samples for _, samples in loaded])):
                units, durations = deduplicate(model.units(frames))
                lines.append((path.stem, path.name, " ".join(map(str, units)), " ".join(map(str, durations))))
            ledger.append(lines)
            counts["converted"] += len(lines)
            if number % _REFRESH == _REFRESH - 1:
                write_units(output, ledger)
        counts["skipped"] = len(skipped)
    write_units(output, ledger)
    return counts


def units_ledger(output: Path, model: KMeans, shard: int = 0, num_shards: int = 1) -> Ledger:
    """Named after the centroids, so that units of an earlier k-means are never mixed in."""
    version = f"{zlib.crc32(model.centroids.tobytes()):08x}"
    return Ledger(output / "units", f"units-{version}", UNIT_COLUMNS, shard, num_shards)


def write_units(output: Path, ledger: Ledger) -> None:
    """``target/units.tsv`` from all shards: what the vocoder is trained on."""
    lines = ledger.read().values()
    write_table(output / "target" / "units.tsv", UNIT_COLUMNS, ([line[c] for c in UNIT_COLUMNS] for line in lines))


def _batches(items: Iterable, size: int) -> Iterator[list]:
    rest = iter(items)
    yield from iter(lambda: list(itertools.islice(rest, size)), [])


def _load(paths: list[Path], skipped: Skipped | None) -> Iterator[tuple[Path, np.ndarray]]:
    for path in paths:
        try:
            yield path, load_audio(path)
        except AudioError as error:
            if skipped is not None:
                skipped.add(path.stem, "unusable audio", error)
