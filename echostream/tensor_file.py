"""``model.safetensors``: every weight of a model once, read without torch and without a copy.

The file is plain safetensors: u64 the header's length, a JSON header with type, shape and place of every tensor, the
tensors. Names are those of the torch model's state dict, a vocoder's behind ``vocoder.``. A matrix in int8 is two
tensors, ``<name>.int8`` [in, out] (-127 to 127) and ``<name>.scale`` [out] (float32), as ONNX Runtime's
``MatMulIntegerToFloat`` takes them: the weight is their product, transposed. Of a convolution's weight the inputs are
[kernel, in]. The header's metadata tells the format and the shapes that such matrices have in the model.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from echostream.errors import CheckpointError
from echostream.files import replacing
from echostream.loading import opened, parse_json, shown
from echostream.rules import Rule, check

WEIGHTS = "model.safetensors"
FORMAT = "echostream-weights/1"
INT8, SCALE = ".int8", ".scale"  # behind the name of a matrix
AGAIN = "#"  # a graph's ``name#2`` is the tensor ``name``, too: see ``export.weights``
TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1",
    "BOOL": "|b1",
}  # fmt: skip
MAX_HEADER = 16 << 20  # bytes
MAX_WEIGHTS = 32 << 30  # bytes of a file
MAX_RANK = 8
_ENTRY = {
    "dtype": Rule(str, choices=tuple(TYPES), needed=True),
    "shape": Rule(list, 0, MAX_RANK, needed=True, of=Rule(int, 0, MAX_WEIGHTS)),
    "data_offsets": Rule(list, 2, 2, needed=True, of=Rule(int, 0, MAX_WEIGHTS)),
}  # fmt: skip


class TensorFile:
    """An open file of weights. Arrays are views of it: the system reads what is used, and may share it.

    Args:
        path: of the file.

    Attributes:
        metadata: text by name.
        names: of all tensors, in the file's order.

    Raises:
        CheckpointError: it is missing, or anything else than whole, finite weights by our rules.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with opened(path, "weights", CheckpointError, MAX_WEIGHTS) as file:
            start = file.read(8)
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
            head = file.read(size) if size <= MAX_HEADER else b""
            if not head or len(head) < size:
                raise CheckpointError(f"weights {path} are truncated or no safetensors file; fetch or export them anew")
            header = parse_json(head, f"the header of weights {path}", CheckpointError)
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata = header.pop("__metadata__", {})
        check({"metadata": self.metadata}, {"metadata": Rule(dict, of=Rule(str))}, f"weights {path}", CheckpointError)
        self._places: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}
        begin, there = 8 + size, len(self._data) - 8 - size
        for name, entry in header.items():
            check(entry, _ENTRY, f"weights {path}: {shown(name)}", CheckpointError)
            dtype, shape, (first, last) = np.dtype(TYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
            if last - first != math.prod(shape) * dtype.itemsize or last > there:
                raise CheckpointError(
                    f"weights {path}: {shown(name)} {shape} of {entry['dtype']} does not fit its place "
                    f"{first} to {last} of {there} bytes; fetch or export them again"
                )
            self._places[name] = dtype, tuple(shape), begin + first
        self.names = list(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor, not to be written to.

        Raises:
            CheckpointError: there is none of this name, or it holds NaN or infinity.
        """
        if name not in self._places:
            raise CheckpointError(f"weights {self.path} lack {shown(name)}; export the checkpoint again")
        dtype, shape, offset = self._places[name]
        array = np.frombuffer(self._data, dtype, math.prod(shape), offset).reshape(shape)
        if array.size and array.dtype.kind == "f" and not _finite(array):
            raise CheckpointError(f"weights {self.path}: {name} holds NaN or infinity")
        return array


def _finite(array: np.ndarray) -> bool:
    """``np.isfinite(array).all()``; of float16, which numpy computes number by number, by its bits."""
    if array.dtype.itemsize == 2:
        return bool((array.view(np.uint16) & 0x7C00).max() < 0x7C00)
    return bool(np.isfinite(array).all())


def write_tensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file that ``TensorFile`` reads.

    Raises:
        OutputError: it cannot be written.
    """
    kinds = {dtype: name for name, dtype in TYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    # the largest numbers first, so that all are aligned
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    for name in order:
        array = tensors[name]
        kind = kinds[array.dtype.newbyteorder("<").str]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 64)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).astype(tensors[name].dtype.newbyteorder("<"), copy=False))


# ---- int8 ------------------------------------------------------------------------------------------------------------


def product_layout(weight: np.ndarray) -> np.ndarray:
    """A weight as the matrix [out, in] of a product; of a convolution [out, in, kernel...] rows are [kernel, in]."""
    return np.moveaxis(weight, 1, -1).reshape(len(weight), -1) if weight.ndim > 2 else weight


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight in int8: numbers [in, out] (int8) and scales [out] (float32)."""
    matrix = product_layout(weight)
    largest = np.maximum(np.abs(matrix).max(axis=1), np.float32(1e-12))
    numbers = np.round(matrix / largest[:, None] * 127).astype(np.int8)
    return np.ascontiguousarray(numbers.T), (largest / np.float32(127)).astype(np.float32)


def dequantise(numbers: np.ndarray, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The weight that ``quantise`` was given, rounded, in its own shape.

    Raises:
        ValueError: the sizes contradict each other.
    """
    if len(shape) < 2 or numbers.shape != (math.prod(shape[1:]), shape[0]) or scale.shape != shape[:1]:
        raise ValueError(f"numbers {list(numbers.shape)} and scales {list(scale.shape)} are not those of {list(shape)}")
    matrix = numbers.T.astype(np.float32) * scale.astype(np.float32)[:, None]
    if len(shape) > 2:
        matrix = np.moveaxis(matrix.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
    return np.ascontiguousarray(matrix)


def read_state(path: str | Path) -> dict[str, np.ndarray]:
    """All weights of a file by their names in the state dict: in float32 whatever the file has, whole numbers as they
    are.

    Raises:
        CheckpointError: see ``TensorFile``; it is of another format, or a matrix in int8 is not whole.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        found = shown(file.metadata.get("format"))
        raise CheckpointError(f"weights {path} are of format {found}; this EchoStream reads {FORMAT!r}")
    shapes = parse_json(file.metadata.get("shapes", "{}"), f"weights {path}: shapes", CheckpointError)
    rule = Rule(list, 2, MAX_RANK, needed=True, of=Rule(int, 1, MAX_WEIGHTS))
    check(shapes, dict.fromkeys(shapes, rule), f"weights {path}: shapes", CheckpointError)
    state = {}
    for name in file.names:
        base = name.removesuffix(INT8).removesuffix(SCALE)
        if base not in shapes:
            state[name] = np.array(file[name], np.float32 if file[name].dtype.kind == "f" else None)
        elif name.endswith(INT8):
            try:
                state[base] = dequantise(file[name], file[base + SCALE], tuple(shapes[base]))
            except ValueError as problem:
                raise CheckpointError(f"weights {path}: {base}: {problem}") from None
    return state
