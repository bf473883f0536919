"""An encoder of source text in the speech encoder's place, for training the text and unit decoders on text alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from echostream.config import EchoStreamConfig
from echostream.constants import NUM_SPECIALS, PAD, UNK
from echostream.models.decoders.layers import sinusoidal_positions

LAYERS = 3


class TextEncoder(nn.Module):
    """Bidirectional transformer encoder over source subwords (Vaswani et al., 2017), thrown away after the training.

    Parallel text is plentiful where parallel speech is not: the decoders that learnt to translate and to pronounce from
    it start the training on speech from there (``--decoder-init``). In training a share of the subwords is replaced by
    random ones or by ``<unk>``, for what the decoders will read later comes from speech that was not always understood.

    Args:
        cfg: the model's configuration; widths are the speech encoder's.
        noise: share of the subwords that are replaced in training.
    """

    def __init__(self, cfg: EchoStreamConfig, noise: float = 0.1):
        super().__init__()
        self.dim, self.vocabulary, self.noise = cfg.encoder_embed_dim, cfg.asr_vocab_size, noise
        self.embedding = nn.Embedding(self.vocabulary, self.dim, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=self.dim**-0.5)
        nn.init.zeros_(self.embedding.weight[PAD])
        self.dropout = nn.Dropout(cfg.dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.dim, cfg.encoder_attention_heads, cfg.encoder_ffn_embed_dim, cfg.dropout, batch_first=True
            )
            for _ in range(LAYERS)
        )

    def forward(self, src_tokens: Tensor, src_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Source subwords [B, N] (``<pad>`` behind), lengths [B] -> states [B, N, encoder_embed_dim], lengths."""
        padding = torch.arange(src_tokens.shape[1], device=src_tokens.device) >= src_lengths[:, None]
        if self.training and self.noise:
            draw = torch.rand(src_tokens.shape, device=src_tokens.device)
            other = torch.randint_like(src_tokens, NUM_SPECIALS, self.vocabulary)
            src_tokens = torch.where(draw < self.noise, other, src_tokens)
            src_tokens = src_tokens.masked_fill(draw < self.noise / 2, UNK)
        positions = torch.arange(src_tokens.shape[1], device=src_tokens.device)
        x = self.embedding(src_tokens) * math.sqrt(self.dim)
        x = self.dropout(x + sinusoidal_positions(positions, self.dim, x.dtype))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x, src_lengths
