"""An encoder in the shape of StreamSpeech's (Zhang et al., 2024), to compare with: it is run over the whole history
again whenever a chunk has come.

Two strided convolutions with GLU, then Conformer layers (Gulati et al., 2020): half a feed-forward network, attention
with relative positions (Dai et al., 2019) to everything up to the end of the frame's own chunk, a convolution, half a
feed-forward network. At the default sizes it has as many parameters as theirs. The convolutions see the past alone
here, theirs the rest of the chunk as well; that costs the same.

Shape legend: B streams, T feature frames (10 ms), N encoder frames (40 ms), D width, H heads, d = D / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.config import EchoStreamConfig

SUBSAMPLING_KERNEL, DEPTHWISE_KERNEL = 5, 31
LAYERS, OUR_LAYERS = 12, 16  # theirs where we have so many


class RecomputingEncoder(nn.Module):
    """Encodes whole histories: features [B, T, F] to frames [B, ceil(T / 4), D].

    Args:
        cfg: its width, heads and depth shape the encoder; the default ones give StreamSpeech's sizes.
        chunk: encoder frames in a chunk.
    """

    def __init__(self, cfg: EchoStreamConfig, chunk: int) -> None:
        super().__init__()
        dim, inner = cfg.encoder_embed_dim, 4 * cfg.encoder_embed_dim
        self.chunk = chunk
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, 2 * out, SUBSAMPLING_KERNEL, stride=2)
            for width, out in ((cfg.input_feat_per_channel, inner // 2), (inner // 2, dim))
        )
        self.proj = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(
            ConformerLayer(dim, cfg.encoder_attention_heads, 2 * cfg.encoder_ffn_embed_dim)
            for _ in range(max(1, round(cfg.encoder_layers * LAYERS / OUR_LAYERS)))
        )

    def forward(self, features: Tensor) -> Tensor:
        x = features.transpose(1, 2)
        for convolution in self.convolutions:
            x = F.glu(convolution(F.pad(x, (SUBSAMPLING_KERNEL - 1, 0))), dim=1)
        x = self.proj(x.transpose(1, 2))
        index = torch.arange(x.shape[1], device=x.device) // self.chunk
        hidden = index[None] > index[:, None]
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill_(hidden, float("-inf"))
        positions = relative_positions(x.shape[1], x.shape[2]).to(x)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return x


class ConformerLayer(nn.Module):
    """x [B, N, D] to the same shape, ``positions`` [2 N - 1, D], ``mask`` [N, N] added to the attention's scores."""

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, inner), nn.SiLU(), nn.Linear(inner, dim)) for _ in range(2)
        )
        self.attention_norm, self.convolution_norm, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.position = nn.Linear(dim, dim, bias=False)
        self.content_bias, self.position_bias = (nn.Parameter(torch.zeros(heads, dim // heads)) for _ in range(2))
        self.widen, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.depthwise = nn.Conv1d(dim, dim, DEPTHWISE_KERNEL, groups=dim)
        self.batch_norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        x = x + self._attend(self.attention_norm(x), positions, mask)
        h = F.glu(self.widen(self.convolution_norm(x)), dim=-1).transpose(1, 2)
        h = F.silu(self.batch_norm(self.depthwise(F.pad(h, (DEPTHWISE_KERNEL - 1, 0)))))
        x = x + self.narrow(h.transpose(1, 2))
        return self.norm(x + 0.5 * self.after(x))

    def _attend(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 1, 3, 4)  # [B, N, H, d]
        place = self.position(positions).unflatten(1, (self.heads, -1))  # [2 N - 1, H, d]
        away = torch.einsum("bnhd,phd->bhnp", query + self.position_bias, place).contiguous()
        # Of each query n the scores of the distances n - 0 to n - (N - 1): one place further to the left in each row.
        batch, heads, size, wide = away.shape
        strides = (heads * size * wide, size * wide, wide - 1, 1)
        away = away.as_strided((batch, heads, size, size), strides, size - 1)
        scale = query.shape[-1] ** -0.5
        context = F.scaled_dot_product_attention(
            (query + self.content_bias).transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=away * scale + mask,
            scale=scale,
        )
        return self.out(context.transpose(1, 2).flatten(2))


def relative_positions(count: int, dim: int) -> Tensor:
    """Sines and cosines of the distances count - 1 down to -(count - 1): [2 count - 1, dim]."""
    distance = torch.arange(count - 1, -count, -1)[:, None]
    angle = distance * torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
