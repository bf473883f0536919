"""What ``make samples`` and the pictures' script write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from echostream.audio.io import load_audio
from echostream.errors import EchoStreamError, OutputError
from echostream.evaluation import pictures
from echostream.evaluation.samples import on_the_clock
from echostream.streaming import Waveform
from scripts import make_pictures, make_samples

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "echostream" / "assets" / "demo"


def test_samples_of_any_model(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    make_samples.main([str(DEMO / "02.ogg"), "--checkpoint-dir", str(tiny_bundle), "--output", str(out)])
    page = (out / "README.md").read_text(encoding="utf-8")
    source, output = load_audio(out / "02-source.opus"), load_audio(out / "02-output.opus")
    assert abs(len(source) - len(load_audio(DEMO / "02.ogg"))) < 400 and len(output) > 0
    assert (out / "02.png").read_bytes()[:4] == b"\x89PNG" and "first word after" in page
    for name in ("02-source.opus", "02-output.opus", "02.png"):
        assert f"({name})" in page
    assert sum(path.stat().st_size for path in out.glob("*.opus")) < 60_000
    with pytest.raises(OutputError):
        make_samples.main([str(out / "02-source.opus"), str(DEMO / "02.ogg"), "--checkpoint-dir", str(tiny_bundle),
                           "--output", str(out)])  # fmt: skip


def test_speech_lies_where_it_is_played() -> None:
    waves = [Waveform(sentence=0, source_time_s=t, samples=np.ones(160, np.float32), sample_rate=16000) for t in (0, 1)]
    track = on_the_clock(waves, [0.5, 1.0])
    assert len(track) == 16160 and np.flatnonzero(track)[[0, 160]].tolist() == [8000, 16000]
    assert len(on_the_clock([], [])) == 0


def test_the_flow_follows_from_the_recipes(tmp_path: Path) -> None:
    recipes = [str(path) for path in (ROOT / "configs" / "scratch").glob("*.yaml")]
    make_pictures.main(["flow", *recipes, "-o", str(tmp_path / "flow.svg")])
    found = pictures.phases([Path(path) for path in recipes if "ablations" not in path], "fr-en")
    assert found["asr"] == [] and found["speech"] == ["asr"] and set(found["units"]) == {"speech", "text"}
    assert found["own"] == ["units"]
    assert all(f">{name}<" in (tmp_path / "flow.svg").read_text() for name in found)


def test_curves_and_sweeps_become_pictures(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(
        "x | INFO | train_inner | epoch 001: 25 / 69 loss=11.0, num_updates=25\n"
        "x | INFO | dev | epoch 001 | valid on 'dev' subset | loss 7.6 | bleu 1.5 | num_updates 40\n"
        "x | INFO | dev | epoch 002 | valid on 'dev' subset | loss 6.1 | bleu 12.25 | num_updates 80\n"
    )
    assert pictures.reported(log.read_text().splitlines(), "bleu") == [(40, 1.5), (80, 12.25)]
    assert pictures.reported(log.read_text().splitlines(), "loss", "training") == [(25, 11.0)]
    make_pictures.main(["curve", f"speech={log}", "-o", str(tmp_path / "curve.svg")])
    with pytest.raises(EchoStreamError, match="no validation with the figure 'wer'"):
        make_pictures.main(["curve", f"speech={log}", "--measure", "wer", "-o", str(tmp_path / "no.svg")])
    points = [{"policy": "ctc", "figures": {"AL": 1000.0 + i, "BLEU": 20.0 + i}} for i in range(3)]
    (tmp_path / "sweep.json").write_text(json.dumps({"title": "three points", "points": points}))
    make_pictures.main(["quality", str(tmp_path), "-o", str(tmp_path / "quality.svg")])
    for name, text in (("curve", "speech"), ("quality", "AL, seconds")):
        assert text in (tmp_path / f"{name}.svg").read_text()
