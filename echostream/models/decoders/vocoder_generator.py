"""The layers of CodeHiFiGAN and what is computed of them; ``vocoder`` puts them together, offline and streaming."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.errors import UnitError
from echostream.models.decoders.vocoder_config import VocoderConfig
from echostream.models.decoders.vocoder_layers import (
    SLOPE,
    ContextLayer,
    Conv,
    DurationClassifier,
    DurationPredictor,
    Flow,
    ResBlock,
    Upsample,
)

NORMED = ("conv_pre", "ups", "resblocks", "conv_post")  # parts that carry weight norm in the field's checkpoints


class Generator(nn.Module):
    """What ``CodeHiFiGAN`` is made of.

    Args:
        config: a ``VocoderConfig`` or the contents of a config.json.

    Raises:
        ConfigError: the configuration cannot be built.
    """

    def __init__(self, config: VocoderConfig | Mapping[str, Any]):
        super().__init__()
        self.config = cfg = config if isinstance(config, VocoderConfig) else VocoderConfig.from_dict(config)
        causal, widths = cfg.causal, (cfg.upsample_initial_channel, *cfg.channels)
        self.dict = nn.Embedding(cfg.num_embeddings, cfg.embedding_dim)
        if cfg.multispkr:
            self.spkr = nn.Embedding(cfg.num_speakers, cfg.embedding_dim)
        params = cfg.dur_predictor_params
        self.dur_predictor: DurationPredictor | DurationClassifier | None = None
        if params is not None and params.var_pred_max_frames:
            self.dur_predictor = DurationClassifier(params, cfg.num_embeddings, cfg.lookahead_units)
        elif params is not None:
            self.dur_predictor = DurationPredictor(params, causal)
        if cfg.context_layers:
            self.context = nn.ModuleList(
                ContextLayer(cfg.embedding_dim, cfg.context_kernel_size, 0 if i else cfg.lookahead_units)
                for i in range(cfg.context_layers)
            )
        if cfg.position_buckets:
            self.position = nn.Embedding(2 * cfg.position_buckets, cfg.embedding_dim)
        self.conv_pre = Conv(cfg.input_width, widths[0], 7, causal=causal)
        if cfg.frame_layers:
            self.frame_layers = nn.ModuleList(
                ResBlock(widths[0], cfg.frame_kernel_size, [2**i], "2", causal) for i in range(cfg.frame_layers)
            )
        self.ups = nn.ModuleList(
            Upsample(widths[i], widths[i + 1], kernel, rate, causal)
            for i, (rate, kernel) in enumerate(zip(cfg.upsample_rates, cfg.upsample_kernel_sizes))
        )
        stages = len(self.ups) if cfg.resblock_stages is None else cfg.resblock_stages
        self.resblocks = nn.ModuleList(
            ResBlock(widths[i + 1], kernel, dilations, cfg.resblock, causal)
            for i in range(stages)
            for kernel, dilations in zip(cfg.resblock_kernel_sizes, cfg.resblock_dilation_sizes)
        )
        self.conv_post = Conv(widths[-1], 1, 7, causal=causal)
        self._initialize()

    def _initialize(self) -> None:
        # HiFi-GAN's N(0, 0.01) relies on weight norm and long training. Fan-in scaling starts at sensible levels
        # with or without it, which a short training on a CPU needs.
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and name.startswith(("ups", "resblocks", "frame")):
                fan = module.in_channels * module.kernel_size[0]
                if isinstance(module, nn.ConvTranspose1d):
                    fan //= module.stride[0]
                scale = 0.5 if name.startswith(("resblocks", "frame")) else 1.0  # residual branches start small
                nn.init.normal_(module.weight, std=scale / math.sqrt(max(fan, 1)))
                nn.init.zeros_(module.bias)

    # ------------------------------------------------------------------------------------------------------ look-ahead
    @property
    def hop(self) -> int:
        """Samples per frame."""
        return self.config.code_hop_size

    @property
    def lookahead_frames(self) -> int:
        """Frames behind the current one that the layers after the durations see."""
        return self.field[1]

    @property
    def field(self) -> tuple[int, int]:
        """Frames of context (before, behind) that the samples of one frame depend on, followed back layer by layer."""
        low, high = 0, self.hop - 1  # sample positions of frame 0, then positions at ever lower rates
        low, high = low - self.conv_post.left, high + self.conv_post.right
        for i in reversed(range(len(self.ups))):
            convs = [block.in_order() for block in self.blocks(i)]
            low -= max((sum(c.left for c in block) for block in convs), default=0)
            high += max((sum(c.right for c in block) for block in convs), default=0)
            up = self.ups[i]
            kernel, padding = up.kernel_size[0], up.padding[0]
            low = math.ceil((low + padding - kernel + 1) / up.rate)
            high = math.floor((high + padding) / up.rate)
        for layer in (self.conv_pre, *(m for m in getattr(self, "frame_layers", ()) for m in m.convs)):
            low, high = low - layer.left, high + layer.right
        return -low, max(high, 0)

    @property
    def lookahead_units(self) -> int:
        """Units that must have come behind unit u before u's last sample can be given out, durations included.

        Counted for units of one frame, the worst case: a frame ahead may be one unit ahead, and that unit's duration
        must be known too.
        """
        if self.config.causal:
            return self.config.lookahead_units
        return self.lookahead_frames + (self.dur_predictor.right if self.dur_predictor is not None else 0)

    @property
    def lookahead_ms(self) -> float:
        """``lookahead_units`` in ms of speech at one frame per unit."""
        return 1000.0 * self.lookahead_units * self.hop / self.config.sampling_rate

    # ------------------------------------------------------------------------------------------------------ the parts
    def blocks(self, stage: int) -> nn.ModuleList:
        """The residual blocks behind upsampling ``stage``; none behind the last ones, with ``resblock_stages``."""
        kernels = len(self.config.resblock_kernel_sizes)
        return self.resblocks[stage * kernels : (stage + 1) * kernels]

    def check_units(self, units: Tensor, lengths: Tensor) -> Tensor:
        """``units`` [B, U] with padding set to 0.

        Raises:
            UnitError: a unit is not one of the vocoder's.
        """
        inside = torch.arange(units.shape[1], device=units.device) < lengths[:, None]
        bad = inside & ((units < 0) | (units >= self.config.num_embeddings))
        if bad.any():
            row, at = bad.nonzero()[0].tolist()
            raise UnitError(
                f"unit {int(units[row, at])} (sequence {row}, position {at}) is out of range; "
                f"this vocoder knows 0..{self.config.num_embeddings - 1}"
            )
        return units.masked_fill(~inside, 0)

    def embed(self, units: Tensor, flow: Flow | None = None) -> Tensor:
        """Units [B, U] to what frames are made of, [B, C, U]."""
        x = self.dict(units).transpose(1, 2)
        for layer in getattr(self, "context", ()):
            x = layer(x, flow)
        return x

    def duration_input(self, units: Tensor, flow: Flow, x: Tensor | None = None) -> Tensor:
        """What the durations are predicted from, [B, C, U]: the predictor's own look at the units, or ``embed``'s.

        Args:
            x: what ``embed`` gave for these units; None: computed where it is needed.
        """
        if isinstance(self.dur_predictor, DurationClassifier):
            return self.dur_predictor.look(self.dur_predictor.dict(units).mT, flow)
        return self.embed(units, flow) if x is None else x

    def predict_durations(self, x: Tensor, flow: Flow) -> Tensor:
        """``duration_input`` to whole frames [B, U], at least 1; 1 each when the vocoder has no duration predictor."""
        if self.dur_predictor is None:
            return torch.ones(x.shape[0], x.shape[2], dtype=torch.long, device=x.device)
        return self.dur_predictor.frames(self.dur_predictor(x, flow)).long()

    def stretch(self, x: Tensor, durations: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Repeat each unit for its frames, and tell frames of one unit apart when ``position_buckets`` says so.

        Args:
            x: [B, C, U]. durations: [B, U] frames. lengths: [B] units.

        Returns:
            frames [B, C, F] and their number [B].
        """
        inside = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
        ends = torch.cumsum(durations.masked_fill(~inside, 0), dim=1)
        total = ends[:, -1] if ends.shape[1] else lengths.clone()
        frame = torch.arange(int(total.max()), device=x.device).expand(x.shape[0], -1).contiguous()
        unit = torch.searchsorted(ends, frame, right=True).clamp(max=max(x.shape[2] - 1, 0))
        frames = x.gather(2, unit.unsqueeze(1).expand(-1, x.shape[1], -1))
        buckets = self.config.position_buckets
        if buckets:
            end = ends.gather(1, unit)
            since = frame - (end - durations.gather(1, unit))
            until = end - 1 - frame
            place = self.position(since.clamp(0, buckets - 1)) + self.position(until.clamp(0, buckets - 1) + buckets)
            frames = frames + place.transpose(1, 2)
        return frames, total

    def with_speaker(self, frames: Tensor, speakers: Tensor | None) -> Tensor:
        if not self.config.multispkr:
            return frames
        if speakers is None:
            raise UnitError(f"this vocoder has {self.config.num_speakers} speakers; pass the speaker's number")
        if ((speakers < 0) | (speakers >= self.config.num_speakers)).any():
            raise UnitError(f"speaker {speakers.tolist()} is out of range 0..{self.config.num_speakers - 1}")
        voice = self.spkr(speakers.view(-1)).unsqueeze(2).expand(-1, -1, frames.shape[2])
        return torch.cat([frames, voice], dim=1)

    def frame_features(self, frames: Tensor, flow: Flow) -> Tensor:
        """[B, C, F] to [B, upsample_initial_channel, F], still at the frame rate."""
        x = self.conv_pre(frames, flow)
        for layer in getattr(self, "frame_layers", ()):
            x = layer(x, flow)
        return x

    def upsample(self, x: Tensor, flow: Flow) -> Tensor:
        """[B, upsample_initial_channel, F] to the waveform [B, F * hop] in [-1, 1]."""
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE), flow)
            flow = flow.upsampled(up.rate)
            blocks = self.blocks(i)
            if len(blocks):
                x = sum(block(x, flow) for block in blocks) / len(blocks)
        return torch.tanh(self.conv_post(F.leaky_relu(x), flow)).squeeze(1)

    # ---------------------------------------------------------------------------------------------------- weight norm
    def add_weight_norm(self) -> Generator:
        """Put weight norm on the parts that have it in the field's checkpoints; for training."""
        for name, module in self.named_modules():
            if isinstance(module, (Conv, Upsample)) and name.startswith(NORMED):
                nn.utils.parametrizations.weight_norm(module)
        return self

    def remove_weight_norm(self) -> Generator:
        """Fold weight norm into plain weights; the function computed stays the same."""
        for module in self.modules():
            if isinstance(module, (Conv, Upsample)) and nn.utils.parametrize.is_parametrized(module, "weight"):
                nn.utils.parametrize.remove_parametrizations(module, "weight")
        return self
