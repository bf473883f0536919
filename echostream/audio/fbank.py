"""Log-mel filter banks as Kaldi computes them, for whole recordings and sample by sample.

Only numpy is needed. Each frame's value depends on its own 400 samples alone, down to the last bit: how many frames are
computed together changes nothing, so a stream and a whole recording give identical features, silence included.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from echostream.constants import FRAME_LENGTH, FRAME_SHIFT, NUM_MEL_BINS, SAMPLE_RATE

FFT_SIZE = 512
PREEMPHASIS = np.float32(0.97)
LOW_HZ, HIGH_HZ = 20.0, SAMPLE_RATE / 2
FLOOR = np.float32(np.finfo(np.float32).eps)  # energies below are raised to it before the logarithm
_SCALE = np.float32(2**15)  # Kaldi works on 16-bit integers; ours are fractions of full scale
_BLOCK = 128  # frames computed at once: the working set stays in the cache


@functools.lru_cache(maxsize=1)
def _window() -> np.ndarray:
    """Kaldi's "povey" window [400]: a Hann window to the power 0.85, times the 16-bit scale."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME_LENGTH) / (FRAME_LENGTH - 1))
    return (hann**0.85).astype(np.float32) * _SCALE


@functools.lru_cache(maxsize=1)
def _mel_filters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The triangular filters, evenly spaced in mel, as (bins [K], weights [K], start of each filter in them [80])."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    points = np.linspace(mel(LOW_HZ), mel(HIGH_HZ), NUM_MEL_BINS + 2)
    bins = mel(np.arange(FFT_SIZE // 2) * SAMPLE_RATE / FFT_SIZE)
    lower, centre, upper = (points[i : i + NUM_MEL_BINS, None] for i in range(3))
    weights = np.maximum(0.0, np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)))
    filters, indices = np.nonzero(weights)
    starts = np.searchsorted(filters, np.arange(NUM_MEL_BINS))
    return indices, weights[filters, indices].astype(np.float32), starts


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
    window, (bins, weights, starts) = _window(), _mel_filters()
    for begin in range(0, count, _BLOCK):
        frame = frames[begin : begin + _BLOCK]
        # The first sample is taken off before the mean, so that a constant input gives exact zeros, not noise.
        frame = frame - frame[:, :1]
        frame -= frame.mean(axis=1, keepdims=True)
        emphasised = np.empty_like(frame)
        np.multiply(frame[:, :-1], PREEMPHASIS, out=emphasised[:, 1:])
        np.multiply(frame[:, 0], PREEMPHASIS, out=emphasised[:, 0])
        np.subtract(frame, emphasised, out=emphasised)
        emphasised *= window
        spectrum = np.fft.rfft(emphasised, FFT_SIZE, axis=1)
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32, copy=False)
        # A sum per filter over its few bins: unlike a matrix product, its rounding cannot depend on the row count.
        energies = np.add.reduceat(power[:, bins] * weights, starts, axis=1)
        np.log(np.maximum(energies, FLOOR), out=out[begin : begin + _BLOCK])
    return out


@dataclass(frozen=True)
class FbankState:
    """Samples that the next frame needs.

    Attributes:
        samples: float32 [400], the first ``count`` of them in use.
        count: how many.
    """

    samples: np.ndarray
    count: int

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes + 8


def init_fbank_state() -> FbankState:
    return FbankState(np.zeros(FRAME_LENGTH, dtype=np.float32), 0)


def fbank_step(samples: np.ndarray, state: FbankState) -> tuple[np.ndarray, FbankState]:
    """The frames completed by ``samples`` (float [N], any N, 0 included): (float32 [T, 80], next state).

    Whatever the splits, the frames of all steps together are those of ``fbank`` over the whole recording, bit by bit.
    """
    joined = np.concatenate([state.samples[: state.count], np.asarray(samples, dtype=np.float32)])
    features = fbank(joined)
    rest = joined[len(features) * FRAME_SHIFT :]
    held = np.zeros(FRAME_LENGTH, dtype=np.float32)
    held[: len(rest)] = rest
    return features, FbankState(held, len(rest))
