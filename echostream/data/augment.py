"""Augmentation of training speech: SpecAugment, speed perturbation, gain and noise.

Rooms, lines, other noises and voices (``--augment-speech``) have a package of their own, ``augmentation``.

Everything here takes its random generator from the caller, so that one (seed, epoch, item) always gives one result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from echostream.constants import FRAME_LENGTH, FRAME_SHIFT
from echostream.errors import ConfigError, require


@dataclass(frozen=True)
class SpecAugment:
    """Masks bands of mel bins and stretches of time (Park et al., 2019, without the time warp).

    Attributes:
        freq_masks, freq_width: masks per item and the greatest width of one, in mel bins.
        time_masks, time_width: masks and the greatest width of one, in feature frames (10 ms).
        time_share: greatest width of one time mask as a share of the item's frames.
        seconds_per_mask: long items get one set of time masks per that many seconds, so that a joined item is masked
            as densely as a single utterance; 0 gives every item the same number.
    """

    freq_masks: int = 2
    freq_width: int = 27
    time_masks: int = 2
    time_width: int = 100
    time_share: float = 1.0
    seconds_per_mask: float = 8.0

    @classmethod
    def parse(cls, text: str) -> SpecAugment | None:
        """``none``, ``lb``, ``ld``, ``sm`` (policies of the paper, ``sm`` milder) or ``field=value,...`` over ``ld``.

        Raises:
            ConfigError: an unknown policy, field or value.
        """
        text = text.strip().lower()
        if text in SPECAUGMENT_POLICIES:
            return SPECAUGMENT_POLICIES[text]
        values: dict[str, Any] = {}
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            name = name.strip()
            if not equals or name not in kinds:
                raise ConfigError(
                    f"SpecAugment {part.strip()!r} is neither one of {', '.join(SPECAUGMENT_POLICIES)} nor field=value "
                    f"with a field of {', '.join(kinds)}"
                )
            try:
                values[name] = int(value) if kinds[name] == "int" else float(value)
            except ValueError:
                raise ConfigError(f"SpecAugment {name} is {value!r}; it must be a number") from None
            if values[name] < 0:
                raise ConfigError(f"SpecAugment {name} is {value}; it must be at least 0")
        return cls(**values)

    def __call__(self, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Mask with zero, the mean after CMVN. ``features`` float32 ``[T, C]``, written in place and returned."""
        frames, bins = features.shape
        for _ in range(self.freq_masks):
            width = int(rng.integers(0, min(self.freq_width, bins) + 1))
            start = int(rng.integers(0, bins - width + 1))
            features[:, start : start + width] = 0.0
        repeats = 1 if self.seconds_per_mask == 0 else max(1, round(frames / 100 / self.seconds_per_mask))
        widest = min(self.time_width, int(self.time_share * frames / repeats))
        for _ in range(self.time_masks * repeats):
            width = int(rng.integers(0, widest + 1))
            start = int(rng.integers(0, frames - width + 1))
            features[start : start + width] = 0.0
        return features


SPECAUGMENT_POLICIES: dict[str, SpecAugment | None] = {
    "none": None,
    "lb": SpecAugment(freq_masks=1, time_masks=1),
    "ld": SpecAugment(),
    "sm": SpecAugment(freq_width=15, time_width=40, time_share=0.2),
}


def parse_speeds(text: str) -> tuple[float, ...]:
    """``"0.9,1.0,1.1"`` to factors; an empty string means no perturbation.

    Raises:
        ConfigError: a factor is not a number in [0.5, 2].
    """
    try:
        speeds = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"speed factors {text!r} are not numbers parted by commas") from None
    for speed in speeds:
        if not 0.5 <= speed <= 2.0:
            raise ConfigError(f"speed factor {speed} is out of range; it must lie between 0.5 and 2")
    return speeds or (1.0,)


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Resample ``samples`` [N] to N / speed samples: tempo and pitch change together."""
    if speed == 1.0:
        return samples
    soxr = require("soxr", "train")
    # Only the ratio matters; whole numbers keep soxr's own length exact.
    return soxr.resample(samples, round(speed * 1000), 1000, quality="MQ").astype(np.float32, copy=False)


def perturbed_frames(n_frames: int, speed: float) -> int:
    """Feature frames that a recording of ``n_frames`` is given after a change of speed.

    A manifest knows frames, not samples, so that the recording's true length is open by a frame; the dataset cuts or
    pads the samples to exactly this number of frames, which keeps the bucketing by length exact.
    """
    if speed == 1.0:
        return n_frames
    samples = FRAME_LENGTH + FRAME_SHIFT * (n_frames - 1) + FRAME_SHIFT // 2
    return max(1, 1 + round((samples / speed - FRAME_LENGTH) / FRAME_SHIFT))


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """Cut ``samples`` [N], or extend them with silence, to ``length`` samples."""
    if len(samples) >= length:
        return samples[:length]
    return np.concatenate([samples, np.zeros(length - len(samples), dtype=samples.dtype)])


def add_noise(samples: np.ndarray, level_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add white noise of ``level_db`` dBFS (RMS) to ``samples`` [N]."""
    return samples + np.float32(10 ** (level_db / 20)) * rng.standard_normal(len(samples), dtype=np.float32)


def change_gain(samples: np.ndarray, gain_db: float) -> np.ndarray:
    """Amplify ``samples`` [N] by ``gain_db``, but never beyond full scale."""
    peak = float(np.abs(samples).max(initial=0.0))
    gain = 10 ** (gain_db / 20)
    return samples * np.float32(min(gain, 1.0 / peak) if peak * gain > 1.0 else gain)
