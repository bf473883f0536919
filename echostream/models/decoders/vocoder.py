"""CodeHiFiGAN: discrete units to a 16 kHz waveform, offline and as a stream.

The generator is HiFi-GAN's (Kong et al., 2020) on unit embeddings (Polyak et al., 2021) with the duration predictor of
Lee et al. (2022), so that ``{"generator": ...}`` checkpoints of fairseq and speech-resynthesis load and sound the same.
EchoStream's own configuration keys (``causal`` and those below it) make a generator that streams: everything behind
the unit layers is causal, and the unit layers see ``lookahead_units`` ahead. ``var_pred_max_frames`` gives it a better
duration predictor.

Letters: B batch, U units, F frames of 20 ms (a unit lasts one or more), C channels, T samples or any time axis.
Units are cluster ids 0..num_embeddings-1, not dictionary indices.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from echostream.errors import UnitError
from echostream.models.decoders.vocoder_config import PRESETS, VocoderConfig, kept_inputs
from echostream.models.decoders.vocoder_generator import Generator
from echostream.models.decoders.vocoder_layers import ChunkFlow, DurationClassifier, WholeFlow
from echostream.models.state import State

__all__ = ["PRESETS", "CodeHiFiGAN", "VocoderConfig", "VocoderState", "WindowState"]


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


class CodeHiFiGAN(Generator):
    """Units to waveform.

    A causal generator keeps what each convolution still needs of its input and computes every sample once. A generator
    that looks ahead in every layer, as the field's do, keeps the units and frames within its view and computes them
    again: right, but as dear as its view is wide.

    Args:
        config: a ``VocoderConfig`` or the contents of a config.json.

    Raises:
        ConfigError: the configuration cannot be built.
    """

    # -------------------------------------------------------------------------------------------------------- offline
    def forward(
        self,
        units: Tensor,
        lengths: Tensor | None = None,
        durations: Tensor | None = None,
        speakers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Speak whole sequences.

        Args:
            units: [B, U] cluster ids.
            lengths: [B] units per row; None: all of them.
            durations: [B, U] frames of 20 ms per unit; None: predicted, or one each without a predictor.
            speakers: [B] speaker numbers of a multi-speaker vocoder.

        Returns:
            waveform [B, T] in [-1, 1], zero behind a row's end, and samples per row [B]. A row without units has no
            samples.

        Raises:
            UnitError: no row holds a unit, or a unit, duration or speaker is out of range.
        """
        units, lengths = self._arguments(units, lengths)
        if not int(lengths.sum()):
            raise UnitError("the unit sequence is empty; there is nothing to speak")
        uneven = lengths if bool((lengths != units.shape[1]).any()) else None
        flow = WholeFlow(uneven)
        x = self.embed(units, flow)
        if durations is None:
            durations = self.predict_durations(self.duration_input(units, flow, x), flow)
        elif durations.shape != units.shape:
            raise UnitError(f"durations have shape {list(durations.shape)}, units {list(units.shape)}")
        else:
            inside = torch.arange(units.shape[1], device=units.device) < lengths[:, None]
            if ((durations < 0) & inside).any():
                raise UnitError(f"a duration is {int(durations[inside].min())} frames; durations start at 0")
            durations = durations.long().masked_fill(~inside, 0)
        frames, frame_lengths = self.stretch(x, durations, lengths)
        if not frames.shape[2]:
            raise UnitError("all durations are 0; there is nothing to speak")
        frames = self.with_speaker(frames, speakers)
        uneven = frame_lengths if bool((frame_lengths != frames.shape[2]).any()) else None
        flow = WholeFlow(uneven)
        waveform = self.upsample(self.frame_features(frames, flow), flow)
        wav_lengths = frame_lengths * self.hop
        if uneven is not None:
            beyond = torch.arange(waveform.shape[1], device=units.device) >= wav_lengths[:, None]
            waveform = waveform.masked_fill(beyond, 0.0)
        return waveform, wav_lengths

    def _arguments(self, units: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if units.dim() != 2 or units.is_floating_point():
            raise UnitError(f"units must be whole numbers [B, U], not {units.dtype} {list(units.shape)}")
        if lengths is None:
            lengths = torch.full((units.shape[0],), units.shape[1], dtype=torch.long, device=units.device)
        lengths = lengths.to(units.device).long().clamp(min=0)
        if units.shape[0] and int(lengths.max()) > units.shape[1]:
            raise UnitError(f"a length of {int(lengths.max())} is more than the {units.shape[1]} units given")
        return self.check_units(units.long(), lengths), lengths

    # ------------------------------------------------------------------------------------------------------ streaming
    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> VocoderState | WindowState:
        """The state of ``batch_size`` streams that have not begun."""
        like = self.dict.weight
        return _init_state(self, batch_size, device or like.device, dtype or like.dtype)

    def step(
        self,
        units: Tensor,
        lengths: Tensor,
        state: VocoderState | WindowState,
        finished: Tensor | None = None,
        speakers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, VocoderState | WindowState]:
        """Speak the next units of each stream, as far as the look-ahead allows.

        Args:
            units: [B, N] cluster ids, left-aligned. lengths: [B] units per row, 0 allowed.
            state: from ``init_state`` or the step before; not changed.
            finished: [B] bool, rows whose last units these are: all of their samples come out, and the row's state
                starts anew.
            speakers: [B] speaker numbers of a multi-speaker vocoder, the same in every step.

        Returns:
            waveform [B, T], samples per row [B] and the new state. The samples of all steps together are those of
            ``forward`` on the whole sequence.

        Raises:
            UnitError: a unit or speaker is out of range.
        """
        units, lengths = self._arguments(units, lengths)
        if finished is None:
            finished = torch.zeros_like(lengths, dtype=torch.bool)
        advance = _step_causal if self.config.causal else _step_window
        waveform, frames, new = advance(self, units, lengths, state, finished, speakers)
        wav_lengths = frames * self.hop
        longest = int(wav_lengths.max()) if len(wav_lengths) else 0
        waveform = waveform[:, :longest]
        beyond = torch.arange(longest, device=units.device) >= wav_lengths[:, None]
        waveform = waveform.masked_fill(beyond, 0.0)
        if finished.any():
            # A new stream's state is all zeros, see ``init_state``.
            new = new.map(lambda t: t.masked_fill(finished.view(-1, *[1] * (t.dim() - 1)), 0))
        return waveform, wav_lengths, new


def _init_state(
    model: Generator, batch_size: int, device: torch.device, dtype: torch.dtype
) -> VocoderState | WindowState:
    """All zeros: what a convolution sees before a stream's first unit, and no units held."""
    zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
    if model.config.causal:
        sizes = kept_inputs(model.config).values()
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


def _step_causal(
    model: Generator,
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
    x, flow = torch.where(inside, model.dict(units), 0.0).mT, ChunkFlow(lengths, state.caches)
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
            flow = ChunkFlow(lengths, state.caches, flow.new)
    durations = model.predict_durations(x if look is None else look, flow)
    frames, frame_lengths = model.stretch(x, durations, lengths)
    flow = ChunkFlow(frame_lengths, state.caches, flow.new)
    if frames.shape[2]:
        waveform = model.upsample(model.frame_features(model.with_speaker(frames, speakers), flow), flow)
        caches = tuple(flow.new)
    else:
        waveform = x.new_zeros(x.shape[0], 0)
        caches = (*flow.new, *state.caches[len(flow.new) :])
    return waveform, frame_lengths, VocoderState(seen=state.seen, caches=caches)


def _windows(model: Generator) -> tuple[int, int]:
    """Units and frames that a stream keeps: context before, and what waits for its context behind."""
    durations = model.dur_predictor.right if model.dur_predictor is not None else 0
    return 2 * durations, sum(model.field)


def _step_window(
    model: Generator,
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
    durations = model.predict_durations(model.dict(ids).mT, WholeFlow(held))
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
        flow = WholeFlow(frame_held)
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
