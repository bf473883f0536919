"""Train from a YAML file of fairseq-train's flags: ``echostream train --config configs/scratch/units.yaml``.

Each ``key: value`` of the file is the flag ``--key value``; ``true`` gives the bare flag, ``false`` and ``null`` leave
it out, a list is joined by commas. ``data`` is the data directory; ``{pair}`` in a value is the language pair, which
``configs/pair.yaml`` or ``--pair`` says. Flags on the command line override the file's:

    echostream train --config configs/scratch/asr.yaml --pair fr-en --max-update 100

The equivalent fairseq-train command is printed first. Several processes without GPUs (gloo):

    torchrun --nproc_per_node 2 -m echostream train --config configs/scratch/units.yaml
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echostream.errors import ConfigError, EchoStreamError
from echostream.recipe import read_flags

PACKAGE = Path(__file__).resolve().parents[1]
ALWAYS = {"task": "echostream_s2st", "criterion": "echostream_multitask"}


def command(flags: dict[str, Any], overrides: Sequence[str] = (), data: str | None = None) -> list[str]:
    """fairseq-train's arguments, without the program's name.

    Raises:
        ConfigError: no data directory is named.
    """
    flags = {**ALWAYS, **flags}
    data = data or flags.get("data")
    if not data:
        raise ConfigError("no data directory: give --data, or the key data in the configuration file")
    arguments = [str(data), "--user-dir", os.path.relpath(PACKAGE)]
    overridden = {word.split("=")[0] for word in overrides if word.startswith("--")}
    for key, value in flags.items():
        name = f"--{key}"
        if key == "data" or name in overridden or value is None or value is False:
            continue
        arguments.append(name)
        if isinstance(value, list):
            arguments.append(",".join(map(str, value)))
        elif value is not True:
            arguments.append(str(value))
    return [*arguments, *overrides]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "echostream train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of fairseq-train's flags")
    parser.add_argument("--pair", metavar="SRC-TGT", help="what {pair} in the file stands for, instead of pair.yaml's")
    parser.add_argument("--data", help="data directory, instead of the file's")
    parser.add_argument("--dry-run", action="store_true", help="print the fairseq-train command and stop")
    args, overrides = parser.parse_known_args(argv)
    try:
        arguments = command(read_flags(args.config, args.pair), overrides, args.data)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            arguments += distributed_flags(arguments)
        if os.environ.get("RANK", "0") == "0":
            print(f"fairseq-train {shlex.join(arguments)}", flush=True)
        if args.dry_run:
            return
        run_fairseq("train", arguments)
    except EchoStreamError as error:
        sys.exit(f"error: {error}")


def distributed_flags(arguments: Sequence[str]) -> list[str]:
    """What fairseq needs under torchrun where there is no GPU.

    Left to itself it counts GPUs to find its world size, and without any every process trains alone: gloo, the world
    and its own place in it have to be said, and that it need not start processes itself.
    """
    import torch

    if torch.cuda.is_available() and "--cpu" not in arguments:
        return []
    wanted = {
        "--cpu": None,
        "--distributed-no-spawn": None,
        "--distributed-backend": "gloo",
        "--ddp-backend": "legacy_ddp",
        "--distributed-init-method": "env://",
        "--distributed-world-size": os.environ["WORLD_SIZE"],
        "--distributed-rank": os.environ["RANK"],
    }
    flags = []
    for name, value in wanted.items():
        if name not in arguments:
            flags += [name] if value is None else [name, value]
    return flags


def run_fairseq(tool: str, arguments: Sequence[str]) -> None:
    """Run ``fairseq-<tool>`` in this process, with EchoStream registered.

    Raises:
        MissingExtraError: fairseq is not installed.
    """
    import importlib

    from echostream.plugin import register_with_fairseq

    module = importlib.import_module(f"fairseq_cli.{tool}")  # first: it sets up logging as the command does
    before = sys.argv
    sys.argv = [f"fairseq-{tool}", *arguments]
    try:
        register_with_fairseq()
        module.cli_main()
    finally:
        sys.argv = before
