"""Edit distance of token sequences, for the error rates of CTC outputs."""

from __future__ import annotations

from typing import Sequence

import numpy as np


def edit_distance(hypothesis: Sequence[int], reference: Sequence[int]) -> int:
    """Least number of insertions, deletions and substitutions that turn one into the other (Levenshtein, 1966)."""
    if len(hypothesis) == 0 or len(reference) == 0:
        return max(len(hypothesis), len(reference))
    reference = np.asarray(reference)
    places = np.arange(len(reference) + 1)
    row = places.copy()
    for symbol in hypothesis:
        best = np.empty_like(row)
        best[0] = row[0] + 1
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (reference != symbol))
        # Insertions run along the row: best[j] = min over i <= j of best[i] + (j - i).
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])
