"""The steps of a model run by torch, in place of ``ExportedModel``: no export, any device, any floating-point type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from echostream.models.graphs import model_graphs

if TYPE_CHECKING:
    from echostream.models.echostream_model import EchoStreamModel


class TorchModel:
    """What ``ExportedModel`` is to a directory of graphs, for a torch model; without a vocoder.

    It shares the model's weights as they are now; some are laid out anew.
    """

    def __init__(self, model: EchoStreamModel):
        weight = model.asr_head.weight
        self.device, self.dtype = weight.device, weight.dtype
        with torch.no_grad():
            self.graphs = model_graphs(model)

    def check(self, names: tuple[str, ...]) -> None:
        assert all(name in self.graphs for name in names)

    @torch.inference_mode()
    def run(self, name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs of a graph."""
        out = self.graphs[name]({name: self._tensor(array) for name, array in feeds.items()})
        return {name: _array(value) for name, value in out.items()}

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        array = array if array.flags.writeable else array.copy()
        tensor = torch.from_numpy(array)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


def _array(value: torch.Tensor) -> np.ndarray:
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    return value.cpu().numpy()
