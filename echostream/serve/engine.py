"""The thread that computes: all streams with a whole chunk of sound step together, and none waits for another's sound.

Whoever is ready when the thread is free takes part in the next step, with one decision each. A stream whose sound comes
faster than it was spoken (a file) is served out of its turn only while nobody else waits: it delays the others by one
decision at most. What comes out is handed to an event loop, in order. The thread never touches a connection, and
connections never touch the model.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echostream.errors import EchoStreamError, SessionError
from echostream.serve.rows import Rows
from echostream.streaming.events import Event, SentenceEnd

log = logging.getLogger("echostream.serve")
CATCH_UP_S = 30.0  # of sound that a stream may be ahead of the clock on the wall when it comes from an archive
LONGEST_UNSAVED_S = 30.0  # of sound, after which a stream is saved at no sentence's end, too


@dataclass(frozen=True)
class Saved:
    """A stream as it was after ``samples`` samples: ``write`` puts it into a file, in any thread."""

    samples: int
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Delivery:
    """What a step gave one stream.

    Attributes:
        events: in order.
        finished: there is no more to come.
        saved: the stream as it is behind these events, if it was to be saved.
        error: a sentence for the client; the stream is lost.
        arrived: when the sound of the decision was complete (``time.perf_counter``); 0 without a decision.
        began: when the step began.
    """

    events: list[Event] = field(default_factory=list)
    finished: bool = False
    saved: Saved | None = None
    error: str | None = None
    arrived: float = 0.0
    began: float = 0.0


class Stream:
    """The engine's side of a stream; ``take`` is called in the event loop with every ``Delivery``.

    Args:
        rate: samples per second of what is fed.
        options: see ``rows.STREAM_OPTIONS``.
        save_s: seconds of sound between two archives at least; None: never.
    """

    def __init__(
        self,
        take: Callable[[Delivery], None],
        rate: int,
        options: Mapping[str, Any] | None = None,
        save_s: float | None = None,
    ):
        self.take, self.rate, self.options, self.save_s = take, rate, dict(options or {}), save_s
        self.number = -1  # in the batch
        self.pending: deque[tuple[np.ndarray, float]] = deque()  # sound and when it arrived
        self.waiting = 0  # samples in ``pending``
        self.pushed = 0  # samples that the model has
        self.saved_at = 0  # ``pushed`` when last saved
        self.ended_at = 0.0
        self.began = 0.0  # when its first sample would have been spoken, were it live
        self.ended = self.gone = self.save_now = False


class Engine:
    """Owns the batch and the thread. Its methods may be called from any thread; they return at once.

    Args:
        rows: the batch; nobody else may use it.
        loop: where deliveries are made.
        observe: told of every step: seconds it took, streams in it, seconds of sound in it. Called in the thread.
    """

    def __init__(
        self,
        rows: Rows,
        loop: asyncio.AbstractEventLoop,
        observe: Callable[[float, int, float], None] = lambda *_: None,
    ):
        self.rows, self.loop, self.observe = rows, loop, observe
        self.chunk_ms = rows.settings.chunk_ms
        self._changed = threading.Condition()
        self._commands: deque[tuple[Callable[[], Any], Future]] = deque()
        self._streams: list[Stream] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="echostream-engine", daemon=True)
        self._thread.start()

    def open(self, stream: Stream, path: Path | None = None) -> Future:
        """Give the stream a row: a fresh one, or as archived in ``path``. Fails as ``Rows.join`` and ``restore``."""

        def work() -> None:
            if path is None:
                stream.number = self.rows.join(stream.options)
            else:
                stream.number = self.rows.restore(path, stream.options)
            self._streams.append(stream)

        return self.call(work)

    def close(self, stream: Stream) -> Future:
        """The stream's row is free; what waits of it is forgotten. Closing twice does nothing."""
        stream.gone = True
        return self.call(lambda: self._leave(stream))

    def feed(self, stream: Stream, samples: np.ndarray) -> None:
        """Sound, int16 [N]."""
        with self._changed:
            now = time.perf_counter()
            if not stream.began:
                stream.began = now - stream.pushed / stream.rate - (CATCH_UP_S if stream.pushed else 0.0)
            stream.pending.append((samples, now))
            stream.waiting += len(samples)
            self._changed.notify()

    def end(self, stream: Stream) -> None:
        """No more sound will come: what is left is translated."""
        with self._changed:
            stream.ended, stream.ended_at = True, time.perf_counter()
            self._changed.notify()

    def save(self, stream: Stream) -> None:
        """Save it now; the answer is a ``Delivery``."""
        with self._changed:
            stream.save_now = True
            self._changed.notify()

    def call(self, work: Callable[[], Any]) -> Future:
        """Do ``work`` in the thread, between two steps."""
        future: Future = Future()
        with self._changed:
            if self._stopping:
                future.set_exception(SessionError("the server is stopping"))
            else:
                self._commands.append((work, future))
                self._changed.notify()
        return future

    def stop(self) -> None:
        """End the thread after its step; returns when it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        for _, future in self._commands:
            future.cancel()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._commands or self._stopping or any(map(self._ready, self._streams))):
                    self._changed.wait()
                if self._stopping:
                    return
                commands = list(self._commands)
                self._commands.clear()
            for work, future in commands:
                self._do(work, future)
            self._step()

    @staticmethod
    def _do(work: Callable[[], Any], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    def _chunk(self, stream: Stream) -> int:
        """Samples that complete the next decision, whatever the rate: decision i falls at ceil(i * chunk)."""
        done = stream.pushed * 1000 // (self.chunk_ms * stream.rate)
        return -(-(done + 1) * self.chunk_ms * stream.rate // 1000) - stream.pushed

    def _ready(self, stream: Stream) -> bool:
        if stream.number < 0:
            return False
        return stream.ended or stream.save_now or stream.waiting >= self._chunk(stream)

    def _early(self, stream: Stream, now: float) -> bool:
        """Is this decision of sound that could not have been spoken yet?"""
        heard_s = stream.pushed / stream.rate
        return not stream.save_now and bool(stream.waiting) and heard_s > now - stream.began + self.chunk_ms / 1000

    def _step(self) -> None:
        """One decision for each stream that is ready, and the end of those that end."""
        began = time.perf_counter()
        with self._changed:
            streams = [stream for stream in self._streams if self._ready(stream) and not stream.gone]
            streams = [stream for stream in streams if not self._early(stream, began)] or streams
            parts = {stream: _cut(stream, self._chunk(stream)) for stream in streams}
            ending = [stream for stream in streams if stream.ended and not stream.waiting]
        if not streams:
            return
        try:
            deliveries = self._decide(parts, ending, began)
        except Exception as error:
            self._fail(streams, error)
            return
        for stream in ending:
            self._leave(stream)
        heard = sum(len(part) / stream.rate for stream, (part, _) in parts.items())
        self.observe(time.perf_counter() - began, len(streams), heard)
        self._deliver(deliveries)

    def _decide(
        self, parts: dict[Stream, tuple[np.ndarray, float]], ending: list[Stream], began: float
    ) -> list[tuple[Stream, Delivery]]:
        samples = {stream.number: part for stream, (part, _) in parts.items() if len(part)}
        events: dict[int, list[Event]] = {stream.number: [] for stream in parts}
        for number, found in self.rows.push(samples, {stream.number: stream.rate for stream in parts}).items():
            events[number] += found
        for number, found in self.rows.finish(*(stream.number for stream in ending)).items():
            events[number] += found
        deliveries = []
        for stream, (part, arrived) in parts.items():
            stream.pushed += len(part)
            found, finished = events[stream.number], stream in ending
            saved = None if finished else self._save(stream, found)
            deliveries.append((stream, Delivery(found, finished, saved, None, arrived or stream.ended_at, began)))
        return deliveries

    def _save(self, stream: Stream, events: list[Event]) -> Saved | None:
        now, stream.save_now = stream.save_now, False
        if stream.save_s is not None and not now:
            unsaved = (stream.pushed - stream.saved_at) / stream.rate
            ended = any(isinstance(event, SentenceEnd) for event in events)
            now = unsaved >= (stream.save_s if ended else max(stream.save_s, LONGEST_UNSAVED_S))
        if not now:
            return None
        stream.saved_at = stream.pushed
        return Saved(stream.pushed, self.rows.snapshot(stream.number))

    def _fail(self, streams: list[Stream], error: Exception) -> None:
        """A step went wrong, and a row in the middle of a decision is of no use to anybody."""
        ours = isinstance(error, EchoStreamError)
        log.error("a step of %d streams failed: %s", len(streams), error, exc_info=not ours)
        for stream in streams:
            self._leave(stream)
        self._deliver([(stream, Delivery(error="internal error: the stream is lost")) for stream in streams])

    def _leave(self, stream: Stream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
            self.rows.leave(stream.number)
            stream.number = -1
        with self._changed:
            stream.pending.clear()
            stream.waiting = 0

    def _deliver(self, deliveries: list[tuple[Stream, Delivery]]) -> None:
        def hand_over() -> None:
            for stream, delivery in deliveries:
                if not stream.gone:
                    stream.take(delivery)

        try:
            self.loop.call_soon_threadsafe(hand_over)
        except RuntimeError:  # the loop has been closed; so have all connections
            pass


def _cut(stream: Stream, most: int) -> tuple[np.ndarray, float]:
    """Take up to ``most`` of the samples that wait; with the time when the last of them arrived (0: there are none)."""
    parts, missing, at = [], most, 0.0
    while missing and stream.pending:
        part, at = stream.pending.popleft()
        if len(part) > missing:
            stream.pending.appendleft((part[missing:], at))
            part = part[:missing]
        parts.append(part)
        missing -= len(part)
    stream.waiting -= most - missing
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int16), at
