"""The vocoder: the field's checkpoints sound the same, streams have no seams, bad input is named."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random

import pytest
import torch
from torch import Tensor

from echostream.errors import CheckpointError, ConfigError, UnitError
from echostream.models.decoders.vocoder import CodeHiFiGAN, VocoderConfig
from echostream.models.decoders.vocoder_checkpoint import load_vocoder, load_weights, save_vocoder
from echostream.models.decoders.vocoder_layers import DurationClassifier, WholeFlow, pack_weights
from echostream.models.state import State

UNITS = 40
DURATIONS = dict(encoder_embed_dim=16, var_pred_hidden_dim=12, var_pred_kernel_size=3, var_pred_dropout=0.5)
CHOICE = dict(
    encoder_embed_dim=20, var_pred_hidden_dim=12, var_pred_kernel_size=5, var_pred_dropout=0.1, var_pred_max_frames=5,
    var_pred_layers=2,
)  # fmt: skip
FIELD = dict(
    resblock="1",
    upsample_rates=[5, 4, 4, 2, 2],
    upsample_kernel_sizes=[11, 8, 8, 4, 4],
    upsample_initial_channel=32,
    resblock_kernel_sizes=[3, 7, 11],
    resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    num_embeddings=UNITS,
    embedding_dim=16,
    model_in_dim=16,
    code_hop_size=320,
    sampling_rate=16000,
    f0=False,
    segment_size=8960,
    dur_prediction_weight=1.0,
    dur_predictor_params=DURATIONS,
)
SHORT = dict(FIELD, resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 2, 1]] * 2)
SMALL = dict(
    VocoderConfig.preset("small").to_dict(),
    num_embeddings=UNITS,
    embedding_dim=16,
    model_in_dim=16,
    upsample_initial_channel=24,
    upsample_channels=[16, 12, 8, 4],
    dur_predictor_params=DURATIONS,
)
SHAPES = {
    "field": SHORT,
    "field, no durations": dict(SHORT, dur_predictor_params=None),
    "field, speakers": dict(SHORT, multispkr="from_input_file", num_speakers=3, model_in_dim=32),
    "small": SMALL,
    "small, 1 ahead": dict(SMALL, lookahead_units=1),
    "small, choice": dict(SMALL, dur_predictor_params=CHOICE),
    "small, 1 ahead, short choice": dict(
        SMALL, lookahead_units=1, dur_predictor_params=dict(CHOICE, var_pred_kernel_size=3)
    ),
    "small, wide choice": dict(SMALL, dur_predictor_params=dict(CHOICE, var_pred_kernel_size=7, var_pred_layers=0)),
    "small, blind": dict(SMALL, lookahead_units=0),
    "small, bare": dict(
        SMALL, lookahead_units=0, context_layers=0, frame_layers=0, position_buckets=0, dur_predictor_params=None
    ),
    "causal v1": dict(SHORT, causal=True),
}


def build(config: dict, seed: int = 0, dtype: torch.dtype = torch.float64) -> CodeHiFiGAN:
    """A loud random generator, so that a seam or a wrong neighbour would be heard."""
    torch.manual_seed(seed)
    model = CodeHiFiGAN(config).eval().to(dtype)
    shake(model)
    return model


def shake(model: torch.nn.Module) -> None:
    """Random weights that keep the signal's level, weight norm or not, and biases that no zero padding hides."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight_g"):
            torch.nn.init.constant_(parameter, 3.0 if "convs" not in name else 1.0)
        elif parameter.dim() > 1:
            fan = parameter[0].numel()
            if name.startswith("ups"):
                fan = parameter.shape[0]
            torch.nn.init.normal_(parameter, std=0.7 / fan**0.5 if "resblocks" in name else 1 / fan**0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.dict.weight)
    if model.dur_predictor is not None:
        torch.nn.init.constant_(model.dur_predictor.proj.bias, 1.0)  # durations of about 2 frames
    if isinstance(model.dur_predictor, DurationClassifier):
        torch.nn.init.normal_(model.dur_predictor.dict.weight)
        for norm in model.dur_predictor.norms:
            norm.reset_parameters()  # durations of all sorts


@pytest.fixture(params=SHAPES, scope="module")
def model(request) -> CodeHiFiGAN:
    return build(SHAPES[request.param])


def sequences(count: int, seed: int, longest: int = 30) -> list[Tensor]:
    rng = random.Random(seed)
    return [torch.tensor([rng.randrange(UNITS) for _ in range(rng.randint(1, longest))]) for _ in range(count)]


def pad(rows: list[Tensor], fill: int = -1) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    out = torch.full((len(rows), int(lengths.max())), fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, lengths


def speakers_of(model: CodeHiFiGAN, rows: int) -> Tensor | None:
    return torch.arange(rows) % 3 if model.config.multispkr else None


@torch.no_grad()
def alone(model: CodeHiFiGAN, rows: list[Tensor]) -> list[Tensor]:
    speakers = speakers_of(model, len(rows))
    return [
        model(row.unsqueeze(0), speakers=None if speakers is None else speakers[i : i + 1])[0][0]
        for i, row in enumerate(rows)
    ]


@torch.no_grad()
def streamed(model: CodeHiFiGAN, rows: list[Tensor], seed: int) -> list[Tensor]:
    """Every row in random chunks, empty ones included; some end with their last units, some in a later step."""
    rng = random.Random(seed)
    state, speakers = model.init_state(len(rows)), speakers_of(model, len(rows))
    left = list(rows)
    out: list[list[Tensor]] = [[] for _ in rows]
    open_rows = set(range(len(rows)))
    while open_rows:
        taken = [rng.choice((0, 0, 1, 2, 3, 8)) for _ in rows]
        chunk, lengths = pad([row[:n] for row, n in zip(left, taken)])
        left = [row[n:] for row, n in zip(left, taken)]
        finished = torch.tensor([i in open_rows and not len(row) and rng.random() < 0.6 for i, row in enumerate(left)])
        wav, wav_lengths, state = model.step(chunk, lengths, state, finished, speakers)
        for i in range(len(rows)):
            assert i in open_rows or not wav_lengths[i]
            assert not wav[i, wav_lengths[i] :].any()
            out[i].append(wav[i, : wav_lengths[i]])
        open_rows -= set(finished.nonzero().flatten().tolist())
    return [torch.cat(parts) for parts in out]


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, f"row {i}"
        assert (a - b).abs().max() < tolerance, f"row {i}"


# ---------------------------------------------------------------------------------------------------------- streaming
def test_streamed_equals_offline(model):
    rows = sequences(6, seed=1)
    expected = alone(model, rows)
    assert max(wav.std() for wav in expected) > 0.02
    for seed in range(3):
        assert_same(streamed(model, rows, seed), expected)


@pytest.mark.parametrize("name", ["small", "field"])
def test_fifty_sequences_in_single_precision(name):
    model = build(SHAPES[name], dtype=torch.float32)
    rows = sequences(50, seed=2)
    assert_same(streamed(model, rows, seed=3), alone(model, rows), 1e-4)


def test_rows_do_not_hear_each_other(model):
    rows = sequences(5, seed=4)
    units, lengths = pad(rows, fill=123456)  # padding may hold anything
    with torch.no_grad():
        wav, wav_lengths = model(units, lengths, speakers=speakers_of(model, 5))
    assert wav.shape[1] == wav_lengths.max()
    assert_same([wav[i, :n] for i, n in enumerate(wav_lengths)], alone(model, rows))
    for i, n in enumerate(wav_lengths):
        assert not wav[i, n:].any()


@torch.no_grad()
def test_step_leaves_the_state_it_was_given(model):
    rows = sequences(3, seed=5)
    units, lengths = pad(rows)
    speakers = speakers_of(model, 3)
    _, _, state = model.step(units, lengths, model.init_state(3), None, speakers)
    before = [t.clone() for t in state.tensors()]
    first = model.step(units, lengths, state, torch.tensor([True, False, True]), speakers)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
    again = model.step(units, lengths, state, torch.tensor([True, False, True]), speakers)
    assert torch.equal(first[0], again[0])


@torch.no_grad()
def test_state_is_a_value_of_fixed_size(model):
    speakers = speakers_of(model, 2)
    new = model.init_state(2)
    state, one = new, None if speakers is None else speakers[:1]
    for row in sequences(4, seed=6):
        _, _, state = model.step(row.expand(2, -1), torch.tensor([len(row), 1]), state, None, speakers)
        assert state.nbytes == new.nbytes
    restored = new.from_arrays(state.arrays())
    parts = restored.unstack()
    assert_same(State.stack(parts).tensors(), state.tensors(), 1e-12) if state.tensors()[0].numel() else None
    more = torch.tensor([[3, 1, 4]])
    last = torch.tensor([True])
    wav, _, ended = model.step(more, torch.tensor([3]), parts[0], last, one)
    joined, lengths, _ = model.step(
        more.expand(2, -1), torch.tensor([3, 3]), state, torch.tensor([True, True]), speakers
    )
    assert_same([joined[0, : lengths[0]]], [wav[0]])
    assert all(torch.equal(a, b) for a, b in zip(ended.tensors(), model.init_state(1).tensors()))


@torch.no_grad()
def test_lookahead_is_what_it_says(model):
    """With ``lookahead_units`` more units a unit's samples are out; later units never change them."""
    ahead = model.lookahead_units
    row = sequences(1, seed=7, longest=1)[0].repeat(1) * 0 + torch.arange(60) % UNITS
    speakers = speakers_of(model, 1)
    durations = None
    if model.dur_predictor is None:
        durations = torch.ones(1, len(row), dtype=torch.long)
    full = model(row[None], durations=durations, speakers=speakers)[0][0]
    state, out, wanted = model.init_state(1), 0, []
    for unit in row:
        _, n, state = model.step(unit.view(1, 1), torch.ones(1, dtype=torch.long), state, None, speakers)
        out += int(n)
        wanted.append(out)
    # units' ends in the offline waveform
    ends = []
    for i in range(1, len(row) + 1):
        ends.append(int(_frames(model, row)[:i].sum()) * model.hop)
    assert ends[-1] == len(full)
    for i in range(len(row) - ahead):
        assert wanted[i + ahead] >= ends[i], f"unit {i} is late"


def _frames(model: CodeHiFiGAN, row: Tensor) -> Tensor:
    return model.predict_durations(model.duration_input(row[None], WholeFlow(None)), WholeFlow(None))[0]


def test_lookahead_of_the_presets():
    small = CodeHiFiGAN(VocoderConfig.preset("small"))
    assert (small.lookahead_units, small.lookahead_ms) == (2, 40.0)
    assert sum(p.numel() for p in small.parameters()) <= 3_300_000
    assert sum(p.numel() for p in small.dur_predictor.parameters()) * 2 <= 1.2e6  # bytes of fp16
    v1 = CodeHiFiGAN(VocoderConfig.preset("v1"))
    assert (v1.lookahead_frames, v1.lookahead_units, v1.lookahead_ms) == (21, 23, 460.0)
    assert sum(p.numel() for p in v1.parameters()) == 13_475_010
    plain = CodeHiFiGAN(VocoderConfig.preset("v1", dur_predictor_params=None))
    assert plain.lookahead_units == 21


@torch.no_grad()
def test_samples_beyond_the_lookahead_do_not_depend_on_what_follows():
    model = build(SHAPES["small"])
    head = sequences(1, seed=8)[0].new_tensor(list(range(20)))
    one = model(torch.cat([head, torch.tensor([1, 2, 3, 4, 5, 6])])[None])[0][0]
    two = model(torch.cat([head, torch.tensor([30, 31])])[None])[0][0]
    same = int(_frames(model, torch.cat([head, head[:6]]))[:18].sum()) * model.hop
    assert (one[:same] - two[:same]).abs().max() < 1e-12
    assert (one[same : same + 320] - two[same : same + 320]).abs().max() > 1e-3


@torch.no_grad()
def test_a_chosen_duration_looks_no_further_ahead_than_the_frames():
    model = build(SHAPES["small, choice"])
    row = torch.arange(24) % UNITS
    before = _frames(model, row)
    assert len(before.unique()) > 2 and before.min() >= 1 and before.max() <= 5
    for at in range(3, 24):
        other = row.clone()
        other[at:] = (other[at:] + 17) % UNITS
        assert torch.equal(_frames(model, other)[: at - 2], before[: at - 2])
    flow = WholeFlow(None)
    seen = model.dur_predictor(model.duration_input(row[None], flow), flow)
    row[10] += 1
    changed = (model.dur_predictor(model.duration_input(row[None], flow), flow) - seen).abs().amax(2)[0]
    assert changed[7] == 0 < changed[8]


def test_a_duration_is_the_rounded_mean():
    scores = torch.full((1, 4, 5), -1e4)
    scores[0, 0, 2] = scores[0, 1, 0] = scores[0, 1, 3] = scores[0, 2, 4] = 1.0
    scores[0, 3] = torch.tensor([0.0, -1e4, -1e4, 0.0, 0.0])
    assert DurationClassifier.frames(scores).tolist() == [[3, 2, 5, 3]]  # a tie, 2.5, goes to the even number


@pytest.mark.parametrize("name", ["small", "field", "causal v1", "small, choice"])
def test_both_ways_to_convolve_agree(name):
    """oneDNN's convolutions on rearranged weights, which speak, and ``F.conv1d``, which training uses."""
    model = build(SHAPES[name], dtype=torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    units, lengths = pad(sequences(3, seed=9))
    trained = model(units, lengths)[0]
    assert trained.requires_grad
    pack_weights(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        spoken = model(units, lengths)[0]
        precise = copy.deepcopy(model).double()(units, lengths)[0]  # packed weights are no longer of its type
        sent = pickle.loads(pickle.dumps(model))(units, lengths)[0]
    assert (spoken - sent).abs().max() < 1e-4
    assert spoken.std() > 0.02 and (spoken - trained).abs().max() < 1e-4 and (spoken - precise).abs().max() < 1e-4
    model(units, lengths)[0].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.ups.parameters())


@torch.no_grad()
def test_a_loaded_vocoder_streams_without_seams(tmp_path):
    save_vocoder(build(SMALL, dtype=torch.float32), tmp_path / "v.pt", tmp_path / "v.json")
    model = load_vocoder(tmp_path / "v.pt", tmp_path / "v.json")
    rows = sequences(4, seed=10)
    assert_same(streamed(model, rows, seed=1), alone(model, rows), 1e-4)


# ------------------------------------------------------------------------------------------------------ compatibility
@pytest.fixture(params=["durations", "frames", "speakers"])
def field_vocoder(request, tmp_path):
    """A random checkpoint in fairseq's layout and fairseq's own vocoder reading it."""
    pytest.importorskip("fairseq")
    from fairseq.models.text_to_speech.codehifigan import CodeGenerator
    from fairseq.models.text_to_speech.vocoder import CodeHiFiGANVocoder

    config = dict(FIELD)
    if request.param == "frames":
        del config["dur_predictor_params"]
    if request.param == "speakers":
        config.update(multispkr="from_input_file", num_speakers=3, model_in_dim=32)
    torch.manual_seed(3)
    theirs = CodeGenerator(config)
    shake(theirs)
    torch.nn.init.constant_(theirs.conv_post.weight_g, 0.3)  # a level that tanh does not clip, as of speech
    state = theirs.state_dict()
    assert any(key.endswith("weight_g") for key in state)
    torch.save({"generator": state}, tmp_path / "g.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return CodeHiFiGANVocoder(str(tmp_path / "g.pt"), config), tmp_path, request.param


@torch.no_grad()
def test_the_fields_checkpoints_sound_the_same(field_vocoder):
    theirs, directory, kind = field_vocoder
    ours = load_vocoder(directory / "g.pt", directory / "config.json")
    units = torch.tensor([[3, 17, 5, 39, 0, 5, 22, 8, 8, 31]])
    speaker = torch.tensor([2]) if kind == "speakers" else None
    extra = {} if speaker is None else {"spkr": speaker.view(1, 1)}
    for predicted in (True, False):
        if predicted and kind == "frames":
            continue
        expected = theirs({"code": units, **extra}, dur_prediction=predicted)
        durations = None if predicted else torch.ones_like(units)
        wav, lengths = ours(units, durations=durations, speakers=speaker)
        assert expected.std() > 0.02
        assert lengths.tolist() == [len(expected)]
        assert (wav[0] - expected).abs().max() < 1e-4
        if predicted:
            assert len(expected) != units.shape[1] * 320


@torch.no_grad()
def test_what_we_save_the_field_reads(tmp_path):
    pytest.importorskip("fairseq")
    from fairseq.models.text_to_speech.vocoder import CodeHiFiGANVocoder

    ours = build(FIELD, seed=5, dtype=torch.float32)
    save_vocoder(ours, tmp_path / "v.pt", tmp_path / "v.json")
    theirs = CodeHiFiGANVocoder(str(tmp_path / "v.pt"), json.loads((tmp_path / "v.json").read_text()))
    units = torch.tensor([[3, 17, 5, 39, 0]])
    assert (theirs({"code": units}, dur_prediction=True) - ours(units)[0][0]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("layout", ["weight_g", "parametrizations", "plain", "half"])
def test_layouts_of_weight_norm(tmp_path, layout):
    model = build(SMALL, dtype=torch.float32)
    units = torch.arange(12).unsqueeze(0)
    expected = model(units)[0]
    save_vocoder(model, tmp_path / "v.pt", tmp_path / "v.json", half=layout == "half")
    if layout == "plain":
        torch.save({"generator": model.state_dict()}, tmp_path / "v.pt")
    if layout == "parametrizations":
        model.add_weight_norm()
        assert (model(units)[0] - expected).abs().max() < 5e-5
        torch.save({"generator": model.state_dict()}, tmp_path / "v.pt")
    loaded = load_vocoder(tmp_path / "v.pt", tmp_path / "v.json")
    assert not loaded.training
    assert loaded.config == VocoderConfig.from_dict(model.config.to_dict())
    wav = loaded(units)[0]
    if layout == "half":
        assert all(p.dtype == torch.float32 for p in loaded.parameters())
        assert wav.shape == expected.shape
    else:
        assert (wav - expected).abs().max() < 5e-5


# ---------------------------------------------------------------------------------------------------------- bad input
class Malicious:
    def __reduce__(self):
        return (open, ("echostream-was-here", "w"))


def test_bad_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build(SMALL, dtype=torch.float32)
    save_vocoder(model, tmp_path / "v.pt", tmp_path / "v.json")
    good = (tmp_path / "v.pt").read_bytes()
    files = {
        "truncated": good[: len(good) // 2],
        "header": good[:100],
        "empty": b"",
        "text": b"units are not weights\n" * 50,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    state = torch.load(tmp_path / "v.pt", weights_only=True)["generator"]
    torch.save({"generator": state, "extra": Malicious()}, tmp_path / "malicious")
    torch.save({"model": state}, tmp_path / "other")
    torch.save([1, 2, 3], tmp_path / "list")
    torch.save({"generator": {**state, "dict.weight": state["dict.weight"][:, :8]}}, tmp_path / "shape")
    torch.save({"generator": {k: v for k, v in state.items() if k != "dict.weight"}}, tmp_path / "missing")
    torch.save({"generator": {k: v for k, v in state.items() if k != "conv_pre.weight_g"}}, tmp_path / "no-g")
    torch.save({"generator": {**state, "spkr.weight": torch.zeros(2, 2)}}, tmp_path / "unknown")
    torch.save({"generator": {**state, "dict.weight": state["dict.weight"] * float("nan")}}, tmp_path / "nan")
    (tmp_path / "directory").mkdir()
    names = "truncated header empty text malicious other list shape missing no-g unknown nan directory absent"
    for name in names.split():
        with pytest.raises(CheckpointError) as error:
            load_vocoder(tmp_path / name, tmp_path / "v.json")
        assert name in str(error.value) and "\n" not in str(error.value), name
    assert not (tmp_path / "echostream-was-here").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"upsample_rates": None}, "upsample_rates"),
        ({"num_embeddings": None}, "num_embeddings"),
        ({"embedding_dim": None}, "embedding_dim"),
        ({"resblock_dilation_sizes": None}, "resblock_dilation_sizes"),
        ({"f0": True}, "f0"),
        ({"f0_quant_num_bin": 32}, "f0_quant_num_bin"),
        ({"embedder_params": {"x": 1}}, "embedder_params"),
        ({"sampling_rate": 22050}, "22050"),
        ({"code_hop_size": 256}, "256"),
        ({"model_in_dim": 80}, "80"),
        ({"upsample_kernel_sizes": [11, 8]}, "upsample_kernel_sizes"),
        ({"upsample_kernel_sizes": [10, 8, 8, 4, 4]}, "10"),
        ({"upsample_rates": "5,4,4,2,2"}, "upsample_rates"),
        ({"resblock_kernel_sizes": [3, 4, 11]}, "resblock_kernel_sizes"),
        ({"upsample_initial_channel": 16}, "16"),
        ({"lookahead_units": 2}, "causal"),
        ({"resblock": "3"}, "3"),
        ({"dur_predictor_params": {"encoder_embed_dim": 16}}, "var_pred_hidden_dim"),
        ({"dur_predictor_params": {**DURATIONS, "encoder_embed_dim": 8}}, "encoder_embed_dim"),
        ({"dur_predictor_params": {**DURATIONS, "var_pred_hidden_dim": "12"}}, "var_pred_hidden_dim is '12'"),
        ({"dur_predictor_params": {**DURATIONS, "var_pred_dropout": 1.5}}, "var_pred_dropout is 1.5"),
        ({"dur_predictor_params": {**DURATIONS, "var_pred_layers": 4}}, "var_pred_layers is 4.*var_pred_max_frames"),
        ({"dur_predictor_params": CHOICE}, "var_pred_max_frames is 5.*causal: true and lookahead_units"),
        ({"dur_predictor_params": CHOICE, "causal": True}, "var_pred_max_frames is 5.*lookahead_units"),
        ({"dur_predictor_params": {**CHOICE, "var_pred_max_frames": 1}}, "var_pred_max_frames is 1; .*2..500"),
        ({"dur_predictor_params": {**CHOICE, "var_pred_max_frames": -1}}, "var_pred_max_frames is -1"),
        ({"dur_predictor_params": {**CHOICE, "var_pred_layers": 1.5}}, "var_pred_layers is 1.5"),
        ({**SMALL, "dur_predictor_params": {**CHOICE, "var_pred_kernel_size": 2}}, "var_pred_kernel_size is 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_configurations(tmp_path, changes, says):
    config = {key: value for key, value in {**FIELD, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=says) as error:
        load_vocoder(tmp_path / "g.pt", tmp_path / "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"\x80\x02", b"[1, 2]", b"{"], ids=["absent", "binary", "list", "cut"])
def test_bad_configuration_files(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="config.json"):
        load_vocoder(tmp_path / "g.pt", tmp_path / "config.json")


def test_bad_units():
    model = build(SMALL)
    long = dict(dtype=torch.long)
    with pytest.raises(UnitError, match=f"unit {UNITS} .*position 1.*0..{UNITS - 1}"):
        model(torch.tensor([[1, UNITS]]))
    with pytest.raises(UnitError, match="unit -1"):
        model.step(torch.tensor([[-1]]), torch.tensor([1]), model.init_state(1))
    for units, lengths in ((torch.zeros(1, 0, **long), None), (torch.zeros(2, 3, **long), torch.zeros(2, **long))):
        with pytest.raises(UnitError, match="empty"):
            model(units, lengths)
    with pytest.raises(UnitError, match="whole numbers"):
        model(torch.rand(1, 3))
    with pytest.raises(UnitError, match="4 is more than the 3"):
        model(torch.zeros(1, 3, **long), torch.tensor([4]))
    with pytest.raises(UnitError, match="durations"):
        model(torch.zeros(1, 3, **long), durations=torch.ones(1, 2, **long))
    with pytest.raises(UnitError, match="-2 frames"):
        model(torch.zeros(1, 3, **long), durations=torch.tensor([[1, -2, 1]]))
    many = build(SHAPES["field, speakers"])
    with pytest.raises(UnitError, match="3 speakers"):
        many(torch.zeros(1, 3, **long))
    with pytest.raises(UnitError, match="out of range 0..2"):
        many(torch.zeros(1, 3, **long), speakers=torch.tensor([3]))


def test_a_row_without_units_is_silent():
    model = build(SMALL)
    with torch.no_grad():
        wav, lengths = model(torch.tensor([[1, 2], [0, 0]]), torch.tensor([2, 0]))
    assert lengths[1] == 0 and lengths[0] == wav.shape[1] and not wav[1].any()


def test_weights_of_another_shape_are_named():
    state = build(SMALL).state_dict()
    other = CodeHiFiGAN(dataclasses.replace(VocoderConfig.from_dict(SMALL), num_embeddings=7))
    with pytest.raises(CheckpointError, match=r"dict.weight has shape \[40, 16\].*\[7, 16\]"):
        load_weights(other, state, "a vocoder")
