"""The fuzzer: what is whole passes it, a few fixed cases of each kind, and that it notices what it is for."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from tests.fuzz import runner
from tests.fuzz.material import make_material
from tests.fuzz.targets import Targets

CASES = 12


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    return Targets(make_material(tmp_path_factory.mktemp("fuzz")))


@pytest.mark.parametrize("kind", [kind for kind in runner.KINDS if kind not in ("schedule", "batch", "recording")])
def test_undamaged_input_passes(targets: Targets, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_damage", "_arrays", "_saved_header"):
        monkeypatch.setattr(Targets, name, lambda *_: None)
    monkeypatch.setattr("tests.fuzz.mutate.bytes_of", lambda data, rng: data)
    assert runner.judge(targets, kind, 0, tmp_path / "case") == ("fine", "")


@pytest.mark.parametrize("kind", runner.KINDS)
def test_a_few_cases(targets: Targets, tmp_path: Path, kind: str) -> None:
    for number in range(CASES):
        outcome, signature = runner.judge(targets, kind, number, tmp_path / "case")
        assert outcome in ("fine", "refused", "slow"), f"{kind} {number}: {outcome}: {signature}"


def test_what_the_fuzzer_is_for_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that works as ordered: raises, hangs, dies, is quick."""
    fake = tmp_path / "worker.py"
    fake.write_text(
        "import sys, time, os\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    kind = line.split()[0]\n"
        "    time.sleep(9 * (kind == 'hang'))\n"
        "    if kind == 'crash': os._exit(7)\n"
        '    print(\'["refused", "x"]\', flush=True)\n'
    )
    popen = runner.subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, **o: popen([sys.executable, str(fake)], **o))
    monkeypatch.setattr(runner, "HANG_S", 2.0)
    worker = runner.Worker(tmp_path)
    try:
        outcomes = [worker.run(kind, 0)[0] for kind in ("good", "hang", "good", "crash", "good")]
    finally:
        worker.close()
    assert outcomes == ["refused", "hang", "refused", "crash", "refused"] and worker.started == 3

    class Broken:
        def run(self, kind: str, number: int, scratch: Path) -> None:
            if kind == "slow":
                monkeypatch.setattr(time, "process_time", lambda: 1e9)
            else:
                raise KeyError("key")

    assert runner.judge(Broken(), "x", 1, tmp_path) == ("traceback", "KeyError at the fuzzer: [\"'key'\"]")
    assert runner.judge(Broken(), "slow", 1, tmp_path)[0] == "slow"
    tally = runner.Tally()
    tally.add("bundle", 3, "fine", "")
    tally.add("bundle", 4, "traceback", "KeyError")
    assert tally.failed == 1 and "bundle 4" in str(tally) and os.linesep in str(tally)
