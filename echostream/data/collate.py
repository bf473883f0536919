"""Items of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echostream.constants import EOS, FRAME_LENGTH, FRAME_SHIFT, NUM_SPECIALS, PAD
from echostream.data.augment import fit_length
from echostream.data.joining import EXTRA_HOPS, Item


def pad(sequences: Sequence[Sequence[int] | np.ndarray]) -> tuple[Tensor, Tensor]:
    """Sequences of indices as one tensor [N, longest], filled with ``<pad>``, and their lengths [N]."""
    lengths = torch.tensor([len(s) for s in sequences])
    out = torch.full((len(sequences), int(lengths.max())), PAD, dtype=torch.long)
    for row, sequence in zip(out, sequences):
        row[: len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
    return out, lengths


def pad_units(units: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Unit numbers as dictionary indices, padded [N, longest], and their lengths [N]."""
    return pad([row.astype(np.int64) + NUM_SPECIALS for row in units])


def collate_targets(sentences: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, Any]]:
    """The MT decoder's side of a batch: ``prev_output_tokens`` [S, U]; ``target`` and what counts it (see collater)."""
    target, lengths = pad([[*tokens, EOS] for tokens in sentences])
    previous, _ = pad([[EOS, *tokens] for tokens in sentences])
    return previous, {
        "target": target,
        "target_lengths": lengths,
        "ntokens": int(lengths.sum()),
        "nsentences": len(sentences),
    }


def join_parts(item: Item, parts: list[np.ndarray]) -> np.ndarray:
    """The recordings of an item with its pauses, of such length that they give its frames."""
    if len(parts) > 1:
        joined = []
        for i, (part, length) in enumerate(zip(parts, item.lengths)):
            joined.append(fit_length(part, (length + EXTRA_HOPS) * FRAME_SHIFT))
            if i < len(item.pauses):
                joined.append(np.zeros(item.pauses[i] * FRAME_SHIFT, dtype=np.float32))
        return np.concatenate(joined)
    samples = fit_length(parts[0], max(len(parts[0]), FRAME_LENGTH))
    found = 1 + (len(samples) - FRAME_LENGTH) // FRAME_SHIFT
    if found != item.n_frames:
        samples = fit_length(samples, FRAME_LENGTH + FRAME_SHIFT * (item.n_frames - 1))
    return samples


def pad_features(items: Sequence[np.ndarray]) -> Tensor:
    """[T, 80] each -> [B, T, 80], zero behind."""
    out = torch.zeros(len(items), max(map(len, items)), items[0].shape[1])
    for row, features in zip(out, items):
        row[: len(features)] = torch.from_numpy(features)
    return out


def extend(features: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([features, np.repeat(features[-1:], length - len(features), axis=0)])
