"""Vocoder training: it learns, goes on where it stopped, trains what the generator computes, and names bad data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from echostream.commands import train_vocoder
from echostream.data.corpus.rows import Row, write_rows
from echostream.errors import AudioError, CheckpointError, ConfigError, ManifestError
from echostream.models.decoders.vocoder import CodeHiFiGAN, VocoderConfig
from echostream.models.decoders.vocoder_checkpoint import load_generator_state, load_vocoder, save_vocoder
from echostream.models.decoders.vocoder_config import DurationConfig
from echostream.models.decoders.vocoder_layers import DurationClassifier
from echostream.vocoder.dataset import PieceSampler, UtteranceSampler, hold_out, read_samples, read_units
from echostream.vocoder.discriminators import Discriminators
from echostream.vocoder.durations import DurationTrainer
from echostream.vocoder.losses import (
    SpectralLoss,
    discriminator_loss,
    duration_loss,
    feature_loss,
    generator_loss,
    mel_filters,
)
from echostream.vocoder.options import TrainerOptions
from echostream.vocoder.trainer import Trainer

UNITS = 6
CHOICE = dict(
    encoder_embed_dim=8, var_pred_hidden_dim=16, var_pred_kernel_size=5, var_pred_dropout=0.0, var_pred_max_frames=5,
    var_pred_layers=1,
)  # fmt: skip
SMALL = VocoderConfig.preset(
    "small",
    UNITS,
    embedding_dim=16,
    upsample_initial_channel=16,
    upsample_channels=[12, 8, 8, 4],
    dur_predictor_params=dict(encoder_embed_dim=16, var_pred_hidden_dim=8, var_pred_dropout=0.0),
)
OPTIONS = TrainerOptions(
    batch_size=2, piece_frames=12, learning_rate=3e-3, learning_rate_warmup=5, gan_start=1000, half_life=1000
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Each unit is a tone, each lasts its own time: a voice that can be learnt in seconds."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "target").mkdir()
    rng = np.random.default_rng(0)
    lines = ["id\taudio\tunits\tdurations"]
    for i in range(10):
        units = [int(u) for u in rng.integers(0, UNITS, 12)]
        units = [u for u, v in zip(units, [-1, *units]) if u != v]
        durations = [u + 1 for u in units]
        tone = np.concatenate([np.full(d * 320, 200.0 * (u + 1)) for u, d in zip(units, durations)])
        wav = 0.3 * np.sin(2 * np.pi * np.cumsum(tone) / 16000)
        soundfile.write(directory / "target" / f"t{i}.wav", wav, 16000)
        lines.append(f"t{i}\tt{i}.wav\t{' '.join(map(str, units))}\t{' '.join(map(str, durations))}")
    (directory / "target" / "units.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def items(corpus):
    return read_units(corpus / "target" / "units.tsv", UNITS)


def trainer(items, directory, **changes) -> Trainer:
    train, held = hold_out(items, 2)
    options = TrainerOptions(**{**vars(OPTIONS), **changes})
    return Trainer(SMALL, options, train, held, directory)


# --------------------------------------------------------------------------------------------------------------- data
def test_rows_and_pieces(items):
    assert len(items) == 10
    assert all(item.frames == item.durations.sum() for item in items)
    train, held = hold_out(items, 3)
    assert len(held) == 3 and len(train) == 7
    assert {item.id for item in held} == {item.id for item in hold_out(items[::-1], 3)[1]}
    sampler = PieceSampler(train, 4, 10, seed=1)
    batch, same, other = sampler.batch(5), sampler.batch(5), sampler.batch(6)
    assert torch.equal(batch.wav, same.wav) and not torch.equal(batch.wav, other.wav)
    assert batch.wav.shape == (4, 3200)
    by_length = {tuple(item.units): item for item in train}
    for i in range(4):
        item = by_length[tuple(batch.units[i, : batch.lengths[i]].tolist())]
        whole = read_samples(item)
        start = int(batch.begin[i]) * 320
        assert np.allclose(batch.wav[i], whole[start : start + 3200])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist"),
        ("id\taudio\tunits\n", "no column 'durations'"),
        ("id\taudio\tunits\tdurations\n", "no rows"),
        ("id\taudio\tunits\tdurations\na\ta.wav\t1 2\t3\n", "line 2: 2 units, 1 durations"),
        ("id\taudio\tunits\tdurations\na\ta.wav\t1 x\t3 1\n", "whole numbers"),
        ("id\taudio\tunits\tdurations\na\ta.wav\t1 6\t3 1\n", "unit 6 is out of range"),
        ("id\taudio\tunits\tdurations\na\ta.wav\t1 2\t3 0\n", "duration below 1"),
        ("id\taudio\tunits\tdurations\na\ta.wav\t\t\n", "0 units"),
    ],
)
def test_bad_rows(tmp_path, text, says):
    if text is not None:
        (tmp_path / "units.tsv").write_text(text)
    with pytest.raises(ManifestError, match=says):
        read_units(tmp_path / "units.tsv", UNITS)


def test_bad_recordings(tmp_path):
    (tmp_path / "units.tsv").write_text("id\taudio\tunits\tdurations\na\ta.wav\t1 2\t3 4\n")
    item = read_units(tmp_path / "units.tsv")[0]
    with pytest.raises(AudioError, match="cannot be read"):
        read_samples(item)
    soundfile.write(tmp_path / "a.wav", np.zeros(4000), 22050)
    with pytest.raises(AudioError, match="22050 Hz"):
        read_samples(item)
    soundfile.write(tmp_path / "a.wav", np.full(1000, 0.5), 16000)
    samples = read_samples(item)
    assert len(samples) == 7 * 320 and samples[999] > 0.4 and not samples[1000:].any()


# ------------------------------------------------------------------------------------------------------------- losses
def test_losses_know_better_from_worse():
    spectral = SpectralLoss()
    time = torch.arange(8000) / 16000
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * time)[None]
    near, far = 0.3 * torch.sin(2 * torch.pi * 445 * time + 1)[None], 0.3 * torch.sin(2 * torch.pi * 1500 * time)[None]
    assert all(float(part) < 1e-4 for part in spectral(tone, tone))
    for close, distant in zip(spectral(near, tone), spectral(far, tone)):
        assert close < distant / 2
    mel = spectral.frame_mel(tone)
    assert mel.shape == (1, 80, 25)
    peak = mel_filters(1024)[:, round(440 * 1024 / 16000)].argmax()
    assert (mel[0, :, 5:20].argmax(0) - peak).abs().max() <= 1
    predicted = torch.log(torch.tensor([[3.0, 9.0]]))  # the second unit is padding
    assert float(duration_loss(predicted, torch.tensor([[2, 1]]), torch.tensor([1]))) < 1e-10
    chosen = torch.tensor([[[0.0, 99.0, 0.0], [0.0, 0.0, 99.0], [9.0, 0.0, 0.0]]])  # 2, 3 or more, padding
    lengths = torch.tensor([2])
    assert float(duration_loss(chosen, torch.tensor([[2, 7, 3]]), lengths)) < 1e-10
    assert float(duration_loss(chosen, torch.tensor([[3, 7, 3]]), lengths)) == pytest.approx(99 / 2)


def test_filters_cover_the_band():
    filters = mel_filters(1024)
    assert filters.shape == (80, 513) and (filters >= 0).all()
    assert (filters.sum(1) - 1).abs().max() < 1e-5
    assert (filters.argmax(1).diff() >= 0).all()


@pytest.mark.parametrize("width", [1 / 16, 1 / 4])
def test_discriminators_learn_to_tell(width):
    torch.manual_seed(0)
    judges = Discriminators(width, periods=(2, 3), scales=2)
    optimizer = torch.optim.Adam(judges.parameters(), 1e-3)
    time = torch.arange(4001) / 16000
    real, fake = torch.sin(2 * torch.pi * 300 * time)[None], torch.randn(1, 4001) * 0.5
    losses = []
    for _ in range(12):
        loss = discriminator_loss(judges(real)[0], judges(fake)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] * 0.7
    scores, features = judges(fake)
    assert len(scores) == len(features) == 4
    assert generator_loss(scores) > generator_loss(judges(real)[0])
    assert feature_loss(judges(real)[1], features) > 0 == feature_loss(features, features)


def test_paper_sized_discriminators():
    with torch.device("meta"):
        count = sum(p.numel() for p in Discriminators(1.0).parameters())
    assert 70e6 < count < 71.5e6


# --------------------------------------------------------------------------------------------------------------- loop
FIELD = dict(
    embedding_dim=8,
    upsample_initial_channel=32,
    resblock_kernel_sizes=[3],
    resblock_dilation_sizes=[[1]],
    dur_predictor_params=dict(encoder_embed_dim=8, var_pred_hidden_dim=8),
)


@pytest.mark.parametrize("shape", ["causal", "choice", "field"])
def test_pieces_are_what_the_generator_says(items, tmp_path, shape):
    """Training on a piece of an utterance computes what the generator computes there in the whole utterance."""
    run = trainer(items, tmp_path, warmup_frames=8, piece_frames=20)
    if shape == "field":
        field = VocoderConfig.preset("v1", UNITS, model_in_dim=8, **FIELD)
        run = Trainer(field, run.options, run.train_items, run.held_out, tmp_path)
    if shape == "choice":
        choice = dataclasses.replace(SMALL, dur_predictor_params=DurationConfig(**CHOICE))
        run = Trainer(choice, run.options, run.train_items, run.held_out, tmp_path)
        assert run.update(PieceSampler(run.train_items, 2, 28, seed=3).batch(0))["duration"] > 0.5
    run.model.eval()
    batch = PieceSampler(run.train_items, 4, 28, seed=3).batch(0)
    with torch.no_grad():
        wav, scores, mel = run.speak(batch)
        whole, lengths = run.model(batch.units, batch.lengths, batch.durations)
    assert mel.shape == (4, 80, 28) and scores.shape[:2] == batch.units.shape
    assert batch.begin.max() > 0
    for i in range(4):
        begin, valid = int(batch.begin[i]), int(batch.valid[i])
        first = 8 if begin else 0
        last = valid if begin + valid == lengths[i] // 320 and valid < 28 else valid - (8 if shape == "field" else 0)
        expected = whole[i, (begin + first) * 320 : (begin + last) * 320]
        assert (wav[i, first * 320 : last * 320] - expected).abs().max() < 1e-5
        assert torch.equal(wav[i, : first * 320], batch.wav[i, : first * 320])


def test_it_learns(items, tmp_path):
    run = trainer(items, tmp_path)
    before = run.validate()
    sampler = PieceSampler(run.train_items, 2, 15, seed=1)
    for step in range(80):
        run.update(sampler.batch(step))
    after = run.validate()
    assert after["mel"] < before["mel"] * 0.8
    assert after["duration_error_frames"] < before["duration_error_frames"] * 0.8


@pytest.mark.parametrize("normed", [True, False], ids=["weight norm", "plain"])
def test_resumed_equals_uninterrupted(items, tmp_path, normed):
    options = dict(weight_norm=normed, gan_start=5)
    straight = trainer(items, tmp_path / "a", **options)
    torch.manual_seed(5)
    straight.run(8, None, save_minutes=100)
    first = trainer(items, tmp_path / "b", **options)
    torch.manual_seed(5)
    first.run(6, None, save_minutes=100)
    second = trainer(items, tmp_path / "b", **options)
    assert second.resume() and second.step == 6
    second.run(8, None, save_minutes=100)
    for (name, a), b in zip(straight.model.named_parameters(), second.model.parameters()):
        assert (a - b).abs().max() < 1e-6, name
    vocoder = load_vocoder(tmp_path / "b" / "vocoder.pt", tmp_path / "b" / "vocoder.json")
    units = torch.tensor([[0, 3, 1]])
    with torch.no_grad():
        assert (vocoder(units)[0] - second.ema(units)[0]).abs().max() < 1e-5


def test_many_speakers_with_v1(corpus, tmp_path):
    """The field's generator with two speakers: spectral steps, then GAN steps; the voices part, the file tells them."""
    header, *rows = (corpus / "target" / "units.tsv").read_text().splitlines()
    rows = [f"{row}\t{i % 2}" for i, row in enumerate(rows)]
    (tmp_path / "target").symlink_to(corpus / "target")
    (tmp_path / "units.tsv").write_text("\n".join([f"{header}\tspeaker", *rows]).replace("\tt", "\ttarget/t") + "\n")
    items = read_units(tmp_path / "units.tsv")
    assert [item.speaker for item in items[:3]] == [0, 1, 0]
    assert PieceSampler(items, 4, 15, 1).batch(0).speakers.max() == 1
    shape = VocoderConfig.preset("v1", UNITS, multispkr="from_input_file", model_in_dim=16, num_speakers=2, **FIELD)
    options = dataclasses.replace(OPTIONS, gan_start=4)
    run = Trainer(shape, options, items[:8], items[8:], tmp_path / "run")
    before = run.model.spkr.weight.detach().clone()
    sampler = PieceSampler(run.train_items, 2, 15, seed=1)
    logs = [run.update(sampler.batch(step)) for step in range(10)]
    assert all(np.isfinite(value) for log in logs for value in log.values())
    assert "discriminator" not in logs[3] and "discriminator" in logs[4]
    assert ((run.model.spkr.weight - before).abs().amax(1) > 1e-4).all()
    assert np.isfinite(run.validate()["mel"]) and len(list(run.resynthesize(2))) == 2
    run.save()
    vocoder = load_vocoder(tmp_path / "run" / "vocoder.pt", tmp_path / "run" / "vocoder.json")
    units = torch.tensor([[0, 3, 1], [0, 3, 1]])
    with torch.no_grad():
        one, other = vocoder(units, durations=torch.full_like(units, 2), speakers=torch.tensor([0, 1]))[0]
    assert (one - other).abs().max() > 1e-6


def test_the_average_follows_the_weights(items, tmp_path):
    """Every weight of the EMA, biases and embeddings included, arrives at the model's when that stands still."""
    run = trainer(items, tmp_path)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.1)
    run.step = 10**6
    for _ in range(600):
        run._average(20)
    units = torch.tensor([[0, 3, 1, 2]])
    run.model.eval()
    with torch.no_grad():
        assert (run.ema(units)[0] - run.model(units)[0]).abs().max() < 1e-4


@pytest.fixture(scope="module")
def silent_corpus(corpus, tmp_path_factory) -> Path:
    """The same units without the recordings, and more often."""
    directory = tmp_path_factory.mktemp("silent")
    header, *rows = (corpus / "target" / "units.tsv").read_text().splitlines()
    lines = [f"{i}{row}" for i in range(3) for row in rows]
    (directory / "units.tsv").write_text("\n".join([header, *lines]) + "\n")
    return directory


@pytest.fixture(scope="module")
def voice(tmp_path_factory) -> Path:
    """A voice with the field's duration predictor."""
    directory = tmp_path_factory.mktemp("voice")
    torch.manual_seed(7)
    save_vocoder(CodeHiFiGAN(SMALL), directory / "vocoder.pt", directory / "vocoder.json")
    return directory


@pytest.mark.parametrize("kind", ["choice", "field"])
def test_durations_alone(silent_corpus, voice, tmp_path, capsys, kind):
    """No recording is read, the error falls, all other weights stay to the last bit; it goes on where it stopped."""
    shape = tmp_path / "shape.json"
    params = CHOICE if kind == "choice" else vars(SMALL.dur_predictor_params)
    shape.write_text(json.dumps({**SMALL.to_dict(), "dur_predictor_params": params}))
    common = [str(silent_corpus / "units.tsv"), "--durations-only", "--batch-size", "4", "--held-out", "4"]
    start = ["--init", str(voice), "--config", str(shape), "--learning-rate", "1e-2"]
    out, parts = tmp_path / "out", tmp_path / "parts"
    train_vocoder.main([*common, *start, "--save-dir", str(out), "--max-steps", "0"])
    train_vocoder.main([*common, *start, "--save-dir", str(out), "--max-steps", "60"])
    said = capsys.readouterr().out
    assert "\n26 utterances" in said or said.startswith("26 utterances")
    curve = [line.split("\t") for line in (out / "curve.tsv").read_text().splitlines()]
    errors = [float(row[curve[0].index("duration_error_frames")]) for row in curve[1:]]
    assert len(errors) == 2 and errors[1] < errors[0] * 0.5
    before, after = CodeHiFiGAN(SMALL).eval(), load_vocoder(out / "vocoder.pt", out / "vocoder.json")
    before.load_state_dict(load_generator_state(voice / "vocoder.pt"))
    assert isinstance(after.dur_predictor, DurationClassifier) == (kind == "choice")
    save_vocoder(before, tmp_path / "same.pt", tmp_path / "same.json")
    files = tmp_path / "same.pt", out / "vocoder.pt"
    same, new = (torch.load(file, weights_only=True)["generator"] for file in files)
    rest = [key for key in new if not key.startswith("dur_predictor.")]
    assert len(rest) > 20 and all(torch.equal(same[key], new[key]) for key in rest)
    units = torch.tensor([[0, 3, 1, 5]])
    with torch.no_grad():
        assert (before(units, durations=units + 1)[0] - after(units, durations=units + 1)[0]).abs().max() < 1e-5
    if kind == "choice":
        return
    with pytest.raises(CheckpointError, match="another directory"):
        Trainer(SMALL, OPTIONS, [], [], out).resume()
    with pytest.raises(ConfigError, match="needs the voice.*--init"):
        train_vocoder.main([*common, "--save-dir", str(parts), "--max-steps", "1"])
    with pytest.raises(ConfigError, match="max_steps or max_minutes"):
        train_vocoder.main([*common, *start, "--save-dir", str(parts)])


def test_durations_resumed_equal_uninterrupted(items, tmp_path):
    config = dataclasses.replace(SMALL, dur_predictor_params=DurationConfig(**{**CHOICE, "var_pred_dropout": 0.0}))

    def run(name: str) -> DurationTrainer:
        return DurationTrainer(config, dataclasses.replace(OPTIONS, learning_rate=1e-2), items[:8], items[8:], name)

    straight, first, second = run(tmp_path / "a"), run(tmp_path / "b"), run(tmp_path / "b")
    straight.run(6, None, save_minutes=100)
    first.limits = 6, None
    for step in range(4):
        first.update(first.sampler().batch(step))
    first.save()
    assert second.resume() and second.step == 4
    second.run(6, None, save_minutes=100)
    for (name, a), b in zip(straight.ema.named_parameters(), second.ema.parameters()):
        assert torch.equal(a, b), name
    assert straight.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 6)  # of the last step; then zero


def test_whole_utterances_of_like_length(items):
    sampler = UtteranceSampler(items, 4, seed=1)
    batch, same = sampler.batch(3), sampler.batch(3)
    assert torch.equal(batch.units, same.units) and batch.wav.numel() == 0
    known = {tuple(item.units): item for item in items}
    for row, durations, n in zip(batch.units, batch.durations, batch.lengths):
        assert durations[:n].tolist() == known[tuple(row[:n].tolist())].durations.tolist()
    batches = [sampler.batch(step) for step in range(30)]
    assert len({tuple(row[:n].tolist()) for b in batches for row, n in zip(b.units, b.lengths)}) == len(items)


def test_script_end_to_end(corpus, tmp_path, capsys):
    texts = tmp_path / "texts.tsv"
    texts.write_text("id\ttext\n" + "".join(f"t{i}\thello there\n" for i in range(10)))
    directory = tmp_path / "run"
    small = tmp_path / "small.json"
    small.write_text(json.dumps(SMALL.to_dict()))
    common = [str(corpus), "--save-dir", str(directory), "--batch-size", "2", "--piece-frames", "10", "--held-out", "2"]
    train_vocoder.main([*common, "--config", str(small), "--max-steps", "3", "--log-steps", "1", "--bf16"])
    train_vocoder.main([*common, "--max-steps", "5", "--gan-start", "4", "--texts", str(texts)])
    out = capsys.readouterr().out
    assert "resumed at step 3" in out and '"validation": 5' in out
    assert len((directory / "curve.tsv").read_text().splitlines()) == 3
    started = tmp_path / "started"
    init = ["--init", str(directory / "vocoder.pt"), "--config", str(small), "--max-steps", "0"]
    train_vocoder.main([*common[:2], str(started), *common[3:], *init])
    a = load_vocoder(directory / "vocoder.pt", directory / "vocoder.json")
    b = load_vocoder(started / "vocoder.pt", started / "vocoder.json")
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.parameters(), b.parameters()))
    with pytest.raises(ConfigError, match="unit 5"):
        train_vocoder.main([*common[:2], str(tmp_path / "few"), "--num-units", "3", "--max-steps", "1"])
    with pytest.raises(CheckpointError, match="another generator"):
        train_vocoder.main([*common, "--preset", "small", "--max-steps", "6"])
    (directory / "training.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(CheckpointError, match="training.pt is damaged"):
        train_vocoder.main([*common, "--max-steps", "6"])


def test_the_test_set_is_never_trained_on(corpus, items, tmp_path, capsys):
    (tmp_path / "target").symlink_to(corpus / "target")
    small = tmp_path / "small.json"
    small.write_text(json.dumps(SMALL.to_dict()))
    splits = ["test", "rest", "dev", "dev", *["train"] * 5]  # t9 is of no pair: nobody will ask for it
    rows = [Row(f"{i:06d}", split, "Uno.", "One.", f"t{i}") for i, split in enumerate(splits)]
    write_rows(tmp_path / "rows.tsv", rows)
    kept, ids = train_vocoder.without_test(items, tmp_path / "rows.tsv")
    train, held = hold_out(kept, 5, ids)
    assert {item.id for item in held} == {"t2", "t3"} and {item.id for item in train} == {f"t{i}" for i in range(4, 10)}
    train_vocoder.main([str(tmp_path), "--save-dir", str(tmp_path / "a"), "--config", str(small), "--max-steps", "0"])
    said = capsys.readouterr().out
    assert "left out 2 rows of the test set" in said and "\n6 utterances" in said
    write_rows(tmp_path / "rows.tsv", rows[4:])  # no dev: some of the others validate
    kept, ids = train_vocoder.without_test(items, tmp_path / "rows.tsv")
    assert ids is None and len(hold_out(kept, 2, ids)[0]) == 8
    write_rows(tmp_path / "rows.tsv", rows)  # besides those named, neither test nor dev is trained on
    named = tmp_path / "ids.txt"
    named.write_text("t0\nt5\n")
    more = ["--config", str(small), "--max-steps", "0", "--held-out-ids", str(named)]
    train_vocoder.main([str(tmp_path), "--save-dir", str(tmp_path / "b"), *more])
    assert "\n5 utterances" in capsys.readouterr().out


def test_what_cannot_be_trained_is_refused(corpus, items, tmp_path):
    for option, says in (("piece-frames", "piece_frames is 0"), ("batch-size", "batch_size is 0")):
        with pytest.raises(ConfigError, match=says):
            train_vocoder.main([str(corpus), "--save-dir", str(tmp_path), f"--{option}", "0"])
    many = VocoderConfig.preset("v1", UNITS, multispkr="_", model_in_dim=16, num_speakers=2, **FIELD)
    for speaker in (None, 2):
        unfit = [dataclasses.replace(item, speaker=speaker) for item in items]
        with pytest.raises(ConfigError, match=f"multispkr.*speaker {speaker}"):
            Trainer(many, OPTIONS, unfit, unfit, tmp_path)
    table = (corpus / "target" / "units.tsv").read_text().splitlines()
    (tmp_path / "units.tsv").write_text(f"{table[0]}\tspeaker\n{table[1]}\tAnna\n")
    with pytest.raises(ManifestError, match="line 2: speaker 'Anna'"):
        read_units(tmp_path / "units.tsv")
