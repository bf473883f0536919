"""What a full-context Whisper teaches: frames and distributions, on tiny random models."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fairseq")
torch = pytest.importorskip("torch")

from fairseq.logging import metrics  # noqa: E402

from echostream import plugin  # noqa: E402
from echostream.constants import EOS, NUM_SPECIALS, PAD, UNK  # noqa: E402
from echostream.data.collate import collate_targets, pad  # noqa: E402
from echostream.data.manifest import read_manifest, write_manifest  # noqa: E402
from echostream.errors import CheckpointError, ConfigError, ManifestError  # noqa: E402
from echostream.models.echostream_model import EchoStreamModel, build_echostream_model  # noqa: E402
from echostream.models.whisper_init import encoder_weights, whisper_config  # noqa: E402
from echostream.text import Vocabulary  # noqa: E402
from echostream.whisper.reference import WhisperReference  # noqa: E402
from echostream.whisper.tokens import LANGUAGES, TIMESTAMPS, prompt  # noqa: E402
from echostream.whisper.weights import WhisperWeights  # noqa: E402
from tests.test_training import fairseq_train, weights  # noqa: E402
from tests.test_whisper_tokens import MERGES, write_tokenizer  # noqa: E402
from tests.training_data import NUM_UNITS, make_corpus  # noqa: E402
from tests.whisper_models import DIMS, ctranslate2_variables, random_parameters, write_ctranslate2  # noqa: E402

plugin.register_with_fairseq()

from echostream.criterions.distillation import WhisperTeacher, frame_loss, token_loss  # noqa: E402
from echostream.criterions.multitask_criterion import MultitaskCriterion  # noqa: E402

END = 256 + len(MERGES)
DIMS = replace(DIMS, n_vocab=END + 2 + 99 + 6 + TIMESTAMPS, n_audio_ctx=80, n_text_ctx=24)
# Whole tokens (▁the, ▁a, n, ▁and), several (▁cab is ▁, ca, b; ▁inn), and <unk> as everywhere.
PIECES = ["▁the", "▁a", "n", "▁and", "▁cab", "▁inn"]
THE, A, N, AND, CAB, INN = range(NUM_SPECIALS, NUM_SPECIALS + len(PIECES))


def student(**changes: object) -> EchoStreamModel:
    sizes = dict(asr_vocab_size=12, st_vocab_size=NUM_SPECIALS + len(PIECES), num_units=10, segment_length=2,
                 mt_vocab_size=NUM_SPECIALS + len(PIECES), unit_decoder_embed_dim=16, unit_decoder_ffn_dim=32,
                 unit_decoder_layers=1, st_decoder_embed_dim=16, st_decoder_ffn_dim=32)  # fmt: skip
    torch.manual_seed(0)
    return build_echostream_model(whisper_config(DIMS, **{**sizes, **changes})).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper whose positions are the sinusoids that every Whisper has, and its tokenizer."""
    parameters = {name: 0.2 * value for name, value in random_parameters(DIMS).items()}
    zero = torch.zeros(1, DIMS.n_audio_ctx, DIMS.n_audio_state)
    positions = student().encoder._positions(torch.zeros(1, dtype=torch.long), zero)[0]
    parameters["encoder.positional_embedding"] = positions.numpy()
    directory = tmp_path_factory.mktemp("whisper")
    write_ctranslate2(directory, ctranslate2_variables(parameters, DIMS))
    config = directory / "config.json"
    config.write_text('{"alignment_heads": []}')
    return write_tokenizer(directory)


def task(**changes: object) -> SimpleNamespace:
    config = dict(features="whisper", source_lang="es", target_lang="en",
                  target=SimpleNamespace(vocabulary=Vocabulary(PIECES)))  # fmt: skip
    return SimpleNamespace(config=SimpleNamespace(**{**config, **changes}), reads_text=False, target_dictionary=None)


def batch(lengths: list[int], sentences: list[list[int]], rows: list[int] | None = None) -> dict:
    """Random features [B, T, 8] with NaN behind their ends; the sentences of each row."""
    rows = list(range(len(lengths))) if rows is None else rows
    x = torch.full((len(lengths), max(lengths), DIMS.n_mels), float("nan"))
    for i, n in enumerate(lengths):
        x[i, :n] = torch.randn(n, DIMS.n_mels, generator=torch.Generator().manual_seed(n))
    previous, targets = collate_targets(sentences)
    source_text, source_lengths = pad([[5, 6]] * len(lengths))
    target_text, target_lengths = pad([[AND]] * len(lengths))
    windows = None
    if len(rows) > len(lengths):
        frames = [-(-lengths[row] // 4) for row in rows]
        windows = {"row": torch.tensor(rows), "start": torch.zeros(len(rows), dtype=torch.long),
                   "end": torch.tensor(frames)}  # fmt: skip
    return {
        "net_input": {"src_tokens": x, "src_lengths": torch.tensor(lengths), "prev_output_tokens": previous},
        **targets, "src_text": source_text, "src_text_lengths": source_lengths, "tgt_text": target_text,
        "tgt_text_lengths": target_lengths, "units": None, "unit_lengths": None, "windows": windows,
        "sentence_row": torch.tensor(rows),
    }  # fmt: skip


def criterion(source: Path | str, **options: object) -> MultitaskCriterion:
    weights = dict(asr_weight=0.0, st_weight=0.0, mt_weight=0.0, unit_weight=0.0)
    given = dict(distill_weight=1.0, distill_teacher=f"whisper:{source}")
    return MultitaskCriterion(task(), **{**weights, **given, **options}).train()


def teacher(source: Path, targets: str = "both", **options: int) -> WhisperTeacher:
    return WhisperTeacher(str(source), targets, task(), **options)


def test_the_packaged_whisper_teaches(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the recipe's --distill-teacher whisper:base names a model that comes as packages, not a path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("echostream.units.features.packaged_whisper", lambda: source)
    expected = teacher(source, "both").model.state_dict()
    found = WhisperTeacher("base", "both", task())
    assert found.prompt == teacher(source, "both").prompt
    assert all(torch.equal(value, expected[name]) for name, value in found.model.state_dict().items())


def test_a_student_that_is_the_teacher_loses_nothing(source: Path) -> None:
    model = student(full_context=True)
    whisper = WhisperReference.load(source)
    weights = {name: value.numpy() for name, value in whisper.state_dict().items()}
    found = encoder_weights(WhisperWeights(DIMS, weights, None, source), model.config)
    model.encoder.load_state_dict({**model.encoder.state_dict(), **found})
    loss = criterion(source, sentence_avg=True)
    # Behind an item Whisper hears nothing here, as the student does; and the frames come out even.
    loss._teacher = teacher(source, "frames", silence=0, stride=0)
    sample = batch([39], [[THE, A]])
    value, size, log = loss(model, sample)
    assert value.item() == pytest.approx(0, abs=1e-8) and size == 1 and log["_distill_frames"] == 20
    with torch.no_grad():
        model.encoder.final_norm.bias += 0.1
    assert loss(model, sample)[0].item() > 1e-4


@pytest.mark.parametrize("targets", ["frames", "tokens", "both"])
def test_rows_do_not_depend_on_their_batch(source: Path, targets: str) -> None:
    model, loss = student(), criterion(source, distill_target=targets)
    lengths, sentences = [60, 17, 3], [[THE, A, N], [INN], [AND, CAB]]
    whole, size, log = loss(model, batch(lengths, sentences))
    single = [loss(model, batch([n], [s])) for n, s in zip(lengths, sentences)]
    assert whole.item() == pytest.approx(sum(value.item() for value, _, _ in single), rel=1e-4)
    assert size == sum(n for _, n, _ in single) and torch.isfinite(whole)
    for key in ("_distill_error", "_distill_frames", "_distill_kl", "_distill_tokens"):
        assert (key in log) == (targets == "both" or ("error" in key or "frames" in key) == (targets == "frames"))
        if key in log:
            assert float(log[key]) == pytest.approx(sum(float(entry[key]) for _, _, entry in single), rel=1e-4)


def test_gradients_flow_to_the_student_alone(source: Path) -> None:
    model, loss = student(), criterion(source)
    loss(model, batch([40, 30], [[THE], [A]]))[0].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert "encoder.final_norm.weight" in with_gradient and "encoder.layers.0.fc1.weight" in with_gradient
    assert {name.split(".")[0] for name in with_gradient} == {"encoder"}
    assert not any("merge" in name for name in with_gradient)
    assert not any(p.requires_grad or p.grad is not None for p in loss._teacher.model.parameters())
    assert not list(loss.parameters()) and not loss.state_dict() and not list(loss.children())
    model.zero_grad(set_to_none=True)
    loss = criterion(source, distill_target="tokens")
    loss(model, batch([40, 30], [[THE], [A]]))[0].backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"encoder", "mt_decoder"}


def test_distributions_are_whispers_over_the_pruned_vocabulary(source: Path) -> None:
    whisper, taught = WhisperReference.load(source), teacher(source)
    assert taught.entries.tolist() == [EOS, THE, A, N, AND]
    ids = {"the": 258, "a": 260, "and": END - 1, "n": ord("n") - ord("!")}  # the bytes' letters come first, from "!"
    assert taught.tokens.tolist() == [END, ids["the"], ids["a"], ids["n"], ids["and"]]
    lesson = taught.hear(torch.randn(2, 40, 8), torch.tensor([40, 12]))
    inn, cab = taught.origins.tokens[INN], taught.origins.tokens[CAB]
    assert len(inn) > 1 and len(cab) > 1
    target = torch.tensor([[INN, THE, CAB, EOS], [A, UNK, THE, EOS]])
    found, known = taught.distributions(lesson, torch.tensor([1, 0]), target)
    # Behind <unk> the teacher cannot know what has been said; what stands there still has a prediction.
    assert known.tolist() == [[True] * 4, [True, True, False, False]]
    read = [*prompt(DIMS.n_vocab, END, "es"), *inn, ids["the"], *cab]
    logits = whisper.decode(torch.tensor([read]), lesson.frames[1:], lesson.mask[1:])[0]
    at = [3, 3 + len(inn), 4 + len(inn), 4 + len(inn) + len(cab)]
    expected = logits[at][:, taught.tokens].log_softmax(-1)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    own = torch.randn(2, 4, NUM_SPECIALS + len(PIECES))
    own[..., taught.entries] = found + 3.0
    assert token_loss(found, known, own, taught.entries)[0].abs().max().item() < 1e-6
    own[0, 1, THE] += 1.0
    divergence, counts = token_loss(found, known, own, taught.entries)
    assert divergence[0] > 1e-4 and divergence[1].abs() < 1e-6 and counts.tolist() == [4, 2]


def test_what_the_teacher_cannot_follow_is_left_out(source: Path) -> None:
    taught = teacher(source)
    lesson = taught.hear(torch.randn(2, 300, 8), torch.tensor([300, 50]))
    assert lesson.frames.shape[1] == DIMS.n_audio_ctx and lesson.lengths.tolist() == [80, 36]
    error, counts = frame_loss(lesson, torch.randn(2, 150, 16), torch.tensor([150, 26]))
    assert counts.tolist() == [80, 26] and torch.isfinite(error).all()
    target = torch.tensor([[THE] * 30 + [EOS], [A, EOS] + [PAD] * 29])
    _, known = taught.distributions(lesson, torch.tensor([0, 1]), target)
    assert known.sum(1).tolist() == [DIMS.n_text_ctx - 3, 2]
    with pytest.raises(CheckpointError, match="encoder_embed_dim is 8, but the teacher's frames have 16"):
        frame_loss(lesson, torch.randn(2, 150, 8), torch.tensor([150, 26]))
    with pytest.raises(CheckpointError, match="hears 8 mel bins, the student 80"):
        taught.hear(torch.randn(1, 30, 80), torch.tensor([30]))


def test_the_teacher_hears_the_clean_side(source: Path) -> None:
    model, loss = student(), criterion(source, distill_target="both")
    sample, other = batch([40, 30], [[THE], [A]]), batch([39, 29], [[THE], [A]])
    plain = loss(model, sample)[0].item()
    sample["clean"] = sample["net_input"]["src_tokens"].clone()
    assert loss(model, sample)[0].item() == plain
    sample["clean"][:, :39] = other["net_input"]["src_tokens"]
    assert loss(model, sample)[0].item() != plain


def test_joined_items_teach_frames_alone(source: Path) -> None:
    model, loss = student(), criterion(source, distill_target="both")
    joined = batch([70, 30], [[THE, A], [INN], [AND]], rows=[0, 0, 1])
    _, _, log = loss(model, joined)
    assert log["_distill_frames"] == 2 * (18 + 8) and log["_distill_tokens"] == 2
    _, _, log = loss(model, batch([70], [[THE, A], [INN]], rows=[0, 0]))
    assert log["_distill_tokens"] == 0 and log["_distill_frames"] == 36


def silent_about(sample: dict, rows: list[int], columns: tuple[str, ...] = ("src_text", "tgt_text")) -> dict:
    """The batch, one sentence a row, with no texts in ``columns`` for ``rows``; units 1 and 2 for all that have any."""
    sample = dict(sample)
    for column in columns:
        sample[column], sample[f"{column}_lengths"] = sample[column].clone(), sample[f"{column}_lengths"].clone()
        sample[column][rows], sample[f"{column}_lengths"][rows] = PAD, 0
    if "tgt_text" in columns:
        sentences = [[] if i in rows else row[: n - 1].tolist()
                     for i, (row, n) in enumerate(zip(sample["target"], sample["target_lengths"]))]  # fmt: skip
        previous, targets = collate_targets(sentences)
        sample.update(targets, net_input={**sample["net_input"], "prev_output_tokens": previous})
    known = [i not in rows or "tgt_text" not in columns for i in range(len(sample["target"]))]
    sample["units"], sample["unit_lengths"] = pad([[5, 6] if is_known else [] for is_known in known])
    if not any(known):
        sample["units"] = sample["unit_lengths"] = None
    return sample


@pytest.mark.parametrize("options", [{}, {"distill_target": "both"}, {"mt_visible": "ctc"}, {"unit_loss": "ce"},
                                     {"sentence_avg": True}])  # fmt: skip
def test_speech_without_text_is_taught_frames_alone(source: Path, options: dict) -> None:
    """What is added by rows without text is their frames' loss; the others' losses stay as they were."""
    model = student(ctc_upsample_ratio=4)
    loss = criterion(source, asr_weight=0.3, st_weight=0.2, mt_weight=0.3, unit_weight=0.2, **options)
    alone = criterion(source, sentence_avg=options.get("sentence_avg", False))
    torch.manual_seed(3)  # mt_visible draws a chunk
    labelled = loss(model, silent_about(batch([60, 33], [[THE, A, N], [INN]]), []))
    silent = silent_about(batch([90, 36], [[THE], [A]]), [0, 1])
    unlabelled = loss(model, silent)
    torch.manual_seed(3)
    both = loss(model, silent_about(batch([60, 33, 90, 36], [[THE, A, N], [INN], [THE], [A]]), [2, 3]))
    assert both[0].item() == pytest.approx(labelled[0].item() + unlabelled[0].item(), rel=1e-4)
    assert unlabelled[0].item() == pytest.approx(alone(model, silent)[0].item(), rel=1e-5) and unlabelled[0] > 0
    # Tokens of the labelled rows; a token per 30 frames of the others.
    sizes = (2.0, 2.0) if options.get("sentence_avg") else (4.0 + 2.0, 3.0 + 1.2)
    assert (labelled[1], unlabelled[1]) == pytest.approx(sizes) and both[1] == pytest.approx(sum(sizes))
    for key in ("_asr_nll", "_st_nll", "_mt_nll", "_mt_tokens", "_mt_correct", "_unit_nll", "_unit_targets"):
        assert float(both[2][key]) == pytest.approx(float(labelled[2][key]), rel=1e-4) and not unlabelled[2][key]
    model.zero_grad(set_to_none=True)
    unlabelled[0].backward()
    with_gradient = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient == {"encoder"}
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def kinds(log: dict) -> list[tuple[str, bool]]:
    return [(key, isinstance(value, torch.Tensor)) for key, value in log.items()]


@pytest.mark.parametrize("options", [{}, {"distill_target": "both"}, {"unit_loss": "ce"}])
def test_workers_log_the_same_keys_whatever_their_batches_have(source: Path, options: dict) -> None:
    """fairseq adds up several workers' logs by the order of their keys, and tensors apart from numbers."""
    model = student(ctc_upsample_ratio=4)
    loss = criterion(source, asr_weight=0.3, st_weight=0.2, mt_weight=0.3, unit_weight=0.2, **options)
    labelled, recordings = batch([60, 33], [[THE, A, N], [INN]]), batch([90, 36], [[THE], [A]])
    labelled, recordings = silent_about(labelled, []), silent_about(recordings, [0, 1])
    logs = [loss(model, sample)[2] for sample in (labelled, recordings)]
    assert kinds(logs[0]) == kinds(logs[1])
    with metrics.aggregate(new_root=True) as both:
        MultitaskCriterion.reduce_metrics(logs)
    expected = float(logs[0]["_asr_nll"]) / logs[0]["_asr_tokens"] / np.log(2)
    assert both.get_smoothed_values()["asr_loss"] == pytest.approx(expected, abs=1e-3)
    clean = {**labelled["net_input"], "src_tokens": labelled["net_input"]["src_tokens"].nan_to_num()}
    silent = {**recordings["net_input"], "src_tokens": recordings["net_input"]["src_tokens"].nan_to_num()}
    loss.eval()
    logs = [loss(model.eval(), {**x, "net_input": y})[2] for x, y in ((labelled, clean), (recordings, silent))]
    assert kinds(logs[0]) == kinds(logs[1])


def test_what_the_asr_head_feeds_back_learns_too(source: Path) -> None:
    model = student(asr_decoder_layers=3, asr_condition_every=1)
    loss = MultitaskCriterion(task(), asr_weight=1.0, st_weight=0.0, mt_weight=0.0, unit_weight=0.0)
    sample = silent_about(batch([60, 33], [[THE, A, N], [INN]]), [])
    sample["net_input"]["src_tokens"] = sample["net_input"]["src_tokens"].nan_to_num()
    final = loss.eval()(model, sample)[0]
    taught, _, log = loss.train()(model, sample)
    each = []
    for scores in model(**sample["net_input"], parts=["asr"])["asr_between"]:
        lengths = -(-sample["net_input"]["src_lengths"] // 4)
        targets, weight = (sample["src_text"], sample["src_text_lengths"]), sample["target_lengths"].float()
        each.append(loss._ctc("asr", scores, lengths, *targets, weight, {}))
    assert len(each) == 2 and taught.item() == pytest.approx((final + 0.5 * sum(each)).item(), rel=1e-5)
    assert log["_asr_nll"] > 0 and log["_asr_targets"] == 2  # of the final prediction alone


def test_speech_with_its_source_text_alone(source: Path) -> None:
    model = student()
    loss = criterion(source, asr_weight=0.3, st_weight=0.2, mt_weight=0.3, unit_weight=0.2, distill_target="both")
    sample = silent_about(batch([60], [[THE]]), [0], ("tgt_text",))
    value, size, log = loss(model, sample)
    expected = criterion(source, asr_weight=0.3)(model, sample)[0]
    assert value.item() == pytest.approx(expected.item(), rel=1e-5) and size == 2.0
    assert log["_asr_nll"] and not any(log[key] for key in ("_st_nll", "_mt_nll", "_unit_nll", "_distill_kl"))
    value.backward()
    with_gradient = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient == {"encoder", "asr_head"}


def test_no_teacher_unless_there_is_a_weight_and_a_training(source: Path) -> None:
    model, sample = student(), batch([40, 30], [[THE], [A]])
    sample["net_input"]["src_tokens"] = sample["net_input"]["src_tokens"].nan_to_num()
    plain = MultitaskCriterion(task()).train()(model, sample)
    off = MultitaskCriterion(task(), distill_teacher=f"whisper:{source}/none").train()(model, sample)
    assert plain[0].item() == off[0].item() and set(plain[2]) == set(off[2])
    loss = MultitaskCriterion(task(), distill_weight=0.5, distill_teacher=f"whisper:{source}/none").eval()
    with torch.no_grad():
        assert loss(model, sample)[0].item() == plain[0].item()
    with pytest.raises(CheckpointError, match="none does not exist"):
        loss.train()(model, sample)
    taught = criterion(source, mt_weight=1.0, distill_weight=0.5, distill_target="both")(model, sample)[0]
    alone = criterion(source, distill_target="both")(model, sample)[0]
    mt = MultitaskCriterion(task(), asr_weight=0, st_weight=0, mt_weight=1, unit_weight=0).train()(model, sample)[0]
    assert taught.item() == pytest.approx(mt.item() + 0.5 * alone.item(), rel=1e-5)


def test_bad_teachers_are_told(source: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"distill_teacher": str(source)}, "with a --distill-weight it is whisper:SOURCE"),
        ({"distill_teacher": None}, "--distill-teacher is None"),
        ({"distill_weight": -1.0}, "--distill-weight is -1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            criterion(source, **options)
    for changes, message in (
        ({"features": "kaldi"}, "hears whisper features, but the data's are kaldi"),
        ({"target_lang": "de"}, "Whisper writes English, not 'de'"),
        ({"source_lang": "xx"}, "source_lang is 'xx'; this Whisper knows 99 languages"),
    ):
        with pytest.raises(ConfigError, match=message):
            WhisperTeacher(str(source), "tokens", task(**changes))
    reading = task()
    reading.reads_text = True
    with pytest.raises(ConfigError, match="--source is text"):
        WhisperTeacher(str(source), "frames", reading)
    bare = write_ctranslate2(tmp_path / "bare", ctranslate2_variables(random_parameters(DIMS), DIMS))
    (bare / "config.json").write_text('{"alignment_heads": []}')
    WhisperTeacher(str(bare), "frames", task(source_lang="", target_lang="de"))
    with pytest.raises(CheckpointError, match="holds neither tokenizer.json"):
        WhisperTeacher(str(bare), "tokens", task())
    small = student(encoder_embed_dim=8, encoder_attention_heads=2, encoder_ffn_embed_dim=16)
    with pytest.raises(CheckpointError, match="encoder_embed_dim is 8, but the teacher's frames have 16"):
        criterion(source)(small, batch([40], [[THE]]))


def test_a_whole_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """fairseq-train in bf16 with both lessons, joined items among the others: nothing of the teacher is kept."""
    data = make_corpus(tmp_path / "data")
    (data / "config.yaml").write_text(f"num_units: {NUM_UNITS}\nsource_lang: es\ntarget_lang: en\nfeatures: whisper\n")
    dims = replace(DIMS, n_mels=80, n_audio_state=32, n_text_state=32, n_audio_ctx=1500, n_text_ctx=64)
    parameters = {name: 0.2 * value for name, value in random_parameters(dims).items()}
    source = write_ctranslate2(tmp_path / "whisper", ctranslate2_variables(parameters, dims))
    (source / "config.json").write_text('{"alignment_heads": []}')
    write_tokenizer(source)
    options = dict(encoder_stem="whisper", encoder_normalize_before=True, encoder_final_norm=True, memory_size=0,
                   distill_weight=1.0, distill_teacher=f"whisper:{source}", distill_target="both",
                   distill_clean=True, noise_db=-30.0, autocast="bfloat16", max_update=2)  # fmt: skip
    with caplog.at_level(logging.INFO):
        fairseq_train(data, tmp_path / "run", **options)
    assert re.search(r"distill_error=?[\"\s:|]*[0-9.]+", caplog.text) and "distill_kl" in caplog.text
    kept = weights(tmp_path / "run/checkpoint_last.pt")
    assert {name.split(".")[0] for name in kept} == {"encoder", "asr_head", "st_decoder", "mt_decoder", "unit_decoder"}
    state = torch.load(tmp_path / "run/checkpoint_last.pt", weights_only=False)
    assert not state.get("criterion") and all(torch.isfinite(value).all() for value in kept.values())
    with pytest.raises(CheckpointError, match="encoder_embed_dim is 16, but the teacher's frames have 32"):
        fairseq_train(data, tmp_path / "narrow", encoder_embed_dim=16, encoder_ffn_embed_dim=32, **options)
    # Recordings without text beside the others, three times an epoch; only a teacher of frames can use them.
    none = np.zeros(0, dtype=np.int16)
    heard = [replace(row, src_text="", tgt_text="", units=none) for row in read_manifest(data / "dev.tsv")]
    write_manifest(data / "heard.tsv", heard)
    options["train_subset"] = "train,heard:3"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fairseq_train(data, tmp_path / "heard", **options)
    assert "train,heard:3: 16 utterances" in caplog.text
    kept = weights(tmp_path / "heard/checkpoint_last.pt")
    assert all(torch.isfinite(value).all() for value in kept.values())
    for changes in ({"distill_target": "tokens"}, {"distill_weight": 0.0}):
        with pytest.raises(ManifestError, match="heard.tsv, line 2: src_text is empty in row 'dev0'"):
            fairseq_train(data, tmp_path / "none", **{**options, **changes})
    for subset in ("train:0", "train:x", "train,dev:", "train:-1", "train:nan"):
        with pytest.raises(ConfigError, match="is not how often to repeat (train|dev)"):
            fairseq_train(data, tmp_path / "none", **{**options, "train_subset": subset})
    with pytest.raises(ConfigError, match="subset 'dev:2': only what is trained on is repeated"):
        fairseq_train(data, tmp_path / "none", **{**options, "valid_subset": "dev:2"})


def test_prompts_are_whispers() -> None:
    assert prompt(51865, 50257, "es") == (50258, 50262, 50358, 50363)
    assert prompt(51865, 50257, "es", "transcribe") == (50258, 50262, 50359, 50363)
    assert prompt(51866, 50257, "yue") == (50258, 50259 + 99, 50359, 50364)  # large-v3
    assert len(set(LANGUAGES)) == 100
    with pytest.raises(ConfigError, match="'yue'; this Whisper knows 99 languages"):
        prompt(51865, 50257, "yue")
    with pytest.raises(ConfigError, match="this Whisper knows no language but English"):
        prompt(51864, 50256, "es")
