"""An exported directory's graphs, opened when they are first needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echostream.errors import CheckpointError
from echostream.streaming.onnx_runtime import open_graph

if TYPE_CHECKING:
    from echostream.models.decoders.vocoder_config import VocoderConfig

TEXT_GRAPHS = ("encoder", "heads", "mt_memory", "mt")
SPEECH_GRAPHS = ("unit_memory", "units")
VOICE_GRAPHS = ("voice_units", "voice_frames")


@dataclass
class ExportedModel:
    """The graphs of a directory, by name.

    Attributes:
        directory: holds ``<name>.onnx`` for each of them.
        precision: ``fp32`` or ``int8``.
        threads: CPU threads of each graph.
        parameters: how many the torch model had, by component.
    """

    directory: Path
    precision: str = "fp32"
    threads: int = 1
    parameters: dict[str, int] = field(default_factory=dict, repr=False)
    _graphs: dict[str, tuple[Any, list[str]]] = field(default_factory=dict, repr=False)

    def check(self, names: tuple[str, ...]) -> None:
        """Raises CheckpointError: one of these graphs is missing."""
        for name in names:
            if not (self.directory / f"{name}.onnx").is_file():
                raise CheckpointError(f"{self.directory} lacks {name}.onnx; export the checkpoint again")

    def run(self, name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs of a graph.

        Raises:
            CheckpointError: the graph cannot be opened.
        """
        if name not in self._graphs:
            graph = open_graph(self.directory / f"{name}.onnx", "exported graph", self.threads)
            self._graphs[name] = graph, [output.name for output in graph.get_outputs()]
        graph, outputs = self._graphs[name]
        return dict(zip(outputs, graph.run(None, feeds)))


@dataclass(frozen=True)
class ExportedVoice:
    """An exported vocoder's shape; its graphs are the model's."""

    config: VocoderConfig

    @property
    def lookahead_ms(self) -> float:
        """As ``CodeHiFiGAN.lookahead_ms``."""
        return 1000.0 * self.config.lookahead_units * self.config.code_hop_size / self.config.sampling_rate


class Rows:
    """Base of the parts that keep state: arrays of fixed size in which every stream has its row.

    ``arrays`` maps a name to an array and the axis of its rows.
    """

    arrays: dict[str, tuple[np.ndarray, int]]

    def row(self, name: str, row: int) -> np.ndarray:
        """A view of one stream's part of an array; the axis of the rows stays."""
        array, axis = self.arrays[name]
        return array[(slice(None),) * axis + (slice(row, row + 1),)]

    def reset(self, row: int) -> None:
        """The row of a new stream."""
        for name in self.arrays:
            self.row(name, row)[...] = 0

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        return {name: self.row(name, row).copy() for name in self.arrays}

    def restore(self, row: int, arrays: dict[str, np.ndarray]) -> None:
        """Raises KeyError, ValueError: these are of another model."""
        for name in self.arrays:
            own = self.row(name, row)
            if arrays[name].shape != own.shape:
                raise ValueError(f"{name} has shape {list(arrays[name].shape)}, expected {list(own.shape)}")
        for name in self.arrays:
            self.row(name, row)[...] = arrays[name]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array, _ in self.arrays.values())


def pick(array: np.ndarray, rows: list[int], used: int | None = None) -> np.ndarray:
    """Of an array [n, all rows, items, ...] these rows, and the first ``used`` items: a view if it is contiguous then,
    as it is for one row or, without ``used``, for neighbours in order."""
    if used is not None:
        array = array[:, :, :used]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return array[:, rows[0] : rows[0] + len(rows)]
    return array[:, rows]


def layers(names: tuple[str, str], stacked: np.ndarray) -> dict[str, np.ndarray]:
    """A stack [2 layers, ...] of keys and values in turn as inputs ``<name>.<layer>``."""
    return {f"{names[i % 2]}.{i // 2}": np.ascontiguousarray(part) for i, part in enumerate(stacked)}


def unstack(kept: np.ndarray, count: int) -> np.ndarray:
    """New keys and values of all layers, [N, count * D], as [count, N, D]."""
    return kept.reshape(len(kept), count, -1).transpose(1, 0, 2)


def additive(allowed: np.ndarray) -> np.ndarray:
    """A boolean mask as float32 to be added to attention scores: 0 where true, -inf elsewhere."""
    return np.where(allowed, np.float32(0), np.float32(-np.inf))


def pad(arrays: list[np.ndarray], dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Arrays [n, ...] as one [B, N, ...], zero behind each one's end, and their lengths [B]."""
    lengths = np.array([len(a) for a in arrays])
    if len(arrays) == 1:
        return np.asarray(arrays[0], dtype=dtype)[None], lengths
    padded = np.zeros((len(arrays), int(lengths.max()), *arrays[0].shape[1:]), dtype=dtype)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return padded, lengths
