"""Work-arounds for other people's software, all of them, each with the version it is for and how to tell it can go.

What is here:

* ``import_torchaudio``: torchaudio on a CPU-only torch.
* ``apply``: fairseq checkpoints under ``weights_only=True``.
* ``bf16_without_tpu``: ``--bf16`` where there is no TPU.

A plugin that is imported before fairseq looks for it is registered by ``plugin``; SimulEval's defects for speech output
are worked around beside its scorers, in ``echostream.evaluation.simul``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType
from typing import Any

from echostream.errors import require

_EXTENSION = "torchaudio._extension"


def import_torchaudio() -> ModuleType:
    """Import torchaudio, without its compiled extension where that cannot be loaded.

    For torchaudio 2.11.0 from PyPI: its extension is linked to CUDA's libraries, so that ``import torchaudio`` raises
    ``OSError: Could not load this library`` beside a CPU-only torch. Everything EchoStream uses (Kaldi features,
    ``models.Emformer``) is Python on top of torch.

    Can go when ``pip install torch==<CPU build> torchaudio && python -c "import torchaudio"`` succeeds.

    Raises:
        MissingExtraError: torchaudio is not installed.
    """
    if "torchaudio" in sys.modules:
        return sys.modules["torchaudio"]
    try:
        return require("torchaudio", "train")
    except (OSError, RuntimeError) as error:  # RuntimeError: built for another CUDA version than torch
        stub: Any = ModuleType(_EXTENSION, "stands in for the extension that could not be loaded")
        message = f"torchaudio's compiled extension is not available: {str(error).splitlines()[0]}"

    def fail_if_no_align(function: Any) -> Any:
        def fail(*_args: Any, **_kwargs: Any) -> None:
            raise RuntimeError(message)

        return fail

    stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
    stub._IS_ALIGN_AVAILABLE = False
    stub._check_cuda_version = lambda: None
    stub.fail_if_no_align = fail_if_no_align
    sys.modules[_EXTENSION] = stub
    return importlib.import_module("torchaudio")


def apply() -> None:
    """Let ``torch.load(..., weights_only=True)`` read what fairseq's trainer writes. Cheap; may be called again.

    For torch ≥ 2.6 (``weights_only`` on by default) with ve-fairseq 0.12.3 and fairseq-fixed 0.12.3.1: checkpoints hold
    an ``argparse.Namespace``, at times numpy scalars (a best score) and a ``Dictionary``, older ones a whole omegaconf
    tree (HuBERT's). All of these are plain containers: building one runs no code of the file's choosing. The switch
    itself stays on everywhere.

    Can go when a checkpoint just written by fairseq-train loads in a fresh interpreter with only torch imported.
    """
    import numpy
    import torch  # here, not at the top: importing echostream.compat stays light

    core = numpy._core if hasattr(numpy, "_core") else numpy.core  # numpy 2 renamed it
    scalar = core.multiarray.scalar
    allowed: list[Any] = [
        argparse.Namespace,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),  # the name numpy 1 wrote
        numpy.dtype,
        *{type(numpy.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "bool")},
    ]
    if "fairseq" in sys.modules:
        allowed += _fairseq_types()
    torch.serialization.add_safe_globals(allowed)


def _fairseq_types() -> list[Any]:
    """The plain containers found in checkpoints of fairseq's own models and in what its workers send each other."""
    import collections
    import typing

    from fairseq.data.dictionary import Dictionary
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    return [
        _TensorPlaceholder,  # what a worker is sent in place of tensors when a distributed run is resumed
        Dictionary,
        DictConfig,
        ListConfig,
        ContainerMetadata,
        Metadata,
        AnyNode,
        typing.Any,
        collections.defaultdict,
        dict,
        list,
        int,
    ]


def bf16_without_tpu(args: argparse.Namespace) -> None:
    """Let ``--bf16`` train on a CPU or a GPU; called by the architectures, the last to see fairseq's arguments.

    For ve-fairseq 0.12.3 and fairseq-fixed 0.12.3.1: ``parse_args_and_arch`` takes ``--bf16`` to mean a TPU and sets
    ``args.tpu``, whereupon the trainer asks for torch_xla.

    Can go when ``fairseq-train --bf16`` gets past building the trainer without torch_xla.
    """
    import importlib.util

    if getattr(args, "bf16", False) and importlib.util.find_spec("torch_xla") is None:
        args.tpu = False
