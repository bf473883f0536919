"""Which languages a corpus is of: what its files say, or what was said; never a guess."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from echostream.errors import ManifestError

_TWO_LETTERS = frozenset(
    """aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo
    es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg
    ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn
    no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss st su sv sw
    ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu""".split()
)  # ISO 639-1
_TAG = re.compile(r"([a-z]{2,3})([-_][a-z0-9]{2,8})*", re.IGNORECASE)


def is_language(name: str, three: bool = True) -> bool:
    """Is this a language tag: ISO 639-1, or (``three``) three letters of ISO 639-3, with or without a region?"""
    match = _TAG.fullmatch(name)
    return match is not None and (match[1].lower() in _TWO_LETTERS if len(match[1]) == 2 else three)


def base(language: str) -> str:
    """A tag without its region: ``es-419`` → ``es``."""
    return re.split("[-_]", language)[0].lower()


def of_pairs(
    path: Path, header: Sequence[str], columns: tuple[str, str] | None, source: str | None, target: str | None
) -> tuple[str, str]:
    """Source and target language of a parallel text file, by the names of its columns, or as they were said.

    Args:
        header: all its columns.
        columns: those of the pairs; None: the first two.
        source, target: as they were said.

    Raises:
        ManifestError: nothing tells the languages, two things tell different ones, or there is no such language.
    """
    languages = []
    # Names of three letters ("src", "ref", "key") are languages only if nothing else is wanted of them.
    named = [name for name in header if is_language(name, three=False)]
    if columns is None and len(named) > 2:
        raise ManifestError(f"text file {path} has columns {', '.join(named)}; name the two with --columns")
    for side, name, said in zip(("source", "target"), columns or tuple(header[:2]), (source, target)):
        if said is not None:
            _check(said, side)
        told = name if is_language(name, three=False) else None
        if said is None and told is None:
            raise ManifestError(
                f"text file {path} does not tell the {side} language: its column is {name!r}, not a code such as 'fr'; "
                f"say --{side}-lang"
            )
        if said and told and base(said) != base(told):
            raise ManifestError(f"--{side}-lang {said}, but the column of text file {path} is {name!r}")
        languages.append((said or told or "").lower())
    return languages[0], languages[1]


def of_cvss(common_voice: Path, cvss: Path, locale: str, source: str | None, target: str | None) -> tuple[str, str]:
    """The same of CVSS over Common Voice: as said, by Common Voice's column ``locale``, or by the directories' names.

    CVSS translates into English. The source language is empty where nothing tells it: the recordings are there, and no
    voice has to be chosen.

    Raises:
        ManifestError: what was said is no language, or contradicts the column.
    """
    for side, said in (("source", source), ("target", target)):
        if said is not None:
            _check(said, side)
    if source and locale and base(source) != base(locale):
        raise ManifestError(f"--source-lang {source}, but the locale of {common_voice} is {locale!r}")
    names = re.search(r"_([a-z]{2,3})_([a-z]{2})$", cvss.resolve().name)
    folder = common_voice.resolve().name
    told = locale or (names[1] if names and is_language(names[1]) else "")
    told = told or (folder if is_language(folder, three=False) and folder != "cv" else "")
    return (source or told).lower(), (target or (names[2] if names else "en")).lower()


def _check(language: str, side: str) -> None:
    if not is_language(language):
        raise ManifestError(f"--{side}-lang {language!r} is no language code; they are like 'fr' or 'pt-BR' (ISO 639)")
