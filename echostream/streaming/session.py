"""Streaming sessions: samples in, events out. The agent, the command line and the server are shells over this."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from echostream.audio.io import check_finite
from echostream.audio.resample import check_rate
from echostream.constants import SAMPLE_RATE
from echostream.errors import AudioError, ConfigError, SessionError
from echostream.streaming.clock import AudioClock
from echostream.streaming.engine import Engine, Settings, Stream, Work
from echostream.streaming.events import Event
from echostream.streaming.policy import CTCCountPolicy, Policy, make_policy
from echostream.streaming.segmenter import NoSegmenter, PunctuationSegmenter, Segmenter
from echostream.streaming.stages import STAGE_NAMES, Request

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle


class StreamingSession:
    """Translates one stream of speech while it is spoken.

    Args:
        bundle: a loaded checkpoint (``echostream.checkpoint.load_bundle``). Many sessions may share it.
        policy: when to write: a policy, its name (``ctc``, ``sentence``), or None for the CTC-count policy with the
            bundle's defaults.
        segmenter: where sentences end: a segmenter, ``punctuation`` (the model's own), or ``none`` for recordings that
            are one sentence each.
        settings: see ``Settings``; default: the bundle's. Its fields may also be given by name (``chunk_ms=640``).

    Raises:
        ConfigError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        policy: Policy | str | None = None,
        segmenter: Segmenter | str = "punctuation",
        settings: Settings | None = None,
        **options: Any,
    ):
        known = [f.name for f in fields(Settings)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; known: policy, segmenter, {', '.join(known)}")
        self.bundle = bundle
        if settings is None:
            preferred = getattr(bundle, "policy", None) or {}
            settings = Settings(**{name: preferred[name] for name in known if name in preferred})
        self.settings = replace(settings, **options)
        self.engine = make_engine(bundle, policy, segmenter, self.settings)
        self.clock = AudioClock(self.settings.chunk_ms)
        from echostream.streaming.torch_stages import TorchStages  # so that events and policies need no torch

        self.stages = TorchStages(bundle, rows=1, speech=self.settings.speech)
        self._start()

    def _start(self) -> None:
        self._clock = self.clock.init_state()
        self._stream = Stream()
        self._finished = False
        self.elapsed_s = 0.0
        self.stage_seconds = dict.fromkeys(("features", *dict.fromkeys(STAGE_NAMES.values())), 0.0)

    # ---- what users call ---------------------------------------------------------------------------------------

    def push(self, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> list[Event]:
        """Hear more of the stream; decisions fall on the audio clock, so most short pushes give nothing.

        Args:
            samples: float [N], full scale is 1, or int16 [N]; mono. N may be 0.
            sample_rate: samples per second; it may change from push to push.

        Returns:
            What was decided, in order.

        Raises:
            AudioError: samples are NaN or infinite, not mono, or at an impossible rate. Nothing of the push was heard,
                and the session goes on.
            SessionError: the stream has been finished.
        """
        if self._finished:
            raise SessionError("push() after finish(): call reset() to start a new stream")
        samples = as_samples(samples)
        check_rate(sample_rate)
        events: list[Event] = []
        chunks = self.clock.push(samples, int(sample_rate), self._clock)
        while True:
            started = time.perf_counter()
            features, self._clock = next(chunks)
            self._book("features", time.perf_counter() - started)
            if features is None:
                return events
            events += self._decide(features, False, self._clock.decisions * self.settings.chunk_ms / 1000)

    def finish(self) -> list[Event]:
        """The stream has ended: translate what is left. After it only ``reset`` may follow.

        Raises:
            SessionError: the stream has been finished before.
        """
        if self._finished:
            raise SessionError("finish() was called twice: call reset() to start a new stream")
        self._finished = True
        now = self.clock.seconds(self._clock)
        started = time.perf_counter()
        features, self._clock = self.clock.finish(self._clock)
        self._book("features", time.perf_counter() - started)
        return self._decide(features, True, now)

    def reset(self) -> None:
        """Forget everything; the next push starts a new stream."""
        self.stages.reset(0)
        self._start()

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def source_time_s(self) -> float:
        """Seconds of source audio pushed."""
        return self.clock.seconds(self._clock)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's state for this stream; constant."""
        return self.stages.nbytes

    # ---- driving the engine ------------------------------------------------------------------------------------

    def _decide(self, features: np.ndarray, finished: bool, now: float) -> list[Event]:
        started = time.perf_counter()
        normalised = self.bundle.cmvn.apply(features)
        self._book("features", time.perf_counter() - started)
        events = self._run(self.engine.decide(self._stream, normalised, finished, now))
        return [replace(event, elapsed_s=self.elapsed_s) for event in events]

    def _run(self, work: Work) -> list[Event]:
        answer: Any = None
        begun = time.perf_counter()
        served = 0.0
        while True:
            try:
                request: Request = work.send(answer)
            except StopIteration as stop:
                self.elapsed_s += time.perf_counter() - begun - served
                return stop.value
            started = time.perf_counter()
            answer = self.stages.run([(0, request)])[0]
            seconds = time.perf_counter() - started
            served += seconds
            self._book(STAGE_NAMES[type(request)], seconds)

    def _book(self, stage: str, seconds: float) -> None:
        self.stage_seconds[stage] += seconds
        self.elapsed_s += seconds


def make_engine(
    bundle: Bundle, policy: Policy | str | None, segmenter: Segmenter | str, settings: Settings
) -> Engine:
    """The engine for a bundle, with policy and segmenter by name or as they are.

    Raises:
        ConfigError: an unknown name.
    """
    if policy is None:
        knobs = {f.name for f in fields(CTCCountPolicy)}
        policy = CTCCountPolicy(**{k: v for k, v in (getattr(bundle, "policy", None) or {}).items() if k in knobs})
    elif isinstance(policy, str):
        policy = make_policy(policy)
    if segmenter == "punctuation":
        segmenter = PunctuationSegmenter(bundle.target_dict)
    elif segmenter == "none":
        segmenter = NoSegmenter()
    elif isinstance(segmenter, str):
        raise ConfigError(f"unknown segmenter {segmenter!r}; known: punctuation, none")
    sample_rate = None if bundle.vocoder is None else bundle.vocoder.config.sampling_rate
    return Engine(bundle.config, bundle.source_dict, bundle.target_dict, policy, segmenter, settings, sample_rate)


def as_samples(samples: Any) -> np.ndarray:
    """Samples as float32 [N], full scale 1.

    Raises:
        AudioError: not a one-dimensional array of numbers, or NaN or infinite samples among them.
    """
    array = np.asarray(samples)
    if array.ndim != 1:
        raise AudioError(f"pushed samples have shape {list(array.shape)}; push mono, one dimension")
    if array.dtype == np.int16:
        return array.astype(np.float32) / 32768
    if array.size and array.dtype.kind != "f":
        raise AudioError(f"pushed samples are {array.dtype}; push float32 with full scale 1, or int16")
    array = array.astype(np.float32)
    check_finite(array, "the push")
    return array
