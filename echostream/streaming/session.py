"""Streaming sessions: samples in, events out. The agent, the command line and the server are shells over this."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.streaming.core import StreamCore
from echostream.streaming.engine import Engine
from echostream.streaming.events import Event, SentenceEnd, Waveform
from echostream.streaming.policies.base import Policy
from echostream.streaming.segmenters.base import Segmenter
from echostream.streaming.settings import Settings
from echostream.streaming.stages import Backend
from echostream.streaming.turns import Turns, in_turn

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle


class Translation(NamedTuple):
    """A recording, translated.

    Attributes:
        text, source_text: translation and what was understood, a sentence a line.
        samples: float32 [N], the speech of all sentences without the silence between them; empty without a vocoder.
        sample_rate: of it; 0 without a vocoder.
        events: all that was given out, in order.
    """

    text: str
    source_text: str
    samples: np.ndarray
    sample_rate: int
    events: list[Event]


class StreamingSession:
    """Translates one stream of speech while it is spoken. Threads that share it take turns, call by call.

    Args:
        bundle: a loaded checkpoint (``echostream.checkpoint.load_bundle``). Many sessions may share it.
        policy: when to write: a policy, its name (see ``policies.factory``; its knobs are the bundle's), or None for
            what the bundle says (the CTC-count policy, if it says nothing).
        segmenter: where sentences end: a segmenter, or names joined by ``+`` (see ``segmenters.factory``):
            ``punctuation`` (the model's own), ``pause``, or ``none`` for recordings that are one sentence each; or None
            for what the bundle says (``punctuation``, if it says nothing).
        settings: see ``Settings``; default: the bundle's. Its fields may also be given by name (``chunk_ms=640``), as
            may knobs of the policy and the segmenter (``alignatt_frames=12``; see ``resolve.OPTIONS``).
        backend: makes what runs the model; default: what the bundle is for (see ``backend_of``).

    Raises:
        ConfigError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        policy: Policy | str | None = None,
        segmenter: Segmenter | str | None = None,
        settings: Settings | None = None,
        backend: Backend | None = None,
        **options: Any,
    ):
        self.bundle = bundle
        self._turns = Turns()
        self._core = StreamCore(bundle, 1, backend, policy=policy, segmenter=segmenter, settings=settings, **options)
        self.engine: Engine = self._core.engine
        self.settings: Settings = self.engine.settings
        self._state = self._core.open(0)

    @in_turn
    def push(self, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> list[Event]:
        """Hear more of the stream; decisions fall on the audio clock, so most short pushes give nothing.

        Args:
            samples: float [N], full scale is 1, or int16 [N]; mono. N may be 0.
            sample_rate: samples per second; it may change from push to push.

        Returns:
            What was decided, in order.

        Raises:
            AudioError: samples are NaN, infinite or impossibly large, no mono array, or at an impossible rate. Nothing
                of the push was heard, and the session goes on.
            SessionError: the stream has been finished, or the push comes from within another call.

        Warns:
            AudioWarning: once a stream, if its level cannot be that of speech with full scale 1.
        """
        return self._core.push({0: (self._state, samples, sample_rate)})[0]

    @in_turn
    def finish(self) -> list[Event]:
        """The stream has ended: translate what is left. After it only ``reset`` may follow.

        Raises:
            SessionError: the stream has been finished before.
        """
        return self._core.finish({0: self._state})[0]

    @in_turn
    def reset(self) -> None:
        """Forget everything; the next push starts a new stream."""
        self._state = self._core.open(0)

    def translate(self, path: str | Path) -> Translation:
        """A recording from its beginning to its end, heard as if it were spoken now. The stream is new before it, and
        after it, so that the session may be used again.

        Raises:
            AudioError: it is missing or cannot be read.
        """
        from echostream.audio.stream import open_file

        self.reset()
        source = open_file(path)
        try:
            events = [event for samples in source.blocks for event in self.push(samples, source.rate)]
            events += self.finish()
        finally:
            source.close()
            self.reset()
        ends = [event for event in events if isinstance(event, SentenceEnd)]
        waves = [event for event in events if isinstance(event, Waveform)]
        return Translation(
            "\n".join(end.text for end in ends),
            "\n".join(end.source_text for end in ends),
            np.concatenate([np.zeros(0, dtype=np.float32), *(wave.samples for wave in waves)]),
            waves[0].sample_rate if waves else 0,
            events,
        )

    @in_turn
    def save(self, path: str | Path) -> None:
        """Write the running session as a npz archive of plain arrays, with a version and the model's digest.

        Raises:
            OutputError: it cannot be written; what was there before still is.
        """
        self._core.snapshot(self._state)(path)

    @in_turn
    def restore(self, path: str | Path) -> None:
        """Go on where a saved session stopped; what this one has heard is forgotten.

        Raises:
            SessionError: the file is missing, damaged, or of another version, model, policy or setting.
        """
        self._state = self._core.restore(path, 0)

    @property
    def finished(self) -> bool:
        return self._state.finished

    @property
    def source_time_s(self) -> float:
        """Seconds of source audio pushed."""
        return self._core.input.clock.seconds(self._state.clock)

    @property
    def elapsed_s(self) -> float:
        """Seconds of computing so far."""
        return self._state.elapsed_s

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Of those, by stage: ``features``, ``encoder`` (both CTC heads in it), ``text``, ``units``, ``vocoder``."""
        return dict(self._state.seconds)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's state for this stream: bounded, and of an exported model as much as the current sentence
        needs."""
        return self._core.stages.nbytes
