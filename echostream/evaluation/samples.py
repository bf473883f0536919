"""Something to hear: recordings, what was said while they were heard, and a picture of when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echostream.audio.io import load_audio
from echostream.audio.resample import Resampler
from echostream.constants import SAMPLE_RATE
from echostream.errors import require
from echostream.evaluation.latency import playback
from echostream.evaluation.timeline import Timeline, draw
from echostream.files import replacing
from echostream.output.words import WordTimes
from echostream.streaming import StreamingSession, TargetText, Waveform
from echostream.streaming.events import SentenceEnd


@dataclass(frozen=True)
class Sample:
    """One recording and what was made of it.

    Attributes:
        name: of its files: ``<name>-source.opus``, ``<name>-output.opus`` (on the source's clock), ``<name>.png``.
        source_text, text: what was heard and what was written.
        words: (seconds of source, text) of each word.
        seconds: length of the source; ``first``: of it, when the first word was written (None: no word).
        spoken: is there speech?
    """

    name: str
    source_text: str
    text: str
    words: Sequence[tuple[float, str]]
    seconds: float
    first: float | None
    spoken: bool


def make_sample(session: StreamingSession, recording: Path, folder: Path, name: str) -> Sample:
    """Translate a recording as it is heard, and write its files.

    Raises:
        AudioError: it cannot be read. MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    samples = load_audio(recording)
    session.reset()
    events = [*session.push(samples), *session.finish()]
    session.reset()
    bundle = session.bundle
    clock = WordTimes(bundle.target_dict, False, bundle.config.units_read_text)
    for event in events:
        clock.take(event)
    waves = [event for event in events if isinstance(event, Waveform) and len(event.samples)]
    seconds = [len(wave.samples) / wave.sample_rate for wave in waves]
    intervals = playback([1000 * wave.source_time_s for wave in waves], [1000 * length for length in seconds])
    output = on_the_clock(waves, [start / 1000 for start, _ in intervals])
    write_opus(folder / f"{name}-source.opus", samples)
    if waves:
        write_opus(folder / f"{name}-output.opus", output)
    ends = [event for event in events if isinstance(event, SentenceEnd)]
    words = [(word.seconds, word.text) for word in clock.words]
    text, source_text = " ".join(end.text for end in ends), " ".join(end.source_text for end in ends)
    first = next((event.source_time_s for event in events if isinstance(event, TargetText)), None)
    heard = output[int(intervals[0][0] * SAMPLE_RATE / 1000) :] if waves else None
    picture = Timeline(
        (samples, SAMPLE_RATE), None if heard is None else (heard, SAMPLE_RATE), intervals,
        [(1000 * time, word) for time, word in words], source_text, text, spoken=False,
    )  # fmt: skip
    draw(picture, folder / f"{name}.png")
    return Sample(name, source_text, text, words, len(samples) / SAMPLE_RATE, first, bool(waves))


def on_the_clock(waves: Sequence[Waveform], starts: Sequence[float]) -> np.ndarray:
    """Pieces of speech at the seconds where each is played, silence between: float32 [N] at 16 kHz."""
    pieces = [Resampler(wave.sample_rate, SAMPLE_RATE).resample(wave.samples) for wave in waves]
    places = [round(start * SAMPLE_RATE) for start in starts]
    end = max((place + len(piece) for place, piece in zip(places, pieces)), default=0)
    track = np.zeros(end, dtype=np.float32)
    for place, piece in zip(places, pieces):
        track[place : place + len(piece)] = piece
    return track


def write_opus(path: Path, samples: np.ndarray) -> None:
    """Ogg Opus of float32 [N] at 16 kHz: about 4 kB a second. Raises: OutputError."""
    soundfile = require("soundfile", "all")
    with replacing(path) as file:
        soundfile.write(file, samples, SAMPLE_RATE, format="OGG", subtype="OPUS")


def page(samples: Sequence[Sample], model: str) -> str:
    """Markdown that lists them."""
    parts = [
        "# Samples",
        f"Made by `make samples` with {model}: what was said, what came out while it was heard (on the speaker's clock,"
        " so that both files can be played together), and when.",
    ]
    for sample in samples:
        links = [f"[source]({sample.name}-source.opus)", f"[timeline]({sample.name}.png)"]
        if sample.spoken:
            links.insert(1, f"[output]({sample.name}-output.opus)")
        first = "no word" if sample.first is None else f"first word after {sample.first:.1f} s"
        parts.append(
            f"## {sample.name}\n\n{' · '.join(links)} · {sample.seconds:.1f} s, {first}\n\n"
            f"> {sample.source_text or '…'}\n>\n> **{sample.text or '(nothing)'}**"
        )
    return "\n\n".join(parts) + "\n"


__all__ = ["Sample", "make_sample", "on_the_clock", "page", "write_opus"]
