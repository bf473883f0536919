"""Queries, keys and values of whole utterances, gathered for attention in blocks of segments.

The same can be written with padding, slicing and concatenation, but their backward passes fill and add whole tensors
once per operation; here every element is copied once forwards and once backwards.

Shape legend: B utterances, N blocks, G segments in a block, S frames in a segment, W = S + R frames with its right
context, D width, H heads, d = D / H, L frames of left context, M summaries in the memory bank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GatherBlocks(torch.autograd.Function):
    """Give every block its queries, and keys and values in the order of ``emformer_layer``'s docstring."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, summary: Tensor | None, segment: int, left: int, memory: int, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gather.

        Args:
            qkv: [B, N, G, W, 3 D] projections of all frames.
            summary: [B, N, G, 2 D] keys and values of the segments' summaries; None without a memory bank.
            segment, left, memory, heads: S, L, M, H.

        Returns:
            queries [B N, H, G W, d], keys and values [B N, H, K, d] with K = M + G - 1 + L + G W (no M + G - 1 without
            a bank). What lies before an utterance's beginning is zero.
        """
        batch, blocks, group, width, _ = qkv.shape
        ctx.shape, ctx.sizes = qkv.shape, (segment, left, memory, heads)
        frames = _by_head(qkv.flatten(2, 3), 3, heads)
        summaries = _by_head(summary, 2, heads) if summary is not None else None
        bank = memory + group - 1 if memory else 0
        gathered = []
        for i in (1, 2):
            own = frames[i]
            out = own.new_empty(batch, blocks, heads, bank + left + group * width, own.shape[-1])
            out[..., bank + left :, :] = own
            main = own if width == segment else own.unflatten(3, (group, width))[..., :segment, :].flatten(3, 4)
            for target, source in _previous(out[..., bank : bank + left, :], main):
                target.zero_() if source is None else target.copy_(source)
            if summaries is not None:
                items = summaries[i - 1]
                out[..., memory:bank, :] = items[..., : group - 1, :]
                for target, source in _previous(out[..., :memory, :], items):
                    target.zero_() if source is None else target.copy_(source)
            gathered.append(out.flatten(0, 1))
        return frames[0].contiguous().flatten(0, 1), gathered[0], gathered[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        segment, left, memory, heads = ctx.sizes
        batch, blocks, group, width, size = ctx.shape
        grad_qkv = grad_query.new_empty(batch, blocks, group * width, size)
        frames = _by_head(grad_qkv, 3, heads)
        frames[0].copy_(grad_query.unflatten(0, (batch, blocks)))
        bank = memory + group - 1 if memory else 0
        grad_summary = grad_query.new_zeros(batch, blocks, group, size // 3 * 2) if memory else None
        for i, grad in ((1, grad_key), (2, grad_value)):
            grad = grad.unflatten(0, (batch, blocks))
            own = frames[i]
            own.copy_(grad[..., bank + left :, :])
            main = own if width == segment else own.new_zeros(*own.shape[:3], group * segment, own.shape[4])
            for source, target in _previous(grad[..., bank : bank + left, :], main):
                if target is not None:
                    target.add_(source)
            if main is not own:
                own.unflatten(3, (group, width))[..., :segment, :].add_(main.unflatten(3, (group, segment)))
            if grad_summary is not None:
                items = _by_head(grad_summary, 2, heads)[i - 1]
                items[..., : group - 1, :].copy_(grad[..., memory:bank, :])
                for source, target in _previous(grad[..., :memory, :], items):
                    if target is not None:
                        target.add_(source)
        return grad_qkv.view(ctx.shape), grad_summary, None, None, None, None


def _by_head(x: Tensor, parts: int, heads: int) -> Tensor:
    """[B, N, n, parts D] as a view [parts, B, N, H, n, d]."""
    return x.unflatten(3, (parts, heads, -1)).permute(3, 0, 1, 4, 2, 5)


def _previous(context: Tensor, items: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Pair the slots of ``context`` [B, N, H, c, d] with the c items [B, N, H, n, d] before each block.

    Yields views of both, or None in place of items where a slot lies before the first block.
    """
    size, count, blocks = context.shape[3], items.shape[3], items.shape[1]
    for shift in range(1, -(-size // count) + 1):
        high = size - (shift - 1) * count
        low = max(0, high - count)
        slots = context[:, :, :, low:high]
        yield slots[:, :shift], None
        if shift < blocks:
            yield slots[:, shift:], items[:, : blocks - shift, :, count - (high - low) :]
