"""Subtitles in SubRip (``.srt``) or WebVTT (``.vtt``), timed by the source: text stands while its source is spoken."""

from __future__ import annotations

import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from echostream.errors import EchoStreamError, OutputError
from echostream.files import failure, growing, write_all
from echostream.streaming.events import Event, SentenceEnd

LINE_LETTERS, LINES = 42, 2  # of one subtitle, as broadcasters have it
LEAD_S = 0.4  # CTC tokens come about this much after the sound began
SHORTEST_S = 1.0
LINGER_S = 1.0  # a subtitle may stay this long after its source if nothing follows


@dataclass(frozen=True)
class Cue:
    """One subtitle: seconds from the source's start, and at most ``LINES`` lines of text."""

    start: float
    end: float
    text: str


def cues(end: SentenceEnd, not_before: float) -> list[Cue]:
    """A sentence's translation as subtitles that follow each other without overlap.

    A long sentence is cut into several, each with a share of the time by its number of letters.

    Args:
        not_before: when the subtitle before ended.
    """
    lines = textwrap.wrap(end.text.strip(), LINE_LETTERS)
    if not lines:
        return []
    texts = ["\n".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
    start = max(not_before, end.first_heard_s - LEAD_S, 0.0)
    stop = max(end.last_heard_s, start + SHORTEST_S * len(texts))
    letters = [len(text) for text in texts]
    found, used = [], 0
    for text, count in zip(texts, letters):
        begin = start + (stop - start) * used / sum(letters)
        used += count
        found.append(Cue(begin, start + (stop - start) * used / sum(letters), text))
    return found


class SubtitleFile:
    """Writes subtitles sentence by sentence; the last one waits for the next, to know how long it may stay.

    Raises:
        EchoStreamError: the suffix is neither ``.srt`` nor ``.vtt``.
        OutputError: here and later, when the file cannot be written (any further).
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.kind = path.suffix.lower()
        if self.kind not in (".srt", ".vtt"):
            raise EchoStreamError(f"subtitles {path} must end in .srt or .vtt")
        self.path = path
        self.file = growing(path)
        self.size = 0  # bytes written
        self.broken = False
        self.count = 0
        self.waiting: Cue | None = None
        if self.kind == ".vtt":
            self._write("WEBVTT\n\n")

    def take(self, event: Event) -> None:
        if not isinstance(event, SentenceEnd):
            return
        for cue in cues(event, self.waiting.end if self.waiting else 0.0):
            self._flush(cue.start)
            self.waiting = cue

    def _flush(self, next_start: float) -> None:
        cue, self.waiting = self.waiting, None
        if cue is None:
            return
        self.count += 1
        end = max(cue.end, min(cue.end + LINGER_S, next_start))
        times = f"{stamp(cue.start, self.kind)} --> {stamp(end, self.kind)}"
        text = cue.text
        if self.kind == ".vtt":  # where these three mean something else
            text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        self._write(f"{self.count}\n{times}\n{text}\n\n")

    def _write(self, text: str) -> None:
        if self.broken:
            return
        data = text.encode("utf-8", "replace")
        try:
            write_all(self.file, data)
            self.size += len(data)
        except OSError as error:
            self.broken = True
            with suppress(OSError):
                self.file.truncate(self.size)  # whole subtitles only
            raise OutputError(failure(f"subtitles {self.path}", error)) from None

    def close(self) -> None:
        try:
            self._flush(float("inf"))
        finally:
            self.file.close()


def stamp(seconds: float, kind: str) -> str:
    """``01:02:03,456`` for ``.srt``, ``01:02:03.456`` for ``.vtt``."""
    ms = round(1000 * seconds)
    mark = "," if kind == ".srt" else "."
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"
