#!/usr/bin/env python3
"""Training on two nodes that are killed, and go on: two torchruns with one rendezvous endpoint; a slow test.

    python scripts/check_nodes.py --updates 150                    # a tiny model on tones

A worker is killed, and later a whole node, which is started again by the same command, as SLURM requeues it. Both times
the training must go on from its last checkpoint; its weights must end as those of a training that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from echostream.checkpoint.fairseq import read_fairseq_checkpoint
from echostream.errors import EchoStreamError, require
from echostream.files import run_command

ROOT = Path(__file__).resolve().parents[1]
# torchrun's store stays over a restart; when the nodes' ranks change, the new workers do not find each other in it:
# they fail, or wait for ever (torch 2.13). Workers get a store of their own, new each time.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
PATIENCE_S = 600  # until something has happened that must happen


class Node:
    """One torchrun of a training of two nodes, which shares the directory of checkpoints with the other."""

    def __init__(self, name: str, folder: Path, port: int, flags: list[str]):
        self.log = folder / f"{name}.log"
        self.command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
            "--rdzv_backend", "c10d", "--rdzv_id", folder.name, "--rdzv_endpoint", f"127.0.0.1:{port}",
            "--max_restarts", "3", "-m", "echostream", "train", "--config", str(folder / "empty.yaml"), *flags,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        environment = {**os.environ, **OWN_STORE, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def updates(self) -> int:
        """How far the training is by the newest line of this node's log that tells; only one of the two has any."""
        found = re.findall(r"num_updates['\"]?[=:] ?['\"]?(\d+)", self.text())
        return int(found[-1]) if found else 0

    def resumed(self) -> list[int]:
        """The updates of the checkpoints that it went on from."""
        return [int(count) for count in re.findall(r"Loaded checkpoint .*@ (\d+) updates", self.text())]

    def workers(self) -> list[int]:
        """Of this torchrun, by /proc."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                _, _, rest = stat.read_text().rpartition(")")
            except OSError:
                continue  # it has ended
            if int(rest.split()[1]) == self.process.pid:
                found.append(int(stat.parent.name))
        return found

    def kill_worker(self) -> None:
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """At once, as when the machine is lost: first torchrun, so that it cannot say good-bye."""
        workers = self.workers()
        self.process.kill()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Training:
    """Two nodes."""

    def __init__(self, folder: Path, flags: list[str]):
        folder.mkdir()
        (folder / "empty.yaml").write_text(f"data: {flags[0]}\n", encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = [*flags[3:], "--save-dir", str(folder / "run")]
        self.nodes = [Node("node0", folder, port, flags)]
        self.wait(lambda: listening(port), "the rendezvous")  # so that node 0 holds it
        self.nodes.append(Node("node1", folder, port, flags))

    def updates(self) -> int:
        return max(node.updates() for node in self.nodes)

    def resumed(self) -> int:
        return max(len(node.resumed()) for node in self.nodes)

    def wait(self, happened, what: str) -> None:
        """Raises: EchoStreamError: it does not happen, or a node has ended with an error."""
        end = time.monotonic() + PATIENCE_S
        while not happened():
            if failed := [node for node in self.nodes if node.process.poll()]:
                raise EchoStreamError(f"while waiting for {what} a node ended: {failed[0].text()[-1500:]}")
            if time.monotonic() > end:
                raise EchoStreamError(f"{what} did not come within {PATIENCE_S} s: {self.nodes[0].text()[-1500:]}")
            time.sleep(0.05)

    def finish(self) -> None:
        self.wait(lambda: all(node.process.poll() == 0 for node in self.nodes), "the end of the training")

    def stop(self) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                node.kill()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def disturb(training: Training, updates: int) -> None:
    """Kill a worker after a third of the updates and the second node after two thirds; start that one again."""
    for number, (share, what) in enumerate(((1, "a worker"), (2, "a node"))):
        training.wait(lambda share=share: training.updates() >= share * updates // 3, f"update {share}/3")
        at, began = training.updates(), time.monotonic()
        if number == 0:
            training.nodes[1].kill_worker()
        else:
            training.nodes[1].kill()
            training.nodes[1].start()
        training.wait(lambda number=number: training.resumed() > number, f"the checkpoint, after {what} was killed")
        resumed = max(node.resumed()[-1] for node in training.nodes if node.resumed())
        print(f"{what} killed after update {at}: goes on from {resumed}, {time.monotonic() - began:.0f} s later",
              flush=True)  # fmt: skip
        if not 0 < resumed <= at:
            raise EchoStreamError(f"it went on from update {resumed}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument(
        "--save-every", type=int, default=20, metavar="N", help="updates from one checkpoint to the next"
    )
    args = parser.parse_args(argv)
    require("fairseq", "train")
    sys.path.insert(0, str(ROOT))
    from tests.training_data import make_corpus, tiny_flags

    with TemporaryDirectory() as name:
        folder = Path(name)
        flags = tiny_flags(
            make_corpus(folder / "data"), None, max_update=args.updates, eval_bleu=False, disable_validation=True,
            save_interval=10**6, save_interval_updates=args.save_every, keep_interval_updates=1,
        )  # fmt: skip
        weights = []
        for title, disturbed in (("undisturbed", False), ("disturbed", True)):
            began = time.monotonic()
            training = Training(folder / title, flags)
            try:
                if disturbed:
                    disturb(training, args.updates)
                training.finish()
            finally:
                training.stop()
            weights.append(read_fairseq_checkpoint(folder / title / "run" / "checkpoint_last.pt")[0])
            print(f"{title}: {training.updates()} updates in {time.monotonic() - began:.0f} s", flush=True)
        furthest = max(float((one - weights[1][key]).abs().max()) for key, one in weights[0].items())
        if furthest > 1e-5:
            raise EchoStreamError(f"the disturbed training ended elsewhere: weights differ by up to {furthest:.3g}")
        print(f"both trainings end with the same weights (they differ by {furthest:.1g} at most)")


if __name__ == "__main__":
    sys.exit(run_command(main))
