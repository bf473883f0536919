"""What a streaming session gives out. Payloads are plain Python and numpy; nothing given out is ever taken back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        sentence: number of the sentence within the stream, from 0.
        source_time_s: seconds of source audio heard when the event was decided (the audio clock).
        elapsed_s: seconds of computing the stream had taken by then (a wall clock, so not part of equality).
    """

    sentence: int
    source_time_s: float
    elapsed_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, kw_only=True)
class SourceText(Event):
    """What the ASR CTC head has read. Its tokens are final as soon as they are there; only their number grows.

    Attributes:
        tokens: source subwords added by this event.
        text: source text of the sentence so far, or all of it when ``final``.
        final: the sentence has ended.
    """

    tokens: tuple[int, ...]
    text: str
    final: bool


@dataclass(frozen=True, kw_only=True)
class TargetText(Event):
    """Translation committed by this event.

    Attributes:
        tokens: target subwords added.
        frames: g(i) of each: encoder frames (40 ms) of this sentence that were visible when it was written.
        text: the text added, with the space before it if it starts a word inside the sentence.
        sentence_text: the sentence's translation so far.
    """

    tokens: tuple[int, ...]
    frames: tuple[int, ...]
    text: str
    sentence_text: str


@dataclass(frozen=True, kw_only=True)
class TargetUnits(Event):
    """Discrete units added, deduplicated: ids from 0 on; ``frames`` is the g of the last of their inputs.

    ``inputs`` counts what the unit decoder has read of this sentence: with MT states, the subwords that have a sound.
    """

    units: tuple[int, ...]
    frames: int
    inputs: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Waveform(Event):
    """Speech to be played after that of the events before.

    Attributes:
        samples: float32 [N] in [-1, 1].
        sample_rate: samples per second.
    """

    samples: np.ndarray
    sample_rate: int


@dataclass(frozen=True)
class LagStatistics:
    """How far a sentence's translation was behind, in seconds of source audio; nan where nothing was written.

    Attributes:
        first_text_s: from the sentence's first visible frame to its first target token.
        first_audio_s: the same to its first sample of speech.
        laal_s: length-adaptive average lagging (Papi et al., 2022) per target token, against the sentence's own length
            and output (there is no reference here).
        end_s: from the sentence's last visible frame to its last target token.
    """

    first_text_s: float
    first_audio_s: float
    laal_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceEnd(Event):
    """A sentence is complete. Text and waveform are those of its events, joined: for records, not for playing.

    Attributes:
        reason: ``punctuation`` (or the name of the segmenter that found it), ``finish`` or ``length``.
        source_text, text: both sides, complete.
        tokens, frames: all target subwords and their g(i).
        units: all units.
        waveform: float32 [N] (empty without a vocoder); sample_rate: of it.
        start_s, end_s: the stretch of source audio whose encoder frames the sentence could see, pauses included.
        first_heard_s, last_heard_s: when the CTC heads emitted its first and last token; they lag the sound a little.
        lag: how far behind it was.
    """

    reason: str
    source_text: str
    text: str
    tokens: tuple[int, ...]
    frames: tuple[int, ...]
    units: tuple[int, ...]
    waveform: np.ndarray
    sample_rate: int
    start_s: float
    end_s: float
    first_heard_s: float
    last_heard_s: float
    lag: LagStatistics
