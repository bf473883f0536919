#!/usr/bin/env python3
"""Translate sixteen spoken Spanish sentences while they are being spoken (`make demo`).

Runs SimulEval with EchoStream's agent over echostream/assets/demo, prints every translation with the time of each word,
the figures of all sentences together, and leaves translated speech and a timeline picture of each in demo-output/.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from echostream.checkpoint import DEFAULT_BUNDLE
from echostream.checkpoint.layout import config_path
from echostream.errors import EchoStreamError, ManifestError
from echostream.evaluation import run
from echostream.evaluation.asr import RECOGNISERS
from echostream.evaluation.timeline import draw_timeline
from echostream.files import run_command
from echostream.text_file import iter_lines, read_lines, table_rows

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = ROOT / "echostream" / "assets" / "demo" / "sentences.tsv"
COLUMNS = ("id", "audio", "source", "target")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, default=SENTENCES, help="table with id, audio, source, target")
    parser.add_argument("--checkpoint-dir", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--chunk-ms", type=int, help="source audio from one decision to the next")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--asr", default="auto", choices=("auto", *RECOGNISERS), help="listens to the output")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    try:
        demonstrate(args)
    except EchoStreamError as error:
        sys.exit(f"error: {error}")


def demonstrate(args: argparse.Namespace) -> None:
    start = time.monotonic()
    if not config_path(args.checkpoint_dir).is_file():
        raise EchoStreamError(f"there is no checkpoint in {args.checkpoint_dir}; train one as docs/training.md says")
    sentences = read_sentences(args.sentences)
    log = run.simulate(
        [args.sentences.parent / row["audio"] for row in sentences],
        [row["target"] for row in sentences],
        args.output / "simuleval",
        {"checkpoint_dir": args.checkpoint_dir, "chunk_ms": args.chunk_ms, "device": args.device},
    )
    figures = run.score(args.output / "simuleval", args.asr, voice=True)
    heard = read_lines(args.output / "simuleval" / "asr_transcripts.txt", EchoStreamError)
    listener = run.recogniser_name(args.output / "simuleval")
    for row, line in tqdm(list(zip(sentences, log, strict=True)), desc="drawing"):
        shutil.copyfile(line["prediction"], args.output / f"{row['id']}.wav")
        draw_timeline(line, args.output / f"{row['id']}.png", row["source"], row["target"])
    for row, line, transcript in zip(sentences, log, heard):
        print_sentence(row, line, transcript, listener)
    print_figures(figures, listener, len(log))
    print(f"\nSpeech and pictures: {args.output.resolve()} ({time.monotonic() - start:.0f} s)")


def read_sentences(path: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated table.

    Raises:
        ManifestError: the file or a column is missing.
    """
    rows = list(table_rows(iter_lines(path, what="table of sentences")))
    for column in COLUMNS:
        if not rows or column not in rows[0]:
            raise ManifestError(f"{path} has no column {column!r}, or no rows")
    return rows


def print_sentence(row: dict[str, str], line: dict[str, Any], transcript: str, listener: str) -> None:
    print(f"\n[{row['id']}]  {line['source_length'] / 1000:.1f} s of speech")
    print(f"  source     {row['source']}")
    print(f"  reference  {row['target']}")
    print(f"  streamed   {line['text'] or '(nothing)'}")
    for delay, words in groupby(line["words"], key=lambda word: word["delay"]):
        print(f"     {delay / 1000:6.2f} s  {' '.join(word['text'] for word in words)}")
    print(f"  {listener} hears: {transcript}")


def print_figures(figures: dict[str, float], listener: str, count: int) -> None:
    print(f"\nAll {count} sentences")
    print(f"  {'BLEU of the streamed text':<44}{figures['BLEU']:9.2f}")
    print(f"  {f'ASR-BLEU ({listener})':<44}{figures['ASR_BLEU']:9.2f}")
    print(f"  {f'WER, {listener} against the streamed text':<44}{figures['ASR_WER']:9.2f} %")
    print(f"  {'the same without the silences of waiting':<44}{figures['VOICE_WER']:9.2f} %")
    print(f"  {'latency, ms':<44}{'plain':>9}{'computation-aware':>20}")
    explained = {
        "StartOffset": "StartOffset (to the first sound)",
        "EndOffset": "EndOffset (after the speaker's end)",
        "AL": "AL per target word",
        "LAAL": "LAAL per target word",
        "ATD": "ATD per 300 ms of speech",
    }
    for name in run.LATENCY:
        print(f"  {explained.get(name, name):<44}{figures[name]:9.0f}{figures[f'{name}_CA']:20.0f}")
    print(f"  {'computing time for a second of speech, s':<44}{figures['RTF']:9.3f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
