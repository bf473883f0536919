"""An exported directory's graphs, opened when they are first needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from echostream.errors import CheckpointError
from echostream.loading import inside, read_bytes, reason
from echostream.streaming.exported.graph_file import weights_outside
from echostream.streaming.exported.onnx_runtime import open_graph
from echostream.tensor_file import AGAIN, WEIGHTS, TensorFile

if TYPE_CHECKING:
    from echostream.streaming.exported.names import Names

TEXT_GRAPHS = ("encoder", "heads", "mt_memory", "mt")
SPEECH_GRAPHS = ("unit_memory", "units")
MOST_STEPS = 1 << 40  # of a stream's life: more than a thousand years of frames
VOICE_GRAPHS = ("voice_units", "voice_frames")
GRAPHS_FOLDER = "onnx"
MAX_GRAPH = 64 << 20  # bytes of a graph without its weights


class Graphs(Protocol):
    """What runs a model's steps, by the names of their graphs.

    Attributes:
        dtype: of the numbers that it keeps for its caller.
    """

    dtype: np.dtype[Any]

    def check(self, names: tuple[str, ...]) -> None:
        """Are these there?"""

    def run(self, name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs of a graph."""


class Voice(Protocol):
    """What speaks: the exported graphs of a vocoder, or the module."""

    def streams(self, model: Graphs, rows: int) -> VoiceStates:
        """The states of ``rows`` new streams; ``model`` runs the graphs, if it has any."""


@dataclass
class ExportedModel:
    """The graphs of a directory, by name.

    Attributes:
        directory: holds ``onnx/<name>.onnx`` for each of them, and ``model.safetensors`` with the weights of all.
        precision: ``fp32`` or ``int8``.
        threads: CPU threads of each graph.
        parameters: how many the torch model had, by component.
        names: what each graph must be fed and give; one that is not among them is taken as it is.
    """

    directory: Path
    precision: str = "fp32"
    threads: int = 1
    parameters: dict[str, int] = field(default_factory=dict, repr=False)
    names: dict[str, Names] = field(default_factory=dict, repr=False)
    _weights: TensorFile | None = field(default=None, repr=False)
    # of each graph also the arrays that it computes with
    _graphs: dict[str, tuple[Any, list[str], dict[str, np.ndarray]]] = field(default_factory=dict, repr=False)
    _tried: set[str] = field(default_factory=set, repr=False)

    dtype = np.dtype(np.float32)

    def check(self, names: tuple[str, ...]) -> None:
        """Open these graphs. Raises CheckpointError: one is missing, no graph, or of another model."""
        for name in names:
            self._open(name)

    def run(self, name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs of a graph.

        Raises:
            CheckpointError: the graph cannot be opened, or does not compute what this model asks of it.
        """
        graph, outputs, _ = self._open(name)
        try:
            found = dict(zip(outputs, graph.run(None, feeds)))
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            path = self.directory / GRAPHS_FOLDER / f"{name}.onnx"
            raise CheckpointError(f"exported graph {path} cannot be run: {reason(error)}") from None
        if name not in self._tried:  # weights that are not finite show at once
            self._tried.add(name)
            for output, array in found.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    path = self.directory / GRAPHS_FOLDER / f"{name}.onnx"
                    raise CheckpointError(f"exported graph {path} gives NaN or infinity ({output}); export it again")
        return found

    def _open(self, name: str) -> tuple[Any, list[str], dict[str, np.ndarray]]:
        if name not in self._graphs:
            path = inside(self.directory, f"{GRAPHS_FOLDER}/{name}.onnx", "exported graph", CheckpointError)
            missing = "; export the checkpoint again"
            content = read_bytes(path, "exported graph", CheckpointError, MAX_GRAPH, missing)
            weights = self._weights_for(content, f"exported graph {path}")
            graph = open_graph(path, "exported graph", self.threads, content, weights)
            outputs = [output.name for output in graph.get_outputs()]
            if name in self.names:
                for kind, found, wanted in (
                    ("inputs", {value.name for value in graph.get_inputs()}, self.names[name].inputs),
                    ("outputs", set(outputs), self.names[name].outputs),
                ):
                    if found != wanted:
                        different = ", ".join(sorted(found ^ wanted)[:4])
                        raise CheckpointError(
                            f"exported graph {path} is of another model: its {kind} differ in {different}; "
                            "export the checkpoint again"
                        )
            self._graphs[name] = graph, outputs, weights
        return self._graphs[name]

    def _weights_for(self, graph: bytes, where: str) -> dict[str, np.ndarray]:
        """The weights that a graph asks for, as it wants them; such as it wants as they are share the file's memory."""
        if self._weights is None:
            self._weights = TensorFile(inside(self.directory, WEIGHTS, "weights", CheckpointError))
        arrays = {}
        for name, (dtype, shape) in weights_outside(graph, where).items():
            array = self._weights[name.partition(AGAIN)[0]]
            alike = array.dtype == dtype or array.dtype.kind == np.dtype(dtype).kind == "f"
            if array.shape != shape or not alike:
                raise CheckpointError(
                    f"{where} wants {name} as {np.dtype(dtype)} {list(shape)}, but {WEIGHTS} has {array.dtype} "
                    f"{list(array.shape)}; export the checkpoint again"
                )
            arrays[name] = array.astype(dtype, copy=False)
        return arrays


class RowStates:
    """Base of the parts that keep state: arrays of fixed size in which every stream has its row.

    ``arrays`` maps a name to an array and the axis of its rows; ``most`` says how large the numbers of one of whole
    numbers may be.
    """

    arrays: dict[str, tuple[np.ndarray, int]]
    most: Mapping[str, int] = MappingProxyType({})

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
            self._fits(name, arrays[name], self.row(name, row))
        for name in self.arrays:
            self.row(name, row)[...] = arrays[name]

    def _fits(self, name: str, array: np.ndarray, own: np.ndarray) -> None:
        """Raises ValueError: the array is none that could stand in ``own``."""
        if array.shape != own.shape or array.dtype.kind != own.dtype.kind:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected {own.dtype} {list(own.shape)}")
        most = self.most.get(name, MOST_STEPS)
        if own.dtype.kind == "i" and array.size and not 0 <= array.min() <= array.max() <= most:
            raise ValueError(f"{name} holds {array.min()} to {array.max()}; it must lie in 0..{most}")

    @property
    def names(self) -> list[str]:
        """Of what ``snapshot`` gives."""
        return list(self.arrays)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array, _ in self.arrays.values())


class VoiceStates(RowStates):
    """A vocoder's, which speaks with them."""

    def vocode(self, row: int, units: np.ndarray, finished: bool) -> np.ndarray:
        """Samples, float32 [M], of all units [U] whose look-ahead is there; ``finished`` flushes the rest.

        Raises:
            UnitError: a unit is not one of the vocoder's.
        """
        raise NotImplementedError

    def vocode_together(self, rows: list[int], units: list[np.ndarray], finished: list[bool]) -> list[np.ndarray]:
        """The same of several rows; here they take turns."""
        return [self.vocode(*one) for one in zip(rows, units, finished)]


def pick(array: np.ndarray, rows: list[int]) -> np.ndarray:
    """Of an array [n, all rows, ...] these rows: a view if they are neighbours in order."""
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
