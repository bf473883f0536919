"""Quality-latency sweeps: grids, resuming, reports; and that a batch of sessions measures what SimulEval measures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sacrebleu")
pytest.importorskip("matplotlib")

from echostream.audio.io import load_audio, write_audio
from echostream.checkpoint import load_bundle
from echostream.errors import EchoStreamError
from echostream.evaluation import sweep
from echostream.evaluation.streams import Streamed, stream
from echostream.output.words import TimedWord, WordTimes
from echostream.streaming import SentenceEnd, StreamingSession, TargetText, Waveform, make_policy
from echostream.text import Vocabulary
from tests.evaluate_script import evaluate

ROOT = Path(__file__).resolve().parents[1]


def speech(seconds: float, seed: int) -> np.ndarray:
    """Noise with a syllable-like rhythm, float32 [N] at 16 kHz."""
    time = np.arange(round(seconds * 16000)) / 16000
    noise = np.random.default_rng(seed).normal(0, 0.1, len(time))
    return (noise * (1 + np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def test_plan_is_every_combination_of_the_knobs_a_policy_has() -> None:
    grid = sweep.parse_grid(["wait-k=1,7", "lagging_k2=0,3", "alignatt_frames=5"])
    points = sweep.plan(["wait-k", "alignatt", "sentence"], grid, [320, 640])
    wait_k = [p for p in points if p.policy == "wait-k"]
    assert {(dict(p.knobs)["wait_k"], dict(p.knobs)["lagging_k2"], p.chunk_ms) for p in wait_k} == {
        (k, lag, chunk) for k in (1, 7) for lag in (0, 3) for chunk in (320, 640)
    }
    assert len(points) == 8 + 4 + 2 and len({p.name for p in points}) == len(points)
    for point in sweep.plan(["ctc", "local-agreement"], sweep.GRID, [320]):
        make_policy(point.policy, **dict(point.knobs))


def test_words_may_be_waited_for_too() -> None:
    assert sweep.parse_grid(["wait_unit=ms,words"])["wait_unit"] == ("ms", "words")


def test_latency_of_speech_worked_by_hand() -> None:
    said = streamed([("one", 1.0), ("two", 2.0)], 2.0)
    said.spoken, silent = said.written, streamed([], 1.0)
    silent.spoken = silent.written
    said.waves = [
        Waveform(sentence=0, source_time_s=second, samples=np.zeros(samples, np.float32), sample_rate=1000)
        for second, samples in ((1.0, 1300), (2.0, 300))
    ]
    recogniser = SimpleNamespace(name="test", transcribe=lambda samples: "one two")
    figures = sweep.measure([said, silent], ["one two", "three"], recogniser)
    assert figures["EndOffset_speech"] == pytest.approx(600)  # 1300 ms from 1000 on, then 300 more: 2600 - 2000
    # Tokens end at 1300, 1600, 1900, 2200, 2300, 2600; those of the source, 1000 + 1000 ms, at 300, 600, 900, 1000,
    # 1300, ... The sixth is the fifth of the source: what was said was a token longer than what had been read.
    expected = (1000 + 1000 + 1000 + 1200 + 1300 + 1300) / 6
    assert figures["ATD_speech"] == pytest.approx(expected)


@pytest.mark.parametrize("text", ["speed=1", "wait_k", "wait_k=two", "wait_k="])
def test_bad_grids(text: str) -> None:
    with pytest.raises(EchoStreamError, match="grid"):
        sweep.parse_grid([text])


def test_unknown_policy() -> None:
    with pytest.raises(EchoStreamError, match="'guess' is unknown"):
        sweep.plan(["guess"], {}, [320])


def test_frontier_keeps_what_nothing_beats() -> None:
    points = [(1.0, 10.0), (2.0, 9.0), (2.0, 12.0), (3.0, 12.0), (0.5, 4.0), (4.0, 13.0)]
    assert sweep.frontier(points) == [(0.5, 4.0), (1.0, 10.0), (2.0, 12.0), (4.0, 13.0)]


def streamed(words: list[tuple[str, float]], seconds: float) -> Streamed:
    found = Streamed(seconds, WordTimes(Vocabulary([]), False, True), None)
    found.written.words = [TimedWord(*word) for word in words]
    return found


def test_figures_worked_by_hand() -> None:
    said = streamed([("one", 1.0), ("two", 2.0), ("three", 3.0), ("four", 4.0)], 4.0)
    figures = sweep.measure([said, streamed([], 2.0)], ["one two three four", "nothing"])
    assert (figures["AL"], figures["LAAL"], figures["StartOffset"], figures["silent"]) == (1000, 1000, 1000, 1)
    assert 0 < figures["BLEU"] < 100  # of five words one is missing
    assert sweep.measure([said], ["one two three four"])["BLEU"] == pytest.approx(100)


def test_chinese_is_measured_by_characters() -> None:
    """14 characters, three a step: BLEU is sacrebleu's with its tokenizer zh, AL that of characters, by hand."""
    sacrebleu = pytest.importorskip("sacrebleu")
    text, reference = "今天天气很好，我们去公园吧。", "今天天气很好，我们去公园玩。"
    vocabulary = Vocabulary([f"▁{text[0]}", *text[1:]])
    said = Streamed(1.0, WordTimes(vocabulary, False, True), None)
    for step, start in enumerate(range(0, len(text), 3)):
        tokens = tuple(4 + i for i in range(start, min(start + 3, len(text))))  # behind the special symbols
        time = 0.25 * min(step + 1, 4)
        said.take(TargetText(sentence=0, source_time_s=time, tokens=tokens, frames=(), text="", sentence_text=""))
    figures = sweep.measure([said], [reference], language="zh", unit="char")
    assert figures["BLEU"] == pytest.approx(sacrebleu.corpus_bleu([text], [[reference]], tokenize="zh").score)
    delays = [250] * 3 + [500] * 3 + [750] * 3 + [1000]  # to the first that comes at the source's end
    assert figures["AL"] == pytest.approx(np.mean([d - 1000 / 14 * i for i, d in enumerate(delays)]))
    assert sweep.measure([said], [reference])["AL"] == pytest.approx(1000)  # one word, complete with its last letter


def test_a_batch_gives_what_a_session_gives(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    recordings = [speech(1.0 + 0.3 * i, i) for i in range(5)]
    found = list(stream(bundle, recordings, {"policy": "alignatt", "chunk_ms": 320}, batch=2))
    assert len(found) == 5
    for samples, several in zip(recordings, found):
        session = StreamingSession(bundle, policy="alignatt", chunk_ms=320)
        alone = Streamed(len(samples) / 16000, *(WordTimes(bundle.target_dict, s, True) for s in (False, True)))
        events = session.push(samples) + session.finish()
        for event in events:
            alone.take(event)
        assert several.words == alone.words and several.spoken.words == alone.spoken.words
        assert several.text.split() == " ".join(e.text for e in events if isinstance(e, SentenceEnd)).split()
        assert several.ends[-1][0] == len(several.words) > 0 and several.ends == alone.ends
        np.testing.assert_allclose(sweep.sound(several), sweep.sound(alone), atol=1e-4)


def test_sweep_measures_what_simuleval_measures(tiny_bundle: Path, tmp_path: Path) -> None:
    run = pytest.importorskip("echostream.evaluation.run")
    pytest.importorskip("simuleval")
    recordings = [speech(1.3, 1), speech(0.94, 2)]
    paths = [tmp_path / f"{i}.wav" for i in range(2)]
    for path, samples in zip(paths, recordings):
        write_audio(path, samples)
    references = ["The house is big.", "Hello, my friend."]
    options = {"checkpoint_dir": tiny_bundle, "chunk_ms": 320, "output_type": "text", "policy": "wait-k", "wait_k": 1}
    run.simulate(paths, references, tmp_path / "out", options)
    theirs = run.score(tmp_path / "out", output="text")
    policy = make_policy("wait-k", wait_k=1)
    found = list(stream(load_bundle(tiny_bundle), map(load_audio, paths), {"policy": policy, "speech": False}))
    ours = sweep.measure(found, references)
    for name in ("BLEU", "AL", "LAAL", "StartOffset"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-3), name


@pytest.fixture(scope="module")
def swept(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    folder = tmp_path_factory.mktemp("sweep")
    for i in range(3):
        write_audio(folder / f"{i}.wav", speech(1.0, i))
    (folder / "source.txt").write_text("".join(f"{folder / f'{i}.wav'}\n" for i in range(3)))
    (folder / "target.txt").write_text("The house is big.\nHello, my friend.\nWhat time is it?\n")
    command = [
        "sweep", "--source", folder / "source.txt", "--target", folder / "target.txt", "--limit", 2,
        "--policies", "ctc", "sentence", "--chunk-ms", 320, "--grid", "lagging_k1=0,2", "--checkpoint-dir", tiny_bundle,
        "--segmenter", "none", "--output", folder / "out",
    ]  # fmt: skip
    done = evaluate(*command)
    assert done.returncode == 0, done.stderr
    return folder / "out", command


def test_sweep_writes_table_and_picture(swept: tuple[Path, list[object]]) -> None:
    out, _ = swept
    names = ["ctc_lagging_k1=0_chunk=320", "ctc_lagging_k1=2_chunk=320", "sentence_chunk=320"]
    assert sorted(path.stem for path in (out / "points").iterdir()) == names
    rows = [line.split("\t") for line in (out / "sweep.tsv").read_text().splitlines()]
    assert rows[0][:5] == ["policy", "knobs", "chunk_ms", "BLEU", "chrF"] and len(rows) == 4
    points = json.loads((out / "sweep.json").read_text())["points"]
    lags = [point["figures"]["AL"] for point in points if point["policy"] == "ctc"]
    assert lags == sorted(lags)
    sentence = next(p["figures"] for p in points if p["policy"] == "sentence")
    assert sentence["AL"] == pytest.approx(1000)  # all of it written at the end of each recording of 1 s
    assert (out / "sweep.md").read_text().count("| sentence") == 1
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_goes_on_where_it_stopped(swept: tuple[Path, list[object]]) -> None:
    out, command = swept
    kept, lost = (out / "points" / f"ctc_lagging_k1={k}_chunk=320.json" for k in (0, 2))
    changed = json.loads(kept.read_text())
    changed["figures"]["BLEU"] = 77.0  # so that it shows if it is computed again
    kept.write_text(json.dumps(changed))
    before = json.loads(lost.read_text())
    lost.unlink()
    done = evaluate(*command)
    assert done.returncode == 0, done.stderr
    assert "77.00" in (out / "sweep.tsv").read_text()
    assert json.loads(lost.read_text()) == before


def test_results_of_other_recordings_are_not_mixed_in(swept: tuple[Path, list[object]]) -> None:
    _, command = swept
    other = [3 if argument == 2 else argument for argument in command]
    done = evaluate(*other)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "was made with recordings 2, not 3" in done.stderr


def test_a_bad_knob_is_known_before_the_work(swept: tuple[Path, list[object]]) -> None:
    _, command = swept
    done = evaluate(*["lagging_k1=0,-2" if argument == "lagging_k1=0,2" else argument for argument in command])
    assert done.returncode == 1 and "lagging_k1 is -2" in done.stderr.splitlines()[-1]


def test_damaged_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "point.json").write_text('{"figures": {}')
    with pytest.raises(EchoStreamError, match="point.json is damaged"):
        sweep.read_result(tmp_path / "point.json", {})
    assert sweep.read_result(tmp_path / "none.json", {}) is None
