"""Streaming sessions: samples in, events out. The agent, the command line and the server are shells over this."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.errors import ConfigError
from echostream.streaming import archive
from echostream.streaming.backends import backend_of
from echostream.streaming.clock import AudioClock
from echostream.streaming.engine import Engine, Settings
from echostream.streaming.events import Event
from echostream.streaming.policy import Policy, knobs_of, make_policy
from echostream.streaming.segmenter import Segmenter, make_segmenter
from echostream.streaming.stages import Backend
from echostream.streaming.track import Hearing, Track, decide

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle


class StreamingSession:
    """Translates one stream of speech while it is spoken.

    Args:
        bundle: a loaded checkpoint (``echostream.checkpoint.load_bundle``). Many sessions may share it.
        policy: when to write: a policy, its name (see ``policy.POLICIES``), or None for what the bundle says (the
            CTC-count policy, if it says nothing).
        segmenter: where sentences end: a segmenter, or names joined by ``+`` (see ``segmenter.SEGMENTERS``):
            ``punctuation`` (the model's own), ``pause``, or ``none`` for recordings that are one sentence each.
        settings: see ``Settings``; default: the bundle's. Its fields may also be given by name (``chunk_ms=640``).
        backend: makes what runs the model; default: what the bundle is for (see ``backend_of``).

    Raises:
        ConfigError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        policy: Policy | str | None = None,
        segmenter: Segmenter | str = "punctuation",
        settings: Settings | None = None,
        backend: Backend | None = None,
        **options: Any,
    ):
        self.bundle = bundle
        self.engine = make_engine(bundle, policy, segmenter, settings, options)
        self.settings = self.engine.settings
        self._hearing = Hearing(AudioClock(self.settings.chunk_ms, bundle.config.features), bundle.cmvn)
        self._stages = (backend or backend_of(bundle))(bundle, rows=1, speech=self.settings.speech)
        self._track = Track(0, self._hearing.clock.init_state())

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
        events: list[Event] = []
        for decision in self._hearing.push(self._track, samples, sample_rate):
            events += decide(self.engine, self._stages, [(self._track, decision)])[0]
        return events

    def finish(self) -> list[Event]:
        """The stream has ended: translate what is left. After it only ``reset`` may follow.

        Raises:
            SessionError: the stream has been finished before.
        """
        return decide(self.engine, self._stages, [(self._track, self._hearing.finish(self._track))])[0]

    def reset(self) -> None:
        """Forget everything; the next push starts a new stream."""
        self._stages.reset(0)
        self._track = Track(0, self._hearing.clock.init_state())

    def save(self, path: str | Path) -> None:
        """Write the running session as a npz archive of plain arrays, with a version and the model's digest."""
        archive.write(path, self.engine, self.bundle, self._track, self._stages.snapshot(0))

    def restore(self, path: str | Path) -> None:
        """Go on where a saved session stopped; what this one has heard is forgotten.

        Raises:
            SessionError: the file is missing, damaged, or of another version, model, policy or setting.
        """
        track, arrays = archive.read(path, self.engine, self.bundle)
        archive.fit(path, lambda: self._stages.restore(0, arrays))
        self._track = replace(track, row=0)

    @property
    def finished(self) -> bool:
        return self._track.finished

    @property
    def source_time_s(self) -> float:
        """Seconds of source audio pushed."""
        return self._hearing.clock.seconds(self._track.clock)

    @property
    def elapsed_s(self) -> float:
        """Seconds of computing so far."""
        return self._track.elapsed_s

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Of those, by stage: ``features``, ``encoder`` (both CTC heads in it), ``text``, ``units``, ``vocoder``."""
        return dict(self._track.seconds)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's state for this stream; constant."""
        return self._stages.nbytes


def make_engine(
    bundle: Bundle,
    policy: Policy | str | None,
    segmenter: Segmenter | str,
    settings: Settings | None,
    options: dict[str, Any],
) -> Engine:
    """The engine for a bundle, with policy and segmenter by name or as they are.

    Raises:
        ConfigError: an unknown name, or a setting out of range.
    """
    known = [f.name for f in fields(Settings)]
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}; known: policy, segmenter, {', '.join(known)}")
    preferred = getattr(bundle, "policy", None) or {}
    if settings is None:
        settings = Settings(**{name: preferred[name] for name in known if name in preferred})
    settings = replace(settings, **options)
    if policy is None:
        name = preferred.get("policy", "ctc")
        policy = make_policy(name, **{knob: preferred[knob] for knob in knobs_of(name) if knob in preferred})
    elif isinstance(policy, str):
        policy = make_policy(policy)
    if isinstance(segmenter, str):
        segmenter = make_segmenter(segmenter, bundle.source_dict, bundle.target_dict)
    sample_rate = None if bundle.vocoder is None else bundle.vocoder.config.sampling_rate
    return Engine(bundle.config, bundle.source_dict, bundle.target_dict, policy, segmenter, settings, sample_rate)
