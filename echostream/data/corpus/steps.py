"""The steps of ``echostream prepare``; ``cli`` says what each is asked for."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from echostream.audio.features import feature_extractor
from echostream.constants import NUM_SPECIALS, SAMPLE_RATE
from echostream.data.corpus import cluster, languages, manifests, sources, speech, target_units, tts, voices
from echostream.data.corpus.normalize import count_words
from echostream.data.corpus.notes import (
    check_splits,
    note_step,
    noted_language,
    progress_bar,
    read_note,
    speech_ledger,
    speech_sets,
    target_settings,
)
from echostream.data.corpus.rows import Ledger, Row, Skipped, read_rows, read_table, write_rows, write_table
from echostream.data.corpus.subwords import train_subwords, write_unit_dictionary
from echostream.errors import ManifestError, require
from echostream.evaluation.systems import read_results
from echostream.files import keep_apart, write_json
from echostream.text_file import read_json
from echostream.units.features import UnitFeatures, build_features
from echostream.units.kmeans import KMeans, load_kmeans
from echostream.whisper.source import whisper_source
from echostream.whisper.subwords import write_whisper_subwords
from echostream.whisper.tokens import WhisperBPE

DEFAULT_UNITS = 1000


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
    train = [
        r
        for r in rows
        if r.split == "train" and max(count_words(r.src_text), count_words(r.tgt_text)) <= args.vocab_max_words
    ]
    pieces = {}
    for side, name, size in (
        ("src_text", "src", args.source_vocab_size or args.vocab_size),
        ("tgt_text", "tgt", args.vocab_size),
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
    _run_shards(record_speech, args, f"speech/{args.set}.*-of-*.tsv", f"speech {args.set}")


def record_speech(args: argparse.Namespace) -> cluster.Outcome:
    """One shard of a set of recordings. Returns what the step notes: its name, and facts."""
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
    )  # fmt: skip
    facts = {"voices": list(getattr(engine, "voices", ())), "engine_version": getattr(engine, "version", None)}
    return f"speech-{args.set}", {"counts": dict(counts), **facts}


def _run_shards(
    run: Callable[[argparse.Namespace], cluster.Outcome], args: argparse.Namespace, ledger: str, title: str
) -> None:
    """A step's shard in this process, or all of its shards on a cluster; noted and told."""
    if getattr(args, "executor", "local") == "ray":
        name, facts = cluster.run_sharded(run, args, ledger, require("tqdm", "all").tqdm(desc=title, unit="row"))
    else:
        name, facts = run(args)
    note_step(args, name, **facts)
    print(f"{title}: {facts['counts']}")


def run_target(args: argparse.Namespace) -> None:
    _run_shards(record_target, args, "target/speech.*-of-*.tsv", "target")


def record_target(args: argparse.Namespace) -> cluster.Outcome:
    """One shard of the target speech. Returns as ``record_speech``."""
    rows = {row.row: row for row in read_rows(args.output / "rows.tsv")}
    names = args.sets or speech_sets(args.output)
    wanted = [rows[line["row"]] for name in names for line in speech_ledger(args.output, name).values()]
    wanted.sort(key=lambda row: ("test", "dev", "train").index(row.split))
    if args.sample:
        wanted += speech.Selection("train", 6, 12, limit=args.sample, order="hash").choose(rows.values())
    engine = None
    if any(not row.tgt_audio for row in wanted):
        language = noted_language(args.output, "target")
        engine = voices.target_engine(args.target_engine, language, args.target_voice, args.kokoro_voices)
    counts = speech.target_speech(
        args.output,
        wanted,
        engine,
        args.seed,
        args.max_seconds,
        f".{args.audio_format}",
        args.shard,
        args.num_shards,
        progress=progress_bar("target"),
    )
    return "target", {"counts": dict(counts), "engine_version": getattr(engine, "version", None)}


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
                                max_rank=0, limit=limit, order=order, exclude_set=[]))  # fmt: skip
    run_target(_of_step(args, "target"))
    run_units(_of_step(args, "units"))
    run_manifests(_of_step(args, "manifests"))


def _of_step(args: argparse.Namespace, step: str, **settings: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "step": step, **settings})


def run_units(args: argparse.Namespace) -> None:
    on_cluster = getattr(args, "executor", "local") == "ray"
    if on_cluster:
        _, model, _ = fit_units(args)  # once, before anything is shared out
    _run_shards(assign_units, args, "units/*.*-of-*.tsv", "units")
    if on_cluster:  # two shards that finish together may have missed each other's last lines
        target_units.write_units(args.output, target_units.units_ledger(args.output, model))


def assign_units(args: argparse.Namespace) -> cluster.Outcome:
    """One shard of the units. Returns as ``record_speech``."""
    features, model, recordings = fit_units(args)
    facts = {
        "features": features.name,
        "num_units": len(model),
        "ledger": target_units.units_ledger(args.output, model).name,
    }
    note_step(args, "units", **facts)  # already here: manifests can be written while units are being made
    counts = target_units.assign_units(
        args.output, features, model, list(recordings), args.shard, args.num_shards, progress_bar("units")
    )
    return "units", {**facts, "counts": dict(counts)}


def fit_units(args: argparse.Namespace) -> tuple[UnitFeatures, KMeans, dict[str, dict[str, str]]]:
    """Features, the k-means that is there or is fitted now, and the target recordings."""
    rows = read_rows(args.output / "rows.tsv")
    recordings = Ledger(args.output / "target", "speech", speech.TARGET_COLUMNS).read()
    if not recordings:
        raise ManifestError(f"{args.output / 'target'} has no recordings; run the step 'target' first")
    features = build_features(args.features, args.features_model, args.layer, args.compute_type)
    model: KMeans | None
    if args.kmeans:
        model = load_kmeans(args.kmeans)
        model.save(args.output / "units" / "kmeans.npz")  # it goes with the model, and so to further pairs
    else:
        model = target_units.existing_kmeans(args.output, features, args.num_units)
    if model is None:
        if args.shard:
            raise ManifestError("k-means has not been fitted; run shard 0 first, the others when it says 'fitted'")
        train = {row.target for row in rows if row.split == "train"}
        paths = [args.output / "target" / line["audio"] for name, line in recordings.items() if name in train]
        model = target_units.fit_units(
            args.output,
            features,
            paths,
            args.num_units,
            args.fit_frames,
            args.positions,
            args.seed,
            progress_bar("k-means", unit="it"),
        )
        print(f"units: k-means fitted, {len(model)} units of {features.name}", flush=True)
    return features, model, recordings


def run_manifests(args: argparse.Namespace) -> None:
    rows = {row.row: row for row in read_rows(args.output / "rows.tsv")}
    text = read_note(args.output, "text")
    if args.without_units and not (args.output / "steps" / "units.json").is_file():
        units_note, units = {"num_units": DEFAULT_UNITS}, {}
    else:
        units_note, table = read_note(args.output, "units"), args.output / "target" / "units.tsv"
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
        check_splits(name, lines, rows)
        path = args.output / f"{name}.tsv"
        tally = manifests.write_manifest(path, lines, rows, units, args.without_units)
        counts[name] = {
            "sets": sets,
            "utterances": tally["written"],
            "without_units": tally["no units"],
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
    fixed = feature_extractor(features).cmvn
    if fixed is not None:
        fixed.save(args.output / "gcmvn.npz")
    elif args.cmvn_utterances and train:
        frames = manifests.write_cmvn(
            args.output / "gcmvn.npz",
            args.output / f"{train}.tsv",
            args.output,
            args.cmvn_utterances,
            args.seed,
            progress_bar("cmvn"),
        )
    pair = text["settings"]["source_lang"], text["settings"]["target_lang"]
    manifests.write_config(args.output / "config.yaml", *pair, units_note["num_units"], features)
    skipped = [
        list(line.values())
        for path in sorted((args.output / "skipped").glob("*.tsv"))
        for line in read_table(path, Skipped.COLUMNS)
    ]
    write_table(args.output / "skipped.tsv", Skipped.COLUMNS, skipped)
    targets = Ledger(args.output / "target", "speech", speech.TARGET_COLUMNS).read()
    note_step(args, "manifests", cmvn_frames=frames)
    corpus = {
        "languages": pair,
        "pairs": text["pairs"],
        "manifests": counts,
        "text_pairs": pairs,
        "target": {
            "recordings": len(targets),
            "with_units": len(units),
            "num_units": units_note["num_units"],
            "hours": round(sum(int(line["samples"]) for line in targets.values()) / SAMPLE_RATE / 3600, 3),
        },
        "ctc": ctc,
        "skipped": dict(Counter(f"{step}: {reason}" for step, _, reason, _ in skipped)),
        "steps": {path.stem: read_json(path) for path in sorted((args.output / "steps").glob("*.json"))},
    }
    write_json(args.output / "corpus.json", corpus, ensure_ascii=False)
    for name, facts in counts.items():
        print(
            f"{name}: {facts['utterances']} utterances, {facts['source_hours']} h, "
            f"{facts['without_units']} without units"
        )
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
    settings = target_settings(args.output)
    engine = voices.target_engine(
        settings.get("target_engine", "hibari"),
        noted_language(args.output, "target"),
        settings.get("target_voice"),
        args.kokoro_voices,
    )
    counts = speech.target_speech(
        args.output,
        list(own.values()),
        engine,
        args.seed,
        args.max_seconds,
        f".{args.audio_format}",
        args.shard,
        args.num_shards,
        progress=progress_bar("respeak"),
    )
    print(f"respeak: {dict(counts)}")
    run_units(_of_step(args, "units"))
    units = {line["id"]: line for line in read_table(args.output / "target" / "units.tsv", target_units.UNIT_COLUMNS)}
    # Recordings of one pair have texts of their own; and ids, so that both manifests can be trained on together.
    lines = [{**recordings[name], "id": f"own-{name}", "row": name} for name in own]
    tally = manifests.write_manifest(args.output / f"{args.manifest}.tsv", lines, own, units)
    note_step(args, f"respeak-{args.manifest}", counts={**counts, **tally})
    print(f"{args.manifest}: {tally['written']} utterances, {tally['no units']} without units")


def _speaker(voice: str) -> str:
    """A voice without its speed and pitch, espeak-ng's variants taken together."""
    name = voice.split(" ")[0]
    return f"espeak-ng {name.split('+')[0]}" if "+" in name else name


def _source_engine(args: argparse.Namespace) -> tts.Engine | None:
    if args.engine == "none":
        return None
    language = noted_language(args.output, "source")
    return voices.source_engine(args.engine, language, args.voices, args.split, args.kokoro_voices)
