"""Whisper as OpenAI published it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echostream.errors import CheckpointError
from echostream.weights import read_weights
from echostream.whisper.layouts import Layout


@dataclass(frozen=True)
class Loaded:
    """A torch tensor in memory; implements ``Parameter``."""

    path: Path
    key: str
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> np.ndarray:
        import torch

        tensor = self.tensor
        whole = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
        # A file may claim any shape for a storage of a few bytes (strides of 0).
        if not whole or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise CheckpointError(f"{self.path}: {self.key} is no plain tensor of floating point numbers")
        return tensor.detach().float().contiguous().numpy()


def open_openai(path: Path) -> Layout:
    """OpenAI's ``.pt``: ``{"dims": {...}, "model_state_dict": {...}}``, read without running anything in it.

    Raises:
        CheckpointError: it is damaged, would run code, or is something else.
    """
    import torch

    checkpoint = read_weights(path, "Whisper checkpoint")
    if not isinstance(checkpoint, Mapping) or not {"dims", "model_state_dict"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is not a Whisper checkpoint of OpenAI's: it lacks 'dims' or 'model_state_dict'")
    dims, state = checkpoint["dims"], checkpoint["model_state_dict"]
    if not isinstance(dims, Mapping) or not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: 'dims' and 'model_state_dict' must map names to values")

    def find(name: str) -> Loaded | None:
        tensor = state.get(name)
        return Loaded(path, name, tensor) if isinstance(tensor, torch.Tensor) else None

    return Layout(path, find, lambda name: name, dict(dims))
