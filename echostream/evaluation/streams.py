"""Recordings through a batch of streaming sessions, in this process: what came out of each, and when.

SimulEval hears one recording at a time; sweeps and long talks need neither it nor its computation-aware times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.output.words import HeardWords, TimedWord, WordTimes
from echostream.streaming.batch import SessionBatch
from echostream.streaming.events import Event, SentenceEnd, Waveform
from echostream.streaming.session import StreamingSession

if TYPE_CHECKING:
    from tqdm import tqdm

    from echostream.checkpoint import Bundle

BLOCK = 10 * SAMPLE_RATE  # samples pushed at once


@dataclass
class Streamed:
    """What a session gave out for one recording.

    Attributes:
        seconds: length of the source.
        written, spoken, heard: its words, timed by when they were written, by when the speech that holds them came, and
            by when a player has said them (none without speech).
        ends: of each sentence that has words, how many words there are up to its end, and when its last CTC token came
            (seconds of source).
        waves: speech, in pieces.
    """

    seconds: float
    written: WordTimes
    spoken: WordTimes | None
    heard: HeardWords | None = None
    ends: list[tuple[int, float]] = field(default_factory=list)
    waves: list[Waveform] = field(default_factory=list)

    @classmethod
    def of(cls, bundle: Bundle, samples: np.ndarray, speech: bool) -> Streamed:
        """Nothing yet, of a recording [N] at 16 kHz."""
        vocabulary, units_read_text = bundle.target_dict, bundle.config.units_read_text
        written = WordTimes(vocabulary, False, units_read_text)
        if not speech:
            return cls(len(samples) / SAMPLE_RATE, written, None)
        spoken = WordTimes(vocabulary, True, units_read_text)
        return cls(len(samples) / SAMPLE_RATE, written, spoken, HeardWords(vocabulary, units_read_text))

    def take(self, event: Event) -> None:
        self.written.take(event)
        for clock in (self.spoken, self.heard):
            if clock is not None:
                clock.take(event)
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
        speech = sessions.settings.speech
        found = {number: Streamed.of(bundle, samples, speech) for number, samples in streams.items()}
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


def stream_live(
    bundle: Bundle, samples: np.ndarray, options: Mapping[str, Any], progress: tqdm | None = None
) -> tuple[Streamed, Streamed]:
    """Translate one recording chunk by chunk, and say by two clocks when everything came.

    The second is computation-aware: a chunk is heard when it has been spoken and the one before it is done, and what it
    brings comes when its computing, as this machine does it, has ended. Nothing else may run meanwhile.

    Args:
        samples: float32 [N] at 16 kHz.
        options: of the session.
        progress: told of every second of source heard.

    Returns:
        By the audio clock, and computation-aware; the second's ``ends`` are the first's.
    """
    session = StreamingSession(bundle, **options)
    plain, aware = (Streamed.of(bundle, samples, session.settings.speech) for _ in range(2))
    size = session.settings.chunk_ms * SAMPLE_RATE // 1000
    now = 0.0
    for start in range(0, len(samples) + size, size):
        part = samples[start : start + size]
        begin = perf_counter()
        events = session.push(part) if len(part) else session.finish()
        now = max(now, min(start + size, len(samples)) / SAMPLE_RATE) + perf_counter() - begin
        for event in events:
            plain.take(event)
            aware.take(replace(event, source_time_s=now))
        if progress is not None:
            progress.update(len(part) / SAMPLE_RATE)
    aware.ends = plain.ends
    return plain, aware
