"""Trainings in processes of their own: what one is, what fits it to its budget, and what it cost."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from echostream.commands.overfit import FIGURE
from echostream.commands.train import command
from echostream.errors import EchoStreamError
from echostream.evaluation.run import environment
from echostream.files import write_json
from echostream.text_file import read_json, read_lines


@dataclass(frozen=True)
class Training:
    """One step of an arm; ``folder`` is named after all that makes its result, so that arms may share it."""

    step: str
    updates: int
    flags: dict[str, Any]
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint_last.pt"

    @property
    def record(self) -> dict[str, Any]:
        """``wall_s``, ``cpu_s``; and, once the training is done, ``validation``, its last figures."""
        path = self.folder / "record.json"
        return read_json(path, EchoStreamError) if path.is_file() else {"wall_s": 0.0, "cpu_s": 0.0}

    @property
    def done(self) -> bool:
        return "validation" in self.record


def train(training: Training, data: Path, bar: tqdm) -> None:
    """Train, or go on with it, moving ``bar`` along; checkpoints but the last one are thrown away."""
    validation: dict[str, float] = {}
    seen = 0

    def watch(line: str) -> None:
        nonlocal seen
        values = {name: float(value) for name, value in FIGURE.findall(line)}
        if "num_updates" in values:
            bar.update(int(values["num_updates"]) - seen)
            seen = int(values["num_updates"])
        if "valid on" in line:
            validation.update(values)

    record = training.record
    try:
        launch(fairseq("train", training.flags, data), training.folder / "train.log", watch, record)
        for path in training.folder.glob("checkpoint*.pt"):
            if path != training.checkpoint:
                path.unlink()
        record["validation"] = validation
    finally:
        write_json(training.folder / "record.json", record)


def schedule(flags: dict[str, Any], updates: int, folder: Path) -> dict[str, Any]:
    """What fits a training to its number of updates: it validates at its end and saves every tenth of the way."""
    fitted = {"max-update": updates, "save-interval-updates": max(20, updates // 10), "keep-interval-updates": 1}
    fitted |= {"validate-after-updates": updates, "validate-interval-updates": updates, "no-epoch-checkpoints": True}
    fitted |= {"log-format": "simple", "log-interval": max(1, updates // 100), "save-dir": str(folder)}
    if flags.get("warmup-updates"):
        fitted["warmup-updates"] = min(flags["warmup-updates"], max(1, updates // 4))
    if "total-num-update" in flags:
        fitted["total-num-update"] = updates
    return fitted


def fairseq(tool: str, flags: dict[str, Any], data: Path) -> list[str]:
    """The command line of ``fairseq-<tool>``."""
    return [sys.executable, "-m", f"fairseq_cli.{tool}", *command(flags, data=str(data))]


def launch(
    words: Sequence[str], log: Path, watch: Callable[[str], Any] = str, cost: dict[str, Any] | None = None
) -> None:
    """Run a command, its output appended to ``log`` and shown to ``watch`` line by line.

    Args:
        cost: ``wall_s`` and ``cpu_s`` grow by what the process took, processes of its own included.

    Raises:
        EchoStreamError: it failed; with its last words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment())
    with log.open("a", encoding="utf-8") as file, subprocess.Popen(words, **options) as process:
        for line in process.stdout:
            file.write(line)
            file.flush()
            watch(line)
        _, status, usage = os.wait4(process.pid, 0)  # unlike wait() it tells this process's time, and no other's
        process.returncode = os.waitstatus_to_exitcode(status)
    if cost is not None:
        cost["wall_s"] = round(cost["wall_s"] + time.monotonic() - begin, 2)
        cost["cpu_s"] = round(cost["cpu_s"] + usage.ru_utime + usage.ru_stime, 2)
    if process.returncode:
        last = read_lines(log, EchoStreamError)[-1:]
        raise EchoStreamError(f"{Path(words[2]).name} ended with status {process.returncode} ({log}): {''.join(last)}")


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
