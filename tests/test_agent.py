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

from simuleval.data.segments import SpeechSegment
from simuleval.utils.agent import EVALUATION_SYSTEM_LIST

import echostream.agent
from agent import echostream_agent as agents
from agent.echostream_agent import EchoStreamAgent
from echostream.agent.pieces import OUTPUTS
from echostream.audio.io import read_audio, write_audio
from echostream.checkpoint import load_bundle, save_bundle
from echostream.data.manifest import Utterance, write_manifest
from echostream.errors import ConfigError
from echostream.evaluation.quality import word_error_rate
from echostream.streaming import SentenceEnd, SourceText, StreamingSession, TargetText
from tests.evaluate_script import evaluate

ROOT = Path(__file__).resolve().parents[1]


def speech(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """Noise with a syllable-like rhythm, float32 [N]."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.1, len(time))
    return (noise * (1 + np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def make_agent(bundle: Path, *options: str, kind: type = EchoStreamAgent) -> agents.SessionAgent:
    parser = ArgumentParser()
    parser.add_argument("--device", default="cpu")
    kind.add_args(parser)
    return kind.from_args(parser.parse_args(["--checkpoint-dir", str(bundle), *options]))


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
    samples = [np.asarray(s.content, dtype=np.float32) for s in segments if s.data_type == "speech"]
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
    assert make_agent(tiny_bundle).states.session.settings.chunk_ms == 320
    options = ["--chunk-ms", "640", "--lagging-k1", "3", "--stride-n2", "2", "--segmenter", "none", "--beam", "4"]
    engine = make_agent(tiny_bundle, *options).states.session.engine
    assert (engine.settings.chunk_ms, engine.settings.beam, engine.segmenter.name) == (640, 4, "none")
    assert (engine.policy.lagging_k1, engine.policy.stride_n2) == (3, 2)


@pytest.mark.parametrize("policy", ["ctc", "wait-k", "local-agreement", "alignatt", "sentence"])
def test_every_policy(tiny_bundle: Path, policy: str) -> None:
    """What the agent gives out is what the session writes, whatever the policy."""
    samples = speech(1.3, 16000)
    text, _ = summary(translate(make_agent(tiny_bundle, "--policy", policy), samples, 16000, 40))
    session = StreamingSession(load_bundle(tiny_bundle), policy=policy)
    events = session.push(samples) + session.finish()
    assert text.split() == " ".join(e.text for e in events if isinstance(e, SentenceEnd)).split()


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        (agents.EchoStreamSpeechAgent, "speech"),
        (agents.EchoStreamTextAgent, "text"),
        (agents.EchoStreamSourceAgent, "source"),
        (agents.EchoStreamBothAgent, "both"),
    ],
)
def test_agents_of_all_kinds(tiny_bundle: Path, kind: type, output: str) -> None:
    samples = speech(1.5, 16000)
    segments = translate(make_agent(tiny_bundle, kind=kind), samples, 16000, 320)
    same = translate(make_agent(tiny_bundle, "--output-type", output), samples, 16000, 320)
    text, sound = summary(segments)
    assert text == summary(same)[0] and text.strip()
    assert (len(sound) > 0) == (output in ("speech", "both"))
    session = StreamingSession(load_bundle(tiny_bundle))
    events = session.push(samples) + session.finish()
    ends = [e for e in events if isinstance(e, SentenceEnd)]
    expected = " ".join(e.source_text if output == "source" else e.text for e in ends)
    assert text.split() == expected.split()
    ahead = [segment.config.get("written", []) for segment in segments]
    if output == "both":
        # Text is out with the decision that writes it, speech or no speech.
        assert "".join(sum(ahead, [])).split() == text.split()
        first = next(e.source_time_s for e in events if isinstance(e, TargetText))
        assert next(i for i, pieces in enumerate(ahead) if pieces) == max(0, int(np.ceil(first / 0.32)) - 1)
    else:
        assert not any(ahead)


def asked(session: StreamingSession, monkeypatch: pytest.MonkeyPatch, samples: np.ndarray) -> set[str]:
    """Which kinds of work the session has its model do."""
    kinds: set[str] = set()
    run = session._core.stages.run

    def watched(requests: list) -> list:
        kinds.update(type(request).__name__ for _, request in requests)
        return run(requests)

    monkeypatch.setattr(session._core.stages, "run", watched)
    session.push(samples)
    session.finish()
    return kinds


@pytest.mark.parametrize(
    ("output", "spared"),
    [
        ("both", set()),
        ("text", {"ReadUnits", "Vocode"}),
        ("source", {"ReadUnits", "Vocode", "Extend", "Write", "Rewind"}),
    ],
)
def test_what_is_not_wanted_is_not_computed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, output: str, spared: set[str]
) -> None:
    session = StreamingSession(load_bundle(tiny_bundle), **OUTPUTS[output])
    kinds = asked(session, monkeypatch, speech(1.5, 16000))
    every = {"Encode", "NewSentence", "Extend", "Write", "ReadUnits", "Vocode"}
    assert kinds - {"Rewind"} == every - spared and (spared or session.nbytes > 0)
    if output == "text":
        assert session.nbytes < StreamingSession(load_bundle(tiny_bundle)).nbytes


def test_speech_needs_text(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="speech is made from text"):
        StreamingSession(load_bundle(tiny_bundle), text=False)


def test_a_transcript_does_not_wait_for_the_translation(tiny_bundle: Path) -> None:
    """The same source text, never later than beside a translation."""
    bundle, samples = load_bundle(tiny_bundle), speech(2.0, 16000, seed=3)
    times = []
    for wanted in ({}, {"speech": False, "text": False}):
        session = StreamingSession(bundle, segmenter="none", **wanted)
        events = session.push(samples) + session.finish()
        told = [(token, e.source_time_s) for e in events if isinstance(e, SourceText) for token in e.tokens]
        times.append(told)
        if wanted:
            assert not any(isinstance(e, TargetText) for e in events)
    assert [token for token, _ in times[0]] == [token for token, _ in times[1]] and times[0]
    assert all(alone <= beside for (_, beside), (_, alone) in zip(*times))


def test_a_model_without_a_voice_still_writes(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    quiet = {"speech_gate": False}  # nobody speaks in what the tests make
    mute = save_bundle(tmp_path / "mute", bundle.model.state_dict(), bundle.config, tiny_data, policy=quiet)
    with pytest.raises(SystemExit, match="no vocoder.*--output-type text"):
        make_agent(mute)
    assert summary(translate(make_agent(mute, "--output-type", "text"), speech(1.0, 16000), 16000, 320))[0].strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--checkpoint-dir", "/no/such"], "/no/such does not exist", id="no-checkpoint"),
        pytest.param(["--stride-n1", "0"], "stride_n1 is 0", id="bad-knob"),
        pytest.param(["--policy", "wait-k", "--stride-n1", "2"], "--stride-n1 is no knob", id="another-policys-knob"),
        pytest.param(["--segmenter", "breath"], "breath", id="bad-segmenter"),
        pytest.param(["--threads", "0"], "--threads is 0", id="no-thread"),
        pytest.param(["--chunk-ms", "-5"], "chunk_ms", id="bad-chunk"),
        pytest.param(["--device", "abacus"], "abacus", id="bad-device"),
    ],
)
def test_mistakes_are_one_line(tiny_bundle: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as caught:
        make_agent(tiny_bundle, *options)
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)


def simuleval(*arguments: object, module: str = "simuleval.cli", cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def two_recordings(folder: Path) -> list[object]:
    write_audio(folder / "a.wav", speech(1.3, 8000), 8000)
    write_audio(folder / "b.flac", speech(0.9, 44100), 44100)
    (folder / "source.txt").write_text(f"{folder / 'a.wav'}\n{folder / 'b.flac'}\n")
    (folder / "target.txt").write_text("The house is big.\nHello, my friend.\n")
    return ["--source", folder / "source.txt", "--target", folder / "target.txt"]


@pytest.mark.parametrize(
    ("output", "chosen", "quality"),
    [
        pytest.param("text", ["--output-type", "text", "--policy", "alignatt"], "BLEU", id="text"),
        pytest.param("source", ["--agent-class", "echostream.agent.EchoStreamSourceAgent"], "WER", id="source"),
        pytest.param("both", ["--output-type", "both", "--user-dir", "agent"], "BLEU", id="both"),
    ],
)
def test_other_outputs_through_simuleval(
    tiny_bundle: Path, tmp_path: Path, output: str, chosen: list[str], quality: str
) -> None:
    lists = two_recordings(tmp_path)
    latencies = ["AL", "LAAL", "StartOffset", "EndOffset"]
    if output == "both":
        latencies += ["AL_TEXT", "LAAL_TEXT", "StartOffset_TEXT"]
    agent = [] if "--agent-class" in chosen else ["--agent", "agent/echostream_agent.py"]
    metrics = ["--quality-metrics", quality, "--latency-metrics", *latencies, "--computation-aware"]
    out = tmp_path / "out"
    # A class needs no file of the checkout.
    there = ROOT if agent else tmp_path
    done = simuleval(*agent, *chosen, "--checkpoint-dir", tiny_bundle, *lists, "--output", out, *metrics, cwd=there)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "instances.log").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert [word["text"] for word in line["words"]] == line["text"].split() and line["words"]
        if output == "both":
            assert [word["text"] for word in line["written"]] == line["text"].split()
            assert all(w["delay"] <= s["delay"] for w, s in zip(line["written"], line["words"]))
            assert Path(line["prediction"]).exists()
        else:
            # SimulEval's own form of a text log, which other tools read.
            assert line["prediction"] == line["text"] and len(line["delays"]) == len(line["elapsed"])
            assert len(line["delays"]) == len(line["prediction"].split()) and not (out / "wavs").exists()
        if output == "source":
            assert line["prediction"].split() == line["source_text"].split()
    scores = dict(zip(*(row.split("\t") for row in (out / "scores.tsv").read_text().splitlines()), strict=True))
    assert set(scores) == {quality, *latencies, *(f"{name}_CA" for name in latencies)}
    assert float(scores["StartOffset"]) <= 1300
    again = ["--quality-metrics", quality, "--latency-metrics", latencies[-1]]
    scored = simuleval("--score-only", "--output", out, *again, module="echostream.agent", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert [float(v) for v in scored.stdout.split()[-2:]] == [float(scores[n]) for n in (quality, latencies[-1])]


def test_evaluate_simul_takes_transcripts_from_the_manifest(tiny_bundle: Path, tmp_path: Path) -> None:
    """Two processes, whose logs of text are joined; references are the manifest's source texts."""
    rows = []
    for i, text in enumerate(["Hola, amigo.", "La casa es grande."]):
        write_audio(tmp_path / f"{i}.wav", speech(1.0, 16000, seed=i))
        rows.append(Utterance(f"u{i}", f"{i}.wav", 98, text, "x", np.array([1], np.int16)))
    write_manifest(tmp_path / "test.tsv", rows)
    out = tmp_path / "out"
    done = evaluate(
        "simul", "--manifest", tmp_path / "test.tsv", "--output-type", "source", "--policy", "wait-k", "--wait-k", 2,
        "--chunk-ms", 320, "--jobs", 2, "--checkpoint-dir", tiny_bundle, "--output", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "chunk320" / "instances.log").read_text().splitlines()]
    assert [(line["index"], line["reference"]) for line in lines] == [(i, row.src_text) for i, row in enumerate(rows)]
    figures = json.loads((out / "results.json").read_text())["chunks"]["320"]
    assert figures["WER"] == pytest.approx(
        word_error_rate([line["text"] for line in lines], [row.src_text for row in rows], numbers=False)
    )
    assert "BLEU" not in figures and f"{figures['WER']:.2f}" in done.stdout


@pytest.mark.parametrize("where", ["echostream.agent", "agent.echostream_agent"])
def test_simuleval_finds_agents_by_their_classes(
    where: str, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    """Of the package, without ``--user-dir``; of the checkout's file; and ``--agent`` with ``--agent-class``."""
    from simuleval.utils.agent import get_agent_class

    monkeypatch.chdir(ROOT)
    for name in echostream.agent.AGENTS:
        for more in ([], ["--agent", "agent/echostream_agent.py"]):
            monkeypatch.setattr("sys.argv", ["simuleval", "--agent-class", f"{where}.{name}", *more])
            EVALUATION_SYSTEM_LIST.clear()
            assert get_agent_class() is getattr(agents, name)
    monkeypatch.setattr("sys.argv", ["simuleval", "--agent", "agent/echostream_agent.py"])
    EVALUATION_SYSTEM_LIST.clear()
    assert get_agent_class() is EchoStreamAgent
    EVALUATION_SYSTEM_LIST.clear()
    with pytest.raises(AttributeError, match="EchoStreamBus"):
        echostream.agent.EchoStreamBus


def test_command_line_and_score_only(tiny_bundle: Path, tmp_path: Path) -> None:
    lists = two_recordings(tmp_path)
    metrics = ["--quality-metrics", "BLEU", "--latency-metrics", "AL", "EndOffset"]
    out = tmp_path / "out"
    done = simuleval(
        "--agent", "agent/echostream_agent.py", "--checkpoint-dir", tiny_bundle, *lists, "--output", out,
        "--computation-aware", *metrics,
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
