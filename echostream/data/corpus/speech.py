"""Recordings of the source and the target side, 16 kHz mono, each step resumable after any interruption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echostream.audio.io import load_audio, write_audio
from echostream.constants import FRAME_LENGTH, SAMPLE_RATE
from echostream.data.corpus.normalize import count_words
from echostream.data.corpus.rows import Ledger, Row, Skipped, hash_int, take_shard
from echostream.data.corpus.sources import ReadySpeech
from echostream.data.corpus.tts import TEST_ONLY_VOICES, Engine
from echostream.errors import EchoStreamError, LongAudioError, ManifestError, MissingAudioError

SPEECH_COLUMNS = ("id", "row", "split", "audio", "samples", "voice")
TARGET_COLUMNS = ("target", "audio", "samples")
_BATCH = 20  # finished recordings between two writes of the ledger


@dataclass(frozen=True)
class Selection:
    """Which pairs a set of recordings is made of.

    Attributes:
        split: of the pairs.
        min_words, max_words: both sides have this many.
        max_rank: no word rarer than this (0: any).
        limit: at most so many pairs (0: all).
        order: ``file``; ``rank``, pairs of frequent words first; ``hash``, a mix that depends on the row names alone.
        exclude: rows that other sets have already.
    """

    split: str
    min_words: int = 1
    max_words: int = 10_000
    max_rank: int = 0
    limit: int = 0
    order: str = "file"
    exclude: frozenset[str] = frozenset()

    def choose(self, rows: Iterable[Row], first: Callable[[Row], bool] | None = None) -> list[Row]:
        """The pairs, in order; those for which ``first`` holds come before all others."""
        chosen = [
            row
            for row in rows
            if row.split == self.split
            and row.row not in self.exclude
            and (not self.max_rank or row.rank <= self.max_rank)
            and all(self.min_words <= count_words(t) <= self.max_words for t in (row.src_text, row.tgt_text))
        ]
        if self.order == "rank":
            chosen.sort(key=lambda row: (row.rank, row.row))
        elif self.order == "hash":
            chosen.sort(key=lambda row: hash_int("order", row.row))
        elif self.order != "file":
            raise ManifestError(f"--order {self.order!r} is not one of file, rank, hash")
        if first:
            chosen.sort(key=lambda row: not first(row))
        return chosen[: self.limit] if self.limit else chosen


def speech_set(
    output: Path,
    name: str,
    rows: list[Row],
    selection: Selection,
    engine: Engine | None,
    ready: ReadySpeech | None,
    seed: int = 1,
    max_seconds: float = 30.0,
    suffix: str = ".wav",
    shard: int = 0,
    num_shards: int = 1,
    test_only: Iterable[str] = TEST_ONLY_VOICES,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Counter:
    """Record a set of source sentences into ``speech/<name>/``, listed in ``speech/<name>.<shard>.tsv``.

    A pair's own recording (``Row.src_audio``) is used where it has one, else the ready speech that covers it, else
    ``engine`` speaks it; without an engine the pair is left for another set. Test-only voices never train: their ready
    speech is passed over outside the test split, and an engine that would use one is refused.

    Returns:
        counts: ``recorded`` (now), ``done`` (before), ``skipped``.

    Raises:
        ManifestError: a test-only voice was asked for outside the test split.
    """
    test_only = set(test_only)

    def covered(row: Row) -> bool:
        return (
            ready is not None
            and row.row in ready.entries
            and (selection.split == "test" or not _speakers(ready.entries[row.row]["voice"]) & test_only)
        )

    if engine is not None and selection.split != "test":
        for voice in getattr(engine, "voices", ()):
            if _speakers(voice) & test_only:
                raise ManifestError(f"voice {voice} is kept for tests and cannot speak the split {selection.split!r}")
    chosen = selection.choose(rows, first=covered if ready else None)
    if engine is None:
        chosen = [row for row in chosen if row.src_audio or covered(row)]
    ledger = Ledger(output / "speech", name, SPEECH_COLUMNS, shard, num_shards)
    done = ledger.read()
    chosen = take_shard(chosen, shard, num_shards)
    todo = [row for row in chosen if f"{name}-{row.row}" not in done]
    counts = Counter(done=len(chosen) - len(todo))
    with Skipped(output / "skipped", f"speech-{name}", shard, num_shards) as skipped, ledger.batches(_BATCH) as record:
        for row in progress(todo):
            identity = f"{name}-{row.row}"
            audio = Path("speech") / name / row.row[:3] / f"{identity}{suffix}"
            try:
                if row.src_audio:
                    samples, voice = load_audio(row.src_audio, longest_s=max_seconds + 1), "recorded"
                elif covered(row):
                    samples, voice = ready.load(row.row), ready.entries[row.row]["voice"]
                else:
                    plan = engine.plan(row.row, seed)
                    samples, voice = engine.speak(row.src_text, plan), str(plan)
                _check_length(samples, max_seconds)
            except EchoStreamError as error:
                skipped.add(row.row, _reason(error), error)
                continue
            write_audio(output / audio, samples)
            record(identity, row.row, row.split, audio.as_posix(), len(samples), voice)
            counts["recorded"] += 1
        counts["skipped"] = len(skipped)
    return counts


def target_speech(
    output: Path,
    rows: list[Row],
    engine: Engine | None,
    seed: int = 1,
    max_seconds: float = 30.0,
    suffix: str = ".wav",
    shard: int = 0,
    num_shards: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Counter:
    """Record the target text of ``rows``, each text once and in their order, into ``target/<target>.wav``.

    Counts as for ``speech_set``. Recordings of a corpus that has its own target speech are converted; otherwise
    ``engine`` speaks.
    """
    unique: dict[str, Row] = {}
    for row in rows:
        unique.setdefault(row.target, row)
    ledger = Ledger(output / "target", "speech", TARGET_COLUMNS, shard, num_shards)
    done = ledger.read()
    chosen = take_shard(list(unique.values()), shard, num_shards)
    todo = [row for row in chosen if row.target not in done]
    counts = Counter(done=len(chosen) - len(todo))
    with Skipped(output / "skipped", "target", shard, num_shards) as skipped, ledger.batches(_BATCH) as record:
        for row in progress(todo):
            try:
                if row.tgt_audio:
                    samples = load_audio(row.tgt_audio, longest_s=max_seconds + 1)
                elif engine is not None:
                    samples = engine.speak(row.tgt_text, engine.plan(row.target, seed))
                else:
                    raise ManifestError("no recording and no voice for the target text")
                _check_length(samples, max_seconds)
            except EchoStreamError as error:
                skipped.add(row.target, _reason(error), error)
                continue
            audio = f"{row.target}{suffix}"
            write_audio(output / "target" / audio, samples)
            record(row.target, audio, len(samples))
            counts["recorded"] += 1
        counts["skipped"] = len(skipped)
    return counts


class _TooLong(EchoStreamError):
    pass


def _check_length(samples: np.ndarray, max_seconds: float) -> None:
    if len(samples) < FRAME_LENGTH:
        raise EchoStreamError(f"{len(samples)} samples, less than one frame of {FRAME_LENGTH}")
    if len(samples) > max_seconds * SAMPLE_RATE:
        raise _TooLong(f"{len(samples) / SAMPLE_RATE:.1f} s, limit {max_seconds:g} s")


def _reason(error: EchoStreamError) -> str:
    if isinstance(error, (_TooLong, LongAudioError)):
        return "too long"
    return "missing audio" if isinstance(error, MissingAudioError) else "unusable audio"


def _speakers(voice: str) -> set[str]:
    """The voices in a blend: ``ef_dora:.6,if_sara:.4`` → {ef_dora, if_sara}."""
    return {part.split(":")[0].split(" ")[0] for part in voice.split(",")}
