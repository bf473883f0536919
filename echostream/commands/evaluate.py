"""Results: of fairseq-generate, of simultaneous translation by SimulEval, of all policies, and of whole talks.

A report puts them side by side, with a cascade of other programs to compare them with.
Resynthesis judges the voice alone.

    echostream evaluate offline runs/es-en/generate-test.jsonl
    echostream evaluate simul --manifest data/es-en/test.tsv --chunk-ms 320 960 --output runs/es-en/simul
    echostream evaluate sweep --manifest data/es-en/test.tsv --output runs/es-en/sweep
    echostream evaluate talks --manifest data/es-en/test.tsv --count 10 --minutes 5 --output data/es-en/talks
    echostream evaluate longform --talks data/es-en/talks --output runs/es-en/longform
    echostream evaluate cascade --manifest data/es-en/test.tsv --output runs/cascade
    echostream evaluate rerun --manifest data/es-en/test.tsv --output runs/rerun
    echostream evaluate report --system offline=runs/es-en/generate-test.jsonl --system ctc=runs/es-en/simul \
        --sweep runs/es-en/sweep --longform runs/es-en/longform --manifest data/es-en/test.tsv --output report.md
    echostream evaluate resynthesis data/es-en --vocoder runs/vocoder
    echostream evaluate nospeech --minutes 10
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from echostream.checkpoint import DEFAULT_BUNDLE
from echostream.commands.evaluations import COMMANDS
from echostream.errors import EchoStreamError
from echostream.evaluation import longform, no_speech, run, sweep
from echostream.evaluation.asr import RECOGNISERS
from echostream.streaming.options import (
    add_beam_argument,
    add_chunk_argument,
    add_policy_arguments,
    add_segmenter_arguments,
)
from echostream.streaming.policies.factory import POLICIES
from echostream.vocode import add_vocoder_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "echostream evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    offline = commands.add_parser("offline", help="WER, BLEU, chrF, unit error rate, ASR-BLEU of fairseq-generate")
    offline.add_argument("results", type=Path, nargs="+", help="generate-<subset>.jsonl")
    offline.add_argument("--asr", default="auto", choices=("auto", "none", *RECOGNISERS), help="listens to the wavs")
    add_asr_model(offline)
    offline.add_argument("--target-lang", default="en", metavar="CODE", help="what is heard (default: %(default)s)")
    add_tokenizer(offline)
    offline.add_argument("--output", type=Path, help="write the figures as JSON too")

    simul = commands.add_parser("simul", help="quality and latency of the simultaneous agent, by SimulEval")
    add_recordings(simul)
    simul.add_argument(
        "--output-type", choices=tuple(run.QUALITY), default="speech", help="what the agent gives out (default: speech)"
    )
    add_policy_arguments(simul, chunks=(320, 960))
    add_segmenter_arguments(simul)
    simul.add_argument("--jobs", type=int, default=1, help="processes; more than one falsifies computation-aware times")
    simul.add_argument("--asr", default="auto", choices=("auto", *RECOGNISERS))
    add_asr_model(simul)
    add_tokenizer(simul)
    add_latency_unit(simul)
    simul.add_argument("--output", type=Path, required=True, help="a folder for each chunk size, and results.json")

    sweeping = commands.add_parser("sweep", help="quality against latency of every policy: table and picture")
    add_recordings(sweeping)
    sweeping.add_argument("--policies", nargs="+", choices=tuple(POLICIES), default=list(POLICIES), metavar="POLICY")
    sweeping.add_argument(
        "--grid", nargs="+", default=[], metavar="KNOB=VALUE,VALUE",
        help="values of a knob, for every policy that has it (default: "
        + " ".join(f"{knob}={','.join(map(str, values))}" for knob, values in sweep.GRID.items()) + ")",
    )  # fmt: skip
    add_chunk_argument(sweeping, sweep.CHUNKS_MS)
    add_beam_argument(sweeping)
    add_segmenter_arguments(sweeping)
    sweeping.add_argument("--speech", action="store_true", help="measure the speech too, which takes far longer")
    sweeping.add_argument("--asr", default="auto", choices=("auto", *RECOGNISERS), help="hears the speech")
    add_asr_model(sweeping)
    add_tokenizer(sweeping)
    add_latency_unit(sweeping)
    add_batch(sweeping)
    sweeping.add_argument(
        "--output", type=Path, required=True, help="a file for each point; sweep.md, .tsv, .json, .png"
    )

    talks = commands.add_parser("talks", help="join a manifest's sentences into talks")
    talks.add_argument("--manifest", type=Path, required=True)
    talks.add_argument("--audio-root", type=Path, help="of src_audio (default: the manifest's folder)")
    talks.add_argument("--count", type=int, default=10, help="how many (default: 10)")
    length = talks.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=5.0, help="length of each (default: 5)")
    length.add_argument("--sentences", type=int, help="or how many sentences each has")
    talks.add_argument(
        "--pause", type=float, nargs=2, default=[0.1, 1.0], metavar=("MIN", "MAX"), help="seconds (default: 0.1 1)"
    )
    talks.add_argument("--seed", type=int, default=1)
    talks.add_argument("--output", type=Path, required=True, help="folder for wavs, segments.yaml and texts")

    long = commands.add_parser("longform", help="whole talks in one session each: sentence ends, BLEU, latency")
    long.add_argument("--talks", type=Path, required=True, help="folder made by talks, or one of the same layout")
    long.add_argument("--limit", type=int, help="only the first N talks")
    add_model(long)
    add_policy_arguments(long)
    add_segmenter_arguments(long)
    add_batch(long)
    long.add_argument("--speech", action="store_true", help="speak too: latencies of what is heard (takes longer)")
    long.add_argument(
        "--computation-aware", action="store_true",
        help="measure computing times too: one talk at a time, in real chunks; let nothing else run",
    )  # fmt: skip
    long.add_argument("--resegmenter", choices=("auto", *longform.RESEGMENTERS), default="auto")
    long.add_argument(
        "--tolerance-words", type=float, default=longform.TOLERANCE_WORDS, metavar="N",
        help="a sentence end is right so many words from the true one (default: %(default)s)",
    )  # fmt: skip
    long.add_argument(
        "--tolerance-s", type=float, default=longform.TOLERANCE_S, metavar="S",
        help="or, by the clock, so many seconds (default: %(default)s)",
    )  # fmt: skip
    long.add_argument(
        "--output", type=Path, required=True, help="a file a talk; longform.json, hypothesis.jsonl (and -speech)"
    )

    cascading = commands.add_parser("cascade", help="Whisper's translation, spoken by the target voice: a baseline")
    add_whisper(cascading)
    cascading.add_argument("--no-voice", action="store_true", help="text alone")
    cascading.add_argument("--output", type=Path, required=True, help="folder for generate-<manifest>.jsonl and wav/")

    again = commands.add_parser("rerun", help="Whisper translating anew after every chunk: another baseline")
    add_whisper(again)
    again.add_argument("--chunk-ms", type=int, default=320, help="translate whenever so much came in (default: 320)")
    again.add_argument(
        "--agreement", type=int, default=2, metavar="N",
        help="give out what N translations in a row begin with (default: %(default)s)",
    )  # fmt: skip
    again.add_argument("--output", type=Path, required=True, help="folder for rerun-<manifest>.jsonl")

    reporting = commands.add_parser("report", help="tables, pictures and tests of several systems in one Markdown file")
    reporting.add_argument(
        "--system", action="append", default=[], metavar="NAME=PATH",
        help="generate-<subset>.jsonl, or what simul wrote; once for each system",
    )  # fmt: skip
    reporting.add_argument("--ceiling", metavar="NAME", help="the system of which the simultaneous ones reach a share")
    reporting.add_argument("--sweep", type=Path, metavar="DIR", help="what sweep wrote")
    reporting.add_argument("--longform", type=Path, metavar="DIR", help="what longform wrote")
    reporting.add_argument("--manifest", type=Path, help="for voices and, of a sweep, the recordings' lengths")
    reporting.add_argument("--target-lang", metavar="CODE", help="default: as config.yaml by the manifest says, or en")
    reporting.add_argument("--seed", type=int, default=1, help="of resampling and examples, from 1 (default: 1)")
    reporting.add_argument("--samples", type=int, default=1000, help="bootstrap samples (default: %(default)s)")
    reporting.add_argument("--examples", type=int, default=10, help="random examples (default: %(default)s)")
    reporting.add_argument("--output", type=Path, required=True, help="the Markdown file; its pictures lie beside it")

    speaking = commands.add_parser("resynthesis", help="how well a voice says units of recordings it never heard")
    speaking.add_argument("data", type=Path, help="corpus directory, or units.tsv with a column text")
    speaking.add_argument("--manifest", type=Path, help="which recordings, and their tgt_text (default: DATA/test.tsv)")
    speaking.add_argument("--limit", type=int, default=200, help="recordings, by hash (default: %(default)s)")
    speaking.add_argument("--seed", type=int, default=1, help="of the choice (default: 1)")
    add_vocoder_arguments(speaking)
    speaking.add_argument("--asr", default="auto", choices=("auto", *RECOGNISERS))
    add_asr_model(speaking)
    speaking.add_argument("--json", type=Path, metavar="FILE", help="gets the figures and what was heard, too")

    quiet = commands.add_parser("nospeech", help="words made of silence, noise, hum and music; right are none")
    quiet.add_argument("--minutes", type=float, default=10.0, help="of each sound (default: 10)")
    quiet.add_argument("--sounds", nargs="+", choices=tuple(no_speech.SOUNDS), default=list(no_speech.SOUNDS))
    quiet.add_argument("--seed", type=int, default=1)
    add_model(quiet)
    add_policy_arguments(quiet)
    add_segmenter_arguments(quiet)
    quiet.add_argument("--threads", type=int, default=1, help="CPU threads of the model (default: 1)")
    quiet.add_argument("--output", type=Path, metavar="FILE", help="gets the figures as JSON")

    args = parser.parse_args(argv)
    try:
        COMMANDS[args.command](args)
    except EchoStreamError as error:
        sys.exit(f"error: {error}")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint-dir", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--device", default="cpu")


def add_recordings(parser: argparse.ArgumentParser) -> None:
    """What is translated, by what."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", type=Path, help="corpus manifest with audio files (src_audio, tgt_text)")
    source.add_argument("--source", type=Path, help="list of recordings, one a line; with --target")
    parser.add_argument("--target", type=Path, help="list of reference texts, one a line")
    parser.add_argument("--audio-root", type=Path, help="of src_audio (default: the manifest's folder)")
    parser.add_argument("--limit", type=int, help="only the first N recordings")
    add_model(parser)


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sacrebleu-tokenizer", default="", metavar="NAME",
        help="of BLEU: zh, ja-mecab, char ... (default: the target language's, as sacrebleu chooses, or 13a)",
    )  # fmt: skip


def add_whisper(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--audio-root", type=Path, help="of src_audio (default: the manifest's folder)")
    parser.add_argument("--limit", type=int, help="only the first N recordings")
    parser.add_argument(
        "--whisper", type=Path, metavar="DIR",
        help="multilingual Whisper for CTranslate2 (default: Whisper base of the extra corpus)",
    )  # fmt: skip
    parser.add_argument("--source-lang", help="as Whisper calls it (default: that of config.yaml by the manifest)")
    parser.add_argument("--beam", type=int, default=5, help="of Whisper (default: %(default)s)")


def add_asr_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--asr-model", metavar="DIR",
        help="another Whisper to listen, a CTranslate2 directory (default: tiny.en; base for other languages)",
    )  # fmt: skip


def add_latency_unit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--eval-latency-unit", choices=("word", "char"), default="word", help="what AL and its like count (word)"
    )


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=int, default=8, help="recordings translated together, and lost together (default: 8)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model (default: 1)")
