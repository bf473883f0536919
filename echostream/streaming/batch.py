"""Many streams stepping together: one model call serves all that wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.errors import ConfigError, SessionError
from echostream.streaming.backends import backend_of
from echostream.streaming.clock import AudioClock
from echostream.streaming.engine import Settings
from echostream.streaming.events import Event
from echostream.streaming.policy import Policy
from echostream.streaming.segmenters.base import Segmenter
from echostream.streaming.session import make_engine
from echostream.streaming.stages import Backend
from echostream.streaming.stream import Hearing, StreamState, decide
from echostream.streaming.turns import Turns, in_turn

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle


class SessionBatch:
    """Up to ``capacity`` streams that join and leave at any time; each gets what it would get alone.

    Threads that share it take turns, call by call.

    Args:
        capacity: rows of the model's state; its memory is taken at once.
        bundle, policy, segmenter, settings, backend, options: as for ``StreamingSession``, the same for all streams.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        capacity: int = 8,
        policy: Policy | str | None = None,
        segmenter: Segmenter | str | None = None,
        settings: Settings | None = None,
        backend: Backend | None = None,
        **options: Any,
    ):
        if isinstance(capacity, bool) or not isinstance(capacity, Integral) or capacity < 1:
            raise ConfigError(f"capacity is {capacity!r}; a batch needs room for one stream at least")
        self._turns = Turns()
        self.engine = make_engine(bundle, policy=policy, segmenter=segmenter, settings=settings, **options)
        self.settings = self.engine.settings
        self._hearing = Hearing(AudioClock(self.settings.chunk_ms, bundle.config.features), bundle.cmvn)
        self._stages = (backend or backend_of(bundle))(bundle, rows=capacity, speech=self.settings.speech)
        self._free = list(range(capacity))
        self._tracks: dict[int, StreamState] = {}
        self._next = 0

    @in_turn
    def join(self) -> int:
        """A new stream; its number is used in all other calls, and never given twice.

        Raises:
            SessionError: the batch is full.
        """
        if not self._free:
            raise SessionError(f"all {self._stages.rows} places of the batch are taken; let a stream leave() first")
        row, number = self._free.pop(0), self._next
        self._next += 1
        self._stages.reset(row)
        self._tracks[number] = StreamState(row, self._hearing.clock.init_state())
        return number

    @in_turn
    def leave(self, number: int) -> None:
        """Forget a stream, finished or not."""
        self._free.append(self._track(number).row)
        del self._tracks[number]

    @in_turn
    def push(
        self, samples: Mapping[int, np.ndarray], sample_rate: int | Mapping[int, int] = SAMPLE_RATE
    ) -> dict[int, list[Event]]:
        """Hear more of some streams: their numbers and samples [N] each. Returns the events of each.

        Args:
            sample_rate: of all of them, or of each by its number.

        Raises:
            AudioError, SessionError: as ``StreamingSession.push``; then nothing of any stream was heard.
        """
        if not isinstance(samples, Mapping):
            raise SessionError(f"push() takes the samples of each stream by its number, not {type(samples).__name__}")
        rates = sample_rate if isinstance(sample_rate, Mapping) else dict.fromkeys(samples, sample_rate)
        pending = {
            number: self._hearing.push(self._track(number), part, rates.get(number))
            for number, part in samples.items()
        }
        events: dict[int, list[Event]] = {number: [] for number in samples}
        while pending:
            jobs = {}
            for number, decisions in list(pending.items()):
                decision = next(decisions, None)
                if decision is None:
                    del pending[number]
                else:
                    jobs[number] = (self._tracks[number], decision)
            if jobs:
                self._decide(jobs, events)
        return events

    @in_turn
    def finish(self, *numbers: int) -> dict[int, list[Event]]:
        """These streams have ended: translate what is left of them. Their places are free after ``leave``.

        Raises:
            SessionError: one of them is unknown, named twice, or has been finished before; then none is.
        """
        for number in numbers:
            if self._track(number).finished:
                raise SessionError(f"stream {number} has been finished already; leave() it")
        if len(set(numbers)) < len(numbers):
            raise SessionError(f"finish() names a stream twice: {', '.join(map(str, numbers))}")
        events: dict[int, list[Event]] = {number: [] for number in numbers}
        self._decide({n: (self._tracks[n], self._hearing.finish(self._tracks[n])) for n in numbers}, events)
        return events

    def _decide(self, jobs: dict, events: dict[int, list[Event]]) -> None:
        for number, found in zip(jobs, decide(self.engine, self._stages, list(jobs.values()))):
            events[number] += found

    def _track(self, number: int) -> StreamState:
        if not isinstance(number, Integral) or number not in self._tracks:
            raise SessionError(f"there is no stream {number} in the batch; there are: {sorted(self._tracks) or 'none'}")
        return self._tracks[number]
