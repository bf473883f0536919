"""Operations that torch's counter does not know."""

from __future__ import annotations

import math
from typing import Any

import torch


def _attention_flops(q: list[int], k: list[int], v: list[int], *_: Any, **__: Any) -> int:
    """Two products: queries [B, H, Q, d] by keys, and the weights by values [B, H, K, d]."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _convolution_flops(x: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    """Of each output a product with the kernel [C', C, ...]."""
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight)


def _packed_convolution_flops(x: list[int], second: list[int], third: list[int] | None, *_: Any, **known: Any) -> int:
    """Of (x, weight, bias, ...), or of (x, residual, weight, ...)."""
    return _convolution_flops(x, third if third is not None and len(third) > 1 else second, **known)


# Operations of the CPU that torch's counter does not know.
FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_convolution: _convolution_flops,
    torch.ops.mkldnn._convolution_pointwise: _packed_convolution_flops,
}
