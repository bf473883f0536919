"""The training loop of the vocoder: spectral losses from the start, discriminators from a chosen step on."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from echostream.constants import UNIT_HOP
from echostream.errors import CheckpointError, ConfigError
from echostream.files import replacing
from echostream.loading import DAMAGE, parse_json, reason
from echostream.models.decoders.vocoder import CodeHiFiGAN, VocoderConfig
from echostream.models.decoders.vocoder_checkpoint import load_generator_state, load_weights, save_vocoder
from echostream.models.decoders.vocoder_layers import WholeFlow
from echostream.vocoder.dataset import Batch, PieceSampler, UnitUtterance, UtteranceSampler, read_samples
from echostream.vocoder.discriminators import build_discriminators
from echostream.vocoder.losses import (
    SpectralLoss,
    discriminator_loss,
    duration_loss,
    feature_loss,
    generator_loss,
    magnitude,
    mel_filters,
)
from echostream.vocoder.options import TrainerOptions
from echostream.weights import read_weights


class Trainer:
    """One training run of a vocoder in one directory.

    ``DurationTrainer`` (durations.py) trains a part of one by the same means.

    Args:
        config: shape of the generator.
        options: see there.
        train: utterances to learn from. held_out: utterances to validate on.
        directory: gets ``training.pt`` (everything to go on), ``vocoder.pt`` and ``vocoder.json`` (the EMA weights).
    """

    format = "echostream-vocoder-training/1"

    def __init__(
        self,
        config: VocoderConfig,
        options: TrainerOptions,
        train: list[UnitUtterance],
        held_out: list[UnitUtterance],
        directory: Path,
        device: str = "cpu",
    ):
        for item in (*train, *held_out) if config.multispkr else ():
            if item.speaker is None or item.speaker >= config.num_speakers:
                raise ConfigError(
                    f"multispkr is set, and {item.id} is of speaker {item.speaker}; the column speaker of units.tsv "
                    f"must hold numbers 0..{config.num_speakers - 1}"
                )
        torch.manual_seed(options.seed)
        self.config, self.options, self.directory, self.device = config, options, directory, torch.device(device)
        self.train_items, self.held_out = train, held_out
        self.model = CodeHiFiGAN(config).to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if options.weight_norm:
            self.model.add_weight_norm()
        self.discriminators: nn.Module | None = None
        self.spectral = SpectralLoss().to(self.device)
        # The gradient that reaches the unit and frame layers through the waveform is poor at first. A mel spectrogram
        # read straight from the frame features teaches them what to say while the upsampling learns how.
        self.readout = nn.Conv1d(config.upsample_initial_channel, self.spectral.filters.shape[0], 1).to(self.device)
        self._new_optimizer()
        self.optimizer_d: torch.optim.Optimizer | None = None
        self.step = 0
        self.minutes = 0.0

    # ----------------------------------------------------------------------------------------------- start and resume
    def initialize(self, checkpoint: Path) -> None:
        """Start from a generator's weights (``--init``): any ``{"generator": ...}`` file of the same shape."""
        state = load_generator_state(checkpoint)
        load_weights(self.ema, state, f"vocoder checkpoint {checkpoint}")
        self._set_weights(state)

    def _set_weights(self, state: dict[str, Tensor]) -> None:
        if self.options.weight_norm:
            self.model.remove_weight_norm()
        self.model.load_state_dict(state)
        if self.options.weight_norm:
            self.model.add_weight_norm()
        self._new_optimizer()

    def _new_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(
            [*self.model.parameters(), *self.readout.parameters()],
            lr=self.options.learning_rate,
            betas=(0.8, 0.99),
            weight_decay=0.01,
        )

    @property
    def checkpoint(self) -> Path:
        return self.directory / "training.pt"

    def save(self) -> None:
        """Write the run's state and the vocoder; a cut-off write leaves the files of before."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {
            "format": self.format,
            "config": json.dumps(self.config.to_dict()),
            "options": json.dumps(asdict(self.options)),
            "step": self.step,
            "minutes": self.minutes,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "readout": self.readout.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.discriminators is not None and self.optimizer_d is not None:
            content["discriminators"] = self.discriminators.state_dict()
            content["optimizer_d"] = self.optimizer_d.state_dict()
        with replacing(self.checkpoint) as file:
            torch.save(content, file)
        save_vocoder(self.ema, self.directory / "vocoder.pt", self.directory / "vocoder.json")

    def resume(self) -> bool:
        """Go on from the directory's ``training.pt``; False when there is none.

        Raises:
            CheckpointError: the file cannot be read, or is of another generator.
        """
        if not self.checkpoint.is_file():
            return False
        content = read_weights(self.checkpoint, "training checkpoint", self.device)
        if not isinstance(content, dict) or content.get("format") != self.format:
            raise CheckpointError(f"{self.checkpoint} is no checkpoint of such a training; use another directory")
        config = parse_json(str(content.get("config")), f"{self.checkpoint}: config", CheckpointError)
        if VocoderConfig.from_dict(config) != VocoderConfig.from_dict(self.config.to_dict()):
            raise CheckpointError(f"{self.checkpoint} is of another generator configuration; use another directory")
        normed = any("parametrizations" in str(key) for key in content.get("model") or ())
        if normed != self.options.weight_norm:
            raise CheckpointError(
                f"{self.checkpoint} was trained {'with' if normed else 'without'} weight norm; keep it so"
            )
        try:
            self.model.load_state_dict(content["model"])
            self.ema.load_state_dict(content["ema"])
            self.readout.load_state_dict(content["readout"])
            self.optimizer.load_state_dict(content["optimizer"])
            if "discriminators" in content:
                self._start_gan()
                self.discriminators.load_state_dict(content["discriminators"])
                self.optimizer_d.load_state_dict(content["optimizer_d"])
            self.step, self.minutes = int(content["step"]), float(content["minutes"])
        except DAMAGE as error:
            raise CheckpointError(
                f"{self.checkpoint} does not fit this training ({reason(error)}); remove it to start anew"
            ) from None
        return True

    def _start_gan(self) -> None:
        torch.manual_seed(self.options.seed + 1)
        self.discriminators = build_discriminators(self.options.discriminators).to(self.device)
        self.optimizer_d = torch.optim.AdamW(
            self.discriminators.parameters(), lr=self.options.learning_rate_discriminators, betas=(0.8, 0.99)
        )

    # --------------------------------------------------------------------------------------------------------- a step
    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16)

    def speak(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Generate the batch's pieces within their utterances.

        The unit layers see the whole utterance, the frame layers what they reach, the upsampling the piece.

        Returns:
            waveform [B, T], with the true samples wherever no loss is due, what the duration predictor says (see
            ``duration_loss``), and the log-mel spectrogram [B, 80, frames] as read from the frame features.
        """
        model, options = self.model, self.options
        piece = batch.wav.shape[1] // UNIT_HOP
        flow = WholeFlow(batch.lengths)
        with self._autocast():
            x = model.embed(batch.units, flow)
            scores = None
            if model.dur_predictor is not None:
                scores = model.dur_predictor(model.duration_input(batch.units, flow, x), flow)
            frames, frame_lengths = model.stretch(x, batch.durations, batch.lengths)
            # Only the frames that the piece can depend on, aligned at the piece's end; zeros stand before frame 0 and
            # behind an utterance's end, as they do in the generator itself.
            reach = model.conv_pre.left + sum(c.left for m in getattr(model, "frame_layers", ()) for c in m.convs)
            behind = model.conv_pre.right
            at = torch.arange(-reach, piece + behind, device=frames.device) + batch.begin[:, None]
            inside = (at >= 0) & (at < frame_lengths[:, None])
            at = at.clamp(0, frames.shape[2] - 1).unsqueeze(1)
            frames = frames.gather(2, at.expand(-1, frames.shape[1], -1))
            frames = model.with_speaker(frames, batch.speakers)
            features = model.frame_features(frames, _Masked(inside))[..., reach : reach + piece]
            waveform = model.upsample(features, WholeFlow(None))
            mel = self.readout(features)
        waveform = waveform.float()
        # True samples stand in where the receptive field was not filled, and behind an utterance's end.
        place = torch.arange(piece, device=frames.device)
        due = (place >= options.warmup_frames) | (batch.begin[:, None] == 0)
        due &= place < batch.valid[:, None]
        waveform = torch.where(due.repeat_interleave(UNIT_HOP, 1), waveform, batch.wav)
        return waveform, scores, mel.float()

    def update(self, batch: Batch) -> dict[str, float]:
        """One update of the generator, and of the discriminators once they have started; returns the losses."""
        options = self.options
        self.model.train()
        rate = min(1.0, (self.step + 1) / options.learning_rate_warmup) * 0.5 ** (self.step / options.half_life)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        fake, scores, frame_mel = self.speak(batch)
        logs: dict[str, float] = {}
        if self.step >= options.gan_start and self.discriminators is None:
            self._start_gan()
        if self.discriminators is not None:
            for group in self.optimizer_d.param_groups:
                group["lr"] = options.learning_rate_discriminators * rate
            heard = options.gan_pieces or len(fake)
            with self._autocast():
                real_scores, real_features = self.discriminators(batch.wav[:heard])
                fake_scores, _ = self.discriminators(fake[:heard].detach())
            loss_d = discriminator_loss(real_scores, fake_scores)
            self.optimizer_d.zero_grad(set_to_none=True)
            loss_d.backward()
            self.optimizer_d.step()
            logs["discriminator"] = loss_d.item()
        mel, stft = self.spectral(fake, batch.wav)
        spoken = torch.arange(frame_mel.shape[2], device=self.device) < batch.valid[:, None]
        frame_loss = (frame_mel - self.spectral.frame_mel(batch.wav)).abs().mean(1)[spoken].mean()
        loss = options.mel_weight * mel + options.stft_weight * stft + options.frame_mel_weight * frame_loss
        losses = dict(mel=mel, stft=stft, frame_mel=frame_loss)
        if scores is not None:
            losses["duration"] = duration_loss(scores, batch.durations, batch.lengths)
            loss = loss + options.duration_weight * losses["duration"]
        if self.discriminators is not None:
            self.discriminators.requires_grad_(False)
            with self._autocast():
                fake_scores, fake_features = self.discriminators(fake[:heard])
            # The real features are those of before the discriminators' update: a pass saved, a step's difference.
            adversarial = generator_loss(fake_scores)
            matching = feature_loss(real_features, fake_features)
            loss = loss + adversarial + options.feature_weight * matching
            logs["adversarial"], logs["features"] = adversarial.item(), matching.item()
            self.discriminators.requires_grad_(True)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([*self.model.parameters(), *self.readout.parameters()], options.clip)
        if torch.isfinite(norm):  # one bad batch must not end a run of hours
            self.optimizer.step()
        self.step += 1
        if self.step % 10 == 0:
            self._average(10)
        logs.update({name: value.item() for name, value in {**losses, "norm": norm}.items()})
        return logs

    @torch.no_grad()
    def _average(self, every: int) -> None:
        """Move the exponential average by ``every`` steps; young runs average over less."""
        decay = min(self.options.ema, 1 - 1 / (1 + self.step / 10)) ** every
        target = dict(self.ema.named_parameters())
        for name, module in self.model.named_modules():
            if nn.utils.parametrize.is_parametrized(module):
                target[f"{name}.weight"].lerp_(module.weight, 1 - decay)
            elif "parametrizations" not in name:
                for key, value in module.named_parameters(recurse=False):
                    target[f"{name}.{key}" if name else key].lerp_(value, 1 - decay)
        for name, module in self.model.named_modules():  # biases of parametrised modules
            if nn.utils.parametrize.is_parametrized(module) and module.bias is not None:
                target[f"{name}.bias"].lerp_(module.bias, 1 - decay)

    # ------------------------------------------------------------------------------------------------------- the loop
    def sampler(self) -> PieceSampler | UtteranceSampler:
        frames = self.options.piece_frames + self.options.warmup_frames
        return PieceSampler(self.train_items, self.options.batch_size, frames, self.options.seed)

    def run(
        self,
        max_steps: int | None,
        max_minutes: float | None,
        save_minutes: float,
        log_steps: int = 50,
        validate_minutes: float | None = None,
        on_log: Callable[[int, dict[str, float]], None] | None = None,
        on_validate: Callable[[Trainer], dict[str, float]] | None = None,
    ) -> None:
        """Train until a limit. Minutes count from this call; ``minutes`` of the run go on over resumes."""
        sampler = self.sampler()
        begin = saved = validated = time.monotonic()
        before = self.minutes
        sums: dict[str, list[float]] = {}
        bar = tqdm(total=max_steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=5)
        try:
            while max_steps is None or self.step < max_steps:
                for name, value in self.update(sampler.batch(self.step).to(self.device)).items():
                    sums.setdefault(name, []).append(value)
                bar.update(1)
                now = time.monotonic()
                self.minutes = before + (now - begin) / 60
                if self.step % log_steps == 0 and on_log is not None:
                    logs = {name: float(np.mean(values)) for name, values in sums.items()}
                    bar.set_postfix({name: f"{logs[name]:.3f}" for name in ("mel", "stft", "duration") if name in logs})
                    on_log(self.step, logs)
                    sums.clear()
                if now - saved > save_minutes * 60:
                    self.save()
                    saved = time.monotonic()
                if on_validate is not None and validate_minutes and now - validated > validate_minutes * 60:
                    on_validate(self)
                    validated = time.monotonic()
                if max_minutes is not None and now - begin > max_minutes * 60:
                    break
        except KeyboardInterrupt:
            bar.write(f"interrupted at step {self.step}; call again to go on")
        finally:
            bar.close()
        self.save()

    # ----------------------------------------------------------------------------------------------------- validation
    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mel L1 with true durations, error of the predicted durations; EMA weights, held-out utterances."""
        mels = []
        for item, wav in self.resynthesize(len(self.held_out), true_durations=True):
            real = torch.from_numpy(read_samples(item)).unsqueeze(0).to(self.device)
            mels.append(float(self.spectral(torch.from_numpy(wav).unsqueeze(0).to(self.device), real)[0]))
        return {"mel": float(np.mean(mels)), **self.validate_durations()}

    @torch.no_grad()
    def validate_durations(self) -> dict[str, float]:
        """Mean absolute error of the predicted durations in frames, and predicted over true length."""
        if self.ema.dur_predictor is None:
            return {}
        errors, ratios = [], []
        for item in self.held_out:
            units = torch.from_numpy(item.units).unsqueeze(0).to(self.device)
            flow = WholeFlow(None)
            predicted = self.ema.predict_durations(self.ema.duration_input(units, flow), flow)[0].cpu().numpy()
            errors.append(np.abs(predicted - item.durations).mean())
            ratios.append(predicted.sum() / item.durations.sum())
        return {"duration_error_frames": float(np.mean(errors)), "duration_ratio": float(np.mean(ratios))}

    @torch.no_grad()
    def resynthesize(self, count: int, true_durations: bool = False) -> Iterator[tuple[UnitUtterance, np.ndarray]]:
        """The first ``count`` held-out utterances spoken from their units alone, durations predicted."""
        for item in self.held_out[:count]:
            units = torch.from_numpy(item.units).unsqueeze(0).to(self.device)
            durations = torch.from_numpy(item.durations).unsqueeze(0).to(self.device) if true_durations else None
            wav, _ = self.ema(units, durations=durations, speakers=self._speaker(item))
            yield item, wav[0].float().cpu().numpy()

    def _speaker(self, item: UnitUtterance) -> Tensor | None:
        return None if item.speaker is None else torch.tensor([item.speaker], device=self.device)


class _Masked(WholeFlow):
    """Zeros before an utterance's first frame and behind its last, at every convolution's own input."""

    def __init__(self, inside: Tensor):
        super().__init__(inside)
        self.mask = inside.unsqueeze(1)


def tensorboard_writer(directory: Path) -> Any | None:
    """A tensorboard writer, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"))


def picture(wav: np.ndarray) -> Tensor:
    """Log-mel spectrogram of wav [T] as an image [1, 80, frames] in [0, 1], low frequencies at the bottom."""
    size = 1024
    spectrum = magnitude(torch.from_numpy(wav).unsqueeze(0), size, 256, torch.hann_window(size))
    mel = (mel_filters(size) @ spectrum).clamp(min=1e-4).log10()[0]
    return ((mel + 4) / 4).clamp(0, 1).flip(0).unsqueeze(0)
