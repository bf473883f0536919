"""Resynthesis: which recordings are judged, what is said of them, and DNSMOS against figures worked by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sacrebleu")
pytest.importorskip("jiwer")

from echostream.audio.io import load_audio, write_audio  # noqa: E402
from echostream.checkpoint import DEFAULT_BUNDLE  # noqa: E402
from echostream.data.manifest import Utterance, write_manifest  # noqa: E402
from echostream.errors import AudioError, ManifestError, UnitError  # noqa: E402
from echostream.evaluation import resynthesis  # noqa: E402
from echostream.evaluation.mos import DNSMOS  # noqa: E402
from echostream.models.decoders.vocoder_checkpoint import load_vocoder  # noqa: E402
from tests.conftest import NUM_UNITS  # noqa: E402
from tests.evaluate_script import evaluate  # noqa: E402

TEXTS = {"a": "One two three four five.", "b": "Six seven eight nine ten."}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Units of five recordings; the test set says two of them, one of them twice, and one that is not there."""
    rng = np.random.default_rng(1)
    lines = ["id\taudio\tunits\tdurations"]
    for number, name in enumerate(("a", "b", "c", "d", "gone"), 1):
        units = " ".join(map(str, rng.integers(0, NUM_UNITS, 10)))
        lines.append(f"{name}\t{name}.wav\t{units}\t{' '.join(['2'] * 10)}")
        if name != "gone":
            write_audio(tmp_path / "target" / f"{name}.wav", rng.normal(0, 0.1, 16000 * number).astype(np.float32))
    (tmp_path / "target" / "units.tsv").write_text("\n".join(lines) + "\n")
    said = [("t1", "a"), ("t2", "b"), ("t3", "a"), ("t4", "gone")]
    write_manifest(tmp_path / "test.tsv", [
        Utterance(row, f"{row}.wav", 90, "Uno.", TEXTS.get(name, "Gone."), np.array([1, 2]), {"target": name})
        for row, name in said
    ])  # fmt: skip
    return tmp_path


class Listener:
    """Knows the recordings by their length; of anything else it hears the first word of sentence a."""

    name = "listener"

    def transcribe(self, samples: np.ndarray) -> str:
        return {16000: "one two three four five", 32000: "six seven eight nine"}.get(len(samples), "one")


def test_only_recordings_of_the_test_set_are_chosen_and_once(corpus: Path) -> None:
    found = resynthesis.read_sentences(corpus, None, 200)
    assert {item.id: item.text for item in found} == TEXTS
    drawn = [[item.id for item in resynthesis.read_sentences(corpus, None, 1, seed)] for seed in range(20)]
    assert {len(ids) for ids in drawn} == {1} and {ids[0] for ids in drawn} == {"a", "b"}
    (corpus / "dev.tsv").write_text((corpus / "test.tsv").read_text().replace("t4", "c").replace("gone", "c"))
    of_dev = resynthesis.read_sentences(corpus, corpus / "dev.tsv", 200)
    assert {item.id for item in of_dev} == {"a", "b", "c"}


def test_units_with_texts_need_no_manifest(corpus: Path) -> None:
    path = corpus / "target" / "units.tsv"
    header, *rows = path.read_text().splitlines()
    texts = ["First.", "", "Third.", "Fourth.", "Fifth."]
    path.write_text("\n".join([f"{header}\ttext", *(f"{row}\t{text}" for row, text in zip(rows, texts))]) + "\n")
    found = resynthesis.read_sentences(path, None, 200)
    assert {item.id: item.text for item in found} == {"a": "First.", "c": "Third.", "d": "Fourth."}


def test_nothing_to_say(corpus: Path) -> None:
    with pytest.raises(ManifestError, match="units.tsv and --limit 200 leave no sentence"):
        resynthesis.read_sentences(corpus / "target" / "units.tsv", None, 200)
    with pytest.raises(ManifestError, match="--limit 0"):
        resynthesis.read_sentences(corpus, None, 0)


def test_the_command(corpus: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echostream.commands.evaluations.load_recogniser", lambda name: Listener())
    monkeypatch.setitem(sys.modules, "speechmos", None)  # as if it were not installed
    done = evaluate("resynthesis", corpus, "--vocoder", tiny_bundle, "--json", corpus / "out" / "figures.json")
    assert done.returncode == 0, done.stderr
    assert "without DNSMOS: speechmos is not installed; it comes with: pip install 'echostream[mos]'" in done.stderr
    report = json.loads((corpus / "out" / "figures.json").read_text())
    assert report["original"]["wer"] == pytest.approx(10) and report["resynthesis"]["wer"] == pytest.approx(90)
    assert report["original"]["seconds"] == pytest.approx(3) and report["times_realtime"] > 0
    items = {item.id: item for item in resynthesis.read_sentences(corpus, None, 2)}
    voice = load_vocoder(tiny_bundle / "vocoder.pt", tiny_bundle / "vocoder.json")
    with torch.no_grad():
        samples = sum(voice(torch.from_numpy(item.units)[None])[0].shape[1] for item in items.values())
    assert report["resynthesis"]["seconds"] == pytest.approx(samples / 16000)
    heard = {"id": "b", "text": TEXTS["b"], "original": "six seven eight nine", "resynthesis": "one"}
    assert heard in report["sentences"]
    lines = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("|")}
    assert [cell.strip() for cell in lines["WER, %"].split("|")[2:-1]] == ["10.0", "90.0", "<= 8", "no"]
    assert not any("DNSMOS" in name for name in lines)


def test_the_sound_is_the_voice_s(corpus: Path, tiny_bundle: Path) -> None:
    items = resynthesis.read_sentences(corpus, None, 2)
    voice = load_vocoder(tiny_bundle / "vocoder.pt", tiny_bundle / "vocoder.json")
    spoken, seconds = resynthesis.resynthesize(voice, items)
    assert seconds > 0
    for item, samples in zip(items, spoken, strict=True):
        with torch.no_grad():
            expected = voice(torch.from_numpy(item.units)[None])[0][0].numpy()
        assert np.abs(samples - expected).max() < 1e-6
    items[1].units[3] = NUM_UNITS
    with pytest.raises(UnitError, match=f"^{items[1].id}: unit {NUM_UNITS} .* out of range"):
        resynthesis.resynthesize(voice, items)


def test_marks_stand_beside_their_bars(corpus: Path, tiny_bundle: Path) -> None:
    voice = load_vocoder(tiny_bundle / "vocoder.pt", tiny_bundle / "vocoder.json")
    items = resynthesis.read_sentences(corpus, None, 2)
    originals = {len(load_audio(item.audio)) for item in items}
    mos = SimpleNamespace(name="MOS", score=lambda samples: 3.2 if len(samples) in originals else 2.91)
    report = resynthesis.measure(voice, items, Listener(), mos)
    assert ["MOS", "3.20", "2.91", ">= 2.90", "yes"] in resynthesis.table(report)
    report["resynthesis"] |= {"dnsmos": 2.89, "asr_bleu": 85.0, "wer": 8.0}
    verdicts = {row[0]: row[-1] for row in resynthesis.table(report)}
    assert (verdicts["MOS"], verdicts["ASR-BLEU"], verdicts["WER, %"]) == ("no", "yes", "yes")


def dnsmos(graph: object) -> DNSMOS:
    mos = DNSMOS.__new__(DNSMOS)
    mos.graph = graph
    return mos


@pytest.mark.parametrize(("seconds", "starts"), [(9.5, [0]), (10.5, [0]), (12.5, [0, 1, 2])])
def test_long_recordings_are_heard_second_by_second(seconds: float, starts: list[int]) -> None:
    samples = np.arange(round(seconds * 16000), dtype=np.float32)
    windows = dnsmos(None).windows(samples)
    assert [window[0] / 16000 for window in windows] == starts
    assert {len(window) for window in windows} == {DNSMOS.WINDOW}


def test_short_recordings_are_repeated_and_the_mark_is_a_mean() -> None:
    heard = []

    def run(_: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        heard.append(inputs["in"])
        return [np.array([[9.0, 9.0, 2.0 + len(heard)]], dtype=np.float32)]  # speech, background, overall

    graph = SimpleNamespace(run=run, get_inputs=lambda: [SimpleNamespace(name="in")])
    sound = np.arange(50_000, dtype=np.float32)
    expected = -0.06766283 * 9 + 1.11546468 * 3 + 0.04602535
    assert dnsmos(graph).score(sound) == pytest.approx(expected)
    assert heard[0].shape == (1, DNSMOS.WINDOW) and (heard[0][0, 50_000:100_000] == sound).all()
    heard.clear()
    both = expected, -0.06766283 * 16 + 1.11546468 * 4 + 0.04602535
    assert dnsmos(graph).score(np.zeros(11 * 16000, np.float32)) == pytest.approx(np.mean(both))
    with pytest.raises(AudioError, match="at least one sample"):
        dnsmos(graph).score(np.zeros(0, np.float32))


def test_noise_costs_marks() -> None:
    pytest.importorskip("speechmos")
    pytest.importorskip("onnxruntime")
    speech = load_audio(next((DEFAULT_BUNDLE.parent / "demo").glob("*.*g")))
    noisy = speech + np.random.default_rng(1).normal(0, 0.05, len(speech)).astype(np.float32)
    mos = DNSMOS()
    assert 1 < mos.score(noisy) + 0.3 < mos.score(speech) < 5
