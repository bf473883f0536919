"""A writer of ONNX graphs: values are names, operators are calls.

    g = Graph("double")
    x = g.input("x", "B", "D")
    g.output("y", g("Mul", x, 2.0), "B", "D")
    model = g.model()

Only the vocoder's graphs are written so, operator by operator. ``torch.onnx.export``, which makes the others
(``export.graphs``), took 36 s of CPU time for them, whose convolutions over a hundred slices it traces one by one, and
the graph of units was 1.1 times slower (with ``Conv`` nodes instead of products, 1.6 times). ``export.check`` compares
them with the torch modules.

Letters: B streams, T time, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from echostream.errors import require

OPSET, IR_VERSION = 18, 9  # ONNX Runtime reads newer ones, but its 1.20 is enough for these
REST = 2**63 - 1  # the end of a slice that goes on to the last item


class Graph:
    """A graph being written.

    Args:
        name: of the graph.

    Raises:
        MissingExtraError: the package ``onnx`` is not installed.
    """

    def __init__(self, name: str):
        self.onnx = require("onnx", "export")
        self.name = name
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._small: dict[tuple, str] = {}

    # ---- values ------------------------------------------------------------------------------------------------

    def input(self, name: str, *shape: int | str, kind: str = "FLOAT") -> str:
        self.inputs.append(self._info(name, kind, shape))
        return name

    def output(self, name: str, value: str, *shape: int | str, kind: str = "FLOAT") -> None:
        self.nodes.append(self.onnx.helper.make_node("Identity", [value], [name]))
        self.outputs.append(self._info(name, kind, shape))

    def _info(self, name: str, kind: str, shape: tuple) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, getattr(self.onnx.TensorProto, kind), shape)

    def constant(self, value: Any) -> str:
        """An array, a torch tensor, a number (float32 or int64) or a list of whole numbers as a value of the graph."""
        array = as_array(value)
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 16 else None
        if key is None or key not in self._small:
            name = f"c{len(self.constants)}"
            self.constants.append(self.onnx.numpy_helper.from_array(array, name))
            if key is None:
                return name
            self._small[key] = name
        return self._small[key]

    def __call__(self, op: str, *arguments: Any, outputs: int = 1, **attributes: Any) -> Any:
        """A node; arguments that are no names become constants. Returns the name of its value, or of its values."""
        names = [a if isinstance(a, str) else self.constant(a) for a in arguments]
        results = [f"{op}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, names, results, **attributes))
        return results[0] if outputs == 1 else results

    # ---- what models are made of -------------------------------------------------------------------------------

    def slice(self, x: str, axis: int, start: int, end: int = REST, step: int = 1) -> str:
        return self("Slice", x, [start], [end], [axis], [step])

    def linear(self, x: str, weight: Any, bias: Any) -> str:
        """``x @ weight.T + bias`` for x [..., in], weight [out, in], bias [out]."""
        weight, bias = as_array(weight).T, as_array(bias)
        return self("Add", self("MatMul", x, np.ascontiguousarray(weight)), bias)

    def dense(self, x: str, module: Any) -> str:
        """A torch ``Linear``."""
        return self.linear(x, module.weight, module.bias)

    def norm(self, x: str, norm: Any) -> str:
        """A torch ``LayerNorm`` over the last dimension."""
        return self("LayerNormalization", x, norm.weight, norm.bias, axis=-1, epsilon=norm.eps)

    def conv(self, x: str, cache: str, weight: Any, bias: Any, dilation: int = 1) -> str:
        """A convolution over x [B, T, C] that sees the inputs before it from the state ``cache``, as a product of
        matrices: [B, T, C'].

        The cache becomes an input [B, (k - 1) * dilation, C] of the graph, and an output named ``new.<cache>``.

        Args:
            weight: [C', C, k]. bias: [C'].
        """
        weight = as_array(weight)
        kernel = weight.shape[2]
        x = self.remember(x, cache, (kernel - 1) * dilation, weight.shape[1])
        return self.linear(self.windows(x, kernel, dilation), weight.transpose(0, 2, 1).reshape(len(weight), -1), bias)

    def remember(self, x: str, cache: str, past: int, width: int) -> str:
        """x [B, T, C] behind the ``past`` inputs before it, which the state ``cache`` brings and then gets anew."""
        if past:
            x = self("Concat", self.input(cache, "B", past, width), x, axis=1)
            self.output(f"new.{cache}", self.slice(x, 1, -past), "B", past, width)
        return x

    def windows(self, x: str, kernel: int, dilation: int = 1) -> str:
        """[B, T + (k - 1) * dilation, C] to [B, T, k * C]: each item beside those before it, the oldest first."""
        past = (kernel - 1) * dilation
        taps = [self.slice(x, 1, i, i - past or REST) for i in range(0, past + 1, dilation)]
        return taps[0] if kernel == 1 else self("Concat", *taps, axis=2)

    # ---- the whole -----------------------------------------------------------------------------------------------

    def model(self) -> Any:
        """As an ``onnx.ModelProto``."""
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, producer_name="echostream", ir_version=IR_VERSION)


def as_array(value: Any) -> np.ndarray:
    """A torch tensor or array as float32 or int64 numpy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
