"""How a stream is translated, whatever the model: chunk, words, limits."""

from __future__ import annotations

from dataclasses import dataclass

from echostream.errors import ConfigError
from echostream.loading import shown

# Least and most of each number; the most of ``beam`` and ``chunk_ms`` bound what a decision costs.
LIMITS = {
    "chunk_ms": (10, 60_000),
    "tail_frames": (0, 1000),
    "lookback_frames": (1, 10_000),
    "beam": (1, 32),
    "max_sentence_frames": (25, 1 << 20),
}


@dataclass(frozen=True)
class Settings:
    """How a stream is translated.

    Attributes:
        chunk_ms: milliseconds of source audio from one decision to the next.
        whole_words: commit text, and so speech, in whole words only (until the sentence's end).
        speech: without, only text is written: neither the unit decoder nor the vocoder is run.
        text: without (and without ``speech``), only the source is written down: the MT decoder is not run either.
        max_sentence_frames: encoder frames (40 ms) after which a sentence is ended whatever it says; None: as many as
            the model's buffers hold. Rounded down to those.
        tail_frames: encoder frames behind its closing token that a sentence may see.
        beam: hypotheses of the beam search that finishes a sentence once its end is known; 1: greedy, as before it.
        lookback_frames: encoder frames kept for the next sentence: how far before the present it may begin, and how
            much of a pause before its first CTC token it sees.

    Raises:
        ConfigError: a value is out of range.
    """

    chunk_ms: int = 320
    whole_words: bool = True
    speech: bool = True
    text: bool = True
    max_sentence_frames: int | None = None
    tail_frames: int = 4
    lookback_frames: int = 125
    beam: int = 1

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is None and name == "max_sentence_frames":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {shown(value)}; it must be a whole number of at least {least}")
            if value > most:
                raise ConfigError(f"{name} is {shown(value)}; it must be at most {most}")
        for name in ("whole_words", "speech", "text"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}; it must be true or false")
        if self.speech and not self.text:
            raise ConfigError("speech is True, but text is False; speech is made from text")
