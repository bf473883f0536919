"""Latency metrics for streams of words, in milliseconds, as plain functions of when each word came.

Letters: ``d_i`` delay of target word i (how much source had been read when its audio was handed out), ``|X|`` length
of the source, ``|Y|`` words of the reference, ``|Y'|`` words of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

from echostream.errors import EchoStreamError


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
    if not delays or source_length <= 0 or target_length <= 0:
        raise EchoStreamError(
            f"{len(delays)} words from {source_length} ms of source have no lagging (reference: {target_length} words)"
        )
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


def playback(emitted: Sequence[float], durations: Sequence[float]) -> list[tuple[float, float]]:
    """When each piece of speech is heard: ``(start, duration)`` in ms; a piece waits until the one before has ended."""
    intervals: list[tuple[float, float]] = []
    end = 0.0
    for time, duration in zip(emitted, durations, strict=True):
        start = max(end, time)
        intervals.append((start, duration))
        end = start + duration
    return intervals
