"""A client of ``echostream serve`` that loses nothing: it comes back when the connection breaks, here or elsewhere.

    async with Client("ws://127.0.0.1:8765", rate=16000) as client:
        await client.send(samples)                    # int16 or float32 [N], as it is recorded
        await client.finish()
        async for event in client:                    # from another task, while sound is sent
            if event["type"] == "session.output_transcript.delta":
                print(event["delta"], end="")
            elif event["type"] == "session.output_audio.delta":
                play(sound_of(event), event["sample_rate"])

What it keeps is what the server has not yet made safe: sound since the last archive or, without archives, since the
last progress report. It needs the package websockets (extra ``client``).
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import numpy as np

from echostream.audio.stream import to_pcm
from echostream.constants import SAMPLE_RATE
from echostream.errors import AudioError, ServerError, require

PIECE_S = 0.2  # of sound in a message
ACK_S = 0.5  # between two confirmations
MOST_UNSENT_S = 30.0  # of sound before ``send`` waits
REFUSED = 4000  # a closing code from here on is an HTTP status, where a proxy cannot refuse before the upgrade
UNKNOWN_S = 5.0  # that a session may be unknown, while one process hands it to the next


class Client:
    """One stream of speech to a server, and the events that come back.

    Args:
        url: ``ws://host:port`` or ``wss://...``; or a function that gives the one to use next (of several replicas).
        rate: samples per second of what is sent.
        output_rate: of the speech that comes back.
        token: the server's bearer token.
        transcript: ask for the source text, too.
        give_up_s: seconds of trying to come back.
        options: of the stream: ``policy``, its knobs, ``speech``.

    Raises:
        ServerError: on entering: the server refuses the session; while iterating: it cannot be taken up again.
        MissingExtraError: websockets is not installed.
    """

    def __init__(
        self,
        url: Any,
        rate: int = SAMPLE_RATE,
        output_rate: int = 24_000,
        token: str | None = None,
        transcript: bool = True,
        give_up_s: float = 60.0,
        **options: Any,
    ):
        self.url, self.rate, self.token, self.give_up_s = url, rate, token, give_up_s
        self.session = ""  # its id, which is all that anybody needs to take it up
        self.last_event = -1
        self.reconnects = 0
        self.resumed_s: list[float] = []  # how long each took, from the break to the server's answer
        self._update = {
            "type": "session.update",
            "session": {
                "audio": {"input": {"transcription": {"model": "echostream"} if transcript else None}},
                "echostream": {"input_rate": rate, "output_rate": output_rate, **options},
            },
        }
        self._websockets = require("websockets.asyncio.client", "client")
        self._exceptions = require("websockets.exceptions", "client")
        self._sound: deque[np.ndarray] = deque()  # int16, from sample ``_base`` on
        self._base = self._total = self._sent = 0
        self._ended = self._closed = False
        self._changed = asyncio.Event()  # there is sound to send
        self._drained = asyncio.Event()  # there is room for more
        self._events: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        self._task: asyncio.Task | None = None

    async def __aenter__(self) -> Client:
        connection = await self._connect()
        self._task = asyncio.create_task(self._run(connection))
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def send(self, samples: np.ndarray) -> None:
        """Sound, mono int16 or float32 [N]; waits while the server is behind.

        Raises:
            AudioError: no one-dimensional array of these. ServerError: the stream has been finished.
        """
        if self._ended:
            raise ServerError("send() after finish()")
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype.kind not in "fi" or (samples.dtype.kind == "i" and samples.itemsize != 2):
            raise AudioError(f"sound is {samples.dtype} {list(samples.shape)}; send mono int16 or float32")
        if samples.dtype.kind == "f":
            samples = np.frombuffer(to_pcm(samples), dtype="<i2")
        piece = max(1, round(PIECE_S * self.rate))
        self._sound.extend(samples[i : i + piece] for i in range(0, len(samples), piece))
        self._total += len(samples)
        self._changed.set()
        while self._total - self._sent > MOST_UNSENT_S * self.rate and not self._closed:
            self._drained.clear()
            await self._drained.wait()

    async def finish(self) -> None:
        """No more sound will come; what is left comes out, and iterating ends."""
        self._ended = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """The server's events, each once and in order, until ``session.closed``."""
        while True:
            event = await self._events.get()
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event

    async def break_connection(self) -> None:
        """For tests: as if the network were gone."""
        self._connection.transport.abort()

    async def _connect(self) -> Any:
        query: dict[str, Any] = {"echostream": 1}
        if self.session:
            query.update(session=self.session, samples=self._total, last_event=self.last_event)
        url = self.url() if callable(self.url) else self.url
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            connection = await self._websockets.connect(
                f"{url.rstrip('/')}/v1/realtime/translations?{urlencode(query)}",
                additional_headers=headers, max_size=None, compression=None, ping_interval=None,
            )  # fmt: skip
        except self._exceptions.InvalidStatus as error:
            raise ServerError(_refusal(error.response), error.response.status_code) from None
        except (TimeoutError, OSError, self._exceptions.WebSocketException) as error:
            raise ServerError(f"no connection to {url}: {error or type(error).__name__}") from None
        self._connection = connection
        try:
            created = json.loads(await connection.recv())
        except self._exceptions.ConnectionClosed as closed:
            code = closed.rcvd.code - REFUSED if closed.rcvd is not None else 0
            status = code if 400 <= code < 600 else None
            raise ServerError(closed.rcvd.reason if status else "the connection was closed", status) from None
        described = created.get("session", {})
        if created.get("type") != "session.created" or "echostream" not in described:
            await connection.close()
            raise ServerError(f"{url} is no echostream server")
        if not self.session:
            await connection.send(json.dumps(self._update))
            answer = json.loads(await connection.recv())
            if answer.get("type") == "error":
                await connection.close()
                raise ServerError(answer["error"]["message"], 400)
            self.session = described["id"]
        else:
            self._sent = int(described["echostream"]["received_samples"])
        if not self._base <= self._sent <= self._total:
            raise ServerError(f"the server has {self._sent} samples, of which {self._base} to {self._total} are kept")
        return connection

    async def _run(self, connection: Any) -> None:
        """Until the session is closed: send, receive, and connect again."""
        try:
            while not self._closed:
                sender = asyncio.create_task(self._send(connection))
                try:
                    await self._receive(connection)
                finally:
                    sender.cancel()
                    with suppress(asyncio.CancelledError, OSError, self._exceptions.WebSocketException):
                        await sender
                    with suppress(OSError, self._exceptions.WebSocketException):
                        await connection.close()
                if not self._closed:
                    connection = await self._reconnect()
        except ServerError as error:
            self._events.put_nowait(error)
        finally:
            self._closed = True
            self._drained.set()
            self._events.put_nowait(None)

    async def _reconnect(self) -> Any:
        began, wait_s = time.monotonic(), 0.05
        while True:
            try:
                connection = await self._connect()
                self.reconnects += 1
                self.resumed_s.append(time.monotonic() - began)
                return connection
            except (ServerError, OSError, self._exceptions.WebSocketException) as error:
                status, gone_s = getattr(error, "status", None), time.monotonic() - began
                passing = status in (None, 429, 502, 503) or (status == 404 and gone_s < UNKNOWN_S)
                if not passing or gone_s > self.give_up_s:
                    raise ServerError(f"the session cannot be taken up again: {error}", status) from None
            await asyncio.sleep(wait_s)
            wait_s = min(1.0, wait_s * 1.6)

    async def _send(self, connection: Any) -> None:
        while True:
            self._changed.clear()
            while self._sent < self._total:
                part = self._part(self._sent)
                coded = base64.b64encode(part.tobytes()).decode("ascii")
                await connection.send(json.dumps({"type": "session.input_audio_buffer.append", "audio": coded}))
                self._sent += len(part)
                self._drained.set()
            if self._ended:
                await connection.send('{"type": "session.close"}')
                return
            await self._changed.wait()

    def _part(self, begin: int) -> np.ndarray:
        """Kept sound from sample ``begin`` on, a message's worth."""
        at = self._base
        for samples in self._sound:
            if begin < at + len(samples):
                return samples[begin - at :]
            at += len(samples)
        raise AssertionError("sound that is to be sent is kept")

    async def _receive(self, connection: Any) -> None:
        confirmed = 0.0
        try:
            async for text in connection:
                event = json.loads(text)
                number = event.get("sequence")
                if number is not None:
                    if number <= self.last_event:
                        continue
                    self.last_event = number
                kind = event.get("type")
                if kind == "echostream.progress":
                    self._forget(int(event["safe_samples"]))
                    continue
                self._events.put_nowait(event)
                if kind == "session.closed":
                    self._closed = True
                if self._closed or time.monotonic() - confirmed > ACK_S:
                    confirmed = time.monotonic()
                    await connection.send(json.dumps({"type": "echostream.ack", "sequence": self.last_event}))
                if self._closed:
                    return
        except (OSError, self._exceptions.WebSocketException):
            return

    def _forget(self, safe: int) -> None:
        """Sound before sample ``safe`` will never be asked for again."""
        while self._sound and self._base + len(self._sound[0]) <= min(safe, self._sent):
            self._base += len(self._sound.popleft())


def sound_of(event: dict[str, Any]) -> np.ndarray:
    """The sound of ``session.output_audio.delta``, float32 [N]."""
    return np.frombuffer(base64.b64decode(event["delta"]), dtype="<i2").astype(np.float32) / 32768


@dataclass
class Translation:
    """What came back for a whole recording.

    Attributes:
        text, source_text: all deltas joined.
        samples: float32 [N], the speech, at ``sample_rate``.
        events: all events; each has ``received_s`` (``time.monotonic``).
    """

    text: str = ""
    source_text: str = ""
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    sample_rate: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> None:
        """One more event."""
        self.events.append({**event, "received_s": time.monotonic()})
        kind = event["type"]
        if kind == "session.output_transcript.delta":
            self.text += event["delta"]
        elif kind == "session.input_transcript.delta":
            self.source_text += event["delta"]
        elif kind == "session.output_audio.delta":
            self.samples, self.sample_rate = np.concatenate([self.samples, sound_of(event)]), event["sample_rate"]


async def translate(client: Client, samples: np.ndarray, speed: float | None = None) -> Translation:
    """A whole recording through a client that has been entered.

    Args:
        samples: int16 or float32 [N] at the client's rate.
        speed: times real time; None: as fast as the server takes it.

    Raises:
        ServerError: as ``Client``.
    """
    found = Translation()

    async def listen() -> None:
        async for event in client:
            found.take(event)

    listener = asyncio.create_task(listen())
    try:
        piece, began = round(client.rate * PIECE_S), time.monotonic()
        for i in range(0, len(samples), piece):
            if speed is not None:
                await asyncio.sleep(max(0.0, began + (i + piece) / client.rate / speed - time.monotonic()))
            if listener.done():
                break
            await client.send(samples[i : i + piece])
        await client.finish()
        await listener
    finally:
        listener.cancel()
    return found


def _refusal(response: Any) -> str:
    try:
        return json.loads(response.body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answers {response.status_code}"
