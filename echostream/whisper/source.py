"""Where a Whisper model lies: a path, or ``base`` for the one that comes as packages."""

from __future__ import annotations

from pathlib import Path


def whisper_source(source: str | Path) -> Path:
    """The directory or file of ``source``.

    ``base`` is multilingual Whisper base (MIT) out of the packages of the extra ``corpus``, unless something of that
    name lies in the working directory.

    Raises:
        MissingExtraError: the packages are not installed.
    """
    if str(source) == "base" and not Path("base").exists():
        from echostream.units.features import packaged_whisper

        return packaged_whisper()
    return Path(source)
