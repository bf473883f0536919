"""Another voice: formants and pitch moved together, the time scale kept."""

from __future__ import annotations

import numpy as np

from echostream.data.augment import change_speed, fit_length

HOP = 320  # samples between two windows of the result (20 ms)
WINDOW = 2 * HOP
SEARCH = 160  # a window may be taken so many samples early or late: both ways together, a period of 50 Hz
COARSE = 4  # the search looks at every fourth sample first
_EDGE = WINDOW + 2 * SEARCH
_HANN = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


def shift_formants(samples: np.ndarray, factor: float) -> np.ndarray:
    """Multiply formants *and* fundamental frequency of ``samples`` [N] by ``factor``, as a shorter throat would (> 1).

    Resampling moves both (and the tempo), then WSOLA gives the old length back: float32 [N].
    """
    if factor == 1.0 or len(samples) == 0:
        return samples
    return stretch(change_speed(samples, factor), len(samples))


def stretch(samples: np.ndarray, length: int) -> np.ndarray:
    """``samples`` [N] made to last ``length`` samples at the same pitch, as float32 [length].

    WSOLA (Verhelst & Roelands, 1993): windows of 40 ms are taken at the other pace and added at half overlap, each from
    where it continues the one before best (normalised correlation, within 10 ms of its place).
    """
    pace = len(samples) / length
    windows = -(-length // HOP) + 1
    # Window k covers HOP * (k - 1) onwards of the result, so that the first sample already has two windows.
    wanted = _EDGE + np.round((np.arange(windows) - 1) * HOP * pace).astype(np.int64)
    padded = np.concatenate([np.zeros(_EDGE, np.float32), samples.astype(np.float32, copy=False)])
    padded = fit_length(padded, (int(wanted[-1]) + HOP + _EDGE) // COARSE * COARSE + COARSE)
    coarse = padded.reshape(-1, COARSE).mean(axis=1)
    size = WINDOW // COARSE
    energy = np.concatenate([[0.0], np.cumsum(coarse.astype(np.float64) ** 2)])
    scale = (1.0 / np.sqrt(energy[size:] - energy[:-size] + 1e-6)).astype(np.float32)
    starts = np.empty(windows, dtype=np.int64)
    starts[0] = wanted[0]
    for k in range(1, windows):
        follows = int(starts[k - 1]) + HOP
        first = (int(wanted[k]) - SEARCH) // COARSE
        last = first + 2 * SEARCH // COARSE
        # Floor division of the template's place is corrected by the fine search below.
        template = coarse[follows // COARSE : follows // COARSE + size]
        likeness = np.correlate(coarse[first : last + size], template) * scale[first : last + 1]
        near = (first + int(likeness.argmax())) * COARSE - COARSE
        fine = np.correlate(padded[near : near + WINDOW + 2 * COARSE], padded[follows : follows + WINDOW])
        starts[k] = near + int(fine.argmax())
    pieces = padded[starts[:, None] + np.arange(WINDOW)] * _HANN
    return (pieces[:-1, HOP:] + pieces[1:, :HOP]).reshape(-1)[:length]
