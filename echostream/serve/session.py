"""One client's session: what it was sent, what waits for it, and what it may be told again."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from echostream.serve.engine import Delivery, Stream
from echostream.streaming.events import Event, SentenceEnd

if TYPE_CHECKING:
    from echostream.serve.hub import Hub

log = logging.getLogger("echostream.serve")
RETRY_S = 5


class Refused(Exception):
    """No session: an HTTP status, a sentence, and for a full server when to try again."""

    def __init__(self, status: int, message: str, retry_s: int | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_s = status, message, retry_s


class Renderer(Protocol):
    """Turns a stream's events into messages of a protocol; the same events always give the same messages."""

    def render(self, event: Event) -> list[dict[str, Any] | None]:
        """Messages, without numbers; None is one that this client does not want, but that has a number."""

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class Session:
    """A client's session, with a connection or waiting for one; see ``hub``.

    Attributes:
        received: samples that have come in, from the stream's beginning.
        safe: of them, those that the client need never send again.
        unsent, sent: (number, message as JSON) to be sent, and sent but not confirmed.
    """

    def __init__(self, hub: Hub, identifier: str, host: str, rate: int, renderer: Renderer, keep: bool):
        self.hub, self.id, self.host, self.rate, self.renderer, self.keep = hub, identifier, host, rate, renderer, keep
        self.options: dict[str, Any] = {}
        self.stream: Stream | None = None
        self.received = self.safe = self.number = 0
        self.unsent: deque[tuple[int, str]] = deque()
        self.sent: deque[tuple[int, str]] = deque()
        self.unsent_bytes = self.kept_bytes = 0
        self.held_back = -1  # events up to this number are not sent: the client has them
        self.connection: Any = None
        self.finished = self.moving = self.moved = False
        self.error: str | None = None
        self.created = self.detached_at = time.monotonic()
        self.expires_at = int(time.time() + hub.limits.session_s)
        self.changed = asyncio.Event()  # set by every delivery
        self.archived: str | None = None  # file name of its last archive
        self._pace(0)

    def _pace(self, credit_s: float) -> None:
        self._paced_from, self._paced_received = time.monotonic(), self.received
        self._credit_s = credit_s + self.hub.limits.burst_s

    def feed(self, samples: np.ndarray) -> None:
        """Sound, int16 [N]."""
        self.received += len(samples)
        if self.stream is not None and not self.moved:
            self.hub.engine.feed(self.stream, samples)

    def end(self) -> None:
        """No more sound will come."""
        if self.stream is not None:
            self.hub.engine.end(self.stream)

    async def room(self) -> None:
        """Wait until more sound may come in: no faster than allowed, and no more than the model keeps up with."""
        limits = self.hub.limits
        taken_s = (self.received - self._paced_received) / self.rate
        early = taken_s - self._credit_s - limits.speed * (time.monotonic() - self._paced_from)
        if early > 0:
            await asyncio.sleep(early / limits.speed)
        while self.stream is not None and self.stream.waiting > limits.pending_s * self.rate and not self.finished:
            self.changed.clear()
            await self.changed.wait()

    def take(self, delivery: Delivery) -> None:
        """What the engine has for this session."""
        if self.moved:
            return
        for event in delivery.events:
            self.hub.metrics.event(event)
            if self.hub.log_text and isinstance(event, SentenceEnd):
                log.info("%s: %s | %s", self.id, event.source_text, event.text)
            for message in self.renderer.render(event):
                self._append(message)
        if delivery.arrived:
            self.hub.metrics.decision(time.perf_counter() - delivery.arrived, delivery.began - delivery.arrived)
        if delivery.saved is not None:
            self.hub.archive(self, delivery.saved)
            self.moved = self.moving  # what comes behind it is another process's
        if delivery.finished or delivery.error:
            self.finished, self.error, self.stream = True, delivery.error, None
        self.changed.set()
        if self.unsent_bytes > self.hub.limits.unsent_bytes and self.connection is not None:
            self.hub.cut(self, "it does not read what it is sent")
        elif self.kept_bytes > self.hub.limits.kept_bytes:
            self.hub.drop(self, "its client leaves too much unread")
        elif self.connection is not None:
            self.connection.wake()

    def _append(self, message: dict[str, Any] | None) -> None:
        number, self.number = self.number, self.number + 1
        if message is None or number <= self.held_back:
            return
        if self.keep:
            message = {**message, "sequence": number}
        text = json.dumps({"event_id": f"event_{number}", **message} if "type" in message else message)
        self.unsent.append((number, text))
        self.unsent_bytes += len(text)
        self.kept_bytes += len(text)

    def next_unsent(self) -> str | None:
        """The next message for the client; it counts as sent."""
        if not self.unsent:
            return None
        number, text = self.unsent.popleft()
        self.unsent_bytes -= len(text)
        if self.keep:
            self.sent.append((number, text))
        else:
            self.kept_bytes -= len(text)
        return text

    def confirm(self, number: int) -> None:
        """The client has all events up to this one."""
        while self.sent and self.sent[0][0] <= number:
            self.kept_bytes -= len(self.sent.popleft()[1])

    def resume(self, last_event: int, samples: int) -> None:
        """The client is back, has the events up to ``last_event``, and has sent ``samples`` before."""
        self.held_back = max(self.held_back, last_event)
        waiting = [entry for entry in (*self.sent, *self.unsent) if entry[0] > last_event]
        self.sent.clear()
        self.unsent = deque(waiting)
        self.unsent_bytes = self.kept_bytes = sum(len(text) for _, text in waiting)
        self._pace(max(0.0, (samples - self.received) / self.rate))
