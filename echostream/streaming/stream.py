"""One stream's whole memory outside the model, and the loop that serves the engine's requests for many of them."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from echostream.audio.io import check_finite
from echostream.audio.level import LevelWatch
from echostream.audio.resample import check_rate
from echostream.errors import AudioError, AudioWarning, EchoStreamError, SessionError
from echostream.streaming.clock import AudioClock, ClockState
from echostream.streaming.engine import Engine, Stream, Work
from echostream.streaming.events import Event
from echostream.streaming.stages import STAGE_NAMES, STAGE_ORDER, Request, Stages

# The clock that tells how long computing took, in seconds. Whoever sits and listens waits by the clock on the wall; a
# benchmark on a machine with other work may set the time of this process alone (``time.process_time``).
timer: Callable[[], float] = time.perf_counter


def _no_time() -> dict[str, float]:
    return dict.fromkeys(("features", *STAGE_NAMES.values()), 0.0)


@dataclass
class StreamState:
    """A stream from its samples to its sentences.

    Attributes:
        row: its row in the model's stages.
        clock: what of its audio waits for the next decision.
        stream: what the engine remembers of it.
        finished: has its end been heard?
        seconds: computing time by stage. In a batch a stage's time counts for every stream that waited for it.
        level: warns of sound that cannot be speech.
    """

    row: int
    clock: ClockState
    stream: Stream = field(default_factory=Stream)
    finished: bool = False
    seconds: dict[str, float] = field(default_factory=_no_time)
    elapsed_s: float = 0.0
    level: LevelWatch = field(default_factory=LevelWatch, compare=False)

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


class Hearing:
    """Turns pushes into decisions.

    Args:
        clock: cuts the audio into chunks.
        cmvn: normalises their features.
    """

    def __init__(self, clock: AudioClock, cmvn: Any):
        self.clock, self.cmvn = clock, cmvn

    def push(self, track: StreamState, samples: Any, sample_rate: int) -> Iterator[Decision]:
        """The decisions that these samples make due, each computed when it is asked for.

        Warns:
            AudioWarning: once a stream, of a level that cannot be speech's.

        Raises:
            AudioError: before anything was heard; see ``as_samples``. SessionError: the track has been finished.
        """
        if track.finished:
            raise SessionError("push() after finish(): call reset() to start a new stream")
        samples = as_samples(samples)
        check_rate(sample_rate)
        if (said := track.level.hear(samples, int(sample_rate))) is not None:
            warnings.warn(said, AudioWarning, stacklevel=4)
        return self._push(track, samples, int(sample_rate))

    def _push(self, track: StreamState, samples: np.ndarray, rate: int) -> Iterator[Decision]:
        chunks = self.clock.push(samples, rate, track.clock)
        while True:
            started = timer()
            chunk, track.clock = next(chunks)
            if chunk is not None:
                features = self.cmvn.apply(chunk.features)
            track.book("features", timer() - started)
            if chunk is None:
                return
            yield Decision(features, False, track.clock.decisions * self.clock.chunk_ms / 1000, chunk.samples)

    def finish(self, track: StreamState) -> Decision:
        """The last decision.

        Raises:
            SessionError: the track has been finished before.
        """
        if track.finished:
            raise SessionError("finish() was called twice: call reset() to start a new stream")
        track.finished = True
        started = timer()
        now = self.clock.seconds(track.clock)
        chunk, track.clock = self.clock.finish(track.clock)
        features = self.cmvn.apply(chunk.features)
        track.book("features", timer() - started)
        return Decision(features, True, now, chunk.samples)


def decide(engine: Engine, stages: Stages, jobs: Sequence[tuple[StreamState, Decision]]) -> list[list[Event]]:
    """Take one decision on each of several tracks, their requests of one kind answered together.

    Of the kinds waiting the one that comes first in the chain is served, so that streams that are behind catch up and
    the later stages see as many rows as possible. What a stream gets does not depend on its neighbours.
    """
    works = [engine.decide(t.stream, d.features, d.finished, d.now, d.samples) for t, d in jobs]
    events: list[list[Event]] = [[] for _ in jobs]
    waiting: dict[int, Request] = {}

    def advance(i: int, work: Work, answer: Any) -> None:
        started = timer()
        try:
            waiting[i] = work.send(answer)
        except StopIteration as stop:
            events[i] = stop.value
        jobs[i][0].elapsed_s += timer() - started

    for i, work in enumerate(works):
        advance(i, work, None)
    while waiting:
        kind = min((type(request) for request in waiting.values()), key=STAGE_ORDER.index)
        served = [i for i, request in waiting.items() if type(request) is kind]
        requests = [(jobs[i][0].row, waiting.pop(i)) for i in served]
        started = timer()
        answers = stages.run(requests)
        seconds = timer() - started
        for i in range(len(jobs)):
            if i in served:
                jobs[i][0].book(STAGE_NAMES[kind], seconds)
            elif i in waiting:
                jobs[i][0].elapsed_s += seconds
        for i, answer in zip(served, answers):
            advance(i, works[i], answer)
    return [[replace(e, elapsed_s=t.elapsed_s) for e in found] for (t, _), found in zip(jobs, events)]


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
