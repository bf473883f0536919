"""Ablations: real trainings of tiny arms, in this process; what they share, how they go on, and the table."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("fairseq")
pytest.importorskip("sacrebleu")
pytest.importorskip("jiwer")

import itertools

from echostream.commands import ablate, training_runs
from echostream.config import EchoStreamConfig
from echostream.errors import ConfigError, EchoStreamError
from echostream.evaluation.ablation import compare, table
from tests.test_generate import fairseq
from tests.training_data import TINY_MODEL, make_corpus

SHIPPED = Path(__file__).resolve().parents[1] / "configs/scratch/ablations.yaml"
FLAGS = dict(
    arch="echostream", optimizer="adam", lr=0.003, lr_scheduler="polynomial_decay", total_num_update=100,
    warmup_updates=50, max_tokens=400, cpu=True, num_workers=0, valid_subset="dev", join_probability=0.0, seed=1,
    data="elsewhere", save_dir="elsewhere", **TINY_MODEL,
)  # fmt: skip
PLAN = dict(
    steps=dict(
        asr=dict(config="flags.yaml", share=0.5, flags={"st-weight": 0, "mt-weight": 0, "unit-weight": 0}),
        joint=dict(config="flags.yaml", share=1.0, flags={"encoder-init": "other"}, start={"encoder-init": "asr"}),
    ),
    subsets=dict(train_few={"from": "train", "match": r"/train[0-5]\.wav"}),
    groups=dict(
        small=dict(
            steps=["asr", "joint"],
            measures=["WER", "BLEU", "UER"],
            arms={
                "reference": None,
                "g-masked": {"step-flags": {"joint": {"mt-visible": "ctc"}}},
                "full-context": {"step-flags": {"joint": {"full-context": True, "train-subset": "train_few"}}},
            },
        )
    ),
    generate={"beam": 1, "max-len-b": 6, "num-workers": 0},
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), train=8)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(FLAGS))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))
    return tmp_path / "plan.yaml"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """fairseq's programs run in this process, for it takes longer to start one; the names of those that were."""
    names: list[str] = []

    def launch(words: list[str], log: Path, watch: Callable = str, cost: dict[str, Any] | None = None) -> None:
        class Lines(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                watch(f"{record.name} | {record.getMessage()}")

        names.append(log.parent.name.rpartition("-")[0])
        log.parent.mkdir(parents=True, exist_ok=True)
        handler, root = Lines(), logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        try:
            fairseq(words[2].removeprefix("fairseq_cli."), list(words[3:]))
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
            if cost is not None:
                cost["cpu_s"] += 30.0

    monkeypatch.setattr(training_runs, "launch", launch)
    return names


def run(plan: Path, corpus: Path, *further: str, updates: str = "2") -> Path:
    folder = plan.parent / "runs"
    ablate.main([
        "--config", str(plan), "--data", str(corpus), "--save-dir", str(folder), "--subset", "dev", "--samples", "20",
        "--updates", updates, "--test-limit", "3", "--table", str(folder / "table.md"), *further,
    ])  # fmt: skip
    return folder


def test_arms_are_trained_decoded_and_compared(plan, corpus, launched, capsys):
    folder = run(plan, corpus)
    assert launched.count("asr") == 1 and launched.count("joint") == 3  # all share the first step
    arms = json.loads((folder / "table.json").read_text())["small"]
    assert list(arms) == list(PLAN["groups"]["small"]["arms"])
    assert arms["reference"]["updates"] == {"asr": 1, "joint": 2} and arms["g-masked"]["cpu_s"] == 60.0
    assert arms["reference"]["validation"]["num_updates"] == 2
    for arm in arms.values():
        assert {"asr_ter", "mt_acc", "uer"} <= set(arm["validation"])
        assert len(Path(arm["results"]).read_text().splitlines()) == 3
        assert set(arm["figures"]) == {"WER", "BLEU", "UER"} and arm["figures"]["UER"]["value"] > 0
    assert "difference" not in arms["reference"]["figures"]["WER"] and "p" in arms["g-masked"]["figures"]["WER"]
    text = (folder / "table.md").read_text()
    assert "### small" in text and "| full-context | full-context True; train-subset train_few | 1 + 2 " in text

    def weights(name: str) -> dict[str, torch.Tensor]:
        step = Path(arms[name]["results"]).parent.name.rpartition("-")[0]
        assert [path.name for path in (folder / "steps" / step).glob("*.pt")] == ["checkpoint_last.pt"]
        return torch.load(folder / "steps" / step / "checkpoint_last.pt", weights_only=True)["model"]

    assert any("summary_proj" in key for key in weights("reference"))
    assert not any("summary_proj" in key for key in weights("full-context"))
    launched.clear()
    assert run(plan, corpus) and launched == []  # nothing is left to do
    capsys.readouterr()
    run(plan, corpus, "--only", "g-masked", "--set", "joint.seed=7", "--dry-run")
    plans = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert plans == [f"{arm}: {step}" for arm in ("reference", "g-masked")
                     for step in ("asr, 1 updates, done", "joint, 2 updates")]  # fmt: skip


def test_one_process_works_in_a_folder(plan, corpus, launched):
    folder = run(plan, corpus, "--dry-run")
    manifest = folder / "data" / f"{ablate.TEST}.tsv"
    before = manifest.read_bytes()
    with ablate.alone(folder), pytest.raises(SystemExit, match="another ablate is at work in .*runs"):
        run(plan, corpus, "--test-limit", "1")
    assert not launched and manifest.read_bytes() == before  # the other process goes on decoding what it was to decode


def test_an_arm_that_fails_does_not_stop_the_others(plan, corpus, launched, capsys):
    values = yaml.safe_load(plan.read_text())
    values["groups"]["small"]["arms"] = {"reference": None, "bad": {"step-flags": {"joint": {"memory-size": -1}}}}
    plan.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(SystemExit, match="not finished: bad; the same command goes on"):
        run(plan, corpus, updates="1")
    assert "bad: memory_size is -1" in capsys.readouterr().err
    assert list(json.loads((plan.parent / "runs/table.json").read_text())["small"]) == ["reference"]


def test_two_jobs_share_steps_and_interrupted_ones_go_on(plan, corpus, monkeypatch):
    """The programs are played: the first training of full-context's second step breaks off once."""
    launched: list[str] = []

    def launch(words: list[str], log: Path, watch: Callable = str, cost: dict[str, Any] | None = None) -> None:
        flags = dict(itertools.pairwise(words))
        time.sleep(0.02)  # long enough for the other thread to come along
        if words[2] == "fairseq_cli.generate":
            row = {"id": "0", "asr": "a b", "asr_ref": "a b", "mt": "a", "mt_ref": "b", "units": [1], "units_ref": [2]}
            log.parent.mkdir(parents=True)
            (log.parent / "generate-ablation_test.jsonl").write_text(json.dumps(row) + "\n")
            return
        folder = Path(flags["--save-dir"])
        folder.mkdir(parents=True, exist_ok=True)
        launched.append(folder.name.partition("-")[0])
        cost["cpu_s"] += 1.5
        if "--full-context" in words and "--encoder-init" in words and launched.count("joint") <= 3:
            raise EchoStreamError("killed")
        watch("train_inner | num_updates=1")
        (folder / "checkpoint_last.pt").touch()

    monkeypatch.setattr(training_runs, "launch", launch)
    with pytest.raises(SystemExit, match="not finished: full-context;"):
        run(plan, corpus, "--jobs", "2")
    assert launched.count("asr") == 1 and launched.count("joint") == 3
    folder = run(plan, corpus, "--jobs", "2")
    assert launched.count("asr") == 1 and launched.count("joint") == 4
    arms = json.loads((folder / "table.json").read_text())["small"]
    assert [arm["cpu_s"] for arm in arms.values()] == [3.0, 3.0, 4.5]


def test_minutes_become_updates(plan, corpus, launched, capsys, monkeypatch):
    times = iter(range(0, 10_000, 3))  # a clock by which every update takes three seconds
    monkeypatch.setattr(ablate.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(training_runs, "fairseq", lambda tool, flags, data: ["", "", tool, flags["save-dir"]])

    def launch(words: list[str], log: Path, watch: Callable) -> None:
        launched.append(log.parent.name)
        for update in range(ablate.TIMED_UPDATES):
            watch(f"train_inner | num_updates={update}")

    monkeypatch.setattr(training_runs, "launch", launch)
    for _ in range(2):
        arguments = ["--config", plan, "--data", corpus, "--save-dir", plan.parent / "runs", "--minutes", 2]
        ablate.main([*map(str, arguments), "--subset", "dev", "--dry-run"])
        updates = re.findall(r"reference: (\w+), (\d+) updates", capsys.readouterr().out)
        assert updates == [("asr", "20"), ("joint", "40")]
    assert launched == ["asr", "joint"]  # timed once


def test_every_shipped_arm_is_a_command_of_fairseq(corpus, tmp_path, capsys):
    """Flags that exist, values that go together; arms differ in what they are to show and share what they can."""
    from fairseq import options

    data = tmp_path / "data"
    ablate.main(["--config", str(SHIPPED), "--data", str(corpus), "--save-dir", str(tmp_path), "--updates", "1000",
                 "--subset", "dev", "--dry-run"])  # fmt: skip
    commands: dict[str, list[str]] = defaultdict(list)
    for name, words in re.findall(r"^(\S+): .*\n    fairseq-train (.*)$", capsys.readouterr().out, re.MULTILINE):
        commands[name].append(words)
    for lines in commands.values():
        for words in lines:
            args = options.parse_args_and_arch(options.get_training_parser(), words.split())
            config = EchoStreamConfig.from_args(args)
            assert args.data == str(data) and args.max_update in (150, 300, 550, 850, 1000)
            assert config.units_read_text or config.ctc_upsample_ratio == 5
    assert len({tuple(lines) for lines in commands.values()}) == len(commands) == 17
    assert commands["asr-first"][0] == commands["g-masked"][0] == commands["reference"][0]
    assert "--encoder-init" not in commands["all-at-once"][0]
    assert "--encoder-init" in commands["warm-decoders"][2] and "--decoder-init" in commands["warm-decoders"][2]


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({}, ["--only", "none"], "--only 'none' is no arm of .*; the arms are reference"),
        ({}, ["--set", "lr"], "--set 'lr' is not of the form"),
        ({"reference": {"steps": ["units"]}}, [], "has no step 'units'; its steps are asr, joint"),
        ({"reference": {"flag": {}}}, [], "arm reference: unknown key 'flag'"),
    ],
)
def test_mistakes_are_named(plan, corpus, change, flags, message):
    values = yaml.safe_load(plan.read_text())
    values["groups"]["small"]["arms"] |= change
    plan.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(SystemExit, match=message):
        run(plan, corpus, *flags)


def test_a_command_is_watched_and_its_cost_counted(tmp_path):
    seen, cost = [], {"wall_s": 1.0, "cpu_s": 1.0}
    program = "import sys; print('one'); x = sum(range(3_000_000)); print('two', file=sys.stderr); sys.exit({})"
    training_runs.launch([sys.executable, "-c", program.format(0)], tmp_path / "a/log", seen.append, cost)
    assert seen == ["one\n", "two\n"] and cost["wall_s"] > 1.0 and cost["cpu_s"] > 1.0
    with pytest.raises(EchoStreamError, match="ended with status 3 .*log.*two"):
        training_runs.launch([sys.executable, "-c", program.format(3)], tmp_path / "a/log", seen.append, cost)
    assert (tmp_path / "a/log").read_text().split() == ["one", "two"] * 2


def test_figures_and_table():
    def rows(text: str, units: list[int]) -> list[dict[str, Any]]:
        row = {"mt": text, "mt_ref": "one two three four five", "units": units, "units_ref": [1, 2, 3, 4]}
        return [{"id": str(i), **row} for i in range(9)]

    right, wrong = rows("one two three four five", [1, 2, 3, 4]), rows("one two three four", [1, 2, 9, 4])
    figures = compare({"a": right, "b": wrong, "c": right[::-1]}, ["BLEU", "UER"], samples=50)
    assert figures["a"] == {"BLEU": {"value": pytest.approx(100), "ci": 0}, "UER": {"value": 0.0}}
    assert figures["b"]["UER"] == {"value": 25.0, "difference": 25.0}
    assert figures["b"]["BLEU"]["difference"] < -10 and figures["b"]["BLEU"]["p"] < 0.05
    assert figures["c"]["BLEU"]["difference"] == 0 and figures["c"]["BLEU"]["p"] == 1.0
    about = {"about": "", "updates": {"asr": 3, "joint": 4}, "cpu_s": 90.0}
    assert table({name: {**about, "figures": figures[name]} for name in "ac"}).splitlines()[2:] == [
        "| a   |            | 3 + 4   | 1.5     | 100.00                  | 0.00         |",
        "| c   |            | 3 + 4   | 1.5     | 100.00 (+0.00, p 1.000) | 0.00 (+0.00) |",
    ]
    with pytest.raises(ConfigError, match="there is no measure 'TER'; there are WER"):
        compare({"a": right}, ["TER"], samples=5)
