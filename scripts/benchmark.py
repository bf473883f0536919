#!/usr/bin/env python3
"""Measure EchoStream's speed on this machine.

    python scripts/benchmark.py train                       # training cost of the Emformer layers
    python scripts/benchmark.py stream                      # what a chunk costs, from 10 s to 60 minutes
    python scripts/benchmark.py vocoder                     # speaking, offline and in chunks of 320 ms
    python scripts/benchmark.py stream --minutes 2 --clock cpu --json figures.json

Tables go to the screen, ``--json FILE`` keeps the figures. ``--clock cpu`` counts this process's own time, for a
machine that has other work, too.

``train`` times forward and backward of the Emformer layers alone (no subsampler), next to torchaudio's Emformer of the
same sizes, and how the cost grows with the utterance's length. The candidates take turns, so that a busy neighbour
slows all of them alike; the figures are medians. ``--matmul-precision medium`` lets oneDNN do the single-precision
matrix products, for both candidates: on AMD processors it is twice as fast as the MKL that torch uses by default.

``stream`` is described in ``echostream/benchmarks/stream.py``, ``vocoder`` in ``echostream/benchmarks/vocoder.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from echostream.benchmarks import stream as streaming  # noqa: E402
from echostream.benchmarks import vocoder  # noqa: E402
from echostream.compat import import_torchaudio  # noqa: E402
from echostream.config import EchoStreamConfig  # noqa: E402
from echostream.constants import ENCODER_FRAME_MS  # noqa: E402
from echostream.errors import EchoStreamError  # noqa: E402
from echostream.models.echostream_encoder import EchoStreamEncoder  # noqa: E402

TIMES_TORCHAUDIO = 3.0  # bar: throughput at 30 s against torchaudio's Emformer
GROWTH = 4.4  # bar: cost of four times the length


def torchaudio_emformer(cfg: EchoStreamConfig, dropout: float) -> torch.nn.Module:
    """torchaudio's Emformer in ``cfg``'s sizes; it has one dropout probability for everything."""
    import_torchaudio()
    from torchaudio.models import Emformer

    return Emformer(
        cfg.encoder_embed_dim,
        cfg.encoder_attention_heads,
        cfg.encoder_ffn_embed_dim,
        cfg.encoder_layers,
        cfg.segment_length,
        dropout=dropout,
        left_context_length=cfg.left_context_length,
        right_context_length=cfg.right_context_length,
        max_memory_size=cfg.memory_size,
    )


def train_pass(
    model: torch.nn.Module, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, lengths: Tensor, bf16: bool
) -> Callable[[], None]:
    """One forward and backward pass, as a function to be timed."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = run(x, lengths).float().square().mean()
        loss.backward()
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def interleaved_medians(
    steps: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each step over ``repeats`` rounds, in which all take turns, after one round unmeasured."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in tqdm(range(repeats + 1), desc="rounds"):
        for name, step in steps.items():
            start = clock()
            step()
            if round_:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark_train(args: argparse.Namespace) -> dict:
    device = torch.device(args.device)
    cfg = EchoStreamConfig(
        encoder_layers=args.layers,
        memory_size=args.memory_size,
        right_context_length=args.right_context_length,
        encoder_normalize_before=args.normalize_before,
        dropout=args.dropout,
        attention_dropout=args.dropout,
        activation_dropout=args.dropout,
    )
    torch.manual_seed(1)
    ours = EchoStreamEncoder(cfg)
    theirs = torchaudio_emformer(cfg, args.dropout)
    steps: dict[str, Callable[[], None]] = {}
    for seconds in args.seconds:
        frames = round(seconds * 1000 / ENCODER_FRAME_MS)
        lengths = torch.full((args.batch,), frames, device=device)
        x = torch.randn(args.batch, frames, cfg.encoder_embed_dim, device=device)
        ours.train().to(device)
        steps[f"echostream {seconds:g} s"] = train_pass(ours, ours.forward_layers, x, lengths, args.bf16)
        if seconds in args.torchaudio_seconds:
            theirs.train().to(device)
            padded = torch.randn(args.batch, frames + cfg.right_context_length, cfg.encoder_embed_dim, device=device)
            steps[f"torchaudio {seconds:g} s"] = train_pass(
                theirs, lambda x, lengths: theirs(x, lengths)[0], padded, lengths, args.bf16
            )
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    medians = interleaved_medians(steps, args.repeats, clock)
    report = {
        "benchmark": "train",
        "layers": cfg.encoder_layers,
        "batch": args.batch,
        "dropout": args.dropout,
        "precision": "bf16 autocast" if args.bf16 else "fp32",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "matmul_precision": args.matmul_precision,
        "torch": torch.__version__,
        "repeats": args.repeats,
        "memory_size": cfg.memory_size,
        "right_context_length": cfg.right_context_length,
        "seconds_per_pass": medians,
        "audio_seconds_per_second": {
            name: args.batch * float(name.split()[1]) / value for name, value in medians.items()
        },
        "speedup_over_torchaudio": {
            f"{s:g} s": medians[f"torchaudio {s:g} s"] / medians[f"echostream {s:g} s"]
            for s in args.seconds
            if f"torchaudio {s:g} s" in medians
        },
    }
    if "echostream 30 s" in medians and "echostream 120 s" in medians:
        report["cost_120_s_over_30_s"] = medians["echostream 120 s"] / medians["echostream 30 s"]
    return report


def print_train(report: dict) -> None:
    print(
        f"forward + backward of {report['layers']} Emformer layers, batch {report['batch']}, {report['precision']}, "
        f"dropout {report['dropout']:g}, {report['threads']} thread(s), {report['device']}, torch {report['torch']}, "
        f"matmul precision {report['matmul_precision']}; medians of {report['repeats']}, {report['clock']} clock"
    )
    print(f"{'candidate':<20} {'ms a pass':>10} {'audio s / s':>12}")
    for name, seconds in report["seconds_per_pass"].items():
        print(f"{name:<20} {1000 * seconds:>10.0f} {report['audio_seconds_per_second'][name]:>12.1f}")
    for length, ratio in report["speedup_over_torchaudio"].items():
        print(f"throughput over torchaudio at {length}: {ratio:.2f}x (bar at 30 s: {TIMES_TORCHAUDIO:g}x)")
    if "cost_120_s_over_30_s" in report:
        print(f"120 s cost {report['cost_120_s_over_30_s']:.2f} x 30 s (bar: {GROWTH:g})")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="training cost of the Emformer layers against torchaudio's")
    train.add_argument("--layers", type=int, default=16, help="Emformer layers (default: 16)")
    train.add_argument("--batch", type=int, default=4, help="utterances in a batch (default: 4)")
    train.add_argument("--seconds", type=float, nargs="+", default=[30.0, 120.0], help="utterance lengths")
    train.add_argument(
        "--torchaudio-seconds", type=float, nargs="*", default=[30.0], help="lengths torchaudio is timed at, too"
    )
    train.add_argument("--repeats", type=int, default=3, help="measured rounds (default: 3)")
    train.add_argument("--dropout", type=float, default=0.1, help="every dropout probability, in both models")
    train.add_argument("--memory-size", type=int, default=8)
    train.add_argument("--right-context-length", type=int, default=0)
    train.add_argument("--normalize-before", action="store_true", help="EchoStream in torchaudio's form of the norms")
    train.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    train.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    train.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="wall time, or this process's own")
    train.add_argument("--matmul-precision", choices=("highest", "high", "medium"), default="highest")
    train.add_argument("--device", default="cpu")
    train.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    train.set_defaults(run=benchmark_train, show=print_train)
    stream = commands.add_parser("stream", help="cost of a chunk of a running session, at any age")
    streaming.add_arguments(stream)
    stream.set_defaults(run=streaming.run, show=streaming.show)
    voice = commands.add_parser("vocoder", help="cost of speaking, offline and in chunks")
    vocoder.add_arguments(voice)
    voice.set_defaults(run=vocoder.run, show=vocoder.show)
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    try:
        report = args.run(args)
    except EchoStreamError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    args.show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
