"""Finished runs, offline and simultaneous, as systems that can stand side by side: texts by sentence, and latency.

A sentence is known by its id in the manifest; a simultaneous run knows its recordings, whose names lead to the ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echostream.data.manifest import Utterance
from echostream.errors import EchoStreamError
from echostream.evaluation import run
from echostream.files import write_json
from echostream.text_file import read_json, read_json_lines, read_lines

TEXTS = ("asr", "st", "mt", "heard", "asr_ref", "mt_ref")


@dataclass
class System:
    """What one system made of a test set.

    Attributes:
        name: unique.
        sentences: by id, its texts by the names of ``TEXTS``, as far as it has them.
        recogniser: who heard ``heard``; empty when nobody listened.
        family: the name that was given to the run; several chunk sizes share it.
        chunk_ms: of a simultaneous run.
        options: of a simultaneous run, as they were said.
        latency: of a simultaneous run, ms (``echostream.evaluation.run.score_latency``), ``RTF``, and ``silent``, the
            number of sentences without output.
        source_ms: mean length of the recordings of a simultaneous run.
    """

    name: str
    sentences: dict[str, dict[str, str]]
    recogniser: str = ""
    family: str = ""
    chunk_ms: int | None = None
    options: str = ""
    latency: dict[str, float] = field(default_factory=dict)
    source_ms: float = float("nan")

    def has(self, *texts: str) -> bool:
        """Does every sentence have these texts?"""
        return all(text in sentence for sentence in self.sentences.values() for text in texts)


def read_systems(paths: Mapping[str, Path], manifest: Sequence[Utterance] = ()) -> list[System]:
    """All systems by name; a simultaneous run of several chunk sizes is as many systems.

    Args:
        paths: by name, a ``generate-<subset>.jsonl``, or a folder by ``echostream evaluate simul`` or SimulEval.
        manifest: tells which recording belongs to which id; without it the offline results do, or the recordings' names
            are the ids.

    Raises:
        EchoStreamError: there is no such result, it is damaged, or of something else.
    """
    offline = {name: read_results(path) for name, path in paths.items() if not path.is_dir()}
    ids = {Path(row["audio"]).name: str(row["id"]) for rows in offline.values() for row in rows if row.get("audio")}
    ids |= {Path(row.audio).name: row.id for row in manifest}
    systems = []
    for name, path in paths.items():
        if name in offline:
            systems.append(_offline(name, path, offline[name]))
        else:
            systems += _simultaneous(name, path, ids)
    return systems


def read_results(path: Path) -> list[dict[str, Any]]:
    """The objects of a generate-<subset>.jsonl.

    Raises:
        EchoStreamError: the file is missing, empty, or a line is not a JSON object.
    """
    if not path.is_file():
        raise EchoStreamError(f"{path} does not exist; fairseq-generate --results-path writes it")
    rows = read_json_lines(path, EchoStreamError)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EchoStreamError(f"{path} holds no results")
    return rows


def keep_heard(path: Path, asr: str, heard: Mapping[str, str]) -> None:
    """Keep what the recogniser ``asr`` heard in the recordings of the results ``path``, by id."""
    value = {"asr": asr, "of": _digest(path), "heard": dict(heard)}
    write_json(_heard_file(path), value, indent=1, ensure_ascii=False)


def read_heard(path: Path) -> tuple[str, dict[str, str]]:
    """What ``keep_heard`` kept: the recogniser's name and the transcripts; nothing where nobody has listened.

    Raises:
        EchoStreamError: the results have changed since.
    """
    file = _heard_file(path)
    if not file.is_file():
        return "", {}
    value = read_json(file, EchoStreamError)
    if value["of"] != _digest(path):
        again = f"listen again: echostream evaluate offline {path}"
        raise EchoStreamError(f"{path} has changed since {file} was made; {again}")
    return value["asr"], value["heard"]


def _heard_file(path: Path) -> Path:
    return path.with_suffix(".heard.json")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _offline(name: str, path: Path, rows: Sequence[Mapping[str, Any]]) -> System:
    recogniser, heard = read_heard(path)
    sentences: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, 1):
        if "id" not in row:
            raise EchoStreamError(f"{path}, line {number} has no id")
        if str(row["id"]) in sentences:
            raise EchoStreamError(f"{path}, line {number}: id {row['id']!r} appears twice")
        texts = {key: str(row[key]) for key in TEXTS if row.get(key) is not None}
        if heard:
            texts["heard"] = heard[str(row["id"])]
        sentences[str(row["id"])] = texts
    return System(name, sentences, recogniser, family=name)


def _simultaneous(name: str, path: Path, ids: Mapping[str, str]) -> list[System]:
    folders = {folder: int(folder.name.removeprefix("chunk")) for folder in path.glob("chunk*") if folder.is_dir()}
    if not folders:
        return [_run(name, name, path, None, {}, ids)]
    about = {}
    if (path / "results.json").is_file():
        about = read_json(path / "results.json", EchoStreamError)
    ordered = sorted(folders.items(), key=lambda folder: folder[1])
    return [_run(f"{name} {chunk} ms", name, folder, chunk, about, ids) for folder, chunk in ordered]


def _run(
    name: str, family: str, folder: Path, chunk_ms: int | None, about: Mapping[str, Any], ids: Mapping[str, str]
) -> System:
    from echostream.evaluation.simul_quality import spoken_text

    instances = run.read_instances(folder)
    hypothesis, reference = ("asr", "asr_ref") if about.get("output_type") == "source" else ("mt", "mt_ref")
    heard = _transcripts(folder, len(instances))
    sentences = {}
    for i, instance in enumerate(instances.values()):
        recording = Path(instance.source)
        texts = {hypothesis: spoken_text(instance), reference: instance.reference}
        sentences[ids.get(recording.name, recording.stem)] = texts | ({"heard": heard[i]} if heard else {})
    if len(sentences) != len(instances):
        raise EchoStreamError(f"{folder}: recordings of one name, so that the sentences cannot be told apart")
    latency = run.score_latency(instances)
    latency["silent"] = sum(not instance.delays for instance in instances.values())
    options = " ".join(f"{option}={value}" for option, value in about.get("options", {}).items())
    source_ms = float(np.mean([instance.source_length for instance in instances.values()]))
    recogniser = run.recogniser_name(folder) if heard else ""
    return System(name, sentences, recogniser, family, chunk_ms, options, latency, source_ms)


def _transcripts(folder: Path, count: int) -> list[str]:
    path, log = folder / "asr_transcripts.txt", folder / "instances.log"
    if not path.is_file():
        return []
    lines = read_lines(path, EchoStreamError)
    if len(lines) != count or path.stat().st_mtime < log.stat().st_mtime:
        raise EchoStreamError(f"{path} does not belong to {log.name}, which is newer or longer; score the run again")
    return lines
