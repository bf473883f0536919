"""Small ONNX graphs beside the model: opened with one thread, and with errors that say what was wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echostream.errors import CheckpointError, require


def open_graph(path: str | Path, what: str) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        what: the graph is meant to be, for the error.

    Raises:
        CheckpointError: the file is missing or no ONNX graph.
        MissingExtraError: ONNX Runtime is not installed.
    """
    runtime = require("onnxruntime", "onnx")
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{what} {path} does not exist")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # these graphs are tiny; threads only cost
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{what} {path} is not an ONNX graph that can be run ({reason})") from None


def describe_inputs(graph: Any) -> str:
    return ", ".join(f"{value.name}{list(value.shape)}" for value in graph.get_inputs())
