#!/usr/bin/env python3
"""Translate sixteen spoken Spanish sentences while they are being spoken (`make demo`).

Goes chunk by chunk through echostream/assets/demo in one process, without torch, prints every translation with the time
of each word, the figures of all sentences together, and leaves translated speech and a timeline picture of each in
demo-output/. SimulEval's run of the same recordings (docs/evaluation.md) gives the same figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from echostream.audio.io import load_audio, write_audio
from echostream.checkpoint import DEFAULT_BUNDLE, load_bundle
from echostream.checkpoint.layout import config_path
from echostream.constants import SAMPLE_RATE
from echostream.errors import CheckpointError, EchoStreamError, ManifestError
from echostream.evaluation import latency, quality
from echostream.evaluation.asr import RECOGNISERS, load_recogniser
from echostream.evaluation.streams import Streamed, stream_live
from echostream.evaluation.sweep import speech_latencies
from echostream.evaluation.timeline import Timeline, draw
from echostream.files import run_command
from echostream.text_file import iter_lines, table_rows

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = ROOT / "echostream" / "assets" / "demo" / "sentences.tsv"
COLUMNS = ("id", "audio", "source", "target")
LATENCIES = {
    "StartOffset": "StartOffset (to the first word's sound)",
    "EndOffset": "EndOffset (after the speaker's end)",
    "AL": "AL per target word",
    "LAAL": "LAAL per target word",
    "ATD": "ATD per 300 ms of speech",
}


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
    rows = read_sentences(args.sentences)
    recogniser = load_recogniser(args.asr)
    bundle = load_bundle(args.checkpoint_dir, args.device)
    if bundle.vocoder is None:
        raise CheckpointError(f"checkpoint directory {args.checkpoint_dir} has no vocoder, so that it cannot speak")
    options = {} if args.chunk_ms is None else {"chunk_ms": args.chunk_ms}
    args.output.mkdir(parents=True, exist_ok=True)
    plain: list[Streamed] = []
    aware: list[Streamed] = []
    heard: list[str] = []
    computed = 0.0
    for row in tqdm(rows, desc="translating", unit="sentence"):
        samples = load_audio(args.sentences.parent / row["audio"])
        begin = time.perf_counter()
        for streams, streamed in zip((plain, aware), stream_live(bundle, samples, options), strict=True):
            streams.append(streamed)
        computed += time.perf_counter() - begin
        speech = write_result(row, samples, plain[-1], args.output)
        heard.append(recogniser.transcribe(speech))
    for row, streamed, transcript in zip(rows, plain, heard, strict=True):
        print_sentence(row, streamed, transcript, recogniser.name)
    references = [row["target"] for row in rows]
    print(f"\nAll {len(rows)} sentences")
    print_quality([streamed.text for streamed in plain], heard, references, recogniser.name)
    print_latency(speech_latencies(plain, references), speech_latencies(aware, references))
    seconds = sum(streamed.seconds for streamed in plain)
    print(f"  {'computing time for a second of speech, s':<44}{computed / seconds:9.3f}")
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


def write_result(row: dict[str, str], samples: np.ndarray, streamed: Streamed, folder: Path) -> np.ndarray:
    """Write the speech as it is heard from its first sound on, and the timeline; returns the speech, [N] at 16 kHz."""
    waves = [wave for wave in streamed.waves if len(wave.samples)]
    rate = waves[0].sample_rate if waves else SAMPLE_RATE
    emitted = [1000 * wave.source_time_s for wave in waves]
    intervals = latency.playback(emitted, [1000 * len(wave.samples) / rate for wave in waves])
    speech, _ = latency.played(intervals, [wave.samples for wave in waves], rate)
    path = folder / f"{row['id']}.wav"
    write_audio(path, speech, rate)
    words = [(1000 * word.seconds, word.text) for word in streamed.spoken.words]
    picture = Timeline(
        (samples, SAMPLE_RATE), (speech, rate) if waves else None, intervals, words,
        row["source"], streamed.text, row["target"],
    )  # fmt: skip
    draw(picture, folder / f"{row['id']}.png")
    return load_audio(path) if waves else speech


def print_sentence(row: dict[str, str], streamed: Streamed, transcript: str, listener: str) -> None:
    print(f"\n[{row['id']}]  {streamed.seconds:.1f} s of speech")
    print(f"  source     {row['source']}")
    print(f"  reference  {row['target']}")
    print(f"  streamed   {streamed.text or '(nothing)'}")
    for seconds, words in groupby(streamed.spoken.words, key=lambda word: word.seconds):
        print(f"     {seconds:6.2f} s  {' '.join(word.text for word in words)}")
    print(f"  {listener} hears: {transcript}")


def print_quality(texts: list[str], heard: list[str], references: list[str], listener: str) -> None:
    print(f"  {'BLEU of the streamed text':<44}{quality.bleu(texts, references):9.2f}")
    print(f"  {f'ASR-BLEU ({listener})':<44}{quality.asr_bleu(heard, references):9.2f}")
    error_rate = quality.word_error_rate(heard, texts) if any(text.strip() for text in texts) else float("nan")
    print(f"  {f'WER, {listener} against the streamed text':<44}{error_rate:9.2f} %")


def print_latency(plain: dict[str, float], aware: dict[str, float]) -> None:
    """The second column counts by this machine's clock: a chunk is heard when the one before it is done."""
    print(f"  {'latency, ms':<44}{'plain':>9}{'computation-aware':>20}")
    for name, title in LATENCIES.items():
        print(f"  {title:<44}{plain[name]:9.0f}{aware[name]:20.0f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
