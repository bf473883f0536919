"""The streaming session: the audio clock, parity with itself and with the training forward, sentences, bad input."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echostream.audio.cmvn import GlobalCMVN
from echostream.audio.fbank import fbank
from echostream.audio.io import load_audio
from echostream.audio.resample import Resampler
from echostream.benchmarks import parity
from echostream.benchmarks.parity import random_pieces as cut
from echostream.checkpoint import DEFAULT_BUNDLE, load_bundle
from echostream.constants import BLANK, EOS, NUM_SPECIALS
from echostream.errors import AudioError, ConfigError, SessionError
from echostream.models.decoders.vocoder import CodeHiFiGAN
from echostream.models.echostream_model import build_echostream_model
from echostream.streaming import (
    AlignAttPolicy,
    CTCCountPolicy,
    LocalAgreementPolicy,
    SentenceEnd,
    SessionBatch,
    SourceText,
    StreamingSession,
    TargetText,
    TargetUnits,
    WaitForSentenceEnd,
    WaitKPolicy,
    Waveform,
    make_policy,
)
from echostream.streaming.exported.decoder import ExportedDecoder
from echostream.streaming.policies.base import Progress
from echostream.streaming.writing import loop_length
from echostream.text import Vocabulary
from tests.conftest import NUM_UNITS, tiny_config, tiny_voice

PIECES = [".", "?", ",", *(("▁" if i % 2 else "") + "bdfgklmnprst"[i % 12] + "aeiou"[i % 5] for i in range(28))]
VOCABULARY = Vocabulary(PIECES)


def speech(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Sounds of changing pitch, loudness and colour."""
    rng = np.random.default_rng(seed)
    steps = int(seconds * 8) + 2
    t = np.arange(int(seconds * rate)) / rate
    pitch = np.interp(t * 8, np.arange(steps), rng.uniform(90, 280, steps))
    loud = np.interp(t * 8, np.arange(steps), rng.uniform(0, 1, steps) ** 2)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    tones = [np.sin(k * phase) * np.interp(t * 8, np.arange(steps), rng.uniform(0, 1, steps)) / k for k in range(1, 9)]
    wave = np.sum(tones, axis=0)
    return (0.2 * loud * wave + 0.002 * rng.standard_normal(len(t))).astype(np.float32)


def tune(head: torch.nn.Linear, inputs: torch.Tensor, blank: float | None = None) -> None:
    """Give a random head outputs of mean 0 and deviation 1 over ``inputs`` [T, D], so that its best symbol changes."""
    head.weight.normal_()
    head.bias.zero_()
    scores = head(inputs)
    head.weight.div_(scores.std(0)[:, None])
    head.bias.sub_(scores.mean(0) / scores.std(0))
    for symbol in range(NUM_SPECIALS):
        if symbol != EOS or blank is not None:
            head.bias[symbol] -= 50
    if blank is not None:
        head.bias[BLANK] += 50 + blank


def make_bundle(unit_input: str = "mt", seed: int = 0, voice: bool = True, **changes) -> SimpleNamespace:
    """A tiny random model in fp64 whose heads are tuned to say a word now and then, and to end sentences."""
    torch.manual_seed(seed)
    size = len(VOCABULARY)
    values = dict(asr_vocab_size=size, st_vocab_size=size, mt_vocab_size=size, unit_decoder_input=unit_input)
    config = tiny_config(**{**values, **changes})
    model = build_echostream_model(config).double().eval()
    cmvn = GlobalCMVN(np.full(80, 8.0, np.float32), np.full(80, 4.0, np.float32))
    with torch.no_grad():
        for layer in [*model.mt_decoder.layers, *model.unit_decoder.layers]:
            layer.cross_attention.q.weight.mul_(4)  # so that what is visible matters
            layer.cross_attention.out.weight.mul_(4)
        features = torch.from_numpy(cmvn.apply(fbank(speech(12.0, seed=99)))).double()[None]
        x, _lengths = model.encoder(features, torch.tensor([features.shape[1]]))
        tune(model.asr_head.output, x[0], blank=2.2)
        hidden = x
        for layer in model.st_decoder.layers:
            hidden = layer(hidden)
        tune(model.st_decoder.head.output, hidden[0], blank=2.2)
        model.st_decoder.head.output.bias[NUM_SPECIALS : NUM_SPECIALS + 2] -= 0.2  # "." and "?"
        prev = torch.randint(NUM_SPECIALS, size, (1, 30))
        _, hidden = model.mt_decoder(prev, x[:, :100], torch.tensor([100]))
        tune(model.mt_decoder.output, hidden[0])
        model.mt_decoder.output.bias[EOS] += 0.5
        if model.unit_decoder.tokens is not None:  # they start at zero
            torch.nn.init.normal_(model.unit_decoder.tokens.weight, std=0.3)
        written = torch.randint(NUM_SPECIALS, size, (1, 30))
        inputs = model.unit_decoder.upsample(x[:, :100] if unit_input == "encoder" else hidden, written)
        hidden = model.unit_decoder.run(inputs, x[:, :100], torch.tensor([100]), None)
        tune(model.unit_decoder.output, hidden[0], blank=1.0)
    vocoder = None
    if voice:
        vocoder = CodeHiFiGAN(tiny_voice())
        vocoder = vocoder.double().eval()
    return SimpleNamespace(
        config=config,
        model=model,
        source_dict=VOCABULARY,
        target_dict=VOCABULARY,
        unit_count=NUM_UNITS,
        cmvn=cmvn,
        vocoder=vocoder,
        policy={"speech_gate": False},  # what ``speech`` makes is hardly speech to silero
        digest=f"tiny-{seed}-{unit_input}",
    )


BUNDLES = {
    "mt": make_bundle("mt"),
    "mt-tokens": make_bundle("mt-tokens"),
    "encoder": make_bundle("encoder", ctc_upsample_ratio=2),
}


def translate(bundle, samples, splits=None, rate=16000, **options) -> list:
    options.setdefault("policy", CTCCountPolicy(1, 1))
    session = StreamingSession(bundle, **options)
    events, at = [], 0
    for size in splits or [len(samples)]:
        events += session.push(samples[at : at + size], rate)
        at += size
    assert at >= len(samples)
    return events + session.finish()


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def assert_same(left: list, right: list) -> None:
    """Events equal, waveforms to 1e-4."""
    assert [type(e) for e in left] == [type(e) for e in right]
    for a, b in zip(left, right):
        if isinstance(a, Waveform):
            assert (a.sentence, a.source_time_s) == (b.sentence, b.source_time_s)
            np.testing.assert_allclose(a.samples, b.samples, atol=1e-4)
        elif isinstance(a, SentenceEnd):
            for name in ("reason", "text", "tokens", "frames", "units", "source_text", "start_s", "end_s"):
                assert getattr(a, name) == getattr(b, name)
            np.testing.assert_allclose(a.waveform, b.waveform, atol=1e-4)
        else:
            assert a == b


# ------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("unit_input", BUNDLES)
@pytest.mark.parametrize("rate", [16000, 8000, 44100])
def test_any_split_gives_the_same_events(unit_input, rate):
    samples = speech(6.0, rate, seed=9)
    reference = translate(BUNDLES[unit_input], samples, rate=rate)
    assert len(of(SentenceEnd, reference)) >= (1 if rate == 8000 else 2)
    assert of(Waveform, reference) and of(SourceText, reference)
    rng = np.random.default_rng(rate)
    for largest in (300, 9000):
        assert_same(translate(BUNDLES[unit_input], samples, cut(len(samples), rng, largest), rate), reference)


def test_single_samples_give_the_same_events():
    samples = speech(0.9, seed=3)
    assert_same(translate(BUNDLES["mt"], samples, [1] * len(samples)), translate(BUNDLES["mt"], samples))


TRIED = {
    "ctc": CTCCountPolicy(1, 2),
    "wait-k-ms": WaitKPolicy(2, 1, "ms", 280),
    "wait-k-words": WaitKPolicy(1, 1, "words"),
    "local-agreement": LocalAgreementPolicy(2),
    "alignatt": AlignAttPolicy(6),
    "sentence": WaitForSentenceEnd(),
}


@pytest.mark.parametrize("unit_input", BUNDLES)
@pytest.mark.parametrize("whole_words", [True, False])
@pytest.mark.parametrize("policy", TRIED)
def test_streamed_scores_are_those_of_the_masked_training_forward(policy, whole_words, unit_input):
    """Spec, reading 3: teacher forcing with cross-attention limited to g gives the streamed MT and unit scores."""
    options = dict(policy=TRIED[policy], whole_words=whole_words)
    found, ends = parity.compare_with_training(BUNDLES[unit_input], speech(6.0, seed=9), **options)
    assert len(ends) >= 2 and found.tokens > 15 and found.unit_positions > 50
    assert policy == "sentence" or any(len(set(end.frames)) > 1 for end in ends)
    assert found.text < 1e-9 and found.units < 1e-9


def test_the_comparison_with_training_notices_a_wrong_g(monkeypatch):
    """Whoever sees a frame more or less than it says is found out."""
    step = ExportedDecoder._step

    def blind(self, rows, given, new):
        seen, self.frames = self.frames, (self.frames - 1).clip(min=0)
        out = step(self, rows, given, new)
        self.frames = seen
        return out

    monkeypatch.setattr(ExportedDecoder, "_step", blind)
    found, _ = parity.compare_with_training(BUNDLES["mt"], speech(6.0, seed=9), policy=CTCCountPolicy(1, 2))
    assert found.text > 1e-3


@pytest.fixture(scope="module")
def shipped():
    return load_bundle(backend="torch")  # its weights as they are shipped, dequantised


@pytest.mark.parametrize("name", ["03.ogg", "08.ogg"])
def test_the_shipped_model_keeps_its_promises_on_recordings(shipped, name, tmp_path):
    """In torch; scripts/check_streaming.py does this for any number of recordings, and batches."""
    samples = load_audio(DEFAULT_BUNDLE.parent / "demo" / name)
    expected, rng = parity.translate(shipped, samples), np.random.default_rng(5)
    assert of(TargetText, expected) and of(Waveform, expected)
    for again in (
        parity.translate(shipped, samples, cut(len(samples), rng, 7000)),
        parity.translate_with_breaks(shipped, samples, rng.integers(0, len(samples), 2), tmp_path / "saved.npz"),
    ):
        assert not parity.differs(again, expected) and parity.wave_difference(again, expected) <= 1e-4
    found, _ = parity.compare_with_training(shipped, samples)
    assert found.tokens and found.text < 1e-4 and found.units < 1e-4


def test_streamed_ctc_tokens_are_the_offline_ones():
    bundle = BUNDLES["mt"]
    samples = speech(5.0, seed=7)
    events = translate(bundle, samples, segmenter="none")
    features = torch.from_numpy(bundle.cmvn.apply(fbank(samples))).double()[None]
    with torch.no_grad():
        out = bundle.model(features, torch.tensor([features.shape[1]]), prev_output_tokens=torch.tensor([[EOS]]))
    symbols = out["asr_logits"][0].argmax(-1).tolist()
    expected = [s for s, before in zip(symbols, [BLANK, *symbols]) if s != before and s != BLANK]
    while VOCABULARY[expected[0]] in ".?":
        expected = expected[1:]  # a sentence does not open with the end of one
    assert [t for e in of(SourceText, events) for t in e.tokens] == expected


def test_waveform_is_that_of_the_units_spoken_at_once():
    bundle = BUNDLES["mt"]
    events = translate(bundle, speech(7.0))
    for end in of(SentenceEnd, events):
        mine = [e for e in events if e.sentence == end.sentence]
        np.testing.assert_array_equal(np.concatenate([e.samples for e in of(Waveform, mine)]), end.waveform)
        assert tuple(u for e in of(TargetUnits, mine) for u in e.units) == end.units
        with torch.no_grad():
            whole, _ = bundle.vocoder(torch.tensor([end.units]), torch.tensor([len(end.units)]))
        np.testing.assert_allclose(end.waveform, whole[0].numpy(), atol=1e-4)


def test_wait_for_sentence_end_is_offline_decoding():
    bundle = BUNDLES["mt"]
    samples = speech(3.0, seed=9)
    end = of(SentenceEnd, translate(bundle, samples, policy="sentence", segmenter="none"))[0]
    features = torch.from_numpy(bundle.cmvn.apply(fbank(samples))).double()[None]
    with torch.no_grad():
        x, _lengths = bundle.model.encoder(features, torch.tensor([features.shape[1]]))
        window = x[:, round(end.start_s * 25) :]
        tokens, _, count = bundle.model.mt_decoder.greedy(window, torch.tensor([window.shape[1]]))
    assert end.tokens == tuple(tokens[0, : len(end.tokens)].tolist())
    assert tokens[0, len(end.tokens)] == EOS or loop_length(tokens[0].tolist()) or count[0] > len(end.tokens)


# --------------------------------------------------------------------------------------- clock, order, sentences


def test_decisions_fall_on_the_audio_clock():
    for rate, chunk_ms in ((16000, 320), (22050, 100), (11025, 333)):
        session = StreamingSession(BUNDLES["mt"], chunk_ms=chunk_ms)
        samples = speech(2.0, rate)
        times = set()
        for begin in range(0, len(samples), 777):
            events = session.push(samples[begin : begin + 777], rate)
            heard = min(begin + 777, len(samples)) / rate
            for event in events:
                assert heard - 777 / rate < event.source_time_s <= heard + 1e-9
                times.add(event.source_time_s)
        assert all(abs(t * 1000 / chunk_ms - round(t * 1000 / chunk_ms)) < 1e-6 for t in times) and times
        assert abs(session.source_time_s - 2.0) < 1e-3
        assert all(e.source_time_s == pytest.approx(2.0, abs=1e-3) for e in session.finish())


@pytest.mark.parametrize("unit_input", BUNDLES)
def test_committed_output_only_grows(unit_input):
    events = translate(BUNDLES[unit_input], speech(8.0, seed=9))
    ended = -1
    for sentence in range(len(of(SentenceEnd, events))):
        mine = [e for e in events if e.sentence == sentence]
        assert all(e.sentence > ended for e in mine) and isinstance(mine[-1], SentenceEnd)
        texts = of(TargetText, mine)
        for before, after in itertools.pairwise(texts):
            assert after.sentence_text == before.sentence_text + after.text
            assert after.frames[0] >= before.frames[-1] and after.source_time_s >= before.source_time_s
        end = mine[-1]
        assert tuple(t for e in texts for t in e.tokens) == end.tokens
        assert tuple(f for e in texts for f in e.frames) == end.frames
        assert end.text == "".join(e.text for e in texts)
        assert [e.final for e in of(SourceText, mine)].count(True) <= 1
        ended = sentence
    assert [e.source_time_s for e in events] == sorted(e.source_time_s for e in events)


def test_whole_words():
    """A writing ends where the draft begins another word; only a later change of mind can lengthen one."""

    def inside_words(whole: bool) -> int:
        cut = 0
        for seed in range(9, 13):
            events = translate(BUNDLES["mt"], speech(8.0, seed=seed), whole_words=whole)
            for sentence in range(len(of(SentenceEnd, events))):
                texts = of(TargetText, [e for e in events if e.sentence == sentence])
                for after in texts[1:-1]:  # at the sentence's end everything is written
                    cut += not VOCABULARY.starts_word(after.tokens[0]) and after.text[0].isalnum()
        return cut

    assert 5 * inside_words(True) < inside_words(False)


def test_a_sentence_starts_anew():
    """What follows a sentence does not depend on what the sentence was, only on where it ended."""
    events = translate(BUNDLES["mt"], speech(8.0, seed=9))
    ends = of(SentenceEnd, events)
    assert len(ends) >= 2
    for before, after in itertools.pairwise(ends):
        assert after.start_s <= before.end_s  # the frames behind the closing token are seen again
        assert after.frames == () or after.frames[0] <= round((after.end_s - after.start_s) * 25)
        assert after.sentence == before.sentence + 1


def test_policies_differ_in_latency_only_at_the_end_of_a_sentence():
    samples = speech(6.0, seed=5)
    early = of(SentenceEnd, translate(BUNDLES["mt"], samples, policy=CTCCountPolicy(0, 1)))
    late = of(SentenceEnd, translate(BUNDLES["mt"], samples, policy=WaitForSentenceEnd()))
    assert [e.end_s for e in early] == [e.end_s for e in late]
    assert np.nanmean([e.lag.first_text_s for e in early]) < np.nanmean([e.lag.first_text_s for e in late])
    for end in late:
        assert len(set(end.frames)) <= 1


def test_maximum_length_ends_a_sentence():
    bundle = BUNDLES["mt"]
    events = translate(bundle, speech(9.0, seed=1), segmenter="none", max_sentence_frames=50)
    ends = of(SentenceEnd, events)
    assert len(ends) >= 4 and {e.reason for e in ends[:-1]} == {"length"}
    assert all(e.end_s - e.start_s <= 2.0 + 1e-9 for e in ends)
    assert_same(translate(bundle, speech(9.0, seed=1), [700] * 206, segmenter="none", max_sentence_frames=50), events)


def test_one_enormous_chunk_is_the_same_sentences_as_buffers_allow():
    events = translate(BUNDLES["mt"], speech(25.0, seed=1), segmenter="none", chunk_ms=60000)
    ends = of(SentenceEnd, events)
    assert len(ends) >= 3 and all(e.end_s - e.start_s <= 256 * 0.04 + 1e-9 for e in ends)


def test_without_a_voice_units_still_come():
    bundle = make_bundle("mt", voice=False)
    events = translate(bundle, speech(4.0))
    assert of(TargetUnits, events) and not of(Waveform, events)
    assert all(e.waveform.size == 0 for e in of(SentenceEnd, events))


def test_speech_off_writes_the_same_text():
    with_speech = translate(BUNDLES["mt"], speech(4.0))
    text_only = translate(BUNDLES["mt"], speech(4.0), speech=False)
    assert of(TargetText, with_speech) == of(TargetText, text_only)
    assert not of(TargetUnits, text_only) and not of(Waveform, text_only)


def test_reset_begins_a_new_stream():
    bundle, samples = BUNDLES["mt"], speech(3.0)
    session = StreamingSession(bundle, policy=CTCCountPolicy(1, 1))
    session.push(speech(2.2, seed=8))
    session.reset()
    assert_same(session.push(samples) + session.finish(), translate(bundle, samples))
    session.reset()
    assert_same(session.push(samples) + session.finish(), translate(bundle, samples))


def test_sessions_share_a_bundle_without_mixing():
    bundle, one, two = BUNDLES["mt"], speech(3.0), speech(3.0, seed=4)
    left, right = (StreamingSession(bundle, policy=CTCCountPolicy(1, 1)) for _ in range(2))
    got: tuple[list, list] = ([], [])
    for begin in range(0, 48000, 4000):
        got[0].extend(left.push(one[begin : begin + 4000]))
        got[1].extend(right.push(two[begin : begin + 4000]))
    assert_same(got[0] + left.finish(), translate(bundle, one))
    assert_same(got[1] + right.finish(), translate(bundle, two))


def test_state_does_not_grow():
    session, ended = StreamingSession(BUNDLES["mt"]), 0
    least, sizes = session.nbytes, []
    for i in range(12):
        ended += sum(isinstance(event, SentenceEnd) for event in session.push(speech(2.0, seed=i)))
        sizes.append(session.nbytes)
        assert len(session._state.stream.recent) <= 125 and len(session._state.clock.samples) < 5120
    # It holds the sentence that is being said, not those before: what the first half needed is enough for the second.
    assert ended > 3 and max(sizes[6:]) <= max(sizes[:6]) < 10 * least
    assert session.elapsed_s == pytest.approx(sum(session.stage_seconds.values()), rel=0.5)
    assert set(session.stage_seconds) == {"features", "encoder", "text", "units", "vocoder"}


# ------------------------------------------------------------------------------------------- saved and restored


@pytest.mark.parametrize("unit_input", BUNDLES)
def test_a_restored_session_goes_on_identically(unit_input, tmp_path):
    bundle, samples = BUNDLES[unit_input], speech(5.0, 22050, seed=9)
    expected = translate(bundle, samples, rate=22050)
    rng = np.random.default_rng(4)
    at, events, session = 0, [], StreamingSession(bundle, policy=CTCCountPolicy(1, 1))
    for i, stop in enumerate([*sorted(rng.integers(0, len(samples), 5)), len(samples)]):
        events += session.push(samples[at:stop], 22050)
        at = stop
        session.save(tmp_path / f"{i}.npz")
        session = StreamingSession(bundle, policy=CTCCountPolicy(1, 1))
        session.push(speech(1.0, seed=i))  # what it heard before must not matter
        session.restore(tmp_path / f"{i}.npz")
    assert_same(events + session.finish(), expected)
    session.save(tmp_path / "end.npz")
    again = StreamingSession(bundle, policy=CTCCountPolicy(1, 1))
    again.restore(tmp_path / "end.npz")
    assert again.finished and again.source_time_s == session.source_time_s


def test_a_new_session_can_be_saved(tmp_path):
    bundle = BUNDLES["mt"]
    session = StreamingSession(bundle, policy=CTCCountPolicy(1, 1))
    session.save(tmp_path / "new.npz")
    session.push(speech(1.0))
    session.restore(tmp_path / "new.npz")
    assert_same(session.push(speech(2.0)) + session.finish(), translate(bundle, speech(2.0)))


def test_saved_sessions_that_do_not_fit(tmp_path):
    path = tmp_path / "saved.npz"
    session = StreamingSession(BUNDLES["mt"])
    session.push(speech(2.0))
    session.save(path)
    whole = path.read_bytes()
    cases = {
        "does not exist": (StreamingSession(BUNDLES["mt"]), None),
        "damaged": (StreamingSession(BUNDLES["mt"]), whole[: len(whole) // 2]),
        "not a npz archive": (StreamingSession(BUNDLES["mt"]), b"not an archive"),
        "made with model": (StreamingSession(BUNDLES["encoder"]), whole),
        "made with policy": (StreamingSession(BUNDLES["mt"], policy="sentence"), whole),
        "made with settings": (StreamingSession(BUNDLES["mt"], chunk_ms=640), whole),
        "made with segmenter": (StreamingSession(BUNDLES["mt"], segmenter="none"), whole),
    }
    for message, (other, contents) in cases.items():
        path.unlink(missing_ok=True)
        if contents is not None:
            path.write_bytes(contents)
        with pytest.raises(SessionError, match=message) as caught:
            other.restore(path)
        assert "\n" not in str(caught.value)
        other.push(speech(0.5))  # still usable
    np.savez(path, header=np.array([{"run": "me"}], dtype=object))
    with pytest.raises(SessionError, match="holds object, no numbers"):
        session.restore(path)


# ------------------------------------------------------------------------------------------------ many in a batch


@pytest.mark.parametrize("unit_input", BUNDLES)
def test_a_batch_gives_each_stream_what_it_gets_alone(unit_input):
    """Streams of different ages, lengths and paces; places are taken over by later streams."""
    bundle = BUNDLES[unit_input]
    rng = np.random.default_rng(1)
    recordings = [speech(float(rng.uniform(0.5, 4.0)), seed=9 + i) for i in range(5)]
    together = parity.translate_together(bundle, recordings, 3, rng, policy=CTCCountPolicy(1, 1))
    for events, samples in zip(together, recordings):
        assert_same(events, translate(bundle, samples))


@pytest.mark.parametrize("unit_input", BUNDLES)
def test_saved_streams_of_a_batch_go_on_in_another_as_if_nothing_had_been(unit_input, tmp_path):
    """All rows are saved in the middle of a sentence; one goes on alone, and one that was alone goes on in a batch."""
    bundle = BUNDLES[unit_input]
    recordings = [speech(seconds, seed=20 + i) for i, seconds in enumerate((3.0, 2.2, 2.6))]
    expected = [translate(bundle, samples) for samples in recordings]
    first, alone = SessionBatch(bundle, 3, CTCCountPolicy(1, 1)), StreamingSession(bundle, CTCCountPolicy(1, 1))
    numbers = [first.join(), first.join()]
    events = list(first.push({n: recordings[n][: 20_000 + 333 * n] for n in numbers}).values())
    events.append(alone.push(recordings[2][:17_000]))
    later = first.snapshot(0)
    first.push({0: speech(1.0, seed=3)})  # what comes after the snapshot is not in it
    later(tmp_path / "0.npz")
    first.save(1, tmp_path / "1.npz")
    alone.save(tmp_path / "2.npz")
    second = SessionBatch(bundle, 2, CTCCountPolicy(1, 1))
    second.push({second.join(): speech(0.9, seed=4)})
    second.leave(0)  # whose row is used again
    there = [second.restore(tmp_path / f"{n}.npz") for n in (2, 0)]
    assert there == [1, 2]
    alone.restore(tmp_path / "1.npz")
    rest = {1: recordings[2][17_000:], 2: recordings[0][20_000:]}
    for found in (second.push(rest), second.finish(1, 2)):
        events[2] += found[1]
        events[0] += found[2]
    events[1] += alone.push(recordings[1][20_333:]) + alone.finish()
    for found, wanted in zip(events, expected):
        assert_same(found, wanted)
    with pytest.raises(SessionError, match="places"):
        second.restore(tmp_path / "0.npz")
    (tmp_path / "0.npz").write_bytes(b"not an archive")
    second.leave(1)
    with pytest.raises(SessionError, match="not a npz archive"):
        second.restore(tmp_path / "0.npz")
    assert second.join() == 3  # the place is still free


def test_batch_refusals():
    batch = SessionBatch(BUNDLES["mt"], capacity=1)
    number = batch.join()
    with pytest.raises(SessionError, match="places"):
        batch.join()
    with pytest.raises(SessionError, match="no stream 7"):
        batch.push({7: speech(0.1)})
    with pytest.raises(AudioError, match="NaN"):
        batch.push({number: np.array([np.nan])})
    batch.finish(number)
    for call in (lambda: batch.finish(number), lambda: batch.push({number: speech(0.1)})):
        with pytest.raises(SessionError):
            call()
    with pytest.raises(ConfigError, match="capacity"):
        SessionBatch(BUNDLES["mt"], capacity=0)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_samples_leave_the_session_usable(bad):
    bundle, samples = BUNDLES["mt"], speech(2.0)
    session = StreamingSession(bundle, policy=CTCCountPolicy(1, 1))
    events = session.push(samples[:7000])
    broken = samples[7000:20000].copy()
    broken[100] = bad
    with pytest.raises(AudioError, match="NaN or infinite samples, the first at position 100") as caught:
        session.push(broken)
    assert "\n" not in str(caught.value)
    assert_same(events + session.push(samples[7000:]) + session.finish(), translate(bundle, samples))


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros((10, 2)), 16000, "mono"),
        (np.zeros(10, dtype=np.int32), 16000, "int32"),
        (np.zeros(10), 0, "sample rate"),
        (np.array(["a"]), 16000, "float32"),
    ],
    ids=["stereo", "int32", "rate", "text"],
)
def test_what_is_not_audio_is_refused(samples, rate, message):
    session = StreamingSession(BUNDLES["mt"])
    with pytest.raises(AudioError, match=message):
        session.push(samples, rate)
    session.push(speech(0.5))


def test_push_after_finish():
    session = StreamingSession(BUNDLES["mt"])
    session.push(speech(0.5))
    session.finish()
    for call in (lambda: session.push(speech(0.1)), session.finish):
        with pytest.raises(SessionError, match="reset"):
            call()


@pytest.mark.parametrize("length", [0, 1, 399, 400, 1000])
def test_very_short_streams(length):
    session = StreamingSession(BUNDLES["mt"])
    session.push(np.zeros(0, dtype=np.float32))
    session.push(speech(1.0)[:length])
    session.push(np.zeros(0, dtype=np.float32), 8000)
    session.finish()


@pytest.mark.parametrize(
    "samples",
    [np.zeros(48000, np.float32), np.full(48000, 0.7, np.float32), np.clip(40 * speech(3.0), -1, 1)],
    ids=["silence", "dc", "clipped"],
)
def test_odd_sounds_are_as_deterministic(samples):
    rng = np.random.default_rng(0)
    for rate in (16000, 44100):
        reference = translate(BUNDLES["mt"], samples, rate=rate)
        assert_same(translate(BUNDLES["mt"], samples, cut(len(samples), rng, 5000), rate), reference)
        for event in of(Waveform, reference):
            assert np.isfinite(event.samples).all()


def test_the_rate_may_change_midway():
    """The second half at 48 kHz: decisions stay on the clock, and what is heard is what a resampled stream gives."""
    bundle = BUNDLES["mt"]
    first, second = speech(1.5, 16000), speech(1.7, 48000, seed=6)
    session = StreamingSession(bundle, policy=CTCCountPolicy(1, 1))
    events = session.push(first, 16000) + session.push(second, 48000)
    assert session.source_time_s == pytest.approx(3.2)
    events += session.finish()
    joined = np.concatenate([first, Resampler(48000, 16000).resample(second)])
    reference = of(SentenceEnd, translate(bundle, joined))
    # Up to the resampler's look-ahead at the decisions both hear the same, so that whole sentences agree.
    assert [e.source_text for e in of(SentenceEnd, events)] == [e.source_text for e in reference]
    split = StreamingSession(bundle, policy=CTCCountPolicy(1, 1))
    again = split.push(first[:9999]) + split.push(first[9999:]) + split.push(second[:5], 48000)
    assert_same(again + split.push(second[5:], 48000) + split.finish(), events)


@settings(max_examples=10, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from([8000, 16000, 44100]), st.floats(0.0, 0.7), st.sampled_from([None, np.nan, np.inf])),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**16),
)
def test_changes_of_rate_and_refused_pushes_leave_no_trace(parts, seed):
    """Parts at their own rates, pushed whole; or in pieces, among pushes of nothing and of what must be refused."""
    rng = np.random.default_rng(seed)
    whole, pieces = (StreamingSession(BUNDLES["mt"], policy=CTCCountPolicy(1, 1)) for _ in range(2))
    expected, events = [], []
    for rate, seconds, bad in parts:
        samples, at = speech(seconds, rate, seed), 0
        expected += whole.push(samples, rate)
        for size in cut(len(samples), rng, 5000):
            events += pieces.push(samples[:0], 22050)
            if bad is not None:
                with pytest.raises(AudioError, match="NaN or infinite"):
                    pieces.push(np.array([0.1, bad]), 48000)
            events += pieces.push(samples[at : at + size], rate)
            at += size
    assert_same(events + pieces.finish(), expected + whole.finish())
    assert pieces.source_time_s == whole.source_time_s
    with pytest.raises(SessionError, match="reset"):
        pieces.push(speech(0.1))


def test_int16_samples():
    bundle = BUNDLES["mt"]
    samples = np.round(speech(2.0) * 32768).astype(np.int16)
    assert_same(translate(bundle, samples), translate(bundle, samples.astype(np.float32) / 32768))


@settings(max_examples=12, deadline=None)
@given(
    rate=st.sampled_from([8000, 11025, 16000, 22050, 48000]),
    chunk_ms=st.sampled_from([40, 160, 333, 960]),
    kind=st.sampled_from(["speech", "silence", "dc", "clipped", "noise"]),
    seconds=st.floats(0.0, 1.5),
    seed=st.integers(0, 2**16),
)
def test_whatever_is_heard_however_it_is_cut(rate, chunk_ms, kind, seconds, seed):
    rng = np.random.default_rng(seed)
    count = int(seconds * rate)
    samples = {
        "speech": lambda: speech(seconds, rate, seed),
        "silence": lambda: np.zeros(count, np.float32),
        "dc": lambda: np.full(count, rng.uniform(-1, 1), np.float32),
        "clipped": lambda: np.clip(30 * speech(seconds, rate, seed), -1, 1),
        "noise": lambda: rng.uniform(-1, 1, count).astype(np.float32),
    }[kind]()
    whole = translate(BUNDLES["mt"], samples, rate=rate, chunk_ms=chunk_ms)
    cuts = cut(len(samples), rng, int(rng.integers(1, rate)))[:400]
    cuts.append(len(samples))
    assert_same(translate(BUNDLES["mt"], samples, cuts, rate, chunk_ms=chunk_ms), whole)
    for event in of(Waveform, whole):
        assert len(event.samples) and np.abs(event.samples).max() <= 1


def test_a_loaded_checkpoint_directory_streams(tiny_bundle):
    session = StreamingSession(load_bundle(tiny_bundle))
    assert session.settings.chunk_ms == 320
    samples = speech(2.0)
    events = session.push(samples) + session.finish()
    session.reset()
    assert_same([e for part in np.split(samples, 4) for e in session.push(part)] + session.finish(), events)


def test_policies_and_events_need_no_torch():
    check = "import sys, echostream.streaming, echostream.streaming.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# ------------------------------------------------------------------------------------------- policies and knobs


def progress(source: int, target: int, written: int = 0, **changes) -> Progress:
    values = dict(
        frames=40,
        source_tokens=source,
        target_tokens=target,
        target_token_frames=tuple(3 * i for i in range(target)),
        written=written,
        units_read_text=True,
    )
    return Progress(**{**values, **changes})


def test_ctc_count_policy_counts():
    policy = CTCCountPolicy(lagging_k1=2, stride_n1=3, lagging_k2=1, stride_n2=2)
    memory = policy.initial()
    assert policy.text(progress(2, 9), memory) == (0, memory)  # the source has not grown by 3
    assert policy.text(progress(9, 2), memory) == (0, memory)
    allowed, memory = policy.text(progress(4, 8), memory)
    assert (allowed, memory) == (6, (4, 8))
    assert policy.text(progress(6, 20), memory) == (0, (4, 8))
    assert policy.text(progress(7, 11), memory) == (9, (7, 11))
    assert [policy.units(progress(9, 9, written=w)) for w in range(6)] == [0, 0, 0, 2, 2, 4]
    assert policy.units(progress(9, 6, units_read_text=False)) == 10  # 4 tokens; the fourth came at frame 9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CTCCountPolicy(lagging_k1=-1), "lagging_k1 is -1"),
        (lambda: CTCCountPolicy(stride_n1=0), "stride_n1 is 0"),
        (lambda: make_policy("wish"), "unknown policy 'wish'"),
        (lambda: make_policy("sentence", stride_n1=1), "no knob 'stride_n1'"),
        (lambda: StreamingSession(BUNDLES["mt"], segmenter="guess"), "unknown segmenter"),
        (lambda: StreamingSession(BUNDLES["mt"], chunk_ms=0), "chunk_ms is 0"),
        (lambda: StreamingSession(BUNDLES["mt"], chunk=320), "unknown setting 'chunk'"),
        (lambda: StreamingSession(BUNDLES["mt"], max_sentence_frames=3), "max_sentence_frames is 3"),
    ],
)
def test_settings_are_checked(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("tokens", "repeated"),
    [([5] * 8, 0), ([5] * 9, 8), ([4, 5] * 5, 8), ([1, 2, 3] * 3, 6), ([1, 2, 3] * 2, 0), (list(range(40)), 0)],
)
def test_loops_are_noticed(tokens, repeated):
    assert loop_length(tokens) == repeated
