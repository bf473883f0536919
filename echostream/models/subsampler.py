"""Convolutional stems: 10 ms feature frames to frames of 40 or 20 ms, offline and as they arrive.

Shape legend: B streams, T feature frames (10 ms), N encoder frames (40 ms), F mel bins, C channels, D encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.constants import SUBSAMPLING, SUBSAMPLING_CONTEXT, WHISPER_SILENCE
from echostream.errors import ConfigError
from echostream.models.state import State


@dataclass(frozen=True)
class SubsamplerState(State):
    """What the subsampler remembers of each stream."""

    context: Tensor  # [B, 3, F] the feature frames before the pending ones; zeros before the stream began
    pending: Tensor  # [B, 3, F] feature frames that do not fill an encoder frame yet, left-aligned
    pending_count: Tensor  # [B] how many of them there are, 0 to 3
    frames: Tensor  # [B] encoder frames given out so far


class Stem(nn.Module):
    """What turns feature frames into the frames of the Emformer layers; base of the two kinds, with all bookkeeping.

    Encoder frame t depends on the feature frames 4t-3 to 4t+3; T features give ceil(T / 4) encoder frames, of k frames
    for the layers each. A subclass has ``conv1`` and ``_convolve``.

    Attributes:
        num_bins: F. embed_dim: D. factor: k, the layers' frames per encoder frame of 40 ms.
    """

    conv1: nn.Module

    def __init__(self, num_bins: int, embed_dim: int, factor: int = 1) -> None:
        super().__init__()
        self.num_bins, self.embed_dim, self.factor = num_bins, embed_dim, factor

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Subsample whole utterances.

        Args:
            features: [B, T, F] feature frames of 10 ms, right-padded.
            lengths: [B] valid feature frames.

        Returns:
            ([B, ceil(T / 4) k, D] frames, zero in the padding; [B] valid ones, multiples of k).
        """
        count = -(-features.shape[1] // SUBSAMPLING)
        window = F.pad(features, (0, 0, 0, count * SUBSAMPLING - features.shape[1]))
        window = torch.cat([self._before(len(features), features.device, features.dtype), window], dim=1)
        out_lengths = -(-lengths // SUBSAMPLING) * self.factor
        return self._convolve(window, lengths, torch.ones_like(lengths, dtype=torch.bool), out_lengths), out_lengths

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SubsamplerState:
        """The state of streams of which nothing has been heard."""
        weight = self.conv1.weight
        frames = self._before(batch_size, device or weight.device, dtype or weight.dtype)
        zero = torch.zeros(batch_size, device=frames.device, dtype=torch.long)
        return SubsamplerState(frames, torch.zeros_like(frames), zero, zero)

    def _before(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The three feature frames before a stream's beginning, [B, 3, F]."""
        return torch.zeros(batch_size, SUBSAMPLING_CONTEXT, self.num_bins, device=device, dtype=dtype)

    def step(
        self, features: Tensor, lengths: Tensor, state: SubsamplerState, finished: Tensor | None = None
    ) -> tuple[Tensor, Tensor, SubsamplerState]:
        """Subsample what has arrived.

        Args:
            features: [B, T, F] new feature frames, left-aligned.
            lengths: [B] how many of them each stream brings (0 is allowed).
            state: the streams' state; not changed.
            finished: [B] true where the stream ends with these frames: its last, partial encoder frame is given out
                too, and its state comes back as new.

        Returns:
            ([B, N, D] frames, left-aligned, zero in the padding; [B] valid ones, multiples of k; the next state).
        """
        features = features.to(state.pending.dtype)
        pending, available = append_rows(state.pending, state.pending_count, features, lengths)
        counts = available // SUBSAMPLING
        if finished is not None:
            counts = torch.where(finished, -(-available // SUBSAMPLING), counts)
        count = int(counts.max())
        heard = torch.cat([state.context, pending], dim=1)
        size = SUBSAMPLING_CONTEXT + count * SUBSAMPLING
        if count:
            window = heard[:, :size] if heard.shape[1] >= size else F.pad(heard, (0, 0, 0, size - heard.shape[1]))
            y = self._convolve(window, available, state.frames == 0, counts * self.factor)
        else:
            y = self.conv1.weight.new_zeros(len(features), 0, self.embed_dim)
        consumed = counts * SUBSAMPLING
        new = SubsamplerState(
            context=take_rows(heard, consumed, SUBSAMPLING_CONTEXT),
            pending=take_rows(heard, consumed + SUBSAMPLING_CONTEXT, SUBSAMPLING_CONTEXT),
            pending_count=(available - consumed).clamp(min=0),
            frames=state.frames + counts,
        )
        if finished is not None:
            fresh = self.init_state(len(features), features.device, features.dtype)
            new = fresh.where(finished, new)
        return y, counts * self.factor, new

    def _convolve(self, window: Tensor, lengths: Tensor, first: Tensor, out_lengths: Tensor) -> Tensor:
        """Features to frames.

        Args:
            window: [B, 3 + 4 N, F], three frames of context and then ``lengths`` [B] valid frames.
            first: [B] true where the context lies before the stream's beginning.
            out_lengths: [B] of the N k frames to keep; the others are set to zero.
        """
        raise NotImplementedError


class Subsampler(Stem):
    """Two Conv2d (kernel 3, stride 2, padding 1) with ReLU, then a linear projection of channels x bins.

    The padding is zero at the input of *each* convolution, at the stream's start and end and behind every item of a
    batch: the padding of the second convolution is zero and not ReLU(bias), which is what three zero feature frames
    would become.

    The projection reads the bins of one frame as [bin, channel], the order in which channels-last convolutions
    leave them in memory.
    """

    def __init__(self, num_bins: int, in_channels: int, channels: int, embed_dim: int) -> None:
        super().__init__(num_bins, embed_dim)
        if num_bins % in_channels:
            raise ConfigError(f"input_feat_per_channel {num_bins} must be a multiple of input_channels {in_channels}")
        self.in_channels = in_channels
        # Padding in time is explicit, because it belongs to the ends of streams and not to those of chunks.
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=2, padding=(0, 1))
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=(0, 1))
        bins = num_bins // in_channels
        for _ in range(2):
            bins = (bins + 1) // 2
        self.proj = nn.Linear(channels * bins, embed_dim)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        nn.init.xavier_uniform_(self.proj.weight)
        # Not zero: masked-out input (SpecAugment) would give frames of exact zeros, and every LayerNorm behind them
        # would multiply the gradient by 1 / sqrt(eps), until it overflows.
        nn.init.normal_(self.proj.bias, std=0.1)

    def _convolve(self, window: Tensor, lengths: Tensor, first: Tensor, out_lengths: Tensor) -> Tensor:
        batch, size, _ = window.shape
        time = torch.arange(-SUBSAMPLING_CONTEXT, size - SUBSAMPLING_CONTEXT, device=window.device)
        x = window.masked_fill((time >= lengths[:, None])[:, :, None], 0.0)
        x = x.view(batch, size, self.in_channels, -1).transpose(1, 2)  # [B, channel, T, bin]
        if _is_half(x):
            # Channels last in memory: a third less time in bf16, but more than the plain order in fp32 (CPU).
            x = x.clone(memory_format=torch.channels_last)  # contiguous() keeps the strides of a single channel
        x = F.relu(self.conv1(x))
        time = torch.arange(-1, x.shape[2] - 1, device=window.device)
        inside = (time < -(-lengths[:, None] // 2)) & ~((time < 0) & first[:, None])
        x = x * inside.to(x.dtype)[:, None, :, None]  # a product, because masked_fill is far slower on a CPU
        x = F.relu(self.conv2(x))
        x = self.proj(x.permute(0, 2, 3, 1).flatten(2))  # [B, C, N, bin] -> [B, N, bin x C]
        time = torch.arange(x.shape[1], device=window.device)
        return x.masked_fill((time >= out_lengths[:, None])[:, :, None], 0.0)


class WhisperStem(Stem):
    """Whisper's two Conv1d (kernel 3, the second with stride 2) with GELU: frames of 20 ms (Radford et al., 2022).

    Feature frame t of ``whisper_fbank`` is Whisper's frame t + 1 of the sound behind 20 ms of silence, so that no
    convolution looks beyond the four frames that an encoder frame replaces, and what Whisper would have heard before is
    one frame of silence and then zero padding, at the input of each convolution.
    """

    def __init__(self, num_bins: int, embed_dim: int) -> None:
        super().__init__(num_bins, embed_dim, factor=2)
        self.conv1 = nn.Conv1d(num_bins, embed_dim, kernel_size=3)
        self.conv2 = nn.Conv1d(embed_dim, embed_dim, kernel_size=3, stride=2)

    def _before(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        before = super()._before(batch_size, device, dtype)
        before[:, -1] = WHISPER_SILENCE
        return before

    def _convolve(self, window: Tensor, lengths: Tensor, first: Tensor, out_lengths: Tensor) -> Tensor:
        size = window.shape[1]
        time = torch.arange(-SUBSAMPLING_CONTEXT, size - SUBSAMPLING_CONTEXT, device=window.device)
        x = window.masked_fill((time >= lengths[:, None])[:, :, None], 0.0)
        time = time[1:-1]  # the middle of what each saw
        inside = (time < lengths[:, None]) & ~((time < -1) & first[:, None])
        x = self.convolve(x, inside.to(x.dtype))
        time = torch.arange(x.shape[1], device=window.device)
        return x.masked_fill((time >= out_lengths[:, None])[:, :, None], 0.0)

    def convolve(self, x: Tensor, inside: Tensor) -> Tensor:
        """Features [B, 3 + 4 N, F] to frames [B, 2 N, D].

        Args:
            inside: [B, 1 + 4 N], 1 where the first convolution's outputs belong to the stream, else 0.
        """
        x = F.gelu(self.conv1(x.transpose(1, 2)))
        return F.gelu(self.conv2(x * inside[:, None])).transpose(1, 2)


def _is_half(x: Tensor) -> bool:
    """Whether a convolution of ``x`` will run in a 16-bit type, by its own or by autocast."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype.itemsize == 2


def append_rows(old: Tensor, old_lengths: Tensor, new: Tensor, new_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Put each row's new items directly behind its old ones.

    Args:
        old: [B, A, D] with ``old_lengths`` [B] valid items a row, left-aligned.
        new: [B, T, D] with ``new_lengths`` [B].

    Returns:
        ([B, A + T, D] zero behind the valid items, [B] valid items).
    """
    total = old_lengths + new_lengths
    if new.shape[1] == 0:
        return old, total
    size = old.shape[1] + new.shape[1]
    if len(old) == 1:
        joined = torch.cat([old[:, : int(old_lengths)], new[:, : int(new_lengths)]], dim=1)
        return F.pad(joined, (0, 0, 0, size - joined.shape[1])), total
    position = torch.arange(size, device=old.device).expand(len(old), -1)
    source = (position - old_lengths[:, None]).clamp(0, new.shape[1] - 1)
    moved = new.gather(1, source[:, :, None].expand(-1, -1, new.shape[2]))
    kept = F.pad(old, (0, 0, 0, new.shape[1]))
    joined = torch.where((position < old_lengths[:, None])[:, :, None], kept, moved)
    return joined.masked_fill((position >= total[:, None])[:, :, None], 0.0), total


def take_rows(x: Tensor, start: Tensor, size: int) -> Tensor:
    """``size`` items of each row of ``x`` [B, T, D] from ``start`` [B] on; beyond the end comes zero."""
    if len(x) == 1:
        first = int(start)
        part = x[:, first : first + size]
        # The copy keeps a state from holding on to (or sharing) a larger buffer.
        return F.pad(part, (0, 0, 0, size - part.shape[1])) if part.shape[1] < size else part.clone()
    index = start[:, None] + torch.arange(size, device=x.device)
    taken = x.gather(1, index.clamp(max=x.shape[1] - 1)[:, :, None].expand(-1, -1, x.shape[2]))
    return taken.masked_fill((index >= x.shape[1])[:, :, None], 0.0)
