"""Training of nothing but the durations of a voice that exists, from units and their durations alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from echostream.errors import ConfigError
from echostream.models.decoders.vocoder import VocoderConfig
from echostream.models.decoders.vocoder_checkpoint import load_generator_state, load_weights
from echostream.models.decoders.vocoder_layers import WholeFlow
from echostream.vocoder.dataset import Batch, UtteranceSampler
from echostream.vocoder.losses import duration_loss
from echostream.vocoder.options import TrainerOptions
from echostream.vocoder.trainer import Trainer

# What suits this training better than the defaults of ``TrainerOptions``.
DURATION_OPTIONS = dict(batch_size=32, learning_rate=1.5e-3, clip=1.0)
PREDICTOR = "dur_predictor."


class DurationTrainer(Trainer):
    """Gives a voice a new duration predictor; all its other weights stay as they are, to the last bit.

    The rate falls linearly to zero at the run's limit, so there is no average of weights: what is trained is what is
    saved. Arguments are those of ``Trainer``; no recording is opened.

    Raises:
        ConfigError: the configuration has no duration predictor.
    """

    format = "echostream-duration-training/1"

    def __init__(self, config: VocoderConfig, options: TrainerOptions, *args: Any, **kwargs: Any):
        if config.dur_predictor_params is None:
            raise ConfigError("this vocoder has no duration predictor (dur_predictor_params); nothing to train")
        options = dataclasses.replace(options, weight_norm=False)
        super().__init__(config, options, *args, **kwargs)
        self.model = self.ema
        self.model.dur_predictor.requires_grad_(True)
        self._new_optimizer()
        self.limits: tuple[int | None, float | None] = None, None

    def initialize(self, checkpoint: Path) -> None:
        """Take the voice, and leave its predictor, of whatever kind."""
        voice = {key: w for key, w in load_generator_state(checkpoint).items() if not key.startswith(PREDICTOR)}
        fresh = {key: w for key, w in self.model.state_dict().items() if key.startswith(PREDICTOR)}
        load_weights(self.model, voice | fresh, f"vocoder checkpoint {checkpoint}")

    def _new_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.dur_predictor.parameters(), lr=self.options.learning_rate)

    def sampler(self) -> UtteranceSampler:
        return UtteranceSampler(self.train_items, self.options.batch_size, self.options.seed)

    def update(self, batch: Batch) -> dict[str, float]:
        """One update of the predictor; returns the loss."""
        steps, minutes = self.limits
        done = max(self.step / steps if steps else 0.0, self.minutes / minutes if minutes else 0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * max(0.0, 1 - done)
        predictor, flow = self.model.dur_predictor.train(), WholeFlow(batch.lengths)
        with self._autocast():
            scores = predictor(self.model.duration_input(batch.units, flow), flow)
        loss = duration_loss(scores, batch.durations, batch.lengths)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(predictor.parameters(), self.options.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        predictor.eval()
        self.step += 1
        return {"duration": loss.item(), "norm": norm.item()}

    def run(self, max_steps: int | None, max_minutes: float | None, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.run``, but both limits are of the whole run: the rate falls to zero towards the nearer one.

        Raises:
            ConfigError: there is no limit.
        """
        if max_steps is None and max_minutes is None:
            raise ConfigError("the learning rate falls to zero towards a limit; set max_steps or max_minutes")
        self.limits = max_steps, max_minutes
        left = None if max_minutes is None else max(0.0, max_minutes - self.minutes)
        super().run(max_steps, left, *args, **kwargs)

    def validate(self) -> dict[str, float]:
        """Error of the predicted durations, held-out utterances."""
        return self.validate_durations()
