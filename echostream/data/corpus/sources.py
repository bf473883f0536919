"""Where sentence pairs and ready recordings come from: text files, ready speech, CVSS with Common Voice."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from echostream.audio.io import decode_audio, load_audio
from echostream.data.corpus.normalize import count_words, normalize_text, words_of
from echostream.data.corpus.rows import Row, Skipped
from echostream.data.corpus.split import TEST_SIZE, fixed_test_rows, least_sets, split_pairs
from echostream.errors import AudioError, ManifestError
from echostream.loading import inside
from echostream.text_file import decode, iter_lines, lines_of, table_rows


def rows_of_text(
    path: Path,
    skipped: Skipped,
    max_words: int = 40,
    test_size: int | None = None,
    columns: tuple[str, str] | None = None,
    train_only: bool = False,
    least: bool = False,
) -> list[Row]:
    """Sentence pairs of a parallel text file (tab-separated, gzip by the suffix ``.gz``, one header line).

    Args:
        test_size: pairs of the test set at most; None is 1000.
        columns: header names of the source and target side; by default the first two columns.
        train_only: every pair trains; what tests is elsewhere.
        least: a corpus too small for the split rule gets a test set (of ``test_size``, if that was said) and a dev set
            all the same.

    Raises:
        ManifestError: the file is missing, is no text, or has not the columns; or it is too small for its sets.
    """
    pairs = list(_read_pairs(path, columns))
    splits = ["train"] * len(pairs) if train_only else split_pairs(pairs)
    test = set(fixed_test_rows(pairs, splits, TEST_SIZE if test_size is None else test_size))
    if least and not train_only:
        usable = [
            min(counts) > 0 and max(counts) <= max_words
            for counts in (tuple(count_words(normalize_text(side)) for side in pair) for pair in pairs)
        ]
        try:
            splits, test = least_sets(pairs, splits, test, usable, test_size)
        except ManifestError as error:
            raise ManifestError(f"text file {path}: {error}") from None
    seen: dict[str, str] = {}
    rows = []
    for i, ((source, target), split) in enumerate(zip(pairs, splits)):
        source, target, name = normalize_text(source), normalize_text(target), f"{i:06d}"
        if not source or not target:
            skipped.add(name, "empty text", "source" if not source else "target")
        elif max(count_words(source), count_words(target)) > max_words:
            skipped.add(name, "too long", f"{max(count_words(source), count_words(target))} words, limit {max_words}")
        else:
            if split == "test" and i not in test:
                split = "rest"
            rows.append(Row(name, split, source, target, seen.setdefault(target, name)))
    return with_ranks(rows)


def rows_of_cvss(common_voice: Path, cvss: Path, skipped: Skipped, max_words: int = 40) -> list[Row]:
    """Pairs of CVSS-C: ``<split>.tsv`` beside wav directories ``<split>/``, over Common Voice's clips and texts.

    Common Voice has ``{train,dev,test}.tsv`` (columns path, sentence) and ``clips/``; CVSS has ``{train,dev,test}.tsv``
    (clip name, translation; with or without a header ``id``/``path`` and ``translation``) and
    ``{train,dev,test}/<clip name>.wav``. The split is the data's own. CVSS's split decides where both name a clip:
    its clips are looked up in every tsv of Common Voice. A sentence, of either side, that stands in several splits (two
    people have read it, or a clip is listed twice) is left out of all but the last of train, dev, test.

    Raises:
        ManifestError: neither corpus has a usable tsv.
    """
    sentences: dict[str, str] = {}
    for table in sorted(common_voice.glob("*.tsv")):
        for line in _read_csv(table):
            if "path" in line and "sentence" in line:
                sentences.setdefault(Path(line["path"]).stem, line["sentence"])
    if not sentences:
        raise ManifestError(f"{common_voice} holds no tsv with the columns 'path' and 'sentence'")
    rows, found = [], False
    names: set[str] = set()
    taken: dict[tuple[str, str], str] = {}  # the split of every sentence that is tested on
    for split in ("test", "dev", "train"):
        table = cvss / f"{split}.tsv"
        if not table.is_file():
            continue
        found = True
        for clip, translation in _read_translations(table):
            name = Path(clip).stem
            source, target = normalize_text(sentences.get(name, "")), normalize_text(translation)
            clip_path = _first_file(common_voice / "clips", name, (".mp3", ".wav", ".flac", ".ogg"))
            target_path = _first_file(cvss / split, Path(clip).name, (".wav", ".flac", ""))
            if name not in sentences:
                skipped.add(name, "no source text", f"not in any tsv of {common_voice.name}")
            elif not source or not target:
                skipped.add(name, "empty text", "source" if not source else "target")
            elif max(count_words(source), count_words(target)) > max_words:
                skipped.add(name, "too long", f"more than {max_words} words")
            elif clip_path is None or target_path is None:
                skipped.add(name, "missing audio", "source" if clip_path is None else "target")
            elif name in names:
                skipped.add(name, "clip appears twice", f"once more in {split}.tsv")
            elif other := next(
                (taken[side] for side in (("source", source), ("target", target)) if taken.get(side, split) != split),
                None,
            ):
                skipped.add(name, "sentence of another split", f"{split} shares it with {other}")
            else:
                names.add(name)
                taken.setdefault(("source", source), split)
                taken.setdefault(("target", target), split)
                rows.append(Row(name, split, source, target, name, 0, str(clip_path), str(target_path)))
    if not found:
        raise ManifestError(f"{cvss} holds none of train.tsv, dev.tsv and test.tsv")
    rows.sort(key=lambda row: ("train", "dev", "test").index(row.split))
    return with_ranks(rows)


def locale_of(common_voice: Path) -> str:
    """What Common Voice's column ``locale`` says; empty where there is none."""
    for table in sorted(common_voice.glob("*.tsv")):
        line = next(table_rows(iter_lines(table, what="table")), {})
        if line.get("locale"):
            return line["locale"]
    return ""


def with_ranks(rows: list[Row]) -> list[Row]:
    """Give each row the frequency rank of its rarest word, the worse of both sides, counted on the train split."""
    ranks = []
    for side in ("src_text", "tgt_text"):
        counts = Counter(w for row in rows if row.split == "train" for w in words_of(getattr(row, side)))
        order = sorted(counts, key=lambda word: (-counts[word], word))
        ranks.append({word: i for i, word in enumerate(order, 1)})
    unseen = max(map(len, ranks), default=0) + 1
    return [
        Row(
            **{
                **vars(row),
                "rank": max(
                    (
                        rank.get(w, unseen)
                        for text, rank in zip((row.src_text, row.tgt_text), ranks)
                        for w in words_of(text)
                    ),
                    default=unseen,
                ),
            }
        )
        for row in rows
    ]


class ReadySpeech:
    """Sentences of the text file that somebody has already spoken.

    A directory with ``manifest.tsv`` (columns row, audio, voice; row = line of the text file, from 0) and the audio
    files, beside it or in a ``.tar`` in the same directory; or such a ``.tar`` that holds ``manifest.tsv`` too.

    Attributes:
        entries: manifest lines by row name.

    Raises:
        ManifestError: no manifest, or one without the needed columns.
    """

    def __init__(self, path: Path):
        directory = path if path.is_dir() else path.parent
        self._tars = sorted(directory.glob("*.tar")) if path.is_dir() else [path]
        self._members: dict[str, tuple[tarfile.TarFile, tarfile.TarInfo]] = {}
        for tar_path in self._tars:
            try:
                tar = tarfile.open(tar_path)
                self._members.update({m.name.removeprefix("./"): (tar, m) for m in tar.getmembers() if m.isfile()})
            except (tarfile.TarError, OSError) as error:
                raise ManifestError(f"ready speech {tar_path} is not a tar file: {error}") from None
        self._directory = directory
        manifest = directory / "manifest.tsv"
        if path.is_dir() and manifest.is_file():
            lines = _read_csv(manifest)
        elif "manifest.tsv" in self._members:
            lines = list(table_rows(lines_of(decode(self._bytes("manifest.tsv"), f"manifest.tsv in {path}"))))
        else:
            raise ManifestError(f"ready speech {path} has no manifest.tsv")
        self.entries: dict[str, dict[str, str]] = {}
        for number, line in enumerate(lines, 2):
            missing = [name for name in ("row", "audio", "voice") if not line.get(name)]
            if missing or not line["row"].isdigit():
                column = (missing or ["row"])[0]
                raise ManifestError(f"ready speech {path}: manifest line {number} has no usable {column!r}")
            self.entries[f"{int(line['row']):06d}"] = line

    def load(self, row: str) -> np.ndarray:
        """float32 [N] at 16 kHz. Raises AudioError."""
        name = self.entries[row]["audio"]
        if name not in self._members:
            return load_audio(inside(self._directory, name, "audio of the ready speech", AudioError))
        return decode_audio(self._bytes(name), f"{name} of the ready speech")

    def _bytes(self, name: str) -> bytes:
        tar, member = self._members[name]
        file = tar.extractfile(member)
        assert file is not None  # members are plain files
        return file.read()


def pair_columns(path: Path, columns: tuple[str, str] | None = None) -> tuple[str, str]:
    """Header names of the source and the target side of a parallel text file; by default the first two.

    Raises:
        ManifestError: as ``rows_of_text``.
    """
    header = pair_header(path)
    for name in columns or ():
        if name not in header:
            raise ManifestError(f"text file {path} has no column {name!r}; it has: {', '.join(header)}")
    return columns or (header[0], header[1])


def pair_header(path: Path) -> list[str]:
    """The names of a parallel text file's columns. Raises ManifestError."""
    header = next(iter_lines(path, what="text file"), "").split("\t")
    if len(header) < 2:
        raise ManifestError(f"text file {path}: the header {header[0][:40]!r} has one column, two are needed")
    return header


def _read_pairs(path: Path, columns: tuple[str, str] | None) -> Iterator[tuple[str, str]]:
    wanted = pair_columns(path, columns)
    lines = iter_lines(path, what="text file")
    header = next(lines).split("\t")
    source, target = (header.index(name) for name in wanted)
    for line in lines:
        # A line with too few columns keeps its number and is skipped later as empty text.
        cells = line.split("\t") + [""] * len(header)
        yield cells[source], cells[target]


def _read_translations(path: Path) -> Iterator[tuple[str, str]]:
    lines = [line.split("\t") for line in iter_lines(path, what="table") if line.strip()]
    if not lines:
        return
    header = [cell.lower() for cell in lines[0]]
    if "translation" in header:
        key = next((name for name in ("path", "id", "audio") if name in header), header[0])
        clip, text = header.index(key), header.index("translation")
        lines = lines[1:]
    else:
        clip, text = 0, 1
    for cells in lines:
        cells += [""] * (max(clip, text) + 1 - len(cells))
        yield cells[clip], cells[text]


def _read_csv(path: Path) -> list[dict[str, str]]:
    return list(table_rows(iter_lines(path, what="table")))


def _first_file(directory: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    if not stem:
        return None
    paths = (inside(directory, f"{stem}{suffix}", "recording", ManifestError) for suffix in suffixes)
    return next((path for path in paths if path.is_file()), None)


__all__ = ["ReadySpeech", "rows_of_cvss", "rows_of_text", "with_ranks"]
