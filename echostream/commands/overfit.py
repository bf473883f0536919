"""Can the whole chain learn? Memorise 64 utterances, then compare what comes out with what went in.

    echostream overfit --data data/es-en --work runs/overfit

Trains in rounds, ``--min-update`` at least, until the validation figures (on the very same utterances) leave room below
the bars, or ``--max-update`` is reached; then decodes by fairseq-generate and by the streaming session, and prints a
table. The exit status is 0 only if every bar is met. A run that was stopped goes on where it was. Further flags go to
fairseq-train.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from echostream.commands.train import PACKAGE
from echostream.data.config import DataConfig
from echostream.data.manifest import Utterance, read_manifest, write_manifest
from echostream.data.source import is_features
from echostream.errors import EchoStreamError, ManifestError
from echostream.evaluation.run import environment
from echostream.files import write_text
from echostream.text_file import read_json_lines

# Training flags: nothing that keeps a model from memorising. The training mask lets it translate unfinished speech too.
FLAGS: dict[str, Any] = {
    "arch": "echostream_small",
    "dropout": 0.0,
    "attention-dropout": 0.0,
    "activation-dropout": 0.0,
    "label-smoothing": 0.0,
    "join-probability": 0.0,
    "mt-visible": "ctc",
    "optimizer": "adam",
    "adam-betas": "(0.9,0.98)",
    "lr": 0.0005,
    "lr-scheduler": "inverse_sqrt",
    "warmup-updates": 250,
    "clip-norm": 10.0,
    "max-tokens": 3200,
    "autocast": "bfloat16",
    "num-workers": 0,
    "valid-subset": "dev",
    "eval-bleu": True,
    "validate-interval": 1_000_000,  # only when a round ends
    "save-interval": 1_000_000,
    "no-epoch-checkpoints": True,
    "log-format": "simple",
    "log-interval": 5,
    "seed": 1,
}
BARS = {"asr_ter": 5.0, "st_ter": 5.0, "uer": 10.0}  # percent, at most
ENOUGH = {"asr_ter": 2.0, "st_ter": 2.0, "uer": 5.0}  # where training may stop
NAMES = {"asr_ter": "ASR CTC token error %", "st_ter": "ST CTC token error %", "uer": "unit error %"}
FIGURE = re.compile(r"(\w+)[= ](-?\d+(?:\.\d+)?(?:e-?\d+)?)(?=[ ,|]|$)")  # in fairseq's log lines
OFFLINE_SHARE, STREAMED_SHARE = 60 / 64, 50 / 64


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "echostream overfit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="data directory")
    parser.add_argument("--work", type=Path, default=Path("runs/overfit"), help="directory to work in")
    parser.add_argument("--utterances", type=int, default=64)
    parser.add_argument("--round", type=int, default=200, help="updates between looks at the figures")
    parser.add_argument("--min-update", type=int, default=1000, help="beam search is right later than greedy search")
    parser.add_argument("--max-update", type=int, default=2000)
    parser.add_argument("--chunk-ms", type=int, default=320, help="of the streaming session")
    parser.add_argument("--skip-streaming", action="store_true", help="leave the simultaneous translation out")
    args, further = parser.parse_known_args(argv)
    try:
        rows = overfit(args, further)
    except EchoStreamError as error:
        sys.exit(f"error: {error}")
    width = max(len(name) for name, *_ in rows)
    print(f"\n{'measure':{width}}  {'value':>8}  {'bar':>8}")
    for name, value, bar, passed in rows:
        print(f"{name:{width}}  {value:>8}  {bar:>8}  {'PASS' if passed else 'FAIL'}")
    sys.exit(0 if all(passed for *_, passed in rows) else 1)


def overfit(args: argparse.Namespace, further: Sequence[str]) -> list[tuple[str, str, str, bool]]:
    """Train, decode and compare: rows of (measure, value, bar, passed)."""
    data = args.work / "data"
    utterances = choose(args.data, args.utterances)
    copy_data(args.data, data, utterances)
    figures = train(args, data, further)
    rows = [(NAMES[k], f"{figures[k]:.2f}", f"<= {bar:g}", figures[k] <= bar) for k, bar in BARS.items()]
    target = DataConfig.load(data).target
    # A reference as the subwords spell it; SentencePiece unifies some characters.
    references = {u.id: target.decode(target.encode(u.tgt_text)) for u in utterances}

    def count(name: str, texts: dict[str, str], share: float) -> None:
        right = sum(texts[key] == reference for key, reference in references.items())
        least = int(np.ceil(share * len(references)))
        rows.append((name, f"{right}/{len(references)}", f">= {least}", right >= least))

    count("fairseq-generate: MT = reference", generate(args, data), OFFLINE_SHARE)
    if not args.skip_streaming:
        count(f"simultaneous, {args.chunk_ms} ms: MT = reference", stream(args, data, utterances), STREAMED_SHARE)
    return rows


def choose(data: Path, count: int) -> list[Utterance]:
    """Utterances of ordinary length from the training split, the same ones every time, no translation twice.

    Raises:
        ManifestError: the split has too few.
    """
    rows = [u for u in read_manifest(data / "train.tsv") if not is_features(u.audio)]
    middle = np.median([u.n_frames for u in rows])
    order = np.random.default_rng(1).permutation(len(rows))
    chosen: dict[str, Utterance] = {}
    for u in (rows[i] for i in order):
        if abs(u.n_frames / middle - 1) < 0.4:
            chosen.setdefault(u.tgt_text.lower(), u)
        if len(chosen) == count:
            return list(chosen.values())
    raise ManifestError(f"{data / 'train.tsv'} has only {len(chosen)} utterances to choose from, not {count}")


def copy_data(source: Path, target: Path, utterances: Sequence[Utterance]) -> None:
    """A data directory of ``utterances`` alone, for training and validation; recordings stay where they are."""
    target.mkdir(parents=True, exist_ok=True)
    config = DataConfig.load(source)
    values = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8")) or {}
    values["audio_root"] = str(config.root.resolve())
    write_text(target / "config.yaml", yaml.safe_dump(values))
    for name in ("spm_src", "spm_tgt", "dict_src", "dict_tgt", "dict_unit", "gcmvn"):
        (target / getattr(config, name)).write_bytes(config.path(name).read_bytes())
    for split in ("train", "dev"):
        write_manifest(target / f"{split}.tsv", utterances)


def train(args: argparse.Namespace, data: Path, further: Sequence[str]) -> dict[str, float]:
    """Train round by round; the figures of the last validation."""
    import torch

    flags = {**FLAGS, "save-dir": str(args.work / "checkpoints")}
    if not torch.cuda.is_available():
        flags["cpu"] = True
    write_text(args.work / "train.yaml", yaml.safe_dump(flags))
    command = [sys.executable, "-m", "echostream", "train", "--config", str(args.work / "train.yaml")]
    figures: dict[str, float] = {}
    with tqdm(total=args.max_update, desc="training", unit="update") as bar:
        for limit in range(args.round, args.max_update + args.round, args.round):
            limit = min(limit, args.max_update)
            found = run_training([*command, "--data", str(data), "--max-update", str(limit), *further], bar)
            figures = found or figures
            if found:
                tqdm.write(f"{bar.n} updates: " + ", ".join(f"{k} {found[k]:.2f}" for k in (*ENOUGH, "bleu")))
            learnt = figures and all(figures[name] <= most for name, most in ENOUGH.items()) and figures["bleu"] > 98
            if learnt and limit >= args.min_update:
                break
    return figures


def run_training(command: Sequence[str], bar: tqdm) -> dict[str, float]:
    """One round; the figures of its validation, empty where an earlier run had done it already.

    Raises:
        EchoStreamError: the training failed; what it said last.
    """
    figures: dict[str, float] = {}
    last: list[str] = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), errors="replace"
    )
    for line in process.stdout or ():
        last = [*last[-20:], line.rstrip()]
        values = {name: float(value) for name, value in FIGURE.findall(line)}
        if "train_inner" in line and "num_updates" in values:
            bar.update(int(values["num_updates"]) - bar.n)
            bar.set_postfix({name: values[name] for name in ("loss", "audio_s_per_s") if name in values})
        if "valid on 'dev' subset" in line and "bleu" in values:
            figures = values
            bar.update(int(values["num_updates"]) - bar.n)
    if process.wait():
        print("\n".join(last), file=sys.stderr)
        raise EchoStreamError(f"training ended with status {process.returncode}; its last words are above")
    return figures


def generate(args: argparse.Namespace, data: Path) -> dict[str, str]:
    """fairseq-generate's MT output of every utterance."""
    results = args.work / "generate"
    command = [sys.executable, "-m", "fairseq_cli.generate", str(data), "--user-dir", str(PACKAGE)]
    command += ["--task", "echostream_s2st", "--path", str(args.work / "checkpoints" / "checkpoint_last.pt")]
    command += ["--gen-subset", "dev", "--beam", "5", "--max-tokens", "20000", "--results-path", str(results)]
    command += ["--post-process", "sentencepiece", "--scoring", "sacrebleu", "--num-workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), errors="replace")
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise EchoStreamError(f"fairseq-generate ended with status {done.returncode}; its last words are above")
    return {row["id"]: row["mt"] for row in read_json_lines(results / "generate-dev.jsonl", EchoStreamError)}


def stream(args: argparse.Namespace, data: Path, utterances: Sequence[Utterance]) -> dict[str, str]:
    """What the streaming session, the engine of the agent, has written when each recording ends."""
    from echostream.audio.io import load_audio
    from echostream.checkpoint import load_bundle
    from echostream.streaming.events import TargetText
    from echostream.streaming.session import StreamingSession

    bundle = args.work / "bundle"
    command = [sys.executable, "-m", "echostream", "export-checkpoint", "--data", str(data)]
    command += ["--checkpoint", str(args.work / "checkpoints" / "checkpoint_last.pt"), "--output", str(bundle)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    session = StreamingSession(load_bundle(bundle), chunk_ms=args.chunk_ms)
    root, texts = DataConfig.load(data).root, {}
    step = 16 * args.chunk_ms  # samples
    for utterance in tqdm(utterances, desc="streaming"):
        samples = load_audio(root / utterance.audio)
        events = [event for at in range(0, len(samples), step) for event in session.push(samples[at : at + step])]
        events += session.finish()
        session.reset()
        sentences = {event.sentence: event.sentence_text for event in events if isinstance(event, TargetText)}
        texts[utterance.id] = " ".join(sentences.values())
    return texts
