"""Sessions on the disk: a record and an archive each, for the next process."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from echostream.errors import SessionError
from echostream.files import replacing
from echostream.serve.engine import Saved

FORMAT = "echostream-live/1"
STALE_S = 86_400.0  # after which an archive that nobody came back for is deleted


def save_record(folder: Path, identifier: str, record: dict[str, Any], saved: Saved | None) -> None:
    """In the writer's thread: the stream's file, then the record that names it, then the file before goes.

    Raises:
        SessionError: the session belongs to another process now.
        OutputError: a file cannot be written.
    """
    path = folder / f"{identifier}.json"
    before = None
    if saved is not None:
        with suppress(OSError, ValueError):
            before = read_record(path)
        if before is not None and before["owner"] != record["owner"]:
            raise SessionError("another process has it now")
        saved.write(folder / record["file"])
    with replacing(path, "w", encoding="utf-8") as file:
        json.dump(record, file)
    if before is not None and before["file"] not in (None, record["file"]):
        (folder / Path(before["file"]).name).unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path.name} is no session of this version")
    return record


def forget_record(folder: Path, identifier: str, owner: str) -> None:
    with suppress(OSError, ValueError):
        if read_record(folder / f"{identifier}.json")["owner"] == owner:
            for path in folder.glob(f"{identifier}.*"):
                path.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """What nobody came back for in a day goes."""
    for path in folder.glob("sess_*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
