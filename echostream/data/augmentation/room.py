"""Reverberation: synthetic room impulse responses, the direct sound first, and speech heard through them."""

from __future__ import annotations

import functools

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.errors import require

POOL = 64  # rooms that a process makes, once
DIRECT_DB = (-3.0, 12.0)  # direct sound above the reverberation: from across a room to close by
_POOL_SEED = 20_251


def room_tail(rt60: float, rng: np.random.Generator) -> np.ndarray:
    """What follows the direct sound in a room that takes ``rt60`` seconds to fall by 60 dB: float32, of energy 1.

    A dozen early reflections within 50 ms, and noise behind the first of them, both under one exponential decay; walls
    take more from high frequencies, by a random one-pole low-pass. The first sample, the direct sound's own, is 0.
    """
    scipy_signal = require("scipy.signal", "train")
    length = round(rt60 * SAMPLE_RATE)
    decay = 10 ** (-3 * np.arange(length) / length)  # amplitude: 60 dB from one end to the other
    tail = rng.standard_normal(length) * decay
    first = int(rng.uniform(0.001, 0.01) * SAMPLE_RATE)
    tail[: first + 1] = 0.0
    early = rng.integers(first, min(length, first + SAMPLE_RATE // 20), 12)
    tail[early] += rng.choice([-1.0, 1.0], 12) * rng.uniform(3, 10, 12) * decay[early]
    dampening = rng.uniform(0.0, 0.6)
    tail = scipy_signal.lfilter([1 - dampening], [1, -dampening], tail)
    return (tail / np.sqrt(np.sum(tail**2))).astype(np.float32)


@functools.lru_cache(maxsize=8)
def rooms(shortest: float, longest: float) -> list[np.ndarray]:
    """The tails of ``POOL`` rooms with RT60 evenly spread from ``shortest`` to ``longest`` seconds, the same in every
    process."""
    rng = np.random.default_rng(_POOL_SEED)
    return [room_tail(rt60, rng) for rt60 in np.linspace(shortest, longest, POOL)]


def add_reverb(samples: np.ndarray, tail: np.ndarray, direct_db: float) -> np.ndarray:
    """``samples`` [N] heard in a room, as loud as before: float32 [N], what rings on beyond the end cut off.

    The direct sound stays where it is; ``direct_db`` is its energy over that of the ``tail`` (``room_tail``).
    """
    scipy_signal = require("scipy.signal", "train")
    wet = scipy_signal.fftconvolve(samples, tail)[: len(samples)]
    heard = samples + np.float32(10 ** (-direct_db / 20)) * wet
    before, after = float(np.mean(samples**2)), float(np.mean(heard**2))
    return (heard * np.float32(np.sqrt(before / after))).astype(np.float32) if after > 0 else samples


def random_room(samples: np.ndarray, shortest: float, longest: float, rng: np.random.Generator) -> np.ndarray:
    """``samples`` [N] in one of the pool's ``rooms``, from a random distance."""
    pool = rooms(shortest, longest)
    return add_reverb(samples, pool[int(rng.integers(len(pool)))], rng.uniform(*DIRECT_DB))
