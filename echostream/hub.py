"""Models from a directory, or by their name from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echostream.errors import CheckpointError, require
from echostream.loading import reason

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

# What a model needs here; a repository may hold more, such as weights for other tools.
FILES = ["config.json", "model.safetensors", "onnx/*.onnx", "*.txt", "*.model", "*.npz", "vocoder.json", "README.md"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def from_pretrained(name: str | Path, revision: str | None = None, **options: Any) -> Bundle:
    """A model, to be given to sessions.

    Args:
        name: a directory that ``echostream export`` wrote (or a checkpoint directory), or ``owner/model`` on the hub,
            which is downloaded once.
        revision: branch, tag or commit on the hub; default: the newest.
        options: ``device``, ``backend`` and ``threads`` as for ``load_bundle``.

    Raises:
        CheckpointError: there is no such directory and no such model on the hub, or it cannot be used.
        MissingExtraError: a name on the hub is given and ``huggingface_hub`` is not installed.
    """
    from echostream.checkpoint import load_bundle

    directory = Path(name)
    if not directory.is_dir():
        if not isinstance(name, str) or directory.exists() or not _NAME.fullmatch(name):
            raise CheckpointError(f"{name} is neither a directory nor a model's name on the hub (owner/model)")
        hub = require("huggingface_hub", "hub")
        try:
            directory = Path(hub.snapshot_download(name, revision=revision, allow_patterns=FILES))
        except Exception as error:  # its own errors, those of its HTTP client, and those of the system
            raise CheckpointError(
                f"{name} is no directory here and could not be fetched from the hub: {reason(error)}"
            ) from None
    return load_bundle(directory, **options)
