#!/usr/bin/env python3
"""Build wheel and source archive from the files that git knows (`make dist`), and look whether they are complete.

In a copy, so that build/ and egg-info of earlier builds cannot add files of theirs. Where there is no git, all that
lies beside setup.py and is not ignored by name is taken.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "runs", "data", "demo-output"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "echostream"
        copy_tree(copy)
        command = [sys.executable, "-m", "build", "--outdir", str(args.output.resolve()), str(copy)]
        if subprocess.run(command).returncode:
            sys.exit("error: the build failed; it needs: pip install build")
        sources = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    for path in sorted(args.output.glob("echostream-*"), key=lambda path: path.stat().st_mtime)[-2:]:
        missing = missing_from(path, sources)
        if missing:
            sys.exit(f"error: {path} lacks {len(missing)} files, {missing[0]} among them")
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")


def copy_tree(to: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        shutil.copytree(ROOT, to, ignore=IGNORED)
        return
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def missing_from(path: Path, sources: list[str]) -> list[str]:
    """Which of the project's files an archive should hold and does not: a wheel the package and its recipes, a source
    archive all but the files that are git's and the workplace's own (their names begin with a dot)."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            names = set(wheel.namelist())
        wanted = [name for name in sources if name.startswith("echostream/")]
        wanted += [f"echostream/{name}" for name in sources if name.startswith("configs/")]
    else:
        with tarfile.open(path) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        wanted = [name for name in sources if not name.startswith(".") and ".egg-info" not in name]
    return [name for name in wanted if name not in names and ".egg-info" not in name]


if __name__ == "__main__":
    main()
