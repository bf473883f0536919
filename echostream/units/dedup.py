"""Runs of units: ``17 17 296`` is unit 17 for two frames, then 296 for one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echostream.errors import ManifestError


def deduplicate(units: Sequence[int] | np.ndarray) -> tuple[list[int], list[int]]:
    """Unit of each run and its duration in frames of 20 ms."""
    units = np.asarray(units, dtype=np.int64)
    if not len(units):
        return [], []
    starts = np.flatnonzero(np.concatenate([[True], units[1:] != units[:-1]]))
    durations = np.diff(np.concatenate([starts, [len(units)]]))
    return units[starts].tolist(), durations.tolist()


def expand(units: Sequence[int], durations: Sequence[int]) -> list[int]:
    """The inverse of ``deduplicate``. Raises ManifestError when the lists are of different length."""
    if len(units) != len(durations):
        raise ManifestError(f"{len(units)} units with {len(durations)} durations")
    return np.repeat(np.asarray(units, dtype=np.int64), durations).tolist()
