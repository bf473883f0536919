"""ONNX graphs of the steps in ``models.graphs``, by ``torch.onnx.export``; what becomes of their weights: ``weights``.

Attention is ONNX Runtime's own operator, which reads the past from the rings without a copy; all else is standard in
single precision.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from echostream.errors import require
from echostream.models.graphs import StepGraph

OPSET = 18  # older than what ONNX Runtime 1.22 reads


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
    assert program is not None
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
