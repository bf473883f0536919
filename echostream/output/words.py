"""When each word of the translation was given out: with the speech that holds it, or, without speech, as text.

And when it is heard by who plays that speech.
"""

from __future__ import annotations

from dataclasses import dataclass

from echostream.streaming.events import Event, SentenceEnd, TargetText, TargetUnits, Waveform
from echostream.text import WORD_START, Vocabulary, has_letters


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
        self.letters: list[float] = []  # the audio clock when each letter of them was given out
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
            self.letters += [now] * sum(not c.isspace() for c in letters)
            if self.gap or piece.startswith(WORD_START):
                self.words.append(TimedWord(letters, now))
                self._given(letters)
            elif self.words:
                self.words[-1].text += letters
                if has_letters(letters):  # a full stop that follows later makes no sound
                    self.words[-1].seconds = now
                self._given(letters)
            self.gap = False
        self.said += len(self.silent[:count])
        self.silent = self.silent[count:]

    def _given(self, letters: str) -> None:
        """The last word has got these letters."""


class HeardWords(WordTimes):
    """Words timed by when they have been heard, where the speech is played as it comes.

    A piece of speech waits until the one before has ended, so that speech that takes longer than its source falls
    behind. Within a piece the letters that it says are spread evenly; a word has been heard with its last one.
    """

    def __init__(self, vocabulary: Vocabulary, units_read_text: bool):
        super().__init__(vocabulary, True, units_read_text)
        self.free = 0.0  # when the player has played all there is, seconds
        self.unheard: list[tuple[TimedWord, int]] = []  # words of the piece that comes next, and letters of each

    def take(self, event: Event) -> None:
        super().take(event)
        if isinstance(event, Waveform):
            start = max(self.free, event.source_time_s)
            self.free = start + len(event.samples) / event.sample_rate
            self._hear(start, self.free)
        elif isinstance(event, SentenceEnd):  # what the unit decoder left out
            self._hear(*(max(self.free, event.source_time_s),) * 2)

    def _given(self, letters: str) -> None:
        count = sum(c.isalnum() for c in letters)
        if count or (self.words[-1].text == letters):
            self.unheard.append((self.words[-1], count))

    def _hear(self, start: float, end: float) -> None:
        total, done = sum(count for _, count in self.unheard), 0
        for word, count in self.unheard:
            done += count
            word.seconds = start + (end - start) * (done / total if total else 1.0)
        self.unheard = []
