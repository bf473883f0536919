"""What the benchmarks share: options, the clock, the machine they ran on, medians, exported graphs of a model."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from echostream.checkpoint import Bundle
from echostream.export.directory import make_graphs
from echostream.export.weights import weights_of, write_graphs
from echostream.streaming.exported.model import ExportedModel
from echostream.streaming.exported.voice import ExportedVoice


def add_options(parser: argparse.ArgumentParser, clock: str = "wall") -> None:
    """The options that every benchmark has; ``clock`` is its default."""
    parser.add_argument("--threads", type=int, default=1, help="threads that compute (default: 1)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default=clock, help=f"wall time, or this process's own (default: {clock})"
    )
    parser.add_argument(
        "--matmul-precision", choices=("highest", "high", "medium"), default="highest", help="torch's (see above)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")


def clock_of(name: str) -> Callable[[], float]:
    """The clock called ``wall`` or ``cpu``, in seconds."""
    return time.process_time if name == "cpu" else time.perf_counter


def surroundings(args: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on beside the code: threads, clock, load, machine, versions."""
    return {
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "machine": _processor(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "matmul_precision": args.matmul_precision,
    }


def describe(report: dict) -> str:
    """The same in words."""
    return (
        f"{report['threads']} thread(s), {'process CPU' if report['clock'] == 'cpu' else 'wall'} clock, load "
        f"{report['load']:.1f} on {report['cores']} cores, {report['machine']}, torch {report['torch']}, ONNX Runtime "
        f"{report['onnxruntime']}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile of seconds, in ms."""
    return {f"p{q}": 1000 * float(np.percentile(seconds, q)) for q in (50, 95)}


def interleaved_medians(
    steps: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float], title: str = "rounds"
) -> dict[str, float]:
    """Median seconds of each step over ``repeats`` rounds, in which all take turns, after one round unmeasured."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in tqdm(range(repeats + 1), desc=title):
        for name, step in steps.items():
            start = clock()
            step()
            if round_:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def exported(bundle: Bundle, folder: Path, int8: bool, threads: int = 1) -> Bundle:
    """A torch bundle's graphs, written to ``folder`` where they are not there yet, as a bundle of their own."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        graphs, weights = make_graphs(bundle.model, bundle.vocoder), weights_of(bundle.model, bundle.vocoder)
        write_graphs(folder, graphs, weights, int8)
    precision = "int8" if int8 else "fp32"
    return replace(
        bundle,
        directory=folder,
        model=ExportedModel(folder, precision, threads),
        vocoder=ExportedVoice(bundle.vocoder.config),
        digest=f"{bundle.digest}, {precision}",
    )
