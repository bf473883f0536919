"""The table of sentence pairs, and ledgers: tables that grow line by line and survive being interrupted."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from echostream.errors import ManifestError
from echostream.files import add, appending, replacing
from echostream.text_file import iter_lines


@dataclass(frozen=True)
class Row:
    """One sentence pair.

    Attributes:
        row: name of the pair: six digits, the line of the text file (from 0), or the stem of its clip.
        split: ``train``, ``dev``, ``test``, or ``rest`` (test groups outside the fixed test set: never used).
        src_text, tgt_text: normalised.
        target: name of the recording of the target text; pairs with one target text share it.
        rank: how rare its rarest word is: 1 for pairs of the most frequent word alone.
        src_audio, tgt_audio: ready recordings, empty where speech has to be made.
    """

    row: str
    split: str
    src_text: str
    tgt_text: str
    target: str
    rank: int = 0
    src_audio: str = ""
    tgt_audio: str = ""


def write_table(path: Path, header: Iterable[str], lines: Iterable[Iterable[object]]) -> None:
    """Write a tab-separated table in one go; readers never see half of it. Raises: OutputError."""
    with replacing(path, "w") as file:
        file.write("\t".join(header) + "\n")
        for line in lines:
            file.write("\t".join(_cell(value) for value in line) + "\n")


def read_table(path: Path, required: Iterable[str] = ()) -> Iterator[dict[str, str]]:
    """The lines of a tab-separated table with a header. A last line cut short by an interruption is left out.

    Raises:
        ManifestError: the file is missing or lacks a required column.
    """
    lines = iter_lines(path, what="table", ends=True)
    header = next(lines, "").rstrip("\r\n").split("\t")
    missing = [name for name in required if name not in header]
    if missing:
        raise ManifestError(f"table {path} has no column {missing[0]!r}; its columns are: {', '.join(header)}")
    for line in lines:
        values = line.rstrip("\r\n").split("\t")
        if line.endswith("\n") and len(values) == len(header):
            yield dict(zip(header, values))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_table(path, (f.name for f in fields(Row)), (astuple(row) for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Raises: ManifestError, when the ``text`` step has not been run."""
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; run the step 'text' first")
    names = [f.name for f in fields(Row)]
    lines: Iterable[dict[str, Any]] = read_table(path, names)
    return [Row(**{**line, "rank": int(line["rank"])}) for line in lines]


class Ledger:
    """A table to which finished work is added line by line, one file per shard, all shards read together.

    Args:
        directory: where the files ``<name>.<shard>-of-<shards>.tsv`` are.
        columns: the first one names the piece of work.
    """

    def __init__(self, directory: Path, name: str, columns: tuple[str, ...], shard: int = 0, num_shards: int = 1):
        self.directory, self.name, self.columns = directory, name, columns
        self.path = directory / f"{name}.{shard}-of-{num_shards}.tsv"

    def read(self) -> dict[str, dict[str, str]]:
        """Everything finished so far, by any shard."""
        done = {}
        for path in sorted(self.directory.glob(f"{self.name}.*-of-*.tsv")):
            if not path.stat().st_size:  # another shard has just begun
                continue
            for line in read_table(path, self.columns):
                done[line[self.columns[0]]] = line
        return done

    def append(self, lines: Iterable[Iterable[object]]) -> None:
        """Add finished lines; a line that an interruption cut short is dropped first.

        Raises:
            OutputError: the file cannot be written, or another process is at work on the same shard.
        """
        with appending(self.path, wait=False) as file:
            self._add(file, lines)

    def _add(self, file: io.FileIO, lines: Iterable[Iterable[object]]) -> None:
        text = "".join("\t".join(_cell(v) for v in line) + "\n" for line in lines)
        if file.seek(0, os.SEEK_END) == 0:
            text = "\t".join(self.columns) + "\n" + text
        else:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.readall().rfind(b"\n") + 1)
        add(file, text)

    @contextmanager
    def batches(self, size: int) -> Iterator[Callable[..., None]]:
        """Gives a function that takes the cells of one finished line; ``size`` lines are added at a time.

        The file is this process's alone until the block ends.

        Raises:
            OutputError: the file cannot be written, or another process is at work on the same shard.
        """
        lines: list[tuple[object, ...]] = []
        with appending(self.path, wait=False) as file:

            def record(*cells: object) -> None:
                lines.append(cells)
                if len(lines) == size:
                    flush()

            def flush() -> None:
                finished, lines[:] = list(lines), []
                self._add(file, finished)

            yield record
            flush()


class Skipped:
    """Rows left out by one step of one shard, with the reason. Written anew at each run: what is mended disappears."""

    COLUMNS = ("step", "row", "reason", "detail")

    def __init__(self, directory: Path, step: str, shard: int = 0, num_shards: int = 1):
        self.step = step
        self.lines: list[tuple[str, ...]] = []
        self.path = directory / f"{step}.{shard}-of-{num_shards}.tsv"

    def add(self, row: str, reason: str, detail: object = "") -> None:
        self.lines.append((self.step, row, reason, str(detail)))

    def write(self) -> None:
        write_table(self.path, self.COLUMNS, self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __enter__(self) -> Skipped:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()


def hash_int(*parts: object) -> int:
    """A number that depends on nothing but ``parts``: the seed of every choice made for a row."""
    return int(hashlib.sha1("\t".join(map(str, parts)).encode("utf-8")).hexdigest()[:15], 16)


def take_shard(items: list, shard: int, num_shards: int) -> list:
    """Every ``num_shards``-th item; the shards are disjoint and together make up all."""
    if not 0 <= shard < num_shards:
        raise ManifestError(f"--shard {shard} is outside 0..{num_shards - 1} (--num-shards {num_shards})")
    return items[shard::num_shards]


def _cell(value: object) -> str:
    return str(value).replace("\t", " ").replace("\n", " ").replace("\r", " ")


__all__ = [
    "Ledger",
    "Row",
    "Skipped",
    "hash_int",
    "read_rows",
    "read_table",
    "take_shard",
    "write_rows",
    "write_table",
]
