"""Benchmarks: a session of forced output says what the script says and costs the same at any age; encoders take turns
and are held to agree; all of it becomes a page. Figures themselves are not tested."""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from echostream.benchmarks import encoder, operations, report, scripted, stream
from echostream.benchmarks.common import exported
from echostream.benchmarks.recompute import ConformerLayer, RecomputingEncoder, relative_positions
from echostream.compat import import_torchaudio
from echostream.config import EchoStreamConfig
from echostream.errors import EchoStreamError, MissingExtraError
from echostream.models.decoders.vocoder_layers import convolve, pack
from echostream.streaming import SentenceEnd, SessionBatch, SourceText, StreamingSession
from echostream.streaming.backends import backend_of
from tests.conftest import NUM_UNITS, tiny_config, tiny_voice

SIZES = {
    "mt": dict(unit_decoder_input="mt", ctc_upsample_ratio=25),
    "mt-tokens": dict(unit_decoder_input="mt-tokens", ctc_upsample_ratio=25),
    "encoder": dict(unit_decoder_input="encoder"),
}
CHUNKS = 8  # a sentence: 2.56 s; two of them fill all that a session remembers


def make(unit_input: str):
    config = tiny_config(num_units=NUM_UNITS, **SIZES[unit_input])
    script = scripted.Script.write(config, 2.5)
    return scripted.random_bundle(config, tiny_voice()), script, partial(scripted.ScriptedStages, script=script)


@pytest.mark.parametrize("unit_input", SIZES)
def test_the_session_says_what_the_script_says(unit_input):
    bundle, script, backend = make(unit_input)
    session, sound = StreamingSession(bundle, backend=backend, speech_gate=False), stream.Sound()
    events = [event for i in range(4 * CHUNKS + 1) for event in session.push(sound.chunk(i))]
    ends = [event for event in events if isinstance(event, SentenceEnd)]
    heard = [token for event in events if isinstance(event, SourceText) for token in event.tokens]
    assert script.frames == 64 and len(script.tokens) == 8 == round(2.56 * scripted.SUBWORDS_PER_SECOND)
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
        session = StreamingSession(bundle, backend=backend, speech_gate=False)
        report, marks = stream.feed(session, watch, {3 * CHUNKS: 7.68, 5 * CHUNKS: 12.8}, CHUNKS, tmp_path)
        assert [mark.chunk for mark in marks] == [3 * CHUNKS, 5 * CHUNKS] and report["sentences"] == 4
        sessions = [StreamingSession(bundle, backend=backend, speech_gate=False) for _ in marks]
        times = stream.take_turns(sessions, marks, CHUNKS, watch)
    early, late = (stream.count_operations(session, mark, CHUNKS, tmp_path / "count.npz") for mark in marks)
    assert early == late and min(early["flops"]) > 1e5
    assert all(len(set(early[name])) > 1 for name in ("state_bytes", "saved_bytes"))  # they follow the sentence
    for seconds in times:
        figures = stream.percentiles(stream.np.array(seconds))
        assert figures["chunks"] == CHUNKS and all(f["p95"] >= f["p50"] >= 0 for f in figures["ms"].values())
        assert figures["ms"]["encoder"]["p50"] > 0 and figures["ms"]["units"]["p50"] > 0


def test_sessions_of_different_ages_in_a_batch_follow_the_script():
    bundle, script, backend = make("mt")
    batch, sound, events = SessionBatch(bundle, capacity=2, backend=backend, speech_gate=False), stream.Sound(), {}
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
    with torch.inference_mode(), stream.FlopCounterMode(display=False, custom_mapping=operations.FLOPS) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
        torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), 1)
    assert counter.get_total_flops() == 2 * 2 * 4 * 8 * 100 * 64 + 2 * 8 * 28 * 16 * 3


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_packed_convolutions_are_counted():
    x, weight, residual = torch.randn(1, 30, 16).mT, torch.randn(8, 16, 3), torch.randn(1, 28, 8).mT
    packed = pack(weight)
    for bias, added in itertools.product((None, torch.randn(8)), (None, residual)):
        with torch.inference_mode(), stream.FlopCounterMode(display=False, custom_mapping=operations.FLOPS) as counter:
            convolve(x, weight, bias, packed=packed, residual=added)
        assert counter.get_total_flops() == 2 * 8 * 28 * 16 * 3


def test_an_exported_session_says_what_the_script_says(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    bundle, script, _ = make("mt")
    bundle = exported(bundle, tmp_path / "graphs", int8=True)
    backend = partial(scripted.ScriptedStages, script=script, backend=backend_of(bundle))
    with stream.clock_for("cpu") as clock:
        watch = stream.Stopwatch(bundle.model, clock)
        session, sound = StreamingSession(bundle, backend=backend, speech_gate=False), stream.Sound()
        pushed = [watch.push(session, sound.chunk(i)) for i in range(2 * CHUNKS + 1)]
    ends = [event for events, _ in pushed for event in events if isinstance(event, SentenceEnd)]
    assert [end.tokens for end in ends] == [script.tokens] * 2
    assert all(len(end.waveform) == len(end.units) * 2 * 320 for end in ends)
    took = dict(zip(stream.STAGES, sum(seconds for _, seconds in pushed)))
    assert min(took[stage] for stage in stream.STAGES[:-1]) > 0
    graphs = {name: path.stat().st_mtime_ns for name, path in files(tmp_path).items()}
    exported(make("mt")[0], tmp_path / "graphs", int8=True)
    assert graphs == {name: path.stat().st_mtime_ns for name, path in files(tmp_path).items()}  # written once


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("*.onnx")}


# ---------------------------------------------------------------------------------------------------- the encoder


def test_the_recomputing_encoder_has_streamspeechs_size_and_sees_its_own_chunk_and_the_past():
    with torch.device("meta"):
        whole = RecomputingEncoder(EchoStreamConfig(), chunk=8)
    assert sum(p.numel() for p in whole.parameters()) == pytest.approx(33.4e6, rel=0.01)
    torch.manual_seed(1)
    again = RecomputingEncoder(tiny_config(), chunk=8).eval()
    features = torch.randn(2, 96, 80)
    with torch.inference_mode():
        short, long = again(features[:, :64]), again(features)
        assert short.shape == (2, 16, 32) and long.shape == (2, 24, 32)
        torch.testing.assert_close(short, long[:, :16], atol=1e-5, rtol=0)
        features[:, 20:] += 1  # in the second half of the first chunk
        changed = (again(features) - long).abs().amax(dim=2) > 1e-5
    assert changed.all()


def test_relative_positions_shift_with_the_query():
    """A position bias alone, which prefers one distance: each query looks that far back."""
    torch.manual_seed(2)
    layer = ConformerLayer(16, 1, 32).eval()
    with torch.inference_mode():
        layer.qkv.weight[:16] = 0
        layer.qkv.bias[:16] = 0
        layer.position.weight.copy_(torch.eye(16))
        layer.position_bias.copy_(1e3 * relative_positions(10, 16)[9 - 2])  # the distance 2
        layer.out.weight.copy_(torch.eye(16))
        layer.out.bias.zero_()
        x = torch.randn(1, 10, 16)
        found = layer._attend(x, relative_positions(10, 16), torch.zeros(10, 10))
        torch.testing.assert_close(found[:, 2:], layer.qkv(x)[:, :8, 32:], atol=1e-4, rtol=0)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    encoder.add_arguments(parser)
    return parser.parse_args([*arguments, "--clock", "cpu"])


def test_encoders_take_turns_and_the_page_says_what_came_out(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("matplotlib")
    compat_torchaudio()
    args = options("--batch", "1", "2", "--segments", "3", "--batch-segments", "4", "--elapsed", "0.8", "1.6")
    figures = encoder.measure(tiny_config(), args)
    one, two = figures["batches"]
    contenders = {encoder.EAGER, encoder.SCRIPTED, encoder.SCRIPTED_INT8, encoder.OURS, encoder.FP32, encoder.INT8}
    assert one["ms"].keys() == two["ms"].keys() == contenders
    assert (one["segments"], two["segments"]) == (9 + encoder.WINDOW, 4)
    assert [mark["seconds"] for mark in figures["elapsed"]] == pytest.approx([0.8, 1.6])
    assert all(mark["ms"].keys() == contenders | {encoder.RECOMPUTE} for mark in figures["elapsed"])
    for batch in figures["batches"]:
        assert batch["differences"][encoder.FP32] < 1e-4 < batch["differences"][encoder.INT8]
    encoder.show(figures)
    written = report.gather(argparse.Namespace(report=tmp_path / "page.md"), [{"command": "encoder", **figures}])
    picture, text = (tmp_path / "page.svg"), (tmp_path / "page.md").read_text()
    assert written["written"] == [str(tmp_path / "page.md"), str(picture)]
    assert picture.stat().st_size < 100_000 and encoder.RECOMPUTE in picture.read_text()
    assert f"{one['ms'][encoder.INT8]['p50']:.2f} / " in text and "(page.svg)" in text


def compat_torchaudio() -> None:
    try:
        import_torchaudio()
    except MissingExtraError:
        pytest.skip("torchaudio is not installed")


def test_a_pass_over_the_history_is_timed_when_its_time_has_come():
    heard: list[int] = []

    def step(features):
        return features[:, ::4]

    steps = {encoder.OURS: step, encoder.FP32: step, encoder.INT8: lambda features: features[:, ::4] + 0.5}
    times, passes, differences = encoder.take_turns(
        tiny_config(), steps, lambda x: heard.append(x.shape[1]), 1, 12, [3, 6], iter(range(1000)).__next__
    )
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys(steps, 12)
    assert [len(found) for found in passes.values()] == [encoder.WINDOW] * 2 and set(heard) == {4 * 16, 7 * 16}
    assert all(found == 1 for found in [*times[encoder.OURS], *passes[3]])  # ticks between start and end
    assert differences[encoder.FP32] == 0 and 0 < differences[encoder.INT8] <= 0.5


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_a_wrong_export_is_not_measured(difference):
    with pytest.raises(EchoStreamError, match="differs from torch by"):
        encoder.check({encoder.FP32: difference, encoder.INT8: 0.0})
    encoder.check({encoder.FP32: 1e-6, encoder.INT8: 0.1})


# ---------------------------------------------------------------------------------------------------- all of it


def test_all_runs_every_benchmark_with_its_own_options(tmp_path):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    few = ["--small", "--minutes", "1", "--clock", "cpu", "--only", "encoder", "stream"]
    commands = report.plan(parser.parse_args(few))
    assert [command[0] for command in commands] == ["encoder", "stream", "stream", "stream"]
    for (name, *rest), module in zip(commands, (encoder, stream, stream, stream)):
        of = argparse.ArgumentParser()
        module.add_arguments(of)
        args = of.parse_args(rest)
        assert args.small and args.clock == "cpu", name
    with pytest.raises(EchoStreamError, match="page.txt must end in .md"):
        report.plan(parser.parse_args(["--report", str(tmp_path / "page.txt")]))
