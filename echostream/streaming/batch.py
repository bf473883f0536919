"""Many streams stepping together: one model call serves all that wait for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.errors import ConfigError, SessionError
from echostream.streaming.core import StreamCore
from echostream.streaming.engine import Engine
from echostream.streaming.events import Event
from echostream.streaming.policies.base import Policy
from echostream.streaming.segmenters.base import Segmenter
from echostream.streaming.settings import Settings
from echostream.streaming.stages import Backend
from echostream.streaming.stream import StreamState
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
        self._core: StreamCore = StreamCore(
            bundle, int(capacity), backend, policy=policy, segmenter=segmenter, settings=settings, **options
        )
        self.engine: Engine = self._core.engine
        self.settings: Settings = self.engine.settings
        self._free: list[int] = list(range(capacity))
        self._states: dict[int, StreamState] = {}
        self._next: int = 0

    def join(self) -> int:
        """A new stream; its number is used in all other calls, and never given twice.

        Raises:
            SessionError: the batch is full.
        """
        return self._admit(self._core.open)

    @in_turn
    def leave(self, number: int) -> None:
        """Forget a stream, finished or not."""
        self._free.append(self._state(number).row)
        del self._states[number]

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
        return self._core.push({n: (self._state(n), part, rates.get(n)) for n, part in samples.items()})

    @in_turn
    def finish(self, *numbers: int) -> dict[int, list[Event]]:
        """These streams have ended: translate what is left of them. Their places are free after ``leave``.

        Raises:
            SessionError: one of them is unknown, named twice, or has been finished before; then none is.
        """
        for number in numbers:
            if self._state(number).finished:
                raise SessionError(f"stream {number} has been finished already; leave() it")
        if len(set(numbers)) < len(numbers):
            raise SessionError(f"finish() names a stream twice: {', '.join(map(str, numbers))}")
        return self._core.finish({number: self._states[number] for number in numbers})

    @in_turn
    def snapshot(self, number: int) -> Callable[[str | Path], None]:
        """The stream as it is now; the function returned writes it to a file, later and in any thread."""
        return self._core.snapshot(self._state(number))

    def save(self, number: int, path: str | Path) -> None:
        """Write a running stream as ``StreamingSession.save`` does; either can take it up.

        Raises:
            OutputError: it cannot be written; what was there before still is.
        """
        self.snapshot(number)(path)

    def restore(self, path: str | Path) -> int:
        """A new stream that goes on where a saved one was; its number.

        Raises:
            SessionError: the file is missing, damaged, or of another version, model, policy or setting; or the batch is
                full.
        """
        return self._admit(lambda row: self._core.restore(path, row))

    @in_turn
    def _admit(self, make: Callable[[int], StreamState]) -> int:
        """Give a free row to the stream that ``make`` makes for it."""
        if not self._free:
            raise SessionError(
                f"all {self._core.stages.rows} places of the batch are taken; let a stream leave() first"
            )
        state, number = make(self._free[0]), self._next
        self._free.remove(state.row)
        self._next += 1
        self._states[number] = state
        return number

    def _state(self, number: int) -> StreamState:
        if not isinstance(number, Integral) or number not in self._states:
            raise SessionError(f"there is no stream {number} in the batch; there are: {sorted(self._states) or 'none'}")
        return self._states[number]
