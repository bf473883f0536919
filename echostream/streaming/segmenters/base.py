"""Where sentences end.

The CTC heads are causal, so that a token they have emitted stays: an end can be acted on at the decision that sees it.
Beside whatever is chosen here a sentence ends at the maximum length (``Settings.max_sentence_frames``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

AudioMemory = dict[str, np.ndarray]  # what a segmenter remembers of the sound: plain arrays, never changed in place


@dataclass(frozen=True)
class CTCToken:
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
        if self.closing is not None:
            return self.closing
        assert self.until is not None
        return self.until - 1


class Segmenter(Protocol):
    """What the session asks of a segmenter, a value shared by all streams; ``SegmenterBase`` is one without ears."""

    @property
    def name(self) -> str:
        """What it is and its settings; a saved session fits segmenters of the same name only."""

    @property
    def listens(self) -> bool:
        """Must it be given the sound?"""

    def init_audio(self) -> AudioMemory:
        """The memory of the sound at the start of a stream."""

    def hear(self, samples: np.ndarray, memory: AudioMemory) -> AudioMemory:
        """The memory after float32 [N] samples at 16 kHz more."""

    def find(
        self, source: tuple[CTCToken, ...], target: tuple[CTCToken, ...], frames: int, memory: AudioMemory
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
class NoSegmenter(SegmenterBase):
    """Sentences end only by ``finish()`` or the maximum length: for recordings that are one sentence each."""

    name: str = "none"

    def find(
        self, source: tuple[CTCToken, ...], target: tuple[CTCToken, ...], frames: int, memory: AudioMemory
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
        return self._join([part.hear(samples, self._part(i, memory)) for i, part in enumerate(self.parts)])

    def find(
        self, source: tuple[CTCToken, ...], target: tuple[CTCToken, ...], frames: int, memory: AudioMemory
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
