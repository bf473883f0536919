"""What the frozen parts of a model give in training, computed once.

Where the encoder does not learn (``--freeze encoder``, the recipes' later phases), an item's frames are the same in
every epoch, if its recording is. With ``--keep-frozen GB`` every epoch has the items, batches and disguises of the
first one, and each batch goes through the encoder (and a frozen MT decoder) once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from echostream.models.echostream_model import EchoStreamModel, SentenceWindows

logger = logging.getLogger(__name__)

# How they are kept. Frames are of the order of 1 behind a LayerNorm, and an MT decoder computes in bfloat16 anyway.
KEPT = torch.float16


class Encoded(NamedTuple):
    """What is known of a batch before its forward: encoder frames x [B, T', D], their lengths [B], and the MT decoder's
    states [S, U, D], or None."""

    frames: Tensor
    lengths: Tensor
    hidden: Tensor | None


class FrozenOutputs:
    """Memory of ``Encoded`` batches; a batch is known by its items, in their order.

    Args:
        gigabytes: batches beyond so much are computed every time.
        with_hidden: the MT decoder is frozen, too, and its states are what units are made from.
    """

    def __init__(self, gigabytes: float, with_hidden: bool):
        self.room = int(gigabytes * 1e9)
        self.with_hidden = with_hidden
        self._known: dict[tuple[int, ...], Encoded] = {}

    @torch.no_grad()
    def __call__(
        self,
        model: EchoStreamModel,
        items: Tensor,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor | None,
        windows: SentenceWindows | None,
        units: bool,
    ) -> Encoded:
        """The batch of ``items`` [B], computed in eval mode where it is not known yet.

        Args:
            units: are units wanted of it? Without, the MT decoder is not asked.
        """
        key = tuple(items.tolist())
        if key in self._known:
            kept = self._known[key]
            dtype = next(model.parameters()).dtype
            hidden = None if kept.hidden is None else kept.hidden.to(dtype)
            return Encoded(kept.frames.to(dtype), kept.lengths, hidden)
        parts = [model.encoder, model.mt_decoder]
        modes = [part.training for part in parts]
        for part in parts:
            part.eval()
        frames, lengths = model.encoder(src_tokens, src_lengths)
        hidden = None
        if units and self.with_hidden and prev_output_tokens is not None:
            sentences = (frames, lengths) if windows is None else windows.gather(frames, lengths)
            hidden = model.mt_decoder(prev_output_tokens, *sentences, None)[1]
        for part, mode in zip(parts, modes):
            part.train(mode)
        kept = Encoded(frames.to(KEPT), lengths, None if hidden is None else hidden.to(KEPT))
        size = sum(tensor.nbytes for tensor in kept if tensor is not None)
        if size <= self.room:
            self._known[key] = kept
            self.room -= size
            if self.room < size:
                logger.info("--keep-frozen: %d batches fill the memory; the others are computed anew", len(self._known))
        return Encoded(frames, lengths, hidden)
