"""EchoStream as a fairseq model: ``--arch echostream`` and ``--arch echostream_small``."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echostream import compat
from echostream.checkpoint import read_fairseq_checkpoint
from echostream.config import EchoStreamConfig
from echostream.constants import NUM_SPECIALS
from echostream.errors import CheckpointError, ManifestError, require
from echostream.models.echostream_model import EchoStreamModel

require("fairseq", "train")

from fairseq.models import BaseFairseqModel, register_model, register_model_architecture  # noqa: E402

logger = logging.getLogger(__name__)


@register_model("echostream")
class FairseqEchoStreamModel(EchoStreamModel, BaseFairseqModel):
    """``EchoStreamModel`` under fairseq's interface; the weights have the same names."""

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """One option per field of ``EchoStreamConfig``, and ``--encoder-init``."""
        EchoStreamConfig.add_args(parser)
        parser.add_argument(
            "--encoder-init",
            metavar="CHECKPOINT",
            help="start from this checkpoint's encoder (and ASR head, where the source dictionary is the same)",
        )

    @classmethod
    def build_model(cls, args: argparse.Namespace, task: Any) -> "FairseqEchoStreamModel":
        """The model of ``args`` with the vocabulary sizes of the task's dictionaries, which ``args`` then records.

        Raises:
            ManifestError: the task lacks a dictionary. ConfigError: a bad value. CheckpointError: ``--encoder-init``.
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
        if getattr(args, "encoder_init", None):
            init_encoder(model, args.encoder_init)
            args.encoder_init = None  # the path is this machine's: a checkpoint must not depend on it later
        return model

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


def init_encoder(model: EchoStreamModel, path: str | Path) -> list[str]:
    """Copy the encoder's weights from a checkpoint, and the ASR head's where its dictionary has the same size.

    Returns:
        The names of the weights that were copied.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its encoder is of another shape.
    """
    weights, _ = read_fairseq_checkpoint(path)
    own = model.state_dict()
    wanted = [name for name in own if name.startswith("encoder.")]
    for name in wanted:
        if name not in weights:
            raise CheckpointError(f"checkpoint {path} lacks {name}; its encoder is not of this configuration")
        if weights[name].shape != own[name].shape:
            raise CheckpointError(
                f"{name} is {list(weights[name].shape)} in {path}, {list(own[name].shape)} in this configuration; "
                "--encoder-init needs an encoder of the same sizes"
            )
    head = [name for name in own if name.startswith("asr_head.")]
    if not all(name in weights and weights[name].shape == own[name].shape for name in head):
        logger.warning("%s: the ASR head is of another dictionary and starts afresh", path)
        head = []
    model.load_state_dict({**own, **{name: weights[name] for name in wanted + head}})
    logger.info("%s: took over %d weights of the encoder and %d of the ASR head", path, len(wanted), len(head))
    return wanted + head


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
