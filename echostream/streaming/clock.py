"""The audio clock: samples of any rate in, the features of one decision's chunk out.

Decisions fall every ``chunk_ms`` of source audio, however the samples were pushed. Samples wait until their chunk is
full and are then processed at once, so that everything behind this file is identical for all ways of cutting a
recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from echostream.audio.features import FeatureState, feature_extractor
from echostream.audio.resample import Resampler, ResampleState
from echostream.constants import NUM_MEL_BINS, SAMPLE_RATE


@dataclass(frozen=True)
class ClockState:
    """What the audio clock remembers.

    Attributes:
        rate: samples per second of what is being pushed; 0 before the first sample.
        due: source audio missing until the next decision, in thousandths of a sample.
        decisions: decisions so far.
        samples: float32 [N], pushed since the last decision (at ``rate``).
        resample: of the resampler from ``rate`` to 16 kHz.
        fbank: samples waiting for their feature frame.
        features: float32 [T, 80], frames of the chunk that are computed already (after a change of rate).
        heard: float32 [M] at 16 kHz, the samples these came from.
    """

    rate: int
    due: int
    decisions: int
    samples: np.ndarray
    resample: ResampleState
    fbank: FeatureState
    features: np.ndarray
    heard: np.ndarray


class AudioChunk(NamedTuple):
    """What a decision hears: features [T, 80], and the samples that arrived since the last one, float32 [M], 16 kHz."""

    features: np.ndarray
    samples: np.ndarray


class AudioClock:
    """Cuts a stream of samples into chunks and turns these into log-mel features.

    Args:
        chunk_ms: milliseconds of source audio between two decisions.
        features: name of the features (see ``audio.features``).
    """

    def __init__(self, chunk_ms: int, features: str = "kaldi"):
        self.chunk_ms, self.extractor = chunk_ms, feature_extractor(features)

    def init_state(self) -> ClockState:
        none = np.zeros(0, dtype=np.float32)
        no_features = np.zeros((0, NUM_MEL_BINS), dtype=np.float32)
        return ClockState(0, 0, 0, none, ResampleState(none, 0, 0), self.extractor.init_state(), no_features, none)

    def seconds(self, state: ClockState) -> float:
        """Source audio of which ``state`` has heard, chunk in the making included."""
        if state.rate == 0:
            return 0.0
        return (state.decisions + 1) * self.chunk_ms / 1000 - state.due / 1000 / state.rate

    def push(self, samples: np.ndarray, rate: int, state: ClockState) -> Iterator[tuple[AudioChunk | None, ClockState]]:
        """Yield (chunk, state) at every decision, and last (None, state) with what is left over.

        Args:
            samples: float32 [N] at ``rate`` samples per second.
        """
        if rate != state.rate:
            if len(samples) == 0:
                yield None, state
                return
            state = self._change_rate(rate, state)
        while 1000 * len(samples) >= state.due:
            count = -(-state.due // 1000)
            state = replace(
                state,
                samples=np.concatenate([state.samples, samples[:count]]),
                due=state.due - 1000 * count + self.chunk_ms * rate,
                decisions=state.decisions + 1,
            )
            samples = samples[count:]
            chunk, state = self._process(state)
            yield chunk, state
        state = replace(state, samples=np.concatenate([state.samples, samples]), due=state.due - 1000 * len(samples))
        yield None, state

    def finish(self, state: ClockState) -> tuple[AudioChunk, ClockState]:
        """The last, partial chunk, the resampler flushed."""
        return self._process(state, flush=True)

    def _process(self, state: ClockState, flush: bool = False) -> tuple[AudioChunk, ClockState]:
        samples, resample = state.samples, state.resample
        if state.rate:
            samples, resample = Resampler(state.rate, SAMPLE_RATE).step(samples, resample, finished=flush)
        features, fbank = self.extractor.step(samples, state.fbank)
        if len(state.features):
            features = np.concatenate([state.features, features])
        if len(state.heard):
            samples = np.concatenate([state.heard, samples])
        return AudioChunk(features, samples), replace(
            state,
            samples=state.samples[:0],
            resample=resample,
            fbank=fbank,
            features=state.features[:0],
            heard=state.heard[:0],
        )

    def _change_rate(self, rate: int, state: ClockState) -> ClockState:
        """From here on samples come at another rate; the old resampler gives out what it still holds."""
        resample = Resampler(rate, SAMPLE_RATE).init_state()
        if state.rate == 0:
            return replace(state, rate=rate, due=self.chunk_ms * rate, resample=resample)
        (features, heard), state = self._process(state, flush=True)
        due = math.ceil(state.due * rate / state.rate)
        return replace(state, rate=rate, due=due, resample=resample, features=features, heard=heard)
