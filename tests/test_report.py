"""The report: known figures of made-up results, in the right cells; the same command gives the same report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sacrebleu")
pytest.importorskip("simuleval")
pytest.importorskip("matplotlib")

from echostream.audio.io import load_audio, write_audio
from echostream.data.corpus.tts import Voice
from echostream.data.manifest import Utterance, read_manifest, write_manifest
from echostream.errors import EchoStreamError
from echostream.evaluation import quality, sweep
from echostream.evaluation.cascade import run_cascade
from echostream.evaluation.rerun import figures as rerun_figures
from echostream.evaluation.rerun import run_again, translate_growing
from echostream.evaluation.significance import MEASURES, bootstrap
from tests.evaluate_script import evaluate

MEASURE = {measure.name: measure for measure in MEASURES}
NOUNS = "boat house car dog cat tree book table garden window".split()
COUNT = 20


def reference(i: int) -> str:
    """Six words, or, every fifth, ten."""
    tail = " and this old red one" if i % 5 == 0 else "."
    return f"The {NOUNS[i % 10]} is number {i}{tail}"


def worse(i: int) -> str:
    """Every other sentence has one word wrong."""
    return reference(i).replace("The", "A") if i % 2 else reference(i)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two offline systems, a simultaneous one, a sweep and talks, with the manifest they belong to."""
    rows = [
        Utterance(f"id{i}", f"audio/rec{i}.wav", 98, f"Frase {i}", reference(i), np.array([1, 2]),
                  {"voice": ("em_alex s1.1", "ef_dora", "em_santa")[i % 3]})
        for i in range(COUNT)
    ]  # fmt: skip
    write_manifest(tmp_path / "test.tsv", rows)
    for name, output in (("good", reference), ("bad", worse)):
        lines = [
            {"id": row.id, "audio": row.audio, "asr": row.src_text if i else "Otra 0", "asr_ref": row.src_text,
             "mt": output(i), "mt_ref": row.tgt_text, "units": [1], "units_ref": [1, 2]}
            for i, row in enumerate(rows)
        ]  # fmt: skip
        write_lines(tmp_path / name / "generate-test.jsonl", lines)
    for chunk, lag in ((320, 0.0), (640, 500.0)):
        lines = [log_line(i, lag) for i in range(COUNT)]
        folder = tmp_path / "simul" / f"chunk{chunk}"
        write_lines(folder / "instances.log", lines)
        (folder / "asr_transcripts.txt").write_text("".join(f"{reference(i).lower()}\n" for i in range(COUNT)))
        (folder / "asr.txt").write_text("Whisper made-up\n")
    about = {"output_type": "speech", "options": {"policy": "wait-k", "wait_k": "3"}}
    (tmp_path / "simul" / "results.json").write_text(json.dumps(about))
    return tmp_path


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def log_line(i: int, lag: float) -> dict:
    """A piece of 300 ms after every second of 4 s of source, half a second of computing; nothing for the last."""
    delays = [1000.0 + lag, 2000.0 + lag, 3000.0 + lag, 4000.0] if i < COUNT - 1 else []
    texts = reference(i).split() if delays else []
    words = [{"text": t, "delay": delays[min(n, 3)], "elapsed": delays[min(n, 3)] + 500} for n, t in enumerate(texts)]
    return {
        "index": i, "prediction": f"/gone/{i}_pred.wav", "text": " ".join(texts), "source_text": "", "words": words,
        "delays": delays, "elapsed": [d + 500 for d in delays], "durations": [300.0] * len(delays),
        "intervals": [[d, 300.0] for d in delays], "silences": [], "compute": 400.0, "source_length": 4000.0,
        "reference": reference(i), "source": f"/elsewhere/audio/rec{i}.wav",
    }  # fmt: skip


def report(folder: Path, *arguments: object, output: str = "report.md", samples: int = 50) -> str:
    done = evaluate("report", *arguments, "--samples", samples, "--output", folder / output)
    assert done.returncode == 0, done.stderr
    return (folder / output).read_text(encoding="utf-8")


def table(text: str, title: str) -> list[dict[str, str]]:
    """The first table under a heading, a dictionary a row."""
    section = text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    lines = lines[: next((i for i, line in enumerate(lines) if i > 1 and line.startswith("| -")), len(lines))]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def value(cell: str) -> float:
    return float(cell.split()[0])


# ---- resampling ----------------------------------------------------------------------------------------------------

REFERENCES = [reference(i) for i in range(COUNT)]


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("BLEU", quality.bleu), ("chrF", quality.chrf), ("ASR-BLEU", quality.asr_bleu),
        ("WER", lambda h, r: quality.word_error_rate(h, r, numbers=False)),
    ],
)  # fmt: skip
def test_resampled_figures_are_the_plain_ones(name: str, figure) -> None:
    outputs = [worse(i) for i in range(COUNT)]
    first, again = (bootstrap(MEASURE[name], [outputs], REFERENCES, 100, 1)[0] for _ in range(2))
    assert first.score == pytest.approx(figure(outputs, REFERENCES)) and first.ci > 0
    assert (first.mean, first.ci) == (again.mean, again.ci)
    assert bootstrap(MEASURE[name], [outputs], REFERENCES, 100, 2)[0].mean != first.mean


def test_a_word_error_rate_takes_empty_references() -> None:
    hypotheses, references = ["one two", "extra", ""], ["one three", "", "gone"]
    (result,) = bootstrap(MEASURE["WER"], [hypotheses], references, 10, 1)
    assert result.score == pytest.approx(quality.word_error_rate(hypotheses, references)) == 100


def test_only_a_difference_is_significant() -> None:
    outputs = [worse(i) for i in range(COUNT)]
    _, itself, better = bootstrap(MEASURE["BLEU"], [outputs, outputs, REFERENCES], REFERENCES, 200, 1)
    assert itself.p_value == 1 and better.p_value < 0.05


@pytest.mark.parametrize(("samples", "seed"), [(100, 0), (0, 1)])
def test_no_seed_is_refused(samples: int, seed: int) -> None:
    with pytest.raises(EchoStreamError, match="must be at least 1"):
        bootstrap(MEASURE["BLEU"], [REFERENCES], REFERENCES, samples, seed)


# ---- the tables ----------------------------------------------------------------------------------------------------


def test_quality_by_system_voice_and_length(results: Path) -> None:
    text = report(
        results, "--system", f"good={results}/good/generate-test.jsonl", "--system",
        f"bad={results}/bad/generate-test.jsonl", "--manifest", results / "test.tsv",
    )  # fmt: skip
    good, bad = table(text, "Quality")
    assert good["system"] == "good" and good["sentences"] == "20" and good["BLEU"] == "100.00 ± 0.00"
    assert value(good["WER"]) == 2.5  # one word of forty
    assert value(bad["BLEU"]) == round(quality.bleu([worse(i) for i in range(COUNT)], REFERENCES), 2) < 95
    assert "ASR-BLEU" not in good and "ST BLEU" not in good  # nobody listened, and there is no such head
    voices = {(row["system"], row["voice"]): row for row in table(text, "By voice")}
    assert len(voices) == 8
    everybody = voices["bad", "all voices of the training"]
    unseen = voices["bad", "em_santa (unseen)"]
    assert (everybody["sentences"], unseen["sentences"], voices["bad", "em_alex"]["sentences"]) == ("14", "6", "7")
    chosen = [i for i in range(COUNT) if i % 3 == 2]
    expected = quality.bleu([worse(i) for i in chosen], [reference(i) for i in chosen])
    assert value(unseen["BLEU"]) == round(expected, 2)
    lengths = {(row["system"], row["length"]): row for row in table(text, "By length of the reference")}
    assert set(lengths) == {(name, band) for name in ("good", "bad") for band in ("5 to 8 words", "9 to 12 words")}
    assert lengths["bad", "9 to 12 words"]["sentences"] == "4"


def test_comparisons_name_the_better_one(results: Path) -> None:
    systems = [f"--system={name}={results}/{name}/generate-test.jsonl" for name in ("bad", "good")]
    rows = {row["measure"]: row for row in table(report(results, *systems, samples=200), "Comparisons")}
    assert rows["BLEU"]["better (p < 0.05)"] == "good" and float(rows["BLEU"]["p"]) < 0.05
    assert value(rows["BLEU"]["of B"]) == 100 and value(rows["BLEU"]["B − A"]) > 0
    assert rows["WER"]["better (p < 0.05)"] == "–" and float(rows["WER"]["B − A"]) == 0


def test_simultaneous_figures_worked_by_hand(results: Path) -> None:
    text = report(
        results, f"--system=good={results}/good/generate-test.jsonl", f"--system=w3={results}/simul", "--ceiling=good",
        f"--manifest={results}/test.tsv",
    )  # fmt: skip
    first, second = table(text, "Simultaneous")
    assert (first["system"], second["system"]) == ("w3 320 ms", "w3 640 ms")
    assert first["options"] == "policy=wait-k wait_k=3"
    assert first["StartOffset"] == "1000 (1500)" and first["EndOffset"] == "300 (800)"
    # Tokens of the speech end at 1300, 2300, 3300, 4300; they are those of the source that end at 300, 600, 900, 1000.
    assert first["ATD"] == "2100 (2600)" and second["StartOffset"] == "1500 (2000)"
    # Up to the first word that saw all: 1000 + 1000 n - 4000 n / words; 6 words, or 10 (every fifth); 19 sentences.
    lags = [sum(1000 + 1000 * n - 4000 * n / len(reference(i).split()) for n in range(4)) / 4 for i in range(COUNT - 1)]
    assert value(first["AL"]) == value(first["LAAL"]) == round(np.mean(lags))
    assert first["AL / source"] == f"{np.mean(lags) / 4000:.1%}"
    assert first["silent"] == "1" and first["RTF"] == "0.100"
    bleu = quality.bleu([reference(i) if i < COUNT - 1 else "" for i in range(COUNT)], REFERENCES)
    assert value(first["BLEU"]) == round(bleu, 2) and first["BLEU / good"] == f"{bleu:.1f}%"
    assert value(first["ASR-BLEU"]) == 100 and "Whisper made-up" in text
    assert (results / "report-simultaneous.png").read_bytes().startswith(b"\x89PNG")
    rows = [row for row in table(text, "Comparisons") if row["measure"] == "BLEU"]
    assert {row["sentences"] for row in rows} == {"20"}  # recordings and ids found each other


def test_policies_and_talks(results: Path) -> None:
    points = {
        ("sentence", (), 320): (30.0, 4000.0), ("wait-k", (("wait_k", 1),), 320): (20.0, 1000.0),
        ("wait-k", (("wait_k", 3),), 320): (29.5, 2000.0), ("wait-k", (("wait_k", 5),), 320): (30.5, 3000.0),
    }  # fmt: skip
    found = [(sweep.Point(*point), {"BLEU": bleu, "AL": lag}) for point, (bleu, lag) in points.items()]
    rows = read_manifest(results / "test.tsv")
    of = {
        "recordings": COUNT,
        "data": sweep.fingerprint([Path(row.audio).name for row in rows], [row.tgt_text for row in rows]),
    }
    for point, figures in found:
        sweep.write_result(results / "sweep/points" / f"{point.name}.json", {"of": of, "figures": figures})
    sweep.report(found, results / "sweep", "20 recordings")
    (results / "talks").mkdir()
    (results / "talks/longform.json").write_text(json.dumps({"boundary_f1": 0.91, "talks": 10}))
    arguments = (f"--sweep={results}/sweep", f"--longform={results}/talks")
    text = report(results, *arguments, f"--manifest={results}/test.tsv")
    shares = {row["knobs"]: row["AL / source"] for row in table(text, "Policies")}
    assert shares["wait_k=1"] == "100.5%"  # 98 frames are 995 ms
    early = text.split("The earliest point of each policy within 1 BLEU")[1]
    assert "| wait-k   | wait_k=3 | 320      | 29.50 | 2000 | -50.0%" in early and "wait_k=1 " not in early
    assert table(text, "Whole talks")[0] == {"measure": "boundary_f1", "value": "0.910"}
    assert (results / "report-sweep.png").read_bytes() == (results / "sweep/sweep.png").read_bytes()
    assert "100.5%" not in report(results, *arguments)  # without the manifest nobody knows how long the recordings are


def test_same_command_same_report(results: Path) -> None:
    arguments = (
        f"--system=bad={results}/bad/generate-test.jsonl", f"--system=w3={results}/simul", "--examples=3",
        f"--manifest={results}/test.tsv",
    )  # fmt: skip
    text = report(results, *arguments)
    picture = (results / "report-simultaneous.png").read_bytes()
    assert report(results, *arguments) == text and (results / "report-simultaneous.png").read_bytes() == picture
    examples = text.split("## Examples")[1]
    assert examples.count("\n`id") == 3 and examples.count("w3 640 ms, mt") == 3
    assert report(results, *arguments, "--seed=2").split("## Examples")[1] != examples


def test_what_was_heard_offline_is_kept(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results / "good/generate-test.jsonl"
    lines = [json.loads(line) | {"wav": f"wav/{i}.wav"} for i, line in enumerate(path.read_text().splitlines())]
    write_lines(path, lines)
    engine = SimpleNamespace(name="Ear", transcribe_file=lambda wav: worse(int(wav.stem)))
    monkeypatch.setattr("echostream.commands.evaluations.load_recogniser", lambda name: engine)
    assert evaluate("offline", path).returncode == 0
    (row,) = table(report(results, f"--system=good={path}"), "Quality")
    assert value(row["ASR-BLEU"]) == round(quality.asr_bleu([worse(i) for i in range(COUNT)], REFERENCES), 2)
    write_lines(path, lines[::-1])
    done = evaluate("report", f"--system=good={path}", "--output", results / "report.md")
    assert done.returncode == 1 and "listen again" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to report"),
        (("--system=good",), "'good' is not NAME=PATH"),
        (("--system=a={0}/good/generate-test.jsonl", "--system=a={0}/simul"), "two systems have one name"),
        (("--system=a={0}/none.jsonl",), "none.jsonl does not exist"),
        (("--system=a={0}",), "instances.log does not exist"),
        (("--system=a={0}/simul", "--ceiling=b"), "--ceiling 'b' is none of the systems: a 320 ms, a 640 ms"),
        (("--system=a={0}/simul", "--seed=0"), "--seed 0"),
        (("--sweep={0}",), "sweep.json does not exist"),
    ],
)
def test_mistakes(results: Path, arguments: tuple[str, ...], message: str) -> None:
    done = evaluate("report", *(a.format(results) for a in arguments), "--output", results / "report.md")
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


def test_other_references_are_not_compared(results: Path) -> None:
    path = results / "bad/generate-test.jsonl"
    path.write_text(path.read_text().replace('"mt_ref": "The dog', '"mt_ref": "A dog'))
    systems = [f"--system={name}={results}/{name}/generate-test.jsonl" for name in ("bad", "good")]
    done = evaluate("report", *systems, "--output", results / "report.md", "--samples", 5)
    assert done.returncode == 1 and "'id3' has the reference 'A dog is number 3.' in bad" in done.stderr


def test_old_transcripts_are_not_taken_for_new(results: Path) -> None:
    os.utime(results / "simul/chunk640/asr_transcripts.txt", (1, 1))
    done = evaluate("report", f"--system=a={results}/simul", "--output", results / "report.md")
    assert done.returncode == 1 and "score the run again" in done.stderr


# ---- the cascade ---------------------------------------------------------------------------------------------------


class Translator:
    """Says how many samples it was given."""

    name = "Translator"

    def __init__(self) -> None:
        self.calls = 0

    def transcribe(self, samples: np.ndarray) -> str:
        self.calls += 1
        return f"{len(samples)} samples" if len(samples) > 1000 else "..."


class Speaker:
    version = "Speaker 1"

    def plan(self, row: str, seed: int) -> Voice:
        return Voice("one", seed=seed)

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        return np.full(len(text), 0.5, dtype=np.float32)


def test_cascade_writes_what_generate_writes_and_goes_on(results: Path) -> None:
    rows = read_manifest(results / "test.tsv")[:3]
    for i, row in enumerate(rows):
        write_audio(results / row.audio, np.zeros(500 + 1000 * i, dtype=np.float32))
    path, translator = results / "cascade/generate-test.jsonl", Translator()
    run_cascade(rows[:2], results, path, translator, Speaker())
    run_cascade(rows, results, path, translator, Speaker())
    assert translator.calls == 3
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["mt"] for row in found] == ["...", "1500 samples", "2500 samples"]
    assert [(row["id"], row["mt_ref"], row["asr_ref"]) for row in found] == [
        (row.id, row.tgt_text, row.src_text) for row in rows
    ]
    import soundfile

    assert soundfile.info(path.parent / found[0]["wav"]).frames == 0  # dots have no sound
    assert len(load_audio(path.parent / found[1]["wav"])) == len("1500 samples")
    (row,) = table(report(results, f"--system=cascade={path}"), "Quality")
    assert row["sentences"] == "3"
    with pytest.raises(EchoStreamError, match="is by 'Translator [+] Speaker 1', not 'Translator'"):
        run_cascade(rows, results, path, translator, None)


def test_words_are_given_out_when_translations_agree() -> None:
    heard = []
    said = ["It", "It rains", "It rains today", "It rains again", "Snow falls here now"]

    def translate(samples: np.ndarray) -> str:
        heard.append(len(samples))
        return said[len(heard) - 1]

    made = translate_growing(translate, np.zeros(4 * 5120 + 10, dtype=np.float32), 320, 2)
    assert heard == [5120, 10240, 15360, 20480, 20490]  # ever more, and at last all of it
    # A word comes with the second translation that begins with it, the rest with the last one; nothing is taken back.
    assert made.words == ["It", "rains", "here", "now"] and made.seconds == 20490 / 16000
    assert made.delays == [640, 960, 20490 / 16, 20490 / 16]
    assert translate_growing(lambda samples: "a b", np.zeros(5120), 320, 1).words == ["a", "b"]
    assert translate_growing(lambda samples: "a", np.zeros(0), 320, 2).words == []


def test_rerun_goes_on_and_sums_up(results: Path) -> None:
    rows = read_manifest(results / "test.tsv")[:3]
    for row in rows:
        write_audio(results / row.audio, np.zeros(8000, dtype=np.float32))
    path, translator = results / "again/rerun-test.jsonl", Translator()
    run_again(rows[:2], results, path, translator, 320, 2)
    assert translator.calls == 4  # 320 ms of each, and all 500
    found = run_again(rows, results, path, translator, 320, 2)
    assert translator.calls == 6 and found["silent"] == 0 and found["BLEU"] == 0 and found["RTF"] > 0
    assert [json.loads(line)["mt"] for line in path.read_text().splitlines()] == ["8000 samples"] * 3
    assert rerun_figures([{"mt": "", "mt_ref": "a b", "delays": [], "seconds": 1.0, "computing": 0.5}])["silent"] == 1
    # two words at the end of one second, where an ideal interpreter would be done with the first at 0 s
    line = {"mt": "a b", "mt_ref": "a b", "delays": [1000.0, 1000.0], "seconds": 1.0, "computing": 0.5}
    assert rerun_figures([line])["AL"] == 1000 and rerun_figures([line])["RTF"] == 0.5
    with pytest.raises(EchoStreamError, match="agreement of 2', not 'Translator, every 320 ms, agreement of 3'"):
        run_again(rows, results, path, translator, 320, 3)


def test_cascade_without_its_model_says_so(results: Path) -> None:
    pytest.importorskip("faster_whisper")
    done = evaluate(
        "cascade", "--manifest", results / "test.tsv", "--whisper", results, "--output", results / "c", "--no-voice"
    )
    assert done.returncode == 1 and "holds no model.bin of a CTranslate2 Whisper model" in done.stderr
