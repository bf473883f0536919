"""Live text on a terminal: finished sentences scroll up, the one in the making stands below them and grows."""

from __future__ import annotations

import os
import shutil
from typing import TextIO

from echostream.streaming.events import Event, SentenceEnd, SourceText, TargetText

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class LiveText:
    """Shows source and translation.

    On a terminal the sentence in the making is redrawn in place; elsewhere (a log file) only finished ones are written.

    Args:
        stream: where to (standard error: standard output may carry speech). When it is closed, nothing is shown.
        source_lang, target_lang: language codes that stand before the lines.
        seconds: length of the source, for the clock; None if not known.
        live: redraw? Default: if ``stream`` is a terminal.
        width: columns. Default: the terminal's.
    """

    def __init__(
        self,
        stream: TextIO | None,
        source_lang: str,
        target_lang: str,
        seconds: float | None = None,
        live: bool | None = None,
        width: int | None = None,
    ):
        self.stream, self.width, self.seconds = stream, width, seconds
        self.names = (source_lang or "src", target_lang or "tgt")
        if live is None:
            live = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
        self.live = live
        self.colour = self.live and "NO_COLOR" not in os.environ
        self.source = self.target = ""
        self.now = 0.0
        self.drawn = 0  # lines of the sentence in the making that are on the screen

    def take(self, event: Event) -> None:
        self.now = event.source_time_s
        if isinstance(event, SourceText):
            self.source = event.text
        elif isinstance(event, TargetText):
            self.target = event.sentence_text
        elif isinstance(event, SentenceEnd):
            self._erase()
            if event.source_text or event.text:
                self._write(f"{clock(event.first_heard_s):>8}", event.source_text, event.text, cut=False)
                self._put("\n")
            self.source = self.target = ""
            self._flush()

    def show(self, now: float) -> None:
        """Redraw the sentence in the making; ``now`` is the audio clock in seconds."""
        if not self.live:
            return
        self._erase()
        total = f"/{clock(self.seconds)}" if self.seconds else ""
        self._write(f"{clock(now)}{total}".rjust(8), self.source, self.target, cut=True)
        self.drawn = 2
        self._flush()

    def message(self, text: str) -> None:
        """A line of its own, above the sentence in the making."""
        self._erase()
        self._put(text + "\n")
        self._flush()

    def close(self) -> None:
        self._erase()
        self._flush()

    def _put(self, text: str) -> None:
        try:
            if self.stream is not None:
                self.stream.write(text)
        except (OSError, ValueError):  # nobody looks any more: the translation and its files go on
            self.stream = None

    def _flush(self) -> None:
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError):
            self.stream = None

    def _erase(self) -> None:
        if self.drawn:
            self._put("\r" + "\x1b[1A" * (self.drawn - 1) + "\x1b[J")
            self.drawn = 0

    def _write(self, time: str, source: str, target: str, cut: bool) -> None:
        """Two lines, the second without an end of line."""
        width = self.width or shutil.get_terminal_size().columns
        label = max(map(len, self.names))
        room = max(10, width - len(time) - label - 5) if cut else None
        dim, plain = (DIM, PLAIN) if self.colour else ("", "")
        self._put(f"{dim}{time}  {self.names[0]:<{label}}  {tail(source, room)}{plain}\n")
        self._put(f"{'':{len(time)}}  {self.names[1]:<{label}}  {tail(target, room)}")


def tail(text: str, room: int | None) -> str:
    """The end of ``text`` that fits, ``…`` for what does not."""
    return text if room is None or len(text) <= room else "…" + text[len(text) - room + 1 :]


def clock(seconds: float) -> str:
    """``1:02:03`` or ``02:03.4``."""
    tenths = round(10 * seconds)
    if tenths >= 36_000:
        return f"{tenths // 36_000}:{tenths // 600 % 60:02}:{tenths // 10 % 60:02}"
    return f"{tenths // 600:02}:{tenths // 10 % 60:02}.{tenths % 10}"
