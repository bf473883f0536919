"""CTC heads (Graves et al., 2006) of the source and of the target text, with their causal layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from echostream.config import EchoStreamConfig
from echostream.models.decoders.layers import CausalLayer, KeyValues, init_linear
from echostream.models.state import State


class CTCHead(nn.Module):
    """One Linear from hidden frames to dictionary symbols; blank is ``<s>`` (index 0)."""

    def __init__(self, dim: int, vocab: int):
        super().__init__()
        self.output = init_linear(nn.Linear(dim, vocab))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> unnormalised scores [B, T, vocab]."""
        return self.output(x)


@dataclass(frozen=True)
class CausalState(State):
    """The last ``st_left_context - 1`` frames of every layer, right-aligned, and how many of them are real."""

    layers: tuple[KeyValues, ...]  # [B, st_left_context - 1, D] each
    seen: Tensor  # [B] long, at most st_left_context - 1

    def restart(self, rows: Tensor) -> CausalState:
        """``rows`` [B] bool as before their first frame."""
        return CausalState(self.layers, self.seen.masked_fill(rows, 0))


class CausalDecoder(nn.Module):
    """Windowed causal transformer layers with a CTC head; base of the two.

    A layer's frame sees itself and the ``st_left_context - 1`` frames before it. There are no absolute positions, so
    that the stream may go on for ever at constant cost.

    Args:
        cfg: ``st_decoder_*`` say the shape of the layers.
        layers: how many.
        dim: their width.
    """

    def __init__(self, cfg: EchoStreamConfig, layers: int, dim: int):
        super().__init__()
        self.window = cfg.st_left_context
        narrow = dim != cfg.encoder_embed_dim
        self.input = init_linear(nn.Linear(cfg.encoder_embed_dim, dim)) if narrow else None
        self.layers = nn.ModuleList(
            CausalLayer(
                dim,
                cfg.st_decoder_heads,
                cfg.st_decoder_ffn_dim or cfg.encoder_ffn_embed_dim,
                cfg.st_left_context,
                cfg.dropout,
                cfg.attention_dropout,
                cfg.activation_dropout,
            )
            for _ in range(layers)
        )

    def classify(self, x: Tensor) -> Tensor:
        """What the last layer gives [B, T, D] -> scores [B, T, vocab]."""
        raise NotImplementedError

    def between(self, i: int, x: Tensor, said: list[Tensor] | None = None) -> Tensor:
        """What layer ``i`` gives [B, T, D] -> what the next one reads; ``said`` gets the scores that are fed back."""
        return x

    @property
    def weight(self) -> Tensor:
        """Of the output: tells device and dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor, lengths: Tensor | None = None, said: list[Tensor] | None = None) -> Tensor:
        """Encoder frames x [B, T, D] -> scores [B, T, vocab].

        ``lengths`` [B] need not be given: padding behind a row is never seen by its frames. ``said``: see ``between``.
        """
        x = self.enter(x)
        for i, layer in enumerate(self.layers):
            x = self.between(i, layer(x), said)
        return self.classify(x)

    def enter(self, x: Tensor) -> Tensor:
        """Encoder frames [B, T, D] in the layers' width."""
        return x if self.input is None else self.input(x)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CausalState:
        """The state before the first frame."""
        like = self.weight[0].detach().to(device=device, dtype=dtype)
        caches = tuple(KeyValues.empty(batch_size, self.window - 1, like) for _ in self.layers)
        return CausalState(caches, torch.zeros(batch_size, dtype=torch.long, device=like.device))

    def step(self, x: Tensor, lengths: Tensor, state: CausalState) -> tuple[Tensor, Tensor, CausalState]:
        """New frames x [B, N, D], of row b the first ``lengths[b]`` -> (scores [B, N, vocab], lengths, state)."""
        outputs = []
        x = self.enter(x)
        # Long pushes go window by window, which keeps the cost linear in N.
        for start in range(0, x.shape[1], self.window):
            part = x[:, start : start + self.window]
            y, state = self._step(part, (lengths - start).clamp(0, part.shape[1]), state)
            outputs.append(y)
        hidden = torch.cat(outputs, dim=1) if outputs else x
        return self.classify(hidden), lengths, state

    def _step(self, x: Tensor, lengths: Tensor, state: CausalState) -> tuple[Tensor, CausalState]:
        cached, new = self.window - 1, x.shape[1]
        key = torch.arange(cached + new, device=x.device)
        query = torch.arange(new, device=x.device)[:, None]
        band = (key >= query) & (key <= query + cached)
        # A padding query may have no real key at all; the key at its own place keeps it finite.
        mask = (band & (key >= cached - state.seen[:, None, None]))[:, None]
        caches = []
        for i, (layer, cache) in enumerate(zip(self.layers, state.layers)):
            x, cache = layer.step(x, lengths, cache, mask)
            x = self.between(i, x)
            caches.append(cache)
        return x, CausalState(tuple(caches), (state.seen + lengths).clamp(max=cached))


class ASRHead(CausalDecoder):
    """Source text: ``asr_decoder_layers`` causal layers, by default none, and one Linear.

    CTC takes what it predicts of one frame to be independent of the others' predictions, so that a word may be begun
    twice, once for each way to cut it into pieces. With ``asr_condition_every`` the prediction so far is added to what
    the layers above read, who see that of all earlier frames (self-conditioned CTC, Nozaki and Komatsu, 2021).
    """

    def __init__(self, cfg: EchoStreamConfig):
        dim = cfg.st_dim if cfg.asr_decoder_layers else cfg.encoder_embed_dim
        super().__init__(cfg, cfg.asr_decoder_layers, dim)
        self.output = init_linear(nn.Linear(dim, cfg.asr_vocab_size))
        self.every = cfg.asr_condition_every
        self.condition = init_linear(nn.Linear(cfg.asr_vocab_size, dim)) if self.every else None

    def classify(self, x: Tensor) -> Tensor:
        return self.output(x)

    def between(self, i: int, x: Tensor, said: list[Tensor] | None = None) -> Tensor:
        if self.condition is None or (i + 1) % self.every or i + 1 == len(self.layers):
            return x
        scores = self.output(x)
        if said is not None:
            said.append(scores)
        return x + self.condition(scores.softmax(dim=-1))

    def predictions(self, x: Tensor) -> list[Tensor]:
        """Scores of encoder frames x [B, T, D]: those that are fed back, then the final ones, [B, T, vocab] each."""
        said: list[Tensor] = []
        final = self(x, said=said)
        return [*said, final]

    @property
    def weight(self) -> Tensor:
        return self.output.weight


class STDecoder(CausalDecoder):
    """Preliminary translation: ``st_decoder_layers`` causal layers and a CTC head."""

    def __init__(self, cfg: EchoStreamConfig):
        super().__init__(cfg, cfg.st_decoder_layers, cfg.st_dim)
        self.head = CTCHead(cfg.st_dim, cfg.st_vocab_size)

    def classify(self, x: Tensor) -> Tensor:
        return self.head(x)

    @property
    def weight(self) -> Tensor:
        return self.head.output.weight
