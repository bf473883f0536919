"""The work-arounds do what they say, and never by switching a safety off."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from echostream import compat

ROOT = Path(__file__).resolve().parents[1]

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")


def _in_fresh_interpreter(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_torchaudio_imports_beside_this_torch() -> None:
    pytest.importorskip("soundfile")
    code = (
        "from echostream.compat import import_torchaudio as load\n"
        "first = load(); import torchaudio, torchaudio.compliance.kaldi as kaldi, torch\n"
        "assert first is torchaudio is load()\n"
        "print(tuple(kaldi.fbank(torch.zeros(1, 1600), num_mel_bins=80).shape))"
    )
    assert _in_fresh_interpreter(code) == "(8, 80)"


def test_fairseq_style_checkpoint_loads_weights_only() -> None:
    compat.apply()
    compat.apply()  # a second call changes nothing
    buffer = io.BytesIO()
    torch.save({"args": argparse.Namespace(arch="echostream"), "best": numpy.float64(1.5)}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["args"].arch == "echostream" and loaded["best"] == 1.5


class _Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_malicious_checkpoint_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compat.apply()
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Malicious()}, "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load("checkpoint.pt", weights_only=True)
    assert not (tmp_path / "owned").exists()


def test_plugin_registers_although_already_imported() -> None:
    pytest.importorskip("fairseq")
    code = (
        "import echostream\n"
        "from echostream.plugin import register_with_fairseq as register\n"
        "register(); register()\n"
        "from fairseq.models import ARCH_MODEL_REGISTRY; from fairseq.tasks import TASK_REGISTRY\n"
        "print('echostream' in ARCH_MODEL_REGISTRY, 'echostream_s2st' in TASK_REGISTRY)"
    )
    assert _in_fresh_interpreter(code).splitlines()[-1] == "True True"


def test_package_import_is_light() -> None:
    code = (
        "import sys, echostream, echostream.compat\n"
        "print([m for m in ('torch', 'fairseq', 'torchaudio', 'numpy', 'simuleval') if m in sys.modules])"
    )
    assert _in_fresh_interpreter(code) == "[]"


@glibc
def test_freed_memory_is_kept() -> None:
    """Large tensors are faulted in once, not at every allocation."""
    code = (
        "import resource, torch; from echostream.memory import keep_freed_memory\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def work():\n"
        "    before = faults(); [torch.ones(40 << 20, dtype=torch.uint8) for _ in range(8)]; return faults() - before\n"
        "work(); usual = work(); kept = keep_freed_memory(); print(kept, sum(work() for _ in range(8)) <= 4 * usual)"
    )
    assert _in_fresh_interpreter(code) == "True True"


@glibc
def test_freed_memory_goes_back() -> None:
    """A block that lives on does not keep those before it, not even after a large one has been freed."""
    code = (
        "import numpy as np; from echostream.memory import return_freed_memory; given = return_freed_memory()\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "np.ones(30 << 20, np.uint8); before = resident()\n"
        "blocks = [np.ones(2 << 20, np.uint8) for _ in range(50)]; del blocks[:-1]\n"
        "print(given, resident() - before < 10 << 20)"
    )
    assert _in_fresh_interpreter(code) == "True True"


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="about Linux's huge pages")
def test_huge_pages_for_what_came_meanwhile() -> None:
    """Memory from before is left alone, new memory is advised; its contents stay."""
    code = (
        "import ctypes, mmap; from echostream import memory\n"
        "def advised(memory):\n"
        "    at = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + len(memory) // 2\n"
        "    for line in open('/proc/self/smaps'):\n"
        "        start, dash, end = line.split()[0].partition('-')\n"
        "        if dash: inside = int(start, 16) <= at < int(end, 16)\n"
        "        if line.startswith('VmFlags') and inside: return 'hg' in line.split()\n"
        "def allocate(letter):\n"
        "    memory = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE); memory.write(letter * len(memory))\n"
        "    return memory\n"
        "old = allocate(b'a')\n"
        "with memory.huge_pages(): new = allocate(b'b')\n"
        "print(advised(old), advised(new), set(old[:]) == {97}, set(new[:]) == {98})"
    )
    assert _in_fresh_interpreter(code) == "False True True True"
