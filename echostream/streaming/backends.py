"""What runs a bundle's model: torch, or the exported graphs. Each is imported only where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echostream.streaming.exported.model import ExportedModel
from echostream.streaming.stages import Backend

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle


def backend_of(bundle: Bundle) -> Backend:
    """The backend for what the bundle was loaded from."""
    if isinstance(bundle.model, ExportedModel):
        from echostream.streaming.exported.stages import ExportedStages

        return ExportedStages
    from echostream.streaming.exported.torch_model import TorchStages

    return TorchStages
