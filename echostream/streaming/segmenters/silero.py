"""Silero's voice activity detector: does somebody speak?

Silero VAD (https://github.com/snakers4/silero-vad, MIT) reads 512 samples (32 ms at 16 kHz) with the 64 before them and
gives the probability that someone speaks; its state is carried along. Its network for 16 kHz comes with the package
and is run by numpy (0.1 ms a window), so that neither ONNX Runtime nor torch is needed; any other version of its graph
(5 or 6, which share this form) is run by ONNX Runtime.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.errors import CheckpointError
from echostream.loading import check_array, read_npz
from echostream.streaming.exported.onnx_runtime import describe_inputs, open_graph

WINDOW = 512  # samples the detector reads at a time
CONTEXT = 64  # samples before them that it reads again
WEIGHTS = Path(__file__).resolve().parents[2] / "assets" / "silero" / "silero_vad_16k.npz"

_BINS, _TAPS, _HOP, _WIDTH = 129, 256, 128, 128  # of the Fourier transform, and of the recurrent layer
_CONVS = ((128, _BINS, 1), (64, 128, 2), (64, 64, 2), (128, 64, 1))  # (out, in, stride), 3 taps each
_SHAPES: dict[str, tuple[int, ...]] = {
    "stft": (2 * _BINS, _TAPS),
    **{f"conv{i}.weight": (out, width, 3) for i, (out, width, _) in enumerate(_CONVS)},
    **{f"conv{i}.bias": (out,) for i, (out, _, _) in enumerate(_CONVS)},
    **{f"lstm.weight_{side}": (4 * _WIDTH, _WIDTH) for side in ("ih", "hh")},
    **{f"lstm.bias_{side}": (4 * _WIDTH,) for side in ("ih", "hh")},
    "out.weight": (_WIDTH,),
    "out.bias": (1,),
}


class Detector:
    """A detector, itself without memory: any number of streams may share it."""

    def init_state(self) -> np.ndarray:
        return np.zeros((2, 1, _WIDTH), dtype=np.float32)

    def step(self, samples: np.ndarray, state: np.ndarray) -> tuple[float, np.ndarray]:
        """The probability of speech in float32 [CONTEXT + WINDOW] samples, and the next state [2, 1, 128]."""
        raise NotImplementedError

    def read(
        self, waiting: np.ndarray, samples: np.ndarray, state: np.ndarray
    ) -> tuple[list[float], np.ndarray, np.ndarray]:
        """The probability of speech in every window that ``samples`` complete behind those that were ``waiting``.

        Returns:
            (the probabilities, what waits now, the next state).
        """
        joined, at = np.concatenate([waiting, samples]).astype(np.float32, copy=False), 0
        found = []
        while at + CONTEXT + WINDOW <= len(joined):
            probability, state = self.step(joined[at : at + CONTEXT + WINDOW], state)
            found.append(probability)
            at += WINDOW
        return found, joined[at:].copy(), state


def load_silero(path: str | Path | None = None) -> Detector:
    """The detector that comes with the package, or the .onnx file ``path``.

    Raises:
        CheckpointError: the file is missing, or a graph with other inputs.
        MissingExtraError: a file is given, but ONNX Runtime is not installed.
    """
    return _bundled() if path is None else SileroGraph.load(path)


@functools.lru_cache(maxsize=1)
def _bundled() -> SileroNetwork:
    return SileroNetwork.load(WEIGHTS)


@dataclass(frozen=True)
class SileroGraph(Detector):
    """A graph of silero's, run by ONNX Runtime."""

    path: Path
    graph: Any = field(repr=False, compare=False)
    inputs: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> SileroGraph:
        """See ``load_silero``."""
        graph = open_graph(path, "voice activity detector")
        inputs = tuple(value.name for value in graph.get_inputs())
        if not {"input", "state"} <= set(inputs) <= {"input", "state", "sr"} or len(graph.get_outputs()) != 2:
            raise CheckpointError(
                f"{path} has the inputs {describe_inputs(graph)}; silero's silero_vad.onnx (version 5 or 6) has input, "
                "state and sr"
            )
        return cls(Path(path), graph, inputs)

    def step(self, samples: np.ndarray, state: np.ndarray) -> tuple[float, np.ndarray]:
        given = {"input": samples[None], "state": state}
        if "sr" in self.inputs:
            given["sr"] = np.array(SAMPLE_RATE, dtype=np.int64)
        probability, state = self.graph.run(None, given)
        return float(np.ravel(probability)[0]), state


@dataclass(frozen=True, eq=False)
class SileroNetwork(Detector):
    """The same by numpy: magnitudes of a Fourier transform, four convolutions over time, a recurrent layer.

    Attributes:
        weights: arrays of ``_SHAPES``.
    """

    weights: dict[str, np.ndarray] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> SileroNetwork:
        """Read a npz file.

        Raises:
            CheckpointError: it is missing, or an array is missing, of another shape or not finite.
        """
        arrays = read_npz(path, "voice activity detector", CheckpointError, 4 << 20, _SHAPES)
        return cls(
            {
                name: check_array(arrays[name], f"{path}: {name}", CheckpointError, "f", shape).astype(np.float32)
                for name, shape in _SHAPES.items()
            }
        )

    def step(self, samples: np.ndarray, state: np.ndarray) -> tuple[float, np.ndarray]:
        basis, convs, recurrent, bias = self._parts
        x = basis @ samples[_FRAMES]  # [2 * bins, 4]
        x *= x
        x = np.sqrt(x[:_BINS] + x[_BINS:])
        for taps, offset, stride in convs:
            count = x.shape[1]
            padded = np.zeros((x.shape[0], count + 2), dtype=np.float32)
            padded[:, 1:-1] = x
            x = taps[0] @ padded[:, 0:count:stride]
            x += taps[1] @ padded[:, 1 : count + 1 : stride]
            x += taps[2] @ padded[:, 2 : count + 2 : stride]
            x += offset
            np.maximum(x, 0, out=x)
        gates = recurrent @ np.concatenate([x[:, 0], state[0, 0]]) + bias
        take, keep, new, give = gates.reshape(4, _WIDTH)
        cell = _sigmoid(keep) * state[1, 0] + _sigmoid(take) * np.tanh(new)
        hidden = _sigmoid(give) * np.tanh(cell)
        score = self.weights["out.weight"] @ np.maximum(hidden, 0) + self.weights["out.bias"][0]
        return float(_sigmoid(score)), np.stack([hidden, cell])[:, None]

    @functools.cached_property
    def _parts(self) -> tuple[np.ndarray, list[tuple[list[np.ndarray], np.ndarray, int]], np.ndarray, np.ndarray]:
        """The arrays as ``step`` wants them, each in one piece of memory."""
        w = self.weights
        convs = [
            ([w[f"conv{i}.weight"][:, :, k].copy() for k in range(3)], w[f"conv{i}.bias"][:, None], stride)
            for i, (_, _, stride) in enumerate(_CONVS)
        ]
        recurrent = np.concatenate([w["lstm.weight_ih"], w["lstm.weight_hh"]], axis=1)
        return w["stft"], convs, recurrent, w["lstm.bias_ih"] + w["lstm.bias_hh"]


# Places [256, 4] of the samples in the transform's four frames; the last 64 samples follow once more, mirrored.
_MIRRORED = np.concatenate([np.arange(CONTEXT + WINDOW), np.arange(CONTEXT + WINDOW - 2, WINDOW - 2, -1)])
_FRAMES = _MIRRORED[np.arange(_TAPS)[:, None] + _HOP * np.arange(4)]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # which never overflows
