"""One sentence in the making: what was heard of it, what has been written, and how far behind that was."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from echostream.constants import BLANK, ENCODER_FRAME_MS
from echostream.streaming.events import LagStatistics
from echostream.streaming.policies.base import Memory
from echostream.streaming.segmenters.base import CTCToken

FRAME_S = ENCODER_FRAME_MS / 1000


@dataclass
class Sentence:
    """State of the current sentence. Frames are encoder frames (40 ms), counted from the stream's start.

    Attributes:
        index: number within the stream.
        start: first frame its decoders see.
        extended: the frame up to which they have been given the encoder's output; ``start`` before anything was.
        begun: has the translation something to work on? Before that its start may still move.
        source, target: tokens of the ASR and ST CTC heads.
        source_given: how many source tokens have been given out as events.
        memory: the policy's.
        tokens, frames, times: committed target subwords, g(i), and the audio clock (s) when each was written.
        inputs: [P, D] what the unit decoder has still to read, and ``inputs_read`` what it has read.
        last_symbol: the unit decoder's last raw symbol.
        units, samples: all given out so far.
        first_audio_s: the audio clock at its first speech.
    """

    index: int
    start: int
    memory: Memory
    inputs: np.ndarray
    extended: int = -1
    begun: bool = False
    source: tuple[CTCToken, ...] = ()
    target: tuple[CTCToken, ...] = ()
    source_given: int = 0
    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    inputs_read: int = 0
    last_symbol: int = BLANK
    units: list[int] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)
    first_audio_s: float = float("nan")

    def __post_init__(self) -> None:
        if self.extended < 0:
            self.extended = self.start

    @property
    def visible(self) -> int:
        """Encoder frames its decoders can see."""
        return self.extended - self.start

    def visible_source(self) -> list[int]:
        """ASR tokens of the frames its decoders can see; later ones belong to the next sentence."""
        return [spoken.token for spoken in self.source if spoken.frame < self.extended]

    def lag(self) -> LagStatistics:
        start_s, end_s = self.start * FRAME_S, self.extended * FRAME_S
        if not self.times:
            nan = float("nan")
            return LagStatistics(nan, self.first_audio_s - start_s, nan, nan)
        ideal = (end_s - start_s) / len(self.times)  # seconds of source per subword, spoken without lag
        lags = []
        for i, time in enumerate(self.times):
            lags.append(time - start_s - i * ideal)
            if time >= end_s:
                break
        return LagStatistics(
            first_text_s=self.times[0] - start_s,
            first_audio_s=self.first_audio_s - start_s,
            laal_s=sum(lags) / len(lags),
            end_s=self.times[-1] - end_s,
        )
