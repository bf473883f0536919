"""Steps of the corpus as tasks of a Ray cluster: this machine's own. scripts/check_cluster.py kills workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from echostream.data.corpus import cli
from echostream.data.corpus.cluster import rows_in
from echostream.data.corpus.rows import Ledger, read_table
from echostream.text_file import read_json

ray = pytest.importorskip("ray")

from scripts.check_cluster import QUIET, make_cvss  # noqa: E402


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    ray.init(num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}}, logging_level="ERROR",
             log_to_driver=False)  # fmt: skip
    yield
    ray.shutdown()


def test_shards_are_tasks_and_ledgers_say_what_is_done(tmp_path: Path, cluster: None, capfd) -> None:
    make_cvss(tmp_path, 60)
    data = str(tmp_path / "data")
    corpus = ["--cvss", str(tmp_path / "cvss_c_es_en"), "--common-voice", str(tmp_path / "cv" / "es")]
    assert cli.main(["text", "--output", data, *corpus, "--vocab-size", "45"]) == 0
    on_ray = ["--output", data, "--executor", "ray", "--num-shards", "3"]
    for _ in range(2):  # the second time nothing is left to do
        assert cli.main(["speech", "--set", "train", *on_ray]) == 0
    assert "speech train: {'done': 54}" in capfd.readouterr().out
    rows = [line["row"] for path in (tmp_path / "data" / "speech").glob("*.tsv") for line in read_table(path)]
    assert len(rows) == len(set(rows)) == 54 == rows_in(tmp_path / "data", "speech/train.*-of-*.tsv")
    assert read_json(tmp_path / "data" / "steps" / "speech-train.json")["counts"] == {"done": 54}
    # An error meant for the user comes back as one line.
    assert cli.main(["speech", "--set", "dev", "--split", "dev", *on_ray, "--exclude-set", "none"]) == 1
    assert "has no set 'none'" in capfd.readouterr().err


def test_a_shard_that_has_just_begun_is_passed_over(tmp_path: Path) -> None:
    Ledger(tmp_path, "speech", ("id", "audio"), 0, 2).append([("a", "a.wav")])
    (tmp_path / "speech.1-of-2.tsv").touch()
    assert list(Ledger(tmp_path, "speech", ("id", "audio")).read()) == ["a"]
