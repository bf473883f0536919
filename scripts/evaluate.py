#!/usr/bin/env python3
"""Results tables: of fairseq-generate's output, and of simultaneous translation by SimulEval.

    python scripts/evaluate.py offline runs/es-en/generate-test.jsonl
    python scripts/evaluate.py simul --manifest data/es-en/test.tsv --chunk-ms 320 960 --output runs/es-en/simul
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from echostream.checkpoint import DEFAULT_BUNDLE
from echostream.data.manifest import read_manifest
from echostream.errors import EchoStreamError
from echostream.evaluation import quality, run
from echostream.evaluation.asr import RECOGNISERS, load_recogniser

ROOT = Path(__file__).resolve().parents[1]
KNOBS = ("lagging_k1", "stride_n1", "lagging_k2", "stride_n2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    offline = commands.add_parser("offline", help="WER, BLEU, chrF, unit error rate, ASR-BLEU of fairseq-generate")
    offline.add_argument("results", type=Path, nargs="+", help="generate-<subset>.jsonl")
    offline.add_argument("--asr", default="auto", choices=("auto", "none", *RECOGNISERS), help="listens to the wavs")
    offline.add_argument("--output", type=Path, help="write the figures as JSON too")

    simul = commands.add_parser("simul", help="quality and latency of the simultaneous agent")
    source = simul.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", type=Path, help="corpus manifest with audio files (src_audio, tgt_text)")
    source.add_argument("--source", type=Path, help="list of recordings, one a line; with --target")
    simul.add_argument("--target", type=Path, help="list of reference translations, one a line")
    simul.add_argument("--audio-root", type=Path, help="what src_audio is relative to (default: the manifest's folder)")
    simul.add_argument("--checkpoint-dir", type=Path, default=DEFAULT_BUNDLE)
    simul.add_argument("--chunk-ms", type=int, nargs="+", default=[320, 960], help="one run for each")
    for knob in KNOBS:
        simul.add_argument(f"--{knob.replace('_', '-')}", type=int, help="of the policy (default: the checkpoint's)")
    simul.add_argument("--segmenter", choices=("punctuation", "none"), help="none: one sentence a recording")
    simul.add_argument("--device", default="cpu")
    simul.add_argument("--limit", type=int, help="only the first N recordings")
    simul.add_argument("--jobs", type=int, default=1, help="processes; more than one falsifies computation-aware times")
    simul.add_argument("--asr", default="auto", choices=("auto", *RECOGNISERS))
    simul.add_argument("--output", type=Path, required=True, help="a folder for each chunk size, and results.json")

    args = parser.parse_args()
    try:
        if args.command == "offline":
            offline_tables(args)
        else:
            simultaneous_table(args)
    except EchoStreamError as error:
        sys.exit(f"error: {error}")


def offline_tables(args: argparse.Namespace) -> None:
    figures = {}
    for path in args.results:
        rows = read_results(path)
        figures[path.stem] = score_offline(rows, path.parent, args.asr)
        print(f"\n{path} ({len(rows)} utterances)\n")
        print_table(["part", "measure", "value"], [[part, name, f"{v:.2f}"] for part, name, v in figures[path.stem]])
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The objects of a generate-<subset>.jsonl.

    Raises:
        EchoStreamError: the file is missing, empty, or a line is not a JSON object.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise EchoStreamError(f"{path} does not exist; fairseq-generate --results-path writes it") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise EchoStreamError(f"{path} is not a file of JSON lines: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EchoStreamError(f"{path} holds no results")
    return rows


def score_offline(rows: list[dict[str, Any]], folder: Path, asr: str = "auto") -> list[tuple[str, str, float]]:
    """(part, measure, value) for every part whose hypotheses and references are there. Rates are in percent."""
    figures: list[tuple[str, str, float]] = []

    def column(name: str) -> list[str] | None:
        values = [row.get(name) for row in rows]
        if any(value is None for value in values):
            return None
        return [" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]

    def add(part: str, name: str, measure: Any, hypothesis: str, reference: str) -> None:
        hypotheses, references = column(hypothesis), column(reference)
        if hypotheses is not None and references is not None:
            figures.append((part, name, measure(hypotheses, references)))

    add("ASR (source text)", "WER", lambda h, r: quality.word_error_rate(h, r, numbers=False), "asr", "asr_ref")
    add("ST CTC (target text)", "BLEU", quality.bleu, "st", "mt_ref")
    add("ST CTC (target text)", "chrF", quality.chrf, "st", "mt_ref")
    add("MT (target text)", "BLEU", quality.bleu, "mt", "mt_ref")
    add("MT (target text)", "chrF", quality.chrf, "mt", "mt_ref")
    add("units", "unit error rate", quality.unit_error_rate, "units", "units_ref")
    wavs = column("wav")
    if wavs is not None and asr != "none":
        engine = load_recogniser(asr)
        heard = [engine.transcribe_file(folder / wav) for wav in tqdm(wavs, desc=f"listening ({engine.name})")]
        for row, text in zip(rows, heard, strict=True):
            row["heard"] = text
        add(f"speech ({engine.name})", "ASR-BLEU", quality.asr_bleu, "heard", "mt_ref")
        add(f"speech ({engine.name})", "WER against MT", quality.word_error_rate, "heard", "mt")
    if not figures:
        raise EchoStreamError("the results hold no hypothesis with its reference (asr, st, mt, units with *_ref)")
    return figures


def simultaneous_table(args: argparse.Namespace) -> None:
    sources, references = read_pairs(args)
    results = {}
    for chunk in args.chunk_ms:
        folder = args.output / f"chunk{chunk}"
        print(f"chunk {chunk} ms: {len(sources)} recordings", file=sys.stderr)
        options = {"checkpoint_dir": args.checkpoint_dir, "chunk_ms": chunk, "device": args.device}
        options |= {name: getattr(args, name) for name in (*KNOBS, "segmenter")}
        run.simulate(sources, references, folder, ROOT / "agent" / "echostream_agent.py", options, args.jobs)
        results[chunk] = run.score(folder, args.asr)
    listener = run.recogniser_name(args.output / f"chunk{args.chunk_ms[-1]}")
    (args.output / "results.json").write_text(
        json.dumps({"recordings": len(sources), "asr": listener, "chunks": results}, indent=2) + "\n", encoding="utf-8"
    )
    print(f"\n{len(sources)} recordings; ASR is {listener}; times in ms, computation-aware ones in brackets\n")
    header = ["chunk", "BLEU", "ASR-BLEU", "ASR-WER", *run.LATENCY, "RTF"]
    print_table(header, [table_row(chunk, figures) for chunk, figures in results.items()])


def table_row(chunk: int, figures: dict[str, float]) -> list[str]:
    return [
        f"{chunk} ms",
        *(f"{figures[name]:.2f}" for name in ("BLEU", "ASR_BLEU", "ASR_WER")),
        *(f"{figures[name]:.0f} ({figures[name + '_CA']:.0f})" for name in run.LATENCY),
        f"{figures['RTF']:.3f}",
    ]


def read_pairs(args: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """Recordings and references, from a manifest or from two lists."""
    if args.manifest is not None:
        root = args.audio_root or args.manifest.parent
        rows = read_manifest(args.manifest)[: args.limit]
        packed = [row.id for row in rows if ".zip:" in row.audio or row.audio.endswith(".npy")]
        if packed:
            raise EchoStreamError(f"row {packed[0]!r} of {args.manifest} holds features; the agent needs recordings")
        return [root / row.audio for row in rows], [row.tgt_text for row in rows]
    if args.target is None:
        raise EchoStreamError("--source needs --target, the list of reference translations")
    lists = []
    for path in (args.source, args.target):
        if not path.is_file():
            raise EchoStreamError(f"list {path} does not exist")
        lists.append([line.strip() for line in path.read_text(encoding="utf-8").splitlines()][: args.limit])
    return [Path(line) for line in lists[0]], lists[1]


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


if __name__ == "__main__":
    main()
