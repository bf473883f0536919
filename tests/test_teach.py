"""prepare_corpus.py teach: Whisper's translations and transcripts as further references of a manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from echostream.audio.io import load_audio, write_audio
from echostream.constants import FRAME_SHIFT, SAMPLE_RATE
from echostream.data.corpus import teach
from echostream.data.corpus.cli import main
from echostream.data.corpus.rows import read_table
from echostream.data.manifest import Utterance, read_manifest, write_manifest
from echostream.errors import CheckpointError, ConfigError, MissingExtraError

pytest.importorskip("rapidfuzz")

DEMO = Path(__file__).resolve().parents[1] / "echostream" / "assets" / "demo" / "01.ogg"
UNITS = np.array([3, 4], dtype=np.int16)
ROWS = {
    "good": ("La casa es grande.", "The house is big."),
    "loop": ("No lo sé.", "I do not know."),
    "deaf": ("Mañana iremos al mercado.", "Tomorrow we go to the market."),
    "same": ("Gracias.", "Thank you."),
}
SAID = {
    ("good", "translate"): ("The home is large.", -0.2),
    ("good", "transcribe"): ("La casa es grande", -0.1),
    ("loop", "translate"): ("I don't know, I don't know, I don't know, I don't know.", -0.1),
    ("loop", "transcribe"): ("No lo sé.", -1.5),
    ("deaf", "translate"): ("See you next time.", -0.4),
    ("deaf", "transcribe"): ("Subtítulos por la comunidad.", -0.3),
    ("same", "translate"): ("Thank you.", -0.1),
    ("same", "transcribe"): ("", 0.0),
}


class Parrot:
    """A Whisper that knows the recordings by their length."""

    calls: list[tuple[int, int, str]] = []
    broken_at = 10**9

    def __init__(self, source: Path, language: str, compute_type: str = "default", beam: int = 5) -> None:
        assert language == "es"

    def write(self, recordings: list[np.ndarray], window: int, task: str) -> list[tuple[str, float]]:
        if len(self.calls) == self.broken_at:
            raise KeyboardInterrupt
        self.calls.append((len(recordings), window, task))
        return [SAID[list(ROWS)[len(samples) // SAMPLE_RATE - 1], task] for samples in recordings]


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(teach, "Whisper", Parrot)
    monkeypatch.setattr(Parrot, "calls", [])
    rows = []
    for i, (name, (source, target)) in enumerate(ROWS.items(), 1):
        write_audio(tmp_path / "audio" / f"{name}.wav", np.zeros(i * SAMPLE_RATE, dtype=np.float32))
        rows.append(Utterance(name, f"audio/{name}.wav", 100 * i - 2, source, target, UNITS, {"voice": "v"}))
    write_manifest(tmp_path / "train.tsv", rows)
    return tmp_path / "train.tsv"


def run(manifest: Path, *arguments: str, name: str = "taught.tsv") -> int:
    return main(["teach", str(manifest), "--whisper", "base", "-o", str(manifest.parent / name), "--source-lang", "es",
                 *arguments])  # fmt: skip


def test_sound_hypotheses_become_references(manifest: Path) -> None:
    assert run(manifest, "--batch-size", "3") == 0
    assert [call[2] for call in Parrot.calls] == ["translate"] * 2 + ["transcribe"] * 2
    assert [call[0] for call in Parrot.calls] == [3, 1, 3, 1]
    rows = {row.id: row for row in read_manifest(manifest.parent / "taught.tsv")}
    assert [name for name in rows["good"].extra] == ["voice", "tgt_text.1", "src_text.1"]
    assert rows["good"].references("tgt_text") == ["The house is big.", "The home is large."]
    assert rows["good"].references("src_text") == ["La casa es grande.", "La casa es grande"]
    for name in ("loop", "deaf", "same"):
        assert rows[name].references("tgt_text") == [ROWS[name][1]], name
        assert rows[name].references("src_text") == [ROWS[name][0]], name
    assert all(row.units.tolist() == UNITS.tolist() for row in rows.values())
    note = json.loads((manifest.parent / "steps" / "teach-taught.json").read_text())
    assert note["settings"]["whisper"] == "base" and note["counts"]["translate: kept"] == 1
    assert note["counts"]["translate: repeats itself"] == note["counts"]["translate: heard otherwise"] == 1
    # Another round stands beside the first; what is there already is nothing new.
    assert main(["teach", str(manifest.parent / "taught.tsv"), "--whisper", "base", "--source-lang", "es", "--task",
                 "translate", "-o", str(manifest.parent / "twice.tsv")]) == 0  # fmt: skip
    (row, *_) = read_manifest(manifest.parent / "twice.tsv")
    assert list(row.extra) == ["voice", "tgt_text.1", "src_text.1", "tgt_text.2"] and row.extra["tgt_text.2"] == ""


def test_goes_on_where_it_stopped_and_in_shards(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parrot, "broken_at", 1)
    assert run(manifest, "--batch-size", "2") == 130
    assert not (manifest.parent / "taught.tsv").exists()
    monkeypatch.setattr(Parrot, "broken_at", 10**9)
    assert run(manifest, "--batch-size", "2") == 0
    assert sum(count for count, _, task in Parrot.calls if task == "translate") == len(ROWS)
    ledger = list(read_table(manifest.parent / "teach" / "taught-translate.0-of-1.tsv"))
    assert {line["id"]: line["text"] for line in ledger} == {name: SAID[name, "translate"][0] for name in ROWS}
    calls = len(Parrot.calls)
    assert run(manifest) == 0 and len(Parrot.calls) == calls
    whole = (manifest.parent / "taught.tsv").read_text()
    for shard in ("0", "1"):
        assert run(manifest, "--num-shards", "2", "--shard", shard, name="shards.tsv") == 0
    assert (manifest.parent / "shards.tsv").read_text() == whole


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ("The home is large.", -0.2, ""),
        ("...", -0.2, "empty"),
        ("The house is big.", -0.2, "known"),
        ("The home is large.", -1.2, "unlikely"),
        ("La casa es grande.", -0.2, "not translated"),
        ("Well, the house that stands there on top of the green hill is very big indeed.", -0.2, "of another length"),
        ("no no no", -0.2, "repeats itself"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_faults(text: str, score: float, reason: str) -> None:
    row = Utterance("a", "a.wav", 100, *ROWS["good"], UNITS)
    assert teach.fault(text, score, row, "translate") == reason
    assert teach.fault(text, score, row, "translate", "La cosa es grande.") == reason
    if not reason:
        assert teach.fault(text, score, row, "translate", "Una cosa pequeña.") == "heard otherwise"


def test_loops() -> None:
    assert teach.loops("and so on and so on and so on") and teach.loops("ha, ha, ha!") and teach.loops("la" * 60)
    assert not teach.loops("That that is is, that that is not is not.") and not teach.loops("It was very, very big.")


def test_windows_leave_silence() -> None:
    for seconds, expected in ((0.5, 10), (4.9, 10), (5.1, 15), (24.9, 30), (27, 30), (30, 30)):
        assert teach.window(int(100 * seconds)) == expected * SAMPLE_RATE
        assert teach.window(int(100 * seconds)) >= int(100 * seconds) * FRAME_SHIFT


def test_errors_are_one_line(manifest: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["--task", "sing"], "--task is 'sing'; it is a list of translate and transcribe"),
        (["--task", ""], "--task is ''"),
        (["-o", str(manifest)], "is the manifest itself"),
        (["--source-lang", ""], "give --source-lang"),
    ):
        assert run(manifest, *arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    rows = [Utterance("a", "a.npy", 100, "Sí.", "Yes.", UNITS)]
    write_manifest(manifest, rows)
    assert run(manifest) == 1 and "row 'a' names ready features" in capsys.readouterr().err


def test_whisper_itself_writes(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    from echostream.units.features import packaged_whisper

    try:
        base = packaged_whisper()
    except MissingExtraError as error:
        pytest.skip(str(error))
    with pytest.raises(CheckpointError, match="holds no model.bin"):
        teach.Whisper(tmp_path, "es")
    with pytest.raises(ConfigError, match="--source-lang is 'xx'"):
        teach.Whisper(base, "xx")
    samples = load_audio(DEMO)
    whisper = teach.Whisper(base, "es", "int8", beam=2, threads=1)
    window = teach.window(len(samples) // FRAME_SHIFT)
    (heard, sure), (again, _) = whisper.write([samples, samples], window, "transcribe")
    ((english, _),) = whisper.write([samples], window, "translate")
    assert heard == again and sure > -1 and len(heard.split()) >= 3 and english != heard
    assert not any(mark in heard + english for mark in ("<|", "\ufffd", "Ġ"))
