"""When each phone is spoken: a monophone hidden Markov model on MFCCs, trained from a flat start.

The labels that units are judged against must not come from the units. So every phone is one Gaussian with a diagonal
covariance over ``MfccFeatures`` (50 a second, the units' frames); recordings are first cut into equal parts, then
aligned by Viterbi and the Gaussians estimated again, a few times over (the start of any GMM-HMM recogniser; Young et
al., The HTK Book). Silence may stand at both ends and between words. Boundaries are good to a frame or two.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

SILENCE = "sil"
_FLOOR = 0.05  # of the variances, relative to those of all frames: a rare phone must not become a spike


def phone_states(phonemes: str) -> tuple[list[str], np.ndarray]:
    """Phones of an IPA string with a silence at the ends and between words, and which of them may be skipped [N]."""
    names = [SILENCE]
    for word in phonemes.split():
        names += [c for c in word if unicodedata.category(c) in ("Ll", "Lu", "Lo")] + [SILENCE]  # no stress, no length
    return names, np.array([name == SILENCE for name in names])


def align(
    features: Sequence[np.ndarray],
    states: Sequence[tuple[list[str], np.ndarray]],
    rounds: int = 8,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[np.ndarray | None]:
    """The phone of every frame.

    Args:
        features: float32 [T, D] of each recording. states: ``phone_states`` of its text.

    Returns:
        names [T] of each recording; None where it has fewer frames than phones.
    """
    usable = [i for i, (x, (names, skip)) in enumerate(zip(features, states)) if len(x) > len(names)]
    found: list[np.ndarray | None] = [None] * len(features)
    if not usable:
        return found
    everything = np.concatenate([features[i] for i in usable])
    mean, scale = everything.mean(0), everything.std(0) + 1e-6
    frames = {i: (features[i] - mean) / scale for i in usable}
    phones = sorted({name for i in usable for name in states[i][0]})
    index = {name: n for n, name in enumerate(phones)}
    path = {i: np.arange(len(frames[i])) * len(states[i][0]) // len(frames[i]) for i in usable}
    for _ in progress(range(rounds)):
        sums, squares = np.zeros((2, len(phones), everything.shape[1]))
        counts = np.zeros(len(phones))
        for i in usable:
            labels = np.array([index[name] for name in states[i][0]])[path[i]]
            np.add.at(sums, labels, frames[i])
            np.add.at(squares, labels, frames[i] ** 2)
            counts += np.bincount(labels, minlength=len(phones))
        total = np.maximum(counts, 1.0)[:, None]
        means = sums / total
        variances = np.maximum(squares / total - means**2, _FLOOR)
        for i in usable:
            own = np.array([index[name] for name in states[i][0]])
            path[i] = _viterbi(_scores(frames[i], means, variances)[:, own], states[i][1])
    for i in usable:
        found[i] = np.array(states[i][0])[path[i]]
    return found


def _scores(x: np.ndarray, means: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Log-likelihoods up to a constant: [T, D], [P, D], [P, D] to [T, P]."""
    inverse = 1.0 / variances
    constant = np.log(variances).sum(1) + (means**2 * inverse).sum(1)
    return -0.5 * ((x**2) @ inverse.T - 2.0 * x @ (means * inverse).T + constant)


def _viterbi(scores: np.ndarray, skip: np.ndarray) -> np.ndarray:
    """The best monotone path through states [T, N] to [T]: stay, go on, or leap over one that may be skipped."""
    length, count = scores.shape
    best = np.full(count, -np.inf)
    best[0] = scores[0, 0]
    if count > 1 and skip[0]:
        best[1] = scores[0, 1]
    steps = np.zeros((length, count), dtype=np.int64)
    leap = np.zeros(count, dtype=bool)
    leap[2:] = skip[1:-1]
    for t in range(1, length):
        options = np.full((3, count), -np.inf)
        options[0], options[1, 1:] = best, best[:-1]
        options[2, 2:] = np.where(leap[2:], best[:-2], -np.inf)
        steps[t] = options.argmax(0)
        best = options.max(0) + scores[t]
    state = count - 1
    if count > 1 and skip[-1] and best[-2] > best[-1]:
        state = count - 2
    path = np.empty(length, dtype=np.int64)
    for t in range(length - 1, -1, -1):
        path[t] = state
        state -= steps[t, state]
    return path
