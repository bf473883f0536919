"""CodeHiFiGAN: discrete units to a 16 kHz waveform, offline and as a stream.

The generator is HiFi-GAN's (Kong et al., 2020) on unit embeddings (Polyak et al., 2021) with the duration predictor of
Lee et al. (2022), so that ``{"generator": ...}`` checkpoints of fairseq and speech-resynthesis load and sound the same.
EchoStream's own configuration keys (``causal`` and those below it) make a generator that streams: everything behind
the unit layers is causal, and the unit layers see ``lookahead_units`` ahead.

Letters: B batch, U units, F frames of 20 ms (a unit lasts one or more), C channels, T samples or any time axis.
Units are cluster ids 0..num_embeddings-1, not dictionary indices.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.constants import SAMPLE_RATE, UNIT_HOP
from echostream.errors import CheckpointError, ConfigError, UnitError
from echostream.models.state import State

SLOPE = 0.1  # of HiFi-GAN's leaky ReLUs; the one before conv_post has PyTorch's 0.01
MAX_DURATION = 500  # frames (10 s): a mistrained predictor must not ask for gigabytes
NORMED = ("conv_pre", "ups", "resblocks", "conv_post")  # parts that carry weight norm in the field's checkpoints


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class DurationConfig:
    """``dur_predictor_params`` of the field's config.json."""

    encoder_embed_dim: int
    var_pred_hidden_dim: int
    var_pred_kernel_size: int = 3
    var_pred_dropout: float = 0.5


@dataclass(frozen=True)
class VocoderConfig:
    """A generator's shape: the keys of the field's ``config.json``, then EchoStream's own.

    Keys that only concern training elsewhere (``batch_size``, ``segment_size`` ...) are ignored by ``from_dict``.

    Raises:
        ConfigError: a key is missing, contradicts another, or asks for what is not supported (``f0``).
    """

    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    upsample_initial_channel: int
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    num_embeddings: int
    embedding_dim: int
    model_in_dim: int = 0  # 0: what the embeddings give
    resblock: str = "1"  # "1": two convolutions per dilation, "2": one
    dur_predictor_params: DurationConfig | None = None
    multispkr: str | None = None
    num_speakers: int = 200
    code_hop_size: int = UNIT_HOP  # samples per frame
    sampling_rate: int = SAMPLE_RATE
    # EchoStream's own
    causal: bool = False  # no layer sees ahead, except the first context layer
    lookahead_units: int = 0  # units ahead that the first context layer sees
    context_layers: int = 0  # residual convolutions over the units, before they are stretched to frames
    context_kernel_size: int = 5  # units a context layer sees, look-ahead included
    position_buckets: int = 0  # frames since a unit's start and until its end are told apart up to this many
    frame_layers: int = 0  # residual convolutions at the frame rate, dilated 1, 2, 4 ...
    frame_kernel_size: int = 5
    upsample_channels: tuple[int, ...] = ()  # width behind each upsampling; empty: halved each time, as in HiFi-GAN
    resblock_stages: int | None = None  # only so many upsamplings are followed by residual blocks; None: all

    def __post_init__(self) -> None:
        stages = len(self.upsample_rates)
        if len(self.upsample_kernel_sizes) != stages or not stages:
            raise ConfigError(
                f"upsample_kernel_sizes has {len(self.upsample_kernel_sizes)} entries, upsample_rates {stages}; "
                "they need one each per upsampling"
            )
        if len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes) or not self.resblock_kernel_sizes:
            raise ConfigError("resblock_kernel_sizes and resblock_dilation_sizes need one entry each per block")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"{f.name} is {value!r}; it must be a whole number")
            if f.type.startswith("tuple[int") and not all(isinstance(v, int) and v > 0 for v in value):
                raise ConfigError(f"{f.name} is {list(value)!r}; it must hold whole numbers from 1 up")
        for name in ("num_embeddings", "embedding_dim", "upsample_initial_channel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if math.prod(self.upsample_rates) != self.code_hop_size:
            raise ConfigError(
                f"upsample_rates {list(self.upsample_rates)} multiply to {math.prod(self.upsample_rates)}; "
                f"they must give code_hop_size {self.code_hop_size}"
            )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes):
            if kernel < rate or (not self.causal and (kernel - rate) % 2):
                raise ConfigError(
                    f"upsample_kernel_sizes has {kernel} for rate {rate}; it must be at least the rate, and differ "
                    "from it by an even number unless the generator is causal"
                )
        if not self.causal and any(kernel % 2 == 0 for kernel in self.resblock_kernel_sizes):
            raise ConfigError(f"resblock_kernel_sizes {list(self.resblock_kernel_sizes)}: even sizes need causal: true")
        if self.resblock not in ("1", "2"):
            raise ConfigError(f"resblock is {self.resblock!r}; it must be '1' or '2'")
        if self.upsample_channels and len(self.upsample_channels) != stages:
            raise ConfigError(f"upsample_channels needs {stages} entries, one per upsampling")
        if self.channels[-1] < 1:
            raise ConfigError(
                f"upsample_initial_channel {self.upsample_initial_channel} cannot be halved {stages} times"
            )
        if self.resblock_stages is not None and not 0 <= self.resblock_stages <= stages:
            raise ConfigError(f"resblock_stages is {self.resblock_stages}; it must lie in 0..{stages}")
        width = self.embedding_dim * (2 if self.multispkr else 1)
        if self.model_in_dim not in (0, width):
            raise ConfigError(
                f"model_in_dim is {self.model_in_dim}; unit{' and speaker' if self.multispkr else ''} embeddings "
                f"of embedding_dim {self.embedding_dim} give {width}"
            )
        if not self.causal and (self.lookahead_units or self.context_layers or self.frame_layers):
            raise ConfigError("lookahead_units, context_layers and frame_layers need causal: true")
        if self.lookahead_units and not self.context_layers:
            raise ConfigError(f"lookahead_units is {self.lookahead_units}; it needs context_layers of at least 1")
        if self.lookahead_units >= self.context_kernel_size:
            raise ConfigError(
                f"lookahead_units is {self.lookahead_units}; context_kernel_size {self.context_kernel_size} must be "
                "larger"
            )
        if self.sampling_rate != SAMPLE_RATE:
            raise ConfigError(
                f"sampling_rate is {self.sampling_rate}; EchoStream's output is {SAMPLE_RATE} Hz, use a vocoder of "
                "that rate"
            )
        if self.dur_predictor_params is not None:
            params = self.dur_predictor_params
            if params.encoder_embed_dim != self.embedding_dim:
                raise ConfigError(
                    f"dur_predictor_params.encoder_embed_dim is {params.encoder_embed_dim}; it must equal "
                    f"embedding_dim {self.embedding_dim}"
                )
            if not self.causal and params.var_pred_kernel_size != 3:
                # The field's second convolution pads by 1 whatever its size, so no other size keeps the length.
                raise ConfigError(f"var_pred_kernel_size is {params.var_pred_kernel_size}; it must be 3")

    @property
    def channels(self) -> tuple[int, ...]:
        """Width behind each upsampling."""
        if self.upsample_channels:
            return self.upsample_channels
        return tuple(self.upsample_initial_channel >> (i + 1) for i in range(len(self.upsample_rates)))

    @property
    def input_width(self) -> int:
        return self.embedding_dim * (2 if self.multispkr else 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VocoderConfig":
        """Read the keys of a config.json; those that do not shape the generator are ignored."""
        for key in ("f0", "embedder_params"):
            if values.get(key):
                raise ConfigError(f"the vocoder configuration sets {key!r}, which is not supported; use one without it")
        if int(values.get("f0_quant_num_bin") or 0) > 0:
            raise ConfigError("the vocoder configuration sets 'f0_quant_num_bin', which is not supported")
        known = {f.name: f for f in fields(cls)}
        for name, f in known.items():
            if f.default is dataclasses.MISSING and name not in values:
                raise ConfigError(f"the vocoder configuration has no key {name!r}")
        chosen = {name: values[name] for name in known if name in values}
        chosen["resblock"] = str(chosen.get("resblock", "1"))
        chosen["multispkr"] = str(chosen["multispkr"]) if chosen.get("multispkr") else None
        try:
            for name in ("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes", "upsample_channels"):
                chosen[name] = tuple(chosen.get(name) or ())
            chosen["resblock_dilation_sizes"] = tuple(tuple(d) for d in chosen["resblock_dilation_sizes"])
            params = chosen.get("dur_predictor_params") or None
            if params is not None and not isinstance(params, DurationConfig):
                params = DurationConfig(**{f.name: params[f.name] for f in fields(DurationConfig) if f.name in params})
            chosen["dur_predictor_params"] = params
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"the vocoder configuration has a value of the wrong form: {error}") from None
        return cls(**chosen)

    @classmethod
    def from_json(cls, path: str | Path) -> "VocoderConfig":
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (FileNotFoundError, IsADirectoryError):
            raise ConfigError(f"vocoder configuration {path} does not exist") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"vocoder configuration {path} is not JSON: {str(error).splitlines()[0]}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"vocoder configuration {path} holds {type(values).__name__}, not an object")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as config.json holds it, ``model_in_dim`` filled in."""
        values = {**dataclasses.asdict(self), "model_in_dim": self.input_width, "f0": False}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def preset(cls, name: str, num_embeddings: int = 1000, **changes: Any) -> "VocoderConfig":
        """One of ``PRESETS`` (``v1``: the field's 13.5M generator; ``small``: causal, for a CPU)."""
        if name not in PRESETS:
            raise ConfigError(f"no vocoder preset {name!r}; there are {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], "num_embeddings": num_embeddings, **changes})


PRESETS: dict[str, dict[str, Any]] = {
    "v1": dict(
        upsample_rates=[5, 4, 4, 2, 2],
        upsample_kernel_sizes=[11, 8, 8, 4, 4],
        upsample_initial_channel=512,
        resblock_kernel_sizes=[3, 7, 11],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        embedding_dim=128,
        model_in_dim=128,
        dur_predictor_params=dict(
            encoder_embed_dim=128, var_pred_hidden_dim=128, var_pred_kernel_size=3, var_pred_dropout=0.5
        ),
    ),
    "small": dict(
        upsample_rates=[5, 4, 2, 8],
        upsample_kernel_sizes=[10, 8, 4, 32],
        upsample_initial_channel=224,
        upsample_channels=[160, 96, 64, 8],
        resblock="2",
        resblock_stages=3,
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        embedding_dim=128,
        dur_predictor_params=dict(
            encoder_embed_dim=128, var_pred_hidden_dim=128, var_pred_kernel_size=3, var_pred_dropout=0.2
        ),
        causal=True,
        lookahead_units=2,
        context_layers=3,
        context_kernel_size=5,
        position_buckets=12,
        frame_layers=3,
        frame_kernel_size=5,
    ),
}


# ---------------------------------------------------------------------------------------- how a convolution sees time
class _Whole:
    """Offline: the whole sequence is there; before and behind it a convolution sees zeros.

    ``lengths`` [B] (at the current rate) is needed when rows differ and a layer looks ahead: what lies behind a row's
    end is zeroed at every convolution's own input, so that a row sounds the same alone and in a batch.
    """

    def __init__(self, lengths: Tensor | None):
        self.lengths = lengths
        self.mask: Tensor | None = None

    def extend(self, x: Tensor, left: int, right: int = 0) -> Tensor:
        if self.lengths is not None:
            if self.mask is None or self.mask.shape[-1] != x.shape[-1]:
                self.mask = (torch.arange(x.shape[-1], device=x.device) < self.lengths[:, None]).unsqueeze(1)
            x = torch.where(self.mask, x, 0.0)
        return F.pad(x, (left, right)) if left or right else x

    def upsampled(self, rate: int) -> "_Whole":
        return _Whole(None if self.lengths is None else self.lengths * rate)


class _Chunk:
    """Streaming: before the chunk a convolution sees what it kept of the past; behind it, nothing.

    A layer that looks ahead gets its input delayed by as much, that is, more past.
    """

    def __init__(self, lengths: Tensor, caches: Sequence[Tensor], new: list[Tensor] | None = None, used: int = 0):
        self.lengths = lengths
        self.caches = caches
        self.new: list[Tensor] = [] if new is None else new
        self.even = bool((lengths == lengths[0]).all())

    def extend(self, x: Tensor, left: int, right: int = 0) -> Tensor:
        past = left + right
        if not past:
            return x
        joined = torch.cat([self.caches[len(self.new)], x], dim=-1)
        if self.even:
            end = int(self.lengths[0])
            self.new.append(joined[..., end : end + past].clone())
        else:
            where = self.lengths[:, None] + torch.arange(past, device=x.device)
            self.new.append(joined.gather(2, where.unsqueeze(1).expand(-1, x.shape[1], -1)))
        return joined

    def upsampled(self, rate: int) -> "_Chunk":
        return _Chunk(self.lengths * rate, self.caches, self.new)


class _Probe:
    """Collects empty caches of the right sizes while one frame of zeros passes through the layers."""

    def __init__(self) -> None:
        self.new: list[Tensor] = []

    def extend(self, x: Tensor, left: int, right: int = 0) -> Tensor:
        if left + right:
            self.new.append(x.new_zeros(x.shape[0], x.shape[1], left + right))
        return F.pad(x, (left + right, 0))

    def upsampled(self, rate: int) -> "_Probe":
        return self


Flow = Any  # _Whole, _Chunk or _Probe


class Conv(nn.Conv1d):
    """1-d convolution over [B, C, T] that keeps T: zeros on both sides, or before alone when causal."""

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int = 1, causal: bool = False):
        super().__init__(c_in, c_out, kernel, dilation=dilation)
        span = (kernel - 1) * dilation
        self.right = 0 if causal else span // 2
        self.left = span - self.right

    def forward(self, x: Tensor, flow: Flow) -> Tensor:  # type: ignore[override]
        return super().forward(flow.extend(x, self.left, self.right))


class Upsample(nn.ConvTranspose1d):
    """Transposed convolution, [B, C, T] to [B, C', rate * T].

    Causal: the first ``rate * T`` outputs of the full transposed convolution, so that sample t depends on the inputs
    up to t // rate.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, rate: int, causal: bool = False):
        super().__init__(c_in, c_out, kernel, rate, padding=0 if causal else (kernel - rate) // 2)
        self.rate = rate
        self.past = -(-kernel // rate) - 1 if causal else 0
        self.causal = causal

    def forward(self, x: Tensor, flow: Flow) -> Tensor:  # type: ignore[override]
        size = x.shape[-1] * self.rate
        y = super().forward(flow.extend(x, self.past))
        return y[..., self.past * self.rate : self.past * self.rate + size] if self.causal else y


class ResBlock(nn.Module):
    """HiFi-GAN's residual blocks: type 1 has two convolutions per dilation, type 2 one."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], kind: str, causal: bool):
        super().__init__()
        first = nn.ModuleList(Conv(channels, channels, kernel, d, causal) for d in dilations)
        if kind == "1":
            self.convs1 = first
            self.convs2 = nn.ModuleList(Conv(channels, channels, kernel, 1, causal) for _ in dilations)
        else:
            self.convs = first

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        if hasattr(self, "convs"):
            for conv in self.convs:
                x = x + conv(F.leaky_relu(x, SLOPE), flow)
            return x
        for conv1, conv2 in zip(self.convs1, self.convs2):
            x = x + conv2(F.leaky_relu(conv1(F.leaky_relu(x, SLOPE), flow), SLOPE), flow)
        return x


class ContextLayer(nn.Module):
    """Residual convolution over units [B, C, U]; sees ``right`` units ahead."""

    def __init__(self, channels: int, kernel: int, right: int):
        super().__init__()
        self.left, self.right = kernel - 1 - right, right
        self.conv = nn.Conv1d(channels, channels, kernel)
        self.proj = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        joined = flow.extend(x, self.left, self.right)
        kept = joined[..., self.left : self.left + x.shape[-1]]  # the input, delayed like the convolution's output
        return kept + self.proj(F.leaky_relu(self.conv(joined), SLOPE))


class DurationPredictor(nn.Module):
    """Log-durations of units: [B, C, U] to [B, U], log(frames + 1) (FastSpeech 2's variance predictor)."""

    def __init__(self, config: DurationConfig, causal: bool):
        super().__init__()
        hidden, kernel = config.var_pred_hidden_dim, config.var_pred_kernel_size
        self.conv1 = nn.Sequential(Conv(config.encoder_embed_dim, hidden, kernel, causal=causal))
        self.ln1 = nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(Conv(hidden, hidden, kernel, causal=causal))
        self.ln2 = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, 1)
        self.dropout = config.var_pred_dropout

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        for conv, norm in ((self.conv1[0], self.ln1), (self.conv2[0], self.ln2)):
            x = norm(F.relu(conv(x, flow)).transpose(1, 2)).transpose(1, 2)
            x = F.dropout(x, self.dropout, self.training)
        return self.proj(x.transpose(1, 2)).squeeze(2)

    @property
    def right(self) -> int:
        """Units of look-ahead."""
        return self.conv1[0].right + self.conv2[0].right


# -------------------------------------------------------------------------------------------------------------- state
@dataclass(frozen=True)
class VocoderState(State):
    """A stream of a causal generator: what each convolution keeps of its input.

    Attributes:
        seen: [B] units received, capped at the look-ahead.
        caches: per convolution, [B, C, kept inputs].
    """

    seen: Tensor
    caches: tuple[Tensor, ...]


@dataclass(frozen=True)
class WindowState(State):
    """A stream of a generator that looks ahead in every layer: the units and frames still within its view.

    Attributes:
        units, frames: [B, W] ids, left-aligned: first those that are only context now, then those still to come out.
        unit_count, frame_count: [B] ids held.
        unit_done, frame_done: [B] how many of them are only context.
    """

    units: Tensor
    unit_count: Tensor
    unit_done: Tensor
    frames: Tensor
    frame_count: Tensor
    frame_done: Tensor


# ---------------------------------------------------------------------------------------------------------- generator
class CodeHiFiGAN(nn.Module):
    """Units to waveform.

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
        self.dur_predictor = (
            DurationPredictor(cfg.dur_predictor_params, causal) if cfg.dur_predictor_params is not None else None
        )
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
        return self._field[1]

    @property
    def _field(self) -> tuple[int, int]:
        """Frames of context (before, behind) that the samples of one frame depend on, followed back layer by layer."""
        cfg = self.config
        low, high = 0, self.hop - 1  # sample positions of frame 0, then positions at ever lower rates
        low, high = low - self.conv_post.left, high + self.conv_post.right
        kernels = len(cfg.resblock_kernel_sizes)
        for i in reversed(range(len(self.ups))):
            blocks = self.resblocks[i * kernels : (i + 1) * kernels]
            convs = [[m for m in block.modules() if isinstance(m, Conv)] for block in blocks]
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
        """Units [B, U] to what durations and frames are made of, [B, C, U]."""
        x = self.dict(units).transpose(1, 2)
        for layer in getattr(self, "context", ()):
            x = layer(x, flow)
        return x

    def predict_log_durations(self, x: Tensor, flow: Flow) -> Tensor:
        """[B, C, U] to log(frames + 1), [B, U]."""
        if self.dur_predictor is None:
            raise ConfigError("this vocoder has no duration predictor (dur_predictor_params); pass durations")
        return self.dur_predictor(x, flow)

    def predict_durations(self, x: Tensor, flow: Flow) -> Tensor:
        """[B, C, U] to whole frames [B, U], at least 1; 1 each when the vocoder has no duration predictor."""
        if self.dur_predictor is None:
            return torch.ones(x.shape[0], x.shape[2], dtype=torch.long, device=x.device)
        frames = torch.round(torch.exp(self.dur_predictor(x, flow).clamp(max=20.0)) - 1)
        return frames.clamp(1, MAX_DURATION).long()

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

    def _with_speaker(self, frames: Tensor, speakers: Tensor | None) -> Tensor:
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
        kernels = len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE), flow)
            flow = flow.upsampled(up.rate)
            blocks = self.resblocks[i * kernels : (i + 1) * kernels]
            if len(blocks):
                x = sum(block(x, flow) for block in blocks) / kernels
        return torch.tanh(self.conv_post(F.leaky_relu(x), flow)).squeeze(1)

    # -------------------------------------------------------------------------------------------------------- offline
    def forward(
        self,
        units: Tensor,
        lengths: Tensor | None = None,
        durations: Tensor | None = None,
        speakers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Speak whole sequences.

        Args:
            units: [B, U] cluster ids.
            lengths: [B] units per row; None: all of them.
            durations: [B, U] frames of 20 ms per unit; None: predicted, or one each without a predictor.
            speakers: [B] speaker numbers of a multi-speaker vocoder.

        Returns:
            waveform [B, T] in [-1, 1], zero behind a row's end, and samples per row [B]. A row without units has no
            samples.

        Raises:
            UnitError: no row holds a unit, or a unit, duration or speaker is out of range.
        """
        units, lengths = self._arguments(units, lengths)
        if not int(lengths.sum()):
            raise UnitError("the unit sequence is empty; there is nothing to speak")
        uneven = lengths if bool((lengths != units.shape[1]).any()) else None
        flow = _Whole(uneven)
        x = self.embed(units, flow)
        if durations is None:
            durations = self.predict_durations(x, flow)
        elif durations.shape != units.shape:
            raise UnitError(f"durations have shape {list(durations.shape)}, units {list(units.shape)}")
        else:
            inside = torch.arange(units.shape[1], device=units.device) < lengths[:, None]
            if ((durations < 0) & inside).any():
                raise UnitError(f"a duration is {int(durations[inside].min())} frames; durations start at 0")
            durations = durations.long().masked_fill(~inside, 0)
        frames, frame_lengths = self.stretch(x, durations, lengths)
        if not frames.shape[2]:
            raise UnitError("all durations are 0; there is nothing to speak")
        frames = self._with_speaker(frames, speakers)
        uneven = frame_lengths if bool((frame_lengths != frames.shape[2]).any()) else None
        flow = _Whole(uneven)
        waveform = self.upsample(self.frame_features(frames, flow), flow)
        wav_lengths = frame_lengths * self.hop
        if uneven is not None:
            beyond = torch.arange(waveform.shape[1], device=units.device) >= wav_lengths[:, None]
            waveform = waveform.masked_fill(beyond, 0.0)
        return waveform, wav_lengths

    def _arguments(self, units: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if units.dim() != 2 or units.is_floating_point():
            raise UnitError(f"units must be whole numbers [B, U], not {units.dtype} {list(units.shape)}")
        if lengths is None:
            lengths = torch.full((units.shape[0],), units.shape[1], dtype=torch.long, device=units.device)
        lengths = lengths.to(units.device).long().clamp(min=0)
        if units.shape[0] and int(lengths.max()) > units.shape[1]:
            raise UnitError(f"a length of {int(lengths.max())} is more than the {units.shape[1]} units given")
        return self.check_units(units.long(), lengths), lengths

    # ------------------------------------------------------------------------------------------------------ streaming
    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> VocoderState | WindowState:
        """The state of ``batch_size`` streams that have not begun."""
        like = self.dict.weight
        device, dtype = device or like.device, dtype or like.dtype
        zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
        if not self.config.causal:
            units, frames = self._windows
            return WindowState(
                units=zeros.new_zeros(batch_size, units),
                unit_count=zeros,
                unit_done=zeros.clone(),
                frames=zeros.new_zeros(batch_size, frames),
                frame_count=zeros.clone(),
                frame_done=zeros.clone(),
            )
        probe = _Probe()
        with torch.no_grad():
            x = self.embed(zeros[:1].unsqueeze(1), probe)
            if self.dur_predictor is not None:
                self.dur_predictor(x, probe)
            speaker = zeros[:1] if self.config.multispkr else None
            self.upsample(self.frame_features(self._with_speaker(x, speaker), probe), probe)
        caches = tuple(c.to(device=device, dtype=dtype).repeat(batch_size, 1, 1) for c in probe.new)
        return VocoderState(seen=zeros, caches=caches)

    def step(
        self,
        units: Tensor,
        lengths: Tensor,
        state: VocoderState | WindowState,
        finished: Tensor | None = None,
        speakers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, VocoderState | WindowState]:
        """Speak the next units of each stream, as far as the look-ahead allows.

        Args:
            units: [B, N] cluster ids, left-aligned. lengths: [B] units per row, 0 allowed.
            state: from ``init_state`` or the step before; not changed.
            finished: [B] bool, rows whose last units these are: all of their samples come out, and the row's state
                starts anew.
            speakers: [B] speaker numbers of a multi-speaker vocoder, the same in every step.

        Returns:
            waveform [B, T], samples per row [B] and the new state. The samples of all steps together are those of
            ``forward`` on the whole sequence.

        Raises:
            UnitError: a unit or speaker is out of range.
        """
        units, lengths = self._arguments(units, lengths)
        if finished is None:
            finished = torch.zeros_like(lengths, dtype=torch.bool)
        advance = self._step_causal if self.config.causal else self._step_window
        waveform, frames, new = advance(units, lengths, state, finished, speakers)
        wav_lengths = frames * self.hop
        longest = int(wav_lengths.max()) if len(wav_lengths) else 0
        waveform = waveform[:, :longest]
        beyond = torch.arange(longest, device=units.device) >= wav_lengths[:, None]
        waveform = waveform.masked_fill(beyond, 0.0)
        if finished.any():
            new = self.init_state(len(lengths), units.device, self.dict.weight.dtype).where(finished, new)
        return waveform, wav_lengths, new

    def _step_causal(
        self, units: Tensor, lengths: Tensor, state: VocoderState, finished: Tensor, speakers: Tensor | None
    ) -> tuple[Tensor, Tensor, VocoderState]:
        ahead = self.config.lookahead_units
        if not units.shape[1]:
            units = units.new_zeros(units.shape[0], 1)  # a convolution wants something to slide over
        x = self.dict(units).transpose(1, 2)
        inside = torch.arange(units.shape[1], device=units.device) < lengths[:, None]
        x = torch.where(inside.unsqueeze(1), x, 0.0)
        if ahead and bool(finished.any()):
            # What lies behind the end is zeros at the first context layer's input, as offline.
            x = F.pad(x, (0, ahead))
            lengths = lengths + ahead * finished.long()
        flow = _Chunk(lengths, state.caches)
        for i, layer in enumerate(getattr(self, "context", ())):
            x = layer(x, flow)
            if i == 0 and ahead:
                # The delayed layer's first outputs of a stream belong to no unit: each row drops its own.
                drop = torch.minimum((ahead - state.seen).clamp(min=0), lengths)
                x = _shift_left(x, drop)
                state = dataclasses.replace(state, seen=(state.seen + lengths).clamp(max=ahead))
                lengths = lengths - drop
                flow = _Chunk(lengths, state.caches, flow.new)
        durations = self.predict_durations(x, flow)
        frames, frame_lengths = self.stretch(x, durations, lengths)
        flow = _Chunk(frame_lengths, state.caches, flow.new)
        if frames.shape[2]:
            waveform = self.upsample(self.frame_features(self._with_speaker(frames, speakers), flow), flow)
            caches = tuple(flow.new)
        else:
            waveform = x.new_zeros(x.shape[0], 0)
            caches = (*flow.new, *state.caches[len(flow.new) :])
        return waveform, frame_lengths, VocoderState(seen=state.seen, caches=caches)

    @property
    def _windows(self) -> tuple[int, int]:
        """Units and frames that a stream keeps: context before, and what waits for its context behind."""
        durations = self.dur_predictor.right if self.dur_predictor is not None else 0
        return 2 * durations, sum(self._field)

    def _step_window(
        self, units: Tensor, lengths: Tensor, state: WindowState, finished: Tensor, speakers: Tensor | None
    ) -> tuple[Tensor, Tensor, WindowState]:
        """Recompute over the receptive field. Every layer looks ahead, so the zeros that it saw at the stream's start
        or end are there again when, and only when, the window reaches that far."""
        reach = self.dur_predictor.right if self.dur_predictor is not None else 0
        before, behind = self._field
        ids, held = _append(state.units, state.unit_count, units, lengths)
        flow = _Whole(held)
        durations = self.predict_durations(self.dict(ids).transpose(1, 2), flow)
        ready = torch.where(finished, held, torch.maximum(held - reach, state.unit_done))
        # The units that became ready, as frames of their ids.
        fresh = _shift_left(torch.stack([ids, durations], 1), state.unit_done)
        count = ready - state.unit_done
        inside = torch.arange(fresh.shape[2], device=units.device) < count[:, None]
        ends = torch.cumsum(fresh[:, 1].masked_fill(~inside, 0), dim=1)
        new = ends[:, -1] if ends.shape[1] else count
        at = torch.arange(int(new.max()), device=units.device).expand(len(new), -1).contiguous()
        at = torch.searchsorted(ends, at, right=True).clamp(max=max(fresh.shape[2] - 1, 0))
        frames, frame_held = _append(state.frames, state.frame_count, fresh[:, 0].gather(1, at), new)
        frame_ready = torch.where(finished, frame_held, torch.maximum(frame_held - behind, state.frame_done))
        if int((frame_ready - state.frame_done).max()):
            x = self._with_speaker(self.dict(frames).transpose(1, 2), speakers)
            flow = _Whole(frame_held)
            waveform = self.upsample(self.frame_features(x, flow), flow)
            waveform = _shift_left(waveform.unsqueeze(1), state.frame_done * self.hop).squeeze(1)
        else:
            waveform = self.dict.weight.new_zeros(len(new), 0)
        unit_drop = (ready - reach).clamp(min=0)
        frame_drop = (frame_ready - before).clamp(min=0)
        widths = self._windows
        return (
            waveform,
            frame_ready - state.frame_done,
            WindowState(
                units=_fit(_shift_left(ids.unsqueeze(1), unit_drop).squeeze(1), widths[0]),
                unit_count=held - unit_drop,
                unit_done=ready - unit_drop,
                frames=_fit(_shift_left(frames.unsqueeze(1), frame_drop).squeeze(1), widths[1]),
                frame_count=frame_held - frame_drop,
                frame_done=frame_ready - frame_drop,
            ),
        )

    # ---------------------------------------------------------------------------------------------------- weight norm
    def add_weight_norm(self) -> "CodeHiFiGAN":
        """Put weight norm on the parts that have it in the field's checkpoints; for training."""
        for name, module in self.named_modules():
            if isinstance(module, (Conv, Upsample)) and name.startswith(NORMED):
                nn.utils.parametrizations.weight_norm(module)
        return self

    def remove_weight_norm(self) -> "CodeHiFiGAN":
        """Fold weight norm into plain weights; the function computed stays the same."""
        for module in self.modules():
            if isinstance(module, (Conv, Upsample)) and nn.utils.parametrize.is_parametrized(module, "weight"):
                nn.utils.parametrize.remove_parametrizations(module, "weight")
        return self


def _shift_left(x: Tensor, by: Tensor) -> Tensor:
    """x [B, C, T] with row b moved left by ``by[b]``; what the rows end with is of no meaning."""
    if not x.shape[2] or not bool(by.any()):
        return x
    where = torch.arange(x.shape[2], device=x.device) + by[:, None]
    return x.gather(2, where.clamp(max=x.shape[2] - 1).unsqueeze(1).expand(-1, x.shape[1], -1))


def _append(held: Tensor, count: Tensor, new: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ids [B, W] filled up to ``count`` [B], with ``lengths`` [B] of ``new`` [B, N] behind: [B, W + N]."""
    joined = F.pad(held, (0, new.shape[1]))
    at = torch.arange(joined.shape[1], device=held.device) - count[:, None]
    if new.shape[1]:
        inside = (at >= 0) & (at < lengths[:, None])
        joined = torch.where(inside, new.gather(1, at.clamp(0, new.shape[1] - 1)), joined)
    return joined, count + lengths


def _fit(x: Tensor, width: int) -> Tensor:
    return F.pad(x[:, :width], (0, max(width - x.shape[1], 0)))


# -------------------------------------------------------------------------------------------------------- checkpoints
def _field_layout(model: CodeHiFiGAN) -> dict[str, Tensor]:
    """The weights as the field stores them: weight norm as ``weight_g`` and ``weight_v``."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        normed = isinstance(module, (Conv, Upsample)) and name.startswith(NORMED)
        for key, value in module.named_parameters(recurse=False):
            if normed and key == "weight":
                continue
            state[f"{name}.{key}"] = value.detach()
        if normed:
            weight = module.weight.detach()
            state[f"{name}.weight_g"] = weight.norm(dim=(1, 2), keepdim=True)
            state[f"{name}.weight_v"] = weight
    return state


def _plain_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight norm in either of PyTorch's layouts folded into plain weights (Salimans & Kingma, 2016)."""
    plain: dict[str, Tensor] = {}
    pairs = ((".weight_g", ".weight_v"), (".parametrizations.weight.original0", ".parametrizations.weight.original1"))
    for key, value in state.items():
        for g, v in pairs:
            if key.endswith(g):
                base = key[: -len(g)]
                if base + v not in state:
                    raise CheckpointError(f"{base + v} is missing beside {key}")
                direction = state[base + v].double()
                norm = direction.norm(dim=tuple(range(1, direction.dim())), keepdim=True)
                plain[base + ".weight"] = (direction * (value.double() / norm.clamp(min=1e-20))).float()
                break
            if key.endswith(v):
                if key[: -len(v)] + g not in state:
                    raise CheckpointError(f"{key[: -len(v)] + g} is missing beside {key}")
                break
        else:
            plain[key] = value.float()
    return plain


def load_generator_state(path: str | Path) -> dict[str, Tensor]:
    """The ``generator`` weights of a checkpoint file, weight norm folded in.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"vocoder checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"vocoder checkpoint {path} is not a file of weights alone, and is not loaded ({_first_line(error)})"
        ) from None
    except Exception as error:  # bytes that are no checkpoint make the unpickler stumble in any way
        raise CheckpointError(
            f"vocoder checkpoint {path} cannot be read; it is truncated or no PyTorch file ({_first_line(error)})"
        ) from None
    state = content.get("generator") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"vocoder checkpoint {path} has no 'generator' weights; it is no CodeHiFiGAN checkpoint")
    try:
        return _plain_layout(state)
    except CheckpointError as error:
        raise CheckpointError(f"vocoder checkpoint {path}: {error}") from None


def load_vocoder(
    checkpoint_path: str | Path, config_path: str | Path, device: str | torch.device = "cpu"
) -> CodeHiFiGAN:
    """Read a CodeHiFiGAN, ours or the field's, ready to speak.

    Args:
        checkpoint_path: ``{"generator": state_dict}``, with weight norm or without.
        config_path: its config.json.

    Raises:
        ConfigError: the configuration is missing, incomplete or not supported.
        CheckpointError: the checkpoint cannot be read, or does not fit the configuration.
    """
    model = CodeHiFiGAN(VocoderConfig.from_json(config_path))
    state = load_generator_state(checkpoint_path)
    load_weights(model, state, f"vocoder checkpoint {checkpoint_path}", str(config_path))
    return model.to(device).eval()


def load_weights(model: CodeHiFiGAN, state: Mapping[str, Tensor], name: str, config: str = "its configuration") -> None:
    """Copy plain weights into a model without weight norm.

    Raises:
        CheckpointError: a weight is missing, unknown, of another shape, or not finite.
    """
    expected = model.state_dict()
    for key in expected:
        if key not in state:
            raise CheckpointError(f"{name} has no weight {key!r}; it does not fit {config}")
        if state[key].shape != expected[key].shape:
            raise CheckpointError(
                f"{name}: {key} has shape {list(state[key].shape)}, {config} asks for {list(expected[key].shape)}"
            )
        if not torch.isfinite(state[key]).all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinity")
    unknown = [key for key in state if key not in expected]
    if unknown:
        raise CheckpointError(f"{name} has a weight {unknown[0]!r} that {config} does not know")
    model.load_state_dict(dict(state))


def save_vocoder(
    model: CodeHiFiGAN, checkpoint_path: str | Path, config_path: str | Path, half: bool = False
) -> None:
    """Write ``{"generator": ...}`` in the field's layout and the config.json beside it.

    Args:
        half: store fp16 (for shipping; loading gives fp32 again).
    """
    state = _field_layout(model)
    state = {key: (value.half() if half else value.float()).cpu().contiguous().clone() for key, value in state.items()}
    checkpoint_path, config_path = Path(checkpoint_path), Path(config_path)
    for path in (checkpoint_path, config_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint_path.with_name(checkpoint_path.name + ".partial")
    torch.save({"generator": state}, partial)
    partial.replace(checkpoint_path)
    config_path.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
