"""A batch whose streams may differ: in their sample rate, in policy and speech, and that can be archived one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echostream.errors import ConfigError, SessionError
from echostream.loading import shown
from echostream.streaming.batch import SessionBatch
from echostream.streaming.core import make_engine
from echostream.streaming.engine import Engine
from echostream.streaming.resolve import KNOBS, resolve

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

STREAM_OPTIONS = ("policy", *KNOBS, "speech")
MOST_ENGINES = 64  # different ways to translate at a time


class Rows(SessionBatch):
    """As ``SessionBatch``; options given to ``join`` (``STREAM_OPTIONS``) are the stream's own.

    Args:
        given: how to translate, by names (see ``resolve``).
        spell: how whoever gave it spells an option, for errors.

    Raises:
        ConfigError, CheckpointError, MissingExtraError: as ``resolve``.
    """

    def __init__(
        self, bundle: Bundle, capacity: int, given: Mapping[str, Any] | None = None, spell: Callable[[str], str] = str
    ):
        given = given or {}
        found = resolve(bundle, given, spell)
        super().__init__(bundle, capacity, **found._asdict())
        self._base = {name: given[name] for name in ("policy", *KNOBS) if name in given}
        self._shared = {"segmenter": found.segmenter, "settings": found.settings}
        self._engines: dict[tuple, Engine] = {(): self.engine}

    def join(self, options: Mapping[str, Any] | None = None) -> int:
        """A new stream, translated as the batch is, but for ``options``.

        Raises:
            ConfigError: an option is unknown or out of range. SessionError: the batch is full.
        """
        engine = self._engine(options or {})
        return self._admit(lambda row: self._core.open(row, engine))

    def restore(self, path: str | Path, options: Mapping[str, Any] | None = None) -> int:
        """A new stream that goes on where an archived one was.

        Raises:
            SessionError: the file does not fit, or the batch is full.
        """
        engine = self._engine(options or {})
        return self._admit(lambda row: self._core.restore(path, row, engine))

    def check(self, options: Mapping[str, Any]) -> None:
        """Could a stream be translated so?

        Raises:
            ConfigError: it could not.
        """
        self._engine(options)

    def _engine(self, options: Mapping[str, Any]) -> Engine:
        key = tuple(sorted((name, repr(value)) for name, value in options.items()))
        if key not in self._engines:
            if len(self._engines) >= MOST_ENGINES:
                used = {id(state.engine) for state in self._states.values()} | {id(self.engine)}
                self._engines = {k: e for k, e in self._engines.items() if id(e) in used}
            if len(self._engines) >= MOST_ENGINES:
                raise SessionError(f"{MOST_ENGINES} different policies are in use; take the server's own")
            for name in options:
                if name not in STREAM_OPTIONS:
                    raise ConfigError(f"{shown(name)} is no option of a stream; known: {', '.join(STREAM_OPTIONS)}")
            base = {} if "policy" in options else self._base  # knobs are those of one policy
            engine = make_engine(self._core.bundle, **{**base, **self._shared, **options})
            if engine.settings.speech and not self.settings.speech:
                raise ConfigError("this server writes text only")
            self._engines[key] = engine
        return self._engines[key]
