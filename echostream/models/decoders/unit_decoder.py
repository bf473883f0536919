"""The unit decoder: discrete speech units by CTC over upsampled text or encoder states."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from echostream.config import EchoStreamConfig
from echostream.constants import BLANK, NUM_SPECIALS, PAD
from echostream.errors import EchoStreamError
from echostream.models.decoders.decoder_base import DecoderState, TransformerDecoder
from echostream.models.decoders.layers import init_linear


class UnitDecoder(TransformerDecoder):
    """CTC-upsampled transformer decoder (StreamSpeech, Zhang et al., 2024, section 3.3; post-norm).

    Every input state stands at ``ctc_upsample_ratio`` successive positions. Inputs are encoder frames
    (``unit_decoder_input: encoder``) or the MT hidden states that predicted each token, ``</s>`` included (``mt``).
    Such a state knows what was likely, not what was written: with ``mt-tokens`` an embedding of the token joins it, so
    that the speech can say what the text says even where the MT decoder was in doubt.

    The output is ``num_units + 4`` wide: unit u is symbol u + 4, blank is symbol 0.
    """

    def __init__(self, cfg: EchoStreamConfig):
        from_text = cfg.units_read_text
        inputs = cfg.max_target_tokens if from_text else cfg.max_sentence_frames
        super().__init__(
            cfg.unit_decoder_embed_dim,
            cfg.encoder_embed_dim,
            cfg.unit_decoder_heads,
            cfg.unit_decoder_ffn_dim,
            cfg.unit_decoder_layers,
            cfg.dropout,
            cfg.attention_dropout,
            cfg.activation_dropout,
            max_positions=inputs * cfg.ctc_upsample_ratio,
            max_frames=cfg.max_sentence_frames,
            position_limit="max_target_tokens" if from_text else "max_sentence_frames",
        )
        self.ratio = cfg.ctc_upsample_ratio
        input_dim = cfg.mt_decoder_embed_dim if from_text else cfg.encoder_embed_dim
        self.input = init_linear(nn.Linear(input_dim, cfg.unit_decoder_embed_dim))
        self.tokens: nn.Embedding | None = None
        if cfg.unit_decoder_input == "mt-tokens":
            # From zero: a decoder that has learnt to read states alone (``mt``) goes on as it was.
            self.tokens = nn.Embedding(cfg.mt_vocab_size, cfg.unit_decoder_embed_dim, padding_idx=PAD)
            nn.init.zeros_(self.tokens.weight)
        self.output = init_linear(nn.Linear(cfg.unit_decoder_embed_dim, cfg.num_units + NUM_SPECIALS))

    def position_vectors(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Sinusoidal positions, and where a position stands among the repetitions of its input state.

        The latter as sines and cosines of all periods that divide the ratio into whole turns (a Fourier basis of
        ``positions mod ratio``): the positions of one state differ in nothing else, and without it the decoder must
        first learn to count modulo the ratio.
        """
        vectors = super().position_vectors(positions, dtype)
        if self.ratio == 1:
            return vectors
        turns = torch.arange(1, self.ratio // 2 + 1, device=positions.device)
        angles = (positions % self.ratio)[..., None] * turns * (2 * math.pi / self.ratio)
        place = torch.cat([angles.sin(), angles.cos()], dim=-1)
        place = place.repeat_interleave(-(-self.dim // place.shape[-1]), dim=-1)[..., : self.dim]
        return vectors + place.to(dtype)

    def upsample(self, inputs: Tensor, tokens: Tensor | None) -> Tensor:
        """[B, U, input_dim] (and tokens [B, U]) -> [B, U·ratio, D], projected, without positions."""
        x = self.input(inputs)
        if self.tokens is not None:
            if tokens is None:
                raise EchoStreamError("unit_decoder_input is 'mt-tokens': the unit decoder needs the tokens, too")
            x = x + self.tokens(tokens) * math.sqrt(self.dim)
        return x.unsqueeze(2).expand(-1, -1, self.ratio, -1).flatten(1, 2)

    def forward(
        self,
        inputs: Tensor,
        input_lengths: Tensor,
        encoder_out: Tensor,
        encoder_lengths: Tensor,
        visible: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """All positions at once.

        Args:
            inputs: [B, U, input_dim]. input_lengths: [B]; padding stands behind and is never seen by real positions.
            encoder_out: [B, T, encoder_embed_dim]; encoder_lengths: [B].
            visible: [B, U], the encoder frames the positions of input state i may attend. Default: all of the row's.
            tokens: [B, U], those written from the states; read with ``mt-tokens`` alone.

        Returns:
            scores [B, U·ratio, num_units + 4], of which row b's first ``input_lengths[b]·ratio`` count.
        """
        if visible is not None:
            visible = visible.repeat_interleave(self.ratio, dim=1)
        return self.output(self.run(self.upsample(inputs, tokens), encoder_out, encoder_lengths, visible))

    def step(
        self, inputs: Tensor, lengths: Tensor, state: DecoderState, in_place: bool = False, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """New input states [B, N, input_dim], of row b the first ``lengths[b]``; they see all frames so far.

        Args:
            tokens: [B, N], as in ``forward``.

        Returns:
            scores [B, N·ratio, num_units + 4], their lengths [B], and the new state.

        Raises:
            EchoStreamError: a sentence is longer than ``max_target_tokens`` (``max_sentence_frames``) allow.
        """
        x, state = self.advance(self.upsample(inputs, tokens), lengths * self.ratio, state, in_place)
        return self.output(x), lengths * self.ratio, state


def greedy_units(logits: Tensor, lengths: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy CTC: the best symbol of every position, repeats merged, blanks and special symbols dropped.

    Args:
        logits: [B, L, num_units + 4]; lengths: [B].
        previous: [B], the last raw symbol of an earlier call, so that a repeat across calls counts once.

    Returns:
        units [B, U] (0 … num_units-1, zero behind a row's end), their number [B], and the last raw symbols [B].
    """
    best = logits.argmax(-1)
    if previous is None:
        previous = torch.full_like(lengths, BLANK)
    before = torch.cat([previous[:, None], best], dim=1)
    real = torch.arange(best.shape[1], device=best.device) < lengths[:, None]
    keep = (best != before[:, :-1]) & (best >= NUM_SPECIALS) & real
    counts = keep.sum(1)
    units = best.new_zeros(best.shape[0], int(counts.max()) if len(counts) else 0)
    rows, positions = keep.nonzero(as_tuple=True)
    units[rows, (keep.cumsum(1) - 1)[rows, positions]] = best[rows, positions] - NUM_SPECIALS
    return units, counts, before.gather(1, lengths[:, None])[:, 0]
