"""The timeline picture of a translated stream, by ``echostream.evaluation.timeline``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from echostream.errors import EchoStreamError, require
from echostream.evaluation.latency import playback, played
from echostream.evaluation.timeline import Timeline, draw
from echostream.files import check_writable
from echostream.output.words import WordTimes
from echostream.streaming.events import Event, SentenceEnd, Waveform
from echostream.text import Vocabulary

MOST_SECONDS = 240.0  # a wider picture cannot be drawn


class TimelinePicture:
    """Draws the first ``seconds`` of a stream when it is closed: source, words when they came, speech when it sounded.

    Args:
        path: of the PNG.
        rate: samples per second of the source.
        vocabulary, speech, units_read_text: see ``WordTimes``.
        seconds: what is kept and drawn, from the stream's start.

    Raises:
        EchoStreamError: ``seconds`` is out of range, or the suffix is not ``.png``.
        OutputError: the picture cannot be written; here if that shows already, or when it is closed.
        MissingExtraError: matplotlib is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        rate: int,
        vocabulary: Vocabulary,
        speech: bool,
        units_read_text: bool,
        seconds: float = 60.0,
    ):
        if not 1 <= seconds <= MOST_SECONDS:
            raise EchoStreamError(f"a timeline of {seconds:g} s cannot be drawn; choose 1 to {MOST_SECONDS:g} seconds")
        self.path = Path(path)
        if self.path.suffix.lower() != ".png":
            raise EchoStreamError(f"timeline {path} must end in .png")
        require("matplotlib", "simuleval")
        check_writable(self.path)
        self.rate, self.seconds, self.speech = rate, seconds, speech
        self.words = WordTimes(vocabulary, speech, units_read_text)
        self.source: list[np.ndarray] = []
        self.room = round(seconds * rate)
        self.speech_rate = rate
        self.pieces: list[np.ndarray] = []
        self.times: list[float] = []  # ms
        self.texts: tuple[list[str], list[str]] = ([], [])

    def hear(self, samples: np.ndarray) -> None:
        """Source samples, float32 [N]."""
        if self.room > 0:
            self.source.append(samples[: self.room].copy())
            self.room -= len(self.source[-1])

    def take(self, event: Event) -> None:
        if isinstance(event, SentenceEnd) and event.start_s < self.seconds:
            self.texts[0].append(event.source_text)
            self.texts[1].append(event.text)
        if event.source_time_s > self.seconds:
            return
        self.words.take(event)
        if isinstance(event, Waveform):
            self.pieces.append(event.samples)
            self.times.append(1000 * event.source_time_s)
            self.speech_rate = event.sample_rate

    def close(self) -> None:
        source = np.concatenate([np.zeros(0, np.float32), *self.source])
        intervals = playback(self.times, [1000 * len(piece) / self.speech_rate for piece in self.pieces])
        output, _ = played(intervals, self.pieces, self.speech_rate)
        draw(
            Timeline(
                source=(source, self.rate),
                output=(output, self.speech_rate),
                intervals=intervals,
                words=[(1000 * word.seconds, word.text) for word in self.words.words],
                source_text=" ".join(filter(None, self.texts[0])),
                text=" ".join(filter(None, self.texts[1])),
                spoken=self.speech,
            ),
            self.path,
        )
