"""Talks: recordings with the places and translations of their sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from echostream.audio.io import load_audio, write_audio
from echostream.constants import SAMPLE_RATE
from echostream.data.manifest import Utterance
from echostream.errors import EchoStreamError
from echostream.files import write_text
from echostream.loading import inside, parse_yaml
from echostream.text_file import read_lines, read_text

SEGMENTS, REFERENCES, SOURCES = "segments.yaml", "references.txt", "sources.txt"
Span = tuple[float, float]


@dataclass(frozen=True)
class Segment:
    """A sentence of a talk: seconds from the talk's start, and its texts (the source's may be empty: not known)."""

    offset: float
    duration: float
    reference: str
    source: str = ""


@dataclass(frozen=True)
class Talk:
    """A recording and its sentences, in order."""

    path: Path
    segments: tuple[Segment, ...]

    @property
    def references(self) -> list[str]:
        return [segment.reference for segment in self.segments]

    @property
    def seconds(self) -> float:
        """Until its last sentence ends."""
        return self.segments[-1].offset + self.segments[-1].duration


def make_talks(
    rows: Sequence[Utterance],
    root: Path,
    output: Path,
    count: int,
    minutes: float | None = 5.0,
    sentences: int | None = None,
    pauses: Span = (0.1, 1.0),
    seed: int = 1,
) -> list[Talk]:
    """Join sentences in random order, silence between them, and write a directory of talks.

    No sentence is used a second time before all have been used once. Voices follow each other as the sentences do.

    Args:
        rows, root: a manifest's rows, and what their audio is relative to.
        minutes: a talk ends with the sentence that reaches this length, or
        sentences: after so many.
        pauses: shortest and longest pause in seconds, drawn evenly.

    Raises:
        EchoStreamError: a length is not positive, or the pauses are out of order.
        AudioError: a recording cannot be read.
    """
    if count < 1 or (sentences is not None and sentences < 1) or (sentences is None and not minutes > 0):
        size = f"{sentences} sentences" if sentences is not None else f"{minutes} minutes"
        raise EchoStreamError(f"{count} talks of {size} cannot be made; both must be above 0")
    if not 0 <= pauses[0] <= pauses[1]:
        raise EchoStreamError(f"pauses of {pauses[0]:g} to {pauses[1]:g} s are impossible; give them in order, from 0")
    rng = np.random.default_rng(seed)
    order: list[int] = []
    talks = []
    output.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        parts: list[np.ndarray] = []
        segments: list[Segment] = []
        length = 0
        while len(segments) < sentences if sentences else length < minutes * 60 * SAMPLE_RATE:
            order = order or rng.permutation(len(rows)).tolist()
            row = rows[order.pop()]
            samples = load_audio(root / row.audio)
            if segments:
                parts.append(np.zeros(round(rng.uniform(*pauses) * SAMPLE_RATE), dtype=np.float32))
                length += len(parts[-1])
            segments.append(
                Segment(length / SAMPLE_RATE, len(samples) / SAMPLE_RATE, row.tgt_text.strip(), row.src_text.strip())
            )
            parts.append(samples)
            length += len(samples)
        path = output / f"talk{number:02}.wav"
        write_audio(path, np.concatenate(parts))
        talks.append(Talk(path, tuple(segments)))
    entries = [
        {"wav": talk.path.name, "offset": s.offset, "duration": s.duration} for talk in talks for s in talk.segments
    ]
    style = dict(default_flow_style=True, width=1000, sort_keys=False)  # one segment a line
    text = "".join(f"- {yaml.safe_dump(entry, **style)}" for entry in entries)
    write_text(output / SEGMENTS, text)
    every = [segment for talk in talks for segment in talk.segments]
    write_text(output / REFERENCES, "".join(f"{s.reference}\n" for s in every))
    write_text(output / SOURCES, "".join(f"{s.source}\n" for s in every))
    return talks


def read_talks(directory: Path) -> list[Talk]:
    """The talks of a directory; see the top of this file.

    Raises:
        EchoStreamError: a file is missing or not of its form, or has another number of sentences.
    """
    for name in (SEGMENTS, REFERENCES):
        if not (directory / name).is_file():
            raise EchoStreamError(f"{directory / name} does not exist; echostream evaluate talks makes it")
    entries = parse_yaml(read_text(directory / SEGMENTS, EchoStreamError), str(directory / SEGMENTS), EchoStreamError)
    references = read_lines(directory / REFERENCES, EchoStreamError)
    path = directory / SOURCES
    sources = read_lines(path, EchoStreamError) if path.is_file() else [""] * len(references)
    if not isinstance(entries, list) or not len(entries) == len(references) == len(sources) > 0:
        count = len(entries) if isinstance(entries, list) else "no list of"
        raise EchoStreamError(
            f"{directory}: {count} segments, {len(references)} references, {len(sources)} sources; they must match"
        )
    talks: dict[str, list[Segment]] = {}
    for number, (entry, reference, source) in enumerate(zip(entries, references, sources), 1):
        try:
            wav, offset, duration = str(entry["wav"]), float(entry["offset"]), float(entry["duration"])
            if not (0 <= offset < 1e9 and 0 < duration < 1e9):
                raise ValueError("NaN compares as false")
        except (KeyError, TypeError, ValueError):
            raise EchoStreamError(
                f"{directory / SEGMENTS}, segment {number}: {str(entry)[:60]!r} lacks wav, offset or duration"
            ) from None
        talks.setdefault(wav, []).append(Segment(offset, duration, reference.strip(), source.strip()))
    where = str(directory / SEGMENTS)
    return [
        Talk(inside(directory, wav, f"{where}: wav", EchoStreamError), tuple(parts)) for wav, parts in talks.items()
    ]


def cut(samples: np.ndarray, segment: Segment) -> np.ndarray:
    """The recording of one sentence: of float32 [N] at 16 kHz, a part."""
    start = round(segment.offset * SAMPLE_RATE)
    return samples[start : start + round(segment.duration * SAMPLE_RATE)]
