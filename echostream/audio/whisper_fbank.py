"""Whisper's log-mel filter banks (Radford et al., 2022), without the future.

Whisper lifts every energy to the loudest frame of its 30 s less 8 decades. A stream does not know its loudest frame:
here the floor is fixed, where Whisper's lies for speech of ordinary level. Only numpy is needed, and as in ``fbank``
each frame depends on its own 400 samples alone, down to the last bit.
"""

from __future__ import annotations

import functools

import numpy as np

from echostream.audio.fbank import BLOCK, Filters
from echostream.constants import FRAME_LENGTH, FRAME_SHIFT, NUM_MEL_BINS, SAMPLE_RATE, WHISPER_FLOOR

# Samples of silence before a stream's first frame. Whisper's frame k lies around sample 160 k; with 20 ms of silence
# before the stream, its frame k + 1 ends at sample 160 k + 40, so that four frames end before an encoder frame does.
LEAD = FRAME_LENGTH - 40


@functools.lru_cache(maxsize=1)
def _window() -> np.ndarray:
    """A periodic Hann window [400]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME_LENGTH) / FRAME_LENGTH)).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _mel_filters() -> Filters:
    """Slaney's: linear below 1 kHz, logarithmic above, every triangle of the same area."""
    step, edge = 200.0 / 3, 1000.0
    ratio = np.log(6.4) / 27

    def hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < edge / step, mel * step, edge * np.exp(ratio * (mel - edge / step)))

    highest = edge / step + np.log(SAMPLE_RATE / 2 / edge) / ratio
    points = hertz(np.linspace(0.0, highest, NUM_MEL_BINS + 2))
    bins = np.arange(FRAME_LENGTH // 2 + 1) * SAMPLE_RATE / FRAME_LENGTH
    lower, centre, upper = (points[i : i + NUM_MEL_BINS, None] for i in range(3))
    triangles = np.maximum(0.0, np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)))
    return Filters.sparse(triangles * 2 / (upper - lower))


def whisper_fbank(samples: np.ndarray) -> np.ndarray:
    """80 log-mel energies every 10 ms, from windows of 25 ms that need not begin before ``LEAD`` samples of silence.

    Args:
        samples: float [N] at 16 kHz, full scale is 1; for a whole stream ``LEAD`` zeros come first.

    Returns:
        float32 [T, 80] with T = 1 + (N - 400) // 160: log10 of the energies, not below ``WHISPER_FLOOR``.
    """
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    count = max(0, 1 + (len(samples) - FRAME_LENGTH) // FRAME_SHIFT)
    out = np.empty((count, NUM_MEL_BINS), dtype=np.float32)
    if count == 0:
        return out
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME_LENGTH)[::FRAME_SHIFT]
    window, filters = _window(), _mel_filters()
    floor = np.float32(10.0**WHISPER_FLOOR)
    for begin in range(0, count, BLOCK):
        spectrum = np.fft.rfft(frames[begin : begin + BLOCK] * window, axis=1)
        np.log10(np.maximum(filters.energies(spectrum), floor), out=out[begin : begin + BLOCK])
    return out
