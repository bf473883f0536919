"""Recordings through a batch of streaming sessions, in this process: what came out of each, and when.

SimulEval hears one recording at a time; sweeps and long talks need neither it nor its computation-aware times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.output.words import TimedWord, WordTimes
from echostream.streaming.batch import SessionBatch
from echostream.streaming.events import Event, SentenceEnd, Waveform

if TYPE_CHECKING:
    from tqdm import tqdm

    from echostream.checkpoint import Bundle

BLOCK = 10 * SAMPLE_RATE  # samples pushed at once


@dataclass
class Streamed:
    """What a session gave out for one recording.

    Attributes:
        seconds: length of the source.
        written, spoken: its words, timed by when they were written, and by the speech that holds them (none without).
        ends: of each sentence that has words, how many words there are up to its end, and when its last CTC token came
            (seconds of source).
        waves: speech, in pieces.
    """

    seconds: float
    written: WordTimes
    spoken: WordTimes | None
    ends: list[tuple[int, float]] = field(default_factory=list)
    waves: list[Waveform] = field(default_factory=list)

    def take(self, event: Event) -> None:
        self.written.take(event)
        if self.spoken is not None:
            self.spoken.take(event)
        if isinstance(event, Waveform):
            self.waves.append(event)
        elif isinstance(event, SentenceEnd):
            count = len(self.words)
            if count > (self.ends[-1][0] if self.ends else 0):
                self.ends.append((count, event.last_heard_s))

    @property
    def words(self) -> list[TimedWord]:
        return self.written.words

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


def stream(
    bundle: Bundle,
    recordings: Iterable[np.ndarray],
    options: Mapping[str, Any],
    batch: int = 8,
    progress: tqdm | None = None,
) -> Iterator[Streamed]:
    """Translate recordings, ``batch`` at a time; each gets what it would get alone.

    Args:
        recordings: float32 [N] at 16 kHz each, asked for when their turn comes.
        options: of the session.
        batch: sessions that step together.
        progress: told of every second of source heard.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    recordings = iter(recordings)
    sessions = SessionBatch(bundle, capacity=batch, **options)
    while chosen := list(islice(recordings, batch)):
        streams = {sessions.join(): samples for samples in chosen}
        found = {}
        for number, samples in streams.items():
            clocks = [
                WordTimes(bundle.target_dict, speech, bundle.config.units_read_text)
                for speech in (False, True)
            ]
            spoken = clocks[1] if sessions.settings.speech else None
            found[number] = Streamed(len(samples) / SAMPLE_RATE, clocks[0], spoken)
        for start in range(0, max(map(len, chosen)), BLOCK):
            parts = {n: samples[start : start + BLOCK] for n, samples in streams.items() if start < len(samples)}
            for number, events in sessions.push(parts).items():
                for event in events:
                    found[number].take(event)
            if progress is not None:
                progress.update(sum(map(len, parts.values())) / SAMPLE_RATE)
        for number, events in sessions.finish(*streams).items():
            for event in events:
                found[number].take(event)
            sessions.leave(number)
        yield from found.values()
