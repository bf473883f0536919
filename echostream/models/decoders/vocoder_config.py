"""Shape of a CodeHiFiGAN: the keys of the field's ``config.json``, EchoStream's own, and the presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from echostream.constants import SAMPLE_RATE, UNIT_HOP
from echostream.errors import ConfigError
from echostream.loading import read_json
from echostream.rules import Rule, check

_WIDTH, _KERNEL = Rule(int, 0, 8192), Rule(int, 1, 256)
_KERNELS = Rule(list, 1, 16, of=_KERNEL)
_DURATION_RULES = {
    "encoder_embed_dim": _WIDTH, "var_pred_hidden_dim": _WIDTH, "var_pred_kernel_size": Rule(int, 1, 64),
    "var_pred_dropout": Rule(float), "var_pred_max_frames": Rule(int), "var_pred_layers": Rule(int, 0, 32),
}  # fmt: skip
# Kind and bounds of each key, so that no file makes a generator of any size; what they must be to each other is said by
# ``VocoderConfig``. Keys that are not here shape nothing.
_RULES = {
    "upsample_rates": _KERNELS, "upsample_kernel_sizes": Rule(list, 1, 16, of=Rule(int, 1, 4096)),
    "upsample_initial_channel": _WIDTH, "resblock_kernel_sizes": _KERNELS,
    "resblock_dilation_sizes": Rule(list, 1, 16, of=Rule(list, 0, 16, of=_KERNEL)),
    "num_embeddings": Rule(int, 0, 1 << 20), "embedding_dim": _WIDTH, "model_in_dim": _WIDTH,
    "dur_predictor_params": Rule(dict), "num_speakers": Rule(int, 0, 1 << 20), "code_hop_size": Rule(int, 0, 1 << 16),
    "sampling_rate": Rule(int), "causal": Rule(bool), "lookahead_units": Rule(int, 0, 64),
    "context_layers": Rule(int, 0, 32), "context_kernel_size": Rule(int, 0, 64), "position_buckets": Rule(int, 0, 4096),
    "frame_layers": Rule(int, 0, 10), "frame_kernel_size": Rule(int, 1, 64),
    "upsample_channels": Rule(list, 0, 16, of=_WIDTH), "resblock_stages": Rule(int), "f0_quant_num_bin": Rule(int),
}  # fmt: skip
MAX_DURATION = 500  # frames (10 s): a mistrained predictor must not ask for gigabytes


@dataclass(frozen=True)
class DurationConfig:
    """``dur_predictor_params``: the keys of the field's config.json, then EchoStream's own.

    Raises:
        ConfigError: a value is out of range.
    """

    encoder_embed_dim: int  # width of what it reads: the voice's unit embeddings, or an embedding of its own
    var_pred_hidden_dim: int
    var_pred_kernel_size: int = 3
    var_pred_dropout: float = 0.5
    # EchoStream's own
    var_pred_max_frames: int = 0  # 0: the field's predictor; else a choice among 1..so many frames, see vocoder_layers
    var_pred_layers: int = 0  # residual convolutions of that choice, behind the first convolution

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in ("var_pred_max_frames", "var_pred_layers") else 1
            if f.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"dur_predictor_params.{f.name} is {value!r}; it must be a whole number >= {least}")
        if not isinstance(self.var_pred_dropout, (int, float)) or not 0 <= self.var_pred_dropout < 1:
            raise ConfigError(
                f"dur_predictor_params.var_pred_dropout is {self.var_pred_dropout!r}; it must lie between 0 and 1"
            )
        if self.var_pred_max_frames and not 2 <= self.var_pred_max_frames <= MAX_DURATION:
            raise ConfigError(
                f"dur_predictor_params.var_pred_max_frames is {self.var_pred_max_frames}; it must lie in "
                f"2..{MAX_DURATION}, or be 0 for the field's predictor"
            )
        if self.var_pred_layers and not self.var_pred_max_frames:
            raise ConfigError(
                f"dur_predictor_params.var_pred_layers is {self.var_pred_layers}; the field's predictor has no such "
                "layers, set var_pred_max_frames too"
            )


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
            if params.var_pred_max_frames and not (self.causal and self.lookahead_units):
                raise ConfigError(
                    f"dur_predictor_params.var_pred_max_frames is {params.var_pred_max_frames}; this predictor needs "
                    "causal: true and lookahead_units of at least 1"
                )
            if params.var_pred_max_frames and params.var_pred_kernel_size <= self.lookahead_units:
                raise ConfigError(
                    f"dur_predictor_params.var_pred_kernel_size is {params.var_pred_kernel_size}; it must be larger "
                    f"than lookahead_units {self.lookahead_units}"
                )
            if not params.var_pred_max_frames and params.encoder_embed_dim != self.embedding_dim:
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
    def past_units(self) -> int:
        """Units before the current one that the layers which read the units themselves see."""
        kernels = [self.context_kernel_size] if self.context_layers else []
        if self.dur_predictor_params is not None and self.dur_predictor_params.var_pred_max_frames:
            kernels.append(self.dur_predictor_params.var_pred_kernel_size)
        return max(kernels, default=1) - 1 - self.lookahead_units

    @property
    def input_width(self) -> int:
        return self.embedding_dim * (2 if self.multispkr else 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VocoderConfig:
        """Read the keys of a config.json; those that do not shape the generator are ignored."""
        for key in ("f0", "embedder_params"):
            if values.get(key):
                raise ConfigError(f"the vocoder configuration sets {key!r}, which is not supported; use one without it")
        # Presets and saved configurations bring tuples and dataclasses; what a file brings is checked as it is.
        plain = {key: _plain(value) for key, value in values.items()}
        check(plain, _RULES, "the vocoder configuration", ConfigError)
        if plain.get("dur_predictor_params"):
            params = plain["dur_predictor_params"]
            check(params, _DURATION_RULES, "the vocoder configuration: dur_predictor_params", ConfigError)
        if (values.get("f0_quant_num_bin") or 0) > 0:
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
    def from_json(cls, path: str | Path) -> VocoderConfig:
        values = read_json(path, "vocoder configuration", ConfigError)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as config.json holds it, ``model_in_dim`` filled in."""
        values = {**dataclasses.asdict(self), "model_in_dim": self.input_width, "f0": False}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def preset(cls, name: str, num_embeddings: int = 1000, **changes: Any) -> VocoderConfig:
        """One of ``PRESETS`` (``v1``: the field's 13.5M generator; ``small``: causal, for a CPU)."""
        if name not in PRESETS:
            raise ConfigError(f"no vocoder preset {name!r}; there are {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], "num_embeddings": num_embeddings, **changes})


def _plain(value: Any) -> Any:
    """A value as JSON would have it."""
    if isinstance(value, DurationConfig):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


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
            encoder_embed_dim=128,
            var_pred_hidden_dim=128,
            var_pred_kernel_size=5,
            var_pred_dropout=0.1,
            var_pred_max_frames=15,
            var_pred_layers=4,
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


def kept_inputs(config: VocoderConfig) -> dict[str, tuple[int, int]]:
    """What each convolution of a causal generator keeps of its input, in the order in which they run: how many inputs,
    and their width, by the convolution's name. Those over units that look ahead keep what is ahead, too."""
    found: dict[str, tuple[int, int]] = {}

    def keep(name: str, past: int, width: int) -> None:
        if past:
            found[name] = past, width

    params = config.dur_predictor_params
    if params is not None and params.var_pred_max_frames:
        keep("duration.look", params.var_pred_kernel_size - 1, params.encoder_embed_dim)
    for i in range(config.context_layers):
        keep(f"context.{i}", config.context_kernel_size - 1, config.embedding_dim)
    if params is not None and params.var_pred_max_frames:
        for i in range(params.var_pred_layers):
            keep(f"duration.{i}", params.var_pred_kernel_size - 1, params.var_pred_hidden_dim)
    elif params is not None:
        keep("duration.1", params.var_pred_kernel_size - 1, params.encoder_embed_dim)
        keep("duration.2", params.var_pred_kernel_size - 1, params.var_pred_hidden_dim)
    keep("conv_pre", 6, config.input_width)
    for i in range(config.frame_layers):
        keep(f"frame_layers.{i}.convs.0", (config.frame_kernel_size - 1) * 2**i, config.upsample_initial_channel)
    widths = (config.upsample_initial_channel, *config.channels)
    stages = len(config.upsample_rates) if config.resblock_stages is None else config.resblock_stages
    kernels = len(config.resblock_kernel_sizes)
    for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes)):
        keep(f"ups.{i}", -(-kernel // rate) - 1, widths[i])
        if i >= stages:
            continue
        for j, (size, dilations) in enumerate(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes)):
            for k, dilation in enumerate(dilations):
                block = f"resblocks.{i * kernels + j}"
                if config.resblock == "2":
                    keep(f"{block}.convs.{k}", (size - 1) * dilation, widths[i + 1])
                else:
                    keep(f"{block}.convs1.{k}", (size - 1) * dilation, widths[i + 1])
                    keep(f"{block}.convs2.{k}", size - 1, widths[i + 1])
    keep("conv_post", 6, widths[-1])
    return found
