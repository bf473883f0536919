"""The model's configuration: one typed dataclass from which YAML files and fairseq's arguments follow."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from echostream.errors import ConfigError
from echostream.loading import read_mapping, shown

ACTIVATIONS = ("relu", "gelu")
DECODER_FORMS = ("vaswani", "whisper")


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


# The most that a value may be, so that no file makes a model of any size; a key that is not here: ``MOST``.
MOST = 1 << 20
LIMITS: dict[str, int] = {
    "input_feat_per_channel": 1024, "input_channels": 16, "conv_channels": 8192,
    "encoder_embed_dim": 8192, "encoder_layers": 128, "encoder_attention_heads": 256, "encoder_ffn_embed_dim": 65536,
    "segment_length": 512, "left_context_length": 4096, "right_context_length": 512, "memory_size": 1024,
    "asr_decoder_layers": 64, "st_decoder_layers": 64, "st_decoder_heads": 256, "st_left_context": 8192,
    "mt_decoder_layers": 64, "mt_decoder_heads": 256, "mt_decoder_embed_dim": 8192, "mt_decoder_ffn_dim": 65536,
    "unit_decoder_layers": 64, "unit_decoder_heads": 256, "unit_decoder_embed_dim": 8192, "unit_decoder_ffn_dim": 65536,
    "encoder_position_period": 1_000_000, "encoder_conv_kernel": 1024, "st_decoder_embed_dim": 8192,
    "st_decoder_ffn_dim": 65536, "ctc_upsample_ratio": 128, "max_sentence_frames": 16384, "max_target_tokens": 4096,
    "mt_decoder_prompt": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class EchoStreamConfig:
    """Hyper-parameters of an EchoStream model.

    Lengths called ``*_length`` and ``*_context`` count encoder frames of 40 ms. Vocabulary sizes are those of the
    dictionaries, special symbols included; 6000 is CVSS's default. ``num_units`` counts the k-means clusters; the unit
    decoder's output is four special symbols wider.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    # Encoder: convolutional subsampler and Emformer (Shi et al., 2021)
    input_feat_per_channel: int = _option(80, "mel bins per feature frame")
    input_channels: int = _option(1, "channels of the input features")
    conv_channels: int = _option(256, "channels of the two subsampling convolutions")
    encoder_embed_dim: int = _option(256, "width of the encoder")
    encoder_layers: int = _option(16, "Emformer layers")
    encoder_attention_heads: int = _option(4, "attention heads of an Emformer layer")
    encoder_ffn_embed_dim: int = _option(1024, "inner width of an Emformer layer's feed-forward network")
    segment_length: int = _option(4, "encoder frames (40 ms) in a segment")
    left_context_length: int = _option(30, "encoder frames of cached left context")
    right_context_length: int = _option(0, "encoder frames of look-ahead behind a segment")
    train_contexts: str = _option(
        "",
        "in training, draw segment_length:right_context_length for each batch from this list (8:8,16:0,...), so that "
        "the model can be run with any of them; an entry may appear several times",
    )
    memory_size: int = _option(8, "segment summaries in the memory bank; 0 leaves the bank and its weights out")
    shift_context: bool = _option(
        False, "give a stream's last segments so many more frames of left context as they lack of their own"
    )
    full_context: bool = _option(
        False, "attend the whole utterance instead of segments, left and right context and memory: offline only"
    )
    encoder_normalize_before: bool = _option(False, "LayerNorm before attention and FFN (torchaudio's form)")
    encoder_final_norm: bool = _option(
        False, "with encoder_normalize_before: one LayerNorm behind the last layer instead of one behind every layer"
    )
    encoder_activation: str = _option("relu", "activation of the Emformer layers' feed-forward networks", ACTIVATIONS)
    encoder_stem: str = _option(
        "conv2d",
        "conv2d: log-mel as Kaldi's, two strided Conv2d, 40 ms frames throughout; whisper: Whisper's log-mel without "
        "look-ahead and its two Conv1d, layers at 20 ms, pairs of frames merged behind the last one",
        ("conv2d", "whisper"),
    )
    encoder_position_period: int = _option(
        0, "sinusoidal positions that begin anew after so many frames of the layers (1500 in Whisper); 0: no positions"
    )
    encoder_relative_bias: bool = _option(
        False, "a learnt bias per head and distance on the attention scores (T5's form), alike in no two layers"
    )
    encoder_conv_kernel: int = _option(
        0, "frames that a causal depthwise convolution (the Conformer's module) before the attention sees; 0: none"
    )
    # Source-text CTC head
    asr_vocab_size: int = _option(6000, "source dictionary size")
    asr_decoder_layers: int = _option(
        0, "causal transformer layers of the ASR CTC head, of the same shape as the ST CTC head's"
    )
    asr_condition_every: int = _option(
        0, "after every so many of these layers the ASR head's prediction so far is added to what it reads; 0: never"
    )
    # Target-text CTC head
    st_decoder_layers: int = _option(2, "causal transformer layers of the ST CTC head")
    st_decoder_heads: int = _option(4, "attention heads of the ST CTC head")
    st_vocab_size: int = _option(6000, "target dictionary size")
    st_decoder_embed_dim: int = _option(0, "width of the ST CTC head's layers; 0: the encoder's")
    st_decoder_ffn_dim: int = _option(0, "inner width of their feed-forward networks; 0: the encoder's")
    st_left_context: int = _option(128, "encoder frames an ST CTC layer sees, the current one included")
    # Autoregressive text decoder
    mt_decoder_layers: int = _option(4, "layers of the MT decoder")
    mt_decoder_heads: int = _option(4, "attention heads of the MT decoder")
    mt_decoder_embed_dim: int = _option(256, "width of the MT decoder")
    mt_decoder_ffn_dim: int = _option(1024, "inner width of the MT decoder's feed-forward networks")
    mt_decoder_form: str = _option(
        "vaswani",
        "vaswani: LayerNorm behind each residual, ReLU, sinusoidal positions, output and embedding apart; whisper: "
        "LayerNorm before, GELU, learnt positions, one matrix for embedding and output",
        DECODER_FORMS,
    )
    mt_decoder_prompt: int = _option(0, "learnt keys and values before every sentence of the MT decoder")
    mt_vocab_size: int = _option(6000, "target dictionary size (the same dictionary as the ST head's)")
    # Unit decoder
    unit_decoder_input: str = _option(
        "encoder",
        "what the unit decoder upsamples: encoder frames, MT decoder states, or those and the tokens written from them",
        ("encoder", "mt", "mt-tokens"),
    )
    ctc_upsample_ratio: int = _option(5, "unit positions per input state (5 per encoder frame, 25 per MT subword)")
    unit_decoder_layers: int = _option(6, "layers of the unit decoder")
    unit_decoder_heads: int = _option(4, "attention heads of the unit decoder")
    unit_decoder_embed_dim: int = _option(256, "width of the unit decoder")
    unit_decoder_ffn_dim: int = _option(1024, "inner width of the unit decoder's feed-forward networks")
    num_units: int = _option(1000, "discrete units (k-means clusters)")
    # Sizes of the streaming buffers
    max_sentence_frames: int = _option(1024, "encoder frames a sentence may span in streaming (1024 are 41 s)")
    max_target_tokens: int = _option(256, "target tokens a sentence may hold")
    # Regularisation
    dropout: float = _option(0.1, "dropout probability")
    attention_dropout: float = _option(0.1, "dropout probability of attention weights")
    activation_dropout: float = _option(0.1, "dropout probability inside feed-forward networks")
    label_smoothing: float = _option(0.1, "label smoothing of the MT cross-entropy")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            choices = f.metadata.get("choices")
            if f.type == "str" and not isinstance(value, str):
                raise ConfigError(f"{f.name} is {shown(value)}; it must be a text")
            if choices and value not in choices:
                raise ConfigError(f"{f.name} is {shown(value)}; it must be one of {', '.join(choices)}")
            if f.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(f"{f.name} is {shown(value)}; it must be a whole number")
            least = 0 if f.name in _MAY_BE_ZERO else 1
            if f.type == "int" and value < least:
                raise ConfigError(f"{f.name} is {shown(value)}; it must be at least {least}")
            if f.type == "int" and value > LIMITS.get(f.name, MOST):
                raise ConfigError(f"{f.name} is {shown(value)}; it must be at most {LIMITS.get(f.name, MOST)}")
            if f.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{f.name} is {shown(value)}; it must be true or false")
            if f.type == "float" and not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise ConfigError(f"{f.name} is {shown(value)}; it must be a number in [0, 1)")
        for width, heads in (
            ("encoder_embed_dim", "encoder_attention_heads"),
            ("st_dim", "st_decoder_heads"),
            ("mt_decoder_embed_dim", "mt_decoder_heads"),
            ("unit_decoder_embed_dim", "unit_decoder_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ConfigError(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")
        if self.asr_condition_every and self.asr_condition_every >= self.asr_decoder_layers:
            every, layers = self.asr_condition_every, self.asr_decoder_layers
            raise ConfigError(f"asr_condition_every is {every}; of asr_decoder_layers, {layers}, none come behind it")
        if self.full_context and self.shift_context:
            raise ConfigError("full_context has no segments whose context shift_context could shift; choose one")
        if self.encoder_final_norm and not self.encoder_normalize_before:
            raise ConfigError("encoder_final_norm belongs to encoder_normalize_before: post-norm layers end in a norm")
        contexts = self.contexts
        if contexts and (self.encoder_relative_bias or self.full_context):
            raise ConfigError("train_contexts goes neither with encoder_relative_bias nor with full_context")
        if self.encoder_stem == "whisper" and self.input_channels != 1:
            raise ConfigError(f"input_channels is {self.input_channels}; encoder_stem: whisper has one")

    @property
    def contexts(self) -> list[tuple[int, int]]:
        """``train_contexts`` as (segment, right context) in encoder frames.

        Raises:
            ConfigError: it is not a list of such pairs.
        """
        pairs = []
        for entry in filter(None, self.train_contexts.split(",")):
            segment, colon, right = entry.strip().partition(":")
            if not (colon and segment.isdecimal() and right.isdecimal() and int(segment)):
                raise ConfigError(f"train_contexts holds {entry!r}; entries are segment:right, such as 8:4")
            pairs.append((int(segment), int(right)))
        return pairs

    @property
    def features(self) -> str:
        """Which log-mel the encoder hears (see ``audio.features``): ``kaldi`` or ``whisper``."""
        return "whisper" if self.encoder_stem == "whisper" else "kaldi"

    @property
    def frame_rate_factor(self) -> int:
        """Frames of the Emformer layers per encoder frame of 40 ms."""
        return 2 if self.encoder_stem == "whisper" else 1

    @property
    def st_dim(self) -> int:
        """Width of the ST CTC head's layers."""
        return self.st_decoder_embed_dim or self.encoder_embed_dim

    @property
    def ctc_layers(self) -> int:
        """Causal layers of both CTC heads."""
        return self.asr_decoder_layers + self.st_decoder_layers

    @property
    def units_read_text(self) -> bool:
        """Does the unit decoder read MT decoder states, and not encoder frames?"""
        return self.unit_decoder_input != "encoder"

    @property
    def left_frames(self) -> int:
        """Frames of left context that a layer keeps; with ``shift_context`` more, for a segment may lack its own."""
        lacking = self.frame_rate_factor * (self.segment_length + self.right_context_length) - 1
        return self.frame_rate_factor * self.left_context_length + (lacking if self.shift_context else 0)

    @property
    def stream_bytes(self) -> int:
        """About how much one stream takes: keys and values of all layers, and the attention masks that are kept."""
        frames, left = self.max_sentence_frames + 1, self.left_frames
        inputs = self.max_target_tokens if self.units_read_text else self.max_sentence_frames
        places = (
            self.encoder_layers * self.encoder_embed_dim * (self.memory_size + left)
            + self.ctc_layers * self.st_dim * self.st_left_context
            + self.mt_decoder_layers * self.mt_decoder_embed_dim * (self.max_target_tokens + frames)
            + self.unit_decoder_layers * self.unit_decoder_embed_dim * (inputs * self.ctc_upsample_ratio + frames)
        )
        # Eight segments at once; a mask for each age of a stream until the rings are full and come round.
        queries = self.frame_rate_factor * (self.segment_length + self.right_context_length)
        masks = 8 * queries * (9 * queries + self.memory_size + left + 8) * min(512, self.memory_size + left + 2)
        return 8 * places + 4 * masks

    @classmethod
    def small(cls, **changes: Any) -> EchoStreamConfig:
        """About a quarter of the default's compute: what a CPU can train (arch ``echostream_small``)."""
        return dataclasses.replace(cls(**SMALL), **changes)

    @classmethod
    def tiny(cls, **changes: Any) -> EchoStreamConfig:
        """To try a recipe and a corpus out in minutes; it translates nothing (arch ``echostream_tiny``)."""
        return dataclasses.replace(cls(**TINY), **changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EchoStreamConfig:
        """Build a configuration from plain values, refusing keys that do not exist."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], sorted(known)) or [*sorted(known)[:3], "..."]
            raise ConfigError(f"unknown configuration key {shown(unknown[0])}; known keys: {', '.join(near)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> EchoStreamConfig:
        """Read a YAML file of ``key: value`` lines; keys left out keep their defaults."""
        values = read_mapping(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add one option per field, named as fairseq names them (``--encoder-layers``).

        Defaults are left out on purpose: fairseq's architectures fill what the user did not say.
        """
        for f in fields(cls):
            name = "--" + f.name.replace("_", "-")
            text = f"{f.metadata['help']} (default: {f.default})"
            if f.type == "bool":
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            else:
                kind = {"int": int, "float": float, "str": str}[str(f.type)]
                parser.add_argument(
                    name, type=kind, choices=f.metadata["choices"], default=argparse.SUPPRESS, help=text
                )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> EchoStreamConfig:
        """Collect the fields that ``args`` holds; the rest keep their defaults."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if getattr(args, f.name, None) is not None})


# Lengths and counts that may be left at nothing.
_MAY_BE_ZERO = frozenset({
    "right_context_length", "left_context_length", "memory_size", "asr_decoder_layers", "asr_condition_every",
    "st_decoder_layers", "encoder_position_period", "encoder_conv_kernel", "st_decoder_embed_dim",
    "st_decoder_ffn_dim", "mt_decoder_prompt",
})  # fmt: skip

SMALL: dict[str, Any] = dict(
    conv_channels=96,
    encoder_embed_dim=192,
    encoder_layers=10,
    encoder_attention_heads=3,
    encoder_ffn_embed_dim=768,
    # At equal updates 6 and 17 % fewer token errors than without (ASR CTC from scratch, 1,500 updates of 60 s).
    encoder_relative_bias=True,
    encoder_conv_kernel=15,
    st_decoder_layers=2,
    st_decoder_heads=3,
    mt_decoder_layers=3,
    mt_decoder_heads=3,
    mt_decoder_embed_dim=192,
    mt_decoder_ffn_dim=768,
    unit_decoder_input="mt-tokens",
    ctc_upsample_ratio=16,
    unit_decoder_layers=4,
    unit_decoder_heads=3,
    unit_decoder_embed_dim=192,
    unit_decoder_ffn_dim=768,
)

TINY: dict[str, Any] = SMALL | dict(
    conv_channels=32,
    encoder_embed_dim=96,
    encoder_layers=3,
    encoder_attention_heads=2,
    encoder_ffn_embed_dim=192,
    st_decoder_layers=1,
    st_decoder_heads=2,
    mt_decoder_layers=1,
    mt_decoder_heads=2,
    mt_decoder_embed_dim=96,
    mt_decoder_ffn_dim=192,
    unit_decoder_layers=1,
    unit_decoder_heads=2,
    unit_decoder_embed_dim=96,
    unit_decoder_ffn_dim=192,
)
