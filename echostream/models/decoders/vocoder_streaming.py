"""Streams of a CodeHiFiGAN: the state of a stream, and a step from one state to the next.

A causal generator keeps what each convolution still needs of its input and computes every sample once. A generator
that looks ahead in every layer, as the field's do, keeps the units and frames within its view and computes them again:
right, but as dear as its view is wide.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from echostream.models.decoders.vocoder_layers import Chunk, DurationClassifier, Upsample, Whole
from echostream.models.state import State

if TYPE_CHECKING:
    from echostream.models.decoders.vocoder import CodeHiFiGAN


@dataclass(frozen=True)
class VocoderState(State):
    """A stream of a causal generator: what each convolution keeps of its input.

    Attributes:
        seen: [B] units received, capped at the look-ahead.
        caches: per convolution, [B, kept inputs, C].
    """

    seen: Tensor
    caches: tuple[Tensor, ...]


@dataclass(frozen=True)
class WindowState(State):
    """A stream of a generator that looks ahead in every layer: the units and frames still within its view.

    Attributes:
        units, frames: [B, W] ids, left-aligned: first those that are only context now, then those still to come out.
        unit_count, frame_count: [B] ids held.
        unit_done, frame_done: [B] how many of them are only context.
    """

    units: Tensor
    unit_count: Tensor
    unit_done: Tensor
    frames: Tensor
    frame_count: Tensor
    frame_done: Tensor


def init_state(
    model: CodeHiFiGAN, batch_size: int, device: torch.device, dtype: torch.dtype
) -> VocoderState | WindowState:
    """All zeros: what a convolution sees before a stream's first unit, and no units held."""
    zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
    if model.config.causal:
        sizes = list(_kept(model))
        caches = tuple(torch.zeros(batch_size, kept, width, dtype=dtype, device=device) for kept, width in sizes)
        return VocoderState(seen=zeros, caches=caches)
    units, frames = _windows(model)
    return WindowState(
        units=zeros.new_zeros(batch_size, units),
        unit_count=zeros,
        unit_done=zeros.clone(),
        frames=zeros.new_zeros(batch_size, frames),
        frame_count=zeros.clone(),
        frame_done=zeros.clone(),
    )


def _kept(model: CodeHiFiGAN) -> Iterator[tuple[int, int]]:
    """(inputs kept, channels) of a causal generator's convolutions, in the order in which they run."""
    predictor = model.dur_predictor
    if isinstance(predictor, DurationClassifier):
        yield predictor.first.left + predictor.first.right, predictor.first.in_channels
    for layer in getattr(model, "context", ()):
        yield layer.left + layer.right, layer.conv.in_channels
    layers = [] if predictor is None else predictor.in_order()
    layers += [model.conv_pre, *(conv for block in getattr(model, "frame_layers", ()) for conv in block.in_order())]
    for i, up in enumerate(model.ups):
        layers += [up, *(conv for block in model.blocks(i) for conv in block.in_order())]
    for layer in (*layers, model.conv_post):
        past = layer.past if isinstance(layer, Upsample) else layer.left
        if past:
            yield past, layer.in_channels


def step_causal(
    model: CodeHiFiGAN,
    units: Tensor,
    lengths: Tensor,
    state: VocoderState,
    finished: Tensor,
    speakers: Tensor | None,
) -> tuple[Tensor, Tensor, VocoderState]:
    """``CodeHiFiGAN.step`` of a causal generator: (waveform [B, T], frames [B], new state)."""
    ahead = model.config.lookahead_units
    if not units.shape[1]:
        units = units.new_zeros(units.shape[0], 1)  # a convolution wants something to slide over
    given = lengths[:, None]
    if ahead and bool(finished.any()):
        # What lies behind the end is zeros at the input of the layers that look ahead, as offline.
        units = F.pad(units, (0, ahead))
        lengths = lengths + ahead * finished.long()
    inside = (torch.arange(units.shape[1], device=units.device) < given).unsqueeze(2)
    x, flow = torch.where(inside, model.dict(units), 0.0).mT, Chunk(lengths, state.caches)
    predictor, look = model.dur_predictor, None
    if isinstance(predictor, DurationClassifier):
        look = predictor.look(torch.where(inside, predictor.dict(units), 0.0).mT, flow)
    for i, layer in enumerate(getattr(model, "context", ())):
        x = layer(x, flow)
        if i == 0 and ahead:
            # The delayed layers' first outputs of a stream belong to no unit: each row drops its own.
            drop = torch.minimum((ahead - state.seen).clamp(min=0), lengths)
            x = _shift_left(x, drop)
            look = None if look is None else _shift_left(look, drop)
            state = dataclasses.replace(state, seen=(state.seen + lengths).clamp(max=ahead))
            lengths = lengths - drop
            flow = Chunk(lengths, state.caches, flow.new)
    durations = model.predict_durations(x if look is None else look, flow)
    frames, frame_lengths = model.stretch(x, durations, lengths)
    flow = Chunk(frame_lengths, state.caches, flow.new)
    if frames.shape[2]:
        waveform = model.upsample(model.frame_features(model.with_speaker(frames, speakers), flow), flow)
        caches = tuple(flow.new)
    else:
        waveform = x.new_zeros(x.shape[0], 0)
        caches = (*flow.new, *state.caches[len(flow.new) :])
    return waveform, frame_lengths, VocoderState(seen=state.seen, caches=caches)


def _windows(model: CodeHiFiGAN) -> tuple[int, int]:
    """Units and frames that a stream keeps: context before, and what waits for its context behind."""
    durations = model.dur_predictor.right if model.dur_predictor is not None else 0
    return 2 * durations, sum(model.field)


def step_window(
    model: CodeHiFiGAN,
    units: Tensor,
    lengths: Tensor,
    state: WindowState,
    finished: Tensor,
    speakers: Tensor | None,
) -> tuple[Tensor, Tensor, WindowState]:
    """``CodeHiFiGAN.step`` by computing the receptive field again: (waveform [B, T], frames [B], new state).

    Every layer looks ahead, so the zeros that it saw at the stream's start or end are there again when, and only when,
    the window reaches that far.
    """
    reach = model.dur_predictor.right if model.dur_predictor is not None else 0
    before, behind = model.field
    ids, held = _append(state.units, state.unit_count, units, lengths)
    durations = model.predict_durations(model.dict(ids).mT, Whole(held))
    ready = torch.where(finished, held, torch.maximum(held - reach, state.unit_done))
    # The units that became ready, as frames of their ids.
    fresh = _shift_left(torch.stack([ids, durations], 1), state.unit_done)
    count = ready - state.unit_done
    inside = torch.arange(fresh.shape[2], device=units.device) < count[:, None]
    ends = torch.cumsum(fresh[:, 1].masked_fill(~inside, 0), dim=1)
    new = ends[:, -1] if ends.shape[1] else count
    at = torch.arange(int(new.max()), device=units.device).expand(len(new), -1).contiguous()
    at = torch.searchsorted(ends, at, right=True).clamp(max=max(fresh.shape[2] - 1, 0))
    frames, frame_held = _append(state.frames, state.frame_count, fresh[:, 0].gather(1, at), new)
    frame_ready = torch.where(finished, frame_held, torch.maximum(frame_held - behind, state.frame_done))
    if int((frame_ready - state.frame_done).max()):
        flow = Whole(frame_held)
        x = model.with_speaker(model.dict(frames).mT, speakers)
        waveform = model.upsample(model.frame_features(x, flow), flow)
        waveform = _shift_left(waveform.unsqueeze(1), state.frame_done * model.hop).squeeze(1)
    else:
        waveform = model.dict.weight.new_zeros(len(new), 0)
    unit_drop = (ready - reach).clamp(min=0)
    frame_drop = (frame_ready - before).clamp(min=0)
    widths = _windows(model)
    return (
        waveform,
        frame_ready - state.frame_done,
        WindowState(
            units=_fit(_shift_left(ids.unsqueeze(1), unit_drop).squeeze(1), widths[0]),
            unit_count=held - unit_drop,
            unit_done=ready - unit_drop,
            frames=_fit(_shift_left(frames.unsqueeze(1), frame_drop).squeeze(1), widths[1]),
            frame_count=frame_held - frame_drop,
            frame_done=frame_ready - frame_drop,
        ),
    )


def _shift_left(x: Tensor, by: Tensor) -> Tensor:
    """x [B, C, T] with row b moved left by ``by[b]``; what the rows end with is of no meaning."""
    if not x.shape[2] or not bool(by.any()):
        return x
    where = torch.arange(x.shape[2], device=x.device) + by[:, None]
    return x.gather(2, where.clamp(max=x.shape[2] - 1).unsqueeze(1).expand(-1, x.shape[1], -1))


def _append(held: Tensor, count: Tensor, new: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ids [B, W] filled up to ``count`` [B], with ``lengths`` [B] of ``new`` [B, N] behind: [B, W + N]."""
    joined = F.pad(held, (0, new.shape[1]))
    at = torch.arange(joined.shape[1], device=held.device) - count[:, None]
    if new.shape[1]:
        inside = (at >= 0) & (at < lengths[:, None])
        joined = torch.where(inside, new.gather(1, at.clamp(0, new.shape[1] - 1)), joined)
    return joined, count + lengths


def _fit(x: Tensor, width: int) -> Tensor:
    return F.pad(x[:, :width], (0, max(width - x.shape[1], 0)))
