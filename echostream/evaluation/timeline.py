"""A picture of one simultaneous translation: what was said, what came out, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from echostream.audio.io import read_audio
from echostream.errors import require
from echostream.files import replacing

SOURCE_COLOUR, TARGET_COLOUR, WORD_COLOUR = "#4c72b0", "#55a868", "#c44e52"


@dataclass(frozen=True)
class Timeline:
    """What is drawn; times in ms from the source's start.

    Attributes:
        source, output: waveforms (float [N], samples per second); the output begins with its first interval.
        intervals: (start, duration) of each piece of speech as it is played.
        words: (time, text) of each word.
        source_text, text, reference: what was said, what came out, what should have (empty: no line for it).
        spoken: were words timed by the speech that holds them? Else when they were written.
    """

    source: tuple[np.ndarray, int]
    output: tuple[np.ndarray, int] | None
    intervals: Sequence[Sequence[float]]
    words: Sequence[tuple[float, str]]
    source_text: str = ""
    text: str = ""
    reference: str = ""
    spoken: bool = True


def draw_timeline(log: dict[str, Any], path: str | Path, source_text: str = "", reference: str = "") -> None:
    """Write a PNG for a line of ``instances.log``: source waveform, words at the time they came, output waveform.

    Args:
        log: as ``echostream.evaluation.simul`` writes it, times in ms.
        path: of the picture.
        source_text, reference: for the titles; without a source text, what the model heard.

    Raises:
        AudioError: a recording cannot be read.
        MissingExtraError: matplotlib is not installed.
    """
    timeline = Timeline(
        source=read_audio(log["source"]),
        output=read_audio(log["prediction"]) if log["intervals"] else None,
        intervals=log["intervals"],
        words=[(word["delay"], word["text"]) for word in log["words"]],
        source_text=source_text or log.get("source_text", ""),
        text=log["text"],
        reference=reference,
    )
    draw(timeline, path)


def draw(timeline: Timeline, path: str | Path) -> None:
    """Write the picture, a PNG, about 240 dots a second wide.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    require("matplotlib", "simuleval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no display, no global state
    from matplotlib.figure import Figure

    source, source_rate = timeline.source
    end = max([len(source) / source_rate, 0.1, *(sum(interval) / 1000 for interval in timeline.intervals)])
    figure = Figure(figsize=(max(8.0, 2.2 * end), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[1, 0.9, 1])

    _waveform(top, source, source_rate, 0.0, SOURCE_COLOUR)
    top.set_title(f"source: {timeline.source_text}", loc="left", fontsize=10, parse_math=False)
    if timeline.intervals and timeline.output is not None:
        _waveform(bottom, *timeline.output, timeline.intervals[0][0] / 1000, TARGET_COLOUR)
    for start, duration in timeline.intervals:
        bottom.axvspan(start / 1000, (start + duration) / 1000, color=TARGET_COLOUR, alpha=0.12, linewidth=0)
    title = f"output: {timeline.text or '(nothing)'}"
    title += f"\nreference: {timeline.reference}" if timeline.reference else ""
    bottom.set_title(title, loc="left", fontsize=10, parse_math=False)

    moment = "when the speech that holds them was handed out" if timeline.spoken else "when they were written"
    middle.set_title(f"words, {moment}", loc="left", fontsize=10, parse_math=False)
    middle.set_yticks([])
    middle.set_ylim(0, 1)
    for i, (time, words) in enumerate(groupby(timeline.words, key=lambda word: word[0])):
        for axis in (top, middle, bottom):
            axis.axvline(time / 1000, color=WORD_COLOUR, linewidth=0.8, alpha=0.6)
        height = (0.78, 0.5, 0.22)[i % 3]  # neighbours would cover each other on one line
        text = " ".join(word for _, word in words)
        side = "right" if time / 1000 > 0.7 * end else "left"  # near the edge a label would be cut off
        style = dict(color=WORD_COLOUR, fontsize=9, va="center", ha=side, parse_math=False)
        middle.text(time / 1000, height, f" {text} ", **style)
    for axis in (top, bottom):
        axis.set_ylim(-1.05, 1.05)
        axis.set_yticks([])
    for axis in (top, middle, bottom):
        axis.axvline(len(source) / source_rate, color="black", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right", "left"]].set_visible(False)
    bottom.set_xlim(0, end * 1.05)
    bottom.set_xlabel("seconds (dotted: the speaker has finished)")
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _waveform(axis: Any, samples: np.ndarray, rate: int, start: float, colour: str) -> None:
    """Draw the envelope in 5 ms steps: at this size single samples only cost time."""
    step = max(1, rate // 200)
    frames = samples[: len(samples) // step * step].reshape(-1, step)
    if not len(frames):
        return
    times = start + (np.arange(len(frames)) + 0.5) * step / rate
    peak = max(float(np.abs(samples).max()), 1e-3)
    axis.fill_between(times, frames.min(axis=1) / peak, frames.max(axis=1) / peak, color=colour, linewidth=0)
