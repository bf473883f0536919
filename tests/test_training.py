"""Criterion, task and whole fairseq-train runs on a tiny corpus of tones."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq")

from echostream import plugin
from echostream.constants import NUM_SPECIALS
from echostream.data.config import DataConfig
from echostream.data.dataset import Augmentation, SpeechToSpeechDataset
from echostream.data.joining import JoinPolicy
from echostream.errors import CheckpointError, ConfigError, EchoStreamError, ManifestError
from tests.training_data import TINY_MODEL, make_corpus, tiny_flags

plugin.register_with_fairseq()

from echostream.criterions.multitask_criterion import MultitaskCriterion  # noqa: E402
from echostream.criterions.visibility import expected_counts, heard_when_due  # noqa: E402
from echostream.models.echostream_encoder import EchoStreamEncoder  # noqa: E402
from echostream.models.echostream_model import EchoStreamConfig, SentenceWindows, build_echostream_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def fairseq_train(data: Path, save_dir: Path, **changes: object) -> None:
    """fairseq-train in this process."""
    from fairseq import checkpoint_utils, options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.logging import metrics
    from fairseq_cli import train

    metrics.reset()
    vars(checkpoint_utils.save_checkpoint).pop("best", None)  # of another run in this process
    args = options.parse_args_and_arch(options.get_training_parser(), tiny_flags(data, save_dir, **changes))
    train.main(convert_namespace_to_omegaconf(args))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


class Task:
    """What the criterion wants of a task."""

    target_dictionary = None


@pytest.fixture(scope="module")
def parts(corpus):
    """A tiny model in fp64 and the training split, joined."""
    config = DataConfig.load(corpus)
    join = Augmentation(join=JoinPolicy(max_frames=600))
    data = SpeechToSpeechDataset(corpus / "train.tsv", config, join, seed=2)
    sizes = dict(asr_vocab_size=len(config.source.vocabulary), num_units=config.num_units)
    sizes.update(st_vocab_size=len(config.target.vocabulary), mt_vocab_size=len(config.target.vocabulary))
    torch.manual_seed(0)
    model = build_echostream_model(EchoStreamConfig(**TINY_MODEL, **sizes, dropout=0.0, attention_dropout=0.0,
                                                    activation_dropout=0.0)).double()  # fmt: skip
    return model, data


def batch(data, indices):
    sample = data.collater([data[i] for i in indices])
    sample["net_input"]["src_tokens"] = sample["net_input"]["src_tokens"].double()
    return sample


# --- criterion


@pytest.mark.parametrize("options", [{}, {"sentence_avg": True}, {"unit_loss": "ce"}], ids=str)
def test_losses_do_not_depend_on_the_batch(parts, options):
    model, data = parts
    criterion = MultitaskCriterion(Task(), **options).train()
    model.train()
    whole, size, log = criterion(model, batch(data, range(len(data))))
    single = [criterion(model, batch(data, [i])) for i in range(len(data))]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _, _ in single), rel=1e-5)
    assert size == sum(n for _, n, _ in single)
    for key in ("_asr_nll", "_st_nll", "_mt_nll", "_unit_nll", "_unit_tokens", "_mt_correct", "ntokens"):
        assert float(log[key]) == pytest.approx(sum(float(entry[key]) for _, _, entry in single), rel=1e-5), key


def test_weights_and_their_sum(parts):
    model, data = parts
    sample = batch(data, [0, 1])
    values = {}
    for part in ("asr", "st", "mt", "unit"):
        chosen = {f"{name}_weight": float(name == part) for name in ("asr", "st", "mt", "unit")}
        values[part], _, log = MultitaskCriterion(Task(), **chosen).train()(model, sample)
        assert {key for key in log if key.endswith("_nll")} == {f"_{part}_nll"}
    whole, _, _ = MultitaskCriterion(Task()).train()(model, sample)
    expected = 0.3 * values["asr"] + 0.3 * values["st"] + 0.2 * values["mt"] + 0.2 * values["unit"]
    assert whole.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_part_without_weight_gets_no_gradient(parts):
    model, data = parts
    model.zero_grad()
    criterion = MultitaskCriterion(Task(), asr_weight=1, st_weight=0, mt_weight=0, unit_weight=0).train()
    criterion(model, batch(data, [0]))[0].backward()
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"encoder", "asr_head"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mt_weight": -1.0}, "--mt-weight is -1.0"),
        ({"asr_weight": 0, "st_weight": 0, "mt_weight": 0, "unit_weight": 0}, "all four loss weights are 0"),
        ({"label_smoothing": 1.0}, "--label-smoothing is 1.0"),
        ({"mt_visible": "ctc", "st_weight": 0}, "--mt-visible ctc follows the ST CTC"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        MultitaskCriterion(Task(), **options)


def test_too_long_units_are_counted_and_stop_the_training(parts):
    model, data = parts
    sample = batch(data, [0, 1])
    sample["units"] = (torch.arange(2000) % 20 + NUM_SPECIALS).expand(len(sample["target"]), -1).contiguous()
    sample["unit_lengths"][:] = 2000
    criterion = MultitaskCriterion(Task()).train()
    loss, _, log = criterion(model, sample)
    assert torch.isfinite(loss) and log["_unit_too_long"] == len(sample["target"])
    with pytest.raises(ManifestError, match=r"of the last \d+ unit targets are longer .* raise --ctc-upsample-ratio"):
        for _ in range(1000):
            criterion._watch_lengths(1, 20)
    criterion = MultitaskCriterion(Task()).train()
    for _ in range(1000):
        criterion._watch_lengths(0, 20)
    criterion._watch_lengths(3, 20)


def test_error_rates_in_validation(parts):
    model, data = parts
    model.eval()
    criterion = MultitaskCriterion(Task()).eval()
    with torch.no_grad():
        _, _, log = criterion(model, batch(data, [0, 1]))
    model.train()
    assert all(0 < log[f"_{part}_errors"] <= 30 * log[f"_{part}_tokens"] for part in ("asr", "st", "unit"))


# --- the training mask


def test_expected_counts_of_a_certain_ctc():
    symbols = [0, 5, 5, 0, 5, 6, 6, 0]
    logits = torch.full((1, 8, 9), -50.0)
    logits[0, torch.arange(8), torch.tensor(symbols)] = 50.0
    assert expected_counts(logits, torch.tensor([8]))[0].tolist() == pytest.approx([0, 1, 1, 1, 2, 3, 3, 3])
    sample = {
        "net_input": {"src_lengths": torch.tensor([32])},
        "target": torch.tensor([[5, 5, 6, 2]]),
        "target_lengths": torch.tensor([4]),
    }
    assert heard_when_due(logits, sample, None, 1).tolist() == [[2, 5, 6, 8]]
    assert heard_when_due(logits, sample, None, 4).tolist() == [[4, 8, 8, 8]]
    assert heard_when_due(logits, sample, None, None) is None
    windows = SentenceWindows(torch.tensor([0, 0]), torch.tensor([0, 4]), torch.tensor([4, 8]))
    sample.update(target=torch.tensor([[5, 2, 1], [5, 6, 2]]), target_lengths=torch.tensor([2, 3]))
    assert heard_when_due(logits, sample, windows, 1).tolist() == [[2, 4, 4], [1, 2, 4]]


def test_masked_training_runs(parts):
    model, data = parts
    model.train()
    criterion = MultitaskCriterion(Task(), mt_visible="ctc").train()
    torch.manual_seed(0)
    losses = {round(criterion(model, batch(data, [0, 1]))[0].item(), 6) for _ in range(8)}
    assert len(losses) > 1  # chunk sizes differ


# --- whole runs


def test_training_validates_by_bleu_and_resumes_exactly(corpus, tmp_path, caplog):
    options = dict(speed_perturb="0.9,1.1", spec_augment="sm", best_checkpoint_metric="bleu",
                   maximize_best_checkpoint_metric=True)  # fmt: skip
    with caplog.at_level(logging.INFO):
        fairseq_train(corpus, tmp_path / "straight", max_update=4, **options)
    log = caplog.text
    for name in ("loss", "asr_loss", "st_loss", "mt_loss", "unit_loss", "asr_ter", "st_ter", "uer", "mt_acc", "bleu"):
        assert re.search(rf"valid on 'dev' subset .*\| {name} [0-9.]+ ", log), name
    assert "audio_s_per_s" in log
    assert (tmp_path / "straight/checkpoint_best.pt").is_file()
    fairseq_train(corpus, tmp_path / "halves", max_update=2, **options)
    fairseq_train(corpus, tmp_path / "halves", max_update=4, **options)
    straight, halves = (weights(tmp_path / name / "checkpoint_last.pt") for name in ("straight", "halves"))
    assert all(torch.equal(straight[key], halves[key]) for key in straight)


@pytest.mark.parametrize("precision", [{"autocast": "bfloat16"}, {"bf16": True}, {"fp16": True}], ids=str)
def test_precisions(corpus, tmp_path, precision):
    if "fp16" in precision and not torch.cuda.is_available():
        pytest.skip("fairseq's fp16 optimiser needs a GPU")
    fairseq_train(corpus, tmp_path, max_update=2, disable_validation=True, **precision)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "checkpoint_last.pt").values())


def test_accumulation_equals_a_larger_batch(corpus, tmp_path):
    options = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, join_probability=0.0, max_update=1,
                   disable_validation=True, max_tokens=None)  # fmt: skip
    fairseq_train(corpus, tmp_path / "one", batch_size=12, **options)
    fairseq_train(corpus, tmp_path / "many", batch_size=3, update_freq=4, required_batch_size_multiple=1, **options)
    one, many = (weights(tmp_path / name / "checkpoint_last.pt") for name in ("one", "many"))
    assert all(torch.allclose(one[key], many[key], atol=1e-4) for key in one)


def test_decoders_learn_from_text_alone_and_go_on_with_speech(corpus, tmp_path, caplog):
    """Half of the sentences have no units; the decoders of the text run start the speech run."""
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    for split in ("train", "dev"):
        rows = [line.split("\t") for line in (data / f"{split}.tsv").read_text(encoding="utf-8").splitlines()]
        column = {name: i for i, name in enumerate(rows[0])}
        lines = ["src_text\ttgt_text\ttgt_audio"]
        for number, row in enumerate(rows[1:]):
            units = row[column["tgt_audio"]] if number % 2 else ""
            lines.append("\t".join((row[column["src_text"]], row[column["tgt_text"]], units)))
        (data / f"text_{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = dict(source="text", asr_weight=0.0, st_weight=0.0, mt_weight=0.5, unit_weight=0.5, dropout=0.0,
                train_subset="text_train", valid_subset="text_dev")  # fmt: skip
    with caplog.at_level(logging.INFO):
        fairseq_train(data, tmp_path / "text", max_update=60, lr=0.01, **text)
    assert "12 sentence pairs, 6 with units" in caplog.text
    learnt = [float(value) for value in re.findall(r"mt_acc (\d+\.\d+)", caplog.text)]
    assert learnt[-1] > 60  # by chance: 1 in 40; knowing the most frequent token: 25
    start = tmp_path / "text/checkpoint_last.pt"
    before = weights(start)
    assert "encoder.embedding.weight" in before and not any(key.startswith("encoder.subsampler") for key in before)
    fairseq_train(data, tmp_path / "speech", decoder_init=start, max_update=1, lr=1e-12, disable_validation=True)
    after = weights(tmp_path / "speech/checkpoint_last.pt")
    decoders = [key for key in after if key.startswith(("mt_decoder.", "unit_decoder."))]
    assert decoders and all(torch.allclose(before[key], after[key], atol=1e-6) for key in decoders)
    frozen = dict(freeze="encoder,asr_head,st_decoder", max_update=2, disable_validation=True)
    fairseq_train(data, tmp_path / "frozen", finetune_from_model=tmp_path / "speech/checkpoint_last.pt", **frozen)
    moved = {
        key.partition(".")[0]
        for key, value in weights(tmp_path / "frozen/checkpoint_last.pt").items()
        if not torch.equal(value, after[key])
    }
    assert moved == {"mt_decoder", "unit_decoder"}
    both = dict(decoder_init=start, mt_init=tmp_path / "frozen/checkpoint_last.pt", max_update=1, lr=1e-12)
    fairseq_train(data, tmp_path / "both", **both, disable_validation=True)
    mixed, other = weights(tmp_path / "both/checkpoint_last.pt"), weights(tmp_path / "frozen/checkpoint_last.pt")
    for key in decoders:
        source = other if key.startswith("mt_decoder.") else before
        assert torch.allclose(mixed[key], source[key], atol=1e-6), key
    with pytest.raises(ConfigError, match="--freeze names 'vocoder'"):
        fairseq_train(data, tmp_path / "bad", freeze="vocoder", max_update=1)
    (data / "text_train.tsv").write_text("src_text\ttgt_text\ttgt_audio\nuno.\tone.\t99\n")
    with pytest.raises(ManifestError, match="unit 99, but num_units is 20"):
        fairseq_train(data, tmp_path / "bad", max_update=1, **text)
    (data / "text_train.tsv").write_text("src_text\ttgt_text\ttgt_audio\nuno.\t\t\n")
    with pytest.raises(ManifestError, match="line 2: tgt_text is empty"):
        fairseq_train(data, tmp_path / "bad", max_update=1, **text)


def test_frozen_parts_are_computed_once(corpus, tmp_path, monkeypatch):
    """With memory for nothing every batch is computed each time, and training comes to the same weights."""
    calls = []
    forward = EchoStreamEncoder.forward
    monkeypatch.setattr(EchoStreamEncoder, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    still = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, disable_validation=True, max_update=12)
    units = dict(freeze="encoder,asr_head,st_decoder,mt_decoder", asr_weight=0.0, st_weight=0.0, mt_weight=0.0,
                 unit_weight=1.0, speed_perturb="0.9,1.1", max_tokens=1000, **still)  # fmt: skip
    found, count = {}, {}
    for name, gigabytes in (("kept", 1.0), ("anew", 1e-9)):
        calls.clear()
        fairseq_train(corpus, tmp_path / name, keep_frozen=gigabytes, **units)
        found[name], count[name] = weights(tmp_path / name / "checkpoint_last.pt"), len(calls)
    assert count["kept"] <= 6 and count["anew"] == 12
    moved = [key for key in found["kept"] if key.startswith("unit_decoder.")]
    for key, value in found["kept"].items():
        torch.testing.assert_close(value, found["anew"][key], atol=3e-3 if key in moved else 0.0, rtol=0.0)
    start = tmp_path / "kept/checkpoint_last.pt"
    calls.clear()
    heads = dict(units, freeze="encoder,mt_decoder,unit_decoder", asr_weight=1.0, unit_weight=0.0, st_weight=0.5)
    fairseq_train(corpus, tmp_path / "heads", finetune_from_model=start, keep_frozen=1.0, **heads)
    assert len(calls) <= 6
    after = weights(tmp_path / "heads/checkpoint_last.pt")
    assert not torch.equal(after["asr_head.output.weight"], found["kept"]["asr_head.output.weight"])
    assert torch.equal(after["encoder.layers.0.fc1.weight"], found["kept"]["encoder.layers.0.fc1.weight"])
    with pytest.raises(ConfigError, match="say --freeze encoder, too"):
        fairseq_train(corpus, tmp_path / "bad", keep_frozen=1.0, max_update=1)
    with pytest.raises(ConfigError, match="--keep-frozen keeps one context; --train-contexts has 4:0,8:0"):
        fairseq_train(corpus, tmp_path / "bad", keep_frozen=1.0, train_contexts="4:0,8:0", **units)


def test_encoder_init_finetuning_and_wrong_dictionary(corpus, tmp_path):
    asr = dict(st_weight=0.0, mt_weight=0.0, unit_weight=0.0, asr_weight=1.0, disable_validation=True)
    fairseq_train(corpus, tmp_path / "asr", max_update=2, **asr)
    start = tmp_path / "asr/checkpoint_last.pt"
    still = dict(max_update=1, lr=1e-12, disable_validation=True)
    fairseq_train(corpus, tmp_path / "init", encoder_init=start, **still)
    fairseq_train(corpus, tmp_path / "tune", finetune_from_model=start, **still)
    fairseq_train(corpus, tmp_path / "fresh", **still)
    runs = ("asr", "init", "tune", "fresh")
    before, init, tune, fresh = (weights(tmp_path / name / "checkpoint_last.pt") for name in runs)
    assert all(torch.allclose(before[key], tune[key], atol=1e-6) for key in before)
    same = {key for key in before if torch.allclose(before[key], init[key], atol=1e-6)}
    assert {key for key in before if key.startswith(("encoder.", "asr_head."))} <= same
    # The ASR run left the other parts as they were initialised, which is as here; so the encoder must tell.
    assert not torch.allclose(before["encoder.layers.0.fc1.weight"], fresh["encoder.layers.0.fc1.weight"], atol=1e-4)
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    with (other / "dict.tgt.txt").open("a", encoding="utf-8") as file:
        file.write("further 1\n")
    with pytest.raises(Exception, match="Cannot load model parameters") as error:  # fairseq's words; ours are the cause
        fairseq_train(other, tmp_path / "wrong", finetune_from_model=start, **still)
    cause = error.value.__context__
    assert isinstance(cause, CheckpointError)
    assert re.search("checkpoint was trained with .* symbols, the target dictionary has", str(cause))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dict.src.txt", "dictionary .*dict.src.txt does not exist"),
        ("dict.unit.txt", "dictionary .*dict.unit.txt does not exist"),
        ("train.tsv", "manifest .*train.tsv does not exist"),
        ("gcmvn.npz", "CMVN file .* does not exist"),
        ("config.yaml", "config.yaml does not exist"),
    ],
)
def test_missing_files_are_named(corpus, tmp_path, name, message):
    other = tmp_path / "data"
    shutil.copytree(corpus, other, ignore=shutil.ignore_patterns("audio"))
    (other / name).unlink()
    with pytest.raises(EchoStreamError, match=message):
        fairseq_train(other, tmp_path / "run")


def run(command: list[str], **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_two_processes_equal_accumulation(corpus, tmp_path):
    """DDP over gloo by scripts/train.py under torchrun: one update of two workers is one of two batches in a row."""
    options = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, max_update=2, disable_validation=True)
    fairseq_train(corpus, tmp_path / "one", update_freq=2, **options)
    flags = tiny_flags(corpus, tmp_path / "two", **options)
    (tmp_path / "empty.yaml").write_text(f"data: {corpus}\n")
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = ["--master_addr", "127.0.0.1", "--master_port", str(port.getsockname()[1])]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *address]
    run([*launch, "scripts/train.py", "--config", str(tmp_path / "empty.yaml"), *flags[3:]])
    one, two = (weights(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


def test_plain_commands(corpus, tmp_path, monkeypatch):
    """fairseq-train in a process of its own, which finds everything by --user-dir alone; then fairseq-validate."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.logging.progress_bar import SimpleProgressBar
    from fairseq_cli import validate

    figures = {}
    monkeypatch.setattr(SimpleProgressBar, "print", lambda self, stats, **_: figures.update(stats))
    run([sys.executable, "-m", "fairseq_cli.train", *tiny_flags(corpus, tmp_path, max_update=1)])
    flags = [str(corpus), "--task", "echostream_s2st", "--valid-subset", "dev", "--cpu", "--max-tokens", "2000"]
    flags += ["--path", str(tmp_path / "checkpoint_last.pt"), "--log-format", "simple"]
    args = options.parse_args_and_arch(options.get_validation_parser(), flags)
    validate.main(convert_namespace_to_omegaconf(args))
    assert {"loss", "asr_ter", "st_ter", "uer", "mt_acc"} <= set(figures)


# --- echostream train


def test_yaml_becomes_a_command(tmp_path):
    from echostream.commands.train import command
    from echostream.recipe import read_flags

    path = tmp_path / "config.yaml"
    path.write_text("data: there\nmax_tokens: 100\nlr: 0.1\ncpu: true\nfp16: false\nupdate-freq: [1, 2]\n")
    words = command(read_flags(path), ["--lr", "0.2", "--max-update", "3"])
    assert words[0] == "there" and words[words.index("--task") + 1] == "echostream_s2st"
    assert words[words.index("--max-tokens") + 1] == "100" and words[words.index("--update-freq") + 1] == "1,2"
    assert words.count("--lr") == 1 and words[words.index("--lr") + 1] == "0.2"
    assert "--cpu" in words and "--fp16" not in words
    with pytest.raises(ConfigError, match="no data directory"):
        command({})
    for text, message in (("a: {b: 1}", "a is nested"), ("- a", "holds list"), ("a: [", "not YAML")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_flags(path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_flags(tmp_path / "none.yaml")


RECIPES = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.stem != "ablations")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_serve_any_pair(path):
    """Not one path of another pair in them; ``--pair`` wins over ``configs/pair.yaml``."""
    from echostream.recipe import read_flags

    assert "es-en" not in path.read_text(encoding="utf-8")
    french, shipped = read_flags(path, "fr-en"), read_flags(path)
    assert french["data"] == "data/fr-en" and french["save-dir"] == f"runs/fr-en/{path.stem}"
    assert shipped["data"] == "data/es-en"
    assert not any("{" in str(value) or "es-en" in str(value) for value in french.values())


def test_the_pair_of_a_recipe(tmp_path, monkeypatch):
    from echostream.recipe import read_flags

    path = tmp_path / "recipes" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("data: data/{pair}\n")
    with pytest.raises(ConfigError, match="say which: --pair fr-en"):
        read_flags(path)
    (tmp_path / "pair.yaml").write_text("pair: de-en\n")
    assert read_flags(path)["data"] == "data/de-en"
    path.write_text("pair: fr-en\ndata: data/{pair}\n")
    assert read_flags(path) == {"data": "data/fr-en"}  # its own file says it
    assert read_flags(path, "it-en") == {"data": "data/it-en"}
    for wrong in ("../x", "a/b"):
        with pytest.raises(ConfigError, match="names folders"):
            read_flags(path, wrong)
    monkeypatch.chdir(tmp_path)  # a recipe of the package is found from anywhere
    assert read_flags("configs/scratch/asr.yaml", "fr-en")["save-dir"] == "runs/fr-en/asr"
