"""ONNX graphs of the steps in ``models.graphs``, by ``torch.onnx.export``, and their weights in int8.

Attention is ONNX Runtime's own operator, which reads the past from the rings without a copy; all else is standard in
single precision.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch

from echostream.errors import require
from echostream.models.graphs import StepGraph

OPSET = 18  # older than what ONNX Runtime 1.22 reads
FEW = 32  # inputs of a product too small to be worth rounding: the first convolution's
MANY = 10_000  # numbers in a table that is worth half precision
RUNTIME = "com.microsoft"  # domain of ONNX Runtime's own operators


def make_graph(step: StepGraph) -> Any:
    """An ``onnx.ModelProto`` that computes what ``step`` does, in single precision.

    Raises:
        MissingExtraError: the package ``onnx`` or ``onnxscript`` is not installed.
    """
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    example = step.example()
    dynamic = {
        name: {i: torch.export.Dim.DYNAMIC for i, size in enumerate(shape) if not isinstance(size, int)}
        for name, shape in step.inputs.items()
    }
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.__trace")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            outputs = list(step(example))
            program = torch.onnx.export(
                step, kwargs={"given": example}, dynamo=True, opset_version=OPSET, verbose=False,
                dynamic_shapes={"given": dynamic},
                input_names=list(example), output_names=outputs, external_data=False,
            )  # fmt: skip
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
    model = program.model_proto
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]  # where in which file it was traced
        # The exporter drops outputs that nobody reads, but the past is only read where the present is given out.
        if node.op_type == "MultiHeadAttention" and len(node.output) == 1 and len(node.input) > 6:
            node.output.extend(f"{node.output[0]}.present_{kind}" for kind in ("keys", "values"))
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.value_info[:], model.graph.metadata_props[:], model.metadata_props[:]
    onnx.checker.check_model(model, full_check=False)
    return model


def in_int8(model: Any) -> Any:
    """A copy with large tables in half precision and products with weights in int8.

    Weights have a scale for each output, inputs one for each row, which the graph finds itself: sums of whole numbers
    are exact, so that a stream gets bit for bit what it gets alone, whatever else is in its batch. From eight rows on
    this takes half of the time of ``MatMulNBits`` (8 bits by blocks) and a third of single precision's, at one row the
    same as ``MatMulNBits`` (processor with VNNI, ONNX Runtime 1.32; see ``streaming.onnx_runtime``).
    """
    onnx = require("onnx", "export")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    copy = type(model)()
    copy.CopyFrom(model)
    graph = copy.graph
    constants = {c.name: c for c in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}

    def matrix(name: str) -> np.ndarray | None:
        """A constant matrix [in, out], as it is or transposed on the way."""
        if name in constants:
            array = numpy_helper.to_array(constants[name])
            return array if array.ndim == 2 else None
        node = made.get(name)
        if node is not None and node.op_type == "Transpose" and node.input[0] in constants:
            array = numpy_helper.to_array(constants[node.input[0]])
            return array.T if array.ndim == 2 else None
        return None

    def product(node: Any) -> tuple[str, np.ndarray, str | None] | None:
        """Input, weight and bias of a product with a weight."""
        if node.op_type == "Gemm":
            weight = matrix(node.input[1])
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            bias = node.input[2] if len(node.input) > 2 else None
            return None if weight is None else (node.input[0], weight.T if transposed else weight, bias)
        if node.op_type == "MatMul":
            weight = matrix(node.input[1])
            return None if weight is None else (node.input[0], weight, None)
        return None

    uses = Counter(name for node in graph.node for name in node.input)
    nodes, halves = [], set()
    for node in graph.node:
        found = product(node)
        if node.op_type == "Add":
            for name, bias in (tuple(node.input), tuple(node.input)[::-1]):
                before = made.get(name)
                if before is not None and uses[name] == 1 and bias in constants and before.op_type == "MatMul":
                    inner = product(before)
                    if inner is not None and list(constants[bias].dims) == [inner[1].shape[1]]:
                        found = inner[0], inner[1], bias  # the product alone is then read by nobody
        if node.op_type == "Gather" and node.input[0] in constants:
            table = numpy_helper.to_array(constants[node.input[0]])
            if table.dtype == np.float32 and table.size >= MANY:
                # Embeddings in half precision, as checkpoints keep them: only the rows that are read become float32.
                rows, half = f"{node.output[0]}.rows", f"{node.input[0]}.half"
                if half not in halves:
                    halves.add(half)
                    graph.initializer.append(numpy_helper.from_array(table.astype(np.float16), half))
                look_up = helper.make_node("Gather", [half, *node.input[1:]], [rows])
                look_up.attribute.extend(node.attribute)
                cast = helper.make_node("Cast", [rows], list(node.output), to=onnx.TensorProto.FLOAT)
                nodes += [look_up, cast]
                continue
        if found is None or len(found[1]) < FEW:
            nodes.append(node)
            continue
        x, weight, bias = found
        out = node.output[0]
        largest = np.maximum(np.abs(weight).max(axis=0), 1e-12)
        arrays = {
            f"{out}.int8": np.round(weight / largest * 127).astype(np.int8),
            f"{out}.scale": (largest / np.float32(127 * 127)).astype(np.float32),
        }
        graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
        whole = out if bias is None else f"{out}.product"
        nodes += [
            helper.make_node("Abs", [x], [f"{out}.abs"]),
            helper.make_node("ReduceMax", [f"{out}.abs", "int8.last"], [f"{out}.max"], keepdims=1),
            helper.make_node("Max", [f"{out}.max", "int8.least"], [f"{out}.row"]),
            helper.make_node("Div", [x, f"{out}.row"], [f"{out}.unit"]),
            helper.make_node("QuantizeLinear", [f"{out}.unit", "int8.step", "int8.zero"], [f"{out}.input"]),
            helper.make_node(
                "MatMulIntegerToFloat", [f"{out}.input", f"{out}.int8", "int8.one", f"{out}.scale", "int8.zero"],
                [f"{out}.sum"], domain=RUNTIME,
            ),
            helper.make_node("Mul", [f"{out}.sum", f"{out}.row"], [whole]),
        ]  # fmt: skip
        if bias is not None:
            nodes.append(helper.make_node("Add", [whole, bias], [out]))
    shared = {
        "int8.last": np.array([-1]), "int8.least": np.float32(1e-12), "int8.step": np.float32(1 / 127),
        "int8.zero": np.uint8(128), "int8.one": np.float32(1),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in shared.items())
    del graph.node[:]
    graph.node.extend(_needed(nodes, {value.name for value in graph.output}))
    read = {name for node in graph.node for name in node.input}
    kept = [c for c in graph.initializer if c.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    if not any(opset.domain == RUNTIME for opset in copy.opset_import):
        copy.opset_import.append(helper.make_opsetid(RUNTIME, 1))
    return copy


def _needed(nodes: list[Any], wanted: set[str]) -> list[Any]:
    """Of nodes in order those that lead to ``wanted`` values."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
