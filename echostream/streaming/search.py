"""Beam search over the rest of a sentence, whatever steps the decoder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np

from echostream.constants import BOS, EOS, PAD


class Chosen(NamedTuple):
    """A token of the best hypothesis, with the scores [V] and the state [D] that predicted it."""

    token: int
    scores: np.ndarray
    hidden: np.ndarray


# Feeds a token to each of H hypotheses that follow ``parents`` of the call before: (tokens [H], parents [H]) to the
# scores [H, V] of their next tokens and the states [H, D] behind them.
Step = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
# A search asks for a step by what it would call it with, is sent what the step returns, and returns what it has found.
Searching = Generator[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], list[Chosen]]


def search_together(step: Step, searches: Sequence[Searching]) -> list[list[Chosen]]:
    """What each search finds, the hypotheses of all of them fed at once.

    Args:
        step: is called with one hypothesis of each search first, in their order.
    """
    found: list[list[Chosen]] = [[] for _ in searches]
    asked = {i: next(search) for i, search in enumerate(searches)}
    begins = {i: i for i in asked}  # where each one's hypotheses began in the call before
    while asked:
        tokens = np.concatenate([tokens for tokens, _ in asked.values()])
        parents = np.concatenate([begins[i] + parents for i, (_, parents) in asked.items()])
        scores, hidden = step(tokens, parents)
        at = 0
        for i, (fed, _) in list(asked.items()):
            begins[i], end = at, at + len(fed)
            try:
                asked[i] = searches[i].send((scores[at:end], hidden[at:end]))
            except StopIteration as stop:
                found[i] = stop.value
                del asked[i]
            at = end
    return found


def searching(first: int, beam: int, most: int) -> Searching:
    """The best continuation, ``</s>`` last, by log-probability per token.

    The search ends once ``beam`` hypotheses have ended, as fairseq's does.

    Args:
        first: the token before the continuation.
        beam: hypotheses kept at a time.
        most: tokens before ``</s>`` at most; whoever has so many ends there.
    """
    tokens, parents = np.array([first]), np.array([0])
    totals: np.ndarray = np.zeros(1)
    paths: list[tuple[Chosen, ...]] = [()]
    ended: list[tuple[float, tuple[Chosen, ...]]] = []
    for length in range(1, most + 2):
        scores, hidden = yield tokens, parents
        likely = log_softmax(scores)
        likely[:, [BOS, PAD]] = -np.inf
        if length > most:
            likely[:, np.arange(likely.shape[1]) != EOS] = -np.inf
        sums = totals[:, None] + likely
        alive = []
        for rank, place in enumerate(highest(sums, 2 * beam)):
            row, token = divmod(place, sums.shape[1])
            if sums[row, token] == -np.inf:
                break
            path = (*paths[row], Chosen(token, scores[row], hidden[row]))
            if token != EOS:
                alive.append((row, token, sums[row, token], path))
            elif rank < beam:
                ended.append((sums[row, token] / length, path))
        if len(ended) >= beam or not alive:
            break
        kept = alive[:beam]
        parents, tokens = np.array([row for row, _, _, _ in kept]), np.array([token for _, token, _, _ in kept])
        totals, paths = np.array([total for _, _, total, _ in kept]), [path for _, _, _, path in kept]
    return list(max(ended, key=lambda one: one[0])[1])


def highest(values: np.ndarray, count: int) -> list[int]:
    """Where the ``count`` highest of ``values``, any shape, lie when flattened: the highest first, of equal ones the
    first. Sorting the scores of a whole vocabulary took 6 % of a stream's computing."""
    flat = values.ravel()
    count = min(count, len(flat))
    least = np.partition(flat, len(flat) - count)[len(flat) - count]
    places = np.flatnonzero(flat >= least)
    found: list[int] = places[np.argsort(-flat[places], kind="stable")[:count]].tolist()
    return found


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    probabilities: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return probabilities
