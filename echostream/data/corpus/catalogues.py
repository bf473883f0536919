"""Parallel text from gettext catalogues: what programs say and its translations, from help to games' dialogue.

A catalogue (``.mo``, ``.po``) lies at ``.../<language>/LC_MESSAGES/<domain>.mo`` or is named ``<language>.po``; its
message ids are the text in one language, English nearly always. Only prose is kept: no placeholders, markup, labels.
"""

from __future__ import annotations

import ast
import gzip
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from echostream.data.corpus.normalize import count_words, normalize_text, words_of
from echostream.data.corpus.rows import hash_int
from echostream.errors import ManifestError
from echostream.files import replacing
from echostream.text_file import iter_lines

MAX_RATIO = 2.0  # words or characters of one side to those of the other; short sentences may be two words apart
_MAX_SAME = 0.4  # of the longer words; more of them on both sides: not translated
_CLOSING = "\"')"  # after normalisation
_ENDS = re.compile(rf"(?<=[.!?…])[{_CLOSING}]*\s+(?=[\"'(¿¡]*[^\W\d_a-zß-öø-ÿ])")  # a capital follows
_INLINE_TAG = re.compile(r"</?\s*(?:i|b|u|em|strong|small|big|tt|p|br|span)\b[^<>]*>", re.IGNORECASE)
_ALLOWED = re.compile(r"[^\W_]|[\s.,;:!?¿¡…'\"()\-–—ºª·]")
_UNSPOKEN = re.compile(
    r"\w[.:/]\w"  # file names, times of the clock, addresses
    r"|(?:^|\s)-+\w"  # options
    r"|[a-zà-öø-ÿ][A-ZÀ-ÖØ-Þ]"  # camelCase
    r"|\b[A-ZÀ-ÖØ-Þ0-9]{5,}\b"  # CONSTANTS
    r"|\d{5,}|\.{4,}|--|\(s\)|\( ?\)|\" ?\"|[,;:]{2,}"
)


@dataclass(frozen=True)
class Limits:
    """What a pair may look like.

    Attributes:
        min_words, max_words: of either side. Messages of several sentences are cut into pieces of one or more
            sentences, each message by a length of its own up to ``max_words``, so that all lengths occur.
        fragments: also keep what does not end like a sentence.
    """

    min_words: int = 3
    max_words: int = 60
    fragments: bool = False


def catalogue_files(directories: Iterable[Path], language: str) -> list[Path]:
    """The catalogues of a language (``es``; ``es_MX`` and the like only if no others of its domain are there), sorted.

    Raises:
        ManifestError: a directory does not exist, or holds no catalogue of the language.
    """
    wanted = language.replace("-", "_").lower()
    best: dict[tuple[Path, str], tuple[tuple[bool, str], Path]] = {}
    directories = list(directories)
    for directory in directories:
        if not directory.is_dir():
            raise ManifestError(f"{directory} is not a directory; give one that holds gettext catalogues (.mo, .po)")
        for path in directory.rglob("*.[mp]o"):
            found = _place(path, wanted)
            if found is not None:
                domain, locale = found
                rank = (locale != wanted, locale)
                if domain not in best or rank < best[domain][0]:
                    best[domain] = (rank, path)
    if not best:
        names = ", ".join(map(str, directories))
        raise ManifestError(f"{names}: no catalogue of {language!r} ({wanted}/LC_MESSAGES/*.mo, {wanted}.po)")
    return sorted(path for _, path in best.values())


def read_catalogue(path: Path) -> list[tuple[str, str]]:
    """(message, translation) of a ``.mo`` or ``.po`` file without contexts; of plural forms the first pair.

    Raises:
        ManifestError: the file is not what its suffix says.
    """
    try:
        entries = _read_po(path.read_bytes().decode("utf-8")) if path.suffix == ".po" else _read_mo(path.read_bytes())
        return [
            (message.split("\x04")[-1].split("\0")[0], translation.split("\0")[0])
            for message, translation in entries
            if message and translation
        ]
    except (ValueError, SyntaxError, LookupError, struct.error) as error:
        raise ManifestError(f"catalogue {path} cannot be read: {error}") from None


def prose_pairs(
    entries: Iterable[tuple[str, str]], limits: Limits = Limits(), counts: Counter | None = None
) -> Iterator[list[tuple[str, str]]]:
    """Pieces of prose, each the list of its sentences' pairs (one pair where the sides do not part alike).

    Args:
        entries: messages and their translations.
        counts: gets the number of messages, sentences and pieces dropped, by reason.
    """
    counts = Counter() if counts is None else counts
    for message, translation in entries:
        message, translation = _text(message), _text(translation)
        if not message or not translation:
            counts["no text"] += 1
            continue
        paragraphs = [re.split(r"\s*\n\s*\n\s*", side.strip()) for side in (message, translation)]
        if len(paragraphs[0]) != len(paragraphs[1]):
            paragraphs = [[message], [translation]]
        for pair in zip(*paragraphs):
            for piece in _pieces(*map(normalize_text, pair), limits, counts):
                if min(sum(map(count_words, side)) for side in zip(*piece)) < limits.min_words:
                    counts["too short"] += 1
                else:
                    yield piece


def held_out(tables: Iterable[Path]) -> set[str]:
    """Keys of all the sentences in tab-separated tables; with a column ``split``, of those outside of ``train``.

    Raises:
        ManifestError: a table is missing or is no text (gzip by its suffix).
    """
    keys = set()
    for path in tables:
        header, *lines = [line.split("\t") for line in iter_lines(path, what="table")] or [[]]
        split = header.index("split") if "split" in header else None
        for cells in lines:
            if split is None or cells[split : split + 1] != ["train"]:
                keys.update(filter(None, map(sentence_key, cells)))
    return keys


def sentence_key(text: str) -> str:
    """What two spellings of one sentence share: its words in lower case."""
    return " ".join(words_of(normalize_text(text)))


def write_pairs(
    output: Path,
    directories: list[Path],
    source_lang: str,
    target_lang: str,
    message_lang: str = "en",
    exclude: Iterable[Path] = (),
    limits: Limits = Limits(),
    progress: Callable[[Iterable], Iterable] = iter,
) -> Counter:
    """Write the pairs of all catalogues into a table (gzip by its suffix): source, target, catalogue.

    A source sentence is kept once, and none that ``exclude`` (see ``held_out``) has on either side.

    Returns:
        counts: ``pairs`` and ``words`` (source side) written, ``catalogues`` that gave some, and what was dropped why.

    Raises:
        ManifestError: the messages' language is on neither side, or a file or directory is not what it should be.
    """
    if message_lang not in (source_lang, target_lang) or source_lang == target_lang:
        raise ManifestError(
            f"catalogues whose messages are {message_lang!r} give no pairs {source_lang}-{target_lang}; "
            "one of the two languages must be the messages'"
        )
    language = target_lang if source_lang == message_lang else source_lang
    held, seen, counts = held_out(exclude), set(), Counter(pairs=0, words=0, catalogues=0)
    lines = []
    for path in progress(catalogue_files(directories, language)):
        before = len(lines)
        for piece in prose_pairs(read_catalogue(path), limits, counts):
            if source_lang != message_lang:
                piece = [(translation, message) for message, translation in piece]
            source, target = (" ".join(side) for side in zip(*piece))
            keys = {sentence_key(text) for text in (source, target, *(side for pair in piece for side in pair))}
            if keys & held:
                counts["held out"] += 1
            elif sentence_key(source) in seen:
                counts["seen before"] += 1
            else:
                seen.add(sentence_key(source))
                lines.append((source, target, _name(path)))
                counts["words"] += count_words(source)
        counts["catalogues"] += len(lines) > before
    counts["pairs"] = len(lines)
    text = "".join("\t".join(line) + "\n" for line in [(source_lang, target_lang, "catalogue"), *lines])
    data = text.encode("utf-8")
    with replacing(output) as file:
        file.write(gzip.compress(data, mtime=0) if output.suffix == ".gz" else data)
    return counts


def _place(path: Path, language: str) -> tuple[tuple[Path, str], str] | None:
    """((where, domain), locale) of a catalogue of the language; None for other languages' files."""
    if path.parent.name == "LC_MESSAGES":
        places = [(path.parent.parent.name, (path.parent.parent.parent, path.name))]
    else:
        places = [(path.stem, (path.parent, "")), (path.parent.name, (path.parent.parent, path.name))]
    for name, domain in places:
        locale = name.lower().replace("-", "_").split(".")[0].split("@")[0]
        if locale == language or locale.startswith(f"{language}_"):
            return domain, locale
    return None


def _name(path: Path) -> str:
    """``wesnoth-units`` of ``es/LC_MESSAGES/wesnoth-units.mo``, ``levels/es`` of ``levels/es.po``."""
    return path.stem if path.parent.name == "LC_MESSAGES" else f"{path.parent.name}/{path.stem}"


def _read_mo(data: bytes) -> list[tuple[str, str]]:
    """Strings of a GNU .mo file: magic, revision, count, offsets of two tables of (length, offset)."""
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise ValueError("it does not begin like a .mo file")
    count, *tables = struct.unpack_from(f"{order}3I", data, 8)

    def raw(table: int, i: int) -> bytes:
        length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * i)
        if offset + length > len(data):
            raise ValueError(f"string {i} lies outside of the file")
        return data[offset : offset + length]

    header = next((raw(tables[1], i) for i in range(count) if not raw(tables[0], i)), b"").decode("ascii", "replace")
    charset = re.search(r"charset=([\w-]+)", header)
    encoding = charset.group(1) if charset and charset.group(1) != "CHARSET" else "utf-8"
    return [(raw(tables[0], i).decode(encoding), raw(tables[1], i).decode(encoding)) for i in range(count)]


def _read_po(text: str) -> list[tuple[str, str]]:
    """Entries of a .po file in UTF-8, without obsolete and fuzzy ones."""
    entries, fields, field, fuzzy = [], {}, "", False
    for number, line in enumerate([*text.split("\n"), "#"], 1):
        line = line.strip()
        keyword = re.match(r"(msgctxt|msgid_plural|msgid|msgstr(?:\[\d+\])?)\s+(?=\")", line)
        if (line.startswith("#") or line.startswith(("msgid ", "msgctxt "))) and "msgstr" in fields:
            if not fuzzy:
                entries.append((fields.get("msgid", ""), fields["msgstr"]))
            fields, fuzzy = {}, False
        if line.startswith("#,") and "fuzzy" in line:
            fuzzy = True
        if keyword:
            field = keyword.group(1).removesuffix("[0]")
            fields[field], line = "", line[keyword.end() :]
        if line.startswith('"'):
            try:
                fields[field] += ast.literal_eval(line)
            except (SyntaxError, KeyError):
                raise ValueError(f"line {number}: {line[:40]!r} is no string of an entry") from None
    return entries


def _text(message: str) -> str:
    """Without inline markup and without a context such as Wesnoth's ``female^``."""
    message = re.sub(r"<(\w+)>text='([^'<>]*)'</\1>", r"\2", re.sub(r"^[^^\n]{1,60}\^", "", message))
    return _INLINE_TAG.sub("", message).strip()


def _pieces(message: str, translation: str, limits: Limits, counts: Counter) -> Iterator[list[tuple[str, str]]]:
    """A paragraph cut at ends of sentences, by a length drawn by hash, and wherever a sentence is no prose."""
    sides = [_sentences(text) for text in (message, translation)]
    if len(sides[0]) != len(sides[1]):
        sides = [[message], [translation]]
    limit = 1 + hash_int("piece", message) % limits.max_words
    piece: list[tuple[str, str]] = []
    words = 0
    for pair in zip(*sides):
        reason, count = _fault(*pair, limits), max(map(count_words, pair))
        if piece and (reason or words + count > limit):
            yield piece
            piece, words = [], 0
        if reason:
            counts[reason] += 1
        else:
            piece.append(pair)
            words += count
    if piece:
        yield piece


def _sentences(text: str) -> list[str]:
    ends = [match.end() for match in _ENDS.finditer(text)]
    return [text[a:b].strip() for a, b in zip([0, *ends], [*ends, len(text)])]


def _fault(message: str, translation: str, limits: Limits) -> str:
    """Why a sentence is no prose to learn from; empty if it is."""
    for side in (message, translation):
        if count_words(side) > limits.max_words:
            return "too long"
        if not all(_ALLOWED.match(c) for c in side) or _UNSPOKEN.search(side):
            return "not prose"
        if not side.lstrip("¿¡(\"'")[:1].isalnum() or sum(c.isalpha() or c == " " for c in side) < 0.8 * len(side):
            return "not prose"
        if side.isupper() or (not limits.fragments and side.rstrip(_CLOSING)[-1:] not in (".", "!", "?", "…")):
            return "no sentence"
    lengths = (count_words(message), count_words(translation), 2), (len(message), len(translation), 12)
    for a, b, slack in lengths:
        if max(a, b) > MAX_RATIO * min(a, b) and abs(a - b) > slack:
            return "unlike lengths"
    # Names stay what they are in any language.
    long = [{word for word in side.split() if len(word) > 3 and word.islower()} for side in (message, translation)]
    shared = len(long[0] & long[1])
    if sentence_key(message) == sentence_key(translation) or shared > _MAX_SAME * min(map(len, long)):
        return "not translated"
    return ""
