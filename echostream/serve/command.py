"""``echostream serve``: the command line around ``app.Server``, on uvicorn."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from echostream.errors import AudioWarning, ConfigError, EchoStreamError, MissingExtraError, require
from echostream.memory import return_freed_memory
from echostream.serve.limits import Limits
from echostream.streaming.options import SEGMENTER_OPTIONS, add_policy_arguments, add_segmenter_arguments, given_options

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

DESCRIPTION = """Serve many live streams: a page with a microphone, and WebSockets that unmodified clients speak to.

  http://HOST:PORT/                            the page
  ws://HOST:PORT/v1/realtime/translations      OpenAI's realtime translation dialect
  ws://HOST:PORT/ or /simulstream              the protocol of the package simulstream
  http://HOST:PORT/healthz, /readyz, /metrics  for whoever runs it

A server that is full answers 503 before the WebSocket begins. SIGTERM (Ctrl-C) lets running sessions end, or archives
them for the next process where --state-dir is given; a second one stops at once.
"""
_LIMITS = {
    "sessions": (int, "N", "streams at once"),
    "client_sessions": (int, "N", "of them, by one address (0: all)"),
    "message_bytes": (int, "N", "of one message"),
    "idle_s": (float, "S", "without a message, after which a client is gone"),
    "speed": (float, "X", "times real time that sound is taken in at; faster clients are held back"),
    "resume_s": (float, "S", "that a stream waits for its client to come back"),
    "drain_s": (float, "S", "that running sessions get to end after SIGTERM"),
}
_FLAGS = {"idle_s": "idle-seconds", "resume_s": "resume-seconds", "drain_s": "drain-seconds"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``echostream serve``."""
    from echostream.checkpoint import BACKENDS

    net = parser.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    net.add_argument("--port", type=int, default=8765, metavar="N", help="0: any that is free (default: 8765)")
    net.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate chain: HTTPS, which microphones need")
    net.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    net.add_argument("--token", metavar="TEXT", help="ask clients for this bearer token (better: set ECHOSTREAM_TOKEN)")
    net.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="pages of this host may connect, too; *: all"
    )
    limits = parser.add_argument_group("limits")
    for name, (kind, metavar, text) in _LIMITS.items():
        flag = _FLAGS.get(name, name.replace("_", "-"))
        default = getattr(Limits, name)
        limits.add_argument(
            f"--{flag}", dest=name, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default:g})"
        )
    state = parser.add_argument_group("what is kept")
    state.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="archive streams here, so that they survive this process; replicas may share it",
    )
    state.add_argument("--log-text", action="store_true", help="write what was said to the log")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR", help="default: the model shipped with EchoStream, exported once"
    )
    model.add_argument("--backend", choices=BACKENDS, help="refuse a model of the other kind; torch: do not export")
    model.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu; exported: cpu only)")
    model.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    model.add_argument("--no-speech", action="store_true", help="text only, which takes half the time")
    add_policy_arguments(parser.add_argument_group("when to write", "Knobs belong to the policy named before them."))
    add_segmenter_arguments(parser.add_argument_group("where sentences end"))


def serve(args: argparse.Namespace) -> int:
    """Run the server until it is asked to stop.

    Raises:
        EchoStreamError: something cannot be loaded, or the address cannot be listened on.
    """
    for module in ("starlette", "uvicorn", "websockets", "prometheus_client"):
        require(module, "server")
    from echostream.checkpoint import load_bundle, use_threads
    from echostream.serve.app import Access, Server

    if args.threads < 1:
        raise ConfigError(f"--threads is {args.threads}; it must be at least 1")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together")
    for path in (args.tls_cert, args.tls_key):
        if path is not None and not path.is_file():
            raise ConfigError(f"{path} does not exist")
    limits = Limits(**{name: getattr(args, name) for name in _LIMITS})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    for name in ("uvicorn.error", "uvicorn.access", "websockets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.simplefilter("ignore", AudioWarning)  # of clients' microphones; the page tells them
    listener = listen(args.host, args.port)
    try:
        return_freed_memory()
        bundle = load_bundle(model_directory(args), args.device, args.backend, args.threads)
        use_threads(bundle, args.threads)
        access = Access(args.token or os.environ.get("ECHOSTREAM_TOKEN") or None, frozenset(args.allow_origin))
        server = Server(
            bundle, limits, access, given_of(args), args.state_dir, args.log_text,
            spell=lambda name: f"--{name.replace('_', '-')}",
        )  # fmt: skip
        tls = {} if args.tls_cert is None else {"ssl_certfile": args.tls_cert, "ssl_keyfile": args.tls_key}
        scheme = "https" if tls else "http"
        host, port = listener.getsockname()[:2]
        address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/"
        note = "" if tls or host in ("127.0.0.1", "::1") else " (browsers give a microphone to HTTPS only: --tls-cert)"
        run(server, listener, lambda: print(f"serving {describe(bundle, limits)} on {address}{note}", flush=True), tls)
    finally:
        listener.close()
    return 0


def given_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of how to translate, by names."""
    given = given_options(args)
    given.update({name: getattr(args, name) for name in SEGMENTER_OPTIONS if getattr(args, name) is not None})
    if args.chunk_ms is not None:
        given["chunk_ms"] = args.chunk_ms
    if args.no_speech:
        given["speech"] = False
    return given


def describe(bundle: Bundle, limits: Limits) -> str:
    """``es-en, 8 streams``."""
    return f"{bundle.source_lang}-{bundle.target_lang}, {limits.sessions} streams"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything heavy is loaded.

    Raises:
        ConfigError: the address is taken, or none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {reason}") from None
    return made


def model_directory(args: argparse.Namespace) -> Path:
    """The directory asked for, or the shipped model: exported, if need be at its first use where that is possible.

    Raises:
        CheckpointError: there is no such directory.
    """
    from echostream.checkpoint.layout import checkpoint_directory

    directory = checkpoint_directory(args.checkpoint_dir)
    if args.checkpoint_dir is not None or args.backend == "torch" or args.device != "cpu":
        return directory
    from echostream.checkpoint.layout import EXPORTED_CONFIG, EXPORTED_FORMAT, read_config

    if (directory / EXPORTED_CONFIG).is_file():  # the shipped model has graphs of its own
        return directory
    digest = (read_config(directory).get("digests") or {}).get("model.pt", "")[:12]
    name = f"es-en-{digest}-{EXPORTED_FORMAT.rpartition('/')[2]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "echostream" / name
    if not (cache / EXPORTED_CONFIG).is_file():
        try:
            from echostream.export.directory import export_directory

            print(f"exporting the shipped model to {cache}, once", file=sys.stderr, flush=True)
            cache.parent.mkdir(parents=True, exist_ok=True)
            export_directory(directory, cache)
        except (MissingExtraError, ModuleNotFoundError, OSError, EchoStreamError) as error:
            print(f"serving with torch, which is slower: {error}", file=sys.stderr, flush=True)
            return directory
    return cache


def run(server: Any, listener: socket.socket, started: Callable[[], None], tls: dict[str, Any] | None = None) -> None:
    """Serve on a listening socket until SIGTERM or Ctrl-C."""
    made = make_uvicorn(server, started, tls)
    asyncio.run(made.serve([listener]))


def make_uvicorn(server: Any, started: Callable[[], None] = lambda: None, tls: dict[str, Any] | None = None) -> Any:
    """A uvicorn server for ``app.Server``: flow control, connections that can be cut, and a drain before the end."""
    import uvicorn
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    class Protocol(WebSocketsSansIOProtocol):
        """ASGI cannot end a connection whose client does not read; the transport can."""

        async def run_asgi(self) -> None:
            self.scope["state"]["abort"] = self.transport.abort
            await super().run_asgi()

    class Uvicorn(uvicorn.Server):
        """Asked to stop, it drains first; asked again, it stops."""

        draining = False

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self.loop = asyncio.get_running_loop()
            if self.started:
                started()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.draining:
                self.should_exit = self.force_exit = True
                return
            self.draining = True
            self.loop.call_soon_threadsafe(self.drain)

        def drain(self) -> None:
            async def work() -> None:
                try:
                    await server.drain()
                finally:
                    self.should_exit = True

            self.drained = asyncio.ensure_future(work())

    config = uvicorn.Config(
        server.app,
        ws=Protocol,
        ws_max_size=server.limits.message_bytes,
        # A client that is held back does not see pings until it is let go; ``idle_s`` finds the dead ones.
        ws_ping_interval=20.0,
        ws_ping_timeout=None,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=5,
        access_log=False,
        log_config=None,
        server_header=False,
        lifespan="on",
        **(tls or {}),
    )
    return Uvicorn(config)
