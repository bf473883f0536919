"""Scaled dot-product attention (Vaswani et al., 2017), by whichever of two ways is faster."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from echostream.models.dropout import dropout as cheap_dropout


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    past: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention with heads packed in the width: q [B, Q, D], k and v [B, K, D] or [B, H, K, d] -> [B, Q, D].

    In an exported graph it is one operator of ONNX Runtime, which needs a mask that is added to the scores.

    Args:
        mask: [B or 1, H or 1, Q or 1, K], as in ``attention``.
        past: keys and values [B, H, C, d] that stand before k and v; the mask is as much wider.
    """
    if torch.onnx.is_in_onnx_export():
        return _operator(q, k, v, heads, mask, past)
    q, k, v = (parted(t, heads) for t in (q, k, v))
    if past is not None:
        k, v = (torch.cat([old.to(new.dtype), new], dim=2) for old, new in zip(past, (k, v)))
    return attention(q, k, v, mask, causal, dropout).transpose(1, 2).flatten(2)


def parted(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] as [B, H, N, d]; what is parted already stays as it is."""
    return x if x.dim() == 4 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _operator(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
) -> Tensor:
    width = q.shape[2] // heads
    inputs: tuple[Tensor | None, ...] = (q, k, v, None, None, mask)  # no bias of projections, no padding mask
    shapes: tuple = (q.shape,)
    if past is not None:
        present = q.shape[0], heads, past[0].shape[2] + k.shape[1], width
        inputs, shapes = (*inputs, *past), (q.shape, present, present)
    return torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::MultiHeadAttention",
        inputs,
        dict(num_heads=heads, scale=width**-0.5),
        dtypes=(q.dtype,) * len(shapes),
        shapes=shapes,
        version=1,
    )[0]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Queries [B, H, Q, d] over keys and values [B, H, K, d] -> [B, H, Q, d].

    On a CPU, two matrix products and a softmax are faster than torch's fused kernel with dropout (which the kernel
    lacks, and which is cheaper here) and in training in bf16 (4 to 9 times, by the kernel's slow backward pass).

    Args:
        mask: true where attention is allowed, or to be added to the scores; broadcast to [B, H, Q, K]. Every query must
            be allowed one key at least.
        causal: instead of a mask, query i sees the keys up to i.
        dropout: probability that a weight is left out.
    """
    if not (q.device.type == "cpu" and (dropout > 0 or (q.dtype == torch.bfloat16 and torch.is_grad_enabled()))):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    scores, scale = q @ k.transpose(-1, -2), q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -math.inf)
    scores = scores * scale if mask is None else torch.add(mask, scores, alpha=scale)
    return cheap_dropout(scores.softmax(dim=-1), dropout, True) @ v
