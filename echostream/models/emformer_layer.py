"""One Emformer layer (Shi et al., 2021, arXiv 2010.10759): attention over memory bank, left context and own segment.

Segments are computed in blocks of G neighbours. The queries of a block attend the keys

    [ M summaries before the block | G-1 summaries in it | L frames before the block | the block's own G x W frames ]

under a mask that leaves each segment its own memory, left context, frames and right context. Every key is so copied
(G S + L) / (G S) times instead of once per segment, the cost is linear in time, and a streaming step is a single block
whose first and third part come from the state. With G = 1 and the default sizes these are 8 + 30 + 4 = 42 keys.

Shape legend: B streams, n segments, S frames in a segment, R frames of right context, W = S + R, D width, H heads,
L frames of left context, M summaries in the memory bank, G segments in a block, N blocks, K' frames that the
convolution sees. One frame is 40 ms (20 ms behind Whisper's stem).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.models.attention import attend, attention
from echostream.models.dropout import activate, dropout
from echostream.models.gather import GatherBlocks
from echostream.models.segments import visible_keys
from echostream.models.state import State
from echostream.models.subsampler import take_rows


@dataclass(frozen=True)
class EmformerLayerState(State):
    """Projected keys and values that a layer keeps of each stream, the newest last."""

    left: Tensor  # [B, L, 2 D] keys and values of the last L frames
    memory: Tensor  # [B, M, 2 D] keys and values of the last M segment summaries
    conv: Tensor  # [B, K' - 1, D] what the convolution last saw; no frames without a convolution


class EmformerLayer(nn.Module):
    """Multi-head attention and a feed-forward network, each with a residual connection and LayerNorm.

    The summary of a segment is the mean of the layer's (un-normalised) input over the segment through a D x D
    projection; it enters keys and values through the layer's own key and value projections.

    Args:
        embed_dim, num_heads, ffn_dim: D, H and the inner width of the feed-forward network.
        segment_length, left_context_length, right_context_length: S, L, R in encoder frames of 40 ms; to ``forward``
            the segments themselves say how long they are.
        memory_size: M in segments; 0 leaves out the bank and the projection of summaries.
        normalize_before: LayerNorm before attention and feed-forward network and one at the end (torchaudio's form)
            instead of LayerNorm after each residual.
        output_norm: false leaves out the one at the end (GPT-2's and Whisper's form).
        activation: of the feed-forward network, ``relu`` or ``gelu``.
        conv_kernel: K', frames seen by a causal convolution module before the attention; 0 for none.
        relative_bias: add a learnt bias per head and distance (Raffel et al., 2020) to the attention scores.
        residual_gain: factor on the initial weights of both residual branches' last projections.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        segment_length: int,
        left_context_length: int,
        right_context_length: int = 0,
        memory_size: int = 0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        normalize_before: bool = False,
        output_norm: bool = True,
        activation: str = "relu",
        conv_kernel: int = 0,
        relative_bias: bool = False,
        residual_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.segment_length = segment_length
        self.left_context_length = left_context_length
        self.right_context_length = right_context_length
        self.memory_size = memory_size
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.dropout = dropout
        self.normalize_before = normalize_before
        self.activation = activation

        self.convolution = CausalConvolution(embed_dim, conv_kernel, residual_gain) if conv_kernel else None
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.summary_proj = nn.Linear(embed_dim, embed_dim) if memory_size else None
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, embed_dim)
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.output_norm = nn.LayerNorm(embed_dim) if normalize_before and output_norm else None
        widest = segment_length + right_context_length
        self.relative_bias = (
            RelativeBias(num_heads, widest, left_context_length, memory_size) if relative_bias else None
        )
        self._reset_parameters(residual_gain)

    def _reset_parameters(self, residual_gain: float) -> None:
        # Query, key and value are three square matrices that happen to be stored together.
        for matrix in self.qkv_proj.weight.chunk(3):
            nn.init.xavier_uniform_(matrix)
        for linear in (self.out_proj, self.summary_proj, self.fc1, self.fc2):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.qkv_proj.bias)
        with torch.no_grad():
            self.out_proj.weight.mul_(residual_gain)
            self.fc2.weight.mul_(residual_gain)

    def forward(self, x: Tensor, mask: Tensor, distance: Tensor | None = None) -> Tensor:
        """Compute whole utterances, which begin with the first block.

        Args:
            x: [B, N, G, W, D] segments, each followed by its right context.
            mask: [B N, 1, G W, K] from ``attention_mask``.
            distance: [G W, K] from ``relative_distance``, for layers with a relative bias.

        Returns:
            [B, N, G, W, D].
        """
        segment = x.shape[3] - self.right_context_length
        if self.convolution is not None:
            x = self.convolution(x.flatten(1, 2), segment, self.convolution.past(x))[0].view_as(x)
        qkv = self.qkv_proj(self.attention_norm(x) if self.normalize_before else x)
        summary = self._summary_kv(x) if self.summary_proj is not None else None
        query, key, value = GatherBlocks.apply(
            qkv, summary, segment, self.left_context_length, self.memory_size, self.num_heads
        )
        return self._finish(x, self._attend(query, key, value, self._biased(mask, distance)).view_as(x))

    def step(
        self, x: Tensor, mask: Tensor, state: EmformerLayerState, done: Tensor, distance: Tensor | None = None
    ) -> tuple[Tensor, EmformerLayerState]:
        """Compute one block of segments.

        Args:
            x: [B, G, W, D] segments, each followed by its right context.
            mask: [B, 1, G W, K] from ``attention_mask`` in the order of ``past_order``.
            state: the streams' state before the block; not changed.
            done: [B] how many of the G segments are real in each stream; only these join the state.
            distance: as in ``forward``, in the same order.

        Returns:
            ([B, G, W, D]; the state after the block).
        """
        block, width = x.shape[1:3]
        past = torch.cat([state.memory, state.left], dim=1).unflatten(2, (2, self.num_heads, -1))
        keys, values = past.permute(2, 0, 3, 1, 4)
        y, kept, heard = self.attend_past(x, mask, keys, values, state.conv, distance)
        frames, summaries = kept.split([block * width, kept.shape[1] - block * width], dim=1)
        if width > self.segment_length:
            frames = frames.unflatten(1, (block, width))[:, :, : self.segment_length].flatten(1, 2)
        left = torch.cat([state.left, frames.to(state.left.dtype)], dim=1)
        left = take_rows(left, done * self.segment_length, self.left_context_length)
        memory, conv = state.memory, state.conv
        if self.summary_proj is not None:
            memory = take_rows(torch.cat([memory, summaries.to(memory.dtype)], dim=1), done, self.memory_size)
        if heard is not None:
            conv = take_rows(heard, done * self.segment_length, conv.shape[1]).to(conv.dtype)
        return y, EmformerLayerState(left, memory, conv)

    def attend_past(
        self,
        x: Tensor,
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
        conv: Tensor | None = None,
        distance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One block of segments over what is kept of those before it: no state, no loop, nothing that depends on a
        stream's age, so that ``step`` and an exported graph are the same function.

        Args:
            x: [B, G, W, D] segments, each followed by its right context.
            mask: [B, 1, G W, M + L + G W + G], to be added to the scores (see ``past_order``); without a memory bank
                the last G are left out.
            keys, values: [B, H, M + L, d] of the past, in any order that the mask (and the distance) knows.
            conv: [B, K' - 1, D] what the convolution last saw, for layers with one.
            distance: [G W, K] or [B, G W, K] columns of the relative bias' table, for layers with one.

        Returns:
            ([B, G, W, D]; new keys and values [B, G W + G, 2 D] of the block's frames, then of its summaries;
            [B, K' - 1 + G S, D] what the convolution saw, None without one).
        """
        heard = None
        if self.convolution is not None:
            x, heard = self.convolution(x, self.segment_length, conv)
        h = (self.attention_norm(x) if self.normalize_before else x).flatten(1, 2)
        size = h.shape[1]
        if self.summary_proj is not None:
            # One product for frames and summaries, whose queries nobody needs: less time than a product of their own.
            h = torch.cat([h, self.summary_proj(x[:, :, : self.segment_length].mean(dim=2))], dim=1)
        query, key, value = self.qkv_proj(h).chunk(3, dim=2)
        y = attend(query[:, :size], key, value, self.num_heads, self._biased(mask, distance), past=(keys, values))
        return self._finish(x, y.view_as(x)), torch.cat([key, value], dim=2), heard

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> EmformerLayerState:
        """The state of streams of which nothing has been heard."""
        weight = self.qkv_proj.weight
        options: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        size = 2 * weight.shape[1]
        return EmformerLayerState(
            torch.zeros(batch_size, self.left_context_length, size, **options),
            torch.zeros(batch_size, self.memory_size, size, **options),
            torch.zeros(batch_size, self.convolution.kernel - 1 if self.convolution else 0, size // 2, **options),
        )

    def _summary_kv(self, x: Tensor) -> Tensor:
        """Keys and values [..., n, 2 D] of the summaries of the segments ``x`` [..., n, W, D]."""
        dim = x.shape[-1]
        assert self.summary_proj is not None
        summary = self.summary_proj(x[..., : self.segment_length, :].mean(dim=-2))
        return F.linear(summary, self.qkv_proj.weight[dim:], self.qkv_proj.bias[dim:])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attention of queries [N, H, Q, d] over keys and values [N, H, K, d] under ``mask`` -> [N, Q, D]."""
        p = self.attention_dropout if self.training else 0.0
        return attention(query, key, value, mask, dropout=p).transpose(1, 2).flatten(2)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Everything behind the attention: output projection, residuals, norms, feed-forward network."""
        x = x + dropout(self.out_proj(attended), self.dropout, self.training)
        if not self.normalize_before:
            x = self.attention_norm(x)
        h = self.ffn_norm(x) if self.normalize_before else x
        h = activate(self.fc1(h), self.activation, self.activation_dropout, self.training)
        x = x + dropout(self.fc2(h), self.dropout, self.training)
        if not self.normalize_before:
            return self.ffn_norm(x)
        return x if self.output_norm is None else self.output_norm(x)

    def _biased(self, mask: Tensor, distance: Tensor | None) -> Tensor:
        """The mask with the bias of each head and distance added."""
        if self.relative_bias is None:
            return mask
        return mask + self.relative_bias(distance).to(mask.dtype)


class CausalConvolution(nn.Module):
    """The Conformer's convolution module (Gulati et al., 2020), causal and without batch statistics.

    LayerNorm, pointwise and GLU, depthwise over ``kernel`` frames, SiLU, pointwise, residual. A segment's right context
    continues its own frames; the next segment does not see these copies.
    """

    def __init__(self, dim: int, kernel: int, residual_gain: float = 1.0) -> None:
        super().__init__()
        self.kernel = kernel
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.bias)
        with torch.no_grad():
            self.out.weight.mul_(residual_gain)

    def past(self, x: Tensor) -> Tensor:
        """What lies before the beginning of streams x [B, ..., D]: zeros [B, K' - 1, D]."""
        return x.new_zeros(x.shape[0], self.kernel - 1, x.shape[-1])

    def forward(self, x: Tensor, segment: int, past: Tensor) -> tuple[Tensor, Tensor]:
        """Segments x [B, n, W, D] of ``segment`` frames and right context behind ``past`` [B, K' - 1, D].

        Returns:
            ([B, n, W, D]; what the depthwise convolution saw of past and segments, [B, K' - 1 + n S, D]).
        """
        h = F.glu(self.gate(self.norm(x)), dim=-1)
        heard = torch.cat([past.to(h.dtype), h[:, :, :segment].flatten(1, 2)], dim=1)
        windows = heard.unfold(1, self.kernel - 1 + segment, segment)  # [B, n, D, K' - 1 + S]
        if x.shape[2] > segment:
            windows = torch.cat([windows, h[:, :, segment:].transpose(2, 3)], dim=3)
        y = self.depthwise(windows.flatten(0, 1)).transpose(1, 2)
        return x + self.out(F.silu(y)).view_as(x), heard


class RelativeBias(nn.Module):
    """A number per head and distance between query and key (T5's, Raffel et al., 2020, without buckets)."""

    def __init__(self, heads: int, width: int, left: int, memory: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, left + 2 * width - 1 + memory))

    def forward(self, distance: Tensor) -> Tensor:
        """[Q, K] from ``relative_distance`` -> [H, Q, K], or [B, Q, K] -> [B, H, Q, K]."""
        if distance.dim() == 3:
            return F.embedding(distance, self.weight.T).permute(0, 3, 1, 2)
        return self.weight[:, distance]


def relative_distance(
    block: int, segment: int, left: int, right: int, memory: int, device: torch.device | None = None
) -> Tensor:
    """How far each key of a block lies behind each query, as a column of ``RelativeBias``' table: [G W, K] long.

    Frames: distance + W - 1, from the right context's last one seen by the segment's first frame on; behind them the
    memory bank's summaries, the latest first. What no query attends has some column.
    """
    index = torch.arange(block, device=device)
    width = segment + right
    own = (index[:, None] * segment + torch.arange(width, device=device)).flatten()
    frames = torch.cat([torch.arange(-left, 0, device=device), own])
    distance = (own[:, None] - frames + width - 1).clamp(0, left + 2 * width - 2)
    if not memory:
        return distance
    bank = torch.arange(-memory, block - 1, device=device)
    age = (index.repeat_interleave(width)[:, None] - bank).clamp(1, memory)
    return torch.cat([left + 2 * width - 2 + age, distance], dim=1)


def attention_mask(
    before: Tensor,
    frames: Tensor,
    block: int,
    segment: int,
    left: int,
    right: int,
    memory: int,
    dtype: torch.dtype,
    shift: bool = False,
) -> Tensor:
    """Which keys the queries of each block may attend, to be added to the attention scores.

    Args:
        before: [N] segments of the stream before the block.
        frames: [N] valid frames from the block's first frame to the stream's end (or to what has arrived of it).
        block, segment, left, right, memory: G, S, L, R and M.
        shift: see ``segments.visible_keys``.

    Returns:
        [N, 1, G W, K] of ``dtype``, 0 where attention is allowed and -inf elsewhere; keys in the order of the module's
        docstring. A padding frame attends itself whatever the lengths, so that no row of the softmax is empty.
    """
    device = before.device
    index = torch.arange(block, device=device)
    offset = torch.arange(segment + right, device=device)
    sees_past, sees_own, sees_bank = visible_keys(
        index.repeat_interleave(segment + right),  # [G W], for queries and own keys alike
        offset.repeat(block),
        torch.arange(-left, 0, device=device),
        torch.arange(-memory, block - 1, device=device),
        before[:, None, None],
        frames[:, None, None],
        segment,
        left,
        right,
        memory,
        shift,
    )
    itself = torch.eye(sees_own.shape[-1], dtype=torch.bool, device=device)
    parts = [sees_bank] * bool(memory) + [sees_past, sees_own | itself]
    allowed = torch.cat(parts, dim=2)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))


def past_order(keys: Tensor, block: int, memory: int, fill: float) -> Tensor:
    """Masks or distances [..., M + G-1 + L + G W] for ``EmformerLayer.attend_past``, whose keys are in the order

        [ M summaries and L frames before the block | the block's own G x W frames | its own G summaries ].

    Args:
        block, memory: G and M.
        fill: for the last summary, which only later blocks see.
    """
    if not memory:
        return keys
    bank, own, rest = keys.split([memory, block - 1, keys.shape[-1] - memory - block + 1], dim=-1)
    return torch.cat([bank, rest, F.pad(own, (0, 1), value=fill)], dim=-1)
