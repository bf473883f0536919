"""Runs cases in a worker process, which may hang, crash or grow, and counts what came of them."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 30.0  # of computing, or of waiting for something; time in which the machine does other work does not count
SLOW_S = 5.0  # of computing
GROWTH_MB = 300.0
OUTCOMES = ("fine", "refused", "traceback", "wrong", "slow", "hang", "crash", "growth")


@dataclass
class Tally:
    """Counts by kind and outcome, and what is to be mended: an example of each failure."""

    counts: Counter = field(default_factory=Counter)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, number: int, outcome: str, signature: str) -> None:
        self.counts[kind, outcome] += 1
        if outcome not in OUTCOMES[:2]:
            self.failures.setdefault(f"{outcome}: {signature}", []).append(f"{kind} {number}")

    @property
    def failed(self) -> int:
        return sum(len(cases) for cases in self.failures.values())

    def __str__(self) -> str:
        kinds = sorted({kind for kind, _ in self.counts})
        rows = [["kind", "runs", *OUTCOMES]]
        for kind in kinds:
            found = [self.counts[kind, outcome] for outcome in OUTCOMES]
            rows.append([kind, str(sum(found)), *map(str, found)])
        totals = [sum(self.counts[kind, outcome] for kind in kinds) for outcome in OUTCOMES]
        rows.append(["in all", str(sum(totals)), *map(str, totals)])
        lines = ["  ".join(f"{cell:>9}" for cell in row) for row in rows]
        for signature, cases in sorted(self.failures.items(), key=lambda item: -len(item[1])):
            lines.append(f"{len(cases):5} x {signature}\n        {', '.join(cases[:5])}")
        return "\n".join(lines)


def judge(targets: object, kind: str, number: int, scratch: Path) -> tuple[str, str]:
    """Run one case here: its outcome, and what it raised."""
    from echostream.errors import EchoStreamError
    from tests.fuzz.targets import Wrong

    started = time.process_time()
    outcome, signature = "fine", ""
    try:
        targets.run(kind, number, scratch)
    except EchoStreamError as error:
        outcome, signature = "refused", str(error)
        if "\n" in signature or len(signature) > 1000 or not signature:
            outcome = "wrong"
    except Wrong as error:
        outcome, signature = "wrong", str(error)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/echostream/" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the fuzzer"
        outcome, signature = "traceback", f"{type(error).__name__} at {where}: {str(error).splitlines()[:1]}"[:200]
    if outcome in OUTCOMES[:2] and time.process_time() - started > SLOW_S + getattr(targets, "allowed_s", 0.0):
        outcome, signature = "slow", f"{time.process_time() - started:.0f} s"
    return outcome, signature


def _memory(key: str) -> float:
    """MB of this process: ``VmRSS`` now, ``VmHWM`` at most since the last reset."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is that of all cases so far


def work(folder: Path) -> None:
    """The worker: a line ``kind number`` in, a line of JSON out."""
    from tests.fuzz.material import make_material
    from tests.fuzz.targets import Targets

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints shall not answer
    targets = Targets(make_material(folder / "material"))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, number = line.split()
        _reset_peak()
        before = _memory("VmRSS")
        outcome, signature = judge(targets, kind, int(number), folder / "case")
        grown = _memory("VmHWM") - before
        if grown > GROWTH_MB and outcome in OUTCOMES[:2]:
            outcome, signature = "growth", f"{grown:.0f} MB"
        print(json.dumps([outcome, signature]), file=answers, flush=True)


class Worker:
    """A worker process and what it says; started anew when it is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process, self.started = folder, None, 0

    def run(self, kind: str, number: int) -> tuple[str, str]:
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(f"{kind} {number}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._gone()
        line = self._line(self._hangs())
        if line is None:
            self.close()
            return "hang", f"more than {HANG_S:.0f} s"
        return tuple(json.loads(line)) if line else self._gone()

    def _gone(self) -> tuple[str, str]:
        code = self.process.wait()
        self.close()
        return "crash", f"the process ended with {code}"

    def _start(self) -> None:
        self.started += 1
        command = [sys.executable, "-m", "tests.fuzz.runner", "--work", str(self.folder / str(self.started))]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=env
        )
        if self._line(lambda: False) != b"ready\n":
            raise SystemExit(f"the worker did not start; try it: {' '.join(command)}")

    def _line(self, hangs: Callable[[], bool]) -> bytes | None:
        """The worker's next line; empty if it has ended, None if it hangs."""
        while not select.select([self.process.stdout], [], [], 0.5)[0]:
            if hangs():
                return None
        return self.process.stdout.readline()

    def _hangs(self) -> Callable[[], bool]:
        """Tells, asked every now and then, whether the worker has computed or slept for too long from now on."""
        computed, awake = self._state()[0], time.monotonic()

        def hangs() -> bool:
            nonlocal awake
            now, sleeps = self._state()
            if not sleeps:
                awake = time.monotonic()
            return now - computed > HANG_S or time.monotonic() - awake > HANG_S

        return hangs

    def _state(self) -> tuple[float, bool]:
        """Seconds that the worker has computed, and whether it waits for something else than a processor."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, True
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] in "SD"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


KINDS = ("recording", "bundle", "export", "archive", "schedule", "batch", "corpus")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 if anything but fine and refused came of a case."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Damage what is handed over, and use it.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--cases", type=int, help="how many cases, whatever the time they take")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of input (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="first number of the cases; others are other cases")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "NUMBER"), help="run one case here, with its traceback")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work)
        return 0
    with tempfile.TemporaryDirectory(prefix="echostream-fuzz-") as folder:
        if args.case:
            from tests.fuzz.material import make_material
            from tests.fuzz.targets import Targets

            Targets(make_material(Path(folder, "material"))).run(args.case[0], int(args.case[1]), Path(folder, "case"))
            return 0
        tally, worker, end = Tally(), Worker(Path(folder)), time.monotonic() + 60 * args.minutes
        order = random.Random(args.seed)
        number = args.seed
        try:
            while time.monotonic() < end if args.cases is None else number < args.seed + args.cases:
                kind = order.choice(args.kinds)
                tally.add(kind, number, *worker.run(kind, number))
                number += 1
        except KeyboardInterrupt:
            pass
        finally:
            worker.close()
        print(tally)
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
