"""Policies beside CTC-count: what their knobs do, that nothing is taken back, and the attention they may read."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import echostream
from echostream.audio.io import load_audio
from echostream.checkpoint import load_bundle
from echostream.constants import EOS
from echostream.data.augmentation.noise import coloured_noise, scale_noise
from echostream.errors import ConfigError
from echostream.models.decoders.layers import AttentionProbe
from echostream.streaming import (
    AlignAttPolicy,
    CTCCountPolicy,
    LocalAgreementPolicy,
    SentenceEnd,
    SessionBatch,
    StreamingSession,
    TargetText,
    WaitKPolicy,
    make_policy,
)
from echostream.streaming.policies.base import Draft
from tests.test_streaming import BUNDLES, assert_same, cut, of, progress, speech, translate

POLICIES = {
    "wait-k-ms": WaitKPolicy(2, 1, "ms", 280),
    "wait-k-tokens": WaitKPolicy(2, 2, "tokens"),
    "wait-k-words": WaitKPolicy(1, 1, "words"),
    "local-agreement": LocalAgreementPolicy(2),
    "alignatt": AlignAttPolicy(6),
}
SAMPLES = speech(6.0, seed=9)
DEMO = Path(echostream.__file__).parent / "assets" / "demo"


def first_g(events: list) -> list[float]:
    """g of the first token of every sentence. (Later ones depend on what was written before, first ones on nothing.)"""
    return [end.frames[0] if end.frames else np.inf for end in of(SentenceEnd, events)]


@pytest.mark.parametrize("name", POLICIES)
def test_any_split_gives_the_same_and_only_grows(name):
    policy = POLICIES[name]
    options = dict(policy=policy, whole_words=name == "wait-k-words")
    reference = translate(BUNDLES["mt"], SAMPLES, **options)
    splits = cut(len(SAMPLES), np.random.default_rng(3), 9000)
    assert_same(translate(BUNDLES["mt"], SAMPLES, splits, **options), reference)
    ends = of(SentenceEnd, reference)
    early = 0
    for end in ends:
        texts = of(TargetText, [e for e in reference if e.sentence == end.sentence])
        for before, after in itertools.pairwise(texts):
            assert after.sentence_text == before.sentence_text + after.text
            assert after.frames[0] >= before.frames[-1]
        assert tuple(t for e in texts for t in e.tokens) == end.tokens
        early += sum(frame < end.frames[-1] for frame in end.frames)
    assert early >= 2  # it wrote before a sentence ended


def test_a_batch_gives_each_stream_what_it_gets_alone():
    bundle = BUNDLES["mt"]
    others = [speech(2.0, seed=20), speech(3.0, seed=21)]
    for policy in (POLICIES["local-agreement"], POLICIES["alignatt"]):
        batch = SessionBatch(bundle, capacity=2, policy=policy)
        got: dict[int, list] = {}
        one, two = batch.join(), None
        for step in range(30):
            parts = {one: others[0][step * 3000 : (step + 1) * 3000]}
            if step == 3:
                two = batch.join()
            if two is not None:
                parts[two] = others[1][(step - 3) * 3000 : (step - 2) * 3000]
            for number, events in batch.push(parts).items():
                got.setdefault(number, []).extend(events)
        for number, events in batch.finish(one, two).items():
            got[number] += events
        for number, samples in zip((one, two), others):
            assert_same(got[number], translate(bundle, samples, policy=policy))


@pytest.mark.parametrize(
    "policies",
    [
        [WaitKPolicy(k, 1, "ms", 160) for k in (1, 6, 1000)],
        [AlignAttPolicy(f) for f in (0, 12, 1000)],
        [LocalAgreementPolicy(n) for n in (2, 3, 1000)],
    ],
    ids=["wait-k", "alignatt", "local-agreement"],
)
def test_delay_grows_with_the_knob(policies):
    options = dict(speech=False, whole_words=False)
    delays = [first_g(translate(BUNDLES["mt"], SAMPLES, policy=policy, **options)) for policy in policies]
    waited = first_g(translate(BUNDLES["mt"], SAMPLES, policy="sentence", **options))
    for less, more in itertools.pairwise(delays):
        assert all(a <= b for a, b in zip(less, more, strict=True))
    assert delays[0] != delays[-1] == waited


def test_a_session_with_memory_is_saved_and_restored(tmp_path):
    bundle, policy = BUNDLES["mt"], LocalAgreementPolicy(3)
    events, session = [], StreamingSession(bundle, policy=policy)
    for begin in range(0, len(SAMPLES), 20000):
        events += session.push(SAMPLES[begin : begin + 20000])
        session.save(tmp_path / "saved.npz")
        session = StreamingSession(bundle, policy=policy)
        session.restore(tmp_path / "saved.npz")
    assert_same(events + session.finish(), translate(bundle, SAMPLES, policy=policy))


# ------------------------------------------------------------------------------------------------------ counting


def test_wait_k_counts():
    ms = WaitKPolicy(3, 2, "ms", 400)
    # 10 frames of 40 ms a unit; the sentence's first token came at frame 5
    allowed = [ms.text(progress(9, 9, frames=f, first_frame=5), ())[0] for f in (5, 34, 35, 54, 55, 75)]
    assert allowed == [0, 0, 2, 2, 4, 6]
    tokens = WaitKPolicy(2, 1, "tokens")
    assert [tokens.text(progress(a, 9), ())[0] for a in range(5)] == [0, 0, 1, 2, 3]
    words = WaitKPolicy(2, 1, "words")
    assert words.text(progress(9, 9, source_words=1), ())[0] == 0
    assert words.text(progress(9, 9, source_words=3), ())[0] > 1000  # the draft tells where a word ends
    seen = progress(9, 9, source_words=3)
    assert [words.stops(seen, Draft((), (7,) * n, n)) for n in (1, 2, 3)] == [False, False, True]
    assert words.text(progress(9, 9, source_words=3, written_words=2), ())[0] == 0


def test_local_agreement_counts():
    policy = LocalAgreementPolicy(3)
    memory = policy.initial()

    def look(frames, committed, tokens):
        nonlocal memory
        seen = progress(1, 1, frames=frames)
        if policy.text(seen, memory)[0] == 0:
            return None
        agreed, memory = policy.settle(seen, Draft(committed, tokens, 0), memory)
        return agreed

    assert look(4, (), (5, 6, 7)) == 0 and look(8, (), (5, 6, 8, 9)) == 0
    assert look(8, (), (5, 6, 8)) is None  # nothing new was heard
    assert look(12, (), (5, 6, 8)) == 2
    assert look(16, (5, 6), (8, 9)) == 1  # the first hypothesis, which went on with 7, is forgotten
    assert look(20, (5, 6, 8), (4,)) == 0
    assert look(24, (5, 6, 8), ()) == 0


def test_alignatt_reads_attention():
    policy = AlignAttPolicy(3)
    assert policy.text(progress(1, 1, frames=3), ())[0] == 0
    seen = progress(1, 1, frames=10)
    for place, stops in ((0, False), (6, False), (7, True), (9, True)):
        assert policy.stops(seen, Draft((), (5,), 1, np.eye(10)[place])) == stops


def test_alignatt_is_not_misled_by_a_sink_at_the_start():
    """Most weight on the first frames, as in noise: where else the decoder looks decides."""
    seen, attention = progress(1, 1, frames=10), np.full(10, 0.02)
    attention[[0, 3]] = 0.5, 0.25
    for place, stops in ((4, False), (6, False), (7, True)):
        attention[4:] = 0.02
        attention[place] = 0.11
        assert AlignAttPolicy(3).stops(seen, Draft((), (5,), 1, attention)) == stops
        assert not AlignAttPolicy(3, alignatt_skip=0).stops(seen, Draft((), (5,), 1, attention))
    short = progress(1, 1, frames=2)  # all of it at the start: the newest frame is left
    assert AlignAttPolicy(1).stops(short, Draft((), (5,), 1, np.array([0.9, 0.1])))
    assert not AlignAttPolicy(0).stops(short, Draft((), (5,), 1, np.array([0.9, 0.1])))


@pytest.mark.parametrize("name", ["05", "07"])
def test_noise_does_not_make_the_shipped_model_hasty(name):
    """Of half a recording it writes as much in noise as without; misled by a sink, most of an invented sentence."""
    bundle, clean = load_bundle(), load_audio(DEMO / f"{name}.ogg")
    noise = coloured_noise(len(clean), "pink", np.random.default_rng(1))

    def words(samples):
        session = StreamingSession(bundle, speech=False, policy="alignatt")
        events = session.push(samples[: len(samples) // 2])
        return len("".join(event.text for event in events if isinstance(event, TargetText)).split())

    heard = clean + scale_noise(noise, clean, 10.0)
    assert words(heard) <= words(clean) + 1


def test_speech_follows_the_text_of_every_policy():
    for policy in (*POLICIES.values(), CTCCountPolicy(lagging_k2=1, stride_n2=2)):
        policy = type(policy)(**{**vars(policy), "lagging_k2": 1, "stride_n2": 2})
        assert [policy.units(progress(9, 9, written=w)) for w in range(6)] == [0, 0, 0, 2, 2, 4]
    # reading encoder frames: up to where the ST CTC head emitted as many subwords as were written
    assert WaitKPolicy().units(progress(9, 6, written=4, units_read_text=False)) == 10
    assert WaitKPolicy().units(progress(9, 6, written=9, units_read_text=False)) == 16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WaitKPolicy(wait_k=0), "wait_k is 0"),
        (lambda: WaitKPolicy(wait_unit="hours"), "wait_unit is 'hours'"),
        (lambda: LocalAgreementPolicy(1), "agreement_n is 1"),
        (lambda: AlignAttPolicy(-1), "alignatt_frames is -1"),
        (lambda: AlignAttPolicy(alignatt_skip=-1), "alignatt_skip is -1"),
        (lambda: make_policy("alignatt", wait_k=1), "no knob 'wait_k'"),
        (lambda: StreamingSession(BUNDLES["mt"], policy=AlignAttPolicy(alignatt_layer=2)), "layer 2, but .* 2 layers"),
        (lambda: AlignAttPolicy(alignatt_heads="3-1"), "alignatt_heads is '3-1'"),
        (lambda: StreamingSession(BUNDLES["mt"], policy=AlignAttPolicy(alignatt_heads="0.2")), "head 2, but .* 2 a"),
    ],
)
def test_knobs_are_checked(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


# ----------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("layer", [0, 1])
def test_a_probe_sees_the_weights_that_made_the_output(layer):
    """The probed weights, spread over a layer's values by hand, give that layer's attended vector (one head)."""
    torch.manual_seed(0)
    decoder = BUNDLES["mt"].model.mt_decoder
    frames = torch.randn(2, 7, 32, dtype=torch.float64)
    state = decoder.extend(frames, torch.tensor([7, 5]), decoder.init_state(2))
    probe = AttentionProbe([(layer, 0), (layer, 1)])
    attention = decoder.layers[layer].cross_attention
    inputs: list[torch.Tensor] = []
    hook = attention.q.register_forward_hook(lambda module, given, out: inputs.append(given[0]))
    with torch.no_grad():
        plain = decoder.step(torch.full((2, 1), EOS), None, state)
        inputs.clear()
        probed = decoder.step(torch.full((2, 1), EOS), None, state, probe=probe)
    hook.remove()
    # Weights that are told are computed by other products than those that are not: the same but for rounding.
    torch.testing.assert_close(plain[0], probed[0], atol=1e-13, rtol=0)
    weights = probe.weights
    assert weights.shape == (2, 1, 7) and torch.allclose(weights.sum(-1), torch.ones(2, 1, dtype=torch.float64))
    assert (weights[1, 0, 5:] == 0).all()
    with torch.no_grad():
        q = attention.q(inputs[0]).view(2, 1, 2, 16)
        k = state.memory[layer].keys[:, :7].view(2, 7, 2, 16)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
        scores[1, :, :, 5:] = -torch.inf
    torch.testing.assert_close(weights, scores.softmax(-1).mean(1))


def test_single_heads_and_layers_average_to_the_same():
    """A layer is the mean of its heads, and heads of several layers are averaged alike."""
    torch.manual_seed(0)
    decoder = BUNDLES["mt"].model.mt_decoder
    frames = torch.randn(1, 7, 32, dtype=torch.float64)
    state = decoder.extend(frames, torch.tensor([7]), decoder.init_state(1))

    def weights(*heads: tuple[int, int]) -> torch.Tensor:
        probe = AttentionProbe(heads)
        with torch.no_grad():
            decoder.step(torch.full((1, 1), EOS), None, state, probe=probe)
        return probe.weights

    single = [weights(head) for head in ((0, 0), (0, 1), (1, 1))]
    assert not torch.allclose(single[0], single[1])
    torch.testing.assert_close(weights((0, 0), (0, 1), (1, 1)), sum(single) / 3)
    assert AlignAttPolicy(alignatt_heads="0.1,-1.0").attention_heads == ((0, 1), (-1, 0))


def test_without_frames_nothing_is_attended():
    decoder = BUNDLES["mt"].model.mt_decoder
    probe = AttentionProbe([(1, 0)])
    with torch.no_grad():
        decoder.step(torch.full((1, 1), EOS), None, decoder.init_state(1), probe=probe)
    assert probe.weights.shape == (1, 1, 0)
