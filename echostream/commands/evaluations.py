"""What each of echostream evaluate's commands does with its parsed options."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from echostream.audio.io import load_audio
from echostream.checkpoint import Bundle, load_bundle
from echostream.checkpoint.layout import config_path
from echostream.data.manifest import RECORDING, Utterance, read_manifest
from echostream.errors import EchoStreamError, MissingExtraError, require
from echostream.evaluation import longform, no_speech, quality, run, sweep
from echostream.evaluation.asr import Recogniser, load_recogniser
from echostream.evaluation.streams import stream, stream_live
from echostream.evaluation.systems import keep_heard, read_results, read_systems
from echostream.evaluation.table import markdown
from echostream.evaluation.talks import Talk, cut, make_talks, read_talks
from echostream.files import keep_apart, write_json, write_text
from echostream.loading import read_mapping
from echostream.output.words import WordTimes
from echostream.streaming.options import given_options, session_options
from echostream.text_file import read_lines
from echostream.vocode import load as load_voice


def language_of(directory: Path, side: str) -> str:
    """The ``source`` or ``target`` language of a data or checkpoint directory, without its region; empty if unknown."""
    path = config_path(directory)
    return str(read_mapping(path).get(f"{side}_lang") or "").partition("-")[0] if path.is_file() else ""


def listener(asr: str, language: str, model: str | None = None) -> Recogniser:
    """The recogniser for a target language."""
    return load_recogniser(asr) if language == "en" and model is None else load_recogniser(asr, model, language)


def offline_tables(args: argparse.Namespace) -> None:
    figures = {}
    keep_apart({"--output": args.output}, {f"the results {path}": path for path in args.results})
    for path in args.results:
        rows = read_results(path)
        figures[path.stem] = score_offline(
            rows, path, args.asr, args.target_lang, args.sacrebleu_tokenizer, args.asr_model
        )
        print(f"\n{path} ({len(rows)} utterances)\n")
        rows = [[part, name, f"{value:.2f}"] for part, name, value in figures[path.stem]]
        print(markdown(["part", "measure", "value"], rows))
    if args.output:
        write_json(args.output, figures)


def score_offline(
    rows: list[dict[str, Any]],
    path: Path,
    asr: str = "auto",
    language: str = "en",
    tokenizer: str = "",
    asr_model: str | None = None,
) -> list[tuple[str, str, float]]:
    """(part, measure, value) for every part whose hypotheses and references are there. Rates are in percent.

    What was heard in the recordings is kept beside ``path``, the rows' file, for the report.
    """
    english, tokenizer = language == "en", tokenizer or quality.tokenizer_for(language)
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
    add("ST CTC (target text)", "BLEU", partial(quality.bleu, tokenizer=tokenizer), "st", "mt_ref")
    add("ST CTC (target text)", "chrF", quality.chrf, "st", "mt_ref")
    add("MT (target text)", "BLEU", partial(quality.bleu, tokenizer=tokenizer), "mt", "mt_ref")
    add("MT (target text)", "chrF", quality.chrf, "mt", "mt_ref")
    add("units", "unit error rate", quality.unit_error_rate, "units", "units_ref")
    wavs = column("wav")
    if wavs is not None and asr != "none":
        engine = listener(asr, language, asr_model)
        for row in tqdm(rows, desc=f"listening ({engine.name})"):
            row["heard"] = engine.transcribe_file(path.parent / row["wav"])
        keep_heard(path, engine.name, {str(row["id"]): row["heard"] for row in rows})
        asr_bleu = partial(quality.asr_bleu, tokenizer=tokenizer, numbers=english)
        add(f"speech ({engine.name})", "ASR-BLEU", asr_bleu, "heard", "mt_ref")
        error_rate = partial(quality.word_error_rate, numbers=english)
        add(f"speech ({engine.name})", "WER against MT", error_rate, "heard", "mt")
    if not figures:
        raise EchoStreamError("the results hold no hypothesis with its reference (asr, st, mt, units with *_ref)")
    return figures


def simultaneous_table(args: argparse.Namespace) -> None:
    sources, references = read_pairs(args, "src_text" if args.output_type == "source" else "tgt_text")
    results = {}
    target = language_of(args.checkpoint_dir, "target") or "en"
    tokenizer = args.sacrebleu_tokenizer or quality.tokenizer_for(target)
    scoring = {"unit": args.eval_latency_unit, "tokenizer": tokenizer, "model": args.asr_model, "language": target}
    for chunk in args.chunk_ms:
        folder = args.output / f"chunk{chunk}"
        print(f"chunk {chunk} ms: {len(sources)} recordings", file=sys.stderr)
        options = {"checkpoint_dir": args.checkpoint_dir, "chunk_ms": chunk, "device": args.device}
        options |= {"output_type": args.output_type, **given_options(args)}
        run.simulate(sources, references, folder, options, args.jobs)
        results[chunk] = run.score(folder, args.asr, args.output_type, **scoring)
    listener = run.recogniser_name(args.output / f"chunk{args.chunk_ms[-1]}")
    about = {"recordings": len(sources), "asr": listener, "output_type": args.output_type}
    about["options"] = {name: str(value) for name, value in given_options(args).items()}
    write_json(args.output / "results.json", {**about, "chunks": results})
    print(f"\n{len(sources)} recordings; ASR is {listener}; times in ms, computation-aware ones in brackets\n")
    quality_names, latencies = run.QUALITY[args.output_type], run.latencies(args.output_type)
    rows = [
        [
            f"{chunk} ms",
            *(f"{figures[name]:.2f}" for name in quality_names),
            *(f"{figures[name]:.0f} ({figures[name + '_CA']:.0f})" for name in latencies),
            f"{figures['RTF']:.3f}",
        ]
        for chunk, figures in results.items()
    ]
    print(markdown(["chunk", *(name.replace("_", "-") for name in quality_names), *latencies, "RTF"], rows))


def policy_sweep(args: argparse.Namespace) -> None:
    points = sweep.plan(args.policies, sweep.parse_grid(args.grid), args.chunk_ms)
    sources, references = read_pairs(args)
    bundle = load(args)
    target = bundle.target_lang.partition("-")[0] or "en"
    recogniser = listener(args.asr, target, args.asr_model) if args.speech else None
    scoring = (target, args.sacrebleu_tokenizer or quality.tokenizer_for(target), args.eval_latency_unit)
    of = {
        "model": bundle.digest,
        "recordings": len(sources),
        "data": sweep.fingerprint([source.name for source in sources], references),
        "segmenter": {name: str(value) for name, value in given_options(args).items()},
        "speech": recogniser.name if recogniser else None,
    }
    if scoring[1:] != (quality.TOKENIZER, "word"):
        of["scoring"] = list(scoring[1:])

    def options(point: sweep.Point) -> dict[str, Any]:
        said = {**vars(args), **dict(point.knobs), "policy": point.policy, "chunk_ms": point.chunk_ms}
        return {"speech": args.speech, **session_options(argparse.Namespace(**said), bundle)}

    settled = [(point, options(point)) for point in points]  # a bad knob is known before hours of work
    results = []
    for point, chosen in tqdm(settled, desc="sweep", unit="point"):
        path = args.output / "points" / f"{point.name}.json"
        result = sweep.read_result(path, of)
        if result is None:
            recordings = map(load_audio, tqdm(sources, desc=point.name, leave=False))
            streamed = list(stream(bundle, recordings, chosen, args.batch))
            figures = sweep.measure(streamed, references, recogniser, *scoring)
            result = {"of": of, "figures": figures, "texts": [s.text for s in streamed]}
            sweep.write_result(path, result)
        results.append((point, result["figures"]))
    print(sweep.report(results, args.output, f"{len(sources)} recordings; latencies in ms"))
    print(f"\npicture: {args.output / 'sweep.png'}")


def join_talks(args: argparse.Namespace) -> None:
    rows = read_manifest(args.manifest, need=RECORDING)
    root = args.audio_root or args.manifest.parent
    talks = make_talks(rows, root, args.output, args.count, args.minutes, args.sentences, tuple(args.pause), args.seed)
    minutes = sum(talk.seconds for talk in talks) / 60
    print(f"{len(talks)} talks, {sum(len(t.segments) for t in talks)} sentences, {minutes:.1f} minutes: {args.output}")


def longform_table(args: argparse.Namespace) -> None:
    talks = read_talks(args.talks)[: args.limit]
    bundle = load(args)
    resegmenter = longform.choose_resegmenter(args.resegmenter)
    if args.speech and bundle.vocoder is None:
        raise EchoStreamError(f"{args.checkpoint_dir} has no vocoder; leave --speech out")
    chosen = session_options(args, bundle)
    options, silent = {"speech": args.speech, **chosen}, {"speech": False, **chosen}

    def file_of(talk: Talk) -> tuple[Path, dict[str, Any]]:
        of = {
            "model": bundle.digest,
            "data": sweep.fingerprint([talk.path.name], talk.references),
            "options": {name: repr(getattr(value, "name", value)) for name, value in options.items()},
        }
        if args.computation_aware:
            of["computation_aware"] = True
        return args.output / "talks" / f"{talk.path.stem}.json", of

    missing = [talk for talk in talks if sweep.read_result(*file_of(talk)) is None]
    seconds = sum(t.seconds + sum(segment.duration for segment in t.segments) for t in missing)
    with tqdm(total=round(seconds), desc="talks, and their sentences alone", unit="s") as bar:
        for start in range(0, len(missing), args.batch):
            group = missing[start : start + args.batch]
            recordings = [load_audio(talk.path) for talk in group]
            if args.computation_aware:
                whole = (stream_live(bundle, samples, options, bar) for samples in recordings)
            else:
                whole = ((found, None) for found in stream(bundle, recordings, options, args.batch, bar))
            for talk, samples, (plain, aware) in zip(group, recordings, whole):
                sentences = (cut(samples, segment) for segment in talk.segments)
                alone = [s.text for s in stream(bundle, sentences, silent, args.batch, bar)]
                path, of = file_of(talk)
                spoken = longform.TalkOutput(
                    [w.text for w in plain.words], milliseconds(plain.written), plain.ends, alone,
                    heard=milliseconds(plain.heard), elapsed=milliseconds(aware and aware.written),
                    heard_elapsed=milliseconds(aware and aware.heard),
                )  # fmt: skip
                result = {"of": of, "source_length": 1000 * plain.seconds, "spoken": asdict(spoken)}
                sweep.write_result(path, result)
    results = [sweep.read_result(*file_of(talk)) for talk in talks]
    # SimulEval's layout, so that `omnisteval longform` can score the same talks by itself.
    for name, plain, aware in (("", "delays", "elapsed"), ("-speech", "heard", "heard_elapsed")):
        lines = [
            {
                "source": talk.path.name,
                "prediction": " ".join(result["spoken"]["words"]),
                "delays": result["spoken"][plain],
                **({"elapsed": result["spoken"][aware]} if args.computation_aware else {}),
                "source_length": result["source_length"],
            }
            for talk, result in zip(talks, results)
            if result["spoken"].get(plain) is not None
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if text:
            write_text(args.output / f"hypothesis{name}.jsonl", text)
    figures = longform.score(
        talks,
        [longform.TalkOutput(**result["spoken"]) for result in results],
        resegmenter,
        bundle.target_lang,
        args.tolerance_words,
        args.tolerance_s,
    )
    figures |= {"tolerance_words": args.tolerance_words, "tolerance_s": args.tolerance_s, "talks": len(talks)}
    write_json(args.output / "longform.json", figures)
    rows = [[name, f"{value:.3f}" if isinstance(value, float) else str(value)] for name, value in figures.items()]
    print(markdown(["measure", "value"], rows))


def milliseconds(words: WordTimes | None) -> list[float] | None:
    return None if words is None else [1000 * word.seconds for word in words.words]


def cascade_results(args: argparse.Namespace) -> None:
    from echostream.data.corpus.tts import Hibari
    from echostream.evaluation.cascade import run_cascade

    rows, translator = whisper_baseline(args)
    voice = None if args.no_voice else Hibari()
    results = args.output / f"generate-{args.manifest.stem}.jsonl"
    print(run_cascade(rows, args.audio_root or args.manifest.parent, results, translator, voice))


def rerun_table(args: argparse.Namespace) -> None:
    from echostream.evaluation.rerun import run_again

    for name in ("chunk_ms", "agreement"):
        if getattr(args, name) < 1:
            raise EchoStreamError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    rows, translator = whisper_baseline(args)
    results = args.output / f"rerun-{args.manifest.stem}.jsonl"
    found = run_again(rows, args.audio_root or args.manifest.parent, results, translator, args.chunk_ms, args.agreement)
    row = [f"{found['BLEU']:.1f}", f"{found['AL']:.0f}", f"{found['LAAL']:.0f}", f"{found['silent']:.0f}"]
    print(markdown(["BLEU", "AL ms", "LAAL ms", "silent", "CPU s a second"], [[*row, f"{found['RTF']:.2f}"]]))
    print(results)


def whisper_baseline(args: argparse.Namespace) -> tuple[list[Utterance], Recogniser]:
    """What is to be translated, and the Whisper that does it."""
    from echostream.evaluation.asr import Whisper
    from echostream.units.features import packaged_whisper

    require("faster_whisper", "simuleval")
    rows = read_manifest(args.manifest, need=RECORDING)[: args.limit]
    source = args.source_lang or language_of(args.manifest.parent, "source")
    target = language_of(args.manifest.parent, "target") or "en"
    if target != "en":
        raise EchoStreamError(f"Whisper translates into English only, not into {target!r}")
    translator = Whisper(args.whisper or packaged_whisper(), source or "en", "translate", args.beam)
    if not source:
        raise EchoStreamError(f"{args.manifest.parent} has no config.yaml that tells the language; say --source-lang")
    return rows, translator


def write_report(args: argparse.Namespace) -> None:
    from echostream.evaluation import report

    named = [tuple(text.partition("=")[::2]) for text in args.system]
    wrong = [text for text, (name, path) in zip(args.system, named) if not name or not path]
    if wrong:
        raise EchoStreamError(f"--system {wrong[0]!r} is not NAME=PATH")
    rows = read_manifest(args.manifest, need=RECORDING) if args.manifest else []
    if len({name for name, _ in named}) < len(named):
        raise EchoStreamError("two systems have one name; give each its own: --system NAME=PATH")
    systems = read_systems({name: Path(path) for name, path in named}, rows)
    inputs = {"--manifest": args.manifest, **{f"--system {name}": path for name, path in named}}
    keep_apart({"--output": args.output}, inputs)
    language = args.target_lang or (language_of(args.manifest.parent, "target") if args.manifest else "") or "en"
    options = report.Options(args.seed, args.samples, args.examples, args.ceiling, language)
    report.write(args.output, systems, rows, args.sweep, args.longform, options)
    print(args.output)


def resynthesis_table(args: argparse.Namespace) -> None:
    import torch

    from echostream.evaluation import resynthesis
    from echostream.evaluation.mos import DNSMOS

    torch.set_num_threads(args.threads)
    items = resynthesis.read_sentences(args.data, args.manifest, args.limit, args.seed)
    try:
        mos = DNSMOS(args.threads)
    except MissingExtraError as error:
        mos = None
        print(f"without DNSMOS: {error}", file=sys.stderr)
    model = load_voice(args.vocoder, args.config, args.device)
    data = args.data if args.data.is_dir() else args.data.parent
    target = language_of(data, "target") or "en"
    recogniser = listener(args.asr, target, args.asr_model)
    report = resynthesis.measure(model, items, recogniser, mos, target)
    print(f"\n{len(items)} recordings; heard by {report['recogniser']}\n")
    print(markdown(["measure", "original", "resynthesis", "bar", "reached"], resynthesis.table(report)))
    if args.json:
        write_json(args.json, report)


def no_speech_table(args: argparse.Namespace) -> None:
    bundle = load(args)
    options = {"speech": False, **session_options(args, bundle)}
    results, rows = {}, []
    for name in tqdm(args.sounds, unit="sound"):
        found = no_speech.listen(bundle, name, 60 * args.minutes, options, args.seed)
        results[name] = found._asdict()
        rows.append([name, f"{args.minutes:g}", str(found.target), str(found.source), found.text[:60]])
    print(markdown(["sound", "minutes", "words", "words of the transcript", "begins"], rows))
    if args.output:
        write_json(args.output, {"model": bundle.digest, "gate": args.speech_gate or "on", "sounds": results})


def load(args: argparse.Namespace) -> Bundle:
    import torch

    batch = getattr(args, "batch", 1)
    if args.threads < 1 or batch < 1:
        raise EchoStreamError(f"--threads {args.threads} and --batch {batch} must be at least 1")
    torch.set_num_threads(args.threads)
    return load_bundle(args.checkpoint_dir, args.device)


def read_pairs(args: argparse.Namespace, column: str = "tgt_text") -> tuple[list[Path], list[str]]:
    """Recordings and references, from a manifest (its ``column``) or from two lists."""
    if args.manifest is not None:
        root = args.audio_root or args.manifest.parent
        rows = read_manifest(args.manifest, need=("id", "src_audio", column))[: args.limit]
        packed = [row.id for row in rows if ".zip:" in row.audio or row.audio.endswith(".npy")]
        if packed:
            raise EchoStreamError(f"row {packed[0]!r} of {args.manifest} holds features; the agent needs recordings")
        return [root / row.audio for row in rows], [getattr(row, column) for row in rows]
    if args.target is None:
        raise EchoStreamError("--source needs --target, the list of reference translations")
    lists = []
    for path in (args.source, args.target):
        lists.append([line.strip() for line in read_lines(path, what="list")][: args.limit])
    return [Path(line) for line in lists[0]], lists[1]


COMMANDS = {
    "offline": offline_tables,
    "simul": simultaneous_table,
    "sweep": policy_sweep,
    "talks": join_talks,
    "longform": longform_table,
    "cascade": cascade_results,
    "rerun": rerun_table,
    "report": write_report,
    "resynthesis": resynthesis_table,
    "nospeech": no_speech_table,
}
