"""Log-mel filter banks as Kaldi computes them, for whole recordings and sample by sample.

Only numpy is needed. Each frame's value depends on its own 400 samples alone, down to the last bit: how many frames are
computed together changes nothing, so a stream and a whole recording give identical features, silence included.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from echostream.constants import FRAME_LENGTH, FRAME_SHIFT, NUM_MEL_BINS, SAMPLE_RATE

FFT_SIZE = 512
PREEMPHASIS = np.float32(0.97)
LOW_HZ, HIGH_HZ = 20.0, SAMPLE_RATE / 2
FLOOR = np.float32(np.finfo(np.float32).eps)  # energies below are raised to it before the logarithm
_SCALE = np.float32(2**15)  # Kaldi works on 16-bit integers; ours are fractions of full scale
BLOCK = 128  # frames computed at once: the working set stays in the cache


@functools.lru_cache(maxsize=1)
def _window() -> np.ndarray:
    """Kaldi's "povey" window [400]: a Hann window to the power 0.85, times the 16-bit scale."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME_LENGTH) / (FRAME_LENGTH - 1))
    return (hann**0.85).astype(np.float32) * _SCALE


class Filters(NamedTuple):
    """Triangular filters, as sums over few bins."""

    bins: np.ndarray  # [K] of the spectrum, filter after filter
    weights: np.ndarray  # float32 [K]
    starts: np.ndarray  # [80], where each filter begins in them

    @classmethod
    def sparse(cls, weights: np.ndarray) -> Filters:
        """Of a matrix [80, bins]."""
        filters, bins = np.nonzero(weights)
        starts = np.searchsorted(filters, np.arange(len(weights)))
        return cls(bins, weights[filters, bins].astype(np.float32), starts)

    def energies(self, spectrum: np.ndarray) -> np.ndarray:
        """Complex spectra [T, bins] -> float32 [T, 80]."""
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32, copy=False)
        # A sum per filter over its few bins: unlike a matrix product, its rounding cannot depend on the row count.
        return np.add.reduceat(power[:, self.bins] * self.weights, self.starts, axis=1)


@functools.lru_cache(maxsize=1)
def _mel_filters() -> Filters:
    """The triangular filters, evenly spaced in mel."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    points = np.linspace(mel(LOW_HZ), mel(HIGH_HZ), NUM_MEL_BINS + 2)
    bins = mel(np.arange(FFT_SIZE // 2) * SAMPLE_RATE / FFT_SIZE)
    lower, centre, upper = (points[i : i + NUM_MEL_BINS, None] for i in range(3))
    return Filters.sparse(
        np.maximum(0.0, np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)))
    )


def num_frames(num_samples: int) -> int:
    """Frames of a recording of ``num_samples`` at 16 kHz; only whole windows count."""
    return 0 if num_samples < FRAME_LENGTH else 1 + (num_samples - FRAME_LENGTH) // FRAME_SHIFT


def fbank(samples: np.ndarray) -> np.ndarray:
    """80 log-mel energies every 10 ms, from windows of 25 ms.

    The same as ``torchaudio.compliance.kaldi.fbank(samples * 2**15, num_mel_bins=80, dither=0)``: mean removed,
    pre-emphasis 0.97, povey window, power spectrum, 20 Hz to 8 kHz, natural logarithm, edges snipped.

    Args:
        samples: float [N] at 16 kHz, full scale is 1.

    Returns:
        float32 [T, 80] with T = 1 + (N - 400) // 160, or 0 rows where N < 400.
    """
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    count = num_frames(len(samples))
    out = np.empty((count, NUM_MEL_BINS), dtype=np.float32)
    if count == 0:
        return out
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME_LENGTH)[::FRAME_SHIFT]
    window, filters = _window(), _mel_filters()
    for begin in range(0, count, BLOCK):
        frame = frames[begin : begin + BLOCK]
        # The first sample is taken off before the mean, so that a constant input gives exact zeros, not noise.
        frame = frame - frame[:, :1]
        frame -= frame.mean(axis=1, keepdims=True)
        emphasised = np.empty_like(frame)
        np.multiply(frame[:, :-1], PREEMPHASIS, out=emphasised[:, 1:])
        np.multiply(frame[:, 0], PREEMPHASIS, out=emphasised[:, 0])
        np.subtract(frame, emphasised, out=emphasised)
        emphasised *= window
        energies = filters.energies(np.fft.rfft(emphasised, FFT_SIZE, axis=1))
        np.log(np.maximum(energies, FLOOR), out=out[begin : begin + BLOCK])
    return out
