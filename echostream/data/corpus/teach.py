"""Further references for the recordings of a manifest: what Whisper hears and how it translates, where that is sound.

What Whisper wrote is kept in ledgers as it is; what a manifest takes from them is decided when it is written.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from echostream.constants import FRAME_SHIFT, SAMPLE_RATE
from echostream.data.corpus.normalize import normalize_text, words_of
from echostream.data.corpus.rows import Ledger, take_shard
from echostream.data.manifest import Utterance
from echostream.data.source import is_features, load_samples
from echostream.errors import CheckpointError, ConfigError, ManifestError, require
from echostream.units.features import whisper_log_mel, whisper_mel_filters
from echostream.whisper.tokens import LANGUAGES, TASKS, WhisperBPE

COLUMNS = {"translate": "tgt_text", "transcribe": "src_text"}  # what a task gives further references of
LEDGER_COLUMNS = ("id", "text", "score")
LONGEST = 30 * SAMPLE_RATE
QUANTUM = 5 * SAMPLE_RATE  # windows are so many samples or a multiple: recordings of one window share a batch
SILENCE = 5 * SAMPLE_RATE  # behind the speech at least
MAX_COMPRESSION = 2.4  # bytes per byte that zlib makes of it; Whisper's own limit for a loop
LOOP = 3  # as often no passage may stand in a row
MAX_WER = 0.5  # of a transcript against the manifest's text
MIN_SCORE = -1.0  # mean log probability of a token, Whisper's own limit
MAX_RATIO = 2.5  # words of a translation to those of the manifest's, or the other way round; a few words aside
_SPARE_WORDS = 3


class Whisper:
    """Whisper in CTranslate2, for texts.

    Args:
        source: directory with ``model.bin`` and the tokenizer.
        language: of the speech, as Whisper names it (``es``).

    Raises:
        CheckpointError: ``source`` is no such model. ConfigError: it does not know the language.
    """

    def __init__(
        self, source: Path, language: str, compute_type: str = "default", beam: int = 5, threads: int = 0
    ) -> None:
        ctranslate2 = require("ctranslate2", "corpus")
        if not (Path(source) / "model.bin").is_file():
            raise CheckpointError(f"{source} holds no model.bin of a CTranslate2 Whisper model")
        try:
            self._model = ctranslate2.models.Whisper(
                str(source), device="auto", compute_type=compute_type, intra_threads=threads
            )
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{source} is not a Whisper model for CTranslate2: {error}") from None
        if language not in LANGUAGES or not self._model.is_multilingual:
            raise ConfigError(f"--source-lang is {language!r}; {source} does not know it (codes such as es)")
        bpe = WhisperBPE.load(source)
        self._bytes = {i: token for token, i in bpe.ids.items() if i < bpe.end_of_text}
        self._view, self._beam, self._language = ctranslate2.StorageView, beam, language
        self._mel = whisper_mel_filters(self._model.n_mels)

    def write(self, recordings: Sequence[np.ndarray], window: int, task: str) -> list[tuple[str, float]]:
        """Text of each recording (float [N] at 16 kHz, silence up to ``window`` samples), its mean log probability."""
        mels = np.stack([whisper_log_mel(samples, window, self._mel) for samples in recordings])
        prompt = ["<|startoftranscript|>", f"<|{self._language}|>", f"<|{task}|>", "<|notimestamps|>"]
        results = self._model.generate(
            self._view.from_array(np.ascontiguousarray(mels)), [prompt] * len(recordings), beam_size=self._beam,
            return_scores=True, max_length=224,
        )  # fmt: skip
        return [(self._text(result.sequences_ids[0]), float(result.scores[0])) for result in results]

    def _text(self, ids: Iterable[int]) -> str:
        return normalize_text(b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="ignore"))


def window(n_frames: int) -> int:
    """Samples that Whisper hears of a recording of so many feature frames: silence behind it, at most 30 s."""
    return min(LONGEST, -(-(n_frames * FRAME_SHIFT + SILENCE) // QUANTUM) * QUANTUM)


def write_hypotheses(
    ledger: Ledger, whisper: Whisper, utterances: Sequence[Utterance], root: Path, task: str, batch: int = 8,
    shard: int = 0, num_shards: int = 1, progress: Callable[[Iterable], Iterable] = iter,
) -> Counter:  # fmt: skip
    """Write down what Whisper makes of the recordings; those in the ledger are done.

    Returns:
        counts: ``written`` now, ``done`` before, ``too long`` for Whisper.

    Raises:
        ManifestError: a row has ready features. AudioError: a recording cannot be used.
    """
    ready = next((u for u in utterances if is_features(u.audio)), None)
    if ready is not None:
        raise ManifestError(f"row {ready.id!r} names ready features; Whisper hears recordings")
    done = ledger.read()
    mine = take_shard(list(utterances), shard, num_shards)
    fitting = [u for u in mine if u.n_frames * FRAME_SHIFT <= LONGEST]
    todo = sorted((u for u in fitting if u.id not in done), key=lambda u: u.n_frames)
    counts: Counter = Counter({"done": len(fitting) - len(todo), "too long": len(mine) - len(fitting), "written": 0})
    batches: list[list[Utterance]] = []
    for u in todo:
        if not batches or len(batches[-1]) == batch or window(batches[-1][0].n_frames) != window(u.n_frames):
            batches.append([])
        batches[-1].append(u)
    for group in progress(batches):
        recordings = [load_samples(root, u.audio) for u in group]
        found = whisper.write(recordings, window(group[0].n_frames), task)
        ledger.append((u.id, text, f"{score:.3f}") for u, (text, score) in zip(group, found))
        counts["written"] += len(group)
    return counts


def add_references(
    utterances: Iterable[Utterance], written: dict[str, dict[str, dict[str, str]]]
) -> tuple[list[Utterance], Counter]:
    """The rows with a further column for each task; its cell is empty where there is nothing sound or new.

    Args:
        written: lines of the ledgers by task and id.

    Returns:
        (rows; counts of ``<task>: kept`` and of every reason against one).
    """
    utterances, out = list(utterances), []
    counts: Counter[str] = Counter()
    names = {task: _next_column(COLUMNS[task], utterances) for task in written}
    for u in utterances:
        extra = dict(u.extra)
        texts = {task: lines.get(u.id, {}).get("text", "") for task, lines in written.items()}
        heard = texts.get("transcribe")
        for task, lines in written.items():
            line = lines.get(u.id)
            reason = "not written" if line is None else fault(texts[task], float(line["score"]), u, task, heard)
            extra[names[task]] = "" if reason else texts[task]
            counts[f"{task}: {reason or 'kept'}"] += 1
        out.append(dataclasses.replace(u, extra=extra))
    return out, counts


def fault(text: str, score: float, row: Utterance, task: str, transcript: str | None = None) -> str:
    """Why a hypothesis is no further reference; empty if it is one.

    Args:
        transcript: what Whisper heard, if it was asked; a translation of something else is none.
    """
    words, heard = words_of(text), None if transcript is None else words_of(transcript)
    own = row.src_text if task == "transcribe" else row.tgt_text
    if not words:
        return "empty"
    if text in row.references(COLUMNS[task]):
        return "known"
    if loops(text):
        return "repeats itself"
    if score < MIN_SCORE:
        return "unlikely"
    if heard is not None and _wer(heard, words_of(row.src_text)) >= MAX_WER:
        return "heard otherwise"
    few, many = sorted((len(words), len(words_of(own))))
    if task == "translate" and many > MAX_RATIO * few + _SPARE_WORDS:
        return "of another length"
    if task == "translate" and words == words_of(row.src_text) and words != words_of(own):
        return "not translated"
    return ""


def loops(text: str) -> bool:
    """Does a passage of one to eight words stand ``LOOP`` times in a row, or does the text compress as if?"""
    words = words_of(text)
    for size in range(1, 9):
        for at in range(len(words) - LOOP * size + 1):
            passage = words[at : at + size]
            if words[at : at + LOOP * size] == passage * LOOP:
                return True
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data)) > MAX_COMPRESSION


def _wer(hypothesis: list[str], reference: list[str]) -> float:
    levenshtein = require("rapidfuzz.distance", "corpus").Levenshtein
    return levenshtein.distance(hypothesis, reference) / max(1, len(reference))


def _next_column(column: str, utterances: Iterable[Utterance]) -> str:
    taken = {name for u in utterances for name in u.extra}
    return next(name for i in range(1, len(taken) + 2) if (name := f"{column}.{i}") not in taken)


__all__ = ["COLUMNS", "TASKS", "Whisper", "add_references", "fault", "loops", "window", "write_hypotheses"]
