"""The files that training reads: manifests, unit dictionary, global CMVN, ``config.yaml``, and what they amount to."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from echostream.audio.fbank import fbank
from echostream.audio.io import load_audio
from echostream.constants import FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, SUBSAMPLING
from echostream.data.corpus.rows import Row, hash_int, read_table, write_table
from echostream.errors import require
from echostream.files import replacing, write_text

MANIFEST_COLUMNS = (
    "id",
    "src_audio",
    "src_n_frames",
    "src_text",
    "tgt_text",
    "tgt_audio",
    "tgt_n_frames",
    "voice",
    "target",
)

TEXT_COLUMNS = ("id", "src_text", "tgt_text", "tgt_audio")


def write_manifest(
    path: Path,
    recordings: Iterable[dict[str, str]],
    rows: dict[str, Row],
    units: dict[str, dict[str, str]],
    without_units: bool = False,
) -> Counter:
    """One manifest, StreamSpeech's columns first (all tab-separated, unquoted, as fairseq reads them).

    Args:
        recordings: lines of the speech ledgers.
        units: lines of the units ledger by target.
        without_units: keep rows whose target has no units yet, with an empty ``tgt_audio``.

    Returns:
        counts: rows ``written``, those ``no units`` were there for, ``samples`` of source audio.
    """
    counts: Counter = Counter(written=0)
    lines = []
    for recording in recordings:
        row = rows.get(recording["row"])
        if row is None:
            counts["no text"] += 1
            continue
        line = units.get(row.target)
        if line is None:
            counts["no units"] += 1
            if not without_units:
                continue
        sequence = line["units"] if line else ""
        samples = int(recording["samples"])
        lines.append(
            (
                recording["id"],
                recording["audio"],
                1 + (samples - FRAME_LENGTH) // FRAME_SHIFT,
                row.src_text,
                row.tgt_text,
                sequence,
                len(sequence.split()),
                recording["voice"],
                row.target,
            )
        )
        counts["written"] += 1
        counts["samples"] += samples
    write_table(path, MANIFEST_COLUMNS, lines)
    return counts


def write_text_pairs(path: Path, rows: Iterable[Row], units: dict[str, dict[str, str]]) -> Counter:
    """All the pairs of a split as text, with units where their target has them: what ``--source text`` trains on.

    Returns:
        counts: rows ``written``, those ``with units``.
    """
    counts: Counter = Counter(written=0)
    lines = []
    for row in rows:
        line = units.get(row.target)
        lines.append((row.row, row.src_text, row.tgt_text, line["units"] if line else ""))
        counts["written"] += 1
        counts["with units"] += line is not None
    write_table(path, TEXT_COLUMNS, lines)
    return counts


def write_cmvn(
    path: Path,
    manifest: Path,
    audio_root: Path,
    limit: int,
    seed: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
) -> int:
    """Mean and standard deviation of each feature over ``limit`` utterances of a manifest, drawn by hash.

    Returns:
        the number of feature frames.
    """
    lines = sorted(read_table(manifest, MANIFEST_COLUMNS), key=lambda line: hash_int(seed, "cmvn", line["id"]))
    total, squares, frames = np.zeros(()), np.zeros(()), 0
    for line in progress(lines[:limit]):
        features = fbank(load_audio(audio_root / line["src_audio"])).astype(np.float64)
        total, squares = total + features.sum(axis=0), squares + (features**2).sum(axis=0)
        frames += len(features)
    mean = total / frames
    std = np.sqrt(np.maximum(squares / frames - mean**2, 1e-10))
    with replacing(path) as file:
        np.savez(file, mean=mean.astype(np.float32), std=std.astype(np.float32))
    return frames


def ctc_figures(manifest: Path, target_model: Path, source_model: Path) -> dict[str, object]:
    """Whether the CTC losses have room: units against target subwords (plus one for eos), subwords against frames.

    ``mt_ratio``: smallest ``ctc_upsample_ratio`` per subword that covers so many percent of the targets;
    ``encoder_ratio``: the same per encoder frame; ``st_tokens_per_frame``: target subwords per encoder frame.
    """
    sentencepiece = require("sentencepiece", "all")
    target = sentencepiece.SentencePieceProcessor(model_file=str(target_model))
    source = sentencepiece.SentencePieceProcessor(model_file=str(source_model))
    lines = [line for line in read_table(manifest, MANIFEST_COLUMNS) if line["tgt_audio"]]
    if not lines:
        return {}
    units = np.array([int(line["tgt_n_frames"]) for line in lines])
    frames = np.array([-(-int(line["src_n_frames"]) // SUBSAMPLING) for line in lines])
    subwords = [target.encode(line["tgt_text"]) for line in lines]
    tokens = np.array([len(ids) for ids in subwords])
    needed = np.array([_ctc_length(ids) for ids in subwords])
    needed_source = np.array([_ctc_length(source.encode(line["src_text"])) for line in lines])
    percent = (50, 90, 99, 99.5, 99.9, 100)
    seconds = frames * SUBSAMPLING * FRAME_SHIFT / SAMPLE_RATE

    def ratios(values: np.ndarray) -> dict[str, int]:
        return {f"{p:g}%": int(np.ceil(np.percentile(values, p, method="higher"))) for p in percent}

    return {
        "targets": len(lines),
        "mt_ratio": ratios(units / (tokens + 1)),
        "encoder_ratio": ratios(units / frames),
        "units_per_subword": round(float(units.sum() / tokens.sum()), 2),
        "target_subwords_per_second": round(float(tokens.sum() / seconds.sum()), 2),
        "st_too_long": int((needed > frames).sum()),
        "asr_too_long": int((needed_source > frames).sum()),
        "st_tokens_per_frame_max": round(float((needed / frames).max()), 3),
        "unk_targets": int(sum(target.unk_id() in ids for ids in subwords)),
    }


def write_config(path: Path, source_lang: str, target_lang: str, num_units: int, features: str) -> None:
    yaml = require("yaml", "all")
    config = {
        "audio_root": ".",
        "sample_rate": SAMPLE_RATE,
        "source_lang": source_lang,
        "target_lang": target_lang,
        "num_units": num_units,
        "spm_src": "spm.src.model",
        "spm_tgt": "spm.tgt.model",
        "dict_src": "dict.src.txt",
        "dict_tgt": "dict.tgt.txt",
        "dict_unit": "dict.unit.txt",
        "gcmvn": "gcmvn.npz",
        "units": "target/units.tsv",
        "features": features,
    }
    write_text(path, yaml.safe_dump(config, sort_keys=False))


def _ctc_length(ids: list[int]) -> int:
    """Frames that CTC needs: one a token, one blank between equal neighbours."""
    return len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
