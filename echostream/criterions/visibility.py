"""What the MT decoder may attend in training so that it learns to translate speech not yet finished.

After StreamSpeech (Zhang et al., 2024, section 3.4): target token i is written once the ST CTC has brought forth i + 1
tokens, so that in training its cross-attention ends at the chunk in which the *expected* number of tokens gets there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from echostream.constants import BLANK, SUBSAMPLING
from echostream.models.echostream_model import SentenceWindows

# Encoder frames (40 ms) in a decision chunk: 160 ms to 1.28 s, and whole sentences.
CHUNKS = (4, 8, 16, 24, 32, None)


def draw_chunk() -> int | None:
    """A chunk size for one batch, from torch's generator (which fairseq seeds anew at every update)."""
    return CHUNKS[int(torch.randint(len(CHUNKS), ()))]


def expected_counts(st_logits: Tensor, lengths: Tensor) -> Tensor:
    """Expected number of CTC tokens up to and with each frame.

    A frame adds a token where its symbol is neither blank nor the one before it: with independent frames, probability
    1 - p_t(blank) - sum over v of p_t(v) p_{t-1}(v).

    Args:
        st_logits: [B, T, V]; lengths: [B].

    Returns:
        float [B, T], non-decreasing.
    """
    probs = st_logits.detach().float().softmax(-1)
    speech = probs.clone()
    speech[..., BLANK] = 0.0
    repeated = torch.zeros_like(speech[..., 0])
    repeated[:, 1:] = (speech[:, 1:] * speech[:, :-1]).sum(-1)
    new = (speech.sum(-1) - repeated).clamp(min=0.0)
    frames = torch.arange(new.shape[1], device=new.device)
    return (new * (frames < lengths[:, None])).cumsum(1)


def heard_when_due(
    st_logits: Tensor, sample: dict[str, Any], windows: SentenceWindows | None, chunk: int | None
) -> Tensor | None:
    """g(i): the encoder frames of its sentence that target position i may attend.

    Counts are scaled to reach each sentence's true length at its end, so that g is sensible from the first update on,
    when the ST CTC knows nothing yet. The end symbol and whatever else is due only at the end see everything.

    Args:
        st_logits: [B, T, V]. sample: a batch of ``SpeechToSpeechDataset``. windows: its sentences, or None.
        chunk: g is rounded up to a multiple of so many frames; None lets everything be seen.

    Returns:
        [S, U] long, or None for everything.
    """
    if chunk is None:
        return None
    lengths = -(-sample["net_input"]["src_lengths"] // SUBSAMPLING)
    counts = expected_counts(st_logits, lengths)[..., None]
    if windows is not None:
        before = counts[windows.row, (windows.start - 1).clamp(min=0)] * (windows.start > 0)[:, None]
        counts, lengths = windows.gather(counts, lengths)
        counts = counts - before[:, None]
    counts = counts[..., 0]
    tokens = sample["target_lengths"] - 1  # without the end symbol
    total = counts.gather(1, (lengths - 1).clamp(min=0)[:, None]).clamp(min=1e-6)
    counts = counts * (tokens[:, None] / total)
    frames = torch.arange(counts.shape[1], device=counts.device)
    counts = counts.masked_fill(frames >= lengths[:, None], float("inf")).cummax(1).values
    due = torch.arange(1, sample["target"].shape[1] + 1, device=counts.device, dtype=counts.dtype)
    due = (due - 1e-3).expand(len(counts), -1).contiguous()  # the last count equals the last number only up to rounding
    first = torch.searchsorted(counts.contiguous(), due)  # frame in which the count reaches the token's number
    seen = -(-(first + 1) // chunk) * chunk
    return torch.minimum(seen, lengths[:, None])
