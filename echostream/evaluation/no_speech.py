"""Sounds in which nobody speaks, and the words that a model makes of them; the right number is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from echostream.checkpoint import Bundle
from echostream.constants import SAMPLE_RATE
from echostream.errors import ConfigError
from echostream.streaming.events import SentenceEnd
from echostream.streaming.session import StreamingSession
from echostream.text import has_letters

LEVELS_DB = (-50, -44, -38, -32, -26, -20)  # of full scale, root mean square; a sound's time is shared among them
PIECE_S = 10  # of sound made at a time
BEAT_S = 0.5  # 120 a minute
SCALE = (0, 2, 3, 5, 7, 8, 10)  # natural minor, in semitones
CHORDS = ((0, 3, 7), (8, 12, 15), (3, 7, 10), (10, 14, 17))  # i, VI, III, VII
ROOT_HZ = 110.0


def silence(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
    return np.zeros(count)


def white(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
    return rng.standard_normal(count)


def pink(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
    spectrum = np.fft.rfft(rng.standard_normal(count))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), count)


def hum(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
    """Of the mains, with the harmonics of a bad power supply."""
    t = (start + np.arange(count)) / SAMPLE_RATE
    return sum((np.sin(2 * np.pi * 50 * k * t) / k**1.5 for k in (1, 2, 3, 4, 6, 8)), np.zeros(()))


def music(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
    """Chords that change every four beats, a melody above them in notes of half a beat, bass drum, snare and hi-hat."""
    out = np.zeros(count)
    half = int(BEAT_S * SAMPLE_RATE / 2)
    t = np.arange(half) / SAMPLE_RATE
    for step, at in enumerate(range(0, count - half + 1, half), start // half):
        chord = CHORDS[step // 8 % len(CHORDS)]
        whole = np.arange(half) / SAMPLE_RATE + step % 8 * half / SAMPLE_RATE  # since the chord began
        part = sum(0.2 * np.exp(-0.7 * whole) * _tone(ROOT_HZ * 2 ** (n / 12), whole, 6) for n in chord)
        if rng.random() < 0.75:
            note = 12 * rng.integers(1, 3) + SCALE[rng.integers(len(SCALE))]
            bend = 1 + 0.004 * np.sin(2 * np.pi * 5.5 * t)  # a little vibrato
            part += 0.4 * np.exp(-4 * t) * _tone(ROOT_HZ * 2 ** (note / 12) * bend, t, 4)
        if step % 4 == 0:
            part += np.exp(-12 * t) * np.sin(2 * np.pi * (50 * t + 8 * (1 - np.exp(-30 * t))))
        if step % 4 == 2:
            part += 0.5 * np.exp(-18 * t) * rng.standard_normal(half)
        part += 0.1 * np.exp(-60 * t) * rng.standard_normal(half)
        out[at : at + half] = part
    return out


def _tone(hertz: float | np.ndarray, t: np.ndarray, harmonics: int) -> np.ndarray:
    return sum((np.sin(2 * np.pi * k * hertz * t) / k for k in range(1, harmonics + 1)), np.zeros(()))


SOUNDS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "silence": silence, "white noise": white, "pink noise": pink, "hum (50 Hz)": hum, "music": music,
}  # fmt: skip


def play(name: str, seconds: float, seed: int = 1) -> Iterator[np.ndarray]:
    """Pieces of float32 samples at 16 kHz, ``seconds`` in all, each level of ``LEVELS_DB`` as long as any other."""
    total, rng = round(seconds * SAMPLE_RATE), np.random.default_rng(seed)
    bounds = [total * i // len(LEVELS_DB) for i in range(len(LEVELS_DB) + 1)]
    for level, begin, end in zip(LEVELS_DB, bounds, bounds[1:]):
        for at in range(begin, end, PIECE_S * SAMPLE_RATE):
            piece = SOUNDS[name](rng, at, min(PIECE_S * SAMPLE_RATE, end - at))
            loudness = np.sqrt(np.mean(piece**2)) or 1.0
            yield np.clip(piece * (10 ** (level / 20) / loudness), -1, 1).astype(np.float32)


class Words(NamedTuple):
    """What was made of a sound: words of the translation and of the source's transcript, in so many seconds."""

    target: int
    source: int
    seconds: float
    text: str


def listen(bundle: Bundle, name: str, seconds: float, options: dict[str, Any], seed: int = 1) -> Words:
    """Play a sound to a session of ``options`` (see ``StreamingSession``), and count words.

    Raises:
        ConfigError: the time is not above 0, or an option is wrong.
    """
    if not seconds > 0:
        raise ConfigError(f"{seconds} s of sound cannot be played")
    session = StreamingSession(bundle, **options)
    ends = []
    for piece in play(name, seconds, seed):
        ends += [event for event in session.push(piece) if isinstance(event, SentenceEnd)]
    ends += [event for event in session.finish() if isinstance(event, SentenceEnd)]
    texts, sources = [e.text for e in ends], [e.source_text for e in ends]
    return Words(_count(texts), _count(sources), seconds, " ".join(" ".join(texts).split()))


def _count(texts: list[str]) -> int:
    return sum(has_letters(word) for text in texts for word in text.split())
