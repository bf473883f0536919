"""EchoStream's model: the six parts joined, offline for training and chunk by chunk for streaming.

Letters: B batch rows, S sentences, T feature frames (10 ms), T' encoder frames (40 ms), U target tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.config import EchoStreamConfig
from echostream.constants import BLANK, EOS, NUM_SPECIALS, PAD
from echostream.errors import CheckpointError, ConfigError, EchoStreamError
from echostream.models.decoders.ctc_decoder import ASRHead, CausalState, STDecoder
from echostream.models.decoders.decoder_base import DecoderState
from echostream.models.decoders.transformer_decoder import MTDecoder
from echostream.models.decoders.unit_decoder import UnitDecoder, greedy_units
from echostream.models.decoders.vocoder import CodeHiFiGAN
from echostream.models.echostream_encoder import EchoStreamEncoder
from echostream.models.state import State

__all__ = ["EchoStreamConfig", "EchoStreamModel", "ModelState", "SentenceWindows", "build_echostream_model"]

PARTS = ("asr", "st", "mt", "unit")

# Where a vocabulary's size shows in the weights.
_VOCABULARY_WEIGHTS = {
    "asr_head.output.weight": ("ASR CTC head", "source dictionary"),
    "st_decoder.head.output.weight": ("ST CTC head", "target dictionary"),
    "mt_decoder.embedding.weight": ("MT decoder", "target dictionary"),
    "unit_decoder.output.weight": ("unit decoder", "unit dictionary"),
}


class SentenceWindows(NamedTuple):
    """The sentences of joined utterances: sentence s spans encoder frames ``start`` … ``end``-1 of row ``row``."""

    row: Tensor  # [S] long, batch row
    start: Tensor  # [S] long
    end: Tensor  # [S] long, exclusive

    def gather(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cut encoder frames x [B, T', D], lengths [B], into [S, W, D] (zero behind a sentence) and lengths [S]."""
        end = torch.minimum(self.end, lengths[self.row])
        counts = (end - self.start).clamp(min=0)
        places = torch.arange(int(counts.max()) if len(counts) else 0, device=x.device)
        index = (self.start[:, None] + places).clamp(max=max(x.shape[1] - 1, 0))
        frames = x[self.row[:, None], index]
        return frames.masked_fill((places >= counts[:, None])[..., None], 0.0), counts


@dataclass(frozen=True)
class ModelState(State):
    """State of the streaming loop, per row. Parts that this model does not stream are empty tuples."""

    encoder: State
    asr: CausalState
    st: CausalState
    units: tuple[DecoderState, ...]
    last_unit: Tensor  # [B] long, the unit decoder's last raw symbol
    vocoder: tuple[State, ...]


class EchoStreamModel(nn.Module):
    """Simultaneous speech-to-speech translation: StreamSpeech (Zhang et al., 2024) on an Emformer (Shi et al., 2021).

    Args:
        cfg: hyper-parameters; vocabulary sizes included.
        vocoder: a CodeHiFiGAN; then ``forward`` gives out waveforms too. It is no part of the training.

    Raises:
        ConfigError: the vocoder knows fewer units than the model writes.
    """

    def __init__(self, cfg: EchoStreamConfig, vocoder: CodeHiFiGAN | None = None):
        super().__init__()
        if vocoder is not None and vocoder.config.num_embeddings < cfg.num_units:
            raise ConfigError(
                f"the vocoder speaks {vocoder.config.num_embeddings} units, the model writes {cfg.num_units}; "
                "use a vocoder trained on the same units"
            )
        self.config = cfg
        self.encoder = EchoStreamEncoder(cfg)
        self.asr_head = ASRHead(cfg)
        self.st_decoder = STDecoder(cfg)
        self.mt_decoder = MTDecoder(cfg)
        self.unit_decoder = UnitDecoder(cfg)
        self.vocoder = vocoder
        self._streaming = False
        self._state: ModelState | None = None

    # ---- all at once -------------------------------------------------------------------------------------------

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor | None = None,
        windows: SentenceWindows | None = None,
        visible: Tensor | Callable[[Tensor], Tensor] | None = None,
        unit_visible: Tensor | None = None,
        finished: bool | Tensor = False,
        parts: Collection[str] = PARTS,
        encoded: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> dict[str, Any]:
        """Whole utterances; or, after ``reset_cache()``, the next chunk of each stream.

        Args:
            src_tokens: features [B, T, 80]. src_lengths: [B], feature frames (10 ms) of each row.
            prev_output_tokens: [S, U], target sentences, ``</s>`` first, padding behind: teacher forcing.
            windows: the sentences of joined utterances. Default: one sentence per row, over all its frames.
            visible: [S, U], g(i): how many encoder frames of its sentence target position i may attend; or a function
                that tells it from ``st_logits`` (training under a policy that follows the ST CTC).
            unit_visible: the same for the unit decoder's inputs, [S, U] (``mt``; default ``visible``) or [S, W]
                (``encoder``; default: all).
            parts: offline only; which of ``asr``, ``st``, ``mt`` and ``unit`` to compute, for training some alone.
                Units read from MT states bring the MT decoder with them. ``frames`` hands out the encoder's inner
                frames too.
            encoded: offline only; encoder frames [B, T', D], their lengths [B] and the MT decoder's states [S, U, D]
                (or None) where they are known: what gives them is left out. Not with ``frames`` in ``parts``.
            finished: streaming only; True (or [B] bool) flushes what the encoder still holds.

        Returns:
            A dict, offline: ``encoder_out`` (fairseq's encoder-output dict, ``["encoder_out"][0]`` is [T', B, D]),
            ``encoder_lengths`` [B], ``asr_logits`` and ``st_logits`` [B, T', vocab], ``asr_between``, a list of scores
            that the ASR head feeds back to itself (``asr_condition_every``); with ``prev_output_tokens``:
            ``mt_logits`` [S, U, vocab], ``mt_hidden`` [S, U, D]; ``unit_logits`` [S, L, num_units + 4] and
            ``unit_lengths`` [S]; with a vocoder, in eval mode: ``units`` [S, N], ``units_lengths`` [S], ``waveform``
            [S, T_wav] in [-1, 1] and ``waveform_lengths`` [S]; with ``frames`` in ``parts``: ``frames`` [B, T' k, D] as
            the encoder's ``inner_frames`` gives them, ``frame_lengths`` [B]. A unit decoder that reads MT states needs
            a translation: without ``prev_output_tokens`` it is decoded greedily in eval mode (``mt_tokens`` [S, U]).
            Streaming, the same keys hold what is new; see ``step``.

        Raises:
            EchoStreamError: no ``prev_output_tokens`` in training although the unit decoder reads MT states; a chunk of
                another batch size than the stream's.
        """
        if self._streaming:
            return self._stream(src_tokens, src_lengths, finished)
        inner, hidden = None, None
        if encoded is not None:
            x, lengths, hidden = encoded
        elif "frames" in parts:
            inner = self.encoder.inner_frames(src_tokens, src_lengths)
            x, lengths = self.encoder.merge_frames(*inner)
        else:
            x, lengths = self.encoder(src_tokens, src_lengths)
        out = self._encoder_out(x, lengths)
        if inner is not None:
            out["frames"], out["frame_lengths"] = inner
        if "asr" in parts:
            *out["asr_between"], out["asr_logits"] = self.asr_head.predictions(x)
        if "st" in parts:
            out["st_logits"] = self.st_decoder(x, lengths)
        if windows is not None:
            x, lengths = SentenceWindows(*windows).gather(x, lengths)
        if callable(visible):
            visible = visible(out["st_logits"])
        if prev_output_tokens is not None and ("mt" in parts or ("unit" in parts and self.config.units_read_text)):
            if hidden is not None and "mt" not in parts:
                out["mt_hidden"] = hidden
            else:
                out["mt_logits"], out["mt_hidden"] = self.mt_decoder(prev_output_tokens, x, lengths, visible)
        if "unit" in parts:
            out.update(self._units(x, lengths, prev_output_tokens, out.get("mt_hidden"), visible, unit_visible))
        if "unit" in parts and self.vocoder is not None and not self.training:
            out.update(self._vocode(out["unit_logits"], out["unit_lengths"]))
        return out

    @staticmethod
    def _encoder_out(x: Tensor, lengths: Tensor) -> dict[str, Any]:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        encoder_out = {
            "encoder_out": [x.transpose(0, 1)],
            "encoder_padding_mask": [padding] if bool(padding.any()) else [],
            "encoder_embedding": [],
            "encoder_states": [],
            "src_tokens": [],
            "src_lengths": [],
        }
        return {"encoder_out": encoder_out, "encoder_lengths": lengths}

    def _units(
        self, x: Tensor, lengths: Tensor, prev: Tensor | None, hidden: Tensor | None, visible: Tensor | None,
        unit_visible: Tensor | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        out: dict[str, Tensor] = {}
        inputs, input_lengths = x, lengths
        tokens = None
        if self.config.units_read_text:
            unit_visible = visible if unit_visible is None else unit_visible
            if prev is not None:
                inputs, input_lengths, tokens = written_inputs(prev, hidden)
            elif self.training:
                raise EchoStreamError(
                    f"unit_decoder_input is {self.config.unit_decoder_input!r}: training needs prev_output_tokens, "
                    "the target sentences shifted right"
                )
            else:
                tokens, inputs, input_lengths = self.mt_decoder.greedy(x, lengths)
                out["mt_tokens"], out["mt_hidden"] = tokens, inputs
        out["unit_logits"] = self.unit_decoder(inputs, input_lengths, x, lengths, unit_visible, tokens)
        out["unit_lengths"] = input_lengths * self.config.ctc_upsample_ratio
        return out

    @torch.no_grad()
    def _vocode(self, unit_logits: Tensor, unit_lengths: Tensor) -> dict[str, Tensor]:
        units, counts, _ = greedy_units(unit_logits, unit_lengths)
        if units.shape[1] == 0:
            waveform, wave_lengths = unit_logits.new_zeros(len(counts), 0), counts
        else:
            waveform, wave_lengths = self.vocoder(units, counts)
        return {"units": units, "units_lengths": counts, "waveform": waveform, "waveform_lengths": wave_lengths}

    # ---- chunk by chunk ----------------------------------------------------------------------------------------

    def reset_cache(self) -> None:
        """Enter streaming, or start it anew: from now on ``forward`` takes the next chunk of each stream.

        ``train()`` leaves streaming. The first chunk sets the batch size.

        Raises:
            EchoStreamError: the model is in training mode.
        """
        if self.training:
            raise EchoStreamError("reset_cache() starts streaming, which needs eval mode: call model.eval() first")
        self._streaming, self._state = True, None

    def train(self, mode: bool = True) -> EchoStreamModel:
        """Training mode (which leaves streaming) or, with ``mode=False``, eval mode."""
        if mode:
            self._streaming, self._state = False, None
        return super().train(mode)

    def new_sentence(self) -> None:
        """In the streaming loop: the units of the frames to come belong to a new sentence (encoder and ST go on)."""
        if self._state is not None and self._state.units:
            units = (self._state.units[0].restart(),)
            last = torch.full_like(self._state.last_unit, BLANK)
            self._state = dataclasses.replace(self._state, units=units, last_unit=last)

    @torch.no_grad()
    def _stream(self, chunk: Tensor, lengths: Tensor, finished: bool | Tensor) -> dict[str, Any]:
        if self._state is None:
            self._state = self.init_state(chunk.shape[0])
        if self._state.batch_size != chunk.shape[0]:
            raise EchoStreamError(
                f"this chunk has {chunk.shape[0]} rows, the stream has {self._state.batch_size}; "
                "call reset_cache() to start anew"
            )
        if isinstance(finished, bool):
            finished = torch.full((chunk.shape[0],), finished, device=chunk.device)
        out, self._state = self.step(chunk, lengths, self._state, finished)
        return out

    def init_state(self, batch_size: int) -> ModelState:
        """The state of ``batch_size`` streams before their first chunk, on the model's device and in its dtype."""
        weight = self.asr_head.weight
        units: tuple[DecoderState, ...] = ()
        vocoder: tuple[State, ...] = ()
        if not self.config.units_read_text:
            units = (self.unit_decoder.init_state(batch_size),)
            if self.vocoder is not None:
                vocoder = (self.vocoder.init_state(batch_size),)
        return ModelState(
            self.encoder.init_state(batch_size, device=weight.device, dtype=weight.dtype),
            self.asr_head.init_state(batch_size),
            self.st_decoder.init_state(batch_size),
            units,
            torch.full((batch_size,), BLANK, device=weight.device),
            vocoder,
        )

    @torch.no_grad()
    def step(
        self, chunk: Tensor, lengths: Tensor, state: ModelState, finished: Tensor | None = None
    ) -> tuple[dict[str, Any], ModelState]:
        """The next features of each stream, any number of them; the state given stays as it was.

        A unit decoder that reads encoder frames runs along: segment by segment, so that its output is the same
        however the features were cut, each position seeing the frames up to its own segment's end. A sentence that
        fills its buffers (``max_sentence_frames``) ends there and the next frame starts a new one. A unit decoder that
        reads MT states has to wait for a policy to write text: ``echostream.streaming`` does that.

        Args:
            chunk: features [B, T, 80] (10 ms each), of row b the first ``lengths[b]``.
            finished: [B] bool, rows that end with this chunk: all they still hold comes out, and they start anew.

        Returns:
            What this chunk brought: ``encoder_out`` with N new frames ([N, B, D]), ``encoder_lengths`` [B],
            ``asr_logits`` and ``st_logits`` [B, N, vocab]; in ``encoder`` mode ``unit_logits`` [B, N·ratio, units + 4],
            ``unit_lengths`` [B], and with a vocoder ``units``, ``units_lengths``, ``waveform``, ``waveform_lengths``.
            Then the new state.
        """
        x, counts, encoder = self.encoder.step(chunk, lengths, state.encoder, finished)
        out = self._encoder_out(x, counts)
        out["asr_logits"], _, asr = self.asr_head.step(x, counts, state.asr)
        out["st_logits"], _, st = self.st_decoder.step(x, counts, state.st)
        last, units, vocoder = state.last_unit, state.units, state.vocoder
        if units:
            out["unit_logits"], out["unit_lengths"], unit_state = self._step_units(x, counts, units[0])
            units = (unit_state,)
            new_units, new_counts, last = greedy_units(out["unit_logits"], out["unit_lengths"], state.last_unit)
            if vocoder:
                waveform, wave_lengths, vocoder_state = self.vocoder.step(new_units, new_counts, vocoder[0], finished)
                vocoder = (vocoder_state,)
                out.update(units=new_units, units_lengths=new_counts, waveform=waveform, waveform_lengths=wave_lengths)
        if finished is not None:  # the encoder and the vocoder start finished rows anew by themselves
            asr, st = asr.restart(finished), st.restart(finished)
            units = tuple(part.restart(finished) for part in units)
            last = last.masked_fill(finished, BLANK)
        return out, ModelState(encoder, asr, st, units, last, vocoder)

    def _step_units(self, x: Tensor, counts: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, DecoderState]:
        segment, limit = self.config.segment_length, self.config.max_sentence_frames
        outputs = []
        state = state.map(torch.clone) if x.shape[1] else state
        for start in range(0, x.shape[1], segment):
            part = x[:, start : start + segment]
            lengths = (counts - start).clamp(0, part.shape[1])
            state = state.restart(state.frames + lengths > limit)
            state = self.unit_decoder.extend(part, lengths, state, in_place=True)
            logits, _, state = self.unit_decoder.step(part, lengths, state, in_place=True)
            outputs.append(logits)
        ratio = self.config.ctc_upsample_ratio
        if not outputs:
            return x.new_zeros(x.shape[0], 0, self.config.num_units + NUM_SPECIALS), counts * ratio, state
        return torch.cat(outputs, dim=1), counts * ratio, state

    # ---- weights -----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any) -> Any:
        """Load weights; an attached vocoder keeps its own where ``state_dict`` brings none.

        Raises:
            CheckpointError: the weights are of other vocabulary sizes, widths or parts than this model.
        """
        state_dict = dict(state_dict)
        own = self.state_dict()
        check_weights(own, state_dict, strict)
        if strict and not any(name.startswith("vocoder.") for name in state_dict):
            state_dict.update({name: value for name, value in own.items() if name.startswith("vocoder.")})
        return super().load_state_dict(state_dict, strict=strict, **kwargs)


def written_inputs(prev: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a unit decoder that reads text is given of ``prev_output_tokens`` [S, U] and the MT decoder's states for
    them [S, U, D]: the states, how many there are of each sentence [S], and the tokens written from them [S, U]."""
    return hidden, (prev != PAD).sum(1), next_tokens(prev)


def next_tokens(prev: Tensor) -> Tensor:
    """The tokens [S, U] that follow each of ``prev_output_tokens`` [S, U]: ``</s>`` last, padding behind."""
    following = F.pad(prev[:, 1:], (0, 1), value=PAD)
    return following.masked_fill((prev != PAD) & (following == PAD), EOS)


def check_weights(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], strict: bool = True) -> None:
    """Compare names and shapes of a model's weights with those of a checkpoint.

    Raises:
        CheckpointError: they differ. One line: a vocabulary's component and both sizes, or the first weight that
            does not fit.
    """
    for name, (component, dictionary) in _VOCABULARY_WEIGHTS.items():
        if name in own and name in loaded and len(own[name]) != len(loaded[name]):
            raise CheckpointError(
                f"{component}: the checkpoint was trained with {len(loaded[name])} symbols, the {dictionary} "
                f"has {len(own[name])}; use the dictionaries the checkpoint was trained with"
            )
    for name, value in own.items():
        if name in loaded and value.shape != loaded[name].shape:
            raise CheckpointError(
                f"{name} is {list(loaded[name].shape)} in the checkpoint, {list(value.shape)} in this configuration; "
                "use the configuration the checkpoint was trained with"
            )
    if strict:
        missing = [name for name in own if name not in loaded and not name.startswith("vocoder.")]
        surplus = [name for name in loaded if name not in own]
        for names, text in ((missing, "lacks"), (surplus, "has, unlike this configuration,")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise CheckpointError(f"the checkpoint {text} {names[0]}{more}; use the configuration it was made with")


def build_echostream_model(cfg: EchoStreamConfig, vocoder: CodeHiFiGAN | None = None) -> EchoStreamModel:
    """A model with freshly initialised weights; with ``vocoder`` attached it gives out waveforms too."""
    return EchoStreamModel(cfg, vocoder)
