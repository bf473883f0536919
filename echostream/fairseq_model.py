"""EchoStream as a fairseq model: ``--arch echostream``, ``echostream_small`` and ``echostream_tiny``."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echostream import compat
from echostream.checkpoint.fairseq import read_fairseq_checkpoint
from echostream.config import EchoStreamConfig
from echostream.constants import NUM_SPECIALS
from echostream.errors import CheckpointError, ConfigError, ManifestError, require
from echostream.frozen import FrozenOutputs
from echostream.models.echostream_model import EchoStreamModel
from echostream.models.text_encoder import TextEncoder
from echostream.models.whisper_init import decoder_weights, encoder_weights, whisper_config
from echostream.text import Vocabulary
from echostream.whisper.source import whisper_source
from echostream.whisper.subwords import piece_origins
from echostream.whisper.tokens import WhisperBPE, prompt
from echostream.whisper.weights import PUBLISHED, read_whisper

require("fairseq", "train")

from fairseq.models import BaseFairseqModel, register_model, register_model_architecture  # noqa: E402

logger = logging.getLogger(__name__)

# The parts that --encoder-init and --decoder-init take over, and the heads that depend on a dictionary.
ENCODER, HEADS = ("encoder.",), ("asr_head.", "st_decoder.")
DECODERS = ("mt_decoder.", "unit_decoder.")
FROM_ZERO = ("unit_decoder.tokens.weight",)  # a checkpoint without it is one in which it is zero
WHISPER = "whisper:"  # before the source of a Whisper model
PARTS = ("encoder", "asr_head", "st_decoder", "mt_decoder", "unit_decoder")


@register_model("echostream")
class FairseqEchoStreamModel(EchoStreamModel, BaseFairseqModel):
    """``EchoStreamModel`` under fairseq's interface; the weights have the same names."""

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """One option per field of ``EchoStreamConfig``, and where its parts start from."""
        EchoStreamConfig.add_args(parser)
        parser.add_argument(
            "--encoder-init",
            metavar="CHECKPOINT",
            help="start from the encoder (and CTC heads, where the dictionaries are the same) of this checkpoint or "
            "exported directory; "
            "whisper:SOURCE is a Whisper model (base, CTranslate2 or Hugging Face directory, OpenAI's .pt)",
        )
        parser.add_argument(
            "--decoder-init",
            metavar="CHECKPOINT",
            help="start from the MT and unit decoders of this checkpoint or exported directory, such as those trained "
            "with --source text; "
            "whisper:SOURCE, a directory with its tokenizer, gives the MT decoder",
        )
        parser.add_argument(
            "--mt-init",
            metavar="CHECKPOINT",
            help="start from this checkpoint's MT decoder, whatever --decoder-init has for it",
        )
        parser.add_argument(
            "--freeze",
            metavar="PARTS",
            help=f"leave these parts as they are: a comma-separated list of {', '.join(PARTS)}, or of modules and "
            "weights in them (encoder.subsampler,encoder.layers.0)",
        )

    @classmethod
    def build_model(cls, args: argparse.Namespace, task: Any) -> FairseqEchoStreamModel:
        """The model of ``args`` with the vocabulary sizes of the task's dictionaries, which ``args`` then records.

        Raises:
            ManifestError: the task lacks a dictionary. ConfigError: a bad value. CheckpointError: a checkpoint to start
                from cannot be used.
        """
        sizes = dict(
            asr_vocab_size=_symbols(task, "source_dictionary"),
            st_vocab_size=_symbols(task, "target_dictionary"),
            mt_vocab_size=_symbols(task, "target_dictionary"),
            num_units=_symbols(task, "unit_dictionary") - NUM_SPECIALS,
        )
        cfg = dataclasses.replace(EchoStreamConfig.from_args(args), **sizes)
        for name, value in cfg.to_dict().items():
            setattr(args, name, value)
        model = cls(cfg)
        if getattr(task, "reads_text", False):
            model.encoder = TextEncoder(cfg)
        features = getattr(getattr(task, "config", None), "features", cfg.features)
        if features != cfg.features:
            raise ConfigError(
                f"encoder_stem {cfg.encoder_stem!r} hears {cfg.features} features, but the data directory's are "
                f"{features}: say --features {cfg.features}"
            )
        starts = (("encoder_init", ENCODER, HEADS), ("decoder_init", DECODERS, ()), ("mt_init", DECODERS[:1], ()))
        for option, parts, heads in starts:
            source = getattr(args, option, None)
            if source and source.startswith(WHISPER):
                start_from_whisper(model, source.removeprefix(WHISPER), option, task)
            elif source:
                take_over(model, source, parts, heads)
            if source:
                setattr(args, option, None)  # the path is this machine's: a checkpoint must not depend on it later
        for part in filter(None, (getattr(args, "freeze", None) or "").split(",")):
            weights = [value for name, value in model.named_parameters() if f"{name}.".startswith(f"{part}.")]
            if not weights:
                raise ConfigError(f"--freeze names {part!r}; the parts are {', '.join(PARTS)} and what is in them")
            for weight in weights:
                weight.requires_grad_(False)
        if not any(weight.requires_grad for weight in model.parameters()):
            raise ConfigError("--freeze names every part; there is nothing left to train")
        model.keep_frozen(float(getattr(getattr(task, "cfg", None), "keep_frozen", 0.0)))
        return model

    _frozen: FrozenOutputs | None = None

    def keep_frozen(self, gigabytes: float) -> None:
        """Compute what the frozen encoder, and an MT decoder frozen with it, give once for every batch of a training.

        Raises:
            ConfigError: the encoder learns, or hears every batch in another context.
        """
        if not gigabytes:
            return
        if any(weight.requires_grad for weight in self.encoder.parameters()):
            raise ConfigError("--keep-frozen keeps what a frozen encoder gives; say --freeze encoder, too")
        if len(set(self.config.contexts)) > 1:
            raise ConfigError(f"--keep-frozen keeps one context; --train-contexts has {self.config.train_contexts}")
        decoder_is = not any(weight.requires_grad for weight in self.mt_decoder.parameters())
        self._frozen = FrozenOutputs(gigabytes, decoder_is and self.config.units_read_text)

    def forward(self, *inputs: Any, items: Tensor | None = None, **named: Any) -> dict[str, Any]:
        """As ``EchoStreamModel.forward``; ``items`` [B] are the batch's numbers in a training's plan, by which its
        frames are found again with ``--keep-frozen``."""
        if items is None or self._frozen is None or "frames" in named["parts"] or named.get("visible") is not None:
            return super().forward(*inputs, **named)
        of = (named[name] for name in ("src_tokens", "src_lengths", "prev_output_tokens", "windows"))
        return super().forward(*inputs, **named, encoded=self._frozen(self, items, *of, units="unit" in named["parts"]))

    def get_normalized_probs(
        self, net_output: dict[str, Any] | tuple[Any, ...] | Tensor, log_probs: bool, sample: dict | None = None
    ) -> Tensor:
        """(Log-)probabilities of the MT decoder [S, U, vocab], in fp32, of a forward's dict or of scores."""
        logits = net_output
        if isinstance(net_output, dict):
            logits = net_output["mt_logits"]
        elif isinstance(net_output, (tuple, list)):
            logits = net_output[0]
        return torch.log_softmax(logits.float(), dim=-1) if log_probs else torch.softmax(logits.float(), dim=-1)

    def max_positions(self) -> None:
        """No limit: the encoder is linear in time and the positions are computed, not looked up."""
        return None


def _symbols(task: Any, name: str) -> int:
    dictionary = getattr(task, name, None)
    if dictionary is None:
        raise ManifestError(f"the task {type(task).__name__} has no {name}; train with --task echostream_s2st")
    return len(dictionary)


def take_over(model: EchoStreamModel, path: str | Path, parts: Sequence[str], heads: Sequence[str] = ()) -> list[str]:
    """Copy the weights of ``parts`` from a checkpoint, and those of ``heads`` whose dictionaries have the same size.

    Returns:
        The names of the weights that were copied.

    Raises:
        CheckpointError: the checkpoint cannot be read, lacks a part, or holds it in another shape.
    """
    weights, _ = read_fairseq_checkpoint(path)
    own = model.state_dict()
    wanted = [name for name in own if name.startswith(tuple(parts)) and (name in weights or name not in FROM_ZERO)]
    for name in wanted:
        if name not in weights:
            raise CheckpointError(f"checkpoint {path} lacks {name}; it is not of this configuration")
        if weights[name].shape != own[name].shape:
            raise CheckpointError(
                f"{name} is {list(weights[name].shape)} in {path}, {list(own[name].shape)} in this configuration; "
                "starting from a checkpoint needs the same sizes"
            )
    for head in heads:
        names = [name for name in own if name.startswith(head)]
        if all(name in weights and weights[name].shape == own[name].shape for name in names):
            wanted += names
        else:
            logger.warning("%s: %s is of another dictionary or size and starts afresh", path, head.rstrip("."))
    model.load_state_dict({**own, **{name: weights[name] for name in wanted}})
    logger.info("%s: took over %d weights of %s", path, len(wanted), ", ".join(p.rstrip(".") for p in parts))
    return wanted


def start_from_whisper(model: EchoStreamModel, source: str, option: str, task: Any) -> None:
    """Give the encoder (``encoder_init``) or the MT decoder (``decoder_init``, ``mt_init``) a Whisper model's weights.

    Raises:
        CheckpointError: ``source`` is no Whisper model, or of another size. ConfigError: the part is of another kind.
    """
    path = whisper_source(source)
    whisper = read_whisper(path)
    if option == "encoder_init":
        part, weights = model.encoder, encoder_weights(whisper, model.config)
    else:
        vocabulary = Vocabulary.load(task.config.path("dict_tgt"))
        bpe = WhisperBPE.load(path)
        asked = prompt(whisper.dims.n_vocab, bpe.end_of_text, task.config.source_lang)
        weights = decoder_weights(whisper, model.config, piece_origins(bpe, vocabulary), asked)
        part = model.mt_decoder
    part.load_state_dict({**part.state_dict(), **weights})
    logger.info("%s: took over %d weights of Whisper's %s", source, len(weights), option.removesuffix("_init"))


def _fill(args: argparse.Namespace, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


@register_model_architecture("echostream", "echostream")
def echostream(args: argparse.Namespace) -> None:
    """The design's configuration (34.2 M parameters)."""
    _fill(args, EchoStreamConfig().to_dict())
    compat.bf16_without_tpu(args)


@register_model_architecture("echostream", "echostream_small")
def echostream_small(args: argparse.Namespace) -> None:
    """About a quarter of the compute, for training on CPUs."""
    _fill(args, EchoStreamConfig.small().to_dict())
    compat.bf16_without_tpu(args)


@register_model_architecture("echostream", "echostream_tiny")
def echostream_tiny(args: argparse.Namespace) -> None:
    """To try a recipe and a corpus out in minutes; it translates nothing."""
    _fill(args, EchoStreamConfig.tiny().to_dict())
    compat.bf16_without_tpu(args)


def _register_whisper(size: str) -> None:
    def architecture(args: argparse.Namespace) -> None:
        _fill(args, whisper_config(PUBLISHED[size]).to_dict())
        compat.bf16_without_tpu(args)

    architecture.__doc__ = f"Encoder and MT decoder of Whisper {size}'s sizes, for --encoder-init whisper:SOURCE."
    register_model_architecture("echostream", f"echostream_whisper_{size}")(architecture)


for _size in PUBLISHED:
    _register_whisper(_size)
