#!/usr/bin/env python3
"""Corpus preparation on a Ray cluster of two nodes on this machine, one of whose workers is killed; a slow test.

    python scripts/check_cluster.py --rows 400 --kill              # every row is there, once
    python scripts/check_cluster.py --rows 79000                   # as many as CVSS-C es-en has: rows/s, memory

The rows are stand-ins: eight short tones under the names of as many clips, in the layout of CVSS over Common Voice.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from echostream.audio.io import write_audio
from echostream.data.corpus.cluster import rows_in
from echostream.data.corpus.rows import read_table
from echostream.errors import EchoStreamError, require
from echostream.files import run_command
from echostream.text_file import lines_of

ROOT = Path(__file__).resolve().parents[1]
TONES = 8
WORDS = "casa perro libro ventana calle mesa puerta noche agua fuego".split()
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "300"}


def make_cvss(folder: Path, rows: int) -> None:
    """``cv/es`` and ``cvss_c_es_en``: a tenth of the rows are dev and test."""
    clips, target = folder / "cv" / "es" / "clips", folder / "cvss_c_es_en"
    clips.mkdir(parents=True)
    for i in range(TONES):
        time_s = np.arange(4800) / 16000
        write_audio(folder / f"{i}.wav", (0.3 * np.sin(2 * np.pi * (200 + 40 * i) * time_s)).astype(np.float32), 16000)
    lines: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    sentences = ["path\tsentence"]
    for split in lines:
        (target / split).mkdir(parents=True)
    for i in range(rows):
        split, words = {8: "dev", 9: "test"}.get(i % 20, "train"), [WORDS[i // 10**k % 10] for k in range(5)]
        name = f"clip{i:06d}"
        os.link(folder / f"{i % TONES}.wav", clips / f"{name}.wav")
        os.link(folder / f"{(i + 1) % TONES}.wav", target / split / f"{name}.mp3.wav")
        sentences.append(f"{name}.mp3\tEl número {i}: {' '.join(words)}.")
        lines[split].append(f"{name}.mp3\tNumber {i}: {' '.join(reversed(words))}.")
    (clips.parent / "validated.tsv").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    for split, of_split in lines.items():
        (target / f"{split}.tsv").write_text("\n".join(of_split) + "\n", encoding="utf-8")


def workers(name: str = "ray::_shard") -> dict[int, float]:
    """Resident megabytes of the processes that compute a shard now, by process."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and name.encode() in (folder / "cmdline").read_bytes():
                status = (folder / "status").read_text()
                found[int(folder.name)] = int(status.split("VmRSS:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            continue  # it has ended
    return found


def prepare(log: Path, *words: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_corpus.py"), *map(str, words)]
    with log.open("wb") as file:
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=file)


def last_line(log: Path) -> str:
    lines = lines_of(log.read_text(encoding="utf-8", errors="replace"))
    return next((line for line in reversed(lines) if "rror" in line), "no error was told")


def step(folder: Path, name: str, ledger: str, address: str, shards: int, kill: bool, *words: object) -> None:
    """One step on the cluster; every tenth of its rows is told.

    Raises:
        EchoStreamError: it failed.
    """
    began, killed, told = time.monotonic(), 0, -1.0
    process = prepare(folder / "log", name, "--output", folder / "data", "--executor", "ray", "--ray-address", address,
                      "--num-shards", shards, *words)  # fmt: skip
    while process.poll() is None:
        time.sleep(0.2)
        done, mine = rows_in(folder / "data", ledger), workers()
        if kill and not killed and done and mine:
            killed = next(iter(mine))
            os.kill(killed, signal.SIGKILL)
            print(f"{name}: worker {killed} killed after {done} rows", flush=True)
        seconds = time.monotonic() - began
        if done and mine and seconds - told > 10:
            told = seconds
            driver = workers("prepare_corpus.py").get(process.pid, 0.0)
            memory = f"a worker {max(mine.values()):.0f} MB, the driver {driver:.0f} MB"
            print(f"{name}: {done} rows, {seconds:.0f} s, {memory}", flush=True)
    if process.returncode:
        raise EchoStreamError(f"the step {name} ended with status {process.returncode}: {last_line(folder / 'log')}")
    if kill and not killed:
        raise EchoStreamError(f"the step {name} was over before a worker could be killed; give more --rows")
    done, seconds = rows_in(folder / "data", ledger), time.monotonic() - began
    print(f"{name}: {done} rows in {seconds:.0f} s, {done / seconds:.0f} rows/s", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--cpus", type=int, default=1, help="of each of the two nodes (default: 1)")
    parser.add_argument("--kill", action="store_true", help="kill a worker of the step speech")
    args = parser.parse_args(argv)
    os.environ.update(QUIET)
    Cluster = require("ray.cluster_utils", "ray").Cluster
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_cvss(folder, args.rows)
        corpus = ["--cvss", folder / "cvss_c_es_en", "--common-voice", folder / "cv" / "es"]
        text = prepare(folder / "log", "text", "--output", folder / "data", *corpus, "--vocab-size", 50)
        if text.wait():
            raise EchoStreamError(f"the step text failed: {last_line(folder / 'log')}")
        wanted = Counter(line["split"] for line in read_table(folder / "data" / "rows.tsv"))["train"]
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": args.cpus})
        try:
            cluster.add_node(num_cpus=args.cpus)
            common = (cluster.address, args.shards)
            step(folder, "speech", "speech/train.*-of-*.tsv", *common, args.kill, "--set", "train")
            step(folder, "target", "target/speech.*-of-*.tsv", *common, False, "--target-engine", "none")
        finally:
            cluster.shutdown()
        found = Counter(line["row"] for path in (folder / "data" / "speech").glob("train.*-of-*.tsv")
                        for line in read_table(path))  # fmt: skip
        if len(found) != wanted or set(found.values()) != {1}:
            raise EchoStreamError(f"{len(found)} of {wanted} rows, one {max(found.values())} times")
        print(f"all {wanted} rows are there, once")


if __name__ == "__main__":
    sys.exit(run_command(main))
