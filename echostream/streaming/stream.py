"""One stream's whole memory outside the model, and how its samples become decisions."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from echostream.audio.io import check_finite
from echostream.audio.level import LevelWatch
from echostream.audio.resample import check_rate
from echostream.errors import AudioError, AudioWarning, EchoStreamError, SessionError
from echostream.streaming.clock import AudioClock, ClockState
from echostream.streaming.engine import Engine, EngineState
from echostream.streaming.stages import STAGE_NAMES

# The clock that tells how long computing took, in seconds. Whoever sits and listens waits by the clock on the wall; a
# benchmark on a machine with other work may set the time of this process alone (``time.process_time``).
timer: Callable[[], float] = time.perf_counter


UNSAVED = {"saved": False}  # of a field: archives leave it out


def _no_time() -> dict[str, float]:
    return dict.fromkeys(("features", *STAGE_NAMES.values()), 0.0)


@dataclass
class StreamState:
    """A stream from its samples to its sentences.

    Attributes:
        row: its row in the model's stages.
        engine: decides for it.
        clock: what of its audio waits for the next decision.
        stream: what the engine remembers of it.
        finished: has its end been heard?
        seconds: computing time by stage. In a batch a stage's time counts for every stream that waited for it.
        level: warns of sound that cannot be speech.
    """

    row: int = field(metadata=UNSAVED)
    engine: Engine = field(metadata=UNSAVED, repr=False)
    clock: ClockState
    stream: EngineState = field(default_factory=EngineState)
    finished: bool = False
    seconds: dict[str, float] = field(default_factory=_no_time)
    elapsed_s: float = 0.0
    level: LevelWatch = field(default_factory=LevelWatch, compare=False, metadata=UNSAVED)

    def book(self, stage: str, seconds: float) -> None:
        self.seconds[stage] += seconds
        self.elapsed_s += seconds


@dataclass(frozen=True)
class Decision:
    """A chunk that is ready to be decided on.

    Attributes:
        features: float32 [T, 80], normalised.
        finished: the stream ends here.
        now: the audio clock, in seconds.
        samples: float32 [N] at 16 kHz, the chunk's sound.
    """

    features: np.ndarray
    finished: bool
    now: float
    samples: np.ndarray


class AudioInput:
    """Turns pushes into decisions.

    Args:
        clock: cuts the audio into chunks.
        cmvn: normalises their features.
    """

    def __init__(self, clock: AudioClock, cmvn: Any):
        self.clock, self.cmvn = clock, cmvn

    def push(self, state: StreamState, samples: Any, sample_rate: int) -> Iterator[Decision]:
        """The decisions that these samples make due, each computed when it is asked for.

        Warns:
            AudioWarning: once a stream, of a level that cannot be speech's.

        Raises:
            AudioError: before anything was heard; see ``as_samples``. SessionError: the state has been finished.
        """
        if state.finished:
            raise SessionError("push() after finish(): call reset() to start a new stream")
        samples = as_samples(samples)
        check_rate(sample_rate)
        if (warning := state.level.hear(samples, int(sample_rate))) is not None:
            warnings.warn(warning, AudioWarning, stacklevel=5)
        return self._push(state, samples, int(sample_rate))

    def _push(self, state: StreamState, samples: np.ndarray, rate: int) -> Iterator[Decision]:
        chunks = self.clock.push(samples, rate, state.clock)
        while True:
            started = timer()
            chunk, state.clock = next(chunks)
            if chunk is not None:
                features = self.cmvn.apply(chunk.features)
            state.book("features", timer() - started)
            if chunk is None:
                return
            yield Decision(features, False, state.clock.decisions * self.clock.chunk_ms / 1000, chunk.samples)

    def finish(self, state: StreamState) -> Decision:
        """The last decision.

        Raises:
            SessionError: the state has been finished before.
        """
        if state.finished:
            raise SessionError("finish() was called twice: call reset() to start a new stream")
        state.finished = True
        started = timer()
        now = self.clock.seconds(state.clock)
        chunk, state.clock = self.clock.finish(state.clock)
        features = self.cmvn.apply(chunk.features)
        state.book("features", timer() - started)
        return Decision(features, True, now, chunk.samples)


def as_samples(samples: Any) -> np.ndarray:
    """Samples as float32 [N], full scale 1.

    Raises:
        AudioError: not a one-dimensional array of floats or int16, or NaN, infinite or impossibly large samples among
            them.
    """
    try:
        array = np.asarray(samples)
    except EchoStreamError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on another device
        raise AudioError(f"pushed samples are no array ({str(error).splitlines()[0]}); push mono float32") from None
    if array.ndim != 1:
        raise AudioError(f"pushed samples have shape {list(array.shape)}; push mono, one dimension")
    if array.size == 0:
        return np.zeros(0, dtype=np.float32)
    if array.dtype == np.int16:
        return array.astype(np.float32) / 32768
    if array.dtype.kind != "f":
        raise AudioError(f"pushed samples are {array.dtype}; push float32 with full scale 1, or int16")
    check_finite(array, "the push")
    return array.astype(np.float32)
