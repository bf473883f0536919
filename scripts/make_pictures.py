#!/usr/bin/env python3
"""Pictures of recorded results for the pages: SVG, the same for the same results.

    python scripts/make_pictures.py quality runs/sweep -o docs/quality.svg             # BLEU against AL of a sweep
    python scripts/make_pictures.py curve speech=runs/fr-en/speech.log -o docs/curve.svg   # of fairseq-train's logs
    python scripts/make_pictures.py flow configs/scratch/*.yaml -o docs/phases.svg     # which phase takes over which

Cost against elapsed time is drawn by `make bench` (docs/benchmarks.svg).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from echostream.errors import ConfigError
from echostream.evaluation import pictures
from echostream.files import run_command
from echostream.loading import read_mapping


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    quality = kinds.add_parser("quality", help="quality against latency of a sweep")
    quality.add_argument("sweep", type=Path, help="what evaluate.py sweep wrote")
    curve = kinds.add_parser("curve", help="a figure of validation or training against updates")
    curve.add_argument("logs", nargs="+", metavar="NAME=LOG", help="output of fairseq-train")
    curve.add_argument("--measure", default="bleu", help="bleu, st_bleu, loss, asr_ter ... (default: %(default)s)")
    curve.add_argument("--of", default="validation", choices=("validation", "training"), help="(default: %(default)s)")
    flow = kinds.add_parser("flow", help="which phase takes over the checkpoints of which")
    flow.add_argument("recipes", type=Path, nargs="+", help="those of one training")
    for kind in (quality, curve, flow):
        kind.add_argument("-o", "--output", type=Path, required=True, metavar="SVG")
    args = parser.parse_args(argv)
    if args.kind == "quality":
        pictures.quality_against_latency(args.sweep, args.output)
    elif args.kind == "curve":
        named = dict(text.partition("=")[::2] for text in args.logs)
        if "" in named or "" in named.values():
            raise ConfigError("a log is named NAME=LOG")
        pictures.training_curves({name: Path(log) for name, log in named.items()}, args.output, args.measure, args.of)
    else:
        recipes = [path for path in args.recipes if "save-dir" in read_mapping(path)]  # not the plan of ablations
        pictures.flow(recipes, args.output)
    print(args.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
