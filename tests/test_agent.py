"""The SimulEval agent with a tiny untrained model: the plumbing, not the quality."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("simuleval")

from simuleval.data.segments import SpeechSegment  # noqa: E402
from simuleval.utils.agent import EVALUATION_SYSTEM_LIST  # noqa: E402

from agent.echostream_agent import EchoStreamAgent  # noqa: E402
from echostream.audio.io import read_audio, write_audio  # noqa: E402

EVALUATION_SYSTEM_LIST.clear()  # importing the agent announced it to SimulEval
ROOT = Path(__file__).resolve().parents[1]


def speech(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """Noise with a syllable-like rhythm, float32 [N]."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.1, len(time))
    return (noise * (1 + np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def make_agent(bundle: Path, *options: str) -> EchoStreamAgent:
    parser = ArgumentParser()
    parser.add_argument("--device", default="cpu")
    EchoStreamAgent.add_args(parser)
    return EchoStreamAgent.from_args(parser.parse_args(["--checkpoint-dir", str(bundle), *options]))


def translate(agent: EchoStreamAgent, samples: np.ndarray, rate: int, segment_ms: int) -> list:
    """All segments that come back, the agent being reset as SimulEval does it."""
    step = segment_ms * rate // 1000
    out = []
    for start in range(0, len(samples), step):
        finished = start + step >= len(samples)
        part = samples[start : start + step]
        out.append(agent.pushpop(SpeechSegment(content=part, sample_rate=rate, finished=finished, tgt_lang=None)))
        assert out[-1].finished == finished
    agent.reset()
    return out


def summary(segments: list) -> tuple[str, np.ndarray]:
    samples = [np.asarray(s.content, dtype=np.float32) for s in segments if not s.is_empty]
    text = "".join(piece for s in segments for piece in s.config.get("pieces", []))
    return text, np.concatenate([np.zeros(0, np.float32), *samples])


@pytest.fixture(scope="module")
def agent(tiny_bundle: Path) -> EchoStreamAgent:
    return make_agent(tiny_bundle)


def test_sentences_do_not_touch_each_other(agent: EchoStreamAgent) -> None:
    first, second = speech(1.5, 16000, seed=1), speech(1.1, 16000, seed=2)
    text, samples = summary(translate(agent, first, 16000, 40))
    translate(agent, second, 16000, 40)
    again, repeated = summary(translate(agent, first, 16000, 40))
    assert text == again and text.strip()
    np.testing.assert_allclose(samples, repeated, atol=1e-6)
    assert len(samples) > 0 and np.abs(samples).max() <= 1


def test_decisions_do_not_depend_on_the_segment_size(agent: EchoStreamAgent) -> None:
    samples = speech(1.7, 16000)
    (text, sound), (other, heard) = (summary(translate(agent, samples, 16000, ms)) for ms in (20, 320))
    assert text == other
    np.testing.assert_allclose(sound, heard, atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_any_sample_rate(agent: EchoStreamAgent, rate: int) -> None:
    text, _ = summary(translate(agent, speech(1.0, rate), rate, 100))
    assert text


def test_source_is_not_kept(agent: EchoStreamAgent) -> None:
    for _ in range(30):
        segment = SpeechSegment(content=speech(0.1, 16000), sample_rate=16000, finished=False, tgt_lang=None)
        agent.pushpop(segment)
    assert agent.states.source == [] and agent.states.target == []
    assert agent.states.pushed.nbytes == 0
    agent.reset()


def test_segments_can_be_sent_over_the_wire(agent: EchoStreamAgent) -> None:
    for segment in translate(agent, speech(1.0, 16000), 16000, 320):
        if not segment.is_empty:
            segment.content = segment.content.tolist()
        json.loads(segment.json())


def test_knobs_come_from_checkpoint_and_command_line(tiny_bundle: Path) -> None:
    assert make_agent(tiny_bundle).options["chunk_ms"] == 320
    options = make_agent(
        tiny_bundle, "--chunk-ms", "640", "--lagging-k1", "3", "--stride-n2", "2", "--segmenter", "none"
    ).options
    assert options["chunk_ms"] == 640 and options["segmenter"] == "none"
    assert (options["policy"].lagging_k1, options["policy"].stride_n2) == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--checkpoint-dir", "/no/such"], "/no/such does not exist", id="no-checkpoint"),
        pytest.param(["--stride-n1", "0"], "stride_n1 is 0", id="bad-knob"),
        pytest.param(["--threads", "0"], "--threads is 0", id="no-thread"),
        pytest.param(["--chunk-ms", "-5"], "chunk_ms", id="bad-chunk"),
        pytest.param(["--device", "abacus"], "abacus", id="bad-device"),
    ],
)
def test_mistakes_are_one_line(tiny_bundle: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as caught:
        make_agent(tiny_bundle, *options)
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)


def simuleval(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "simuleval.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_command_line_and_score_only(tiny_bundle: Path, tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", speech(1.3, 8000), 8000)
    write_audio(tmp_path / "b.flac", speech(0.9, 44100), 44100)
    (tmp_path / "source.txt").write_text(f"{tmp_path / 'a.wav'}\n{tmp_path / 'b.flac'}\n")
    (tmp_path / "target.txt").write_text("The house is big.\nHello, my friend.\n")
    metrics = ["--quality-metrics", "BLEU", "--latency-metrics", "AL", "EndOffset"]
    out = tmp_path / "out"
    done = simuleval(
        "--agent", "agent/echostream_agent.py", "--checkpoint-dir", tiny_bundle, "--source", tmp_path / "source.txt",
        "--target", tmp_path / "target.txt", "--output", out, "--computation-aware", *metrics,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "instances.log").read_text().splitlines()]
    assert [line["source_length"] for line in lines] == [1300.0, 900.0]
    for line in lines:
        assert line["words"] and "".join(line["text"].split()) == "".join(word["text"] for word in line["words"])
        assert all(word["delay"] <= line["source_length"] for word in line["words"])
        samples, rate = read_audio(line["prediction"])
        assert rate == 16000 and 1000 * len(samples) / rate == pytest.approx(line["prediction_length"])
    scored = simuleval("--user-dir", "agent", "--score-only", "--output", out, "--computation-aware", *metrics)
    assert scored.returncode == 0, scored.stderr
    # The same table as at the end of the run.
    assert scored.stdout.split()[-5:] == done.stdout.split()[-5:]


def test_command_line_mistakes(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "source.txt").write_text(f"{tmp_path / 'text.wav'}\n")
    (tmp_path / "target.txt").write_text("x\n")
    done = simuleval(
        "--agent", "agent/echostream_agent.py", "--checkpoint-dir", tiny_bundle, "--output", tmp_path / "out",
        "--source", tmp_path / "source.txt", "--target", tmp_path / "target.txt",
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'text.wav'}")
