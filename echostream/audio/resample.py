"""Change of sample rate by a polyphase filter, for whole recordings and sample by sample.

The filter is a sinc under a Kaiser window (Kaiser, 1974): 40 zero crossings a side, 90 dB stop band, flat up to 88 % of
the lower of both Nyquist frequencies. Its look-ahead is 40 samples of the lower rate: 2.5 ms at 16 kHz.

Every phase has a filter of its own where a table of all of them is small, as for all usual rates. For the others
(767,999 Hz would need 245 MB) the table holds fewer phases, and a filter between two of them is the straight line
between both; what that leaves out is 96 dB below the sound.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from echostream.errors import AudioError

MIN_RATE, MAX_RATE = 1_000, 768_000  # samples per second
ZERO_CROSSINGS = 40
ATTENUATION_DB = 90.0
CUTOFF = 0.95  # centre of the transition band, as a share of the lower Nyquist frequency
LARGEST_TABLE = 1 << 18  # taps of all phases together
BETWEEN = 512  # phases a sample of the lower rate where the table would be larger


@dataclass(frozen=True)
class ResampleState:
    """What the next output samples need.

    Attributes:
        samples: float32 [taps - 1], input samples of which the first ``count`` are in use, oldest first.
        count: how many.
        phase: place of the next output sample between two input samples, in 1/up.
    """

    samples: np.ndarray
    count: int
    phase: int

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes + 16


class Resampler:
    """Resamples from one rate to another; itself without memory, streams carry a ``ResampleState``.

    Output sample n lies at input time n * source_rate / target_rate; a recording of N samples gives
    ceil(N * target_rate / source_rate).

    Args:
        source_rate, target_rate: samples per second, whole numbers.

    Raises:
        AudioError: a rate is not a whole number between 1 kHz and 768 kHz.
    """

    def __init__(self, source_rate: int, target_rate: int):
        check_rate(source_rate)
        check_rate(target_rate)
        self.source_rate, self.target_rate = int(source_rate), int(target_rate)
        divisor = math.gcd(self.source_rate, self.target_rate)
        self.up, self.down = self.target_rate // divisor, self.source_rate // divisor
        self.filters: np.ndarray | None = None  # [phases, taps]
        self.phases = self.up
        if self.up != self.down:
            if self.up * 2 * _half(self.up, self.down) > LARGEST_TABLE:
                self.phases = math.ceil(BETWEEN * min(1.0, self.up / self.down))
            self.filters = _polyphase_filters(self.up, self.down, self.phases)

    @property
    def taps(self) -> int:
        return 1 if self.filters is None else self.filters.shape[1]

    def init_state(self) -> ResampleState:
        # Half a filter of silence lies before the first sample, so that output sample 0 is centred on input sample 0.
        return ResampleState(np.zeros(self.taps - 1, dtype=np.float32), max(self.taps // 2 - 1, 0), 0)

    def step(
        self, samples: np.ndarray, state: ResampleState, finished: bool = False
    ) -> tuple[np.ndarray, ResampleState]:
        """The output samples whose filter window ``samples`` completes: (float32 [M], next state).

        Args:
            samples: float [N], any N, 0 included.
            finished: the recording ends here; the rest is given out as if silence followed.

        Whatever the splits, all steps together give ``resample`` of the whole recording, bit by bit.
        """
        samples = np.asarray(samples, dtype=np.float32)
        if self.filters is None:
            return samples.copy(), state
        parts = [state.samples[: state.count], samples]
        if finished:
            parts.append(np.zeros(self.taps // 2, dtype=np.float32))
        joined = np.concatenate(parts)
        # Window i begins at (phase + i * down) // up; the last one must end inside ``joined``.
        room = len(joined) - self.taps
        count = 0 if room < 0 else (room * self.up + self.up - 1 - state.phase) // self.down + 1
        out = self._filter(joined, self.filters, state.phase, max(count, 0))
        place = state.phase + len(out) * self.down
        rest = joined[place // self.up :]
        held = np.zeros(self.taps - 1, dtype=np.float32)
        held[: len(rest)] = rest
        return out, ResampleState(held, len(rest), place % self.up)

    def resample(self, samples: np.ndarray) -> np.ndarray:
        """Resample a whole recording, float [N] -> float32 [ceil(N * up / down)]."""
        return self.step(samples, self.init_state(), finished=True)[0]

    def _filter(self, joined: np.ndarray, filters: np.ndarray, phase: int, count: int) -> np.ndarray:
        out = np.empty(count, dtype=np.float32)
        if count == 0:
            return out
        windows = np.lib.stride_tricks.sliding_window_view(joined, self.taps)
        if self.phases != self.up:
            self._filter_between(windows, filters, phase, out)
            return out
        if self.up * 4 <= count:
            # Outputs `up` apart share a filter, and their windows lie `down` apart: no copies.
            for first in range(self.up):
                place = phase + first * self.down
                rows = windows[place // self.up :: self.down][: len(range(first, count, self.up))]
                np.einsum("nt,t->n", rows, filters[place % self.up], out=out[first :: self.up])
            return out
        for begin in range(0, count, 1024):
            places = phase + np.arange(begin, min(begin + 1024, count)) * self.down
            np.einsum("nt,nt->n", windows[places // self.up], filters[places % self.up], out=out[begin : begin + 1024])
        return out

    def _filter_between(self, windows: np.ndarray, filters: np.ndarray, phase: int, out: np.ndarray) -> None:
        for begin in range(0, len(out), 256):
            part = out[begin : begin + 256]
            places = phase + np.arange(begin, begin + len(part)) * self.down
            exact = places % self.up * (self.phases / self.up)
            row = exact.astype(np.int64)
            share = (exact - row).astype(np.float32)[:, None]
            between = filters[row] * (1 - share) + filters[row + 1] * share
            np.einsum("nt,nt->n", windows[places // self.up], between, out=part)


def check_rate(rate: Any) -> None:
    """Refuse a rate that cannot be one.

    Raises:
        AudioError: it is not a whole number between 1 kHz and 768 kHz.
    """
    if (
        isinstance(rate, bool)
        or not isinstance(rate, Real)
        or rate < MIN_RATE
        or not rate <= MAX_RATE  # so that NaN is none
        or not float(rate).is_integer()
    ):
        raise AudioError(f"sample rate {rate!r} is not a whole number from {MIN_RATE} to {MAX_RATE} Hz")


def _half(up: int, down: int) -> int:
    """Input samples that a filter reaches to either side."""
    return math.ceil(ZERO_CROSSINGS * max(1.0, down / up))


@functools.lru_cache(maxsize=8)
def _polyphase_filters(up: int, down: int, phases: int) -> np.ndarray:
    """One filter per phase, float32 [phases, taps], each reaching ``taps // 2`` input samples to either side.

    With fewer phases than ``up`` there is one row more: the first again, a sample later.
    """
    scale = min(1.0, up / down) * CUTOFF  # cut-off relative to the source's Nyquist frequency
    half = _half(up, down)
    beta = 0.1102 * (ATTENUATION_DB - 8.7)
    rows = phases + (phases != up)
    # Distance of tap j from an output sample that lies phase/phases behind tap (half - 1), in input samples.
    distance = np.arange(-half + 1, half + 1)[None, :] - np.arange(rows)[:, None] / phases
    inside = np.clip(1.0 - (distance / half) ** 2, 0.0, None)
    filters = scale * np.sinc(scale * distance) * np.i0(beta * np.sqrt(inside)) / np.i0(beta)
    filters /= filters.sum(axis=1, keepdims=True)  # a constant stays the same constant at every phase
    return filters.astype(np.float32)
