"""The wheel in an empty environment: no torch, and a recording is translated by the model that is shipped.

Where no exported model is shipped, an untrained one stands in its place.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.build_dist import copy_tree, missing_from

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MB, LIMIT_S = 300, 40  # of the environment, model included; of CPU time, for this machine may be busy
TALK = ROOT / "echostream" / "assets" / "demo" / "02.ogg"


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files, the shipped model among them."""
    folder = tmp_path_factory.mktemp("project") / "echostream"
    copy_tree(folder)
    return folder


@pytest.fixture(scope="module")
def archives(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Wheel and source archive."""
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", out, cwd=project)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, project, cwd=out)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_archives_are_complete(project: Path, archives: tuple[Path, Path]) -> None:
    made = (".egg-info", "__pycache__", "build/")
    files = [path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()]
    files = [name for name in files if not any(part in name for part in made)]
    assert {"configs/scratch/asr.yaml", "agent/echostream_agent.py", "scripts/train.py"} <= set(files)
    for archive in archives:
        assert missing_from(archive, files) == []


def test_case_17_an_empty_environment_translates(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """``pip install`` of the wheel file, then ``echostream translate``: no torch, within 300 MB and 40 s."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", archives[0]]
    done = subprocess.run(list(map(str, install)), capture_output=True, text=True)
    if "Could not find a version" in done.stderr or "Connection" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    said = run(tmp_path / "bare" / "bin" / "echostream", "translate", TALK, "-o", "out.wav", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "of speech; computed for" in said and (tmp_path / "out.wav").stat().st_size > 16000
    lacks = "import importlib.util as u; print(*(bool(u.find_spec(n)) for n in ('torch', 'fairseq', 'simuleval')))"
    assert run(python, "-c", lacks, cwd=tmp_path).split() == ["False"] * 3
    config = "from echostream.recipe import read_flags; print(read_flags('configs/scratch/asr.yaml', 'fr-en')['data'])"
    assert run(python, "-c", config, cwd=tmp_path).strip() == "data/fr-en"  # recipes come along
    size = sum(path.lstat().st_size for path in (tmp_path / "bare").rglob("*") if not path.is_symlink()) / 1e6
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert size <= LIMIT_MB, f"{size:.0f} MB"
    assert seconds <= LIMIT_S, f"{seconds:.0f} s"
