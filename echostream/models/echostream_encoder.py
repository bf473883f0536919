"""EchoStream's encoder: convolutional subsampler and Emformer layers, offline and in steps of any size.

Shape legend: B streams, T feature frames (10 ms), T' encoder frames (40 ms), k frames of the layers per encoder frame
(2 behind Whisper's stem, else 1), F mel bins, D width, n segments, S frames of the layers in a segment, R of right
context, W = S + R, G segments in a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.config import EchoStreamConfig
from echostream.errors import ConfigError
from echostream.models.decoders.layers import sinusoidal_positions
from echostream.models.dropout import dropout
from echostream.models.emformer_layer import (
    EmformerLayer,
    EmformerLayerState,
    attention_mask,
    past_order,
    relative_distance,
)
from echostream.models.state import State
from echostream.models.subsampler import Stem, Subsampler, SubsamplerState, WhisperStem, append_rows, take_rows

BLOCK_FRAMES = 32  # frames that share gathered keys; measured with echostream benchmark train
STEP_SEGMENTS = 8  # segments a streaming step computes at once when that many have arrived


@dataclass(frozen=True)
class EncoderState(State):
    """Everything the encoder remembers of each stream; its size never changes."""

    subsampler: SubsamplerState
    layers: tuple[EmformerLayerState, ...]
    pending: Tensor  # [B, S + R - k, D] frames of the stem that wait for their segment or its right context
    pending_count: Tensor  # [B] how many of them there are
    segments: Tensor  # [B] segments computed so far


class EchoStreamEncoder(nn.Module):
    """Stem (4x, or 2x and pairs merged behind the layers) and ``encoder_layers`` Emformer layers.

    Every segment of S frames sees itself, L frames of left context, R frames of right context and the summaries of the
    M segments before it. There are no positions, or such as repeat themselves (``encoder_position_period``): the
    encoder runs for ever at a constant cost per segment.

    Attributes:
        segment_length, left_context_length, right_context_length: S, L and R in frames of the layers.

    With ``full_context`` it is the bidirectional Transformer encoder of the same size that shows what streaming costs:
    an utterance is one segment, and sinusoidal positions tell the frames apart, which segments did before. It has no
    steps.
    """

    def __init__(self, cfg: EchoStreamConfig) -> None:
        super().__init__()
        self.full_context = cfg.full_context
        self.shift_context = cfg.shift_context
        factor = cfg.frame_rate_factor
        self.segment_length = factor * cfg.segment_length
        self.left_context_length = 0 if cfg.full_context else cfg.left_frames
        self.right_context_length = 0 if cfg.full_context else factor * cfg.right_context_length
        self.memory_size = 0 if cfg.full_context else cfg.memory_size
        self.embed_dim = cfg.encoder_embed_dim
        self.dropout = cfg.dropout
        self.position_period = cfg.encoder_position_period
        self.train_contexts = cfg.contexts
        self.block_segments = max(1, BLOCK_FRAMES // self.segment_length)
        bins = cfg.input_feat_per_channel * cfg.input_channels
        self.subsampler: Stem
        if cfg.encoder_stem == "whisper":
            self.subsampler = WhisperStem(bins, cfg.encoder_embed_dim)
        else:
            self.subsampler = Subsampler(bins, cfg.input_channels, cfg.conv_channels, cfg.encoder_embed_dim)
        self.layers = nn.ModuleList(
            EmformerLayer(
                cfg.encoder_embed_dim,
                cfg.encoder_attention_heads,
                cfg.encoder_ffn_embed_dim,
                segment_length=self.segment_length,
                left_context_length=self.left_context_length,
                right_context_length=self.right_context_length,
                memory_size=self.memory_size,
                dropout=cfg.dropout,
                attention_dropout=cfg.attention_dropout,
                activation_dropout=cfg.activation_dropout,
                normalize_before=cfg.encoder_normalize_before,
                output_norm=not cfg.encoder_final_norm,
                activation=cfg.encoder_activation,
                conv_kernel=cfg.encoder_conv_kernel,
                relative_bias=cfg.encoder_relative_bias and not cfg.full_context,  # its distances have no end
                # A layer ends in LayerNorm in both forms. Branches as loud as the residual stream would wash out what
                # the layers below heard: ten such layers did not leave CTC's all-blank plateau in 1,000 updates, and
                # left it in 100 with this gain (that of GPT-2, Radford et al., 2019).
                residual_gain=(2 * cfg.encoder_layers) ** -0.5,
            )
            for _ in range(cfg.encoder_layers)
        )
        self.final_norm = nn.LayerNorm(cfg.encoder_embed_dim) if cfg.encoder_final_norm else None
        self.merge = MergeFrames(factor, cfg.encoder_embed_dim) if factor > 1 else None

    @property
    def context(self) -> tuple[int, int]:
        """Segment and right context in encoder frames of 40 ms."""
        factor = self.subsampler.factor
        return self.segment_length // factor, self.right_context_length // factor

    def set_context(self, segment: int, right: int) -> None:
        """From now on segments have ``segment`` encoder frames and ``right`` of right context; older states end."""
        factor = self.subsampler.factor
        self.block_segments = max(1, BLOCK_FRAMES // (factor * segment))
        for module in (self, *self.layers):
            module.segment_length, module.right_context_length = factor * segment, factor * right

    def forward(self, src_tokens: Tensor, src_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode whole utterances; time and memory are linear in T (quadratic with ``full_context``).

        Args:
            src_tokens: [B, T, F] feature frames of 10 ms, right-padded (whatever the padding holds).
            src_lengths: [B] valid feature frames.

        Returns:
            ([B, ceil(T / 4), D] encoder frames of 40 ms, zero in the padding; [B] valid encoder frames).
        """
        return self.merge_frames(*self.inner_frames(src_tokens, src_lengths))

    def inner_frames(self, src_tokens: Tensor, src_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` up to the last norm, before pairs are merged: ([B, N k, D] frames of the layers; [B] valid ones).

        What stands in the padding means nothing.
        """
        if self.training and self.train_contexts:
            chosen = self.train_contexts[int(torch.randint(len(self.train_contexts), ()))]
            usual = self.context
            self.set_context(*chosen)
            try:
                return self._inner_frames(src_tokens, src_lengths)
            finally:
                self.set_context(*usual)
        return self._inner_frames(src_tokens, src_lengths)

    def _inner_frames(self, src_tokens: Tensor, src_lengths: Tensor) -> tuple[Tensor, Tensor]:
        x, lengths = self.subsampler(src_tokens, src_lengths)
        if self.position_period:
            # In training every item begins somewhere else, so that no place and no passage from the last position to
            # the first is strange.
            start = torch.zeros_like(lengths)
            if self.training:
                start = torch.randint_like(lengths, self.position_period)
            x = x + self._positions(start, x)
        x = dropout(x, self.dropout, self.training)
        return self._norm(self.forward_layers(x, lengths)), lengths

    def forward_layers(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The Emformer layers alone: frames x [B, T' k, D] of which ``lengths`` [B] are valid -> the same.

        What stands in the padding means nothing.
        """
        batch, time, _ = x.shape
        if time == 0:
            return x
        segment = self.segment_length
        if self.full_context:
            segment = time
        if self.full_context and not self.position_period:
            x = x + sinusoidal_positions(torch.arange(time, device=x.device), self.embed_dim, x.dtype)
        block = self._choose_block(-(-time // segment))
        blocks = -(-time // (block * segment))
        before = torch.arange(blocks, device=x.device) * block
        frames = lengths[:, None] - before * segment
        mask = self._mask(before.expand(batch, -1).flatten(), frames.flatten(), block, segment, x.dtype)
        h = self._split(x, blocks * block, segment).unflatten(1, (blocks, block))
        distance = self._distance(block, segment, x.device)
        for layer in self.layers:
            h = layer(h, mask, distance)
        return h[..., :segment, :].flatten(1, 3)[:, :time]

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> EncoderState:
        """The state of ``batch_size`` streams of which nothing has been heard.

        Raises:
            ConfigError: the encoder attends whole utterances.
        """
        if self.full_context:
            raise ConfigError("full_context is set: the model hears whole utterances and cannot stream; decode offline")
        weight = self.subsampler.conv1.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        zero = torch.zeros(batch_size, device=device, dtype=torch.long)
        size = self.segment_length + self.right_context_length - self.subsampler.factor
        return EncoderState(
            subsampler=self.subsampler.init_state(batch_size, device, dtype),
            layers=tuple(layer.init_state(batch_size, device, dtype) for layer in self.layers),
            pending=torch.zeros(batch_size, size, self.embed_dim, device=device, dtype=dtype),
            pending_count=zero,
            segments=zero,
        )

    def step(
        self, features: Tensor, lengths: Tensor, state: EncoderState, finished: Tensor | None = None
    ) -> tuple[Tensor, Tensor, EncoderState]:
        """Encode what has arrived; over any split of a stream the outputs join to those of ``forward``.

        A segment is given out as soon as its S frames and its right context are there.

        Args:
            features: [B, T, F] new feature frames of 10 ms, left-aligned; T may be 0.
            lengths: [B] how many of them each stream brings (0 is allowed).
            state: the streams' state, of any mix of ages; not changed.
            finished: [B] true where the stream ends with these frames: the rest is given out, partial segment included,
                and the row's state comes back as new, ready for another stream.

        Returns:
            ([B, N, D] encoder frames of 40 ms, left-aligned, zero in the padding; [B] valid ones; the next state).
        """
        x, x_lengths, subsampler = self.subsampler.step(features, lengths, state.subsampler, finished)
        x = x.to(state.pending.dtype)
        if self.position_period:
            x = x + self._positions(state.subsampler.frames * self.subsampler.factor, x)
        queue, count = append_rows(state.pending, state.pending_count, x, x_lengths)
        ready = ((count - self.right_context_length) // self.segment_length).clamp(min=0)
        y_lengths = ready * self.segment_length
        if finished is not None:
            ready = torch.where(finished, -(-count // self.segment_length), ready)
            y_lengths = torch.where(finished, count, y_lengths)
        total = int(ready.max())
        layers, outputs, at = state.layers, [], 0
        while at < total:
            block = min(STEP_SEGMENTS, total - at)
            y, layers = self._step_block(queue, count, ready, state.segments, at, block, layers)
            outputs.append(y)
            at += block
        size = int(y_lengths.max()) if total else 0
        y = torch.cat(outputs, dim=1)[:, :size] if outputs else queue[:, :0]
        y, y_lengths = self.merge_frames(self._norm(y), y_lengths)
        consumed = torch.minimum(ready * self.segment_length, count)
        new = EncoderState(
            subsampler=subsampler,
            layers=layers,
            pending=take_rows(queue, consumed, state.pending.shape[1]),
            pending_count=count - consumed,
            segments=state.segments + ready,
        )
        if finished is not None and bool(finished.any()):
            fresh = self.init_state(len(features), features.device, state.pending.dtype)
            new = fresh.where(finished, new)
        return y, y_lengths, new

    def _step_block(
        self,
        queue: Tensor,
        count: Tensor,
        ready: Tensor,
        segments: Tensor,
        at: int,
        block: int,
        layers: tuple[EmformerLayerState, ...],
    ) -> tuple[Tensor, tuple[EmformerLayerState, ...]]:
        """Compute the segments ``at`` to ``at + block`` of ``queue`` [B, A, D]; rows may have fewer ``ready`` [B]."""
        start = at * self.segment_length
        done = (ready - at).clamp(0, block)
        mask = self._mask(segments + at, count - start, block, self.segment_length, queue.dtype)
        mask = past_order(mask, block, self.memory_size, -math.inf)
        distance = self._distance(block, self.segment_length, queue.device)
        if distance is not None:
            distance = past_order(distance, block, self.memory_size, 0)
        h = self._split(queue[:, start:], block, self.segment_length)
        after = []
        for layer, before in zip(self.layers, layers, strict=True):
            h, left_behind = layer.step(h, mask, before, done, distance)
            after.append(left_behind)
        return h[:, :, : self.segment_length].flatten(1, 2), tuple(after)

    def _positions(self, start: Tensor, x: Tensor) -> Tensor:
        """Position vectors of frames x [B, N, D], the first of which is frame ``start`` [B] of its stream."""
        positions = (start[:, None] + torch.arange(x.shape[1], device=x.device)) % self.position_period
        return self.position_vectors(positions).to(x.dtype)

    def position_vectors(self, positions: Tensor) -> Tensor:
        """Positions [...], each below the period -> [..., D]."""
        half = self.embed_dim // 2
        # Whisper's: the same sinusoids as everywhere here, but their periods reach 10,000 with the last one.
        scale = torch.exp(torch.arange(half, device=positions.device) * (-math.log(10_000.0) / (half - 1)))
        angles = positions[..., None] * scale
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def _distance(self, block: int, segment: int, device: torch.device) -> Tensor | None:
        if self.layers[0].relative_bias is None:
            return None
        return relative_distance(
            block, segment, self.left_context_length, self.right_context_length, self.memory_size, device
        )

    def _norm(self, x: Tensor) -> Tensor:
        return x if self.final_norm is None else self.final_norm(x)

    def merge_frames(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Inner frames [B, N k, D], ``lengths`` [B] of them -> encoder frames [B, N, D] and their lengths."""
        if self.merge is not None:
            x = self.merge(x)
        lengths = lengths // self.subsampler.factor
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        return x.masked_fill(padding[:, :, None], 0.0), lengths

    def leave(self, x: Tensor) -> Tensor:
        """Frames of the layers [B, N k, D] -> encoder frames [B, N, D]."""
        x = self._norm(x)
        return x if self.merge is None else self.merge(x)

    def _choose_block(self, segments: int) -> int:
        """The segments in a block, near ``block_segments``, that leave the least padding behind the last one."""
        wanted = self.block_segments
        if segments <= wanted:
            return segments
        candidates = range(max(1, wanted * 3 // 4), wanted * 3 // 2 + 1)
        return min(candidates, key=lambda block: (-segments % block, abs(block - wanted)))

    def _split(self, x: Tensor, segments: int, length: int) -> Tensor:
        """The first n segments of ``x`` [B, T', D], each with a copy of its right context: [B, n, W, D]."""
        right = self.right_context_length
        size = segments * length + right
        x = x[:, :size] if x.shape[1] >= size else F.pad(x, (0, 0, 0, size - x.shape[1]))
        if right == 0:
            return x.reshape(len(x), segments, length, -1)
        return x.unfold(1, length + right, length).transpose(2, 3)

    def _mask(self, before: Tensor, frames: Tensor, block: int, segment: int, dtype: torch.dtype) -> Tensor:
        return attention_mask(
            before,
            frames,
            block,
            segment,
            self.left_context_length,
            self.right_context_length,
            self.memory_size,
            dtype,
            self.shift_context,
        )


class MergeFrames(nn.Module):
    """``factor`` neighbouring frames side by side through a linear map, which starts as their mean."""

    def __init__(self, factor: int, dim: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(factor * dim, dim)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(dim).repeat(1, factor) / factor)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N factor, D] -> [B, N, D]."""
        return self.linear(x.unflatten(1, (-1, self.factor)).flatten(2))
