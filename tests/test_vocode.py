"""``echostream vocode``: unit files become speech; what cannot be spoken is named in one line."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import soundfile

torch = pytest.importorskip("torch")

from echostream.cli import main  # noqa: E402
from echostream.models.decoders.vocoder import CodeHiFiGAN  # noqa: E402
from echostream.models.decoders.vocoder_checkpoint import load_vocoder, save_vocoder  # noqa: E402

from .conftest import NUM_UNITS, tiny_voice  # noqa: E402

ROWS = [[3, 17, 5, 5, 9], [1, 2]]


def vocode(*arguments: object) -> int:
    return main(["vocode", *map(str, arguments), "--quiet"])


def read(path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == 16000
    return samples


@pytest.fixture
def units(tmp_path):
    path = tmp_path / "units.txt"
    path.write_text("\n".join(" ".join(map(str, row)) for row in ROWS) + "\n")
    return path


@pytest.fixture
def expected(tiny_bundle) -> list[np.ndarray]:
    model = load_vocoder(tiny_bundle / "vocoder.pt", tiny_bundle / "vocoder.json")
    with torch.no_grad():
        return [model(torch.tensor([row]))[0][0].numpy() for row in ROWS]


def test_one_recording_with_pauses(tiny_bundle, units, expected, tmp_path):
    assert vocode(units, "-o", tmp_path / "out.wav", "--vocoder", tiny_bundle, "--pause", 0.1) == 0
    wanted = np.concatenate([expected[0], np.zeros(1600, np.float32), expected[1]])
    got = read(tmp_path / "out.wav")
    assert got.shape == wanted.shape and np.abs(got - wanted).max() < 1e-4


def test_recordings_of_their_own_from_standard_input(tiny_bundle, units, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(units.read_text()))
    assert vocode("-", "-o", f"{tmp_path}/spoken/", "--vocoder", tiny_bundle / "vocoder.pt") == 0
    for number, wanted in enumerate(expected, 1):
        assert np.abs(read(tmp_path / "spoken" / f"{number:04d}.wav") - wanted).max() < 1e-4


def test_durations(tiny_bundle, units, tmp_path):
    (tmp_path / "durations.txt").write_text("2 3 1 1 4\n5 6\n")
    common = ("--vocoder", tiny_bundle, "--pause", 0)
    assert vocode(units, "-o", tmp_path / "a.wav", "--durations", tmp_path / "durations.txt", *common) == 0
    assert len(read(tmp_path / "a.wav")) == (11 + 11) * 320
    assert vocode(units, "-o", tmp_path / "b.wav", "--repeated", *common) == 0
    assert len(read(tmp_path / "b.wav")) == 7 * 320


def test_speakers_sound_different(units, tmp_path):
    config = {**tiny_voice().to_dict(), "multispkr": "from_input_file", "num_speakers": 3, "model_in_dim": 32}
    torch.manual_seed(1)
    save_vocoder(CodeHiFiGAN(config), tmp_path / "v.pt", tmp_path / "v.json")
    for speaker in (0, 2):
        out = tmp_path / f"{speaker}.wav"
        assert vocode(units, "-o", out, "--vocoder", tmp_path / "v.pt", "--speaker", speaker, "--repeated") == 0
    assert np.abs(read(tmp_path / "0.wav") - read(tmp_path / "2.wav")).max() > 1e-3


def test_the_shipped_voice(tmp_path):
    (tmp_path / "u.txt").write_text("5 999 17\n")
    assert vocode(tmp_path / "u.txt", "-o", tmp_path / "out.flac") == 0
    assert len(read(tmp_path / "out.flac")) >= 3 * 320


@pytest.mark.parametrize(
    ("text", "extra", "says"),
    [
        (f"1 2\n3 {NUM_UNITS}\n", (), f"line 2: unit {NUM_UNITS} .*out of range; .* 0..{NUM_UNITS - 1}"),
        ("1 2\n\n3\n", (), "line 2 is empty"),
        ("\n", (), "is empty"),
        ("1 x\n", (), "'x' is no unit id"),
        ("1 -2\n", (), "'-2' is no unit id"),
        ("1 2\n", ("--durations", "short.txt"), "line 1: 2 units with 1 durations"),
        ("1 2\n3\n", ("--durations", "short.txt"), "has 1 lines, .* has 2"),
        ("1 2\n", ("--pause", "-1"), "--pause is -1"),
        ("1 2\n", ("-o", "out.xyz"), "out.xyz has no suffix"),
        ("1 2\n", ("--vocoder", "absent"), "absent"),
        ("1 2\n", ("--config", "absent.json"), "absent.json does not exist"),
        ("1 2\n", ("--config", "keyless.json"), "keyless.json: .*no key 'upsample_rates'"),
        ("1 2\n", ("--config", "fast.json"), "sampling_rate is 22050"),
        (None, (), "cannot be read"),
    ],
)
def test_refusals_are_one_line(text, extra, says, tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "units.txt").write_text(text)
    (tmp_path / "short.txt").write_text("4\n")
    values = tiny_voice().to_dict()
    (tmp_path / "fast.json").write_text(json.dumps({**values, "sampling_rate": 22050}))
    del values["upsample_rates"]
    (tmp_path / "keyless.json").write_text(json.dumps(values))
    assert vocode("units.txt", "-o", "out.wav", "--vocoder", tiny_bundle, *extra) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(says, said), said
