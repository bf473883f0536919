"""What the ST, MT and unit decoders share: attention, positions, caches and transformer layers.

Letters: B batch, U target positions, T encoder frames (40 ms each), N new items of one step, C places of a cache,
D width, H heads. Layers are post-norm (Vaswani et al., 2017), ``LayerNorm(x + sublayer(x))``, unless another form is
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.models.attention import attend, parted
from echostream.models.dropout import activate
from echostream.models.dropout import dropout as cheap_dropout
from echostream.models.state import State


def sinusoidal_positions(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal position vectors (Vaswani et al., 2017): sines in the first half, cosines in the second.

    Args:
        positions: whole numbers of any shape [...].

    Returns:
        [..., dim] in ``dtype``; computed in at least fp32, because bf16 cannot tell position 300 from 301.
    """
    exact = torch.promote_types(dtype, torch.float32)
    half = (dim + 1) // 2
    frequencies = torch.exp(torch.arange(half, device=positions.device, dtype=exact) * (-math.log(10_000.0) / half))
    angles = positions.to(exact).unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :dim].to(dtype)


def init_linear(linear: nn.Linear, parts: int = 1) -> nn.Linear:
    """Xavier-uniform weights, zero bias. ``parts`` matrices stacked in one Linear are drawn one by one."""
    for weight in linear.weight.chunk(parts, dim=0):
        nn.init.xavier_uniform_(weight)
    nn.init.zeros_(linear.bias)
    return linear


class Visible(NamedTuple):
    """Which encoder frames a query may attend; see ``visible_frames``."""

    mask: Tensor | None  # [B, 1, U or 1, T], true where allowed or added to the scores; None: everything
    nothing: Tensor | None  # [B, U or 1, 1], true where there is no frame at all to attend


def visible_frames(counts: Tensor, size: int) -> Visible:
    """The first ``counts`` frames of ``size``: counts [B] (the same for all queries) or [B, U].

    A count of 0 is allowed: such a query attends nothing, its attended vector is exactly zero (never NaN), and only
    the output projection's bias is left of the sublayer.
    """
    if counts.dim() == 1:
        counts = counts[:, None]
    places = torch.arange(size, device=counts.device)
    return Visible((places < counts.clamp(min=1)[..., None])[:, None], (counts <= 0)[..., None])


class Dropout(nn.Dropout):
    """``nn.Dropout``, cheap on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return cheap_dropout(x, self.p, self.training)


class SelfAttention(nn.Module):
    """Multi-head self-attention with queries, keys and values from one projection. 4·(D² + D) parameters.

    With a ``prompt`` every query sees that many learnt keys and values, too, before all others (prefix tuning; Li and
    Liang, 2021): 2·prompt·D parameters more.
    """

    def __init__(self, dim: int, heads: int, dropout: float, prompt: int = 0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = init_linear(nn.Linear(dim, 3 * dim), parts=3)
        self.out = init_linear(nn.Linear(dim, dim))
        self.prompt = nn.Parameter(torch.randn(2, prompt, dim) * 0.02) if prompt else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, N, D], each [B, N, D]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """q [B, N, D] over k and v [B, K, D] or [B, H, K, d]; the mask ([B, 1, N, K]; None: everything)
        knows nothing of the prompt."""
        if self.prompt is not None:
            if causal:
                mask, causal = torch.ones(q.shape[1], k.shape[-2], dtype=torch.bool, device=q.device).tril(), False
            if mask is not None:  # true, or nothing to add: always seen
                mask = F.pad(mask, (self.prompt.shape[1], 0), value=float(mask.dtype == torch.bool))
            prompt = self.prompt[:, None].to(k.dtype)  # [2, 1, P, D]
            own = (parted(part, self.heads) if k.dim() == 4 else part for part in prompt)
            k, v = (torch.cat([part.expand(len(q), *part.shape[1:]), new], dim=-2) for part, new in zip(own, (k, v)))
        return self.out(attend(q, k, v, self.heads, mask, causal, self.dropout if self.training else 0.0, past))


class CrossAttention(nn.Module):
    """Multi-head attention over the encoder, whose width ``memory_dim`` may differ from the decoder's."""

    def __init__(self, dim: int, memory_dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = init_linear(nn.Linear(dim, dim))
        self.kv = init_linear(nn.Linear(memory_dim, 2 * dim), parts=2)
        self.out = init_linear(nn.Linear(dim, dim))

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of encoder frames [B, T, memory_dim], each [B, T, D]."""
        k, v = self.kv(memory).chunk(2, dim=-1)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        if k.shape[1] == 0:
            return self.out(torch.zeros_like(x))
        context = attend(self.q(x), k, v, self.heads, visible.mask, False, self.dropout if self.training else 0.0)
        if visible.nothing is not None:
            context = context.masked_fill(visible.nothing, 0.0)
        return self.out(context)

    def told(self, x: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        """``forward``, and where each query of x [B, N, D] looks: [B, H, N, T]; zero without frames."""
        q, k, v = (parted(t, self.heads) for t in (self.q(x), k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if visible.mask is not None:
            allowed = visible.mask.dtype == torch.bool
            scores = scores.masked_fill(~visible.mask, -math.inf) if allowed else scores + visible.mask
        weights = scores.softmax(dim=-1)
        if visible.nothing is not None:
            weights = weights.masked_fill(visible.nothing[:, None], 0.0)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


@dataclass
class AttentionProbe:
    """Asks a decoder's step where some of its heads look; the step fills in ``weights``.

    Attributes:
        heads: (layer, head), both from 0.
        weights: [B, N, frames] of the cross-attention, the mean of these heads.
    """

    heads: Sequence[tuple[int, int]]
    weights: Tensor | None = None

    def layer(self, number: int) -> Probe | None:
        """What layer ``number`` is to tell its weights [B, H, N, T]; None where it is not asked."""
        chosen = [head for layer, head in self.heads if layer == number]
        if not chosen:
            return None

        def tell(weights: Tensor) -> None:
            share = weights[:, chosen].sum(dim=1) / len(self.heads)
            self.weights = share if self.weights is None else self.weights + share

        return tell


Probe = Callable[[Tensor], None]  # is told a layer's attention weights [B, H, N, T]


class FeedForward(nn.Module):
    """Linear, activation (``relu`` or ``gelu``), Linear."""

    def __init__(self, dim: int, inner: int, activation_dropout: float, activation: str = "relu"):
        super().__init__()
        self.activation = activation
        self.inner = init_linear(nn.Linear(dim, inner))
        self.outer = init_linear(nn.Linear(inner, dim))
        self.activation_dropout = activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(activate(self.inner(x), self.activation, self.activation_dropout, self.training))


@dataclass(frozen=True)
class KeyValues(State):
    """Keys and values of one attention layer, each [B, C, D]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, batch: int, places: int, like: Tensor) -> KeyValues:
        shape = (batch, places, like.shape[0])
        return cls(like.new_zeros(shape), like.new_zeros(shape))


class CausalLayer(nn.Module):
    """Transformer encoder layer in which frame t sees the frames t-window+1 … t.

    It knows no absolute position, so that it can stream for ever. d 256, FFN 1024: 789,760 parameters.
    """

    def __init__(
        self, dim: int, heads: int, ffn: int, window: int, dropout: float, attention_dropout: float, act_dropout: float
    ):
        super().__init__()
        self.window = window
        self.self_attention = SelfAttention(dim, heads, attention_dropout)
        self.self_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn, act_dropout)
        self.ffn_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.self_norm(x + self.dropout(attended))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))

    def forward(self, x: Tensor) -> Tensor:
        """All frames at once, x [B, T, D] -> [B, T, D], in time and memory linear in T.

        Padding stands behind a row's frames, where causality already hides it.
        """
        batch, frames, dim = x.shape
        w = self.window
        q, k, v = self.self_attention.project(x)
        if frames <= w:
            return self._finish(x, self.self_attention(q, k, v, causal=True))
        # Blocks of one window: each attends itself and the block before it, which together hold every visible frame.
        blocks = -(-frames // w)
        q, k, v = (F.pad(t, (0, 0, 0, blocks * w - frames)).view(batch, blocks, w, dim) for t in (q, k, v))
        k, v = (torch.cat([F.pad(t[:, :-1], (0, 0, 0, 0, 1, 0)), t], dim=2) for t in (k, v))
        query = torch.arange(w, device=x.device)[:, None] + w
        key = torch.arange(2 * w, device=x.device)
        mask = ((key <= query) & (key > query - w)).repeat(blocks, 1, 1)
        mask[0, :, :w] = False  # nothing comes before the first block
        mask = mask.repeat(batch, 1, 1)[:, None]
        out = self.self_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask)
        return self._finish(x, out.view(batch, blocks * w, dim)[:, :frames])

    def step(self, x: Tensor, lengths: Tensor, cache: KeyValues, mask: Tensor) -> tuple[Tensor, KeyValues]:
        """New frames x [B, N, D] after the window-1 cached ones (right-aligned); mask [B, 1, N, window-1+N]."""
        heads = self.self_attention.heads
        keys, values = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (cache.keys, cache.values))
        y, k, v = self.attend_past(x, mask, keys, values)
        k, v = torch.cat([cache.keys, k], dim=1), torch.cat([cache.values, v], dim=1)
        # The cache moves by what each row brought: its last window-1 frames end at place window-1+length.
        places = lengths[:, None] + torch.arange(self.window - 1, device=x.device)
        rows = torch.arange(len(lengths), device=x.device)[:, None]
        return y, KeyValues(k[rows, places], v[rows, places])

    def attend_past(self, x: Tensor, mask: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """New frames x [B, N, D] over ``keys`` and ``values`` [B, H, C, d] of the past, in any order that the mask
        [B, 1, N, C + N] knows: ([B, N, D]; their own keys and values, each [B, N, D])."""
        q, k, v = self.self_attention.project(x)
        return self._finish(x, self.self_attention(q, k, v, mask, past=(keys, values))), k, v


class DecoderLayer(nn.Module):
    """Transformer decoder layer: causal self-attention, cross-attention, FFN. d 256, FFN 1024: 1,053,440 parameters.

    ``form`` is ``vaswani`` (LayerNorm behind each residual, ReLU) or ``whisper`` (LayerNorm before each branch, GELU).
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        heads: int,
        ffn: int,
        dropout: float,
        attention_dropout: float,
        act_dropout: float,
        residual_gain: float = 1.0,
        form: str = "vaswani",
        prompt: int = 0,
    ):
        super().__init__()
        self.pre_norm = form == "whisper"
        self.self_attention = SelfAttention(dim, heads, attention_dropout, prompt)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = CrossAttention(dim, memory_dim, heads, attention_dropout)
        self.cross_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn, act_dropout, "gelu" if self.pre_norm else "relu")
        self.ffn_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        with torch.no_grad():
            for branch in (self.self_attention.out, self.cross_attention.out, self.ffn.outer):
                branch.weight.mul_(residual_gain)

    def _finish(
        self, x: Tensor, attended: Tensor, k: Tensor, v: Tensor, visible: Visible, probe: Probe | None = None
    ) -> Tensor:
        x = x + self.dropout(attended)
        if not self.pre_norm:
            x = self.self_norm(x)
        query = self.cross_norm(x) if self.pre_norm else x
        if probe is None:
            seen = self.cross_attention(query, k, v, visible)
        else:
            seen, weights = self.cross_attention.told(query, k, v, visible)
            probe(weights)
        x = x + self.dropout(seen)
        if self.pre_norm:
            return x + self.dropout(self.ffn(self.ffn_norm(x)))
        x = self.cross_norm(x)
        return self.ffn_norm(x + self.dropout(self.ffn(x)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attention.project(self.self_norm(x) if self.pre_norm else x)

    def forward(self, x: Tensor, memory: Tensor, visible: Visible) -> Tensor:
        """All positions at once: x [B, U, D], memory [B, T, memory_dim] -> [B, U, D]."""
        q, k, v = self._project(x)
        attended = self.self_attention(q, k, v, causal=True)
        return self._finish(x, attended, *self.cross_attention.project_memory(memory), visible)

    def step(
        self,
        x: Tensor,
        append: Append,
        own: KeyValues,
        memory: KeyValues,
        mask: Tensor | None,
        visible: Visible,
        in_place: bool,
        probe: Probe | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """New positions x [B, N, D] behind those cached in ``own``; ``memory`` holds the frames that may be seen."""
        q, k, v = self._project(x)
        own = append.write(own, k, v, in_place)
        attended = self.self_attention(q, own.keys[:, : append.used], own.values[:, : append.used], mask)
        return self._finish(x, attended, memory.keys, memory.values, visible, probe), own

    def attend_past(
        self,
        x: Tensor,
        mask: Tensor,
        own: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor],
        memory_mask: Tensor,
        probe: Probe | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New positions x [B, N, D], without a state: the twin of ``step`` for exported graphs.

        Args:
            mask: [B, 1, N, N + P], memory_mask: [B, 1, N, T]; added to the scores.
            own: keys and values of earlier positions, each [B, H, P, d]. memory: of the frames, each [B, H, T, d].

        Returns:
            [B, N, D], and the new positions' keys and values, each [B, N, D].
        """
        q, k, v = self._project(x)
        # The new ones first, so that sums run over them alike however much room there is behind the earlier ones.
        heads = self.self_attention.heads
        keys, values = (torch.cat([parted(new, heads), old], dim=2) for new, old in zip((k, v), own))
        attended = self.self_attention(q, keys, values, mask)
        return self._finish(x, attended, *memory, Visible(memory_mask, None), probe), k, v


class Append:
    """Where the new items of a step go: row b's first ``lengths[b]`` of N to the places from ``at[b]`` on."""

    def __init__(self, at: Tensor, lengths: Tensor, new: int):
        starts, counts = at.tolist(), lengths.tolist()
        self.used = max((a + n for a, n in zip(starts, counts)), default=0)  # places in use afterwards
        self.longest = max(counts, default=0)
        self.uniform = len(set(starts)) == 1 and len(set(counts)) == 1
        if self.uniform:
            self.start, self.count = starts[0], counts[0]
        else:
            self.rows, self.items = (torch.arange(new, device=at.device) < lengths[:, None]).nonzero(as_tuple=True)
            self.places = at[self.rows] + self.items

    def write(self, cache: KeyValues, keys: Tensor, values: Tensor, in_place: bool) -> KeyValues:
        """The cache with keys and values [B, N, D] added; its own buffers change only when ``in_place``."""
        buffers = (cache.keys, cache.values) if in_place else (cache.keys.clone(), cache.values.clone())
        for buffer, new in zip(buffers, (keys, values)):
            if self.uniform:
                buffer[:, self.start : self.start + self.count] = new[:, : self.count]
            else:
                # under autocast the projections are narrower than the buffers
                buffer[self.rows, self.places] = new[self.rows, self.items].to(buffer.dtype)
        return KeyValues(*buffers)
