"""Steps beside the chain: other people's texts, recordings, translations and corpora."""

from __future__ import annotations

import argparse
from collections import Counter

from echostream.data.config import DataConfig
from echostream.data.corpus import catalogues, recordings, streamspeech, teach
from echostream.data.corpus.notes import note_step, progress_bar
from echostream.data.corpus.rows import Ledger
from echostream.data.manifest import read_manifest
from echostream.data.manifest import write_manifest as write_utterances
from echostream.errors import ConfigError, ManifestError
from echostream.files import keep_apart
from echostream.streaming.segmenters.silero import load_silero


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
        args.output,
        args.directories,
        args.source_lang,
        args.target_lang,
        args.message_lang,
        args.exclude,
        catalogues.Limits(args.min_words, args.max_words, args.fragments),
        progress_bar("catalogues", unit="file"),
    )
    written = {name: counts.pop(name) for name in ("pairs", "words", "catalogues")}
    print(", ".join(f"{count} {name}" for name, count in written.items()) + f"; left out: {dict(counts)}")


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
    written = {}
    counts: Counter[str] = Counter()
    for task in tasks:
        ledger = Ledger(
            args.output.parent / "teach",
            f"{args.output.stem}-{task}",
            teach.LEDGER_COLUMNS,
            args.shard,
            args.num_shards,
        )
        counts += teach.write_hypotheses(
            ledger,
            whisper,
            utterances,
            args.audio_root or config.root,
            task,
            args.batch_size,
            args.shard,
            args.num_shards,
            progress_bar(task, unit="batch"),
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
        args.output,
        found,
        load_silero(args.vad_model),
        cut,
        f".{args.audio_format}",
        args.shard,
        args.num_shards,
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
