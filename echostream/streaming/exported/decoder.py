"""A sentence in the making with an exported decoder (MT or units): its keys and values, and what may see which."""

from __future__ import annotations

import copy

import numpy as np

from echostream.errors import check_room
from echostream.streaming.exported.model import Graphs, RowStates, additive, layers, pad
from echostream.streaming.exported.pages import Pages

# RowStates that step together: more gain nothing, and those of one length shall not read the places of longer ones.
TOGETHER = 8


class ExportedDecoder(RowStates):
    """A decoder for ``rows`` streams.

    Args:
        graph, memory_graph: of its step, and of the projection of encoder frames.
        layers, heads, dim: its size.
        positions, frames: places in its buffers at most.
        limit: the configuration key that sets ``positions``, for errors.
    """

    def __init__(
        self, model: Graphs, graph: str, memory_graph: str, layers: int, heads: int, dim: int, positions: int,
        frames: int, limit: str, rows: int,
    ):  # fmt: skip
        self.model, self.graph, self.memory_graph, self.limit = model, graph, memory_graph, limit
        self.own = Pages(rows, layers, heads, dim // heads, positions, model.dtype)
        # Place 0 stays zero: who sees no frame at all attends that one.
        self.memory = Pages(rows, layers, heads, dim // heads, 1 + frames, model.dtype)
        self.positions, self.frames = (np.zeros(rows, dtype=np.int64) for _ in range(2))
        self.arrays = {"positions": (self.positions, 0), "frames": (self.frames, 0)}
        self.most = {"positions": positions, "frames": frames}

    def restart(self, rows: list[int]) -> None:
        """A new sentence."""
        self.positions[rows] = self.frames[rows] = 0
        for row in rows:
            self.own.clear(row)
            self.memory.clear(row)

    def reset(self, row: int) -> None:
        self.restart([row])

    def extend(self, rows: list[int], frames: list[np.ndarray]) -> None:
        """Encoder frames [N, width] of each row, to be seen from now on.

        Raises:
            EchoStreamError: a sentence outgrows its buffers.
        """
        padded, lengths = pad(frames, self.model.dtype)
        wanted = int((self.frames[rows] + lengths).max())
        check_room(wanted, self.most["frames"], "encoder frames", "max_sentence_frames")
        new = self.model.run(self.memory_graph, {"frames": padded})["memory"]
        for i, (row, count) in enumerate(zip(rows, lengths)):
            if not self.frames[row]:
                self.memory.write(row, 0, np.zeros((1, new.shape[2]), dtype=new.dtype))
            self.memory.write(row, 1 + int(self.frames[row]), new[i, :count])
        self.frames[rows] += lengths

    def step(self, rows: list[int], given: dict[str, np.ndarray], new: int) -> list[dict[str, np.ndarray]]:
        """The next ``new`` positions of each row, which ``given`` [B, ...] makes; the outputs [new, ...] of each.

        Raises:
            EchoStreamError: a sentence outgrows its buffers.
        """
        check_room(int((self.positions[rows] + new).max()), self.most["positions"], "positions", self.limit)
        found: dict[int, dict[str, np.ndarray]] = {}
        order = sorted(range(len(rows)), key=lambda i: (self.frames[rows[i]], self.positions[rows[i]]))
        for start in range(0, len(rows), TOGETHER):
            some = order[start : start + TOGETHER] if len(rows) > TOGETHER else list(range(len(rows)))
            out = self._step([rows[i] for i in some], {name: array[some] for name, array in given.items()}, new)
            for at, i in enumerate(some):
                found[i] = {name: array[at] for name, array in out.items()}
        return [found[i] for i in range(len(rows))]

    def _step(self, rows: list[int], given: dict[str, np.ndarray], new: int) -> dict[str, np.ndarray]:
        before, seen = self.positions[rows], self.frames[rows]
        own, memory = self.own.read(rows, before), self.memory.read(rows, 1 + seen)
        at = np.arange(new)
        mask = np.empty((len(rows), new, new + own.shape[3]), dtype=bool)
        mask[:, :, :new] = at <= at[:, None]
        mask[:, :, new:] = np.arange(own.shape[3]) < before[:, None, None]
        frames = np.arange(memory.shape[3])
        visible = np.where(seen[:, None], (frames > 0) & (frames <= seen[:, None]), frames == 0)[:, None]
        out = self.model.run(
            self.graph,
            {
                **given,
                "positions": before[:, None] + at,
                "mask": additive(mask)[:, None],
                "memory_mask": additive(np.broadcast_to(visible, (len(rows), new, len(frames))))[:, None],
                **layers(("keys", "values"), own),
                **layers(("memory_keys", "memory_values"), memory),
            },
        )
        for row, place, kept in zip(rows, before.tolist(), out.pop("kept")):
            self.own.write(row, place, kept)
        self.positions[rows] += new
        return out

    def branch(self, rows: list[int]) -> ExportedDecoder:
        """The sentences of these rows as they stand, in a decoder of their own."""
        branch = copy.copy(self)
        branch.own, branch.memory = self.own.branch(rows, own=True), self.memory.branch(rows, own=False)
        branch.positions, branch.frames = self.positions[rows], self.frames[rows]
        return branch

    def reorder(self, rows: np.ndarray) -> ExportedDecoder:
        """Of a branch another one: its row b goes on from what was row ``rows[b]``."""
        return self if list(rows) == list(range(len(self.positions))) else self.branch(rows.tolist())

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        """The row's arrays, of the buffers only what is in use."""
        own, memory = self.own.take(row, self.positions[row]), self.memory.take(row, 1 + self.frames[row])
        return {**super().snapshot(row), "own": own, "memory": memory}

    def restore(self, row: int, arrays: dict[str, np.ndarray]) -> None:
        held = {"own": self.own, "memory": self.memory}
        for name in self.arrays:
            self._fits(name, arrays[name], self.row(name, row))
        used = {"own": int(arrays["positions"][0]), "memory": 1 + int(arrays["frames"][0])}
        for name, pages in held.items():
            layers, heads, width = pages.shape
            self._fits(name, arrays[name], np.broadcast_to(np.float32(0), (layers, heads, used[name], width)))
        for name, pages in held.items():
            pages.put(row, arrays[name])
        self.positions[row], self.frames[row] = used["own"], used["memory"] - 1

    @property
    def names(self) -> list[str]:
        return [*self.arrays, "own", "memory"]

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.own.nbytes + self.memory.nbytes
