"""Quality against latency: every policy over a grid of its knobs, as one file a point, a table and a picture.

A point is a policy, a value of each of its knobs that the grid names, and a chunk size. Points that are there already
are not computed again, so that a sweep that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from echostream.audio.resample import Resampler
from echostream.constants import SAMPLE_RATE
from echostream.errors import EchoStreamError, require
from echostream.evaluation import latency, quality
from echostream.evaluation.asr import Recogniser
from echostream.evaluation.streams import Streamed
from echostream.evaluation.table import markdown
from echostream.files import write_json, write_text
from echostream.streaming.options import KNOB_OPTIONS
from echostream.streaming.policies.factory import POLICIES, knobs_of
from echostream.text_file import read_json

Value = int | str
GRID: dict[str, tuple[Value, ...]] = {
    "lagging_k1": (0, 2, 4, 8),
    "wait_k": (1, 3, 5, 9, 15),
    "agreement_n": (2, 3),
    "alignatt_frames": (2, 6, 12, 24),
}
CHUNKS_MS = (320, 640, 1280)
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#333333", "#937860")
MARKERS = ("o", "s", "^", "D", "*", "v")


@dataclass(frozen=True)
class Point:
    """One setting to be measured."""

    policy: str
    knobs: tuple[tuple[str, Value], ...]
    chunk_ms: int

    @property
    def name(self) -> str:
        return "_".join([self.policy, *(f"{knob}={value}" for knob, value in self.knobs), f"chunk={self.chunk_ms}"])


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    """``["wait_k=1,3", ...]`` (hyphens serve as well) as values by knob, over those of ``GRID``.

    Raises:
        EchoStreamError: there is no such knob, or a value is not of its type.
    """
    grid = dict(GRID)
    for text in texts:
        name, found, values = text.partition("=")
        name = name.strip("-").replace("-", "_")
        if not found or name not in KNOB_OPTIONS:
            known = ", ".join(KNOB_OPTIONS)
            raise EchoStreamError(f"grid {text!r} is not KNOB=VALUE,VALUE with one of the knobs {known}")
        try:
            grid[name] = tuple(KNOB_OPTIONS[name].type(value) for value in values.split(","))
        except ValueError:
            raise EchoStreamError(f"grid {text!r}: {name} takes whole numbers joined by commas") from None
    return grid


def plan(policies: Sequence[str], grid: Mapping[str, Sequence[Value]], chunks_ms: Sequence[int]) -> list[Point]:
    """All points: of each policy, every combination of the grid's values of the knobs it has, and of chunk sizes.

    Raises:
        EchoStreamError: a policy is unknown.
    """
    points = []
    for policy in policies:
        if policy not in POLICIES:
            raise EchoStreamError(f"policy {policy!r} is unknown; choose from: {', '.join(POLICIES)}")
        knobs = [knob for knob in knobs_of(policy) if knob in grid]
        for values in product(*(grid[knob] for knob in knobs)):
            points += [Point(policy, tuple(zip(knobs, values)), chunk) for chunk in chunks_ms]
    return points


def fingerprint(ids: Sequence[str], references: Sequence[str]) -> str:
    """Which recordings a result belongs to."""
    return hashlib.sha256("\n".join([*ids, *references]).encode()).hexdigest()[:16]


def read_result(path: Path, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """A result that is there already; None if it is not.

    Raises:
        EchoStreamError: it is damaged, or of another model, other recordings or other settings than ``of`` says.
    """
    if not path.is_file():
        return None
    try:
        result = read_json(path, EchoStreamError)
        found = result["of"]
    except (ValueError, KeyError, TypeError):
        raise EchoStreamError(f"{path} is damaged; delete it, and it is computed again") from None
    for name, value in of.items():
        if found.get(name) != value:
            raise EchoStreamError(
                f"{path} was made with {name} {found.get(name)!r}, not {value!r}; name another --output, or delete it"
            )
    return result


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result at once or not at all."""
    write_json(path, result, indent=1, ensure_ascii=False)


def measure(
    streamed: Sequence[Streamed],
    references: Sequence[str],
    recogniser: Recogniser | None = None,
    language: str = "en",
    tokenizer: str = "",
    unit: str = "word",
) -> dict[str, float]:
    """The figures of a point; those of speech are there with a ``recogniser`` to hear it. Latencies are in ms.

    Args:
        language: of the translations.
        tokenizer: sacrebleu's; by default the language's.
        unit: ``word`` or ``char``: what latencies count.

    Recordings without any output have no latency and are left out of its mean; ``silent`` counts them.
    """
    texts = [s.text for s in streamed]
    tokenizer = tokenizer or quality.tokenizer_for(language)
    figures = {"BLEU": quality.bleu(texts, references, tokenizer), "chrF": quality.chrf(texts, references)}
    figures |= _latencies(streamed, references, False, unit)
    if recogniser is not None:
        heard = [recogniser.transcribe(sound(s)) for s in streamed]
        figures["ASR_BLEU"] = quality.asr_bleu(heard, references, tokenizer, language.partition("-")[0] == "en")
        figures |= {f"{name}_speech": value for name, value in speech_latencies(streamed, references, unit).items()}
    return figures


def speech_latencies(streamed: Sequence[Streamed], references: Sequence[str], unit: str = "word") -> dict[str, float]:
    """AL, LAAL, StartOffset, ATD and EndOffset (ms) of speech, a word counting when its speech is handed out.

    ``silent`` are the recordings that nothing was said of; they are in no mean.
    """
    return _latencies(streamed, references, True, unit) | _playing(streamed)


def _latencies(streamed: Sequence[Streamed], references: Sequence[str], spoken: bool, unit: str) -> dict[str, float]:
    rows = []
    for s, reference in zip(streamed, references, strict=True):
        given = s.spoken if spoken else s.written
        times = given.letters if unit == "char" else [word.seconds for word in given.words]
        words = reference.split()
        length = len("".join(words) if unit == "char" else words)
        rows.append(([1000 * second for second in times], 1000 * s.seconds, length))
    return latency.means(rows)


def _playing(streamed: Sequence[Streamed]) -> dict[str, float]:
    """Latencies that depend on how long the speech takes."""
    rows = []
    for s in streamed:
        if sum(len(wave.samples) for wave in s.waves):
            delays = [1000 * wave.source_time_s for wave in s.waves]
            durations = [1000 * len(wave.samples) / wave.sample_rate for wave in s.waves]
            end = sum(latency.playback(delays, durations)[-1])
            rows.append((latency.average_token_delay(delays, durations), end - 1000 * s.seconds))
    return dict(zip(("ATD", "EndOffset"), np.mean(rows, axis=0).tolist() if rows else [float("nan")] * 2))


def sound(streamed: Streamed) -> np.ndarray:
    """All speech of a recording, without the silences between its pieces: float32 [N] at 16 kHz."""
    if not streamed.waves:
        return np.zeros(0, dtype=np.float32)
    samples = np.concatenate([wave.samples for wave in streamed.waves])
    return Resampler(streamed.waves[0].sample_rate, SAMPLE_RATE).resample(samples)


# ---- reports -------------------------------------------------------------------------------------------------------


def report(results: Sequence[tuple[Point, Mapping[str, float]]], output: Path, title: str) -> str:
    """Write ``sweep.md``, ``sweep.tsv``, ``sweep.json`` and ``sweep.png`` into ``output``; returns the table.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    results = sorted(results, key=lambda result: (list(POLICIES).index(result[0].policy), result[1]["AL"]))
    header = ["policy", "knobs", "chunk_ms", *results[0][1]]
    rows = [row(point, figures) for point, figures in results]
    table = markdown(header, rows)
    write_text(output / "sweep.md", f"{title}\n\n{table}\n")
    lines = ["\t".join(line) for line in [header, *rows]]
    write_text(output / "sweep.tsv", "\n".join(lines) + "\n")
    points = [{**asdict(p), "knobs": dict(p.knobs), "figures": dict(f)} for p, f in results]
    write_json(output / "sweep.json", {"title": title, "points": points}, indent=1)
    draw(results, output / "sweep.png", title)
    return table


def row(point: Point, figures: Mapping[str, float]) -> list[str]:
    """A point's line in a table: policy, knobs, chunk size and all figures."""
    knobs = " ".join(f"{knob}={value}" for knob, value in point.knobs) or "-"
    return [point.policy, knobs, str(point.chunk_ms), *(_cell(name, value) for name, value in figures.items())]


def _cell(name: str, value: float) -> str:
    whole = name.startswith(("AL", "LAAL", "ATD", "StartOffset", "EndOffset", "silent"))  # ms, or a number
    return f"{value:.0f}" if whole else f"{value:.2f}"


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (latency, quality) pairs those that no other beats in both: a policy's curve, from left to right."""
    best, kept = float("-inf"), []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > best:
            best = y
            kept.append((x, y))
    return kept


def draw(results: Sequence[tuple[Point, Mapping[str, float]]], path: Path, title: str) -> None:
    """All points of all policies, and through the best of each policy its curve; speech, if measured, beside the text.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "simuleval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("AL", "BLEU", "text")]
    if "ASR_BLEU" in results[0][1]:
        panels.append(("AL_speech", "ASR_BLEU", "speech"))
    figure = Figure(figsize=(7.0 * len(panels), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for axis, (x, y, what) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for policy, colour, marker in zip(POLICIES, COLOURS, MARKERS):
            points = [(f[x] / 1000, f[y]) for p, f in results if p.policy == policy and np.isfinite(f[x])]
            if points:
                axis.plot(*zip(*points), marker, color=colour, alpha=0.35, markersize=5)
                axis.plot(*zip(*frontier(points)), marker + "-", color=colour, markersize=6, label=policy)
        axis.set_xlabel(f"AL of the {what} (s)")
        axis.set_ylabel(y.replace("_", "-"))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)
