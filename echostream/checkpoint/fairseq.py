"""What fairseq-train writes: weights, with the configuration where the file tells it, and the mean of several."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from echostream.checkpoint.bundle import read_exported_state
from echostream.checkpoint.layout import EXPORTED_FORMAT, files_of, read_config
from echostream.config import EchoStreamConfig
from echostream.errors import CheckpointError, ConfigError
from echostream.weights import check_tensors, read_weights

if TYPE_CHECKING:
    import torch


def read_fairseq_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], EchoStreamConfig | None]:
    """Weights and, where the file tells it, configuration of a checkpoint written by fairseq-train; or those of an
    exported directory, dequantised.

    Raises:
        CheckpointError: see ``read_weights`` and ``read_state``; or the file holds no ``model``.
    """
    if Path(path).is_dir():
        values = read_config(Path(path))
        if values["format"] == EXPORTED_FORMAT:
            return read_exported_state(Path(path)), EchoStreamConfig.from_dict(values["model"])
        path = files_of(Path(path), values)["model"]
    checkpoint = read_weights(path)
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("model"), Mapping):
        raise CheckpointError(f"{path} is not a fairseq checkpoint: it has no 'model'")
    tree = checkpoint.get("cfg")
    arguments = (tree.get("model") if isinstance(tree, Mapping) else None) or checkpoint.get("args")
    if isinstance(arguments, Mapping):
        arguments = argparse.Namespace(**{str(name): value for name, value in arguments.items()})
    try:
        config = EchoStreamConfig.from_args(arguments) if arguments is not None else None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return check_tensors(checkpoint["model"], str(path)), config


def average_checkpoints(paths: Iterable[str | Path]) -> tuple[dict[str, torch.Tensor], EchoStreamConfig | None]:
    """The mean of the weights of several fairseq checkpoints of one run (float64 sums); the last one's configuration.

    Raises:
        CheckpointError: a checkpoint cannot be read, or its weights differ in name or shape from the first one's.
    """
    paths = [Path(path) for path in paths]
    total: dict[str, torch.Tensor] = {}
    config = None
    for path in paths:
        state, config = read_fairseq_checkpoint(path)
        if total and {k: v.shape for k, v in total.items()} != {k: v.shape for k, v in state.items()}:
            raise CheckpointError(f"{path} cannot be averaged with {paths[0]}: it is of another model")
        for name, tensor in state.items():
            value = tensor.double() if tensor.is_floating_point() else tensor
            total[name] = total[name] + value if name in total and tensor.is_floating_point() else value
    return {k: (v / len(paths)).float() if v.is_floating_point() else v for k, v in total.items()}, config
