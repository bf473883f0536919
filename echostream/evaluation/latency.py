"""Latency metrics for streams of words, in milliseconds, as plain functions of when each word came.

Letters: ``d_i`` delay of target word i (how much source had been read when its audio was handed out), ``|X|`` length
of the source, ``|Y|`` words of the reference, ``|Y'|`` words of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from echostream.errors import EchoStreamError

ATD_TOKEN_MS = 300.0  # what ATD takes for a word of speech on either side


def average_lagging(delays: Sequence[float], source_length: float, target_length: int) -> float:
    """AL (Ma et al., 2019, "STACL", eq. 7 and 8); for speech in ms (Ma et al., 2020, "SimulMT to SimulST").

    ``AL = 1/τ · Σ_{i=1..τ} d_i − (i−1)·|X|/|Y|``, τ being the first word with ``d_i ≥ |X|`` (the last word if none).

    Args:
        delays: ``d_1 .. d_n`` in ms, not falling.
        source_length: ``|X|`` in ms.
        target_length: ``|Y|``, words of the reference.

    Raises:
        EchoStreamError: there is no word, or a length is not positive.
    """
    _check(delays, source_length, target_length)
    ideal = source_length / target_length  # ms of source per target word, spoken without any lag
    total = 0.0
    for count, delay in enumerate(delays, 1):
        total += delay - (count - 1) * ideal
        if delay >= source_length:
            break
    return total / count


def length_adaptive_average_lagging(delays: Sequence[float], source_length: float, target_length: int) -> float:
    """LAAL (Papi et al., 2022, "Over-Generation Cannot Be Rewarded"): AL with ``max(|Y|, |Y'|)`` in place of ``|Y|``.

    AL falls, even below zero, when the output has more words than the reference; LAAL does not.
    """
    return average_lagging(delays, source_length, max(target_length, len(delays)))


def means(recordings: Sequence[tuple[Sequence[float], float, int]]) -> dict[str, float]:
    """AL, LAAL and StartOffset (ms) over recordings, of (``d_1 .. d_n``, ``|X|``, ``|Y|``) each.

    Those without a word are counted as ``silent`` and in no mean; without any other the means are NaN.
    """
    rows = [
        (average_lagging(delays, source, max(1, target)),
         length_adaptive_average_lagging(delays, source, max(1, target)), delays[0])
        for delays, source, target in recordings if delays
    ]  # fmt: skip
    found = np.mean(rows, axis=0).tolist() if rows else [float("nan")] * 3
    return dict(zip(("AL", "LAAL", "StartOffset"), found)) | {"silent": len(recordings) - len(rows)}


def average_proportion(delays: Sequence[float], source_length: float, target_length: int) -> float:
    """AP (Cho and Esipova, 2016, "Can neural machine translation do simultaneous translation?"): ``Σ d_i / (|X|·|Y|)``.

    Raises:
        EchoStreamError: as ``average_lagging``.
    """
    _check(delays, source_length, target_length)
    return sum(delays) / (source_length * target_length)


def differentiable_average_lagging(delays: Sequence[float], source_length: float) -> float:
    """DAL (Cherry and Foster, 2019, "Thinking Slow about Latency Evaluation", eq. 4 to 6).

    ``DAL = 1/|Y'| · Σ d'_i − (i−1)/γ`` with ``γ = |Y'|/|X|``, ``d'_1 = d_1`` and ``d'_i = max(d_i, d'_{i−1} + 1/γ)``.

    Raises:
        EchoStreamError: as ``average_lagging``.
    """
    _check(delays, source_length, len(delays))
    step = source_length / len(delays)
    total, last = 0.0, 0.0
    for index, delay in enumerate(delays):
        last = delay if index == 0 else max(delay, last + step)
        total += last - index * step
    return total / len(delays)


def _check(delays: Sequence[float], source_length: float, target_length: int) -> None:
    if not delays or source_length <= 0 or target_length <= 0:
        raise EchoStreamError(
            f"{len(delays)} words from {source_length} ms of source have no lagging (reference: {target_length} words)"
        )


def playback(emitted: Sequence[float], durations: Sequence[float]) -> list[tuple[float, float]]:
    """When each piece of speech is heard: ``(start, duration)`` in ms; a piece waits until the one before has ended."""
    intervals: list[tuple[float, float]] = []
    end = 0.0
    for time, duration in zip(emitted, durations, strict=True):
        start = max(end, time)
        intervals.append((start, duration))
        end = start + duration
    return intervals


def played(
    intervals: Sequence[Sequence[float]], pieces: Sequence[np.ndarray], rate: int
) -> tuple[np.ndarray, list[float]]:
    """What is heard from the first piece of speech on, float32 [N]: the pieces at their ``intervals`` (``playback``),
    silence where the listener waits; and how long each such silence is (ms)."""
    parts, silences = [np.zeros(0, dtype=np.float32)], []
    end = intervals[0][0] if intervals else 0.0
    for (start, duration), samples in zip(intervals, pieces, strict=True):
        if start > end:
            parts.append(np.zeros(round(rate * (start - end) / 1000), dtype=np.float32))
            silences.append(start - end)
        parts.append(samples)
        end = start + duration
    return np.concatenate(parts), silences


def average_token_delay(
    delays: Sequence[float], durations: Sequence[float] | None = None, emitted: Sequence[float] | None = None
) -> float:
    """ATD (Kano et al., 2023, "Average Token Delay", arXiv 2211.13173): how long after its source a token has ended.

    Source and speech are cut into tokens of 300 ms, anew at every emission. A target token belongs to the source token
    of its own number, one earlier for every token that the output so far was longer than the source so far, and to none
    that had not been read. Unlike AL it counts how long the speech takes.

    Args:
        delays: source read, ms, at the emission of each piece of speech (or each word of text), not falling.
        durations: of the pieces, ms; None for text, whose words take no time.
        emitted: when the pieces came by the clock that is asked about, ms (computation-aware: ``delays`` and all
            computing so far); None is ``delays``.

    Raises:
        EchoStreamError: there is no piece.
    """
    if not delays:
        raise EchoStreamError("no output has no average token delay")
    pieces = zip(delays, emitted or delays, durations or [None] * len(delays), strict=True)
    source_ends, target_ends, partners = [0.0], [0.0], []  # ends in ms of the tokens 0 (none), 1, 2, ...
    for delay, group in groupby(pieces, key=lambda piece: piece[0]):
        group = list(group)
        read, said = len(source_ends) - 1, len(target_ends) - 1
        for length in _tokens(delay - source_ends[-1]):
            source_ends.append(source_ends[-1] + length)
        if durations is None:
            lengths = [0.0] * len(group)
        else:
            lengths = _tokens(sum(duration for _, _, duration in group))
        for length in lengths:
            target_ends.append(max(group[0][1], target_ends[-1]) + length)
            partners.append(min(len(target_ends) - 1 - max(0, said - read), len(source_ends) - 1))
    if not partners:
        raise EchoStreamError("output without any duration has no average token delay")
    return sum(end - source_ends[i] for end, i in zip(target_ends[1:], partners, strict=True)) / len(partners)


def _tokens(duration: float) -> list[float]:
    """``duration`` ms as whole tokens and a rest."""
    whole, rest = divmod(duration, ATD_TOKEN_MS)
    return [ATD_TOKEN_MS] * int(whole) + ([rest] if rest > 0 else [])
