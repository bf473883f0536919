"""Work-arounds for other people's software, all of them, each with the version it is for and how to tell it can go.

What is here:

* ``import_torchaudio``: torchaudio on a CPU-only torch.
* ``apply``: fairseq checkpoints under ``weights_only=True``.
* ``register_with_fairseq``: a plugin that was imported before fairseq looked for it.
* ``bf16_without_tpu``: ``--bf16`` where there is no TPU.
* ``keep_freed_memory``: large tensors on a CPU without a page fault for each of their pages.
* ``huge_pages``: weights that are read from end to end at every step, without a look into the page table every 4 KB.

SimulEval's defects for speech output are worked around beside its scorers, in ``echostream.evaluation.simul``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from echostream.errors import require

_EXTENSION = "torchaudio._extension"
HUGE_PAGE = 1 << 21


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
        stub = ModuleType(_EXTENSION, "stands in for the extension that could not be loaded")
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


def register_with_fairseq() -> None:
    """Register EchoStream's task, criterion and model with fairseq.

    For ve-fairseq 0.12.3 and fairseq-fixed 0.12.3.1: ``import_user_module`` imports the files of ``tasks/`` and
    ``models/`` only while it imports the package itself, and skips both when ``echostream`` is already in
    ``sys.modules``, as it is in every script of ours that then calls fairseq in the same process.

    Can go when ``fairseq.utils.import_user_module`` looks into ``tasks/`` and ``models/`` of an imported package.

    Raises:
        MissingExtraError: fairseq is not installed.
    """
    require("fairseq", "train")
    apply()
    importlib.import_module("echostream.tasks")
    importlib.import_module("echostream.models.fairseq_model")


def bf16_without_tpu(args: argparse.Namespace) -> None:
    """Let ``--bf16`` train on a CPU or a GPU; called by the architectures, the last to see fairseq's arguments.

    For ve-fairseq 0.12.3 and fairseq-fixed 0.12.3.1: ``parse_args_and_arch`` takes ``--bf16`` to mean a TPU and sets
    ``args.tpu``, whereupon the trainer asks for torch_xla.

    Can go when ``fairseq-train --bf16`` gets past building the trainer without torch_xla.
    """
    import importlib.util

    if getattr(args, "bf16", False) and importlib.util.find_spec("torch_xla") is None:
        args.tpu = False


def keep_freed_memory() -> bool:
    """Let malloc keep what torch frees for the next tensor, instead of giving it back to the system. For training.

    For glibc's malloc (seen with 2.36): an allocation of more than 32 MB is a mapping of its own, unmapped when freed;
    a training step maps, faults in and zeroes its large activations anew every time. Four utterances of 120 s through
    the Emformer's layers: 1 s of page faults on 3.3 s of computing, none with this. The process then stays as large as
    its largest step.

    Can go when torch's CPU allocator keeps freed blocks itself, as its CUDA allocator does.

    Returns:
        whether there is a glibc to tell.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Put the memory that this process allocates meanwhile into pages of 2 MB, as far as it comes in such pieces.

    For ONNX Runtime (seen with 1.32) on Linux, where transparent huge pages are to be asked for (``madvise``): it
    allocates weights as it comes. A step of the encoder reads all 62 MB of them, 12 % faster this way. Older kernels
    than 6.1 do it later by themselves or not at all; elsewhere this does nothing.

    Can go when ONNX Runtime asks for such pages itself.
    """
    before = _whole_pages()
    yield
    new = _whole_pages() - before
    if not new:
        return
    starts = sorted(page for page in new if page - 1 not in new)
    ends = sorted(page + 1 for page in new if page + 1 not in new)
    import ctypes

    huge_page, collapse = 14, 25  # linux/mman.h
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in zip(starts, ends, strict=True):
        for advice in (huge_page, collapse):
            madvise(start * HUGE_PAGE, (end - start) * HUGE_PAGE, advice)


def _whole_pages() -> set[int]:
    """Numbers of the pages of 2 MB that lie wholly in this process's own writable memory; none outside of Linux."""
    pages: set[int] = set()
    try:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
            for line in maps:
                span, access, _, _, inode, *name = line.split()
                if access.startswith("rw") and inode == "0" and (not name or name[0] == "[heap]"):
                    start, end = (int(address, 16) for address in span.split("-"))
                    pages.update(range(-(-start // HUGE_PAGE), end // HUGE_PAGE))
    except OSError:
        pass
    return pages
