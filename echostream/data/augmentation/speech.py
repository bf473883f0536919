"""The option ``--augment-speech``: which disguises, how often and how strong, and the chain that applies them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from echostream.data.augmentation import channel, noise, room, voice
from echostream.errors import ConfigError

Voices = Callable[[], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Effect:
    """One kind of disguise.

    Attributes:
        probability: share of the items that get it.
        low, high: the range that its strength is drawn from, evenly.
        kinds: which of its variants, all equally often.
    """

    probability: float
    low: float = 0.0
    high: float = 0.0
    kinds: tuple[str, ...] = ()

    def strength(self, rng: np.random.Generator) -> float:
        return float(rng.uniform(self.low, self.high))

    def kind(self, rng: np.random.Generator) -> str:
        return self.kinds[int(rng.integers(len(self.kinds)))]


NOISES = (*noise.COLOURS, "babble")
DEFAULTS = {
    "formant": Effect(1.0, 0.85, 1.2),
    "reverb": Effect(1.0, 0.1, 0.7),
    "noise": Effect(1.0, 5.0, 30.0, NOISES),
    "hum": Effect(1.0, 15.0, 40.0),
    "band": Effect(1.0, kinds=channel.BANDS),
    "codec": Effect(1.0, kinds=channel.CODECS),
    "clip": Effect(1.0, 0.001, 0.02),
    "gain": Effect(1.0, -35.0, 0.0),
}
# What a range may hold, and in what unit.
LIMITS = {
    "formant": (0.5, 2.0, "a factor"),
    "reverb": (0.05, 3.0, "seconds of RT60"),
    "noise": (-20.0, 80.0, "dB of signal-to-noise ratio"),
    "hum": (-20.0, 80.0, "dB of signal-to-hum ratio"),
    "clip": (0.0, 0.5, "a share of the samples"),
    "gain": (-90.0, 0.0, "dBFS of peak"),
}
PRESETS = {
    "none": "",
    "people": "formant=0.3:0.85..1.2,reverb=0.3:0.1..0.7,noise=0.5:5..30,hum=0.1:15..40,band=0.3,codec=0.2,"
    "clip=0.1:0.001..0.02,gain=-35..0",
}


@dataclass(frozen=True)
class SpeechAugment:
    """What is done to recordings; None leaves a step out, and draws nothing for it.

    Attributes:
        formant: formants and pitch times a factor; the time scale stays.
        reverb: a room, by its RT60 in seconds.
        noise: noise at a signal-to-noise ratio in dB; kinds ``white``, ``pink``, ``brown``, ``babble``.
        hum: 50 or 60 Hz and harmonics, at a ratio in dB.
        band: kinds ``lowpass``, ``highpass``, ``rate`` (recorded at 8 to 12 kHz), ``telephone`` (300 to 3400 Hz).
        codec: kinds ``mulaw``, ``alaw`` (at 8 kHz) and ``pcm8`` (8-bit linear, as in old games).
        clip: a share of the samples cut off.
        gain: the peak's level in dBFS.
    """

    formant: Effect | None = None
    reverb: Effect | None = None
    noise: Effect | None = None
    hum: Effect | None = None
    band: Effect | None = None
    codec: Effect | None = None
    clip: Effect | None = None
    gain: Effect | None = None

    @classmethod
    def parse(cls, text: str) -> SpeechAugment | None:
        """``people``, ``none``, or ``NAME=VALUE,...``, also behind ``people`` to change it: ``people,noise=0``.

        A value is a probability, a range ``LOW..HIGH``, kinds ``A+B``, or several of them with colons between:
        ``noise=0.5:5..30:pink+babble``. Without a probability an effect is always applied; 0 turns it off.

        Raises:
            ConfigError: an unknown name or kind, or a value out of range.
        """
        chosen = cls()
        for part in text.strip().lower().split(","):
            part = part.strip()
            if part in PRESETS:
                chosen = cls.parse(PRESETS[part]) or cls()
                continue
            name, equals, value = part.partition("=")
            name = name.strip()
            if part and (not equals or name not in DEFAULTS):
                raise ConfigError(
                    f"augment-speech {part!r} is neither one of {', '.join(PRESETS)} nor name=value with a name of "
                    f"{', '.join(DEFAULTS)}"
                )
            if part:
                effect = _parse_effect(name, value)
                chosen = replace(chosen, **{name: effect if effect.probability else None})
        return chosen if any(getattr(chosen, f.name) for f in fields(cls)) else None

    def change_voice(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The part of the chain that belongs to a speaker, for one utterance [N]: formants. Float32 [N]."""
        if _drawn(self.formant, rng):
            factor = math.exp(rng.uniform(math.log(self.formant.low), math.log(self.formant.high)))
            samples = voice.shift_formants(samples, round(factor, 3))
        return samples

    def record(self, samples: np.ndarray, rng: np.random.Generator, voices: Voices | None = None) -> np.ndarray:
        """The part that belongs to a recording [N], joined sentences and pauses alike: room, noise, hum, band, codec,
        clipping, level. Float32 [N].

        Args:
            voices: gives the recordings that babble is made of; without any, the other kinds of noise stand in.

        Raises:
            ConfigError: the only kind of noise is babble, and there are no voices.
        """
        if _drawn(self.reverb, rng):
            samples = room.random_room(samples, self.reverb.low, self.reverb.high, rng)
        clean = samples
        if _drawn(self.noise, rng):
            beside = self._noise(len(clean), rng, voices)
            samples = samples + noise.scale_noise(beside, clean, self.noise.strength(rng))
        if _drawn(self.hum, rng):
            hum = noise.mains_hum(len(samples), (50.0, 60.0)[int(rng.integers(2))], rng)
            samples = samples + noise.scale_noise(hum, clean, self.hum.strength(rng))
        if _drawn(self.band, rng):
            samples = channel.random_band(samples, self.band.kind(rng), rng)
        if _drawn(self.codec, rng):
            samples = channel.random_codec(samples, self.codec.kind(rng), rng)
        if _drawn(self.clip, rng):
            samples = channel.clip_share(samples, self.clip.strength(rng))
        if _drawn(self.gain, rng):
            samples = channel.set_peak(samples, self.gain.strength(rng))
        return samples

    def _noise(self, length: int, rng: np.random.Generator, voices: Voices | None) -> np.ndarray:
        kind = self.noise.kind(rng)
        if kind != "babble":
            return noise.coloured_noise(length, kind, rng)
        others = voices() if voices is not None else ()
        if len(others):
            return noise.babble(length, others, rng)
        colours = [k for k in self.noise.kinds if k != "babble"]
        if not colours:
            raise ConfigError("augment-speech noise of babble alone needs recordings of other people; add pink, say")
        return noise.coloured_noise(length, colours[int(rng.integers(len(colours)))], rng)


def _drawn(effect: Effect | None, rng: np.random.Generator) -> bool:
    return effect is not None and rng.random() < effect.probability


def _parse_effect(name: str, text: str) -> Effect:
    effect = DEFAULTS[name]
    for value in text.split(":"):
        value = value.strip()
        low, dots, high = value.partition("..")
        if dots:
            effect = replace(effect, **_parse_range(name, value, low, high))
        elif _number(value) is not None:
            probability = _number(value)
            if not 0 <= probability <= 1:
                raise ConfigError(
                    f"augment-speech {name} has the probability {value}; it must lie in [0, 1] (a range is LOW..HIGH)"
                )
            effect = replace(effect, probability=probability)
        else:
            kinds = tuple(kind.strip() for kind in value.split("+"))
            if not effect.kinds or not set(kinds) <= set(DEFAULTS[name].kinds):
                known = f", kinds of {', '.join(effect.kinds)} with + between" if effect.kinds else ""
                raise ConfigError(
                    f"augment-speech {name} is {value!r}; it must be a probability, a range LOW..HIGH{known}"
                )
            effect = replace(effect, kinds=kinds)
    return effect


def _parse_range(name: str, value: str, low: str, high: str) -> dict[str, float]:
    if name not in LIMITS:
        raise ConfigError(f"augment-speech {name} has no range, but {value} was given")
    least, most, unit = LIMITS[name]
    numbers = _number(low), _number(high)
    if None in numbers or not least <= numbers[0] <= numbers[1] <= most:
        raise ConfigError(
            f"augment-speech {name} has the range {value}; it must be LOW..HIGH, {unit}, within {least:g}..{most:g}"
        )
    return {"low": numbers[0], "high": numbers[1]}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
