"""Which weights a graph's file leaves to ``model.safetensors``; read without the package ``onnx``.

An ONNX file is a protobuf message. Of its many fields these are looked at: ``ModelProto.graph`` (7),
``GraphProto.initializer`` (5), and of a ``TensorProto`` ``dims`` (1), ``data_type`` (2), ``name`` (8) and
``data_location`` (14).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from echostream.errors import CheckpointError

TYPES: dict[int, type[np.generic]] = {1: np.float32, 3: np.int8, 10: np.float16}  # TensorProto.DataType
_LOCATION = b"\n\x08location\x12"  # the key of a tensor's ``external_data``


class Outside(NamedTuple):
    """A constant whose numbers are elsewhere."""

    dtype: type[np.generic]
    shape: tuple[int, ...]


def weights_outside(data: bytes, where: str) -> dict[str, Outside]:
    """The constants of a graph that are given to it when it is opened, by name.

    Args:
        data: the ONNX file.
        where: its name, for the message.

    Raises:
        CheckpointError: it is no ONNX file, or refers to files in another way, which ONNX Runtime would open.
    """
    found: dict[str, Outside] = {}
    try:
        view = memoryview(data)
        for graph in _messages(view, 7):
            for tensor in _messages(graph, 5):
                name, kind, dims, location = "", 0, [], 0
                for number, value in _fields(tensor):
                    if number == 8 and isinstance(value, memoryview):
                        name = str(value, "utf-8")
                    elif number == 2 and isinstance(value, int):
                        kind = value
                    elif number == 14 and isinstance(value, int):
                        location = value
                    elif number == 1:
                        dims += [value] if isinstance(value, int) else _numbers(value)
                if location:
                    found[name] = Outside(TYPES[kind], tuple(dims))
    except (ValueError, KeyError, IndexError) as problem:
        raise CheckpointError(f"{where} is damaged or no ONNX graph ({problem}); export the checkpoint again") from None
    if data.count(_LOCATION) != len(found):
        raise CheckpointError(f"{where} keeps weights in other files, which are not read")
    return found


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The messages in a field of a message."""
    for number, value in _fields(message):
        if number == wanted and isinstance(value, memoryview):
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a message's fields. Raises ValueError, IndexError: it is none."""
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _number(message, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _number(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(message):
            raise ValueError("it ends within a field")
        yield tag >> 3, message[at : at + size]
        at += size


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """A whole number of variable length at a place, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _numbers(packed: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(packed):
        value, at = _number(packed, at)
        found.append(value)
    return found
