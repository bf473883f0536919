"""When each word of the translation was given out: with the speech that holds it, or, without speech, as text."""

from __future__ import annotations

from dataclasses import dataclass

from echostream.streaming.events import Event, SentenceEnd, TargetText, TargetUnits
from echostream.text import WORD_START, Vocabulary


@dataclass
class TimedWord:
    """A word, and the audio clock in seconds when its last letter was given out."""

    text: str
    seconds: float


class WordTimes:
    """Collects ``words``.

    Args:
        vocabulary: of the target.
        speech: do words count when they sound? Else when they are written.
        units_read_text: does the unit decoder read MT states (``mt``, ``mt-tokens``), so that its inputs count
            subwords? Otherwise all text written so far is said with the next units.
    """

    def __init__(self, vocabulary: Vocabulary, speech: bool, units_read_text: bool):
        self.vocabulary, self.speech, self.units_read_text = vocabulary, speech, units_read_text
        self.words: list[TimedWord] = []
        self.silent: list[int] = []  # the sentence's subwords that have no sound yet
        self.said = 0  # how many of its subwords have one
        self.gap = True  # the next subword starts a word whatever it is

    def take(self, event: Event) -> None:
        now = event.source_time_s
        if isinstance(event, TargetText):
            self.silent += event.tokens
            if not self.speech:
                self._say(len(self.silent), now)
        elif isinstance(event, TargetUnits):
            self._say(event.inputs - self.said if self.units_read_text else len(self.silent), now)
        elif isinstance(event, SentenceEnd):
            self._say(len(self.silent), now)
            self.said, self.gap = 0, True

    def _say(self, count: int, now: float) -> None:
        count = max(0, count)
        for token in self.silent[:count]:
            piece = self.vocabulary[token]
            letters = piece.removeprefix(WORD_START)
            if self.gap or piece.startswith(WORD_START):
                self.words.append(TimedWord(letters, now))
            elif self.words:
                self.words[-1].text += letters
                if any(c.isalnum() for c in letters):  # a full stop that follows later makes no sound
                    self.words[-1].seconds = now
            self.gap = False
        self.said += len(self.silent[:count])
        self.silent = self.silent[count:]
