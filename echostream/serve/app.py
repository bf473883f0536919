"""The ASGI application: who may come in, and where to."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from echostream import __version__
from echostream.serve.engine import Engine
from echostream.serve.hub import Hub
from echostream.serve.limits import Limits
from echostream.serve.metrics import Metrics
from echostream.serve.realtime import RATE, RealtimeConnection, RealtimeRenderer
from echostream.serve.rows import Rows
from echostream.serve.session import Refused
from echostream.serve.simulstream import SimulstreamConnection, open_session
from echostream.streaming.policies.factory import POLICIES
from echostream.streaming.resolve import KNOBS

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

log = logging.getLogger("echostream.serve")
PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"), "/worklet.js": ("worklet.js", "text/javascript"),
}  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' blob: data:; "
    "media-src 'self' blob:; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip
REFUSED = 4000  # a closing code of ours is this and the HTTP status
KEY_PROTOCOL = "openai-insecure-api-key."  # how a browser hands over a token: as a WebSocket subprotocol


@dataclass(frozen=True)
class Access:
    """Who may come in.

    Attributes:
        token: needed for every session and for ``/metrics``; None: nothing is.
        origins: pages of other hosts that may connect (``https://example.org``); ``*``: all.
    """

    token: str | None = None
    origins: frozenset[str] = field(default_factory=frozenset)

    def check(self, connection: HTTPConnection) -> None:
        """Refuse strangers.

        Raises:
            Refused: the page is of another host (403), or the token is missing or wrong (401).
        """
        origin = connection.headers.get("origin")
        if origin is not None and "*" not in self.origins and origin not in self.origins:
            if urlsplit(origin).netloc != connection.headers.get("host"):
                raise Refused(403, "pages of this host may not connect")
        if self.token is not None and not hmac.compare_digest(_token(connection).encode(), self.token.encode()):
            raise Refused(401, "a token is needed: Authorization: Bearer ...")


def _token(connection: HTTPConnection) -> str:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith(KEY_PROTOCOL):
            return protocol.removeprefix(KEY_PROTOCOL)
    return ""


class Server:
    """Everything that serves one bundle; ``app`` is the ASGI application.

    Args:
        bundle: a loaded checkpoint.
        given: how to translate, by names (see ``resolve``).
        spell: how whoever gave it spells an option, for errors.
        drain_at_end: drain when the application is shut down, where nobody calls ``drain`` before.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        limits: Limits = Limits(),
        access: Access = Access(),
        given: dict[str, Any] | None = None,
        state_dir: Path | None = None,
        log_text: bool = False,
        spell: Callable[[str], str] = str,
        drain_at_end: bool = False,
    ):
        self.limits, self.access, self.metrics = limits, access, Metrics()
        self.state_dir, self.log_text, self.drain_at_end = state_dir, log_text, drain_at_end
        self.languages = (bundle.source_lang, bundle.target_lang)
        given = dict(given or {})
        if bundle.vocoder is None:
            given["speech"] = False
        self.rows = Rows(bundle, limits.sessions, given, spell)
        settings, policy = self.rows.settings, self.rows.engine.policy
        self.described = {
            "version": __version__, "source_language": self.languages[0], "target_language": self.languages[1],
            "speech": settings.speech, "chunk_ms": settings.chunk_ms,
            "policy": next((name for name, made in POLICIES.items() if type(policy) is made), ""),
            "knobs": {name: value for name, value in vars(policy).items() if name in KNOBS},
            "token": access.token is not None, "rate": RATE, "resume_s": limits.resume_s,
            "message_bytes": limits.message_bytes,
        }  # fmt: skip
        self.hub: Hub | None = None
        self.app = Starlette(
            routes=[
                *(Route(path, self._file) for path in _FILES),
                Route("/config.json", self._config),
                Route("/healthz", self._health),
                Route("/readyz", self._ready),
                Route("/metrics", self._metrics),
                WebSocketRoute("/v1/realtime/translations", self._realtime),
                WebSocketRoute("/simulstream", self._simulstream),
                WebSocketRoute("/", self._simulstream),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        engine = Engine(self.rows, asyncio.get_running_loop(), self.metrics.step)
        self.hub = hub = Hub(engine, self.limits, self.metrics, self.state_dir, self.log_text)
        self.metrics.levels = lambda: {
            "sessions": len(hub.sessions), "places_taken": hub.taken, "places": self.limits.sessions,
            "pending_seconds": sum(s.stream.waiting / s.rate for s in hub.sessions.values() if s.stream is not None),
        }  # fmt: skip
        watch = asyncio.create_task(hub.watch())
        try:
            yield
        finally:
            watch.cancel()
            if self.drain_at_end:
                await hub.drain()
            await hub.close()

    async def drain(self) -> None:
        """See ``Hub.drain``."""
        if self.hub is not None:
            await self.hub.drain()

    # Pages.

    async def _file(self, request: Request) -> Response:
        name, kind = _FILES[request.url.path]
        return Response((PAGE / name).read_bytes(), media_type=kind, headers=_HEADERS)

    async def _config(self, _: Request) -> Response:
        return JSONResponse(self.described, headers=_HEADERS)

    async def _health(self, _: Request) -> Response:
        alive = self.hub is not None and self.hub.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 500)

    async def _ready(self, _: Request) -> Response:
        ready = self.hub is not None and self.hub.engine.alive and not self.hub.draining
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        try:
            self.access.check(request)
        except Refused as refused:
            return _refusal(refused)
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    # Sessions.

    async def _realtime(self, websocket: WebSocket) -> None:
        query = websocket.query_params
        extended = query.get("echostream", "0") not in ("", "0")
        hub, host = self.hub, _host(websocket)
        assert hub is not None
        try:
            self.access.check(websocket)
            if extended and "session" in query:
                session = await hub.resume(
                    host, query["session"], _number(query.get("last_event", "-1")), _number(query.get("samples", "0")),
                    lambda: RealtimeRenderer(True),
                )  # fmt: skip
            else:
                session = await hub.open(host, RATE, RealtimeRenderer(extended), keep=extended)
        except Refused as refused:
            await _refuse(websocket, refused)
            return
        connection = RealtimeConnection(websocket, hub, session, extended, self.languages)
        session.connection = connection
        protocols = websocket.scope.get("subprotocols", ())
        try:
            await websocket.accept("realtime" if "realtime" in protocols else None)
            await connection.run()
        finally:
            hub.detach(session, connection)

    async def _simulstream(self, websocket: WebSocket) -> None:
        hub, host = self.hub, _host(websocket)
        assert hub is not None
        try:
            self.access.check(websocket)
            session = await open_session(hub, host)
        except Refused as refused:
            await _refuse(websocket, refused)
            return
        connection = SimulstreamConnection(websocket, hub, session, self.languages)
        session.connection = connection
        try:
            await websocket.accept()
            await connection.run()
        finally:
            hub.detach(connection.session, connection)


def _host(websocket: WebSocket) -> str:
    return websocket.client.host if websocket.client is not None else ""


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Refused(400, "session, samples and last_event: two of them are whole numbers") from None


async def _refuse(websocket: WebSocket, refused: Refused) -> None:
    """Before the upgrade, where the server can (uvicorn does, Ray Serve does not); else the code tells."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(_refusal(refused))
        return
    await websocket.accept()
    await websocket.close(REFUSED + refused.status, refused.message)


def _refusal(refused: Refused) -> Response:
    headers = {} if refused.retry_s is None else {"Retry-After": str(refused.retry_s)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    error = {"type": "invalid_request_error" if refused.status < 500 else "server_error", "message": refused.message}
    return JSONResponse({"error": error}, refused.status, headers)
