"""Taking the weights out of graphs: they are written once, to ``model.safetensors``, and the graphs refer to them.

A graph's constants are found among the model's weights by their content, because the exporter renames, transposes and
joins them. What it did is then done by nodes of the graph, which ONNX Runtime computes once, when it opens the graph;
products in int8 read the matrices as they lie in the file, and so does an embedding that is a product's matrix, too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from echostream.errors import CheckpointError, require
from echostream.streaming.exported.model import GRAPHS_FOLDER, VOICE_GRAPHS
from echostream.tensor_file import AGAIN, FORMAT, INT8, SCALE, WEIGHTS, product_layout, quantise, write_tensors

FEW = 32  # inputs of a product too small to be worth rounding: the first convolution's
MANY = 10_000  # numbers in a weight that is worth half precision
EMBEDDING = 500_000  # numbers in a table that is worth int8, although it is read by rows: a vocabulary's
CONSTANT = 4096  # numbers that a graph may keep and that are no weights: frequencies, shapes
RUNTIME = "com.microsoft"  # domain of ONNX Runtime's own operators
VOCODER = "vocoder."  # before the names of its weights


def weights_of(model: Any = None, vocoder: Any = None) -> dict[str, np.ndarray]:
    """The weights of a torch model and of its vocoder by the names that they have in the file."""
    state = {} if model is None else dict(model.state_dict())
    if vocoder is not None:
        state |= {VOCODER + name: value for name, value in vocoder.state_dict().items()}
    arrays = {name: value.detach().cpu().numpy() for name, value in state.items()}
    return {name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in arrays.items()}


def write_graphs(directory: Path, graphs: Mapping[str, Any], weights: Mapping[str, np.ndarray], int8: bool) -> str:
    """Write the weights to ``model.safetensors`` and each graph, without them, to ``onnx/<name>.onnx``.

    Args:
        graphs: by name, with their weights in single precision.
        weights: all of the model's, as of ``weights_of``.
        int8: matrices of products and embeddings in int8 and other large weights in half precision, but for the
            vocoder's, which are all in half precision: the rounding of int8 would be heard.

    Returns:
        sha256 of the weights and then of all graphs, hexadecimal.

    Raises:
        CheckpointError: a graph has weights that are not the model's.
    """
    known = _Known(weights)
    found = {name: _Product.all_of(graph) for name, graph in graphs.items() if int8 and name not in VOICE_GRAPHS}
    matrices = [product.weight for products in found.values() for product in products.values()]
    matrices += [table for name in found for table in _embeddings(graphs[name])]
    rounded = {name for name in map(known.matrix, matrices) if name is not None}
    tables = {name for name, array in weights.items() if int8 and array.size >= MANY and array.dtype.kind == "f"}
    tensors: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        if name in rounded:
            tensors[name + INT8], tensors[name + SCALE] = quantise(array)
        else:
            tensors[name] = array.astype(np.float16) if name in tables else array
    shapes = {name: list(weights[name].shape) for name in sorted(rounded)}
    write_tensors(directory / WEIGHTS, tensors, {"format": FORMAT, "shapes": json.dumps(shapes)})
    digest = hashlib.sha256((directory / WEIGHTS).read_bytes())
    (directory / GRAPHS_FOLDER).mkdir(exist_ok=True)
    for name, graph in graphs.items():
        bound = _Writer(name, graph, known, tensors, tables, found.get(name, {})).model()
        content = bound.SerializeToString(deterministic=True)
        (directory / GRAPHS_FOLDER / f"{name}.onnx").write_bytes(content)
        digest.update(content)
    return digest.hexdigest()


# ---- what a constant is --------------------------------------------------------------------------------------------


class _Origin(NamedTuple):
    """A constant as made of a weight: as the matrix of a product or as it is, its bias as a last column or not,
    transposed or not."""

    name: str
    matrix: bool = False
    bias: str | None = None
    transposed: bool = False


class _Known:
    """The weights by their content."""

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self.weights = weights
        self.origins: dict[bytes, _Origin] = {}
        self.matrices: dict[bytes, str] = {}
        for name, array in weights.items():
            if array.dtype.kind != "f":
                continue
            self._add(array, _Origin(name))
            if array.ndim < 2:
                continue
            matrix = product_layout(array)
            self.matrices.setdefault(_digest(matrix), name)
            self._add(matrix, _Origin(name, array.ndim > 2))
            self._add(matrix.T, _Origin(name, array.ndim > 2, transposed=True))
            bias = f"{name.removesuffix('.weight')}.bias"
            if array.ndim == 4 and array.shape[1] == 1 and bias in weights:
                joined = np.concatenate([matrix, weights[bias][:, None]], axis=1)
                self._add(joined.T, _Origin(name, True, bias, transposed=True))

    def _add(self, array: np.ndarray, origin: _Origin) -> None:
        self.origins.setdefault(_digest(array), origin)

    def origin(self, array: np.ndarray) -> _Origin | None:
        return self.origins.get(_digest(array))

    def matrix(self, weight: np.ndarray) -> str | None:
        """The name of the weight that is this matrix [out, in] of a product."""
        return self.matrices.get(_digest(weight))


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha1(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).digest()


class _Product(NamedTuple):
    """A node that multiplies by a constant matrix, or adds the bias to what another one multiplied.

    Attributes:
        x, bias: names of values; no bias: "".
        weight: [out, in].
    """

    x: str
    weight: np.ndarray
    bias: str

    @staticmethod
    def all_of(model: Any) -> dict[int, _Product]:
        """Those of a graph that are worth rounding, by the number of the node that gives the result."""
        numpy_helper = require("onnx", "export").numpy_helper
        graph = model.graph
        constants = {c.name: c for c in graph.initializer}
        made = {name: node for node in graph.node for name in node.output}
        uses: dict[str, int] = {}
        for node in graph.node:
            for name in node.input:
                uses[name] = uses.get(name, 0) + 1

        def matrix(name: str) -> np.ndarray | None:
            node, turned = made.get(name), False
            if node is not None and node.op_type == "Transpose":
                name, turned = node.input[0], True
            if name not in constants or len(constants[name].dims) != 2:
                return None
            array = numpy_helper.to_array(constants[name])
            return array.T if turned else array

        def product(node: Any) -> _Product | None:
            if node.op_type not in ("Gemm", "MatMul"):
                return None
            weight = matrix(node.input[1])
            if weight is None:
                return None
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            return _Product(node.input[0], weight if turned else weight.T, node.input[2] if node.input[2:] else "")

        found = {}
        for number, node in enumerate(graph.node):
            result = product(node)
            if node.op_type == "Add":
                for name, bias in (tuple(node.input), tuple(node.input)[::-1]):
                    before = made.get(name)
                    if before is not None and uses[name] == 1 and bias in constants and before.op_type == "MatMul":
                        inner = product(before)
                        if inner is not None and list(constants[bias].dims) == [len(inner.weight)]:
                            result = inner._replace(bias=bias)  # the product alone is then read by nobody
            if result is not None and result.weight.shape[1] >= FEW:
                found[number] = result
        return found


def _embeddings(model: Any) -> Iterable[np.ndarray]:
    """The large tables [symbols, width] of which a graph reads rows."""
    numpy_helper = require("onnx", "export").numpy_helper
    constants = {c.name: c for c in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in constants:
            table = numpy_helper.to_array(constants[node.input[0]])
            if table.ndim == 2 and table.dtype == np.float32 and table.size >= EMBEDDING:
                yield table


# ---- graphs without weights ----------------------------------------------------------------------------------------


class _Writer:
    """A graph written anew, its weights by name."""

    def __init__(
        self, name: str, model: Any, known: _Known, tensors: Mapping[str, np.ndarray], tables: set[str],
        products: Mapping[int, _Product],
    ):  # fmt: skip
        self.onnx = require("onnx", "export")
        self.name, self.old, self.known, self.tensors, self.tables = name, model, known, tensors, tables
        self.products = products
        self.array = self.onnx.numpy_helper.to_array
        self.constants = {c.name: c for c in model.graph.initializer}
        self.outside: dict[str, Any] = {}  # weights, by name
        self.inside: dict[str, Any] = {}
        self.first: list[Any] = []  # nodes that make constants of weights
        self.nodes: list[Any] = []
        self.values: dict[str, str] = {}  # constants of the old graph: what stands for them
        self.times: Counter[str] = Counter()  # products with a matrix
        self.rounded: dict[str, tuple[str, str]] = {}  # inputs of products: their numbers in 8 bits, their rows' scales

    def model(self) -> Any:
        helper, graph = self.onnx.helper, self.old.graph
        for number, node in enumerate(graph.node):
            if number in self.products:
                self._product(self.products[number], node.output[0])
            elif node.op_type != "Gather" or not self._rows(node):
                copy = type(node)()
                copy.CopyFrom(node)
                self.nodes.append(copy)
        self.nodes = _needed(self.nodes, {value.name for value in graph.output})
        for node in self.nodes:
            for at, name in enumerate(node.input):
                if name in self.constants:
                    node.input[at] = self._value(name)
        new = type(self.old)()
        new.CopyFrom(self.old)
        del new.graph.node[:], new.graph.initializer[:]
        new.graph.node.extend(_needed([*self.first, *self.nodes], {value.name for value in graph.output}))
        read = {name for node in new.graph.node for name in node.input}
        both = (*self.inside.values(), *self.outside.values())
        new.graph.initializer.extend(c for c in both if c.name in read)
        used = any(node.domain == RUNTIME for node in new.graph.node)
        if used and not any(opset.domain == RUNTIME for opset in new.opset_import):
            new.opset_import.append(helper.make_opsetid(RUNTIME, 1))
        return new

    def _outside(self, name: str, half: bool = False) -> str:
        """A weight of the file as a value: int8 or float32, or with ``half`` float16."""
        if name not in self.outside:
            array, types = self.tensors[name.partition(AGAIN)[0]], self.onnx.TensorProto
            kind = array.dtype
            tensor = types(
                name=name, dims=array.shape, data_location=types.EXTERNAL,
                data_type=types.INT8 if kind == np.int8 else types.FLOAT16 if half else types.FLOAT,
            )  # fmt: skip
            tensor.external_data.add(key="location", value=WEIGHTS)
            self.outside[name] = tensor
        return name

    def _inside(self, value: Any) -> str:
        """A small constant that is no weight."""
        array = np.asarray(value)
        name = f"constant.{array.dtype.name}.{array.ndim}.{'_'.join(map(str, array.flat))}"
        self.inside[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def _node(self, nodes: list[Any], kind: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _product(self, product: _Product, output: str) -> None:
        """Write a product in int8.

        Weights have a scale for each output, inputs one for each row, which the graph finds itself: sums of whole
        numbers are exact, so that a stream gets bit for bit what it gets alone, whatever else is in its batch. From
        eight rows on this takes half of the time of ``MatMulNBits`` (8 bits by blocks) and a third of single
        precision's, at one row the same as ``MatMulNBits`` (processor with VNNI, ONNX Runtime 1.32; see
        ``streaming.exported.onnx_runtime``).
        """

        def write(kind: str, *inputs: str, **attributes: Any) -> str:
            return self._node(self.nodes, kind, inputs, f"{output}.{len(self.nodes)}", **attributes)

        name = self.known.matrix(product.weight)
        if name is None:
            raise self._foreign(output, product.weight.shape)
        step, zero = self._inside(np.float32(1 / 127)), self._inside(np.uint8(128))
        if product.x not in self.rounded:
            largest = write("ReduceMax", write("Abs", product.x), self._inside(np.array([-1])), keepdims=1)
            row = write("Max", largest, self._inside(np.float32(1e-12)))
            self.rounded[product.x] = write("QuantizeLinear", write("Div", product.x, row), step, zero), row
        numbers, row = self.rounded[product.x]
        # On processors without VNNI, ONNX Runtime makes another constant of a product's matrix and names it after that,
        # without looking whether there is one already: a matrix that is used twice has a name for each use.
        self.times[name] += 1
        again = f"{AGAIN}{self.times[name]}" if self.times[name] > 1 else ""
        matrix, scale = self._outside(name + INT8 + again), self._outside(name + SCALE)
        sums = write("MatMulIntegerToFloat", numbers, matrix, step, scale, zero, domain=RUNTIME)
        if product.bias:
            self._node(self.nodes, "Add", [write("Mul", sums, row), product.bias], output)
        else:
            self._node(self.nodes, "Mul", [sums, row], output)

    def _rows(self, node: Any) -> bool:
        """Write a look-up in a table such that only the rows that are read become float32; False: it is none."""
        table, places = node.input[0], node.input[1]
        if table not in self.constants or any(a.name == "axis" and a.i for a in node.attribute):
            return False
        array = self.array(self.constants[table])
        name = self.known.matrix(array) if array.ndim == 2 and array.dtype == np.float32 else None
        out = node.output[0]
        if name is not None and name + INT8 in self.tensors:
            self._rounded_rows(name, places, out)
        elif name in self.tables:
            rows = self._node(self.nodes, "Gather", [self._outside(name, half=True), places], f"{out}.half", axis=0)
            self._node(self.nodes, "Cast", [rows], out, to=self.onnx.TensorProto.FLOAT)
        else:
            return False
        return True

    def _rounded_rows(self, name: str, places: str, out: str) -> None:
        """Rows of an int8 matrix, which is stored by columns, for ``places`` [B, N], as float32 [B, N, width]."""

        def write(kind: str, *inputs: str, **attributes: Any) -> str:
            return self._node(self.nodes, kind, inputs, f"{out}.{len(self.nodes)}", **attributes)

        numbers = write("Gather", self._outside(name + INT8), places, axis=1)  # [width, B, N]
        numbers = write("Cast", write("Transpose", numbers, perm=[1, 2, 0]), to=self.onnx.TensorProto.FLOAT)
        scale = write("Gather", self._outside(name + SCALE), places, axis=0)
        scale = write("Unsqueeze", scale, self._inside(np.array([-1])))
        self._node(self.nodes, "Mul", [numbers, scale], out)

    def _value(self, name: str) -> str:
        """What stands for a constant of the old graph: a value made of weights, or the constant itself."""
        if name in self.values:
            return self.values[name]
        array = self.array(self.constants[name])
        floats = array.dtype == np.float32
        origin = self.known.origin(array) if floats and array.ndim else None
        if origin is None or origin.name not in self.tensors:  # it is there in int8 alone
            if floats and array.size > CONSTANT:
                raise self._foreign(name, array.shape)
            self.inside[name] = self.constants[name]
            value = name
        else:
            value = self._float(origin.name)
            if origin.matrix:
                rank = self.tensors[origin.name].ndim
                value = self._node(self.first, "Transpose", [value], f"{name}.last", perm=[0, *range(2, rank), 1])
                rows = self._inside(np.array([self.tensors[origin.name].shape[0], -1]))
                value = self._node(self.first, "Reshape", [value, rows], f"{name}.matrix")
            if origin.bias is not None:
                last = self._inside(np.array([-1]))
                bias = self._node(self.first, "Unsqueeze", [self._float(origin.bias), last], f"{name}.bias")
                value = self._node(self.first, "Concat", [value, bias], f"{name}.joined", axis=1)
            if origin.transposed:
                value = self._node(self.first, "Transpose", [value], f"{name}.turned", perm=[1, 0])
        self.values[name] = value
        return value

    def _float(self, name: str) -> str:
        """A weight in float32, also where the graph has it in half precision for its rows."""
        value = self._outside(name)
        if self.outside[name].data_type != self.onnx.TensorProto.FLOAT16:
            return value
        if not any(f"{name}.float" in node.output for node in self.first):
            self._node(self.first, "Cast", [name], f"{name}.float", to=self.onnx.TensorProto.FLOAT)
        return f"{name}.float"

    def _foreign(self, value: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"the graph {self.name} has a constant that is none of the model's weights ({value} {list(shape)}), so "
            "nothing was written; this is a defect of EchoStream's export, please report it"
        )


def _needed(nodes: list[Any], wanted: set[str]) -> list[Any]:
    """Of nodes in order those that lead to ``wanted`` values."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
