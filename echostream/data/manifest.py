"""Manifests: tab-separated tables with StreamSpeech's columns, one utterance a line.

``id src_audio src_n_frames src_text tgt_text tgt_audio tgt_n_frames``; further columns (``voice``, ...) are allowed and
kept. No quoting: a quotation mark is a letter like any other. ``tgt_text.1``, ``src_text.1``, ``tgt_text.2`` ... are
further references of a row, such as a teacher's; a row without one leaves the cell empty. Speech to learn from a
teacher's frames alone has no texts at all: empty cells, and ``tgt_n_frames`` 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np

from echostream.errors import ManifestError
from echostream.files import write_text
from echostream.text_file import iter_lines

COLUMNS = ("id", "src_audio", "src_n_frames", "src_text", "tgt_text", "tgt_audio", "tgt_n_frames")
TEXTS = ("src_text", "tgt_text")
TEXT_COLUMNS = (*TEXTS, "tgt_audio")
RECORDING = ("id", "src_audio", "tgt_text")
SPEECH = ("id", "src_audio", "src_n_frames", "tgt_audio", "tgt_n_frames")


@dataclass(frozen=True)
class Utterance:
    """One row of a manifest.

    Attributes:
        id: unique within the manifest.
        audio: path relative to the audio root, or ``archive.zip:offset:length``.
        n_frames: source feature frames of 10 ms, as computed from the unperturbed recording; 0 where it is not told.
        src_text, tgt_text: sentences with their case and punctuation.
        units: deduplicated target units, int16 ``[U]``, each ``0 .. num_units - 1``; none where they are not known.
        extra: the columns that are not StreamSpeech's.
    """

    id: str
    audio: str
    n_frames: int
    src_text: str
    tgt_text: str
    units: np.ndarray
    extra: dict[str, str] = field(default_factory=dict)

    def references(self, column: str) -> list[str]:
        """Every text of ``src_text`` or ``tgt_text``: the row's own, if any, then ``column.1``, ``column.2`` ..."""
        names = [name for name in self.extra if name.startswith(f"{column}.") and name[len(column) + 1 :].isdecimal()]
        further = (self.extra[name] for name in sorted(names, key=lambda name: int(name[len(column) + 1 :])))
        return [text for text in (getattr(self, column), *further) if text.strip()]


@dataclass(frozen=True)
class TextPair:
    """A sentence, its translation and the translation's units, int16 ``[U]``, none where they are not known.

    ``id`` is the table's, or the row's number; ``audio`` is empty where the table has no recordings.
    """

    src_text: str
    tgt_text: str
    units: np.ndarray
    id: str
    audio: str = ""


def read_manifest(*paths: str | Path, need: Sequence[str] = COLUMNS) -> list[Utterance]:
    """Read a manifest, or several as one, and check every row.

    Args:
        need: columns without which a row is of no use. To translate recordings and score the text, ``RECORDING`` is
            enough: no units, and no lengths; to learn from a teacher's frames, ``SPEECH``: no texts. A column that is
            not needed may be missing or empty; what is there must be right all the same.

    Raises:
        ManifestError: a file is missing or empty, a column is missing, or a row does not hold what its columns
            promise, or an id has been before; the message names the file, the line and the value.
    """
    return [row for rows in read_manifests(paths, need) for row in rows]


def read_manifests(paths: Sequence[str | Path], need: Sequence[str] = COLUMNS) -> list[list[Utterance]]:
    """``read_manifest`` of several, each one's rows by themselves; no id may be in two of them."""
    manifests, seen = [], set()
    for path in paths:
        rows = []
        for row, where in table_rows(Path(path), need):
            utterance = _parse({**dict.fromkeys(COLUMNS, ""), **row}, where, need)
            if utterance.id in seen:
                raise ManifestError(f"{where}: id {utterance.id!r} appears twice")
            seen.add(utterance.id)
            rows.append(utterance)
        manifests.append(rows)
    return manifests


def read_text_pairs(path: str | Path) -> list[TextPair]:
    """Read the texts and units of a table, which needs no columns of audio; ``tgt_audio`` may be empty.

    Raises:
        ManifestError: as ``read_manifest``.
    """
    pairs: list[TextPair] = []
    for row, where in table_rows(Path(path), TEXT_COLUMNS):
        for column in ("src_text", "tgt_text"):
            if not row[column].strip():
                raise ManifestError(f"{where}: {column} is empty; leave such rows out when preparing the corpus")
        units = parse_units(row["tgt_audio"], where) if row["tgt_audio"].strip() else np.zeros(0, dtype=np.int16)
        name = row.get("id") or str(len(pairs))
        pairs.append(TextPair(row["src_text"], row["tgt_text"], units, name, row.get("src_audio", "")))
    return pairs


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
    """Every row of a table by column, and where it stands."""
    lines = iter_lines(path, what="manifest")
    header = next(lines, "").split("\t")
    for column in columns:
        if column not in header:
            raise ManifestError(f"manifest {path} has no column {column!r}; it has: {', '.join(header) or 'none'}")
    rows = 0
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        cells = line.split("\t")
        where = f"manifest {path}, line {number}"
        if len(cells) != len(header):
            raise ManifestError(f"{where}: {len(cells)} cells where the header has {len(header)} columns")
        rows += 1
        yield dict(zip(header, cells)), where
    if not rows:
        raise ManifestError(f"manifest {path} has no rows")


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write ``utterances`` so that ``read_manifest`` gives them back.

    Raises:
        ManifestError: a value holds a tab or a line break.
    """
    utterances = list(utterances)
    extra = list(dict.fromkeys(name for u in utterances for name in u.extra))
    lines = ["\t".join([*COLUMNS, *extra])]
    for u in utterances:
        units = " ".join(map(str, u.units.tolist()))
        cells = [u.id, u.audio, str(u.n_frames), u.src_text, u.tgt_text, units, str(len(u.units))]
        cells += [u.extra.get(name, "") for name in extra]
        for cell in cells:
            if any(c in cell for c in "\t\n\r"):
                raise ManifestError(f"row {u.id!r}: {cell!r} holds a tab or a line break, which a manifest cannot")
        lines.append("\t".join(cells))
    write_text(path, "\n".join(lines) + "\n")


def _parse(row: dict[str, str], where: str, need: Sequence[str]) -> Utterance:
    if row["tgt_n_frames"] == "0" and not row["tgt_audio"].strip():  # its units are not known, and it says so
        need = [column for column in need if column != "tgt_audio"]
    for column in ("id", "src_audio", "src_text", "tgt_text", "tgt_audio"):
        if column in need and not row[column].strip():
            hint = ", or train with a teacher of frames (--distill-weight, --distill-target)" if column in TEXTS else ""
            raise ManifestError(
                f"{where}: {column} is empty in row {row['id']!r}; leave such rows out when preparing the corpus{hint}"
            )
    if row["tgt_audio"].strip() and not row["tgt_text"].strip():
        raise ManifestError(f"{where}: tgt_audio has units, but tgt_text, whose they would be, is empty")
    path = PurePath(row["src_audio"])
    if path.is_absolute() or ".." in path.parts:
        raise ManifestError(f"{where}: src_audio {_short(row['src_audio'])!r} leads out of the audio root")
    n_frames = count = 0
    if "src_n_frames" in need or row["src_n_frames"].strip():
        n_frames = _whole(row["src_n_frames"], "src_n_frames", where)
    units = np.zeros(0, dtype=np.int16)
    if "tgt_audio" in need or row["tgt_audio"].strip():
        count = _whole(row["tgt_n_frames"], "tgt_n_frames", where)
        units = parse_units(row["tgt_audio"], where)
    if count != len(units):
        raise ManifestError(f"{where}: tgt_n_frames is {count}, but tgt_audio lists {len(units)} units")
    extra = {name: value for name, value in row.items() if name not in COLUMNS}
    return Utterance(row["id"], row["src_audio"], n_frames, row["src_text"], row["tgt_text"], units, extra)


def parse_units(value: str, where: str) -> np.ndarray:
    """A cell's units, int16 ``[U]``. Raises: ManifestError, naming the place ``where`` it stands."""
    try:
        units = np.array(value.split(), dtype=np.int16)
        valid = units.min() >= 0
    except (ValueError, OverflowError):
        valid = False
    if not valid:
        raise ManifestError(f"{where}: tgt_audio {_short(value)!r} is not a list of unit numbers")
    return units


def _whole(value: str, column: str, where: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) <= 18) or int(value) == 0:
        raise ManifestError(f"{where}: {column} is {_short(value)!r}; it must be a whole number above 0")
    return int(value)


def _short(value: str) -> str:
    return value if len(value) <= 40 else value[:37] + "..."
