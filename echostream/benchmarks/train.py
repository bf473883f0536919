"""``echostream benchmark train``: forward and backward of the Emformer layers alone (no subsampler), next to
torchaudio's Emformer of the same sizes, and how the cost grows with the utterance's length.

The candidates take turns, so that a busy neighbour slows all of them alike; the figures are medians. On a CPU they do
so twice: first with malloc as it is, where large tensors are faulted in anew at every step, then with freed memory kept
(``memory.keep_freed_memory``), as EchoStream's training keeps it. The second helps the other Emformer more, which has
the larger tensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from echostream.benchmarks.common import add_options, clock_of, describe, interleaved_medians, surroundings
from echostream.benchmarks.encoder import torchaudio_emformer
from echostream.config import EchoStreamConfig
from echostream.constants import ENCODER_FRAME_MS
from echostream.memory import keep_freed_memory
from echostream.models.echostream_encoder import EchoStreamEncoder

TIMES_TORCHAUDIO = 3.0  # bar: throughput at 30 s against torchaudio's Emformer
GROWTH = 4.4  # bar: cost of four times the length


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


def run(args: argparse.Namespace) -> dict:
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
    clock = clock_of(args.clock)
    as_it_is = interleaved_medians(steps, args.repeats, clock) if device.type == "cpu" else {}
    keep_freed_memory()
    medians = interleaved_medians(steps, args.repeats, clock, "memory kept")
    report = {
        "benchmark": "train",
        "layers": cfg.encoder_layers,
        "batch": args.batch,
        "dropout": args.dropout,
        "precision": "bf16 autocast" if args.bf16 else "fp32",
        **surroundings(args),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "repeats": args.repeats,
        "memory_size": cfg.memory_size,
        "right_context_length": cfg.right_context_length,
        "seconds_per_pass": medians,
        "audio_seconds_per_second": {
            name: args.batch * float(name.split()[1]) / value for name, value in medians.items()
        },
        "speedup_over_torchaudio": speedups(medians),
        "as_it_is": {"seconds_per_pass": as_it_is, "speedup_over_torchaudio": speedups(as_it_is)},
    }
    if "echostream 30 s" in medians and "echostream 120 s" in medians:
        report["cost_120_s_over_30_s"] = medians["echostream 120 s"] / medians["echostream 30 s"]
    return report


def speedups(medians: dict[str, float]) -> dict[str, float]:
    """EchoStream's throughput over torchaudio's, by length."""
    lengths = [name.partition(" ")[2] for name in medians if name.startswith("torchaudio")]
    return {length: medians[f"torchaudio {length}"] / medians[f"echostream {length}"] for length in lengths}


def show(report: dict) -> None:
    print(
        f"forward + backward of {report['layers']} Emformer layers, batch {report['batch']}, {report['precision']}, "
        f"dropout {report['dropout']:g}, device {report['device']}, {describe(report)}, "
        f"matmul precision {report['matmul_precision']}; medians of {report['repeats']}"
    )
    print(f"{'candidate':<20} {'ms a pass':>10} {'audio s / s':>12}")
    for name, seconds in report["seconds_per_pass"].items():
        print(f"{name:<20} {1000 * seconds:>10.0f} {report['audio_seconds_per_second'][name]:>12.1f}")
    before = report["as_it_is"]  # empty on a GPU
    for name, seconds in before["seconds_per_pass"].items():
        print(f"{name + ', malloc as it is':<36} {1000 * seconds:>8.0f}")
    for length, ratio in report["speedup_over_torchaudio"].items():
        ratios, other = f"{ratio:.2f}x", before["speedup_over_torchaudio"].get(length)
        if other is not None:
            ratios = f"{other:.2f}x with malloc as it is, {ratios} with memory kept"
        print(f"throughput over torchaudio at {length}: {ratios} (bar at 30 s: {TIMES_TORCHAUDIO:g}x)")
    if "cost_120_s_over_30_s" in report:
        print(f"120 s cost {report['cost_120_s_over_30_s']:.2f} x 30 s (bar: {GROWTH:g})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=16, help="Emformer layers (default: 16)")
    parser.add_argument("--batch", type=int, default=4, help="utterances in a batch (default: 4)")
    parser.add_argument("--seconds", type=float, nargs="+", default=[30.0, 120.0], help="utterance lengths")
    parser.add_argument(
        "--torchaudio-seconds", type=float, nargs="*", default=[30.0], help="lengths torchaudio is timed at, too"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds (default: 3)")
    parser.add_argument("--dropout", type=float, default=0.1, help="every dropout probability, in both models")
    parser.add_argument("--memory-size", type=int, default=8)
    parser.add_argument("--right-context-length", type=int, default=0)
    parser.add_argument("--normalize-before", action="store_true", help="EchoStream in torchaudio's form of the norms")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--device", default="cpu")
    add_options(parser)
