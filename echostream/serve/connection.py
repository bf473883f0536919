"""One WebSocket and the session it is for: both directions, and how either ends. What is said is the protocol's."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from echostream.serve.hub import Hub
from echostream.serve.session import Session

log = logging.getLogger("echostream.serve")
GOING_AWAY, POLICY, INTERNAL, RESTART = 1001, 1008, 1011, 1012  # codes of RFC 6455 and its registry


class Invalid(Exception):
    """A message of a client that cannot be taken; the session goes on.

    Args:
        message: for the person reading it.
        code: for programs.
        param: path of the field that is wrong.
        event_id: the client's name for the message, if it has one.
    """

    def __init__(self, message: str, code: str, param: str | None = None, event_id: str | None = None):
        super().__init__(message)
        self.message, self.code, self.param, self.event_id = message, code, param, event_id


class Connection:
    """Base of the protocols' connections.

    Attributes:
        sending_since: when the message began that the client has not read yet (``time.monotonic``); 0: there is none.
        left: the client has closed on purpose (1000) and will not come back.
    """

    def __init__(self, websocket: WebSocket, hub: Hub, session: Session):
        self.websocket, self.hub, self.session = websocket, hub, session
        self.sending_since = 0.0
        self.aborted = self.left = False
        self._controls: deque[dict[str, Any]] = deque()
        self._wake = asyncio.Event()
        self._code: int | None = None  # to close with, when all is sent
        self._told_end = False
        self._task = asyncio.current_task()
        self._garbage = 0

    # The protocol's part.

    async def take(self, message: Mapping[str, Any]) -> None:
        """A message of the client, ``text`` or ``bytes``.

        Raises:
            Invalid: it cannot be taken.
        """
        raise NotImplementedError

    def error(self, problem: Invalid) -> None:
        """Tell the client."""
        raise NotImplementedError

    def ended(self) -> None:
        """All of the session's messages are sent: say so, and close if the connection is to end with it."""
        raise NotImplementedError

    def progress(self) -> None:
        """More of the client's sound is safe, if it cares."""

    # What the hub asks of a connection.

    def wake(self) -> None:
        """There is something to be sent."""
        self._wake.set()

    def abort(self) -> None:
        """End it at once, unread messages and all."""
        self.aborted = True
        abort = self.websocket.scope.get("state", {}).get("abort")  # see ``command.Protocol``
        if abort is not None:
            abort()
        if self._task is not None:
            self._task.cancel()

    def move(self) -> None:
        """Another process will go on with the session: close, so that the client comes back."""
        self._told_end = True
        self.close(RESTART)

    # Both directions.

    def control(self, message: dict[str, Any]) -> None:
        """Send a message that has no number, before all that have one."""
        self._controls.append(message)
        self._wake.set()

    def close(self, code: int) -> None:
        """Close when all is sent."""
        self._code = code
        self._wake.set()

    async def run(self) -> None:
        """Until either side closes, or ``abort``."""
        try:
            await self._run()
        except asyncio.CancelledError:
            if not self.aborted:
                raise

    async def _run(self) -> None:
        sender, reader = asyncio.create_task(self._send()), asyncio.create_task(self._read())
        try:
            await asyncio.wait({sender, reader}, return_when=asyncio.FIRST_COMPLETED)
            if self._code is not None:
                await asyncio.wait({sender}, timeout=self.hub.limits.unsent_s)
        finally:
            for task in (sender, reader):
                task.cancel()
            for result in await asyncio.gather(sender, reader, return_exceptions=True):
                gone = isinstance(result, (asyncio.CancelledError, WebSocketDisconnect, OSError))
                if isinstance(result, BaseException) and not gone and not self.aborted:
                    log.error("%s: %s", self.session.id, result, exc_info=result)
            self.hub.detach(self.session, self)

    async def _send(self) -> None:
        """Whatever waits, controls first; returns when the connection has been closed."""
        while True:
            self._wake.clear()
            while (text := self._next()) is not None:
                self.sending_since = time.monotonic()
                await self.websocket.send_text(text)
                self.sending_since = 0.0
            session = self.session
            if session.finished and not self._told_end:
                self._told_end = True
                if session.error is not None:
                    self.error(Invalid(session.error, "server_error"))
                    self.close(INTERNAL)
                else:
                    self.ended()
            elif self._code is not None:
                await self.websocket.close(self._code)
                return
            else:
                await self._wake.wait()

    def _next(self) -> str | None:
        if self._controls:
            return json.dumps(self._controls.popleft())
        return self.session.next_unsent() if self.session.connection is self else None

    async def _read(self) -> None:
        """Take what the client sends, until it goes or is to go."""
        while True:
            try:
                async with asyncio.timeout(self.hub.limits.idle_s):
                    message = await self.websocket.receive()
            except TimeoutError:
                self.error(Invalid(f"no message for {self.hub.limits.idle_s:g} s", "idle_timeout"))
                self.close(POLICY)
                return
            if message["type"] == "websocket.disconnect":
                self.left = message.get("code") == 1000
                return
            try:
                await self.take(message)
                self._garbage = 0
            except Invalid as problem:
                self.error(problem)
                self._garbage += 1
                if self._garbage >= self.hub.limits.garbage:
                    self.hub.metrics.cut.inc()
                    self.close(POLICY)
                    return


def same_language(asked: Any, ours: str) -> bool:
    """``en-US`` is asked for where ``en`` is spoken."""
    return isinstance(asked, str) and asked.lower().replace("_", "-").split("-")[0] == ours.lower().split("-")[0]
