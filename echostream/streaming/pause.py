"""What silero's voice activity detector is good for, through ONNX Runtime alone: pauses, and words for no speech.

Silero VAD (https://github.com/snakers4/silero-vad, MIT) reads 512 samples (32 ms at 16 kHz) with the 64 before them and
gives the probability that someone speaks; its state is carried along. Versions 5 and 6 of the model share this form.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echostream.constants import ENCODER_FRAME_MS, SAMPLE_RATE
from echostream.errors import CheckpointError, ConfigError, MissingExtraError
from echostream.streaming.onnx_runtime import describe_inputs, open_graph
from echostream.streaming.segmenter import AudioMemory, Ending, SegmenterBase, Spoken

WINDOW = 512  # samples the detector reads at a time
CONTEXT = 64  # samples before them that it reads again
SAMPLES_PER_FRAME = SAMPLE_RATE * ENCODER_FRAME_MS // 1000
HYSTERESIS = 0.15  # what is no speech must be this much less probable than what is
REMEMBERED = 64  # pauses kept; a sentence of 40 s has not that many
WINDOWS_REMEMBERED = 256  # 8 s: no encoder is so far behind its sound


@dataclass(frozen=True)
class SileroVAD:
    """The detector's graph; itself without memory."""

    path: Path
    graph: Any = field(repr=False, compare=False)
    inputs: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path | None = None) -> SileroVAD:
        """Open ``path``, or the graph inside the installed package ``silero-vad`` (which is found, not imported).

        Raises:
            MissingExtraError: no path is given and the package is not installed, or ONNX Runtime is not.
            CheckpointError: the file is missing, or a graph with other inputs.
        """
        path = Path(path) if path is not None else find_silero()
        graph = open_graph(path, "voice activity detector")
        inputs = tuple(value.name for value in graph.get_inputs())
        if not {"input", "state"} <= set(inputs) <= {"input", "state", "sr"} or len(graph.get_outputs()) != 2:
            raise CheckpointError(
                f"{path} has the inputs {describe_inputs(graph)}; silero's silero_vad.onnx (version 5 or 6) has input, "
                "state and sr"
            )
        return cls(path, graph, inputs)

    def init_state(self) -> np.ndarray:
        return np.zeros((2, 1, 128), dtype=np.float32)

    def step(self, samples: np.ndarray, state: np.ndarray) -> tuple[float, np.ndarray]:
        """The probability of speech in float32 [CONTEXT + WINDOW] samples, and the next state [2, 1, 128]."""
        given = {"input": samples[None].astype(np.float32), "state": state}
        if "sr" in self.inputs:
            given["sr"] = np.array(SAMPLE_RATE, dtype=np.int64)
        probability, state = self.graph.run(None, given)
        return float(np.ravel(probability)[0]), state

    def read(
        self, waiting: np.ndarray, samples: np.ndarray, state: np.ndarray
    ) -> tuple[list[float], np.ndarray, np.ndarray]:
        """The probability of speech in every window that ``samples`` complete behind those that were ``waiting``.

        Returns:
            (the probabilities, what waits now, the next state).
        """
        joined, at = np.concatenate([waiting, samples]), 0
        found = []
        while at + CONTEXT + WINDOW <= len(joined):
            probability, state = self.step(joined[at : at + CONTEXT + WINDOW], state)
            found.append(probability)
            at += WINDOW
        return found, joined[at:].copy(), state


def find_silero() -> Path:
    """The graph in the installed package ``silero-vad``. Importing that package would import torch.

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = importlib.util.find_spec("silero_vad")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "silero_vad.onnx"
        if path.is_file():
            return path
    raise MissingExtraError(
        "the pause segmenter needs silero_vad.onnx: give its path (vad_model), or pip install 'echostream[pause]'"
    )


@dataclass(frozen=True)
class PauseSegmenter(SegmenterBase):
    """A sentence ends when nobody has spoken for ``min_pause_ms``.

    The end lies where the pause has lasted that long; what the CTC heads emitted until then belongs to the sentence.

    Args:
        vad: the detector.
        min_pause_ms: milliseconds of silence, at least 64 (two windows). Short ones cut inside sentences.
        threshold: the probability from which a window counts as speech; silence begins ``HYSTERESIS`` below.

    Raises:
        ConfigError: a value is out of range.
    """

    vad: SileroVAD = field(repr=False)
    min_pause_ms: int = 600
    threshold: float = 0.5

    listens = True

    def __post_init__(self) -> None:
        if isinstance(self.min_pause_ms, bool) or not isinstance(self.min_pause_ms, int) or self.min_pause_ms < 64:
            raise ConfigError(f"min_pause_ms is {self.min_pause_ms!r}; it must be a whole number of at least 64")
        if not HYSTERESIS < self.threshold < 1:
            raise ConfigError(f"threshold is {self.threshold!r}; it must lie between {HYSTERESIS} and 1")

    @property
    def name(self) -> str:
        return f"pause({self.min_pause_ms} ms, {self.threshold:g})"

    # Memory: the detector's state; samples that wait for their window, with the context before them; and whole numbers:
    # windows so far, is someone speaking, the sample at which silence began (-1: not silent); and the ends of pauses.

    def init_audio(self) -> AudioMemory:
        return {
            "state": self.vad.init_state(),
            "samples": np.zeros(CONTEXT, dtype=np.float32),
            "count": np.array([0, 0, -1], dtype=np.int64),
            "pauses": np.zeros(0, dtype=np.int64),
        }

    def hear(self, samples: np.ndarray, memory: AudioMemory) -> AudioMemory:
        probabilities, waiting, state = self.vad.read(memory["samples"], samples, memory["state"])
        pauses = memory["pauses"].tolist()
        windows, speaking, silent_from = memory["count"].tolist()
        for probability in probabilities:
            if probability >= self.threshold:
                speaking, silent_from = 1, -1
            elif speaking and silent_from < 0 and probability < self.threshold - HYSTERESIS:
                silent_from = windows * WINDOW
            windows += 1
            long_enough = silent_from + SAMPLE_RATE * self.min_pause_ms // 1000
            if silent_from >= 0 and windows * WINDOW >= long_enough:
                pauses.append(-(-long_enough // SAMPLES_PER_FRAME))
                speaking, silent_from = 0, -1
        return {
            "state": state,
            "samples": waiting,
            "count": np.array([windows, speaking, silent_from], dtype=np.int64),
            "pauses": np.array(pauses[-REMEMBERED:], dtype=np.int64),
        }

    def find(
        self, source: tuple[Spoken, ...], target: tuple[Spoken, ...], frames: int, memory: AudioMemory
    ) -> Ending | None:
        if not target:
            return None
        for until in memory["pauses"].tolist():
            # The encoder may be some frames behind the detector. A pause before the first word ends nothing.
            if target[0].frame < until <= frames:
                return Ending("pause", until=until)
        return None


@dataclass(frozen=True)
class SpeechGate(SegmenterBase):
    """Lets a word count only where someone may have spoken; it ends no sentence.

    An encoder that has heard little else than speech makes words of hum, noise and music. A token of the CTC heads
    counts if the detector heard speech in one of the windows within ``margin_ms`` of its frame: before it, because CTC
    is late, and behind it, because the detector is.

    Raises:
        ConfigError: a value is out of range.
    """

    vad: SileroVAD = field(repr=False)
    threshold: float = 0.5
    margin_ms: int = 480

    listens = True

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(f"threshold is {self.threshold!r}; it must lie between 0 and 1")
        if isinstance(self.margin_ms, bool) or not isinstance(self.margin_ms, int) or not 0 <= self.margin_ms <= 4000:
            raise ConfigError(f"margin_ms is {self.margin_ms!r}; it must be a whole number from 0 to 4000")

    @property
    def name(self) -> str:
        return f"speech({self.threshold:g}, {self.margin_ms} ms)"

    # Memory: the detector's state; samples that wait for their window, with the context before them; windows so far;
    # and whether there was speech in the last ones.

    def init_audio(self) -> AudioMemory:
        return {
            "state": self.vad.init_state(),
            "samples": np.zeros(CONTEXT, dtype=np.float32),
            "count": np.zeros(1, dtype=np.int64),
            "speech": np.zeros(0, dtype=np.int64),
        }

    def hear(self, samples: np.ndarray, memory: AudioMemory) -> AudioMemory:
        probabilities, waiting, state = self.vad.read(memory["samples"], samples, memory["state"])
        found = memory["speech"].tolist() + [int(p >= self.threshold) for p in probabilities]
        return {
            "state": state,
            "samples": waiting,
            "count": memory["count"] + len(probabilities),
            "speech": np.array(found[-WINDOWS_REMEMBERED:], dtype=np.int64),
        }

    def find(
        self, source: tuple[Spoken, ...], target: tuple[Spoken, ...], frames: int, memory: AudioMemory
    ) -> Ending | None:
        return None

    def voiced(self, frame: int, memory: AudioMemory) -> bool:
        margin = SAMPLE_RATE * self.margin_ms // 1000
        first = max(0, frame * SAMPLES_PER_FRAME - margin) // WINDOW
        last = ((frame + 1) * SAMPLES_PER_FRAME + margin) // WINDOW
        known = int(memory["count"][0]) - len(memory["speech"])  # windows before the remembered ones
        return bool(memory["speech"][max(0, first - known) : max(0, last - known + 1)].any())
