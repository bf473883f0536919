"""What ``echostream train-vocoder`` can set."""

from __future__ import annotations

from dataclasses import dataclass

from echostream.constants import UNIT_HOP
from echostream.errors import ConfigError
from echostream.vocoder.discriminators import DISCRIMINATOR_PRESETS


@dataclass(frozen=True)
class TrainerOptions:
    """What ``echostream train-vocoder`` can set. Frames are of 20 ms, steps are updates of the generator."""

    batch_size: int = 8
    piece_frames: int = 32
    warmup_frames: int = 3  # before a piece: only to fill the receptive field, no loss
    learning_rate: float = 5e-4
    learning_rate_discriminators: float = 2e-4
    learning_rate_warmup: int = 200
    half_life: int = 20000  # steps in which the learning rates halve
    mel_weight: float = 45.0
    stft_weight: float = 5.0
    feature_weight: float = 2.0
    duration_weight: float = 1.0
    frame_mel_weight: float = 10.0  # a linear read-out of the frame features, for training alone
    gan_start: int = 20000
    discriminators: str = "tiny"
    gan_pieces: int = 0  # pieces of a batch that the discriminators hear; 0: all
    ema: float = 0.999
    clip: float = 50.0
    bf16: bool = False
    weight_norm: bool = True
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "learning_rate_warmup", "half_life"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.piece_frames * UNIT_HOP < 1024:
            raise ConfigError(f"piece_frames is {self.piece_frames}; it must be at least 4 (1280 samples)")
        if self.discriminators not in DISCRIMINATOR_PRESETS:
            raise ConfigError(
                f"discriminators is {self.discriminators!r}; there are {', '.join(DISCRIMINATOR_PRESETS)}"
            )
