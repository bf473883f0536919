"""What steps of the corpus preparation leave for each other, and tell while they work."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from echostream.data.corpus import speech
from echostream.data.corpus.rows import Ledger, Row
from echostream.errors import ManifestError, require
from echostream.files import write_json
from echostream.text_file import read_json

PACKAGES = (
    "echostream",
    "numpy",
    "sentencepiece",
    "soundfile",
    "onnxruntime",
    "ctranslate2",
    "py-nanotts",
)


def read_note(output: Path, step: str) -> dict:
    path = output / "steps" / f"{step}.json"
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; run the step {step!r} first")
    return read_json(path)


def noted_language(output: Path, side: str) -> str:
    return read_note(output, "text")["settings"][f"{side}_lang"]


def target_settings(output: Path) -> dict:
    """Who spoke the target side; a corpus whose target speech was there has nobody, and hibari goes on."""
    if not (output / "steps" / "target.json").is_file():
        return {}
    settings = read_note(output, "target")["settings"]
    return settings if settings.get("target_engine") != "none" else {}


def check_splits(manifest: str, lines: list[dict[str, str]], rows: dict[str, Row]) -> None:
    """What is tested was never trained on, whatever sets a manifest is made of.

    Raises:
        ManifestError: the recordings are of several splits, or the text was split anew after they were made.
    """
    splits = sorted({line["split"] for line in lines})
    if len(splits) > 1:
        raise ManifestError(f"--manifest {manifest} would mix the splits {' and '.join(splits)}; give each its own")
    for line in lines:
        row = rows.get(line["row"])
        if row is not None and row.split != line["split"]:
            raise ManifestError(
                f"recording {line['id']} was made for the split {line['split']}, but its pair now belongs to "
                f"{row.split}: the text was split anew; delete speech/ and record again"
            )


def speech_ledger(output: Path, name: str) -> dict[str, dict[str, str]]:
    """Recordings of one set by their id. Raises ManifestError when there is no such set."""
    directory = output / "speech"
    if name not in speech_sets(output):
        raise ManifestError(f"{directory} has no set {name!r}; it has: {', '.join(speech_sets(output)) or 'none'}")
    return Ledger(directory, name, speech.SPEECH_COLUMNS).read()


def speech_sets(output: Path) -> list[str]:
    return sorted({path.name.rsplit(".", 2)[0] for path in (output / "speech").glob("*.*-of-*.tsv")})


def note_step(args: argparse.Namespace, name: str, **facts: object) -> None:
    """Write ``steps/<name>.json``: the settings, the outcome, the versions of what was used."""
    settings = {k: v for k, v in vars(args).items() if k not in ("run", "step", "output") and v is not None}
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    note = {
        "step": args.step,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": settings,
        "versions": versions,
        **facts,
    }
    path = args.output / "steps" / f"{name}.json"
    write_json(path, note, ensure_ascii=False, default=lambda file: file.name)  # no path of this machine


def progress_bar(title: str, unit: str = "utt") -> Callable[[Iterable], Iterable]:
    tqdm = require("tqdm", "all").tqdm
    return lambda items: tqdm(items, desc=title, unit=unit, mininterval=2.0)
