"""Finishing a sentence by beam search: the search itself, and sessions that use it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from echostream.benchmarks import parity
from echostream.constants import BOS, EOS, PAD
from echostream.errors import ConfigError
from echostream.streaming import SentenceEnd, StreamingSession
from echostream.streaming.search import highest, log_softmax, search_together, searching
from tests.test_streaming import BUNDLES, TRIED, assert_same, cut, of, speech, translate

SIZE = 8


class Toy:
    """A decoder whose scores are a random function of all tokens so far; it keeps its own hypotheses."""

    def __init__(self, seed: int):
        self.seed, self.hypotheses, self.widest = seed, [()], 0

    def scores(self, prefix: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng((self.seed, *prefix)).normal(size=SIZE) * 2

    def step(self, tokens: np.ndarray, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.hypotheses = [(*self.hypotheses[p], int(t)) for t, p in zip(tokens, parents, strict=True)]
        self.widest = max(self.widest, len(tokens))
        return np.stack([self.scores(h) for h in self.hypotheses]), np.array([[hash(h)] for h in self.hypotheses])

    def value(self, tokens: tuple[int, ...]) -> float:
        """Log-probability per token of a continuation of EOS."""
        steps = [log_softmax(self.scores((EOS, *tokens[:i])))[token] for i, token in enumerate(tokens)]
        return sum(steps) / len(steps)


def beam_search(step, first: int, beam: int, most: int) -> list:
    """One search alone."""
    return search_together(step, [searching(first, beam, most)])[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_wide_enough_finds_the_best_of_all(seed):
    words = [t for t in range(SIZE) if t not in (BOS, PAD, EOS)]
    every = [(*p, EOS) for n in range(4) for p in itertools.product(words, repeat=n)]
    toy = Toy(seed)
    found = beam_search(toy.step, EOS, 2 * len(every), 3)
    assert tuple(c.token for c in found) == max(every, key=Toy(seed).value)
    prefixes = [(EOS, *(c.token for c in found[:i])) for i in range(len(found))]
    for chosen, prefix in zip(found, prefixes):  # what stands beside a token is what predicted it
        np.testing.assert_array_equal(chosen.scores, toy.scores(prefix))
        assert chosen.hidden == [hash(prefix)]


@pytest.mark.parametrize("beam", [1, 2, 4])
def test_width_and_length_are_kept(beam):
    for seed in range(20):
        toy = Toy(seed)
        found = beam_search(toy.step, EOS, beam, 6)
        tokens = [c.token for c in found]
        assert toy.widest <= beam and len(tokens) <= 7
        assert tokens[-1] == EOS and not {BOS, PAD, EOS} & set(tokens[:-1])
    assert [c.token for c in beam_search(Toy(0).step, EOS, beam, 0)] == [EOS]


@pytest.mark.parametrize("count", [1, 10, 59, 60, 99])
def test_the_highest_are_those_of_a_stable_sort(count):
    rng = np.random.default_rng(count)
    values = rng.integers(-4, 4, (5, 12)).astype(np.float64)  # most of them several times
    values[rng.random(values.shape) < 0.3] = -np.inf
    assert highest(values, count) == np.argsort(-values, axis=None, kind="stable")[:count].tolist()
    assert highest(np.full((2, 3), -np.inf), 4) == [0, 1, 2, 3]


def test_a_beam_of_one_is_greedy():
    toy, prefix = Toy(3), (EOS,)
    for chosen in beam_search(toy.step, EOS, 1, 9):
        scores = toy.scores(prefix)
        scores[[BOS, PAD]] = -np.inf
        assert chosen.token == (scores.argmax() if len(prefix) <= 9 else EOS)
        prefix += (chosen.token,)


@pytest.mark.parametrize("unit_input", ["mt-tokens", "encoder"])
@pytest.mark.parametrize("policy", ["alignatt", "ctc", "sentence"])
def test_searched_sentences_have_the_scores_of_the_training_forward(policy, unit_input):
    found, ends = parity.compare_with_training(BUNDLES[unit_input], speech(6.0, seed=9), policy=TRIED[policy], beam=4)
    assert len(ends) >= 2 and found.tokens > 15 and found.unit_positions > 50
    assert found.text < 1e-9 and found.units < 1e-9


def test_any_split_and_any_company_give_the_same():
    samples, options = speech(6.0, seed=9), dict(policy=TRIED["alignatt"], beam=3)
    reference = translate(BUNDLES["mt-tokens"], samples, **options)
    rng = np.random.default_rng(0)
    assert_same(translate(BUNDLES["mt-tokens"], samples, cut(len(samples), rng, 9000), **options), reference)
    others = [samples, speech(2.0, seed=3), speech(3.5, seed=4)]
    together = parity.translate_together(BUNDLES["mt-tokens"], others, 2, rng, **options)
    assert_same(together[0], reference)


def test_what_was_committed_stands_and_the_rest_is_likelier():
    """The same words as greedy decoding until the sentence's end is known; what follows is never less likely."""
    bundle, better = BUNDLES["mt"], 0
    for seed in range(6):
        ends = {}
        for beam in (1, 6):
            events = translate(bundle, speech(4.0, seed=seed), policy=TRIED["sentence"], beam=beam)
            ends[beam] = of(SentenceEnd, events)[0]
        assert ends[1].end_s == ends[6].end_s
        values = [_likelihood(bundle, speech(4.0, seed=seed), ends[beam]) for beam in (1, 6)]
        better += values[1] > values[0] + 1e-9
        assert values[1] >= values[0] - 1e-9
    assert better


def _likelihood(bundle, samples, end: SentenceEnd) -> float:
    """Log-probability per token of a sentence's text, ``</s>`` included."""
    from echostream.audio.fbank import fbank

    features = torch.from_numpy(bundle.cmvn.apply(fbank(samples))).double()[None]
    with torch.no_grad():
        x, _ = bundle.model.encoder(features, torch.tensor([features.shape[1]]))
        x = x[:, round(end.start_s / 0.04) : round(end.end_s / 0.04)]
        target = torch.tensor([[*end.tokens, EOS]])
        scores, _ = bundle.model.mt_decoder(target.roll(1), x, torch.tensor([x.shape[1]]))
    return float(scores.log_softmax(-1).gather(2, target[..., None]).mean())


def test_a_bad_beam_is_refused():
    with pytest.raises(ConfigError, match="beam is 0; it must be a whole number of at least 1"):
        StreamingSession(BUNDLES["mt"], beam=0)
