"""EchoStream's encoder: convolutional subsampler and Emformer layers, offline and in steps of any size.

Shape legend: B streams, T feature frames (10 ms), T' encoder frames (40 ms), F mel bins, D width, n segments,
S frames in a segment, R frames of right context, W = S + R, G segments in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.config import EchoStreamConfig
from echostream.errors import ConfigError
from echostream.models.decoders.layers import sinusoidal_positions
from echostream.models.dropout import dropout
from echostream.models.emformer_layer import EmformerLayer, EmformerLayerState, attention_mask
from echostream.models.state import State
from echostream.models.subsampler import Subsampler, SubsamplerState, append_rows, take_rows

BLOCK_FRAMES = 32  # encoder frames that share gathered keys; measured with scripts/benchmark.py train
STEP_SEGMENTS = 8  # segments a streaming step computes at once when that many have arrived


@dataclass(frozen=True)
class EncoderState(State):
    """Everything the encoder remembers of each stream; its size never changes."""

    subsampler: SubsamplerState
    layers: tuple[EmformerLayerState, ...]
    pending: Tensor  # [B, S + R - 1, D] subsampled frames that wait for their segment or its right context
    pending_count: Tensor  # [B] how many of them there are
    segments: Tensor  # [B] segments computed so far


class EchoStreamEncoder(nn.Module):
    """Subsampler (4x) and ``encoder_layers`` Emformer layers.

    Every segment of S frames sees itself, L frames of left context, R frames of right context and the summaries of the
    M segments before it. There are no positions: the encoder runs for ever at a constant cost per segment.

    With ``full_context`` it is the bidirectional Transformer encoder of the same size that shows what streaming costs:
    an utterance is one segment, and sinusoidal positions tell the frames apart, which segments did before. It has no
    steps.
    """

    def __init__(self, cfg: EchoStreamConfig) -> None:
        super().__init__()
        self.full_context = cfg.full_context
        self.shift_context = cfg.shift_context
        self.segment_length = cfg.segment_length
        self.left_context_length = 0 if cfg.full_context else cfg.left_cache_length
        self.right_context_length = 0 if cfg.full_context else cfg.right_context_length
        self.memory_size = 0 if cfg.full_context else cfg.memory_size
        self.embed_dim = cfg.encoder_embed_dim
        self.dropout = cfg.dropout
        self.block_segments = max(1, BLOCK_FRAMES // cfg.segment_length)
        bins = cfg.input_feat_per_channel * cfg.input_channels
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
                # A layer ends in LayerNorm in both forms. Branches as loud as the residual stream would wash out what
                # the layers below heard: ten such layers did not leave CTC's all-blank plateau in 1,000 updates, and
                # left it in 100 with this gain (that of GPT-2, Radford et al., 2019).
                residual_gain=(2 * cfg.encoder_layers) ** -0.5,
            )
            for _ in range(cfg.encoder_layers)
        )

    def forward(self, src_tokens: Tensor, src_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode whole utterances; time and memory are linear in T (quadratic with ``full_context``).

        Args:
            src_tokens: [B, T, F] feature frames of 10 ms, right-padded (whatever the padding holds).
            src_lengths: [B] valid feature frames.

        Returns:
            ([B, ceil(T / 4), D] encoder frames of 40 ms, zero in the padding; [B] valid encoder frames).
        """
        x, lengths = self.subsampler(src_tokens, src_lengths)
        x = dropout(x, self.dropout, self.training)
        return self.forward_layers(x, lengths), lengths

    def forward_layers(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The Emformer layers alone: subsampled frames [B, T', D] of which ``lengths`` [B] are valid -> [B, T', D]."""
        batch, time, _ = x.shape
        if time == 0:
            return x
        segment = self.segment_length
        if self.full_context:
            segment = time
            x = x + sinusoidal_positions(torch.arange(time, device=x.device), self.embed_dim, x.dtype)
        block = self._choose_block(-(-time // segment))
        blocks = -(-time // (block * segment))
        before = torch.arange(blocks, device=x.device) * block
        frames = lengths[:, None] - before * segment
        mask = self._mask(before.expand(batch, -1).flatten(), frames.flatten(), block, segment, x.dtype)
        padding = torch.arange(time, device=x.device) >= lengths[:, None]
        h = self._split(x, blocks * block, segment).unflatten(1, (blocks, block))
        for layer in self.layers:
            h = layer(h, mask)
        y = h[..., :segment, :].flatten(1, 3)[:, :time]
        return y.masked_fill(padding[:, :, None], 0.0)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> EncoderState:
        """The state of ``batch_size`` streams of which nothing has been heard.

        Raises:
            ConfigError: the encoder attends whole utterances.
        """
        if self.full_context:
            raise ConfigError("full_context is set: the model hears whole utterances and cannot stream; decode offline")
        weight = self.subsampler.proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        zero = torch.zeros(batch_size, device=device, dtype=torch.long)
        size = self.segment_length + self.right_context_length - 1
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
        if len(y) > 1:
            padding = torch.arange(size, device=y.device) >= y_lengths[:, None]
            y = y.masked_fill(padding[:, :, None], 0.0)
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
        h = self._split(queue[:, start:], block, self.segment_length)
        after = []
        for layer, before in zip(self.layers, layers, strict=True):
            h, left_behind = layer.step(h, mask, before, done)
            after.append(left_behind)
        return h[:, :, : self.segment_length].flatten(1, 2), tuple(after)

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
