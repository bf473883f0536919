"""The streaming benchmark: a session of forced output says what the script says, and costs the same at any age."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from echostream.benchmarks import stream
from echostream.streaming import SentenceEnd, SessionBatch, SourceText, StreamingSession
from tests.conftest import NUM_UNITS, tiny_config, tiny_voice

SIZES = {"mt": dict(unit_decoder_input="mt", ctc_upsample_ratio=25), "encoder": dict(unit_decoder_input="encoder")}
CHUNKS = 8  # a sentence: 2.56 s; two of them fill all that a session remembers


def make(unit_input: str):
    config = tiny_config(num_units=NUM_UNITS, **SIZES[unit_input])
    script = stream.Script.write(config, 2.5)
    return stream.random_bundle(config, tiny_voice()), script, partial(stream.ScriptedStages, script=script)


@pytest.mark.parametrize("unit_input", SIZES)
def test_the_session_says_what_the_script_says(unit_input):
    bundle, script, backend = make(unit_input)
    session, sound = StreamingSession(bundle, backend=backend), stream.Sound()
    events = [event for i in range(4 * CHUNKS + 1) for event in session.push(sound.chunk(i))]
    ends = [event for event in events if isinstance(event, SentenceEnd)]
    heard = [token for event in events if isinstance(event, SourceText) for token in event.tokens]
    assert script.frames == 64 and len(script.tokens) == 8 == round(2.56 * stream.SUBWORDS_PER_SECOND)
    assert [end.tokens for end in ends] == [script.tokens] * 4 and heard[:32] == [*script.tokens] * 4
    assert {end.reason for end in ends} == {"punctuation"}
    for end in ends:
        assert len(set(end.frames)) > 2  # written while it was heard
        assert len(end.units) == pytest.approx(8 * 8, rel=0.15)  # </s>, or the frames behind the mark, sound too
        assert len(end.waveform) == len(end.units) * 2 * 320


@pytest.mark.parametrize("unit_input", SIZES)
def test_every_sentence_costs_the_same(unit_input, tmp_path):
    bundle, _, backend = make(unit_input)
    with stream.clock_for("cpu") as clock:
        watch = stream.Stopwatch(bundle.model, clock)
        session = StreamingSession(bundle, backend=backend)
        report, marks = stream.feed(session, watch, {3 * CHUNKS: 7.68, 5 * CHUNKS: 12.8}, CHUNKS, tmp_path)
        assert [mark.chunk for mark in marks] == [3 * CHUNKS, 5 * CHUNKS] and report["sentences"] == 4
        sessions = [StreamingSession(bundle, backend=backend) for _ in marks]
        times = stream.take_turns(sessions, marks, CHUNKS, watch)
    early, late = (stream.count_operations(session, mark, CHUNKS, tmp_path / "count.npz") for mark in marks)
    assert early == late and min(early["flops"]) > 1e5 and len(set(early["state_bytes"])) == 1
    assert len(set(early["saved_bytes"])) > 1  # what is in use follows the sentence
    for seconds in times:
        figures = stream.percentiles(stream.np.array(seconds))
        assert figures["chunks"] == CHUNKS and all(f["p95"] >= f["p50"] >= 0 for f in figures["ms"].values())
        assert figures["ms"]["encoder"]["p50"] > 0 and figures["ms"]["units"]["p50"] > 0


def test_sessions_of_different_ages_in_a_batch_follow_the_script():
    bundle, script, backend = make("mt")
    batch, sound, events = SessionBatch(bundle, capacity=2, backend=backend), stream.Sound(), {}
    ages = {batch.join(): 0}
    for i in range(2 * CHUNKS + 2):
        if i == 3:
            ages[batch.join()] = 0
        for number, found in batch.push({number: sound.chunk(age) for number, age in ages.items()}).items():
            events.setdefault(number, []).extend(found)
        ages = {number: age + 1 for number, age in ages.items()}
    for found in events.values():
        ends = [event for event in found if isinstance(event, SentenceEnd)]
        assert ends and all(end.tokens == script.tokens for end in ends)


def test_attention_and_convolutions_are_counted():
    q, k = torch.randn(1, 4, 8, 64), torch.randn(1, 4, 100, 64)
    x, weight = torch.randn(1, 16, 1, 30), torch.randn(8, 16, 1, 3)
    with torch.inference_mode(), stream.FlopCounterMode(display=False, custom_mapping=stream.FLOPS) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
        torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), 1)
    assert counter.get_total_flops() == 2 * 2 * 4 * 8 * 100 * 64 + 2 * 8 * 28 * 16 * 3
