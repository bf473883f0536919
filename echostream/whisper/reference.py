"""Whisper itself (Radford et al., 2022), full context, in torch: the teacher, and what our own modules are held to.

Letters in shapes: B recordings, M mel bands, F feature frames (10 ms), T encoder frames (20 ms), U tokens, D width,
V tokens of the vocabulary. Modules bear OpenAI's names, so that ``WhisperWeights.parameters`` is the state dict.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.constants import SAMPLE_RATE, WHISPER_SILENCE
from echostream.errors import EchoStreamError
from echostream.models.attention import attention
from echostream.units.features import whisper_log_mel, whisper_mel_filters
from echostream.whisper.weights import WhisperDims, WhisperWeights, read_whisper

WINDOW = 30 * SAMPLE_RATE  # samples; Whisper knows speech with silence up to there, and errs on shorter input


def log_mel(samples: np.ndarray, n_mels: int = 80, length: int = WINDOW) -> np.ndarray:
    """Features of a recording, float [N] at 16 kHz, cut or filled with silence to ``length`` samples.

    Returns:
        float32 [M, length // 160]; 30 s for the window that Whisper is used to.
    """
    return whisper_log_mel(samples, length, _filters(n_mels))


@lru_cache(maxsize=2)
def _filters(n_mels: int) -> np.ndarray:
    return whisper_mel_filters(n_mels)


class Attention(nn.Module):
    """Multi-head attention; keys have no bias."""

    def __init__(self, dim: int, heads: int, memory_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(memory_dim or dim, dim, bias=False)
        self.value = nn.Linear(memory_dim or dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x [B, U, D] over memory [B, T, D']; mask as for ``attention``."""
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.query(x), self.key(memory), self.value(memory))
        )
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return self.out(attention(q, k, v, mask, causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm layer: self-attention, attention over the encoder (in the decoder), feed-forward with GELU."""

    def __init__(self, dim: int, heads: int, memory_dim: int | None = None):
        super().__init__()
        self.attn_ln, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.cross_attn = None
        if memory_dim is not None:
            self.cross_attn_ln, self.cross_attn = nn.LayerNorm(dim), Attention(dim, heads, memory_dim)
        self.mlp_ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        y = self.attn_ln(x)
        x = x + self.attn(y, y, mask if memory is None else None, causal)
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), memory, mask)
        return x + self.mlp(self.mlp_ln(x))


class AudioEncoder(nn.Module):
    """Two convolutions, positions, layers."""

    def __init__(self, dims: WhisperDims):
        super().__init__()
        dim = dims.n_audio_state
        self.conv1 = nn.Conv1d(dims.n_mels, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.positional_embedding: Tensor
        self.register_buffer("positional_embedding", torch.zeros(dims.n_audio_ctx, dim))
        self.blocks = nn.ModuleList(Block(dim, dims.n_audio_head) for _ in range(dims.n_audio_layer))
        self.ln_post = nn.LayerNorm(dim)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, M, F] -> [B, T, D] with T = ceil(F / 2)."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        return self._attend(x + self.positional_embedding[: x.shape[1]], None)

    def padded(self, mel: Tensor, lengths: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """See ``WhisperReference.encode_padded``."""
        _batch, bins, size = mel.shape
        dense = -(-lengths // 2)[:, None]
        inside = (torch.arange(size, device=mel.device) < lengths[:, None])[:, None]
        if stride:
            mel = F.pad(torch.where(inside, mel, WHISPER_SILENCE), (0, 4), value=WHISPER_SILENCE)
            x = F.gelu(self.conv2(F.gelu(self.conv1(mel))))
            quiet = F.gelu(self.conv2(F.gelu(self.conv1(mel.new_full((1, bins, 9), WHISPER_SILENCE)))))[:, :, 2]
        else:  # the padding of a recording on its own is zero in both convolutions
            x = F.gelu(self.conv1(mel.masked_fill(~inside, 0.0))).masked_fill(~inside, 0.0)
            x, quiet = F.gelu(self.conv2(x)), x.new_zeros(1, x.shape[1])
        context, most = len(self.positional_embedding), int(dense.max())
        slots = torch.arange(most + (-(-(context - most) // stride) if stride else 0), device=mel.device)
        far = (slots - dense).clamp(min=0)
        first = torch.where(slots < dense, slots, dense + far * stride)
        width = torch.where(slots < dense, 1, (context - first).clamp(0, stride))
        x = F.pad(x.transpose(1, 2)[:, :most], (0, 0, 0, len(slots) - most))
        x = torch.where((slots < dense)[:, :, None], x, quiet.to(x.dtype)[:, None])
        bias = width.float().log()
        x = x + self.positional_embedding[(first + width // 2).clamp(max=context - 1)]
        return self._attend(x, bias), bias

    def _attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        mask = None if bias is None else bias[:, None, None]
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.ln_post(x)


class TextDecoder(nn.Module):
    """Embeddings that are the output layer too, learnt positions, layers."""

    def __init__(self, dims: WhisperDims):
        super().__init__()
        dim = dims.n_text_state
        self.token_embedding = nn.Embedding(dims.n_vocab, dim)
        self.positional_embedding = nn.Parameter(torch.zeros(dims.n_text_ctx, dim))
        self.blocks = nn.ModuleList(Block(dim, dims.n_text_head, dims.n_audio_state) for _ in range(dims.n_text_layer))
        self.ln = nn.LayerNorm(dim)

    def forward(
        self, tokens: Tensor, encoded: Tensor, mask: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, U] -> logits [B, U, V], or of ``chosen`` tokens [N] alone; mask [B, T] as in ``decode``."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        if mask is not None:
            mask = mask[:, None, None]
        for block in self.blocks:
            x = block(x, encoded, mask, causal=True)
        table = self.token_embedding.weight
        return F.linear(self.ln(x), table if chosen is None else table[chosen])


class WhisperReference(nn.Module):
    """Whisper with given weights, in eval mode, nothing of it trained."""

    def __init__(self, dims: WhisperDims):
        super().__init__()
        self.dims = dims
        self.encoder, self.decoder = AudioEncoder(dims), TextDecoder(dims)
        self.eval().requires_grad_(False)

    @classmethod
    def from_weights(cls, weights: WhisperWeights) -> WhisperReference:
        """Without copying: the model's tensors are the arrays of ``weights``."""
        with torch.device("meta"):
            model = cls(weights.dims)
        state = {name: torch.from_numpy(array) for name, array in weights.parameters.items()}
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False)

    @classmethod
    def load(cls, source: str | Path) -> WhisperReference:
        """See ``read_whisper``."""
        return cls.from_weights(read_whisper(source))

    def encode(self, mel: Tensor) -> Tensor:
        """Features [B, M, F] (``log_mel``) -> frames [B, T, D] with T = ceil(F / 2).

        Every frame sees all others: Whisper expects 30 s, silence behind the speech included.

        Raises:
            EchoStreamError: the features are of another model, or longer than its window.
        """
        self._check(mel)
        return self.encoder(mel)

    def encode_padded(self, mel: Tensor, lengths: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Recordings of different ``lengths`` [B] (features), each behind as much silence as fills the window, cheaply.

        Frames of silence far from speech differ in little but their positions. So one in ``stride`` is computed, and
        attention scores over it are raised by the logarithm of how many it stands for, as if all had been there. With
        a stride of 0 there is no silence: a row's frames are those of its recording alone. Rows never see each other.

        Args:
            mel: [B, M, F], normalised; what stands behind a row's length is not read. The silence that is computed
                frame by frame belongs to it.

        Returns:
            (frames [B, T, D], of which the first ceil(length / 2) are the recording's, silence behind them;
            float [B, T], what to add to attention scores over them, minus infinity in the padding: a mask for
            ``decode``).

        Raises:
            EchoStreamError: the features are of another model, or longer than its window.
        """
        self._check(mel)
        return self.encoder.padded(mel, lengths, stride)

    def _check(self, mel: Tensor) -> None:
        longest = 2 * self.dims.n_audio_ctx
        if mel.dim() != 3 or mel.shape[1] != self.dims.n_mels or not 0 < mel.shape[2] <= longest:
            raise EchoStreamError(
                f"features {list(mel.shape)}: this Whisper reads [B, {self.dims.n_mels}, F] with F from 1 to {longest}"
            )

    def decode(
        self, tokens: Tensor, encoded: Tensor, mask: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """Logits of the token behind each of ``tokens``.

        Args:
            tokens: [B, U], from ``<|startoftranscript|>`` on.
            encoded: [B, T, D].
            mask: [B, T], true for the frames that count, one at least, or what to add to scores over them; None: all.
            chosen: [N], tokens whose logits are wanted; None: all.

        Returns:
            [B, U, V], or [B, U, N].

        Raises:
            EchoStreamError: there are more tokens than positions.
        """
        if not 0 < tokens.shape[1] <= self.dims.n_text_ctx:
            raise EchoStreamError(f"{tokens.shape[1]} tokens; this Whisper takes 1 to {self.dims.n_text_ctx}")
        return self.decoder(tokens, encoded, mask, chosen)
