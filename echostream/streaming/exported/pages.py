"""Keys and values of sentences in the making: buffers that grow with what they hold, and what a graph reads of them.

Letters: B streams, L layers, H heads, d width of a head, N new items.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np

# Attention reads so many places more at a time. In which order a softmax adds up its terms depends on how many there
# are, but not on further pages that are masked: a stream alone and in a batch of older ones gets the same bits.
PAGE = 16


class Pages:
    """Of every row an array [2 L, H, places, d]: keys, then values of each layer.

    A row without anything has no array of its own. What stands behind the places in use is finite, and no more.

    Args:
        rows: how many.
        layers, heads, width: L, H and d.
        limit: places that a row needs at most.
        dtype: of the numbers.
    """

    def __init__(self, rows: int, layers: int, heads: int, width: int, limit: int, dtype: Any = np.float32):
        self.shape, self.limit, self.dtype = (2 * layers, heads, width), limit, dtype
        self.nothing = np.zeros((2 * layers, heads, PAGE, width), dtype=dtype)
        self.rows = [self.nothing] * rows
        self._together = np.zeros(0, dtype=dtype)  # several rows, copied side by side for a graph
        self._holds: list[tuple[int, int]] | None = None  # which

    def clear(self, row: int) -> None:
        """Give a row's places back."""
        self.rows[row] = self.nothing

    def write(self, row: int, at: int, new: np.ndarray) -> None:
        """Put items [N, 2 L * H * d] into the places of a row from ``at`` on; all before are in use."""
        end, buffer = at + len(new), self.rows[row]
        if buffer is self.nothing or end > buffer.shape[2]:
            # An eighth more than asked for, so that what is copied on the way is of the order of what is kept.
            self.rows[row] = buffer = self._make(min(end + end // 8, self.limit), buffer[:, :, :at])
        layers, heads, width = self.shape
        buffer[:, :, at:end] = new.reshape(len(new), layers, heads, width).transpose(1, 2, 0, 3)
        self._holds = None

    def _make(self, places: int, held: np.ndarray) -> np.ndarray:
        layers, heads, width = self.shape
        buffer = np.zeros((layers, heads, pages(places), width), dtype=self.dtype)
        buffer[:, :, : held.shape[2]] = held
        return buffer

    def read(self, rows: list[int], used: np.ndarray) -> np.ndarray:
        """The first ``used`` [B] places of rows and as many more as fill pages: [2 L, B, H, places, d], valid until the
        next call. One row is not copied."""
        if len(rows) == 1:
            return self.rows[rows[0]][:, None]
        counts = [pages(max(n, 1)) for n in used.tolist()]
        holds = [(id(self.rows[row]), n) for row, n in zip(rows, counts)]
        layers, heads, width = self.shape
        shape = layers, len(rows), heads, max(counts), width
        size = math.prod(shape)
        if size > len(self._together):
            self._together, self._holds = np.zeros(size, dtype=self.dtype), None
        together = self._together[:size].reshape(shape)
        if holds != self._holds:  # they are the same for all steps of a beam
            for i, (row, n) in enumerate(zip(rows, counts)):
                together[:, i, :, :n] = self.rows[row][:, :, :n]
            self._holds = holds
        return together

    def take(self, row: int, used: int) -> np.ndarray:
        """A copy of a row's first places, [2 L, H, used, d]."""
        return self.rows[row][:, :, :used].copy()

    def put(self, row: int, held: np.ndarray) -> None:
        """What ``take`` gave becomes the row's."""
        used = held.shape[2]
        self.rows[row] = self._make(min(used + used // 8, self.limit), held) if used else self.nothing
        self._holds = None

    def branch(self, rows: list[int], own: bool) -> Pages:
        """The same sentences in a new object; with ``own`` in arrays of their own."""
        branch = copy.copy(self)
        branch.rows = [self.rows[row].copy() if own else self.rows[row] for row in rows]
        branch._together, branch._holds = self._together[:0], None
        return branch

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' arrays."""
        return sum(row.nbytes for row in self.rows if row is not self.nothing)


def pages(count: int) -> int:
    """So many places, or as many more as fill the last page."""
    return -(-count // PAGE) * PAGE
