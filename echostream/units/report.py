"""What units are worth: how well they tell phones apart, and what they cost in bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echostream.constants import UNIT_RATE
from echostream.units.dedup import deduplicate


def purity(units: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Purities and information of HuBERT's paper (Hsu et al., 2021, section IV.C), over frames.

    Args:
        units: [T] cluster of each frame. labels: [T] what was spoken in it, of any type.

    Returns:
        ``phone_purity``: how often a frame's label is the most frequent one of its cluster. ``cluster_purity``: how
        often a frame's cluster is the most frequent one of its label. ``pnmi``: the share of the labels' entropy that
        knowing the cluster takes away. All grow by chance when frames per cluster are few.
    """
    _, z = np.unique(units, return_inverse=True)
    _, y = np.unique(labels, return_inverse=True)
    joint = np.zeros((z.max() + 1, y.max() + 1))
    np.add.at(joint, (z, y), 1.0)
    joint /= joint.sum()
    label_bits = entropy(joint.sum(0))
    shared = entropy(joint.sum(1)) + label_bits - entropy(joint.ravel())
    return {
        "phone_purity": float(joint.max(1).sum()),
        "cluster_purity": float(joint.max(0).sum()),
        "pnmi": float(shared / label_bits) if label_bits else 0.0,
    }


def entropy(weights: np.ndarray) -> float:
    """Bits of the distribution in proportion to ``weights``."""
    p = weights[weights > 0] / weights.sum()
    return float(-(p * np.log2(p)).sum())


def bit_rate(sequences: Sequence[np.ndarray], count: int) -> dict[str, float]:
    """Rates of units and bits.

    Args:
        sequences: [T] units of each recording, one a frame. count: number of clusters.

    Returns:
        units a second after deduplication (before, it is ``UNIT_RATE``); bits a second by the entropy of single units
        and by log2 of ``count``, before and after; clusters in use. Durations are not counted.
    """
    runs = [np.asarray(deduplicate(row)[0]) for row in sequences]
    seconds = sum(map(len, sequences)) / UNIT_RATE
    rate = sum(map(len, runs)) / seconds
    before, after = (np.bincount(np.concatenate(rows), minlength=count) for rows in (sequences, runs))
    return {
        "hours": seconds / 3600,
        "used": int((before > 0).sum()),
        "units_per_second": float(UNIT_RATE),
        "runs_per_second": rate,
        "bits_per_second": UNIT_RATE * entropy(before),
        "bits_per_second_runs": rate * entropy(after),
        "bits_per_second_fixed": UNIT_RATE * float(np.log2(count)),
        "bits_per_second_runs_fixed": rate * float(np.log2(count)),
    }
