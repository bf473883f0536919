"""The autoregressive text decoder (MT): the refined translation, one subword at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.config import EchoStreamConfig
from echostream.constants import BOS, EOS, PAD
from echostream.models.decoders.decoder_base import DecoderState, TransformerDecoder
from echostream.models.decoders.layers import AttentionProbe, init_linear


class MTDecoder(TransformerDecoder):
    """Transformer decoder over target subwords, in Vaswani et al.'s (2017) or Whisper's form (``mt_decoder_form``).

    A sentence starts with ``</s>``, as fairseq has it, at position 0, behind a learnt prompt of keys and values
    (``mt_decoder_prompt``), which says as Whisper's does what is asked: to translate, from which language. Embedding
    and output layer are separate; in Whisper's form they are one matrix, and positions are learnt.
    """

    def __init__(self, cfg: EchoStreamConfig):
        dim = cfg.mt_decoder_embed_dim
        super().__init__(
            dim,
            cfg.encoder_embed_dim,
            cfg.mt_decoder_heads,
            cfg.mt_decoder_ffn_dim,
            cfg.mt_decoder_layers,
            cfg.dropout,
            cfg.attention_dropout,
            cfg.activation_dropout,
            max_positions=cfg.max_target_tokens,
            max_frames=cfg.max_sentence_frames,
            position_limit="max_target_tokens",
            form=cfg.mt_decoder_form,
            prompt=cfg.mt_decoder_prompt,
        )
        self.embedding = nn.Embedding(cfg.mt_vocab_size, dim, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        nn.init.zeros_(self.embedding.weight[PAD])
        self.output: nn.Linear | None = None
        self.positions: nn.Parameter | None = None
        if cfg.mt_decoder_form == "whisper":
            self.positions = nn.Parameter(torch.randn(cfg.max_target_tokens, dim) * dim**-0.5)
        else:
            self.output = init_linear(nn.Linear(dim, cfg.mt_vocab_size))

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, U] -> embeddings [B, U, D], scaled where Vaswani et al. scale them, without positions."""
        x = self.embedding(tokens)
        return x * math.sqrt(self.dim) if self.positions is None else x

    def position_vectors(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Positions of any shape [...] -> [..., D]; those beyond the last learnt one, which are padding, get its."""
        if self.positions is None:
            return super().position_vectors(positions, dtype)
        return F.embedding(positions.clamp(max=len(self.positions) - 1), self.positions).to(dtype)

    def scores(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> unnormalised scores [..., vocab] of the next token."""
        return F.linear(hidden, self.embedding.weight) if self.output is None else self.output(hidden)

    def forward(
        self, prev_output_tokens: Tensor, encoder_out: Tensor, encoder_lengths: Tensor, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced pass over whole sentences.

        Args:
            prev_output_tokens: [B, U], ``</s>`` first, padding behind.
            encoder_out: [B, T, encoder_embed_dim]; encoder_lengths: [B].
            visible: [B, U], g(i): the encoder frames position i may attend. Default: all of the row's. With the g of a
                streamed sentence the scores are those that were computed while streaming. 0 attends nothing.

        Returns:
            scores [B, U, vocab] of the token after each position, and the hidden states [B, U, D] they come from.
        """
        hidden = self.run(self.embed(prev_output_tokens), encoder_out, encoder_lengths, visible)
        return self.scores(hidden), hidden

    def step(
        self,
        tokens: Tensor,
        active: Tensor | None,
        state: DecoderState,
        in_place: bool = False,
        probe: AttentionProbe | None = None,
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """The next position (or several) of each sentence; it sees every frame given to ``extend`` so far.

        Args:
            tokens: [B, N], ``</s>`` at position 0; N is 1 unless a known prefix is fed at once.
            active: [B] bool, which rows take part (default: all); or [B] long, how many tokens each row brings.
            probe: is told where its layer looked.

        Returns:
            scores [B, N, vocab], hidden [B, N, D] and the new state. What stands at inactive places means nothing.

        Raises:
            EchoStreamError: a sentence is longer than ``max_target_tokens``.
        """
        count = tokens.shape[1]
        if active is None:
            lengths = torch.full_like(state.positions, count)
        else:
            lengths = active.long() * count if active.dtype == torch.bool else active
        hidden, state = self.advance(self.embed(tokens), lengths, state, in_place, probe)
        return self.scores(hidden), hidden, state

    @torch.no_grad()
    def greedy(
        self, encoder_out: Tensor, encoder_lengths: Tensor, max_tokens: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Whole sentences, the best token at every position, until ``</s>`` or ``max_tokens`` (max_target_tokens).

        Returns:
            tokens [B, U] (``</s>`` included, padding behind), the states [B, U, D] that predicted them, lengths [B].
        """
        limit = min(max_tokens or self.max_positions, self.max_positions)
        rows = encoder_out.shape[0]
        state = self.init_state(rows, dtype=encoder_out.dtype, max_frames=max(1, encoder_out.shape[1]))
        state = self.extend(encoder_out, encoder_lengths, state, in_place=True)
        token = torch.full((rows, 1), EOS, device=encoder_out.device)
        active = torch.ones(rows, dtype=torch.bool, device=encoder_out.device)
        tokens: list[Tensor] = []
        hiddens: list[Tensor] = []
        while len(tokens) < limit and bool(active.any()):
            logits, hidden, state = self.step(token, active, state, in_place=True)
            logits[..., [BOS, PAD]] = -math.inf
            token = logits.argmax(-1).masked_fill(~active[:, None], PAD)
            tokens.append(token)
            hiddens.append(hidden)
            active = active & (token[:, 0] != EOS)
        out = torch.cat(tokens, dim=1)
        return out, torch.cat(hiddens, dim=1), (out != PAD).sum(1)
