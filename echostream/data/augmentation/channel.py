"""What a microphone, a line or a file format does: narrower bands, coarser samples, clipping, another level."""

from __future__ import annotations

import functools

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.data.augment import fit_length
from echostream.errors import require

TELEPHONE_HZ = (300.0, 3400.0)
LOW_RATES = (8_000, 11_025, 12_000)  # of old recordings, samples a second
# Cut-off frequencies are drawn from these, so that the filters can be kept.
LOW_PASS_HZ = tuple(np.geomspace(2500, 7000, 16).round().tolist())
HIGH_PASS_HZ = tuple(np.geomspace(60, 500, 16).round().tolist())
BANDS = ("lowpass", "highpass", "rate", "telephone")
CODECS = ("mulaw", "alaw", "pcm8")
CODEC_PEAK_DB = (-12.0, 0.0)  # how far a codec is driven: its input's peak, dBFS
PCM8_RATES = (8_000, 11_025, SAMPLE_RATE)


@functools.lru_cache(maxsize=64)
def band_filter(low_hz: float | None, high_hz: float | None) -> np.ndarray:
    """Butterworth sections that pass ``low_hz`` to ``high_hz``: 24 dB an octave below, 48 above."""
    scipy_signal = require("scipy.signal", "train")
    parts = []
    if low_hz:
        parts.append(scipy_signal.butter(4, low_hz, "highpass", fs=SAMPLE_RATE, output="sos"))
    if high_hz:
        parts.append(scipy_signal.butter(8, high_hz, "lowpass", fs=SAMPLE_RATE, output="sos"))
    return np.concatenate(parts)


def limit_band(samples: np.ndarray, low_hz: float | None, high_hz: float | None) -> np.ndarray:
    """``samples`` [N] between two frequencies (None: no limit on that side): float32 [N]."""
    scipy_signal = require("scipy.signal", "train")
    # In double precision: in single, sections tuned to 60 Hz add noise of their own.
    return scipy_signal.sosfilt(band_filter(low_hz, high_hz), samples).astype(np.float32)


def at_rate(samples: np.ndarray, rate: int) -> np.ndarray:
    """``samples`` [N] at 16 kHz, resampled to ``rate``."""
    if rate == SAMPLE_RATE:
        return samples
    return require("soxr", "train").resample(samples, SAMPLE_RATE, rate, quality="MQ")


def from_rate(samples: np.ndarray, rate: int, length: int) -> np.ndarray:
    """Back to 16 kHz, float32 [length]."""
    if rate != SAMPLE_RATE:
        samples = require("soxr", "train").resample(samples, rate, SAMPLE_RATE, quality="MQ")
    return fit_length(samples.astype(np.float32, copy=False), length)


def random_band(samples: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """``samples`` [N] through one of ``BANDS``: a low-pass, a high-pass, a low sampling rate, or a telephone line."""
    if kind == "telephone":
        return limit_band(samples, *TELEPHONE_HZ)
    if kind == "lowpass":
        return limit_band(samples, None, LOW_PASS_HZ[int(rng.integers(len(LOW_PASS_HZ)))])
    if kind == "highpass":
        return limit_band(samples, HIGH_PASS_HZ[int(rng.integers(len(HIGH_PASS_HZ)))], None)
    rate = LOW_RATES[int(rng.integers(len(LOW_RATES)))]
    return from_rate(at_rate(samples, rate), rate, len(samples))


@functools.cache
def codec_table(codec: str) -> np.ndarray:
    """What one of ``CODECS`` makes of each 16-bit sample, from -32768 on: float32 [65536] with at most 256 values.

    ``mulaw`` and ``alaw`` are the continuous laws of G.711 (mu = 255, A = 87.6) in 256 even steps; ``pcm8`` is linear.
    """
    x = np.arange(-32768, 32768) / 32768
    size = np.abs(x)
    if codec == "pcm8":
        return (np.clip(np.round(x * 128), -128, 127) / 128).astype(np.float32)
    if codec == "mulaw":
        law = np.log1p(255 * size) / np.log(256)
    else:
        law = np.where(size < 1 / 87.6, 87.6 * size, 1 + np.log(np.maximum(87.6 * size, 1))) / (1 + np.log(87.6))
    step = (np.minimum(np.floor(law * 128), 127) + 0.5) / 128
    if codec == "mulaw":
        size = np.expm1(step * np.log(256)) / 255
    else:
        grown = step * (1 + np.log(87.6))
        size = np.where(grown < 1, grown, np.exp(grown - 1)) / 87.6
    return np.where(x < 0, -size, size).astype(np.float32)


def quantise(samples: np.ndarray, codec: str) -> np.ndarray:
    """``samples`` [N], clipped at full scale, as ``codec`` keeps them: float32 [N] with at most 256 values."""
    index = np.clip(np.rint(samples * 32768) + 32768, 0, 65535)
    return codec_table(codec)[index.astype(np.int64)]


def random_codec(samples: np.ndarray, codec: str, rng: np.random.Generator) -> np.ndarray:
    """``samples`` [N] kept in 8 bits: a telephone's at 8 kHz, or linear at a rate of ``PCM8_RATES``; as loud as before.

    The codec is driven to a peak of ``CODEC_PEAK_DB``, whatever level the samples have.
    """
    rate = PCM8_RATES[int(rng.integers(len(PCM8_RATES)))] if codec == "pcm8" else 8_000
    drive_db = rng.uniform(*CODEC_PEAK_DB)
    coarse = at_rate(samples, rate)
    peak = float(np.abs(coarse).max(initial=0.0))
    if peak == 0:
        return samples
    drive = np.float32(10 ** (drive_db / 20) / peak)
    return from_rate(quantise(coarse * drive, codec) / drive, rate, len(samples))


def clip_share(samples: np.ndarray, share: float) -> np.ndarray:
    """Cut the loudest ``share`` (0 to 1) of ``samples`` [N] off at their own level, as an overdriven input does."""
    count = round(share * len(samples))
    if count == 0:
        return samples
    size = np.abs(samples)
    limit = np.partition(size, len(size) - count)[len(size) - count]
    return np.clip(samples, -limit, limit)


def set_peak(samples: np.ndarray, peak_db: float) -> np.ndarray:
    """``samples`` [N] with their peak at ``peak_db`` dBFS; silence stays."""
    peak = float(np.abs(samples).max(initial=0.0))
    return samples * np.float32(10 ** (peak_db / 20) / peak) if peak > 0 else samples
