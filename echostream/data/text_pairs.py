"""Parallel text, with target units where there are any, for training the decoders without speech.

Letters in shapes: B sentences of a batch, N source subwords, U MT target tokens, V units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echostream.data.collate import collate_targets, pad, pad_units
from echostream.data.config import DataConfig
from echostream.data.dataset import BucketedDataset
from echostream.data.manifest import read_text_pairs
from echostream.errors import ManifestError


@dataclass(frozen=True)
class _Pair:
    source: list[int]
    target: list[int]
    units: np.ndarray  # empty when the sentence has none


class TextPairDataset(BucketedDataset):
    """Sentence pairs of a manifest. Those with units and those without never share a batch.

    Args:
        manifest: a table with the columns ``src_text tgt_text tgt_audio``; ``tgt_audio`` may be empty.
        config: the data directory's files.

    Raises:
        ManifestError: a row cannot be used, or a unit is beyond the unit dictionary.
    """

    def __init__(self, manifest: str | Path, config: DataConfig):
        self.pairs: list[_Pair] = []
        self.utterances = read_text_pairs(manifest)  # as the speech dataset's, for what fairseq-generate writes
        for number, row in enumerate(self.utterances, 2):
            pair = _Pair(config.source.encode(row.src_text), config.target.encode(row.tgt_text), row.units)
            if not pair.source or not pair.target:
                raise ManifestError(f"manifest {manifest}, line {number}: no subwords in its source or target text")
            if len(pair.units) and pair.units.max() >= config.num_units:
                raise ManifestError(
                    f"manifest {manifest}, line {number}: unit {pair.units.max()}, but num_units is {config.num_units}"
                )
            self.pairs.append(pair)
        self.has_units = np.array([len(pair.units) > 0 for pair in self.pairs])
        # What a sentence costs: its source, the MT decoder's positions and the unit decoder's.
        self.sizes = np.array([len(p.source) + len(p.target) + 1 + len(p.units) for p in self.pairs], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.pairs)

    def size(self, index: int) -> tuple[int, int]:
        """(source subwords, MT target tokens with the end symbol)."""
        return len(self.pairs[index].source), len(self.pairs[index].target) + 1

    def filter_indices_by_size(
        self, indices: np.ndarray, max_sizes: Sequence[float | None] | None
    ) -> tuple[np.ndarray, list[int]]:
        """Part ``indices`` into those whose target fits ``max_sizes[1]`` tokens and the others."""
        limit = max_sizes[1] if isinstance(max_sizes, (tuple, list)) else None
        return super().filter_indices_by_size(indices, (None, limit))

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
    ) -> list[np.ndarray]:
        """Batches of neighbouring ``indices``; sentences with units and those without apart."""
        batches: list[np.ndarray] = []
        for group in (indices[self.has_units[indices]], indices[~self.has_units[indices]]):
            if len(group):
                batches += super().batch_by_size(group, max_tokens, max_sentences)
        return batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        return {"id": index, "source": pair.source, "target": pair.target, "units": pair.units}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch in the speech dataset's form: ``src_tokens`` are subwords [B, N]; ``units`` is None without units."""
        if not samples:
            return {}
        source, lengths = pad([s["source"] for s in samples])
        previous, targets = collate_targets([s["target"] for s in samples])
        text, text_lengths = pad([s["target"] for s in samples])
        units = unit_lengths = None
        if all(len(s["units"]) for s in samples):
            units, unit_lengths = pad_units([s["units"] for s in samples])
        return {
            "id": torch.tensor([s["id"] for s in samples]),
            "net_input": {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": previous},
            **targets,
            "src_text": source,
            "src_text_lengths": lengths,
            "tgt_text": text,
            "tgt_text_lengths": text_lengths,
            "units": units,
            "unit_lengths": unit_lengths,
            "windows": None,
            "sentence_row": torch.arange(len(samples)),
        }
