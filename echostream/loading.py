"""One way to read files that anybody may have made: configurations, dictionaries, subword models, archives, arrays.

What is read here is bounded before memory is taken for it, is of the kind it should be, and nothing in it is run.
Every function takes ``what`` the file should be (``dictionary``) and the class of ``error`` to raise; its message is
one line that names the file, the key or line, the value, and what would be right. Weights are in ``weights`` (torch).

What a file may hold is said by tables of ``rules.Rule``, a key each.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import yaml

from echostream.errors import ConfigError, EchoStreamError, ManifestError, require
from echostream.text_file import decode

Error = type[EchoStreamError]

MAX_SETTINGS = 1 << 20  # bytes of a configuration
MAX_DICTIONARY = 64 << 20
MAX_SUBWORDS = 64 << 20  # of a SentencePiece model
MAX_DEPTH = 16  # lists in lists of a configuration
MAX_WORD = 80  # letters of a value that a message repeats
# What damaged input makes the readers of others raise; none of them has an error of its own for it.
DAMAGE = (
    OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError,
    RuntimeError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def reason(error: BaseException) -> str:
    """The first line of what an exception says, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def shown(value: Any) -> str:
    """A value as a message repeats it: one line, not too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} that is too long to be shown"
    return text if len(text) <= MAX_WORD else f"{text[: MAX_WORD - 3]}..."


# ---- files and paths -----------------------------------------------------------------------------------------------


@contextmanager
def opened(path: str | Path, what: str, error: Error, most: int, missing: str = "") -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Args:
        most: bytes that such a file may have.
        missing: what to say after "does not exist".

    Raises:
        EchoStreamError: (``error``) it is missing, no regular file, too large, or cannot be read.
    """
    try:
        # a named pipe would be waited for; it is opened without, and then seen to be none
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{what} {path} does not exist{missing}") from None
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        text = getattr(problem, "strerror", None) or reason(problem)
        raise error(f"{what} {shown(str(path))} cannot be read: {text}") from None
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise error(f"{what} {path} is no regular file")
        if state.st_size > most:
            raise error(f"{what} {path} has {state.st_size} bytes; at most {most} are read")
        with open(handle, "rb", closefd=False) as file:
            yield file
    except OSError as problem:
        raise error(f"{what} {path} cannot be read: {problem.strerror or reason(problem)}") from None
    finally:
        os.close(handle)


def read_bytes(path: str | Path, what: str, error: Error, most: int, missing: str = "") -> bytes:
    """A whole regular file. Raises EchoStreamError (``error``): as ``opened``."""
    with opened(path, what, error, most, missing) as file:
        return file.read(most)


def read_text(path: str | Path, what: str, error: Error, most: int, missing: str = "") -> str:
    """A UTF-8 file, a byte order mark left out.

    Raises:
        EchoStreamError: (``error``) as ``read_bytes``, or it is in another encoding.
    """
    return decode(read_bytes(path, what, error, most, missing), f"{what} {path}", error)


def inside(directory: str | Path, name: Any, what: str, error: Error) -> Path:
    """The path of a file that ``name``, a value from a file, may mean: below ``directory``, symbolic links followed.

    Raises:
        EchoStreamError: (``error``) the name is no text, absolute, or leads out of the directory.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise error(f"{what} is {shown(name)}; it must be the name of a file in {directory}")
    path = Path(directory, name)
    try:
        within = path.resolve().is_relative_to(Path(directory).resolve())
    except (OSError, RuntimeError) as problem:  # a circle of links, a name too long
        raise error(f"{what} {shown(name)} cannot be followed: {reason(problem)}") from None
    if Path(name).is_absolute() or not within:
        raise error(f"{what} {shown(name)} leads out of {directory}; only files in there are read")
    return path


# ---- YAML and JSON -------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases, which let a few lines stand for millions, without deep nests and double keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not read")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        double = next((key for key, count in keys.items() if count > 1), None)
        if double is not None:
            raise yaml.YAMLError(f"the key {shown(double)} is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, what: str, error: Error, missing: str = "") -> dict[str, Any]:
    """The pairs of a YAML file; an empty file has none.

    Raises:
        EchoStreamError: (``error``) the file is missing, is not YAML, or holds something else than pairs.
    """
    values = parse_yaml(read_text(path, what, error, MAX_SETTINGS, missing), f"{what} {path}", error)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise error(f"{what} {path} holds {type(values).__name__}, not key: value lines")
    return values


def parse_yaml(text: str, what: str, error: Error) -> Any:
    """The value of a YAML text.

    Raises:
        EchoStreamError: (``error``) it is not YAML, or of the kinds of YAML that are not read (see ``_Loader``).
    """
    try:
        # not yaml.load: some releases hand it to a parser of another kind
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        at = f" in line {mark.line + 1}" if mark is not None else ""
        raise error(f"{what} is not YAML{at}: {getattr(problem, 'problem', None) or reason(problem)}") from None
    except (ValueError, TypeError, OverflowError, RecursionError, AttributeError) as problem:
        # a date that is none, a number of 5000 digits: PyYAML builds values without catching what they raise
        raise error(f"{what} holds a value that cannot be read: {reason(problem)}") from None


def read_mapping(path: str | Path, error: Error = ConfigError, missing: str = "") -> dict[str, Any]:
    """``read_yaml`` of a configuration of the user's own; the message begins with the path."""
    return read_yaml(path, "configuration", error, missing)


def parse_json(text: str | bytes, what: str, error: Error) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
        EchoStreamError: (``error``) it is no JSON, no object, or has a key twice.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(found)
        if len(values) != len(found):
            double = next(key for key, count in Counter(key for key, _ in found).items() if count > 1)
            raise ValueError(f"the key {double!r} is there twice")
        return values

    try:
        values = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} is not JSON: {reason(problem)}") from None
    if not isinstance(values, dict):
        raise error(f"{what} holds {type(values).__name__}, not an object")
    return values


def read_json(path: str | Path, what: str, error: Error, missing: str = "") -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        EchoStreamError: (``error``) as ``read_text`` and ``parse_json``.
    """
    return parse_json(read_text(path, what, error, MAX_SETTINGS, missing), f"{what} {path}", error)


# ---- arrays --------------------------------------------------------------------------------------------------------


def read_array(data: bytes, where: str, error: Error, kinds: str = "biuf") -> np.ndarray:
    """The array of a ``.npy`` file's bytes: numbers or truth values (with ``U`` among numpy's ``kinds`` text too), as
    many as its header says. It may share the memory of ``data``, and then cannot be written to.

    Raises:
        EchoStreamError: (``error``) it is no such array, or its header and its size contradict each other.
    """
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(file)
        if dtype.kind not in kinds:
            raise ValueError(f"it holds {dtype}, no numbers")
        wanted, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
        if wanted != there or min(shape, default=0) < 0:
            raise ValueError(f"shape {list(shape)} of {dtype} needs {wanted} bytes, {there} are there")
        array = np.frombuffer(data, dtype, wanted // max(dtype.itemsize, 1), file.tell())
        array = array.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="), copy=False)
        if dtype.kind == "U" and array.size and np.ascontiguousarray(array).view(np.uint32).max() > 0x10FFFF:
            raise ValueError("it holds letters that do not exist")
    except (*DAMAGE, SyntaxError, TokenError) as problem:  # the last two: the header is a Python literal
        raise error(f"{where} is not a usable .npy array: {reason(problem)}") from None
    return array


def read_npz(
    path: str | Path, what: str, error: Error, most: int, names: Iterable[str] = (), kinds: str = "biuf"
) -> dict[str, np.ndarray]:
    """All arrays of a ``.npz`` archive.

    Args:
        most: bytes that they may have together once unpacked.
        names: arrays that must be there.
        kinds: as for ``read_array``.

    Raises:
        EchoStreamError: (``error``) the file is missing, no such archive, damaged, too large, or lacks an array.
    """
    arrays = {}
    try:
        with opened(path, what, error, most + (1 << 20)) as whole, zipfile.ZipFile(whole) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if size > most:
                raise error(f"{what} {path} would unpack to {size} bytes; at most {most} are read")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise error(f"{what} {path} holds the array {shown(name)} twice")
                with archive.open(member) as file:
                    content = file.read(member.file_size)
                    file.read(1)  # the end of a member is where its checksum is compared
                if len(content) != member.file_size:
                    raise error(f"{what} {path} ends within the array {shown(name)}")
                arrays[name] = read_array(content, f"{what} {path}: {shown(name)}", error, kinds)
    except EchoStreamError:
        raise
    except DAMAGE as problem:
        raise error(f"{what} {path} is damaged or not a npz archive ({reason(problem)})") from None
    for name in names:
        if name not in arrays:
            some = [*map(shown, list(arrays)[:6]), *(["..."] if len(arrays) > 6 else [])]
            raise error(f"{what} {path} lacks the array {name!r}; it has: {', '.join(some) or 'none'}")
    return arrays


def check_array(
    array: np.ndarray, where: str, error: Error, kind: str = "f", shape: tuple[int | None, ...] = (),
    least: float | None = None, most: float | None = None, nan: bool = False,
) -> np.ndarray:  # fmt: skip
    """An array, if it is what it should be.

    Args:
        kind: numpy's kinds that will do: ``f``, ``i``, ``b``, ``U``.
        shape: its sizes, None for any.
        least, most: of its numbers.
        nan: may NaN be among them?

    Raises:
        EchoStreamError: (``error``) it is of another kind or shape, or holds infinity or numbers out of range.
    """
    fits = array.ndim == len(shape) and all(want in (None, size) for want, size in zip(shape, array.shape))
    if array.dtype.kind not in kind or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise error(f"{where} has shape {list(array.shape)} of {array.dtype}; it must be [{wanted}] of kind {kind}")
    if array.dtype.kind == "f" and not (np.isfinite(array) | (np.isnan(array) if nan else False)).all():
        raise error(f"{where} holds NaN or infinite numbers")
    if array.size and ((least is not None and array.min() < least) or (most is not None and array.max() > most)):
        raise error(f"{where} holds {array.min()} to {array.max()}; its numbers must be from {least} to {most}")
    return array


# ---- subwords ------------------------------------------------------------------------------------------------------


def read_subwords(path: str | Path) -> Any:
    """A SentencePiece model, as its ``SentencePieceProcessor``.

    Raises:
        ManifestError: the file is missing or no SentencePiece model.
        MissingExtraError: SentencePiece is not installed.
    """
    sentencepiece = require("sentencepiece", "all")
    data = read_bytes(path, "SentencePiece model", ManifestError, MAX_SUBWORDS)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if not data or not processor.LoadFromSerializedProto(data) or not processor.GetPieceSize():
            raise ValueError("it holds no pieces")
        processor.EncodeAsPieces("a")  # what is wrong in its tables shows here
    except DAMAGE as problem:
        raise ManifestError(f"{path} is not a SentencePiece model: {reason(problem)}") from None
    return processor


def pieces_of(processor: Any) -> list[str]:
    """The pieces that a dictionary must have: all but marks, the unknown one, bytes and those never given out."""
    sp = processor
    others = (sp.IsControl, sp.IsUnknown, sp.IsByte, sp.IsUnused)
    return [sp.IdToPiece(i) for i in range(sp.GetPieceSize()) if not any(kind(i) for kind in others)]
