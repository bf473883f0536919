"""Threads that share a session take turns: one call at a time, and none inside another."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from echostream.errors import SessionError

Method = TypeVar("Method", bound=Callable[..., Any])


class Turns:
    """A lock that knows who holds it.

    Raises:
        SessionError: on entering, if this thread is inside already (a signal handler, a callback).
    """

    def __init__(self) -> None:
        self._lock, self._holder = threading.Lock(), 0

    def __enter__(self) -> None:
        if self._holder == threading.get_ident():
            raise SessionError("the session is in the middle of another call of the same thread; wait until it returns")
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._holder = 0
        self._lock.release()


def in_turn(method: Method) -> Method:
    """For methods of objects that have ``_turns``."""

    @functools.wraps(method)
    def taken(self: Any, *args: Any, **options: Any) -> Any:
        with self._turns:
            return method(self, *args, **options)

    return taken  # type: ignore[return-value]
