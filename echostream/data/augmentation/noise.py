"""What is heard beside a speaker: coloured noise, other people (babble) and mains hum, at a ratio to the speech."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.errors import require

# Power falls by frequency to this exponent.
COLOURS = {"white": 0.0, "pink": 1.0, "brown": 2.0}
LOWEST_HZ = 20.0  # pink and brown noise rise no further below
HARMONICS = 12  # of the mains hum, its fundamental included
BLOCK = 320  # samples of a block whose power is taken (20 ms)
ACTIVE_DB = 30.0  # blocks so far below the loudest are pauses


def speech_power(samples: np.ndarray) -> float:
    """Mean power of ``samples`` [N] where someone speaks, so that pauses, joined ones too, do not count."""
    if len(samples) < BLOCK:
        return float(np.mean(samples**2)) if len(samples) else 0.0
    whole = len(samples) // BLOCK * BLOCK
    power = np.asarray(np.mean(samples[:whole].reshape(-1, BLOCK) ** 2, axis=1, dtype=np.float64))
    return float(np.mean(power[power >= power.max() * 10 ** (-ACTIVE_DB / 10)]))


def scale_noise(noise: np.ndarray, speech: np.ndarray, snr_db: float) -> np.ndarray:
    """``noise`` [N] as loud as ``snr_db`` below ``speech`` [N] wants it: float32 [N], zeros beside silence."""
    power = float(np.mean(noise**2, dtype=np.float64)) if len(noise) else 0.0
    if power == 0:
        return noise
    return noise * np.float32(np.sqrt(speech_power(speech) / power * 10 ** (-snr_db / 10)))


def coloured_noise(length: int, colour: str, rng: np.random.Generator) -> np.ndarray:
    """White, pink (-3 dB an octave) or brown noise (-6 dB): float32 [length], of any level."""
    if colour == "white":
        return rng.standard_normal(length, dtype=np.float32)
    scipy_fft = require("scipy.fft", "train")
    size = scipy_fft.next_fast_len(length, real=True)
    bins = size // 2 + 1
    spectrum = rng.standard_normal(2 * bins, dtype=np.float32).view(np.complex64)
    hertz = np.maximum(np.arange(bins, dtype=np.float32) * np.float32(SAMPLE_RATE / size), np.float32(LOWEST_HZ))
    spectrum *= hertz ** np.float32(-COLOURS[colour] / 2)
    return scipy_fft.irfft(spectrum, size)[:length]


def babble(length: int, voices: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Three to seven of ``voices`` (each float32 [any]) at once, each from a random place on and round again, about
    equally loud: float32 [length]."""
    chosen = rng.integers(0, len(voices), int(rng.integers(3, 8)))
    out = np.zeros(length, dtype=np.float32)
    for number in chosen:
        voice = voices[number]
        level = np.sqrt(speech_power(voice)) if len(voice) else 0.0
        if level == 0:
            continue
        start = int(rng.integers(len(voice)))
        turns = -(-(start + length) // len(voice))
        out += np.tile(voice, turns)[start : start + length] * np.float32(rng.uniform(0.5, 1.0) / level)
    return out


def mains_hum(length: int, mains_hz: float, rng: np.random.Generator) -> np.ndarray:
    """Hum of 50 or 60 Hz mains, up to 0.1 Hz off, with harmonics that weaken at random: float32 [length]."""
    cycles = np.arange(length) * ((mains_hz + rng.uniform(-0.1, 0.1)) / SAMPLE_RATE)
    slope = rng.uniform(0.5, 2.0)
    out = np.zeros(length, dtype=np.float32)
    for harmonic in range(1, HARMONICS + 1):
        amplitude = rng.uniform(0.2, 1.0) / harmonic**slope
        turns = harmonic * cycles + rng.random()
        out += np.float32(amplitude) * np.sin((2 * np.pi * (turns - np.floor(turns))).astype(np.float32))
    return out
