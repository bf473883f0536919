"""The units' report: purities by hand, bit rates of known sequences, an alignment whose truth is known."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile

from echostream.units.align import SILENCE, align, phone_states
from echostream.units.report import bit_rate, entropy, purity


def test_purity_by_hand():
    units = np.array([7, 7, 7, 2, 2, 2, 2, 9])
    labels = np.array(list("aabbbbaa"))
    got = purity(units, labels)
    assert got["phone_purity"] == pytest.approx((2 + 3 + 1) / 8)
    assert got["cluster_purity"] == pytest.approx((2 + 3) / 8)
    given = 3 / 8 * entropy(np.array([2, 1])) + 4 / 8 * entropy(np.array([3, 1]))  # of a label whose cluster is known
    assert got["pnmi"] == pytest.approx(1 - given)


def test_purity_at_its_ends():
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert purity(labels + 5, labels) == pytest.approx({"phone_purity": 1, "cluster_purity": 1, "pnmi": 1})
    assert purity(np.zeros(6, int), labels)["pnmi"] == pytest.approx(0)
    assert purity(np.arange(6), labels)["cluster_purity"] == pytest.approx(0.5)


def test_bit_rate():
    rows = [np.array([3] * 25 + [1] * 25), np.array([0] * 25 + [2] * 25)]
    got = bit_rate(rows, 8)
    assert got["used"] == 4 and got["hours"] == pytest.approx(2 / 3600)
    assert (got["units_per_second"], got["runs_per_second"]) == (50, 2)
    assert got["bits_per_second"] == pytest.approx(100) and got["bits_per_second_runs"] == pytest.approx(4)
    assert got["bits_per_second_fixed"] == pytest.approx(150) and got["bits_per_second_runs_fixed"] == pytest.approx(6)


def test_states():
    names, skip = phone_states("ˈhɛ lˌoʊ,")
    assert names == [SILENCE, "h", "ɛ", SILENCE, "l", "o", "ʊ", SILENCE]
    assert skip.tolist() == [name == SILENCE for name in names]


def test_alignment_finds_the_boundaries():
    """Phones as far-apart Gaussians, drawn for random lengths: almost every frame must get its phone."""
    rng = np.random.default_rng(1)
    phones = [SILENCE, *"abcdef"]
    means = {name: rng.normal(0, 3, 6) for name in phones}
    features, states, truth = [], [], []
    for _ in range(60):
        names, skip = phone_states(" ".join("".join(rng.choice(phones[1:], 4)) for _ in range(3)))
        lengths = [int(rng.integers(0, 4)) if name == SILENCE else int(rng.integers(2, 9)) for name in names]
        truth.append(np.repeat(names, lengths))
        features.append(np.stack([means[name] for name in truth[-1]]) + rng.normal(0, 0.5, (len(truth[-1]), 6)))
        states.append((names, skip))
    features.append(features[0][:3])  # too short for its phones
    states.append(states[0])
    found = align(features, states)
    assert found[-1] is None
    assert np.mean(np.concatenate(found[:-1]) == np.concatenate(truth)) > 0.95


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
@pytest.mark.parametrize("compare", [False, True])
def test_the_command(tmp_path, compare, capsys):
    from echostream.commands import unit_report

    rng = np.random.default_rng(1)
    (tmp_path / "target").mkdir()
    units, manifest = ["id\taudio\tunits\tdurations"], ["id\ttgt_text\ttarget"]
    for name in ("one", "two", "three"):
        soundfile.write(tmp_path / "target" / f"{name}.wav", rng.normal(0, 0.1, 50 * 320), 16000)
        units.append(f"{name}\t{name}.wav\t1 4 2\t10 30 10")
        manifest.append(f"x-{name}\tGood day.\t{name}")
    (tmp_path / "target" / "units.tsv").write_text("\n".join(units) + "\n")
    (tmp_path / "test.tsv").write_text("\n".join(manifest) + "\n")
    more = ["--compare", "4", "--features", "mfcc", "--steps", "2"] if compare else []
    unit_report.main([str(tmp_path), "--json", *more])
    ((name, figures),) = json.loads(capsys.readouterr().out).items()
    assert name == ("mfcc 4" if compare else "units.tsv")
    assert figures["recordings"] == 3 and 0 < figures["phone_purity"] <= 1
    if not compare:
        assert figures["used"] == 3 and figures["runs_per_second"] == 3
