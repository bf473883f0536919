"""A server in a thread of the test's process, on a port of this machine that the system chooses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from echostream.serve.app import Server
from echostream.serve.command import listen, make_uvicorn


class LiveServer:
    """Attributes: ``port``, ``server`` (``app.Server``), ``uvicorn``. ``tls``: uvicorn's options for HTTPS."""

    def __init__(self, server: Server, tls: dict[str, Any] | None = None):
        self.server = server
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.started = threading.Event()
        self.uvicorn = make_uvicorn(server, self.started.set, tls)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.uvicorn.serve([self.listener])), daemon=True)
        self.thread.start()
        assert self.started.wait(20)

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def terminate(self) -> None:
        """As SIGTERM does; returns when the server has ended."""
        self.uvicorn.handle_exit(15, None)
        self.thread.join(20)
        assert not self.thread.is_alive()

    def stop(self) -> None:
        self.uvicorn.force_exit = self.uvicorn.should_exit = True
        self.thread.join(20)
        self.listener.close()


@contextmanager
def serving(bundle: Any, *args: Any, tls: dict[str, Any] | None = None, **options: Any) -> Iterator[LiveServer]:
    live = LiveServer(Server(bundle, *args, **options), tls)
    try:
        yield live
    finally:
        live.stop()
