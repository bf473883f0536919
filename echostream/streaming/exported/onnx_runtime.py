"""ONNX graphs, opened with errors that say what was wrong."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from echostream.errors import CheckpointError, require
from echostream.memory import huge_pages


def open_graph(
    path: str | Path, what: str, threads: int = 1, content: bytes | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> Any:  # fmt: skip
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        what: the graph is meant to be, for the error.
        threads: that work on one operator; for matrices this small more than one mostly cost.
        content: of the file, if it has been read; no other file is opened then.
        weights: the graph's constants that are not in it, by name. Their memory is used as long as the graph is, so
            they must be kept.

    Raises:
        CheckpointError: the file is missing or no ONNX graph.
        MissingExtraError: ONNX Runtime is not installed.
    """
    runtime = require("onnxruntime", "onnx")
    path = Path(path)
    if content is None and not path.is_file():
        raise CheckpointError(f"{what} {path} does not exist")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Shapes change with every sentence. An arena keeps a block for each of them, and a pattern of memory reserves the
    # largest of a whole run: five streams took 660 MB in place of 440, and more by the minute. A stream is no slower
    # without; the encoder alone, whose shapes stay, would be 6 to 10 % faster with one.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    # Idle threads shall not spin: they would take the time of whoever else computes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not adds_int8_in_32_bits():
        # Others add pairs of int8 products in 16 bits, which overflow; this lets them take another way, half as fast.
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    try:
        if weights:
            values = [runtime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
        with huge_pages():
            return runtime.InferenceSession(content or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{what} {path} is not an ONNX graph that can be run ({reason})") from None


@functools.cache
def adds_int8_in_32_bits() -> bool:
    """Has the processor VNNI? Known of Linux; elsewhere it is taken to have none."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def describe_inputs(graph: Any) -> str:
    return ", ".join(f"{value.name}{list(value.shape)}" for value in graph.get_inputs())
