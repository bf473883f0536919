"""The torch model behind the streaming engine: rows of streams stepping together.

The rows' state lives here, in buffers of fixed size that the decoders write in place (they are handed out by nobody);
``snapshot`` and ``restore`` turn a row into plain arrays and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from echostream.models.decoders.decoder_base import DecoderState
from echostream.models.decoders.layers import AttentionProbe
from echostream.models.state import S, State
from echostream.streaming.search import Step
from echostream.streaming.stages import (
    Answering,
    Encode,
    EncoderOutput,
    Extend,
    NewSentence,
    ReadUnits,
    Request,
    Rewind,
    Vocode,
    Write,
    Written,
)

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle
    from echostream.models.decoders.ctc_decoder import CausalState
    from echostream.models.decoders.vocoder import CodeHiFiGAN, VocoderState, WindowState
    from echostream.models.echostream_encoder import EncoderState
    from echostream.models.echostream_model import EchoStreamModel


@dataclass(frozen=True)
class StagesState(State):
    """All stages' states, each with the stream as its first dimension. ``vocoder`` is empty where there is none."""

    encoder: EncoderState
    asr: CausalState
    st: CausalState
    mt: DecoderState
    unit: tuple[DecoderState, ...]
    vocoder: tuple[VocoderState | WindowState, ...]


class TorchStages(Answering):
    """Answers the engine's requests for ``rows`` streams.

    Args:
        bundle: a loaded checkpoint; its model runs on whatever device and dtype it is in.
        rows: how many streams.
        speech: without, the unit decoder and the vocoder take no room and are never called.
    """

    def __init__(self, bundle: Bundle, rows: int = 1, speech: bool = True):
        self.model = cast("EchoStreamModel", bundle.model)  # ``backend_of`` has seen that it is
        self.vocoder = cast("CodeHiFiGAN | None", bundle.vocoder) if speech else None
        self.speech = speech
        weight = self.model.asr_head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.state = self.init_state(rows)

    @torch.inference_mode()
    def init_state(self, rows: int) -> StagesState:
        model = self.model
        return StagesState(
            encoder=model.encoder.init_state(rows),
            asr=model.asr_head.init_state(rows),
            st=model.st_decoder.init_state(rows),
            mt=model.mt_decoder.init_state(rows),
            unit=(model.unit_decoder.init_state(rows),) if self.speech else (),
            vocoder=(self.vocoder.init_state(rows),) if self.vocoder is not None else (),
        )

    @property
    def rows(self) -> int:
        return self.state.mt.positions.shape[0]

    @torch.inference_mode()
    def run(self, requests: Sequence[tuple[int, Request]]) -> list[Any]:
        """See ``Stages.run``."""
        return super().run(requests)

    # ---- requests ----------------------------------------------------------------------------------------------

    def _encode(self, rows: list[int], requests: list[Encode]) -> list[EncoderOutput]:
        features, lengths = self._pad(rows, [r.features for r in requests])
        finished = self._flags(rows, [r.finished for r in requests])
        state = self.state
        frames, counts, encoder = self.model.encoder.step(features, lengths, state.encoder, finished)
        asr, st = state.asr, state.st
        if frames.shape[1]:
            scores, _, asr = self.model.asr_head.step(frames, counts, asr)
            source = scores.argmax(-1)
            scores, _, st = self.model.st_decoder.step(frames, counts, st)
            target = scores.argmax(-1)
        else:
            source = target = counts.new_zeros(len(counts), 0)
        if bool(finished.any()):
            asr, st = asr.restart(finished), st.restart(finished)
        self._replace(encoder=encoder, asr=asr, st=st)
        given = [_numpy(t) for t in (frames, source, target)]
        sizes = _numpy(counts)
        return [EncoderOutput(*(array[r, : sizes[r]] for array in given)) for r in rows]

    def _new_sentence(self, rows: list[int], requests: list[NewSentence]) -> list[None]:
        chosen = self._flags(rows, [True] * len(rows))
        self._replace(mt=self.state.mt.restart(chosen), unit=tuple(u.restart(chosen) for u in self.state.unit))
        return [None] * len(rows)

    def _extend(self, rows: list[int], requests: list[Extend]) -> list[None]:
        frames, lengths = self._pad(rows, [r.frames for r in requests])
        mt = self.model.mt_decoder.extend(frames, lengths, self.state.mt, in_place=True)
        unit = tuple(self.model.unit_decoder.extend(frames, lengths, state, in_place=True) for state in self.state.unit)
        self._replace(mt=mt, unit=unit)
        return [None] * len(rows)

    def _write(self, rows: list[int], requests: list[Write]) -> list[Written]:
        tokens = torch.zeros(self.rows, 1, dtype=torch.long)
        tokens[rows, 0] = torch.tensor([r.token for r in requests])
        active = self._flags(rows, [True] * len(rows))
        heads = next((r.heads for r in requests if r.heads), ())
        probe = AttentionProbe(heads) if heads else None
        scores, hidden, mt = self.model.mt_decoder.step(
            tokens.to(self.device), active, self.state.mt, in_place=True, probe=probe
        )
        self._replace(mt=mt)
        likely, states = _numpy(scores), _numpy(hidden)
        written = [Written(likely[r, 0], states[r, 0]) for r in rows]
        if probe is None:
            return written
        assert probe.weights is not None
        weights, frames = _numpy(probe.weights), _numpy(mt.frames)
        return [one._replace(attention=weights[r, 0, : frames[r]]) for r, one in zip(rows, written, strict=True)]

    def _branch(self, row: int, places: int) -> Step:
        whole, decoder = self.state.mt, self.model.mt_decoder
        places += int(whole.positions[row])
        state = DecoderState(
            tuple(cache.map(lambda t: t[row : row + 1, :places]) for cache in whole.own),
            tuple(cache.map(lambda t: t[row : row + 1, : int(whole.frames[row])]) for cache in whole.memory),
            whole.positions[row : row + 1],
            whole.frames[row : row + 1],
        )

        def step(tokens: np.ndarray, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            nonlocal state
            chosen = torch.from_numpy(parents).to(self.device)
            fed = torch.from_numpy(tokens)[:, None].to(self.device)
            # The frames are the same for all: they are copied when hypotheses are added, not at every token.
            state = state.reorder(chosen) if len(chosen) == state.batch_size else state.index_select(chosen)
            scores, hidden, state = decoder.step(fed, None, state, in_place=True)
            return _numpy(scores)[:, 0], _numpy(hidden)[:, 0]

        return step

    def _rewind(self, rows: list[int], requests: list[Rewind]) -> list[None]:
        positions = self.state.mt.positions.clone()
        positions[rows] = torch.tensor([r.positions for r in requests], device=self.device)
        self._replace(mt=dataclasses.replace(self.state.mt, positions=positions))
        return [None] * len(rows)

    def _read_units(self, rows: list[int], requests: list[ReadUnits]) -> list[np.ndarray]:
        inputs, lengths = self._pad(rows, [r.inputs for r in requests])
        tokens = None
        written = [r.tokens for r in requests if r.tokens is not None]  # all of them, or none
        if written:
            tokens, _ = self._pad_symbols(rows, written)
        scores, counts, unit = self.model.unit_decoder.step(
            inputs, lengths, self.state.unit[0], in_place=True, tokens=tokens
        )
        self._replace(unit=(unit,))
        symbols, sizes = _numpy(scores.argmax(-1)), _numpy(counts)
        return [symbols[r, : sizes[r]] for r in rows]

    def _vocode(self, rows: list[int], requests: list[Vocode]) -> list[np.ndarray]:
        units, lengths = self._pad_symbols(rows, [r.units for r in requests])
        finished = self._flags(rows, [r.finished for r in requests])
        assert self.vocoder is not None
        waveform, sizes, state = self.vocoder.step(units, lengths, self.state.vocoder[0], finished)
        self._replace(vocoder=(state,))
        samples, counts = _numpy(waveform.float()), _numpy(sizes)
        return [samples[r, : counts[r]].copy() for r in rows]

    # ---- rows --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def reset(self, row: int) -> None:
        """A new stream in ``row``."""
        chosen, rows, old = self._flags([row], [True]), self.rows, self.state
        fresh = () if self.vocoder is None else (self.vocoder.init_state(rows),)
        self.state = StagesState(
            encoder=self.model.encoder.init_state(rows).where(chosen, old.encoder),
            asr=old.asr.restart(chosen),
            st=old.st.restart(chosen),
            mt=old.mt.restart(chosen),
            unit=tuple(state.restart(chosen) for state in old.unit),
            vocoder=tuple(_where(chosen, *pair) for pair in zip(fresh, old.vocoder, strict=True)),
        )

    @torch.inference_mode()
    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        """The state of ``row`` as named arrays [1, ...], copied; of the decoders' buffers only what is in use."""
        chosen = torch.tensor([row], device=self.device)
        arrays = self.state.index_select(chosen).arrays()
        for name, array in arrays.items():
            used = self._used(name, arrays)
            arrays[name] = array if used is None else array[:, :used].copy()
        return arrays

    @torch.inference_mode()
    def restore(self, row: int, arrays: dict[str, np.ndarray]) -> None:
        """Put what ``snapshot`` gave into ``row``.

        Raises:
            KeyError, ValueError: the arrays are of another model.
        """
        like = self.init_state(1)
        full = {}
        fresh = like.arrays()
        for name, empty in fresh.items():
            array, used = arrays[name], self._used(name, arrays)
            expected = empty.shape if used is None else (1, used, *empty.shape[2:])
            if array.shape != expected or array.dtype.kind != empty.dtype.kind:
                raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected {list(expected)}")
            # What counts the places of a buffer beside it lies within them.
            buffer = fresh.get(name.removesuffix("_count"))
            most = MOST_STEPS if buffer is None or buffer is empty else buffer.shape[1]
            if empty.dtype.kind == "i" and array.size and not 0 <= array.min() <= array.max() <= most:
                raise ValueError(f"{name} is {array.tolist()}; it must lie in 0..{most}")
            full[name] = array if used is None else empty
            if used is not None:
                full[name][:, :used] = array
        state = like.from_arrays(full)
        chosen = self._flags([row], [True])
        every = torch.zeros(self.rows, dtype=torch.long, device=self.device)

        def put(new: S, old: S) -> S:
            return _where(chosen, new.index_select(every), old)

        def put_decoder(new: DecoderState, old: DecoderState) -> DecoderState:
            # The large buffers are written in place, as the decoders do.
            for target, source in zip([*old.own, *old.memory], [*new.own, *new.memory], strict=True):
                target.keys[row], target.values[row] = source.keys[0], source.values[0]
            positions = torch.where(chosen, new.positions, old.positions)
            return DecoderState(old.own, old.memory, positions, torch.where(chosen, new.frames, old.frames))

        before = self.state
        self.state = StagesState(
            encoder=put(state.encoder, before.encoder),
            asr=put(state.asr, before.asr),
            st=put(state.st, before.st),
            mt=put_decoder(state.mt, before.mt),
            unit=tuple(put_decoder(*pair) for pair in zip(state.unit, before.unit)),
            vocoder=tuple(put(*pair) for pair in zip(state.vocoder, before.vocoder)),
        )

    @staticmethod
    def _used(name: str, arrays: dict[str, np.ndarray]) -> int | None:
        """Places in use of a decoder's buffer [1, places, D]; None for all other arrays."""
        for buffer, count in (("own.", "positions"), ("memory.", "frames")):
            decoder, found, _ = name.partition(buffer)
            if found and decoder in ("mt.", "unit.0."):
                used = int(arrays[decoder + count][0])
                if used < 0:
                    raise ValueError(f"{decoder}{count} is {used}")
                return used
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' states; they never change."""
        return self.state.nbytes

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _replace(self, **changes: Any) -> None:
        self.state = dataclasses.replace(self.state, **changes)

    def _pad(self, rows: list[int], arrays: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Arrays [n, D] of some rows as one tensor [rows, N, D] and its lengths; the other rows bring nothing."""
        lengths = torch.zeros(self.rows, dtype=torch.long)
        lengths[rows] = torch.tensor([len(a) for a in arrays])
        if self.rows == 1:
            padded = torch.from_numpy(np.array(arrays[0]))[None]  # a copy: the array may be read-only
        else:
            padded = torch.zeros(self.rows, int(lengths.max()), arrays[0].shape[1], dtype=_DTYPES[arrays[0].dtype.name])
            for row, array in zip(rows, arrays):
                padded[row, : len(array)] = torch.from_numpy(np.array(array))
        return padded.to(device=self.device, dtype=self.dtype), lengths.to(self.device)

    def _pad_symbols(self, rows: list[int], arrays: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The same for whole numbers [n]: one long tensor [rows, N] and its lengths."""
        symbols = torch.zeros(self.rows, max(map(len, arrays)), dtype=torch.long)
        lengths = torch.zeros(self.rows, dtype=torch.long)
        for row, array in zip(rows, arrays):
            symbols[row, : len(array)] = torch.from_numpy(np.asarray(array, dtype=np.int64))
            lengths[row] = len(array)
        return symbols.to(self.device), lengths.to(self.device)

    def _flags(self, rows: list[int], values: list[bool]) -> Tensor:
        flags = torch.zeros(self.rows, dtype=torch.bool)
        flags[rows] = torch.tensor(values, dtype=torch.bool)
        return flags.to(self.device)


MOST_STEPS = 1 << 40  # of a stream's life: more than a thousand years of frames
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def _where(chosen: Tensor, new: S, old: S) -> S:
    return new.where(chosen, old)


def _numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.cpu().numpy()
