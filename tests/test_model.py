"""The joined model: sizes and outputs of the design, streaming that equals the offline pass, and fairseq's side."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from echostream.config import SMALL, EchoStreamConfig
from echostream.constants import EOS, PAD
from echostream.errors import CheckpointError, ConfigError, EchoStreamError, ManifestError
from echostream.models.decoders.unit_decoder import greedy_units
from echostream.models.decoders.vocoder import CodeHiFiGAN, VocoderConfig
from echostream.models.echostream_model import EchoStreamModel, SentenceWindows, build_echostream_model

ROOT = Path(__file__).parents[1]
EXACT = dict(rtol=0, atol=1e-9)
UNIT_INPUTS = ["encoder", "mt", "mt-tokens"]
TINY = dict(
    conv_channels=4, encoder_embed_dim=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_embed_dim=24,
    left_context_length=6, memory_size=2, asr_vocab_size=11, st_decoder_layers=1, st_decoder_heads=2, st_vocab_size=13,
    st_left_context=5, mt_decoder_layers=2, mt_decoder_heads=2, mt_decoder_embed_dim=12, mt_decoder_ffn_dim=20,
    mt_vocab_size=13, unit_decoder_layers=2, unit_decoder_heads=2, unit_decoder_embed_dim=8, unit_decoder_ffn_dim=20,
    ctc_upsample_ratio=3, num_units=9, max_sentence_frames=24, max_target_tokens=12,
)  # fmt: skip


def tiny(seed: int = 0, **changes) -> EchoStreamModel:
    torch.manual_seed(seed)
    model = build_echostream_model(EchoStreamConfig(**{**TINY, **changes})).double().eval()
    if model.unit_decoder.tokens is not None:  # they start at zero, where none differs from another
        torch.nn.init.normal_(model.unit_decoder.tokens.weight)
    return model


def speech(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), 80, generator=generator, dtype=torch.float64)
    return x, torch.tensor(lengths)


def targets(*lengths: int) -> torch.Tensor:
    out = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        out[row, :length] = torch.randint(4, 13, (length,), generator=torch.Generator().manual_seed(row))
        out[row, 0] = EOS
    return out


def speaker(units: int = 9) -> CodeHiFiGAN:
    torch.manual_seed(5)
    config = VocoderConfig.preset(
        "small", units, upsample_initial_channel=16, upsample_channels=[8, 8, 8, 8], embedding_dim=8,
        dur_predictor_params=dict(encoder_embed_dim=8, var_pred_hidden_dim=8, var_pred_kernel_size=3),
    )  # fmt: skip
    return CodeHiFiGAN(config).double().eval()


# ---- the design's numbers ----------------------------------------------------------------------------------------


def test_design_example():
    torch.manual_seed(0)
    model = build_echostream_model(EchoStreamConfig(encoder_layers=16)).eval()
    assert sum(p.numel() for p in model.parameters()) == 34_192_188
    with torch.no_grad():
        out = model(torch.randn(2, 100, 80), torch.tensor([100, 80]))
        assert out["encoder_out"]["encoder_out"][0].shape == (25, 2, 256)
        assert out["encoder_out"]["encoder_padding_mask"][0].sum(1).tolist() == [0, 5]
        assert out["asr_logits"].shape == out["st_logits"].shape == (2, 25, 6000)
        assert out["unit_logits"].shape == (2, 125, 1004) and out["unit_lengths"].tolist() == [125, 100]
        assert "mt_logits" not in out and "waveform" not in out
        model.reset_cache()
        frames = [
            model(torch.randn(1, 4, 80), torch.tensor([4]), finished=i == 5)["asr_logits"].shape[1] for i in range(6)
        ]
    assert frames == [0, 0, 0, 4, 0, 2]


def test_count_parameters_prints_and_checks():
    run = [sys.executable, str(ROOT / "scripts" / "count_parameters.py")]
    done = subprocess.run(
        [*run, "--config", "configs/echostream_config.yaml", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for number in ("15,592,448", "1,903,616", "855,552", "14,539,776", "789,760", "1,053,440", "34,192,188"):
        assert number in done.stdout
    assert "DIFFERS" not in done.stdout
    done = subprocess.run([*run, "--config", "none.yaml"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 2 and done.stderr.decode().count("\n") == 1 and b"none.yaml" in done.stderr


def test_configuration_file_is_the_default():
    assert EchoStreamConfig.from_yaml(ROOT / "configs" / "echostream_config.yaml") == EchoStreamConfig()


def test_the_model_does_not_need_fairseq():
    code = "import sys; import echostream.models.echostream_model; assert 'fairseq' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})


# ---- offline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", UNIT_INPUTS)
def test_every_parameter_learns(source):
    model = tiny(unit_decoder_input=source).train()
    x, lengths = speech(70, 50)
    out = model(x, lengths, targets(5, 3))
    assert out["mt_logits"].shape == (2, 5, 13) and out["mt_hidden"].shape == (2, 5, 12)
    assert out["unit_lengths"].tolist() == ([54, 39] if source == "encoder" else [15, 9])
    (sum(out[f"{part}_logits"].square().sum() for part in ("asr", "st", "mt", "unit"))).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("source", UNIT_INPUTS)
def test_neighbours_and_padding_change_nothing(source):
    model = tiny(unit_decoder_input=source)
    x, lengths = speech(70, 45)
    prev = targets(5, 3)
    with torch.no_grad():
        both = model(x, lengths, prev)
        alone = model(x[1:, :45], lengths[1:], prev[1:, :3])
    sizes = dict(asr_logits=12, st_logits=12, mt_logits=3, unit_logits=int(alone["unit_lengths"]))
    for name, n in sizes.items():
        torch.testing.assert_close(both[name][1, :n], alone[name][0, :n], **EXACT)


@pytest.mark.parametrize("source", UNIT_INPUTS)
def test_sentence_windows_equal_single_sentences(source):
    """What follows the encoder sees a window of a joined utterance as it would see an utterance of its own."""
    model = tiny(unit_decoder_input=source)
    x, lengths = speech(70, 45)
    windows = SentenceWindows(torch.tensor([0, 1, 0]), torch.tensor([0, 2, 10]), torch.tensor([9, 99, 18]))
    prev = targets(4, 6, 2)
    with torch.no_grad():
        out = model(x, lengths, prev, windows=tuple(windows))
        frames, _counts = model.encoder(x, lengths)
        for s, (row, start, end) in enumerate([(0, 0, 9), (1, 2, 12), (0, 10, 18)]):
            part, n = frames[row : row + 1, start:end], torch.tensor([end - start])
            u = int((prev[s] != PAD).sum())
            logits, hidden = model.mt_decoder(prev[s : s + 1, :u], part, n)
            torch.testing.assert_close(out["mt_logits"][s, :u], logits[0], **EXACT)
            inputs = (part, n) if source == "encoder" else (hidden, torch.tensor([u]))
            tokens = torch.cat([prev[s, 1:u], torch.tensor([EOS])])[None]
            units = model.unit_decoder(*inputs, part, n, tokens=tokens)[0]
            assert int(out["unit_lengths"][s]) == len(units)
            torch.testing.assert_close(out["unit_logits"][s, : len(units)], units, **EXACT)


@pytest.mark.parametrize("source", UNIT_INPUTS)
def test_parts_alone_equal_the_whole(source):
    model = tiny(unit_decoder_input=source)
    x, lengths = speech(70, 45)
    prev = targets(4, 3)
    with torch.no_grad():
        whole = model(x, lengths, prev)
        for part in ("asr", "st", "mt", "unit"):
            out = model(x, lengths, prev, parts={part})
            torch.testing.assert_close(out[f"{part}_logits"], whole[f"{part}_logits"], **EXACT)
            needed = {part, "mt"} if part == "unit" and source != "encoder" else {part}
            assert {name.split("_")[0] for name in out if name.endswith("logits")} == needed


def test_units_follow_what_was_written():
    """With mt-tokens another last word sounds different although no MT state has seen it; with mt alone it cannot."""
    x, lengths = speech(70)
    prev, changed = targets(5), targets(5)
    changed[0, 4] = 4 + (int(prev[0, 4]) - 3) % 9  # position 4 predicts </s>; position 3 predicted this token
    for source, depends in (("mt", False), ("mt-tokens", True)):
        model = tiny(unit_decoder_input=source)
        with torch.no_grad():
            one, other = (model(x, lengths, p)["unit_logits"][0] for p in (prev, changed))
        start, end = (n * model.unit_decoder.ratio for n in (3, 4))
        assert torch.equal(one[:start], other[:start])
        assert torch.equal(one[start:end], other[start:end]) != depends


def test_a_decoder_that_read_states_alone_goes_on_as_it_was(tmp_path):
    """--decoder-init of an ``mt`` checkpoint: the tokens' embeddings start at zero, the scores stay the same."""
    from echostream.fairseq_model import DECODERS, take_over

    states, tokens = tiny(unit_decoder_input="mt"), tiny(1, unit_decoder_input="mt-tokens")
    torch.nn.init.zeros_(tokens.unit_decoder.tokens.weight)
    torch.save({"model": states.state_dict(), "args": None, "cfg": None}, tmp_path / "states.pt")
    taken = take_over(tokens, tmp_path / "states.pt", DECODERS)
    assert "unit_decoder.input.weight" in taken and "unit_decoder.tokens.weight" not in taken
    memory, inputs, n = torch.randn(1, 6, 16).double(), torch.randn(1, 4, 12).double(), torch.tensor([4])
    given = dict(tokens=torch.tensor([[4, 5, 6, EOS]]))
    with torch.no_grad():
        before, after = (m.unit_decoder(inputs, n, memory, n + 2, **given) for m in (states, tokens))
    torch.testing.assert_close(after, before, **EXACT)
    with pytest.raises(EchoStreamError, match="'mt-tokens': the unit decoder needs the tokens"):
        tokens.unit_decoder(inputs, n, memory, n + 2)


def test_masks_reach_both_decoders():
    model = tiny(unit_decoder_input="mt")
    x, lengths = speech(70)
    prev, visible = targets(4), torch.tensor([[2, 2, 18, 18]])
    other = x.clone()
    with torch.no_grad():
        base = model(x, lengths, prev, visible=visible)
        other[0, 40:] += 1
        changed = model(other, lengths, prev, visible=visible)
    torch.testing.assert_close(base["mt_logits"][0, :2], changed["mt_logits"][0, :2], **EXACT)
    torch.testing.assert_close(base["unit_logits"][0, :6], changed["unit_logits"][0, :6], **EXACT)
    assert (base["mt_logits"][0, 2:] - changed["mt_logits"][0, 2:]).abs().max() > 1e-6


def test_text_units_without_a_target_are_decoded_greedily_but_not_trained():
    model = tiny(unit_decoder_input="mt")
    x, lengths = speech(70, 45)
    with torch.no_grad():
        out = model(x, lengths)
        prev = torch.cat([torch.full((2, 1), EOS), out["mt_tokens"][:, :-1]], dim=1)
        again = model(x, lengths, prev)
    for row, n in enumerate(out["unit_lengths"].tolist()):
        torch.testing.assert_close(out["unit_logits"][row, :n], again["unit_logits"][row, :n], **EXACT)
    with pytest.raises(EchoStreamError, match="prev_output_tokens"):
        model.train()(x, lengths)


def test_waveform_is_that_of_the_collapsed_units():
    model = tiny()
    model.vocoder = speaker()
    x, lengths = speech(70, 45)
    with torch.no_grad():
        out = model(x, lengths)
    units, counts, _ = greedy_units(out["unit_logits"], out["unit_lengths"])
    assert counts.min() > 0 and torch.equal(out["units"], units)
    with torch.no_grad():
        waveform, samples = model.vocoder(units, counts)
    assert torch.equal(out["waveform"], waveform) and torch.equal(out["waveform_lengths"], samples)
    assert waveform.abs().max() <= 1 and int(samples.min()) >= 320
    assert "waveform" not in model.train()(x, lengths)


def test_vocoder_of_too_few_units_is_refused():
    with pytest.raises(ConfigError, match="speaks 8 units.*9"):
        build_echostream_model(EchoStreamConfig(**TINY), vocoder=speaker(8))


@pytest.mark.parametrize("source", UNIT_INPUTS)
@pytest.mark.parametrize("kind", ["autocast", "bfloat16 weights"])
def test_bfloat16_trains_decodes_and_streams(source, kind):
    torch.manual_seed(0)
    model = build_echostream_model(EchoStreamConfig(**{**TINY, "unit_decoder_input": source}))
    x, lengths = speech(70, 50)
    model, x = (model, x.float()) if kind == "autocast" else (model.bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        out = model(x, lengths, targets(4, 3))
        sum(out[f"{part}_logits"].float().square().mean() for part in ("asr", "st", "mt", "unit")).backward()
        model.eval()
        assert model(x, lengths)["unit_logits"].isfinite().all()
        model.reset_cache()
        assert model(x, lengths, finished=True)["st_logits"].isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- streaming ---------------------------------------------------------------------------------------------------


def offline_as_streamed(model: EchoStreamModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """One row at once, each unit position seeing its own segment and, after a full buffer, its own sentence only."""
    cfg = model.config
    out = model(x, torch.tensor([x.shape[1]]))
    frames, n = model.encoder(x, torch.tensor([x.shape[1]]))
    units = []
    for start in range(0, int(n), cfg.max_sentence_frames):
        part = frames[:, start : start + cfg.max_sentence_frames]
        count = torch.tensor([part.shape[1]])
        seen = (torch.arange(part.shape[1]) // cfg.segment_length + 1) * cfg.segment_length
        units.append(model.unit_decoder(part, count, part, count, seen[None]))
    return {"asr_logits": out["asr_logits"], "st_logits": out["st_logits"], "unit_logits": torch.cat(units, dim=1)}


@pytest.mark.parametrize("largest", [1, 7, 60])
def test_stream_of_mixed_ages_equals_offline_alone(largest):
    generator = torch.Generator().manual_seed(largest)
    model = tiny()
    model.vocoder = speaker()
    lengths = torch.tensor([131, 20, 64])  # the first fills the buffers of a sentence (24 frames) and goes on
    x, _ = speech(*lengths.tolist())
    names = ("asr_logits", "st_logits", "unit_logits", "waveform")
    got = [{name: [] for name in names} for _ in range(3)]
    done, ended = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool)
    state = model.init_state(3)
    size = state.nbytes
    while not bool(ended.all()):
        take = torch.minimum(torch.randint(0, largest + 1, (3,), generator=generator), lengths - done)
        chunk = torch.stack([x[b].roll(-int(done[b]), 0)[: int(take.max()) + 1] for b in range(3)])
        finished = (done + take == lengths) & ~ended
        before = [t.clone() for t in state.tensors()]
        out, new = model.step(chunk, take, state, finished)
        assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
        state, done, ended = new, done + take, ended | finished
        counts = dict(asr_logits="encoder_lengths", st_logits="encoder_lengths", unit_logits="unit_lengths")
        for row in range(3):
            for name in names:
                got[row][name].append(out[name][row, : out[counts.get(name, "waveform_lengths")][row]])
    assert state.nbytes == size
    with torch.no_grad():
        for row in range(3):
            expected = offline_as_streamed(model, x[row : row + 1, : lengths[row]])
            for name in names[:3]:
                torch.testing.assert_close(torch.cat(got[row][name]), expected[name][0], **EXACT)
            units, counts, _ = greedy_units(expected["unit_logits"], torch.tensor([expected["unit_logits"].shape[1]]))
            torch.testing.assert_close(torch.cat(got[row]["waveform"]), model.vocoder(units, counts)[0][0], **EXACT)


def test_reset_cache_loop():
    model = tiny()
    x, lengths = speech(50)
    with torch.no_grad():
        expected = model(x, lengths)["asr_logits"]
    for _ in range(2):  # the second round shows that reset_cache forgets
        model.reset_cache()
        outs = [model(x[:, i : i + 3], torch.tensor([min(3, 50 - i)]), finished=i >= 47) for i in range(0, 50, 3)]
        torch.testing.assert_close(torch.cat([out["asr_logits"] for out in outs], dim=1), expected, **EXACT)
    with pytest.raises(EchoStreamError, match="2 rows.*reset_cache"):
        model(x[:, :3].expand(2, 3, 80), torch.tensor([3, 3]))
    model.train()
    assert model(x, lengths, targets(3))["asr_logits"].shape[1] == 13
    with pytest.raises(EchoStreamError, match="eval"):
        model.reset_cache()
    model.eval()
    assert model(x, lengths)["asr_logits"].shape[1] == 13  # train() has left streaming


def test_new_sentence_starts_the_units_only():
    model = tiny()
    x, _ = speech(64)
    model.reset_cache()
    model(x[:, :35], torch.tensor([35]))
    model.new_sentence()
    out = model(x[:, 35:], torch.tensor([29]), finished=True)
    with torch.no_grad():
        whole = model.encoder(x, torch.tensor([64]))[0][:, 8:]
        torch.testing.assert_close(out["encoder_out"]["encoder_out"][0].transpose(0, 1), whole, **EXACT)
        seen = (torch.arange(8) // 4 + 1)[None] * 4
        expected = model.unit_decoder(whole, torch.tensor([8]), whole, torch.tensor([8]), seen)
    torch.testing.assert_close(out["unit_logits"], expected, **EXACT)


def test_masked_forward_reproduces_a_streamed_translation():
    """Reading 3 of the design over the whole chain: while features arrive, tokens and units are written at any time."""
    generator = torch.Generator().manual_seed(1)
    model = tiny(unit_decoder_input="mt")
    x, lengths = speech(90)
    prev = targets(7)
    encoder, mt, units = model.encoder.init_state(1), model.mt_decoder.init_state(1), model.unit_decoder.init_state(1)
    one, heard, at, visible, scores, unit_scores = torch.tensor([1]), 0, 0, [], [], []
    with torch.no_grad():
        while len(visible) < 7:
            size = min(int(torch.randint(1, 25, (), generator=generator)), 90 - at)
            finished = torch.tensor([at + size == 90])
            frames, count, encoder = model.encoder.step(x[:, at : at + size], torch.tensor([size]), encoder, finished)
            at, heard = at + size, heard + int(count)
            mt, units = model.mt_decoder.extend(frames, count, mt), model.unit_decoder.extend(frames, count, units)
            write = 7 if at == 90 else int(torch.randint(0, 3, (), generator=generator))
            for position in range(len(visible), min(len(visible) + write, 7)):
                logits, hidden, mt = model.mt_decoder.step(prev[:, position : position + 1], None, mt)
                sound, _, units = model.unit_decoder.step(hidden, one, units)
                visible.append(heard)
                scores.append(logits)
                unit_scores.append(sound)
        out = model(x, lengths, prev, visible=torch.tensor([visible]))
    assert len(set(visible)) > 2
    torch.testing.assert_close(torch.cat(scores, dim=1), out["mt_logits"], **EXACT)
    torch.testing.assert_close(torch.cat(unit_scores, dim=1), out["unit_logits"], **EXACT)


# ---- weights and fairseq -----------------------------------------------------------------------------------------


def test_weights_round_trip_with_a_vocoder_attached():
    model, other = tiny(1), tiny(2)
    other.vocoder = speaker()
    other.load_state_dict(model.state_dict())
    x, lengths = speech(30)
    with torch.no_grad():
        torch.testing.assert_close(other(x, lengths)["unit_logits"], model(x, lengths)["unit_logits"], **EXACT)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(asr_vocab_size=12), ("ASR CTC head", "11", "12", "source dictionary")),
        (dict(st_vocab_size=14, mt_vocab_size=14), ("ST CTC head", "13", "14", "target dictionary")),
        (dict(mt_vocab_size=14), ("MT decoder", "13", "14")),
        (dict(num_units=10), ("unit decoder", "13", "14", "unit dictionary")),
        (dict(mt_decoder_ffn_dim=24), ("mt_decoder.layers.0.ffn.inner.weight", "[20, 12]", "[24, 12]")),
        (dict(mt_decoder_layers=3), ("lacks", "mt_decoder.layers.2")),
        (dict(mt_decoder_layers=1), ("has", "mt_decoder.layers.1")),
    ],
)
def test_weights_that_do_not_fit_are_named(changes, words):
    with pytest.raises(CheckpointError) as caught:
        tiny(**changes).load_state_dict(tiny().state_dict())
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def task(source: int = 11, target: int = 13, units: int = 13) -> SimpleNamespace:
    dictionaries = dict(source_dictionary=source, target_dictionary=target, unit_dictionary=units)
    return SimpleNamespace(**{name: range(size) for name, size in dictionaries.items()})


@pytest.fixture(scope="module")
def fairseq_models():
    pytest.importorskip("fairseq")
    from echostream import plugin

    plugin.register_with_fairseq()
    from fairseq import models

    return models


def parse(*options: str) -> argparse.Namespace:
    from fairseq import options as fairseq_options

    parser = fairseq_options.get_training_parser()
    return fairseq_options.parse_args_and_arch(parser, ["data", "--task", "translation", *options])


def test_architectures_fill_what_was_not_said(fairseq_models):
    args = parse("--arch", "echostream_small", "--encoder-layers", "3", "--encoder-normalize-before")
    expected = EchoStreamConfig.small(encoder_layers=3, encoder_normalize_before=True)
    assert EchoStreamConfig.from_args(args) == expected and args.unit_decoder_input == SMALL["unit_decoder_input"]
    assert EchoStreamConfig.from_args(parse("--arch", "echostream")) == EchoStreamConfig()
    assert EchoStreamConfig.from_args(parse("--arch", "echostream_tiny")) == EchoStreamConfig.tiny()


def tiny_args(**changes) -> argparse.Namespace:
    return argparse.Namespace(arch="echostream", **{**TINY, **changes})


def test_build_model_takes_the_sizes_of_the_dictionaries(fairseq_models):
    args = tiny_args()
    model = fairseq_models.build_model(args, task(20, 30, 44))
    cfg = model.config
    assert (cfg.asr_vocab_size, cfg.st_vocab_size, cfg.mt_vocab_size, cfg.num_units) == (20, 30, 30, 40)
    assert args.num_units == 40 and args.asr_vocab_size == 20  # the checkpoint will tell
    assert model.state_dict().keys() == build_echostream_model(cfg).state_dict().keys()
    assert model.max_positions() is None
    out = model.eval()(torch.randn(2, 40, 80), torch.tensor([40, 30]), targets(3, 2))
    probabilities = model.get_normalized_probs(out, log_probs=False, sample=None)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3))
    logs = model.get_normalized_probs((out["mt_logits"], None), log_probs=True)
    torch.testing.assert_close(logs.exp(), probabilities)
    with pytest.raises(ManifestError, match="unit_dictionary"):
        fairseq_models.build_model(tiny_args(), SimpleNamespace(source_dictionary=range(9), target_dictionary=range(9)))
    with pytest.raises(ConfigError, match="segment_length"):
        fairseq_models.build_model(tiny_args(segment_length=0), task())


def test_checkpoint_of_other_dictionaries_is_refused(fairseq_models):
    trained = fairseq_models.build_model(tiny_args(), task())
    args = tiny_args()
    with pytest.raises(CheckpointError, match="target dictionary has 15"):
        fairseq_models.build_model(args, task(target=15)).load_state_dict(trained.state_dict(), model_cfg=args)
    fairseq_models.build_model(args, task()).load_state_dict(trained.state_dict(), strict=True, model_cfg=args)


def test_encoder_init(fairseq_models, tmp_path, caplog):
    trained = fairseq_models.build_model(tiny_args(), task())
    path = tmp_path / "asr.pt"
    torch.save({"model": trained.state_dict(), "args": argparse.Namespace(arch="echostream")}, path)
    args = tiny_args(encoder_init=str(path))
    model = fairseq_models.build_model(args, task(target=20))
    assert args.encoder_init is None  # a checkpoint must not ask for this path later
    for name, value in trained.state_dict().items():
        if name.startswith(("encoder.", "asr_head.")):
            assert torch.equal(model.state_dict()[name], value)
    assert "st_decoder is of another dictionary" in caplog.text
    fairseq_models.build_model(tiny_args(encoder_init=str(path)), task(source=12))
    assert "asr_head is of another dictionary" in caplog.text
    with pytest.raises(CheckpointError, match="encoder.layers.0"):
        fairseq_models.build_model(tiny_args(encoder_init=str(path), encoder_ffn_embed_dim=32), task())
    with pytest.raises(CheckpointError, match="missing.pt"):
        fairseq_models.build_model(tiny_args(encoder_init=str(tmp_path / "missing.pt")), task())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="asr.pt"):
        fairseq_models.build_model(tiny_args(encoder_init=str(path)), task())
