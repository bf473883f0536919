"""Speech that nobody has written down: recordings cut at their pauses into pieces to train on with a teacher's frames.

Times here are samples at 16 kHz unless seconds or milliseconds are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echostream.audio.io import load_audio, write_audio
from echostream.constants import FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE
from echostream.data.corpus.rows import Ledger, Skipped, take_shard
from echostream.data.manifest import Utterance
from echostream.errors import AudioError, ConfigError, ManifestError
from echostream.streaming.segmenters.pause import HYSTERESIS
from echostream.streaming.segmenters.silero import CONTEXT, WINDOW, Detector

LEDGER_COLUMNS = ("id", "recording", "audio", "samples")
MARGIN = SAMPLE_RATE // 10  # kept before and behind what the detector calls speech: it is late, and ends are soft
WIDEST_PAUSE = SAMPLE_RATE  # a longer one is never inside a piece

Span = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """How recordings are cut.

    Attributes:
        shortest, longest: seconds of a piece; what is shorter and has no neighbour near enough is left out.
        pause_ms: silence from which a recording may be cut.
        threshold: the detector's probability from which a window counts as speech.

    Raises:
        ConfigError: a value is out of range.
    """

    shortest: float = 2.0
    longest: float = 20.0
    pause_ms: int = 300
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < 3 * self.shortest <= self.longest:
            raise ConfigError(
                f"pieces last {self.shortest:g} to {self.longest:g} s; from above 0 to three times the shortest or more"
            )
        if self.pause_ms < 64:
            raise ConfigError(f"--pause-ms is {self.pause_ms}; it must be at least 64 (two windows of the detector)")
        if not HYSTERESIS < self.threshold < 1:
            raise ConfigError(f"--threshold is {self.threshold:g}; it must lie between {HYSTERESIS} and 1")


def find_recordings(paths: Sequence[Path]) -> dict[str, Path]:
    """Every file of ``paths`` by name; of a directory all that it holds, hidden files left out.

    A name is the file's path below the directory (below its parent, for a file that is named itself), suffix dropped.

    Raises:
        AudioError: a path does not exist, or there is no file. ManifestError: two files have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise AudioError(f"{path} does not exist; give recordings, or directories of them")
        root = path if path.is_dir() else path.parent
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            relative = file.relative_to(root)
            if any(part.startswith(".") for part in relative.parts):
                continue
            name = relative.with_suffix("").as_posix()
            if name in found:
                raise ManifestError(f"{found[name]} and {file} would both be {name!r}; rename one of them")
            found[name] = file
    if not found:
        raise AudioError(f"{', '.join(map(str, paths))}: no recordings there")
    return found


def speech_spans(probabilities: Sequence[float], cut: Cut) -> list[Span]:
    """Where someone speaks: spans of samples, pauses of at least ``pause_ms`` between them.

    Args:
        probabilities: of speech, one a window of ``WINDOW`` samples.
    """
    spans: list[list[int]] = []
    speaking = False
    for window, probability in enumerate(probabilities):
        speaking = probability >= (cut.threshold - HYSTERESIS if speaking else cut.threshold)
        if not speaking:
            continue
        start = window * WINDOW
        if spans and start - spans[-1][1] < SAMPLE_RATE * cut.pause_ms // 1000:
            spans[-1][1] = start + WINDOW
        else:
            spans.append([start, start + WINDOW])
    return [(start, end) for start, end in spans]


def pieces(probabilities: Sequence[float], total: int, cut: Cut) -> tuple[list[Span], int]:
    """Cut a recording of ``total`` samples.

    Neighbours of which one is shorter than ``shortest`` stay together; a span of more than ``longest`` is cut where the
    detector is least sure of speech.

    Returns:
        (spans of the pieces, margins included; samples of speech that were left out as too short).
    """
    shortest, longest = (int(seconds * SAMPLE_RATE) for seconds in (cut.shortest, cut.longest))
    joined: list[list[int]] = []
    for start, end in (part for span in speech_spans(probabilities, cut) for part in _split(span, probabilities, cut)):
        if joined:
            first, last = joined[-1]
            near = start - last <= WIDEST_PAUSE and end - first + 2 * MARGIN <= longest
            if near and min(last - first, end - start) < shortest:
                joined[-1][1] = end
                continue
        joined.append([start, end])
    found, short = [], 0
    for i, (start, end) in enumerate(joined):
        # Half of the pause at most: a sound belongs to one piece.
        before = (start - joined[i - 1][1]) // 2 if i else start
        behind = (joined[i + 1][0] - end) // 2 if i + 1 < len(joined) else total - end
        span = start - min(MARGIN, before), end + min(MARGIN, behind)
        if span[1] - span[0] < shortest:
            short += end - start
        else:
            found.append(span)
    return found, short


def _split(span: Span, probabilities: Sequence[float], cut: Cut) -> Iterable[Span]:
    """``span`` in parts of at most ``longest`` with their margins, none shorter than ``shortest``."""
    start, end = span
    room = int(cut.longest * SAMPLE_RATE) - 2 * MARGIN
    while end - start > room:
        first = -(-(start + room // 2) // WINDOW)
        last = max(first + 1, min(start + room, end - int(cut.shortest * SAMPLE_RATE)) // WINDOW)
        place = (first + int(np.argmin(probabilities[first:last]))) * WINDOW
        yield start, place
        start = place
    yield start, end


def cut_recordings(
    output: Path, found: dict[str, Path], vad: Detector, cut: Cut, suffix: str = ".wav", shard: int = 0,
    num_shards: int = 1, progress: Callable[[Iterable], Iterable] = iter,
) -> Counter:  # fmt: skip
    """Write the pieces of the recordings ``found`` under ``output/recordings``; those in the ledger are done.

    A file that is no recording is listed in ``output/skipped``.

    Returns:
        counts: recordings ``cut`` now, ``done`` before and ``skipped``; ``pieces``, and ``seconds`` of them and of
        speech that was ``short``.
    """
    ledger = Ledger(output / "recordings", "pieces", LEDGER_COLUMNS, shard, num_shards)
    done = {line["recording"] for line in ledger.read().values()}
    mine = take_shard(list(found), shard, num_shards)
    todo = [name for name in mine if name not in done]
    counts: Counter = Counter(
        {"cut": 0, "done": len(mine) - len(todo), "skipped": 0, "pieces": 0, "seconds": 0, "short": 0}
    )
    with Skipped(output / "skipped", "recordings", shard, num_shards) as skipped:
        for name in progress(todo):
            try:
                samples = load_audio(found[name])
            except AudioError as error:
                skipped.add(name, "unreadable", error)
                counts["skipped"] += 1
                continue
            probabilities, _, _ = vad.read(np.zeros(CONTEXT, np.float32), samples, vad.init_state())
            spans, short = pieces(probabilities, len(samples), cut)
            lines = []
            for number, (start, end) in enumerate(spans):
                audio = f"recordings/{name}-{number:04d}{suffix}"
                write_audio(output / audio, samples[start:end])
                lines.append((f"{name}-{number:04d}", name, audio, end - start))
            # All at once, so that an interrupted recording is cut again; one without speech has a line of its own.
            ledger.append(lines or [(name, name, "", 0)])
            counts += Counter(cut=1, pieces=len(lines), seconds=sum(line[3] for line in lines), short=short)
    for key in ("seconds", "short"):
        counts[key] = round(counts[key] / SAMPLE_RATE)
    return counts


def rows_of(lines: Iterable[dict[str, str]]) -> list[Utterance]:
    """Manifest rows without text of a ledger's pieces, by id."""
    none = np.zeros(0, dtype=np.int16)
    return [
        Utterance(line["id"], line["audio"], 1 + (int(line["samples"]) - FRAME_LENGTH) // FRAME_SHIFT, "", "", none,
                  {"voice": line["recording"]})
        for line in sorted(lines, key=lambda line: line["id"])
        if line["audio"]
    ]  # fmt: skip


__all__ = ["Cut", "cut_recordings", "find_recordings", "pieces", "rows_of", "speech_spans"]
