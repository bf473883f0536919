"""Replicas of the server on Ray Serve (extra ``ray``).

    serve run echostream.serve.ray:app state_dir=/shared/streams sessions=16 replicas=4

A connection stays with its replica, which refuses what is over ``sessions``. Replicas come and go with the load
(``replicas=2-8``): one that goes archives its streams in ``state_dir``, which all of them share, and so does one that
is killed, at the last sentence's end; their clients come back to whichever replica Ray chooses, and go on. Without a
state directory, or without our extension of the protocol, a stream ends with its replica.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echostream.errors import ConfigError, require
from echostream.memory import return_freed_memory
from echostream.serve.limits import Limits

DRAIN_S = 30.0


def app(args: dict[str, str]) -> Any:
    """The Serve application for ``key=value`` arguments.

    Args:
        args: ``checkpoint_dir``, ``state_dir``, ``sessions`` (of a replica), ``replicas`` (``4``, or ``2-8`` by load),
            ``cpus`` (of a replica), ``token``, and options of ``echostream.streaming.resolve`` as far as they are text.

    Raises:
        ConfigError: an argument is unknown or no number. MissingExtraError: Ray is not installed.
    """
    serve = require("ray.serve", "ray")
    args = dict(args)
    sessions, cpus = _number(args, "sessions", 8), _number(args, "cpus", 1)
    least, _, most = args.pop("replicas", "1").partition("-")
    directory, state = args.pop("checkpoint_dir", None), args.pop("state_dir", None)
    token = args.pop("token", None)
    given: dict[str, Any] = {name: args.pop(name) for name in ("policy", "segmenter") if name in args}
    if args:
        raise ConfigError(f"unknown argument {next(iter(args))!r}")
    scale: dict[str, Any] = {"num_replicas": int(least)}
    if most:
        scale = {
            "autoscaling_config": {
                "min_replicas": int(least), "max_replicas": int(most),
                "target_ongoing_requests": max(1, sessions * 3 // 4),
            }
        }  # fmt: skip

    def build() -> Any:
        return build_asgi(directory, state, sessions, cpus, token, given)

    @serve.deployment(
        name="EchoStream",
        # Above the sessions, so that it is the replica who says that it is full, and pages are still served.
        max_ongoing_requests=2 * sessions + 16,
        ray_actor_options={"num_cpus": cpus},
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=1.0,
        **scale,
    )
    @serve.ingress(build)
    class EchoStream:  # what the decorators make of it has ``bind``
        pass

    deployment: Any = EchoStream
    return deployment.bind()


def build_asgi(
    directory: str | None, state: str | None, sessions: int, threads: int, token: str | None, given: dict[str, Any]
) -> Any:
    """The ASGI application of one replica; its sessions drain when it is shut down."""
    from echostream.checkpoint import DEFAULT_BUNDLE, load_bundle, use_threads
    from echostream.serve.app import Access, Server

    return_freed_memory()
    bundle = load_bundle(directory or DEFAULT_BUNDLE, threads=threads)
    use_threads(bundle, threads)
    limits = Limits(sessions=sessions, drain_s=DRAIN_S / 2)
    server = Server(bundle, limits, Access(token), given, None if state is None else Path(state), drain_at_end=True)
    return server.app


def _number(args: dict[str, str], name: str, default: int) -> int:
    text = args.pop(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: that is no whole number") from None
