"""Where sentences end.

The CTC heads are causal, so that a token they have emitted stays: an end can be acted on at the decision that sees it.
Beside whatever is chosen here a sentence ends at the maximum length (``Settings.max_sentence_frames``).

| name | ends a sentence at |
|---|---|
| ``punctuation`` | the model's own full stop in the ST CTC text |
| ``ct`` | a full stop that a CT-Transformer punctuation model sets into the ST or ASR text (``punctuation.py``) |
| ``pause`` | a pause of the speaker, by silero's voice activity detector (``pause.py``) |
| ``none`` | the end of the recording only |

Several are joined by a plus sign (``punctuation+pause``): the first end that any of them finds counts. With any of them
a gate lets no word count where silero's detector hears nobody speak (``pause.SpeechGate``), unless it is switched off.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from echostream.errors import ConfigError
from echostream.text import WORD_START, Vocabulary

AudioMemory = dict[str, np.ndarray]  # what a segmenter remembers of the sound: plain arrays, never changed in place


@dataclass(frozen=True)
class Spoken:
    """One CTC token: the symbol and the encoder frame (40 ms, from the stream's start) that emitted it."""

    token: int
    frame: int


@dataclass(frozen=True)
class Ending:
    """The end of a sentence, in encoder frames from the stream's start: one of ``closing`` and ``until`` is given.

    Attributes:
        reason: the name of what found it.
        closing: frame of the CTC token that closes the sentence; the next one begins there.
        until: the sentence reaches up to this frame, itself not included; tokens emitted before it belong to it.
    """

    reason: str
    closing: int | None = None
    until: int | None = None

    @property
    def place(self) -> int:
        """The sentence's last frame."""
        return self.closing if self.closing is not None else self.until - 1


class Segmenter(Protocol):
    """What the session asks of a segmenter. It is a value shared by all streams; ``SegmenterBase`` is one without ears.

    Attributes:
        name: what it is and its settings; a saved session fits segmenters of the same name only.
        listens: must it be given the sound?
    """

    name: str
    listens: bool

    def init_audio(self) -> AudioMemory:
        """The memory of the sound at the start of a stream."""

    def hear(self, samples: np.ndarray, memory: AudioMemory) -> AudioMemory:
        """The memory after float32 [N] samples at 16 kHz more."""

    def find(
        self, source: tuple[Spoken, ...], target: tuple[Spoken, ...], frames: int, memory: AudioMemory
    ) -> Ending | None:
        """The first end of the current sentence, or None while it goes on.

        Args:
            source, target: what the ASR and ST CTC heads have emitted since the sentence's start.
            frames: encoder frames of the stream so far.
            memory: of the sound, up to the same moment.
        """

    def voiced(self, frame: int, memory: AudioMemory) -> bool:
        """May somebody have spoken about encoder frame ``frame``? A CTC token where nobody did is invented."""


class SegmenterBase:
    """A segmenter that does not listen."""

    listens = False

    def init_audio(self) -> AudioMemory:
        return {}

    def hear(self, samples: np.ndarray, memory: AudioMemory) -> AudioMemory:
        return memory

    def voiced(self, frame: int, memory: AudioMemory) -> bool:
        return True


@dataclass(frozen=True)
class PunctuationSegmenter(SegmenterBase):
    """The model's own punctuation: the first ``.``, ``!``, ``?`` or ``…`` of the ST CTC head that follows a word."""

    vocabulary: Vocabulary
    name: str = "punctuation"

    def find(
        self, source: tuple[Spoken, ...], target: tuple[Spoken, ...], frames: int, memory: AudioMemory
    ) -> Ending | None:
        words = False
        for spoken in target:
            words = words or has_letters(self.vocabulary, spoken.token)
            if words and self.vocabulary.ends_sentence(spoken.token):
                return Ending(self.name, closing=spoken.frame)
        return None


@dataclass(frozen=True)
class NoSegmenter(SegmenterBase):
    """Sentences end only by ``finish()`` or the maximum length: for recordings that are one sentence each."""

    name: str = "none"

    def find(
        self, source: tuple[Spoken, ...], target: tuple[Spoken, ...], frames: int, memory: AudioMemory
    ) -> Ending | None:
        return None


@dataclass(frozen=True)
class CombinedSegmenter:
    """Whichever of several segmenters finds the earliest end."""

    parts: tuple[Segmenter, ...]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def listens(self) -> bool:
        return any(part.listens for part in self.parts)

    def init_audio(self) -> AudioMemory:
        return self._join([part.init_audio() for part in self.parts])

    def hear(self, samples: np.ndarray, memory: AudioMemory) -> AudioMemory:
        return self._join(
            [part.hear(samples, self._part(i, memory)) for i, part in enumerate(self.parts)]
        )

    def find(
        self, source: tuple[Spoken, ...], target: tuple[Spoken, ...], frames: int, memory: AudioMemory
    ) -> Ending | None:
        found = [part.find(source, target, frames, self._part(i, memory)) for i, part in enumerate(self.parts)]
        return min((ending for ending in found if ending), key=lambda ending: ending.place, default=None)

    def voiced(self, frame: int, memory: AudioMemory) -> bool:
        return all(part.voiced(frame, self._part(i, memory)) for i, part in enumerate(self.parts))

    @staticmethod
    def _join(memories: list[AudioMemory]) -> AudioMemory:
        return {f"{i}.{name}": array for i, memory in enumerate(memories) for name, array in memory.items()}

    @staticmethod
    def _part(i: int, memory: AudioMemory) -> AudioMemory:
        start = f"{i}."
        return {name.removeprefix(start): array for name, array in memory.items() if name.startswith(start)}


SEGMENTERS = ("punctuation", "ct", "pause", "none")
CT_SIDES = ("target", "source")


def make_segmenter(
    name: str,
    source_dict: Vocabulary,
    target_dict: Vocabulary,
    punctuation_model: str | Path | None = None,
    punctuation_side: str = "target",
    vad_model: str | Path | None = None,
    min_pause_ms: int = 600,
) -> Segmenter:
    """A segmenter by its name, or several joined by plus signs.

    Args:
        source_dict, target_dict: the model's dictionaries.
        punctuation_model: directory or .onnx file of the CT-Transformer, for ``ct``.
        punctuation_side: the text it reads, ``target`` (ST CTC) or ``source`` (ASR CTC).
        vad_model: silero's .onnx file, for ``pause``; default: the network that comes with the package.
        min_pause_ms: milliseconds of silence that end a sentence, for ``pause``.

    Raises:
        ConfigError: an unknown name or side, or ``ct`` without its model.
        CheckpointError: a model is missing or of another kind. MissingExtraError: ONNX Runtime is not installed.
    """
    parts: list[Segmenter] = []
    names = name.split("+")
    for part in names:
        if part not in SEGMENTERS:
            raise ConfigError(f"unknown segmenter {part!r}; known: {', '.join(SEGMENTERS)}, and joined by '+'")
        if names.count(part) > 1 or (part == "none" and len(names) > 1):
            raise ConfigError(f"segmenter {name!r} makes no sense; join different ones, and 'none' with none")
        if part == "punctuation":
            parts.append(PunctuationSegmenter(target_dict))
        elif part == "none":
            parts.append(NoSegmenter())
        elif part == "pause":
            from echostream.streaming.pause import PauseSegmenter
            from echostream.streaming.silero import load_silero

            parts.append(PauseSegmenter(load_silero(vad_model), min_pause_ms))
        else:
            from echostream.streaming.punctuation import CTPunctuation, CTSegmenter

            if punctuation_model is None:
                raise ConfigError("segmenter 'ct' needs a CT-Transformer's directory; give it as punctuation_model")
            if punctuation_side not in CT_SIDES:
                raise ConfigError(f"punctuation_side is {punctuation_side!r}; it must be target or source")
            vocabulary = target_dict if punctuation_side == "target" else source_dict
            parts.append(CTSegmenter(CTPunctuation.load(punctuation_model), vocabulary, punctuation_side))
    return parts[0] if len(parts) == 1 else CombinedSegmenter(tuple(parts))


def has_letters(vocabulary: Vocabulary, token: int) -> bool:
    """Is there more to this subword than punctuation?"""
    return any(letter.isalnum() for letter in vocabulary[token].replace(WORD_START, ""))
