"""Sessions: a stream, what its client has not got yet, and how it is found again when the connection breaks.

All of this lives in the event loop. A session outlives its connection if its client asked to be able to come back:
its events carry numbers and are kept until the client says that it has them. With a state directory the stream is
also archived there, at sentence ends, with the events that the client had not confirmed; any process that shares the
directory can go on from the archive. The same sound gives the same events with the same numbers, so that the client
sends again what it said since then, and those events that it has are held back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from echostream.errors import SessionError
from echostream.serve.engine import Delivery, Engine, Saved, Stream
from echostream.serve.limits import Limits
from echostream.serve.metrics import Metrics
from echostream.serve.records import FORMAT, clean, forget_record, read_record, save_record
from echostream.serve.session import RETRY_S, Refused, Renderer, Session

log = logging.getLogger("echostream.serve")
SAVE_S = 2.0  # of sound between two archives of a stream at least
_ID = re.compile(r"sess_[0-9a-f]{32}\Z")


class Hub:
    """All sessions of a process.

    Args:
        engine: steps the streams.
        state_dir: where streams are archived; replicas share it. None: nothing is.
        log_text: write what was said to the log.
    """

    def __init__(
        self, engine: Engine, limits: Limits, metrics: Metrics, state_dir: Path | None = None, log_text: bool = False
    ):
        self.engine, self.limits, self.metrics, self.state_dir = engine, limits, metrics, state_dir
        self.log_text = log_text
        self.sessions: dict[str, Session] = {}
        self.draining = False
        self.owner = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._rows = 0  # taken, or about to be
        self._writer = ThreadPoolExecutor(1, "echostream-archive")
        self._writes: set[asyncio.Future] = set()
        if state_dir is not None:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._writer.submit(clean, state_dir)

    @property
    def taken(self) -> int:
        """Places of the batch that are taken."""
        return self._rows

    def admit(self, host: str) -> None:
        """Is there room for one more session of this client?

        Raises:
            Refused: no.
        """
        if self.draining:
            raise Refused(503, "the server is being stopped; try again", RETRY_S)
        mine = sum(session.host == host and session.stream is not None for session in self.sessions.values())
        if self.limits.client_sessions and mine >= self.limits.client_sessions:
            raise Refused(429, f"{mine} sessions are open already; close one", RETRY_S)
        if self._rows >= self.limits.sessions:
            self.metrics.refused.inc()
            raise Refused(503, f"all {self.limits.sessions} places are taken; try again", RETRY_S)

    async def open(self, host: str, rate: int, renderer: Renderer, keep: bool, **options: Any) -> Session:
        """A new session, with a place of its own.

        Raises:
            Refused: there is no place. ConfigError: an option of the stream is wrong.
        """
        self.admit(host)
        session = Session(self, f"sess_{secrets.token_hex(16)}", host, rate, renderer, keep)
        await self._start(session, options)
        log.info("%s opened", session.id)
        return session

    async def remember(self, session: Session) -> None:
        """Until its first archive, a session that can come back is a record without a stream: it begins anew."""
        if session.keep and self.state_dir is not None and not session.received:
            await asyncio.wait({self._write(session, self._record(session, 0), None)})

    async def reopen(self, session: Session, rate: int, **options: Any) -> None:
        """The session has heard nothing yet: begin it anew, with other options.

        Raises:
            ConfigError: an option of the stream is wrong; the session is as it was.
        """
        if options != session.options:
            await asyncio.wrap_future(self.engine.call(lambda: self.engine.rows.check(options)))
        old, session.stream = session.stream, None
        if old is not None:
            self._rows -= 1
            self.engine.close(old)
        session.rate = rate
        await self._start(session, options)

    async def _start(self, session: Session, options: Mapping[str, Any], path: Path | None = None) -> None:
        save_s = SAVE_S if session.keep and self.state_dir is not None else None
        session.options = dict(options)
        stream = Stream(session.take, session.rate, options, save_s)
        self._rows += 1
        try:
            await asyncio.wrap_future(self.engine.open(stream, path))
        except BaseException:
            self._rows -= 1
            raise
        session.stream = stream
        self.sessions[session.id] = session
        take = session.take

        def taken(delivery: Delivery) -> None:
            if delivery.finished or delivery.error:
                self._rows -= 1
            take(delivery)

        stream.take = taken

    async def resume(
        self, host: str, identifier: str, last_event: int, samples: int, renderer: Callable[[], Renderer]
    ) -> Session:
        """The session of a client that has come back, from memory or from an archive.

        Raises:
            Refused: it is unknown here, or there is no place.
        """
        session = self.sessions.get(identifier)
        if session is None:
            session = await self._revive(host, identifier, renderer)
        if session.connection is not None:
            session.connection.abort()  # it is dead, whether it knows or not
            session.connection = None
        session.resume(last_event, samples)
        log.info("%s resumed", session.id)
        return session

    async def _revive(self, host: str, identifier: str, renderer: Callable[[], Renderer]) -> Session:
        unknown = Refused(404, "there is no such session")
        if self.state_dir is None or not _ID.match(identifier):
            raise unknown
        self.admit(host)
        loop = asyncio.get_running_loop()
        try:
            record = await loop.run_in_executor(self._writer, read_record, self.state_dir / f"{identifier}.json")
            if identifier in self.sessions:  # meanwhile, by another connection
                return self.sessions[identifier]
            self.admit(host)
            session = Session(self, identifier, host, int(record["rate"]), renderer(), keep=True)
            session.renderer.load(record["renderer"])
            session.received = session.safe = int(record["samples"])
            session.number = int(record["number"])
            session.unsent.extend((int(number), str(text)) for number, text in record["events"])
            name = record["file"]
            path = None if name is None else self.state_dir / Path(name).name
            await self._start(session, record["options"], path)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:  # errors of ours are ValueErrors
            log.warning("%s cannot be resumed: %s", identifier, error)
            raise unknown from None
        assert session.stream is not None
        session.stream.pushed = session.stream.saved_at = session.received
        session.archived = name
        self._write(session, {**record, "owner": self.owner}, None)  # it is ours now
        return session

    def detach(self, session: Session, connection: Any) -> None:
        """A connection is gone."""
        if session.connection is not connection:
            return
        session.connection, session.detached_at = None, time.monotonic()
        if not session.keep or connection.left:
            self.drop(session, "its client has left")

    def cut(self, session: Session, why: str) -> None:
        """End a connection at once, whatever the client has not read."""
        connection = session.connection
        log.warning("%s: connection cut: %s", session.id, why)
        self.metrics.cut.inc()
        if connection is not None:
            connection.abort()
            self.detach(session, connection)

    def drop(self, session: Session, why: str, forget: bool = True) -> None:
        """Forget a session, and with ``forget`` its archive."""
        if self.sessions.pop(session.id, None) is None:
            return
        if session.stream is not None:
            self._rows -= 1
            self.engine.close(session.stream)
            session.stream = None
        if session.connection is not None:
            session.connection.abort()
            session.connection = None
        session.finished = True
        session.changed.set()
        if forget and session.keep and self.state_dir is not None:
            self._later(forget_record, self.state_dir, session.id, self.owner)
        log.info("%s ended after %.1f s of sound: %s", session.id, session.received / session.rate, why)

    def _record(self, session: Session, samples: int) -> dict[str, Any]:
        return {
            "format": FORMAT, "owner": self.owner, "samples": samples, "rate": session.rate, "options": session.options,
            "number": session.number, "renderer": session.renderer.state(),
            "events": [list(entry) for entry in (*session.sent, *session.unsent)], "file": None,
        }  # fmt: skip

    def archive(self, session: Session, saved: Saved) -> None:
        """Write a session as it is now; what was delivered last belongs to it, and nothing later."""
        self._write(session, self._record(session, saved.samples), saved)

    def _write(self, session: Session, record: dict[str, Any], saved: Saved | None) -> asyncio.Future:
        assert self.state_dir is not None
        if saved is not None:
            record["file"] = f"{session.id}.{saved.samples}.npz"

        def done(future: asyncio.Future) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if isinstance(error, SessionError):  # another process has taken it over
                self.drop(session, str(error), forget=False)
            elif error is not None:
                log.error("%s cannot be archived: %s", session.id, error)
            elif saved is not None:
                session.safe = max(session.safe, saved.samples)
                if session.connection is not None:
                    session.connection.progress()

        future = self._later(save_record, self.state_dir, session.id, record, saved)
        future.add_done_callback(done)
        return future

    def _later(self, work: Callable[..., Any], *args: Any) -> asyncio.Future:
        future = asyncio.get_running_loop().run_in_executor(self._writer, work, *args)
        self._writes.add(future)
        future.add_done_callback(self._writes.discard)
        return future

    async def watch(self) -> None:
        """Once a second: who does not read, who does not come back, whose time is over."""
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            for session in list(self.sessions.values()):
                connection = session.connection
                if connection is None:
                    if now - session.detached_at > self.limits.resume_s:
                        self.drop(session, "its client has not come back")
                elif connection.sending_since and now - connection.sending_since > self.limits.unsent_s:
                    self.cut(session, "it does not read what it is sent")
                elif now - session.created > self.limits.session_s + 30:
                    self.drop(session, "its time is over")
                elif now - session.created > self.limits.session_s:
                    session.end()

    async def drain(self) -> None:
        """No new sessions; those that can move are archived and sent away, the others get their time to end."""
        self.draining = True
        movable = [s for s in self.sessions.values() if s.keep and self.state_dir is not None and s.stream is not None]
        for session in movable:
            session.moving = True
            self.engine.save(session.stream)  # type: ignore[arg-type]
        deadline = time.monotonic() + self.limits.drain_s
        while any(s.stream is not None and not s.moved for s in movable) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if self._writes:
            await asyncio.wait(self._writes, timeout=max(0.1, deadline - time.monotonic()))
        for session in movable:
            if session.connection is not None:
                session.connection.move()
                session.connection = None
            self.drop(session, "it can be resumed in another process", forget=False)
        while self.sessions and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for session in list(self.sessions.values()):
            session.end()
        deadline = time.monotonic() + 5
        while any(s.connection is not None for s in self.sessions.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for session in list(self.sessions.values()):
            self.drop(session, "the server is stopped")

    async def close(self) -> None:
        for session in list(self.sessions.values()):
            self.drop(session, "the server is stopped", forget=False)
        await asyncio.get_running_loop().run_in_executor(None, self.engine.stop)
        self._writer.shutdown()
