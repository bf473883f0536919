"""Checkpoint directories: what is saved comes back, and what is broken is refused in one line."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from echostream.checkpoint import load_bundle, save_bundle  # noqa: E402
from echostream.checkpoint.fairseq import average_checkpoints  # noqa: E402
from echostream.errors import CheckpointError, ConfigError, EchoStreamError, ManifestError  # noqa: E402
from echostream.models.echostream_model import build_echostream_model  # noqa: E402
from echostream.weights import read_weights  # noqa: E402
from tests.conftest import NUM_UNITS, PIECES, tiny_config  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_bundle_comes_back(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    assert (bundle.source_lang, bundle.target_lang, bundle.unit_count) == ("es", "en", NUM_UNITS)
    assert len(bundle.source_dict) == PIECES + 1 and bundle.policy == {"chunk_ms": 320, "speech_gate": False}
    assert not bundle.model.training and next(bundle.model.parameters()).dtype == torch.float32
    assert bundle.vocoder is not None and len(bundle.digest) == 64
    stored = torch.load(tiny_bundle / "model.pt", weights_only=True)["model"]
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    with torch.no_grad():
        out = bundle.model(torch.randn(1, 80, 80), torch.tensor([80]), torch.tensor([[2, 5, 6]]))
    assert out["mt_logits"].shape == (1, 3, PIECES + 1)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def truncate(name: str) -> Callable[[Path], None]:
    def breakage(bundle: Path) -> None:
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(data[: len(data) // 2])

    return breakage


def poison(name: str) -> Callable[[Path], None]:
    return lambda bundle: torch.save({"format": "echostream/1", "model": Malicious()}, bundle / name)


def remove(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).write_text(text)


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def breakage(bundle: Path) -> None:
        text = (bundle / name).read_text()
        assert old in text
        (bundle / name).write_text(text.replace(old, new))

    return breakage


@pytest.mark.parametrize(
    ("breakage", "error", "message"),
    [
        pytest.param(truncate("model.pt"), CheckpointError, "model.pt is damaged", id="truncated-model"),
        pytest.param(write("model.pt", ""), CheckpointError, "model.pt is empty", id="empty-model"),
        pytest.param(write("model.pt", "weights"), CheckpointError, "model.pt is damaged", id="text-as-model"),
        pytest.param(poison("model.pt"), CheckpointError, "would run code; it was refused", id="malicious-model"),
        pytest.param(poison("vocoder.pt"), CheckpointError, "vocoder.pt", id="malicious-vocoder"),
        pytest.param(truncate("vocoder.pt"), CheckpointError, "vocoder.pt", id="truncated-vocoder"),
        pytest.param(remove("vocoder.pt"), CheckpointError, "vocoder.pt does not exist", id="no-vocoder-weights"),
        pytest.param(remove("vocoder.json"), EchoStreamError, "vocoder.json", id="no-vocoder-config"),
        pytest.param(remove("model.pt"), CheckpointError, "model.pt does not exist", id="no-model"),
        pytest.param(remove("config.yaml"), CheckpointError, "config.yaml does not exist", id="no-config"),
        pytest.param(remove("dict.tgt.txt"), ManifestError, "dict.tgt.txt does not exist", id="no-dictionary"),
        pytest.param(remove("gcmvn.npz"), ManifestError, "gcmvn.npz does not exist", id="no-cmvn"),
        pytest.param(write("config.yaml", "a: [b"), CheckpointError, "config.yaml is not YAML", id="broken-config"),
        pytest.param(write("config.yaml", "format: x/9"), CheckpointError, "is of format 'x/9'", id="other-format"),
        pytest.param(
            edit("config.yaml", "encoder_layers: 2", "encoder_layer: 2"), ConfigError, "encoder_layer", id="unknown-key"
        ),
        pytest.param(
            edit("config.yaml", "encoder_layers: 2", "encoder_layers: 3"), CheckpointError, "encoder", id="other-model"
        ),
        pytest.param(
            edit("dict.src.txt", "madeupword0000 0\n", ""), ManifestError, "has 38 symbols", id="short-source-dict"
        ),
        pytest.param(
            edit("dict.tgt.txt", "madeupword0000 0\n", "foo 1\nbar 0\n"),
            ManifestError, "has 40 symbols", id="long-dict",
        ),
        pytest.param(write("dict.unit.txt", "0 1\n1 1\n"), ManifestError, "dict.unit.txt has 6 symbols", id="units"),
    ],
)  # fmt: skip
def test_broken_bundles(
    bundle: Path, breakage: Callable, error: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle)
    breakage(bundle)
    with pytest.raises(error, match=message) as caught:
        load_bundle(bundle)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not (bundle / "owned").exists()


def test_missing_directory_and_device(tiny_bundle: Path) -> None:
    with pytest.raises(CheckpointError, match="directory /no/such does not exist"):
        load_bundle("/no/such")
    with pytest.raises(CheckpointError, match="device 'abacus' cannot be used"):
        load_bundle(tiny_bundle, device="abacus")


def test_export_refuses_dictionaries_of_another_model(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(mt_vocab_size=99)
    with pytest.raises(ManifestError, match="39 symbols .* asks for 99"):
        save_bundle(tmp_path, build_echostream_model(config).state_dict(), config, tiny_data)


def fairseq_checkpoint(path: Path, scale: float) -> Path:
    """What fairseq-train writes for the tiny model, every weight being ``scale``."""
    state = {k: torch.full_like(v, scale) for k, v in build_echostream_model(tiny_config()).state_dict().items()}
    arguments = argparse.Namespace(**tiny_config().to_dict(), arch="echostream")
    for size in ("asr_vocab_size", "st_vocab_size", "mt_vocab_size", "num_units"):
        delattr(arguments, size)  # fairseq's arguments leave these to the dictionaries
    torch.save({"model": state, "cfg": {"model": arguments}, "args": None}, path)
    return path


def test_average_of_checkpoints(tmp_path: Path) -> None:
    paths = [fairseq_checkpoint(tmp_path / f"{i}.pt", value) for i, value in enumerate((1.0, 2.0, 4.5))]
    state, config = average_checkpoints(paths)
    assert config.encoder_layers == 2
    assert all(torch.allclose(v, torch.full_like(v, 2.5)) for v in state.values() if v.is_floating_point())
    state, _ = average_checkpoints(paths[1:], [0.8, 0.2], ["encoder", "asr_head"])
    assert all(
        torch.allclose(v, torch.full_like(v, 2.5 if k.startswith(("encoder.", "asr_head.")) else 2.0))
        for k, v in state.items() if v.is_floating_point()
    )  # fmt: skip
    with pytest.raises(ConfigError, match="2 checkpoints need as many shares, adding up to 1"):
        average_checkpoints(paths[1:], [0.8, 0.3])
    with pytest.raises(ConfigError, match="no part 'voice'; it has asr_head, encoder"):
        average_checkpoints(paths, parts=["encoder", "voice"])
    torch.save({"model": {"other": torch.zeros(1)}, "cfg": None}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="of another model"):
        average_checkpoints([paths[0], tmp_path / "other.pt"])
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no 'model'"):
        average_checkpoints([tmp_path / "list.pt"])


def test_export_script(tiny_data: Path, tmp_path: Path) -> None:
    first, second = (fairseq_checkpoint(tmp_path / f"{i}.pt", 0.5 * i) for i in (1, 2))
    command = [sys.executable, "scripts/export_checkpoint.py", "--data", str(tiny_data)]
    command += ["--output", str(tmp_path / "out"), "--policy", "lagging_k1=2", "--checkpoint"]
    run = dict(cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    done = subprocess.run([*command, str(first), str(second)], **run)
    assert done.returncode == 0, done.stderr
    bundle = load_bundle(tmp_path / "out")
    assert bundle.policy == {"lagging_k1": 2} and bundle.vocoder is None
    assert bundle.model.asr_head.state_dict().popitem()[1].flatten()[0] == 0.75
    done = subprocess.run([*command, str(tmp_path / "none.pt")], **run)
    assert done.returncode == 1 and done.stderr == f"error: checkpoint {tmp_path / 'none.pt'} does not exist\n"


def test_weights_of_a_malicious_fairseq_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "cfg": Malicious()}, "bad.pt")
    with pytest.raises(CheckpointError, match="system.* would run code"):
        read_weights("bad.pt")
    assert not Path("owned").exists()
