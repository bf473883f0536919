"""What silero's voice activity detector is good for: pauses, and no words for no speech."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from echostream.constants import ENCODER_FRAME_MS, SAMPLE_RATE
from echostream.errors import ConfigError
from echostream.streaming.segmenters.base import AudioMemory, CTCToken, Ending, SegmenterBase
from echostream.streaming.segmenters.silero import CONTEXT, WINDOW, Detector

SAMPLES_PER_FRAME = SAMPLE_RATE * ENCODER_FRAME_MS // 1000
HYSTERESIS = 0.15  # what is no speech must be this much less probable than what is
REMEMBERED = 64  # pauses kept; a sentence of 40 s has not that many
GAIN = 8.0  # silero hears what is 35 dB quieter only so; loud speech and loud noise are to it what they were
WINDOWS_REMEMBERED = 256  # 8 s: no encoder is so far behind its sound


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

    vad: Detector = field(repr=False)
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
        self, source: tuple[CTCToken, ...], target: tuple[CTCToken, ...], frames: int, memory: AudioMemory
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

    vad: Detector = field(repr=False)
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
        louder = np.clip(samples * np.float32(GAIN), -1.0, 1.0)  # the detector knows nothing beyond full scale
        probabilities, waiting, state = self.vad.read(memory["samples"], louder, memory["state"])
        found = memory["speech"].tolist() + [int(p >= self.threshold) for p in probabilities]
        return {
            "state": state,
            "samples": waiting,
            "count": memory["count"] + len(probabilities),
            "speech": np.array(found[-WINDOWS_REMEMBERED:], dtype=np.int64),
        }

    def find(
        self, source: tuple[CTCToken, ...], target: tuple[CTCToken, ...], frames: int, memory: AudioMemory
    ) -> Ending | None:
        return None

    def voiced(self, frame: int, memory: AudioMemory) -> bool:
        margin = SAMPLE_RATE * self.margin_ms // 1000
        first = max(0, frame * SAMPLES_PER_FRAME - margin) // WINDOW
        last = ((frame + 1) * SAMPLES_PER_FRAME + margin) // WINDOW
        known = int(memory["count"][0]) - len(memory["speech"])  # windows before the remembered ones
        return bool(memory["speech"][max(0, first - known) : max(0, last - known + 1)].any())
