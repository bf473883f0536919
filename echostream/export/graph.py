"""A writer of ONNX graphs: values are names, operators are calls.

    g = Graph("double")
    x = g.input("x", "B", "D")
    g.output("y", g("Mul", x, 2.0), "B", "D")
    g.save("double.onnx")

The graphs are written operator by operator instead of being traced from the torch modules: a trace would bake in what
changes from step to step (ages, lengths, batch sizes), and at these sizes every copy counts. ``export.check`` compares
them with those modules. Attention and products in int8 are ONNX Runtime's own operators, all else is standard; its
attention takes 21 µs a layer where the standard nodes it stands for take 50.

Letters: B streams, N new items of a step, C cached items, D width, H heads, d = D / H.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from echostream.errors import require

OPSET, IR_VERSION = 18, 9  # ONNX Runtime reads newer ones, but its 1.20 is enough for these
RUNTIME = "com.microsoft"  # domain of ONNX Runtime's own operators
REST = 2**63 - 1  # the end of a slice that goes on to the last item


class Graph:
    """A graph being written.

    Args:
        name: of the graph.
        int8: store the weights of ``linear`` as int8, one scale per output, and quantise its inputs as they come.

    Raises:
        MissingExtraError: the package ``onnx`` is not installed.
    """

    def __init__(self, name: str, int8: bool = False):
        self.onnx = require("onnx", "export")
        self.name, self.int8 = name, int8
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

    def __call__(self, op: str, *arguments: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """A node; arguments that are no names become constants. Returns the name of its value, or of its values."""
        names = [a if isinstance(a, str) else self.constant(a) for a in arguments]
        results = [f"{op}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, names, results, domain=domain, **attributes))
        return results[0] if outputs == 1 else results

    # ---- what models are made of -------------------------------------------------------------------------------

    def slice(self, x: str, axis: int, start: int, end: int = REST, step: int = 1) -> str:
        return self("Slice", x, [start], [end], [axis], [step])

    def linear(self, x: str, weight: Any, bias: Any) -> str:
        """``x @ weight.T + bias`` for x [..., in], weight [out, in], bias [out]."""
        weight, bias = as_array(weight).T, as_array(bias)
        if not self.int8:
            return self("Add", self("MatMul", x, np.ascontiguousarray(weight)), bias)
        scale = np.maximum(np.abs(weight).max(axis=0), 1e-12) / np.float32(127)
        rounded = np.round(weight / scale).astype(np.int8)
        zero = np.zeros(len(scale), dtype=np.int8)
        return self("DynamicQuantizeMatMul", x, rounded, scale, zero, bias, domain=RUNTIME)

    def dense(self, x: str, module: Any) -> str:
        """A torch ``Linear``."""
        return self.linear(x, module.weight, module.bias)

    def residual(self, x: str, branch: str, module: Any, norm: Any) -> str:
        """``norm(x + module(branch))``, the module a torch ``Linear``."""
        return self.norm(self("Add", x, self.dense(branch, module)), norm)

    def norm(self, x: str, norm: Any) -> str:
        """A torch ``LayerNorm`` over the last dimension."""
        return self("LayerNormalization", x, norm.weight, norm.bias, axis=-1, epsilon=norm.eps)

    def split(self, x: str, parts: int) -> list[str]:
        """The last dimension in equal parts."""
        return self("Split", x, axis=-1, num_outputs=parts, outputs=parts)

    def attention(self, query: str, key: str, value: str, mask: str, heads: int, *past: str) -> str:
        """Attention of *scaled* queries [B, N, D] over keys and values [B, K, D], in front of them ``past`` ones
        [B, H, C, d], ``mask`` [B, 1, N, C + K] added to the scores: [B, N, D]."""
        arguments = (query, key, value, "", "", mask, *past)  # no bias, no padding mask
        outputs = 3 if past else 1  # the past is read only where the present is given out
        y = self("MultiHeadAttention", *arguments, outputs=outputs, domain=RUNTIME, num_heads=heads, scale=1.0)
        return y[0] if past else y

    def told_attention(self, query: str, key: str, value: str, mask: str, heads: int, width: int) -> tuple[str, str]:
        """``attention`` without a past that also tells its weights, [B, H, N, K]."""
        query, key, value = (
            self("Transpose", self("Reshape", x, [0, 0, heads, width // heads]), perm=[0, 2, 1, 3])
            for x in (query, key, value)
        )
        scores = self("Add", self("MatMul", query, self("Transpose", key, perm=[0, 1, 3, 2])), mask)
        weights = self("Softmax", scores, axis=-1)
        context = self("Transpose", self("MatMul", weights, value), perm=[0, 2, 1, 3])
        return self("Reshape", context, [0, 0, width]), weights

    def conv(self, x: str, cache: str, weight: Any, bias: Any, dilation: int = 1) -> str:
        """A convolution over x [B, T, C] that sees the inputs before it from the state ``cache``, as a product of
        matrices: [B, T, C'].

        The cache becomes an input [B, (k - 1) * dilation, C] of the graph, and an output named ``new.<cache>``.

        Args:
            weight: [C', C, k]. bias: [C'].
        """
        weight = as_array(weight)
        kernel, past = weight.shape[2], (weight.shape[2] - 1) * dilation
        if past:
            x = self("Concat", self.input(cache, "B", past, weight.shape[1]), x, axis=1)
            self.output(f"new.{cache}", self.slice(x, 1, -past), "B", past, weight.shape[1])
        return self.linear(self.windows(x, kernel, dilation), weight.transpose(0, 2, 1).reshape(len(weight), -1), bias)

    def windows(self, x: str, kernel: int, dilation: int = 1) -> str:
        """[B, T + (k - 1) * dilation, C] to [B, T, k * C]: each item beside those before it, the oldest first."""
        past = (kernel - 1) * dilation
        taps = [self.slice(x, 1, i, i - past or REST) for i in range(0, past + 1, dilation)]
        return taps[0] if kernel == 1 else self("Concat", *taps, axis=2)

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(RUNTIME, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="echostream", ir_version=IR_VERSION)
        self.onnx.save(model, str(path))


def as_array(value: Any) -> np.ndarray:
    """A torch tensor or array as float32 or int64 numpy array (int8 stays int8)."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype == np.int8:
        return array
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
