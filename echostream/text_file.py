"""Text files as every reader here takes them: UTF-8, with or without a byte order mark, lines that end at ``\\n`` only.

``str.splitlines()`` also ends lines at U+2028, U+2029, U+0085, VT and FF, which stand inside sentences of web text;
every line after one of them would belong to its neighbour's reference.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from echostream.errors import EchoStreamError, ManifestError


def decode(data: bytes, name: object, error: type[EchoStreamError] = ManifestError, line: int = 1) -> str:
    """``data`` as text, without its byte order mark.

    Args:
        name: what to call it in the error.
        error: what to raise.
        line: number of its first line, for the message.

    Raises:
        EchoStreamError: (of the type ``error``) it is not UTF-8; the message guesses what it is.
    """
    encoding = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}.get(data[:2])
    if encoding is None and b"\0" in data:
        even, odd = data[:2000:2].count(0), data[1:2000:2].count(0)
        if max(even, odd) < len(data[:2000]) // 4:
            raise error(f"{name} is not text: NUL bytes in line {line}")
        encoding = "UTF-16BE" if even > odd else "UTF-16LE"
    if encoding:
        raise error(f"{name} is not UTF-8 text but {encoding}; convert it: iconv -f {encoding} -t UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        line += data.count(b"\n", 0, reason.start)
        raise error(
            f"{name} is not UTF-8 text: byte 0x{data[reason.start]:02x} in line {line}; "
            "if it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8"
        ) from None


def iter_lines(
    path: str | Path, error: type[EchoStreamError] = ManifestError, what: str = "file", ends: bool = False
) -> Iterator[str]:
    """The lines of a file, one at a time; of a gzip file, if it is called ``.gz``.

    Args:
        error: what to raise.
        what: the file is, for the message.
        ends: leave the lines' ends where they are.

    Raises:
        EchoStreamError: (of the type ``error``) the file is missing, cannot be read, or is not UTF-8.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, data in enumerate(file, 1):
                line = decode(data, f"{what} {path}", error, number)
                yield line if ends else line.removesuffix("\n").removesuffix("\r")
    except FileNotFoundError:
        raise error(f"{what} {path} does not exist") from None
    except (OSError, EOFError, zlib.error) as reason:  # BadGzipFile is an OSError
        raise error(f"{what} {path} cannot be read: {getattr(reason, 'strerror', None) or reason}") from None


def read_lines(path: str | Path, error: type[EchoStreamError] = ManifestError, what: str = "file") -> list[str]:
    """The lines of a file without their ends, which are ``\n`` or ``\r\n`` and nothing else; as ``iter_lines``."""
    return list(iter_lines(path, error, what))


def read_text(path: str | Path, error: type[EchoStreamError] = ManifestError, what: str = "file") -> str:
    """A whole file, its line ends as they are; as ``iter_lines``."""
    return "".join(iter_lines(path, error, what, ends=True))


def lines_of(text: str) -> list[str]:
    """The lines of a text, as ``read_lines`` has them."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def read_json(path: str | Path, error: type[EchoStreamError] = ManifestError, what: str = "file") -> Any:
    """The value of a JSON file.

    Raises:
        EchoStreamError: (of the type ``error``) as ``read_text``, or it is not JSON.
    """
    try:
        return json.loads(read_text(path, error, what))
    except (ValueError, RecursionError) as reason:
        if isinstance(reason, EchoStreamError):
            raise
        raise error(f"{what} {path} is not JSON: {reason}") from None


def read_json_lines(path: str | Path, error: type[EchoStreamError] = ManifestError, what: str = "file") -> list[Any]:
    """The values of a file of JSON lines; empty lines are left out.

    Raises:
        EchoStreamError: (of the type ``error``) as ``read_text``, or a line is not JSON; the message has its number.
    """
    values = []
    for number, line in enumerate(read_lines(path, error, what), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError) as reason:
                raise error(f"{what} {path}, line {number} is not JSON: {reason}") from None
    return values


def table_rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a tab-separated table by the names of its header; no quoting. Cells that a row lacks are empty."""
    lines = iter(lines)
    header = next(lines, "").split("\t")
    for line in lines:
        if line:
            cells = line.split("\t")
            yield dict(zip(header, cells + [""] * (len(header) - len(cells))))


__all__ = [
    "decode",
    "iter_lines",
    "lines_of",
    "read_json",
    "read_json_lines",
    "read_lines",
    "read_text",
    "table_rows",
]
