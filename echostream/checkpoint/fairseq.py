"""What fairseq-train writes: weights, with the configuration where the file tells it, and the mean of several."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
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


def average_checkpoints(
    paths: Iterable[str | Path], shares: Sequence[float] | None = None, parts: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], EchoStreamConfig | None]:
    """The weighted mean of the weights of several checkpoints (float64 sums), with the first one's configuration.

    Between a model and what became of it on narrower data lie models that keep most of what it learnt and less of what
    it forgot (Wortsman et al., 2022, "Robust fine-tuning of zero-shot models").

    Args:
        shares: of each checkpoint, adding up to 1; default: the same for all.
        parts: "encoder", "asr_head" ...: what is averaged; the rest is the first one's. Default: everything.

    Raises:
        CheckpointError: a checkpoint cannot be read, or its weights differ in name or shape from the first one's.
        ConfigError: the shares do not fit, or a checkpoint lacks one of the parts.
    """
    paths = [Path(path) for path in paths]
    shares = [1 / len(paths)] * len(paths) if shares is None else shares
    if len(shares) != len(paths) or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"{len(paths)} checkpoints need as many shares, adding up to 1, not {list(shares)}")
    rest: dict[str, torch.Tensor] = {}
    total: dict[str, torch.Tensor] = {}
    config = None
    for path, share in zip(paths, shares, strict=True):
        whole, its_config = read_fairseq_checkpoint(path)
        if not total:
            rest, config = whole, its_config
        for part in parts:
            if not any(name.startswith(f"{part}.") for name in whole):
                known = ", ".join(sorted({name.partition(".")[0] for name in whole}))
                raise ConfigError(f"{path} has no part {part!r}; it has {known}")
        starts = tuple(f"{part}." for part in parts) or ("",)
        state = {name: tensor for name, tensor in whole.items() if name.startswith(starts)}
        if total and {k: v.shape for k, v in total.items()} != {k: v.shape for k, v in state.items()}:
            raise CheckpointError(f"{path} cannot be averaged with {paths[0]}: it is of another model")
        for name, tensor in state.items():
            if tensor.is_floating_point():
                tensor = share * tensor.double() + total.get(name, 0.0)
            total[name] = tensor
    return rest | {k: v.float() if v.is_floating_point() else v for k, v in total.items()}, config
