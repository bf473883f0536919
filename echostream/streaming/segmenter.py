"""Where sentences end.

The CTC heads are causal, so that a token they have emitted stays: an end can be acted on at the decision that sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from echostream.text import WORD_START, Vocabulary


@dataclass(frozen=True)
class Spoken:
    """One CTC token: the symbol and the encoder frame (40 ms, from the stream's start) that emitted it."""

    token: int
    frame: int


class Segmenter(Protocol):
    """What the session asks of a segmenter."""

    name: str

    def find(self, source: tuple[Spoken, ...], target: tuple[Spoken, ...]) -> int | None:
        """The frame of the token that closes the current sentence, or None while it goes on.

        Args:
            source, target: what the ASR and ST CTC heads have emitted since the sentence's start.
        """


@dataclass(frozen=True)
class PunctuationSegmenter:
    """The model's own punctuation: the first ``.``, ``!``, ``?`` or ``…`` of the ST CTC head that follows a word."""

    vocabulary: Vocabulary
    name: str = "punctuation"

    def find(self, source: tuple[Spoken, ...], target: tuple[Spoken, ...]) -> int | None:
        words = False
        for spoken in target:
            words = words or has_letters(self.vocabulary, spoken.token)
            if words and self.vocabulary.ends_sentence(spoken.token):
                return spoken.frame
        return None


@dataclass(frozen=True)
class NoSegmenter:
    """Sentences end only by ``finish()`` or the maximum length: for recordings that are one sentence each."""

    name: str = "none"

    def find(self, source: tuple[Spoken, ...], target: tuple[Spoken, ...]) -> int | None:
        return None


def has_letters(vocabulary: Vocabulary, token: int) -> bool:
    """Is there more to this subword than punctuation?"""
    return any(letter.isalnum() for letter in vocabulary[token].replace(WORD_START, ""))
