#!/usr/bin/env python3
"""Run the commands of docs/new-pair.md, unedited and in their order, in a directory of their own; a slow test.

    python scripts/walk_new_pair.py --work walk

Each command's wall-clock time and the machine's load are noted in WORK/times.json as they come, its output in
WORK/logs. Called again, the walk goes on with the first command that is not done. The first that fails ends it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from echostream.errors import EchoStreamError
from echostream.evaluation.table import markdown
from echostream.files import run_command, write_json
from echostream.text_file import lines_of, read_json

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "new-pair.md"
CLONE = ("agent", "configs", "echostream", "scripts")  # what the commands expect where they are run


def commands_of(page: str) -> list[str]:
    """The commands of a page's blocks, each as one line."""
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").split("\n"))
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory in which everything happens")
    args = parser.parse_args(argv)
    logs = args.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name in CLONE:
        if not (args.work / name).exists():
            (args.work / name).symlink_to(ROOT / name)
    noted = args.work / "times.json"
    times = read_json(noted)["commands"] if noted.is_file() else []
    commands = commands_of(PAGE.read_text(encoding="utf-8"))
    if [entry["command"] for entry in times] != commands[: len(times)]:
        raise EchoStreamError(f"{noted} is of an earlier version of {PAGE.name}; delete {args.work} to begin anew")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    for number, command in enumerate(commands[len(times) :], len(times) + 1):
        print(f"[{number}/{len(commands)}] {command}", flush=True)
        log, load, start = logs / f"{number:02d}.log", os.getloadavg()[0], time.monotonic()
        with log.open("wb") as file:
            status = subprocess.run(
                ["bash", "-o", "pipefail", "-c", command], cwd=args.work, env=environment, stdout=file,
                stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        seconds = time.monotonic() - start
        if status:
            tail = lines_of(log.read_text(encoding="utf-8", errors="replace"))[-5:]
            raise EchoStreamError(f"status {status} after {seconds:.0f} s, {log}: " + " / ".join(tail))
        times.append({"command": command, "seconds": round(seconds, 1), "load_before": round(load, 1)})
        write_json(noted, {"cores": os.cpu_count(), "commands": times})
    rows = [
        [str(i), " ".join(entry["command"].split()[:5]), f"{entry['seconds']:.0f}", f"{entry['load_before']:.1f}"]
        for i, entry in enumerate(times, 1)
    ]
    print(markdown(["", "command", "seconds", "load before"], rows))
    print(f"{sum(entry['seconds'] for entry in times) / 60:.1f} minutes, {os.cpu_count()} cores")


if __name__ == "__main__":
    sys.exit(run_command(main))
