"""What a session's events say, piece by piece: the text as it is written, or as it is spoken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from echostream.streaming.events import Event, SentenceEnd, SourceText, TargetText, TargetUnits
from echostream.text import WORD_START, Vocabulary

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

# What each kind of output needs of the session; the rest of the chain is not run.
OUTPUTS: dict[str, dict[str, Any]] = {
    "speech": {"speech": True},
    "text": {"speech": False},
    "source": {"speech": False, "text": False},
    "both": {"speech": True},
}


def spelled(vocabulary: Vocabulary, tokens: tuple[int, ...]) -> list[str]:
    """Subwords as text; a leading space starts a word."""
    return [vocabulary[token].replace(WORD_START, " ") for token in tokens]


class Pieces:
    """The text of one stream; ``output`` is one of ``OUTPUTS``."""

    def __init__(self, bundle: Bundle, output: str) -> None:
        self.bundle, self.output = bundle, output
        self.unsaid: list[str] = []  # the current sentence's subwords that have no sound yet
        self.said = 0  # how many of its subwords have one
        self.heard: dict[int, str] = {}  # source text of each sentence

    @property
    def source_text(self) -> str:
        return " ".join(text for text in self.heard.values() if text)

    def take(self, events: Iterable[Event]) -> tuple[list[str], list[str]]:
        """The text that these events give out, and that they write; without speech these are the same.

        A piece is a subword, a leading space starting a word; a sentence's end is a piece of one space.
        """
        out, written = [], []
        for event in events:
            if isinstance(event, SourceText):
                self.heard[event.sentence] = event.text
                if self.output == "source":
                    written += spelled(self.bundle.source_dict, event.tokens)
            elif isinstance(event, TargetText):
                new = spelled(self.bundle.target_dict, event.tokens)
                written += new
                self.unsaid += new
            elif isinstance(event, TargetUnits):
                # Read from MT states, the speech may stay some subwords behind the text.
                out += self._say(event.inputs if self.bundle.config.units_read_text else None)
            elif isinstance(event, SentenceEnd):
                self.heard[event.sentence] = event.source_text
                out += [*self._say(None), " "]
                written.append(" ")
                self.said = 0
        return (out if OUTPUTS[self.output]["speech"] else written), written

    def _say(self, count: int | None) -> list[str]:
        """The subwords that now have a sound: up to ``count`` of the sentence, or all."""
        now = len(self.unsaid) if count is None else max(0, count - self.said)
        pieces, self.unsaid = self.unsaid[:now], self.unsaid[now:]
        self.said += len(pieces)
        return pieces
