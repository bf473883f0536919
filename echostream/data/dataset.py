"""Speech-to-speech dataset for fairseq: a manifest read item by item, augmented and joined as an epoch's plan says.

Letters in shapes: B items of a batch, S sentences of a batch (S >= B, for joined items hold several), T feature frames,
L CTC target tokens, U MT target tokens, V units.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset

from echostream.constants import FRAME_LENGTH, FRAME_SHIFT
from echostream.data.augment import SpecAugment, add_noise, change_gain, change_speed
from echostream.data.augmentation import SpeechAugment
from echostream.data.collate import collate_targets, extend, join_parts, pad, pad_features, pad_units
from echostream.data.config import DataConfig, Subwords
from echostream.data.joining import Item, JoinPolicy, plan_epoch
from echostream.data.manifest import COLUMNS, SPEECH, Utterance, read_manifests
from echostream.data.source import is_features, load_features, load_samples
from echostream.errors import ConfigError, ManifestError

logger = logging.getLogger(__name__)

# A manifest's frame count may differ from the file's by this much (an mp3's padding); more is a mistake to be told.
FRAME_TOLERANCE = 5
# Babble is made of so many of the split's recordings, others in every epoch.
BABBLE_VOICES = 16


@dataclass(frozen=True)
class Augmentation:
    """What training does to its items; the default does nothing.

    Attributes:
        join: how to join utterances; None keeps every utterance an item of its own.
        speeds: speed factors, one drawn per utterance and epoch.
        spec_augment: masks on the features; None for none.
        gain_db: recordings are amplified or weakened by up to so many dB; 0 leaves them.
        noise_db: loudest white noise added, in dBFS; None adds none.
        speech: rooms, noise, lines and voices that make recordings resemble people's; None leaves them as they are.
            Ready features cannot be changed so.
        jitter: move the sentence windows of joined items at random.
        clean: give items the features of their recordings as they are, too, at the same speed and of the same length.
    """

    join: JoinPolicy | None = None
    speeds: tuple[float, ...] = (1.0,)
    spec_augment: SpecAugment | None = None
    gain_db: float = 0.0
    noise_db: float | None = None
    speech: SpeechAugment | None = None
    jitter: bool = True
    clean: bool = False


class BucketedDataset(FairseqDataset):
    """Base of the datasets: items of known ``sizes`` [N], batched with others of about their size."""

    sizes: np.ndarray

    def num_tokens(self, index: int) -> int:
        """What an item counts towards ``--max-tokens``."""
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices]

    def ordered_indices(self) -> np.ndarray:
        """Longest first (memory runs out at once or never), equal lengths in random order."""
        return np.lexsort((np.random.permutation(len(self)), -self.sizes))

    def filter_indices_by_size(
        self, indices: np.ndarray, max_sizes: int | float | Sequence[float | None] | None
    ) -> tuple[np.ndarray, list[int]]:
        """Part ``indices`` into those within ``max_sizes`` (source, target) and the others."""
        if max_sizes is None:
            return indices, []
        if isinstance(max_sizes, (int, float)):
            max_sizes = (max_sizes, None)
        limits = [float("inf") if limit is None else limit for limit in max_sizes]
        fits = np.array([all(n <= limit for n, limit in zip(self.size(i), limits)) for i in indices], dtype=bool)
        return indices[fits], indices[~fits].tolist()

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
    ) -> list[np.ndarray]:
        """Batches of neighbouring ``indices`` with at most ``max_tokens``, padding included.

        ``--required-batch-size-multiple`` is not heeded: fairseq's default of 8 leaves a last batch of another size
        out, in validation and generation too.
        """
        return super().batch_by_size(indices, max_tokens, max_sentences, required_batch_size_multiple=1)


class SpeechToSpeechDataset(BucketedDataset):
    """Items of one split.

    Of an utterance with several references (see ``manifest``) training draws one source and one target text anew in
    every epoch; units are those of the manifest's own target text, so that an item with another one has none. Without
    augmentation there are the manifest's own texts alone. An utterance that lacks a text, of use to a teacher of frames
    (``speech_alone``), has no tokens of it and is not joined with others that have it.

    The epoch's items are planned in ``set_epoch``, so that ``num_tokens`` is the true number of feature frames of what
    ``__getitem__`` gives, joined and speed-perturbed items included. All randomness follows from (seed, epoch, index).

    Args:
        manifests: the split's tables, one or several; no id may be in two of them.
        config: the data directory's files.
        augmentation: what to do in training; None (validation, test) gives every utterance as it is, in file order.
        seed: of all random choices.
        repeats: how often an epoch of training has the utterances of each manifest (default: once each). Of 2.3 every
            utterance comes twice, and three of ten, others in every epoch, a third time.
        speech_alone: rows may lack their texts.
        one_plan: every epoch has the items of the first one, disguised as there.

    Raises:
        ManifestError: a row cannot be used, or a unit is beyond the unit dictionary.
    """

    def __init__(
        self,
        manifests: str | Path | Sequence[str | Path],
        config: DataConfig,
        augmentation: Augmentation | None = None,
        seed: int = 1,
        repeats: Sequence[float] | None = None,
        speech_alone: bool = False,
        one_plan: bool = False,
    ):
        paths = [manifests] if isinstance(manifests, (str, Path)) else list(manifests)
        self.name = ", ".join(map(str, paths))
        tables = read_manifests(paths, SPEECH if speech_alone else COLUMNS)
        self.utterances: list[Utterance] = [row for rows in tables for row in rows]
        self.repeats = np.repeat(repeats or [1.0] * len(tables), [len(rows) for rows in tables])
        self.root = config.root
        self.extractor, self.cmvn = config.extractor, config.cmvn
        # A manifest counts Kaldi's frames; of the samples that give n of these others give so many more.
        self.further_frames = self.extractor.num_frames(FRAME_LENGTH) - 1
        self.augmentation = augmentation
        self.seed = seed
        self.one_plan = one_plan
        self.frames = np.array([u.n_frames for u in self.utterances], dtype=np.int64)
        self.fixed_speed = np.array([is_features(u.audio) for u in self.utterances])
        if self.fixed_speed.any() and self.extractor.name != "kaldi":
            raise ManifestError(
                f"manifest {self.name}: row {self.utterances[int(self.fixed_speed.argmax())].id!r} names ready "
                f"features, which are Kaldi's; features: {self.extractor.name} are made from recordings"
            )
        self.src_references = [self._encode(u, "src_text", config.source) for u in self.utterances]
        self.tgt_references = [self._encode(u, "tgt_text", config.target) for u in self.utterances]
        for u in self.utterances:
            if u.units.max(initial=-1) >= config.num_units:
                raise ManifestError(
                    f"manifest {self.name}: row {u.id!r} holds unit {u.units.max()}, "
                    f"but num_units is {config.num_units}"
                )
        # The texts of the epoch, and whether a target text is the one that has the units.
        self.src_ids = [texts[0] for texts in self.src_references]
        self.tgt_ids = [texts[0] for texts in self.tgt_references]
        self.own_target = np.ones(len(self.utterances), dtype=bool)
        self.epoch = 0
        self.items: list[Item] = []
        self._babble: list[np.ndarray] | None = None
        self.sizes = np.zeros(0, dtype=np.int64)
        self.set_epoch(1)

    def _encode(self, utterance: Utterance, column: str, subwords: Subwords) -> list[list[int]]:
        """Tokens of every text that may be drawn; a single empty list for an utterance without one."""
        texts = utterance.references(column)[: None if self.augmentation is not None else 1]
        tokens = [subwords.encode(text) for text in texts]
        if not all(tokens):
            raise ManifestError(
                f"manifest {self.name}: row {utterance.id!r} has no subwords in its source or target text"
            )
        return tokens or [[]]

    # --- the epoch's plan

    def set_epoch(self, epoch: int) -> None:
        """Plan the items of ``epoch``."""
        epoch = 1 if self.one_plan else epoch
        if epoch == self.epoch:
            return
        self.epoch = epoch
        self._babble = None
        if self.augmentation is None:
            self.items = [Item((i,), (1.0,), (int(n),)) for i, n in enumerate(self.frames)]
        else:
            rng = np.random.default_rng([self.seed, epoch])
            augmentation = self.augmentation
            self.items = []
            for group in self._groups():
                items = plan_epoch(
                    self.frames[group], self.fixed_speed[group], augmentation.speeds, augmentation.join, rng
                )
                for item in items:
                    self.items.append(replace(item, utterances=tuple(group[list(item.utterances)].tolist())))
            self._draw_references()
        self.sizes = np.array([item.n_frames + self.further_frames for item in self.items], dtype=np.int64)

    def _groups(self) -> list[np.ndarray]:
        """The epoch's utterances, some of them several times: numbers of those that have the same texts."""
        rng = np.random.default_rng([self.seed, self.epoch, 0, 0, len(self.utterances)])
        counts = np.floor(self.repeats + rng.random(len(self.repeats))).astype(np.int64)
        drawn = np.repeat(np.arange(len(counts)), counts)
        if not len(drawn):
            raise ConfigError(f"{self.name}: epoch {self.epoch} has no utterance; repeat them more often")
        has = 2 * np.array([bool(texts[0]) for texts in self.src_references])
        has = (has + np.array([bool(texts[0]) for texts in self.tgt_references]))[drawn]
        return [drawn[has == kind] for kind in np.unique(has)]

    def _draw_references(self) -> None:
        """One source and one target text for every utterance; the generator is no item's and not the plan's."""
        rng = np.random.default_rng([self.seed, self.epoch, 0, len(self.utterances)])
        draws = rng.random((len(self.utterances), 2))
        for number, (source, target) in enumerate(draws):
            sources, targets = self.src_references[number], self.tgt_references[number]
            chosen = int(target * len(targets))
            self.src_ids[number], self.tgt_ids[number] = sources[int(source * len(sources))], targets[chosen]
            self.own_target[number] = targets[chosen] == targets[0]

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        return self.augmentation is None or self.one_plan

    def __len__(self) -> int:
        return len(self.items)

    def size(self, index: int) -> tuple[int, int]:
        """(feature frames, MT target tokens of the longest sentence with its end symbol)."""
        return int(self.sizes[index]), 1 + max(len(self.tgt_ids[u]) for u in self.items[index].utterances)

    def ordered_indices(self) -> np.ndarray:
        """Longest first; equal lengths in random order when training."""
        if self.augmentation is None:
            return np.argsort(-self.sizes, kind="stable")
        return super().ordered_indices()

    # --- items

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item ``index`` of the epoch: ``source`` float32 [T, 80], normalised, and its targets, lists of indices.

        ``clean``, None unless the augmentation asks for it, is ``source`` as it would be undisguised.

        Raises:
            AudioError: a recording cannot be used; the message names its file.
            ManifestError: a recording's length contradicts the manifest.
        """
        item = self.items[index]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        augmentation = self.augmentation
        if self.fixed_speed[list(item.utterances)].any():
            features = clean = self._join_features(item)
        else:
            features, clean = self._join_samples(item, rng)
        features = self.cmvn.apply(features)
        clean = self.cmvn.apply(clean) if augmentation is not None and augmentation.clean else None
        if augmentation is not None and augmentation.spec_augment is not None:
            features = augmentation.spec_augment(features, rng)
        jitter = augmentation is not None and augmentation.jitter
        return {
            "id": index,
            "source": features,
            "clean": clean,
            "src_text": [token for u in item.utterances for token in self.src_ids[u]],
            "tgt_text": [token for u in item.utterances for token in self.tgt_ids[u]],
            "sentences": [self.tgt_ids[u] for u in item.utterances],
            "units": [self.utterances[u].units[: None if self.own_target[u] else 0] for u in item.utterances],
            "windows": item.windows(rng if jitter else None) if len(item.utterances) > 1 else None,
        }

    def _join_samples(self, item: Item, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Features of the item's recordings, joined as waveforms: float32 [n_frames, 80]; and clean, where wanted."""
        parts, plain = [], []
        for number, speed in zip(item.utterances, item.speeds):
            utterance = self.utterances[number]
            samples = load_samples(self.root, utterance.audio)
            self._check_length(utterance, 1 + (len(samples) - FRAME_LENGTH) // FRAME_SHIFT)
            plain.append(change_speed(samples, speed))
            parts.append(self._prepare(plain[-1], rng))
        samples = join_parts(item, parts)
        if self.augmentation is not None and self.augmentation.noise_db is not None:
            # Uniform in dB over 40 dB below the loudest; pauses and speech get the same, as from one microphone.
            samples = add_noise(samples, self.augmentation.noise_db - 40 * rng.random(), rng)
        if self.augmentation is not None and self.augmentation.speech is not None:
            samples = self.augmentation.speech.record(samples, rng, self._babble_voices)
        clean = None
        if self.augmentation is not None and self.augmentation.clean:
            clean = self.extractor.extract(join_parts(item, plain))
        return self.extractor.extract(samples), clean

    def _prepare(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.augmentation is None:
            return samples
        if self.augmentation.speech is not None:
            samples = self.augmentation.speech.change_voice(samples, rng)
        if self.augmentation.gain_db == 0:
            return samples
        return change_gain(samples, rng.uniform(-self.augmentation.gain_db, self.augmentation.gain_db))

    def _babble_voices(self) -> list[np.ndarray]:
        """The epoch's recordings for babble, read when first asked for; the generator is no item's."""
        if self._babble is None:
            spoken = np.flatnonzero(~self.fixed_speed)
            rng = np.random.default_rng([self.seed, self.epoch, len(self.items)])
            chosen = rng.choice(spoken, min(BABBLE_VOICES, len(spoken)), replace=False)
            self._babble = [load_samples(self.root, self.utterances[number].audio) for number in chosen]
        return self._babble

    def _join_features(self, item: Item) -> np.ndarray:
        """Ready features joined frame by frame, pauses as quiet as the quietest frame: float32 [n_frames, 80]."""
        parts = []
        for number, length in zip(item.utterances, item.lengths):
            utterance = self.utterances[number]
            features = load_features(self.root, utterance.audio)
            self._check_length(utterance, len(features))
            parts.append(features[:length] if len(features) >= length else extend(features, length))
        quietest = min((part[part.mean(axis=1).argmin()] for part in parts), key=lambda frame: frame.mean())
        out = np.tile(quietest, (item.n_frames, 1))
        for part, (start, _) in zip(parts, item.speech()):
            out[start : start + len(part)] = part
        return out

    def _check_length(self, utterance: Utterance, found: int) -> None:
        if abs(found - utterance.n_frames) > FRAME_TOLERANCE:
            raise ManifestError(
                f"manifest {self.name}: row {utterance.id!r} says {utterance.n_frames} frames of 10 ms, but "
                f"{self.root / utterance.audio} has {found}"
            )

    # --- batches

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of items.

        Returns:
            ``net_input``: ``src_tokens`` [B, T, 80], ``src_lengths`` [B], ``prev_output_tokens`` [S, U];
            ``target`` [S, U] (MT, with end symbols), ``target_lengths`` [S]; ``src_text``, ``tgt_text`` [B, L] (CTC)
            with ``*_lengths`` [B], 0 where it is not known; ``units`` [S, V] (dictionary indices) with
            ``unit_lengths`` [S], 0 where they are not known, both None if there are none at all; ``windows``: ``row``,
            ``start``, ``end`` [S], or None when no item joins several sentences; ``sentence_row`` [S];
            ``ntokens`` (MT target tokens), ``nsentences`` (S); ``clean`` [B, T, 80] where items have it.
        """
        if not samples:
            return {}
        lengths = torch.tensor([len(s["source"]) for s in samples])
        source = pad_features([s["source"] for s in samples])
        sentences = [tokens for s in samples for tokens in s["sentences"]]
        previous, targets = collate_targets(sentences)
        src_text, src_text_lengths = pad([s["src_text"] for s in samples])
        tgt_text, tgt_text_lengths = pad([s["tgt_text"] for s in samples])
        units = unit_lengths = None
        if any(len(u) for s in samples for u in s["units"]):
            units, unit_lengths = pad_units([u for s in samples for u in s["units"]])
        rows = torch.tensor([i for i, s in enumerate(samples) for _ in s["sentences"]])
        windows = None
        if any(s["windows"] for s in samples):
            spans = [
                span
                for s, length in zip(samples, lengths.tolist())
                for span in (s["windows"] or [(0, -(-length // 4))])
            ]
            start, end = torch.tensor(spans).unbind(1)
            windows = {"row": rows, "start": start, "end": end}
        return {
            "id": torch.tensor([s["id"] for s in samples]),
            "net_input": {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": previous},
            **({} if samples[0]["clean"] is None else {"clean": pad_features([s["clean"] for s in samples])}),
            **targets,
            "src_text": src_text,
            "src_text_lengths": src_text_lengths,
            "tgt_text": tgt_text,
            "tgt_text_lengths": tgt_text_lengths,
            "units": units,
            "unit_lengths": unit_lengths,
            "windows": windows,
            "sentence_row": rows,
        }
