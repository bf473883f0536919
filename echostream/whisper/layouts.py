"""Files that Whisper's weights come in: CTranslate2, Hugging Face safetensors, OpenAI's ``.pt``.

Each layout finds a parameter by the name OpenAI gave it. Only headers are read at first: a tensor's place, type and
shape are checked against the file's size before memory is asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from echostream.errors import CheckpointError
from echostream.loading import parse_json, read_bytes

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit

Heads = tuple[tuple[int, int], ...]  # (decoder layer, head)

MAX_TENSORS = 100_000
MAX_RANK = 8
STORED_AS = {"bfloat16": "<u2", "float32": "<f4", "float16": "<f2", "float64": "<f8", "int8": "i1", "int16": "<i2",
             "int32": "<i4", "int64": "<i8", "uint8": "u1", "bool": "u1"}  # fmt: skip
_QUANTIZED = ("int8", "int16")


class Parameter(Protocol):
    """One of Whisper's parameters, not read yet.

    Attributes:
        key: what the file calls it.
        shape: of what ``read`` gives.
    """

    @property
    def key(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> np.ndarray:
        """Its values as float32; raises CheckpointError if the file cannot give them."""


@dataclass(frozen=True)
class Layout:
    """What a source says about itself before any weight is read.

    Attributes:
        path: the file with the weights, for messages; of several the index.
        find: parameter by OpenAI's name, or None if the source has none.
        key: what this layout calls the parameter of a name, for messages.
        stated: dimensions that the source states beside the weights, by the names of ``WhisperDims``.
        alignment_heads: see ``WhisperWeights``.
    """

    path: Path
    find: Callable[[str], Parameter | None]
    key: Callable[[str], str]
    stated: Mapping[str, int] = field(default_factory=dict)
    alignment_heads: Heads | None = None


@dataclass(frozen=True)
class Stored:
    """A tensor at its place in a file, row-major, little-endian; implements ``Parameter``.

    Attributes:
        dtype: numpy's name of the type, or bfloat16.
        scale: of a quantised tensor: value = stored / scale, one scale in all or one a row.
    """

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scale: Stored | None = None

    @property
    def size(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * np.dtype(STORED_AS[self.dtype]).itemsize

    def rows(self, part: int, parts: int) -> Stored:
        """One of ``parts`` equal slices along the first dimension.

        Raises:
            CheckpointError: the first dimension is not a multiple of ``parts``.
        """
        if not self.shape or self.shape[0] % parts:
            raise CheckpointError(f"{self.path}: {self.key} {list(self.shape)} does not fall into {parts} equal parts")
        shape = (self.shape[0] // parts, *self.shape[1:])
        scale = self.scale if self.scale is None or self.scale.shape in ((), (1,)) else self.scale.rows(part, parts)
        return Stored(self.path, self.key, self.dtype, shape, self.offset + part * (self.size // parts), scale)

    def read(self) -> np.ndarray:
        if self.dtype not in ("float32", "float16", "bfloat16", "float64", *_QUANTIZED):
            raise CheckpointError(f"{self.path}: {self.key} holds {self.dtype}, which no weight of Whisper is")
        if self.dtype in _QUANTIZED and self.scale is None:
            raise CheckpointError(f"{self.path}: {self.key} holds {self.dtype} without a scale ({self.key}_scale)")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise CheckpointError(f"{self.path} is truncated: {self.key} ends early; fetch it again")
        values = np.frombuffer(data, STORED_AS[self.dtype]).reshape(self.shape)
        if self.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(all="ignore"):  # what is not finite is told by name, see read_whisper
            values = values.astype(np.float32)
            if self.scale is not None and self.dtype in _QUANTIZED:
                scale = self.scale.read()
                if scale.size not in (1, self.shape[0]):
                    raise CheckpointError(
                        f"{self.path}: {self.scale.key} has {scale.size} values for {self.shape[0]} rows of {self.key}"
                    )
                values /= scale.reshape(-1, *(1,) * (values.ndim - 1)) if scale.size > 1 else scale.reshape(())
        return values


# --- JSON beside the weights ---------------------------------------------------------------------------------------


def settings_of(path: Path) -> dict[str, Any]:
    return parse_settings(path, read_bytes(path, "configuration", CheckpointError, MAX_HEADER))


def parse_settings(path: Path, data: bytes) -> dict[str, Any]:
    return parse_json(data, str(path), CheckpointError)


def heads_of(path: Path, value: Any) -> Heads | None:
    if value is None:
        return None
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(p, list) and len(p) == 2 and all(type(n) is int for n in p) for p in pairs):
        raise CheckpointError(f"{path}: alignment_heads must be a list of [layer, head]")
    return tuple((layer, head) for layer, head in pairs)


def unpack(file: BinaryIO, path: Path, form: str) -> tuple[int, ...]:
    form = "<" + form
    data = file.read(struct.calcsize(form))
    if len(data) != struct.calcsize(form):
        raise CheckpointError(f"{path} is truncated at byte {file.tell()}; fetch it again")
    return struct.unpack(form, data)
