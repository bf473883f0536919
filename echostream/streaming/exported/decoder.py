"""A sentence in the making with an exported decoder (MT or units): its keys and values, and what may see which."""

from __future__ import annotations

import copy

import numpy as np

from echostream.errors import EchoStreamError
from echostream.streaming.exported.model import ExportedModel, Rows, additive, layers, pad, pick, unstack

# Attention reads the buffers in pages of so many places. In which order a softmax adds up its terms depends on how many
# there are, but not on further pages that are masked: a stream alone and in a batch of older ones gets the same bits.
PAGE = 16


class ExportedDecoder(Rows):
    """A decoder for ``rows`` streams.

    Args:
        graph, memory_graph: of its step, and of the projection of encoder frames.
        layers, dim: its size.
        positions, frames: places in its buffers.
        limit: the configuration key that sets ``positions``, for errors.
    """

    def __init__(
        self, model: ExportedModel, graph: str, memory_graph: str, layers: int, dim: int, positions: int, frames: int,
        limit: str, rows: int,
    ):  # fmt: skip
        self.model, self.graph, self.memory_graph, self.limit = model, graph, memory_graph, limit
        self.places, self.most_frames = positions, frames
        self.own = np.zeros((2 * layers, rows, pages(positions), dim), dtype=np.float32)
        # Place 0 stays zero: who sees no frame at all attends that one.
        self.memory = np.zeros((2 * layers, rows, pages(1 + frames), dim), dtype=np.float32)
        self.positions, self.frames = (np.zeros(rows, dtype=np.int64) for _ in range(2))
        self.arrays = {
            "own": (self.own, 1),
            "memory": (self.memory, 1),
            "positions": (self.positions, 0),
            "frames": (self.frames, 0),
        }
        self.most = {"positions": positions, "frames": frames}

    def restart(self, rows: list[int]) -> None:
        """A new sentence; what stands in the buffers is overwritten as it grows."""
        self.positions[rows] = self.frames[rows] = 0

    def reset(self, row: int) -> None:
        self.restart([row])

    def extend(self, rows: list[int], frames: list[np.ndarray]) -> None:
        """Encoder frames [N, width] of each row, to be seen from now on.

        Raises:
            EchoStreamError: a sentence outgrows its buffers.
        """
        padded, lengths = pad(frames)
        self._check_room(self.frames[rows] + lengths, self.most_frames, "encoder frames", "max_sentence_frames")
        new = self.model.run(self.memory_graph, {"frames": padded})["memory"]
        for i, (row, count) in enumerate(zip(rows, lengths)):
            at = 1 + self.frames[row]
            self.memory[:, row, at : at + count] = unstack(new[i, :count], len(self.memory))
        self.frames[rows] += lengths

    def step(self, rows: list[int], given: dict[str, np.ndarray], lengths: np.ndarray) -> dict[str, np.ndarray]:
        """The next positions: ``given`` [B, ...] makes N of them, of which each row takes its ``lengths`` [B]. Rows of
        other lengths than N get what they get alone but for the last bit.

        Raises:
            EchoStreamError: a sentence outgrows its buffers.
        """
        places, before, seen = self.places, self.positions[rows], self.frames[rows]
        self._check_room(before + lengths, places, "positions", self.limit)
        used, new = pages(int(before.max())), np.arange(int(lengths.max()))
        past = np.arange(used) < before[:, None, None]
        past = np.broadcast_to(past, (len(rows), len(new), used))
        causal = np.broadcast_to(new <= new[:, None], (len(rows), len(new), len(new)))
        frames = np.arange(pages(int(seen.max()) + 1))
        visible = np.where(seen[:, None], (frames > 0) & (frames <= seen[:, None]), frames == 0)[:, None]
        visible = np.broadcast_to(visible, (len(rows), len(new), len(frames)))
        out = self.model.run(
            self.graph,
            {
                **given,
                "positions": np.minimum(before[:, None] + new, places - 1),
                "mask": additive(np.concatenate([past, causal], axis=2))[:, None],
                "memory_mask": additive(visible)[:, None],
                **layers(("keys", "values"), pick(self.own, rows, used)),
                **layers(("memory_keys", "memory_values"), pick(self.memory, rows, len(frames))),
            },
        )
        for i, (row, at, count) in enumerate(zip(rows, before, lengths)):
            self.own[:, row, at : at + count] = unstack(out["kept"][i, :count], len(self.own))
        self.positions[rows] += lengths
        return out

    def branch(self, row: int, places: int) -> ExportedDecoder:
        """The sentence of ``row`` as it stands, alone in a decoder of its own with so many positions more."""
        branch = copy.copy(self)
        branch.places = int(self.positions[row]) + places
        branch.own = self.own[:, row : row + 1, : pages(branch.places)].copy()
        branch.memory = self.memory[:, row : row + 1, : pages(1 + int(self.frames[row]))]
        branch.positions, branch.frames = self.positions[row : row + 1], self.frames[row : row + 1]
        return branch

    def reorder(self, rows: np.ndarray) -> None:
        """Of a branch: its row b goes on from what was row ``rows[b]``."""
        self.own, self.memory = self.own[:, rows], self.memory[:, rows]
        self.positions, self.frames = self.positions[rows], self.frames[rows]

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        """The row's arrays, of the buffers only what is in use."""
        arrays = {name: self.row(name, row) for name in self.arrays}
        arrays["own"] = arrays["own"][:, :, : self.positions[row]]
        arrays["memory"] = arrays["memory"][:, :, : 1 + self.frames[row]]
        return {name: array.copy() for name, array in arrays.items()}

    def restore(self, row: int, arrays: dict[str, np.ndarray]) -> None:
        for name in ("positions", "frames"):
            self._fits(name, arrays[name], self.row(name, row))
        positions, frames = int(arrays["positions"][0]), int(arrays["frames"][0])
        own, memory = self.row("own", row)[:, :, :positions], self.row("memory", row)[:, :, : 1 + frames]
        self._fits("own", arrays["own"], own)
        self._fits("memory", arrays["memory"], memory)
        own[...], memory[...] = arrays["own"], arrays["memory"]
        self.positions[row], self.frames[row] = positions, frames

    @staticmethod
    def _check_room(wanted: np.ndarray, places: int, what: str, limit: str) -> None:
        if wanted.max() > places:
            raise EchoStreamError(
                f"a sentence of {wanted.max()} {what} does not fit the {places} of its buffers; "
                f"end the sentence earlier or raise {limit}"
            )


def pages(count: int) -> int:
    """So many places, or as many more as fill the last page."""
    return -(-count // PAGE) * PAGE
