"""Which keys the queries of the Emformer's segments may attend; for arrays of numpy and of torch alike."""

from __future__ import annotations

from typing import Any


def visible_keys(
    index: Any, offset: Any, past: Any, bank: Any, before: Any, frames: Any, segment: int, left: int, right: int,
    memory: int, shift: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Letters: Q queries, each also a key, L past frames, M summaries. Frames count from the block's first one.

    Args:
        index, offset: [Q] the segment of each query in the block, and its place there; from ``segment`` on it belongs
            to the right context, which repeats the next segments' frames.
        past, bank: [L] frames and [M] segments of the keys before the block, and of the block's own summaries.
        before: segments of the stream before the block; a number, or [N, 1, 1].
        frames: valid ones from the block's first to the stream's end (or to what has arrived of it); likewise.
        segment, left, right, memory: S, L, R and M of the layer.
        shift: Shiftable Context (Raffel et al., 2023, arXiv 2307.01377): a segment that the stream's end leaves with
            fewer than its S + R frames sees as many more of left context instead, so that all have the same number of
            keys. ``left`` is then S + R - 1 frames longer than what whole segments see.

    Returns:
        True where attention is allowed: to past frames, own keys and summaries, [(N,) Q, keys] each.
    """
    query, own, main = index[:, None], index * segment + offset, offset < segment
    first = query * segment - left  # the earliest frame that each may see
    if shift:
        first = first + (frames - query * segment).clip(1, segment + right) - 1
    sees_own = ((own >= first) & (index <= query) & main) | ((index == query) & ~main)
    return (
        (past >= first) & (past >= -before * segment),
        sees_own & (own < frames),
        (bank >= query - memory) & (bank < query) & (bank >= -before),
    )
