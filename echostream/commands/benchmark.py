"""Measure EchoStream's speed on this machine.

    echostream benchmark encoder                     # 160 ms of speech, next to torchaudio's Emformer
    echostream benchmark stream                      # what a chunk costs, from 10 s to 60 minutes
    echostream benchmark stream --backend onnx-int8  # the same through exported graphs
    echostream benchmark vocoder                     # speaking, offline and in chunks of 320 ms
    echostream benchmark train                       # training cost of the Emformer layers
    echostream benchmark all --report docs/benchmarks.md  # all of it in short, as a page with a picture
    echostream benchmark stream --minutes 2 --clock cpu --json figures.json

Tables go to the screen, ``--json FILE`` keeps the figures. Where contenders are compared they take turns within one
run, so that a busy neighbour slows all of them alike. ``--clock cpu`` counts this process's own time, for a machine
that has other work, too. ``--matmul-precision medium`` lets oneDNN do torch's single-precision matrix products: on AMD
processors it is twice as fast in training as the MKL that torch uses by default.

What each of them measures is described in ``echostream/benchmarks/<name>.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from echostream.benchmarks import encoder, report, stream, train, vocoder
from echostream.errors import EchoStreamError
from echostream.files import write_json

BENCHMARKS = {
    "encoder": (encoder, "cost of 160 ms of speech in the encoder, next to torchaudio's and StreamSpeech's kind"),
    "stream": (stream, "cost of a chunk of a running session, at any age"),
    "vocoder": (vocoder, "cost of speaking, offline and in chunks"),
    "train": (train, "training cost of the Emformer layers against torchaudio's"),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "echostream benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, help) in BENCHMARKS.items():
        command = commands.add_parser(name, help=help)
        module.add_arguments(command)
        command.set_defaults(run=module.run, show=module.show)
    everything = commands.add_parser("all", help="all of them with short settings, gathered in one page")
    report.add_arguments(everything)
    everything.set_defaults(run=lambda args: run_all(parser, args), show=report.show)
    return parser


def run_all(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """The benchmarks of ``report.plan``, one after the other, each shown when it is done."""
    found = []
    for command in report.plan(args):
        print(f"$ echostream benchmark {' '.join(command)}", flush=True)
        part = parser.parse_args(command)
        figures = part.run(part)
        part.show(figures)
        found.append({"command": " ".join(command), **figures})
    return report.gather(args, found)


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    try:
        figures = args.run(args)
        args.show(figures)
    except EchoStreamError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if args.json:
        write_json(args.json, figures)
