"""A batch whose streams may differ: in their sample rate, in policy and speech, and that can be archived one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echostream.errors import ConfigError, SessionError
from echostream.loading import shown
from echostream.streaming import archive
from echostream.streaming.batch import SessionBatch
from echostream.streaming.engine import Engine
from echostream.streaming.events import Event
from echostream.streaming.resolve import KNOBS, resolve
from echostream.streaming.session import make_engine
from echostream.streaming.stream import decide

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

STREAM_OPTIONS = ("policy", *KNOBS, "speech")
MOST_ENGINES = 64  # different ways to translate at a time


class Rows(SessionBatch):
    """As ``SessionBatch``; options given to ``join`` (``STREAM_OPTIONS``) are the stream's own.

    Args:
        said: how to translate, by names (see ``resolve``).
        spell: how whoever said it spells an option, for errors.

    Raises:
        ConfigError, CheckpointError, MissingExtraError: as ``resolve``.
    """

    def __init__(
        self, bundle: Bundle, capacity: int, said: Mapping[str, Any] | None = None, spell: Callable[[str], str] = str
    ):
        said = said or {}
        found = resolve(bundle, said, spell)
        super().__init__(bundle, capacity, **found._asdict())
        self._bundle = bundle
        self._base = {name: said[name] for name in ("policy", *KNOBS) if name in said}
        self._shared = {"segmenter": found.segmenter, "settings": found.settings}
        self._engines: dict[tuple, Engine] = {(): self.engine}
        self._engine_of: dict[int, Engine] = {}

    def join(self, options: Mapping[str, Any] | None = None) -> int:
        """A new stream, translated as the batch is, but for ``options``.

        Raises:
            ConfigError: an option is unknown or out of range. SessionError: the batch is full.
        """
        engine = self._engine(options or {})
        number = super().join()
        self._engine_of[number] = engine
        return number

    def leave(self, number: int) -> None:
        super().leave(number)
        del self._engine_of[number]

    def snapshot(self, number: int) -> Callable[[Path], None]:
        """The stream as it is now; the function returned writes it to a file, later and in any thread."""
        with self._turns:
            track = self._track(number)
            engine, kept, arrays = self._engine_of[number], copy.deepcopy(track), self._stages.snapshot(track.row)
        return lambda path: archive.write(path, engine, self._bundle, kept, arrays)

    def restore(self, path: Path, options: Mapping[str, Any] | None = None) -> int:
        """A new stream that goes on where an archived one was.

        Raises:
            SessionError: the file does not fit, or the batch is full.
        """
        number = self.join(options)
        try:
            with self._turns:
                track, arrays = archive.read(path, self._engine_of[number], self._bundle)
                row = self._tracks[number].row
                archive.fit(path, lambda: self._stages.restore(row, arrays))
                track.row, self._tracks[number] = row, track
        except BaseException:
            self.leave(number)
            raise
        return number

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
                used = {id(engine) for engine in self._engine_of.values()} | {id(self.engine)}
                self._engines = {k: e for k, e in self._engines.items() if id(e) in used}
            if len(self._engines) >= MOST_ENGINES:
                raise SessionError(f"{MOST_ENGINES} different policies are in use; take the server's own")
            for name in options:
                if name not in STREAM_OPTIONS:
                    raise ConfigError(f"{shown(name)} is no option of a stream; known: {', '.join(STREAM_OPTIONS)}")
            base = {} if "policy" in options else self._base  # knobs are those of one policy
            engine = make_engine(self._bundle, **{**base, **self._shared, **options})
            if engine.settings.speech and not self.settings.speech:
                raise ConfigError("this server writes text only")
            self._engines[key] = engine
        return self._engines[key]

    def _decide(self, jobs: dict, events: dict[int, list[Event]]) -> None:
        groups: dict[int, list[int]] = {}
        for number in jobs:
            groups.setdefault(id(self._engine_of[number]), []).append(number)
        for numbers in groups.values():
            engine = self._engine_of[numbers[0]]
            for number, found in zip(numbers, decide(engine, self._stages, [jobs[n] for n in numbers])):
                events[number] += found
