"""What the MT and the unit decoder share: a stack of decoder layers, offline and streaming."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from echostream.errors import check_room
from echostream.models.decoders.layers import (
    Append,
    AttentionProbe,
    DecoderLayer,
    Dropout,
    KeyValues,
    Visible,
    sinusoidal_positions,
    visible_frames,
)
from echostream.models.state import State


@dataclass(frozen=True)
class DecoderState(State):
    """One sentence in the making, per row: cached self-attention, projected encoder frames, and how many of each."""

    own: tuple[KeyValues, ...]  # per layer, [B, places, D]
    memory: tuple[KeyValues, ...]  # per layer, [B, max_sentence_frames, D]
    positions: Tensor  # [B] long, target positions taken so far
    frames: Tensor  # [B] long, encoder frames appended so far

    def restart(self, rows: Tensor | None = None) -> DecoderState:
        """A new sentence in ``rows`` [B] bool (default: all). The buffers are shared, not cleared: cheap."""
        keep = torch.zeros_like(self.positions) if rows is None else (~rows).long()
        return DecoderState(self.own, self.memory, self.positions * keep, self.frames * keep)

    def reorder(self, rows: Tensor) -> DecoderState:
        """Like ``index_select`` for beam search: ``rows[b]`` must be a hypothesis of the same sentence as row b.

        The encoder's keys and values are the same for all of them and stay where they are.
        """
        own = tuple(cache.index_select(rows) for cache in self.own)
        return DecoderState(own, self.memory, self.positions.index_select(0, rows), self.frames)


class TransformerDecoder(nn.Module):
    """A stack of ``DecoderLayer`` with its streaming twin; base of the MT and the unit decoder.

    ``in_place=True`` in ``extend`` and ``step`` gives the caller's state up: its buffers are written, not copied, and
    only the returned state may be used from then on. By default the state given stays as it was.
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        heads: int,
        ffn: int,
        layers: int,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        max_positions: int,
        max_frames: int,
        position_limit: str,
        form: str = "vaswani",
        prompt: int = 0,
    ):
        super().__init__()
        self.dim, self.heads, self.position_limit = dim, heads, position_limit
        self.max_positions, self.max_frames = max_positions, max_frames
        self.dropout = Dropout(dropout)
        # Residual branches start quietly, each layer near the identity: the unit CTC then leaves its plateau in half
        # the updates (compare DeepNet, Wang et al., 2022).
        gain = (3 * layers) ** -0.5
        self.layers = nn.ModuleList(
            DecoderLayer(
                dim, memory_dim, heads, ffn, dropout, attention_dropout, activation_dropout, gain, form, prompt
            )
            for _ in range(layers)
        )
        self.final_norm = nn.LayerNorm(dim) if form == "whisper" else None

    def position_vectors(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Positions of any shape [...] -> [..., D]."""
        return sinusoidal_positions(positions, self.dim, dtype)

    def run(self, x: Tensor, memory: Tensor, memory_lengths: Tensor, visible: Tensor | None) -> Tensor:
        """All positions x [B, U, D] (without position vectors) at once; ``visible`` [B, U] limits the frames seen.

        Row padding in x stands behind its items, where causality already hides it.
        """
        positions = torch.arange(x.shape[1], device=x.device)
        x = self.dropout(x + self.position_vectors(positions, x.dtype))
        counts = memory_lengths if visible is None else torch.minimum(visible, memory_lengths[:, None])
        seen = visible_frames(counts, memory.shape[1])
        for layer in self.layers:
            x = layer(x, memory, seen)
        return x if self.final_norm is None else self.final_norm(x)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_positions: int | None = None,
        max_frames: int | None = None,
    ) -> DecoderState:
        """An empty state. Buffers have their full size from the start; sizes other than the config's may be asked."""
        like = self.layers[0].self_norm.weight.detach().to(device=device, dtype=dtype)
        zeros = torch.zeros(batch_size, dtype=torch.long, device=like.device)

        def caches(places: int) -> tuple[KeyValues, ...]:
            return tuple(KeyValues.empty(batch_size, places, like) for _ in self.layers)

        own, memory = caches(max_positions or self.max_positions), caches(max_frames or self.max_frames)
        return DecoderState(own, memory, zeros, zeros)

    def extend(self, frames: Tensor, lengths: Tensor, state: DecoderState, in_place: bool = False) -> DecoderState:
        """Append encoder frames [B, N, memory_dim], of row b the first ``lengths[b]``, for cross-attention.

        Raises:
            EchoStreamError: a row would hold more frames than the state was made for (``max_sentence_frames``).
        """
        append = Append(state.frames, lengths, frames.shape[1])
        check_room(append.used, state.memory[0].keys.shape[1], "encoder frames", "max_sentence_frames")
        if not append.longest:
            return state
        memory = tuple(
            append.write(cache, *layer.cross_attention.project_memory(frames), in_place)
            for layer, cache in zip(self.layers, state.memory)
        )
        return DecoderState(state.own, memory, state.positions, state.frames + lengths)

    def advance(
        self,
        x: Tensor,
        lengths: Tensor,
        state: DecoderState,
        in_place: bool = False,
        probe: AttentionProbe | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """New positions x [B, N, D] (without position vectors), which see all earlier ones and all frames so far.

        A ``probe`` is told its heads' cross-attention.

        Raises:
            EchoStreamError: a row would hold more positions than the state was made for.
        """
        new = x.shape[1]
        append = Append(state.positions, lengths, new)
        check_room(append.used, state.own[0].keys.shape[1], "positions", self.position_limit)
        positions = state.positions[:, None] + torch.arange(new, device=x.device)
        x = self.dropout(x + self.position_vectors(positions, x.dtype))
        if not append.longest:
            return x, state
        frames = int(state.frames.max())
        if new == 1 and append.uniform:
            mask = None  # a single new position sees all that is there
        else:
            mask = (torch.arange(append.used, device=x.device) <= positions[..., None])[:, None]
        if frames and bool((state.frames == frames).all()):
            seen = Visible(None, None)
        else:
            seen = visible_frames(state.frames, frames)
        own = []
        for number, (layer, cache, memory) in enumerate(zip(self.layers, state.own, state.memory)):
            memory = memory.map(lambda t: t[:, :frames])
            told = None if probe is None else probe.layer(number)
            x, cache = layer.step(x, append, cache, memory, mask, seen, in_place, told)
            own.append(cache)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x, DecoderState(tuple(own), state.memory, state.positions + lengths, state.frames)
