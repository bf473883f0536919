"""Sentences that end at the model's own full stops."""

from __future__ import annotations

from dataclasses import dataclass

from echostream.streaming.segmenters.base import AudioMemory, CTCToken, Ending, SegmenterBase
from echostream.text import Vocabulary


@dataclass(frozen=True)
class PunctuationSegmenter(SegmenterBase):
    """The model's own punctuation: the first ``.``, ``!``, ``?`` or ``…`` of the ST CTC head that follows a word."""

    vocabulary: Vocabulary
    name: str = "punctuation"

    def find(
        self, source: tuple[CTCToken, ...], target: tuple[CTCToken, ...], frames: int, memory: AudioMemory
    ) -> Ending | None:
        words = False
        for spoken in target:
            words = words or self.vocabulary.has_letters(spoken.token)
            if words and self.vocabulary.ends_sentence(spoken.token):
                return Ending(self.name, closing=spoken.frame)
        return None
