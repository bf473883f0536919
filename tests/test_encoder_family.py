"""The encoder's options beyond the design: Whisper's stem, norms and positions, relative bias, causal convolutions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from echostream.audio.features import FEATURES
from echostream.config import EchoStreamConfig
from echostream.constants import SAMPLE_RATE, WHISPER_SILENCE
from echostream.errors import ConfigError
from echostream.models.echostream_encoder import EchoStreamEncoder, EncoderState
from tests.test_encoder import BINS, TINY, assert_same, features, make, offline, some_state, splits, stream

WHISPER = dict(
    encoder_stem="whisper", encoder_normalize_before=True, encoder_final_norm=True, encoder_activation="gelu",
    encoder_position_period=50, memory_size=0,
)  # fmt: skip
FAMILY = {
    "whisper": WHISPER,
    "whisper stem alone": dict(encoder_stem="whisper"),
    "relative bias": dict(encoder_relative_bias=True),
    "convolution": dict(encoder_conv_kernel=5),
    "wide convolution": dict(encoder_conv_kernel=15, segment_length=3),
    "positions": dict(encoder_position_period=7),
    "gelu": dict(encoder_activation="gelu", encoder_normalize_before=True),
    "everything": {**WHISPER, "memory_size": 3, "encoder_relative_bias": True, "encoder_conv_kernel": 4},
    "shifted": {**WHISPER, "shift_context": True, "encoder_relative_bias": True},
}
family = pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY.keys())


@family
@pytest.mark.parametrize("right", [0, 1, 3])
def test_streaming_equals_offline(right: int, changes: dict) -> None:
    encoder = make(right_context_length=right, **changes)
    for length in (1, 2, 14, 16, 331):
        x = features(length)
        expected = offline(encoder, x)
        assert len(expected) == -(-length // 4)
        assert_same(stream(encoder, x, splits(length, seed=length)), expected)
    assert_same(stream(encoder, x, [1] * length), expected)
    assert_same(stream(encoder, x, []), expected)


@family
@pytest.mark.parametrize("right", [0, 2])
def test_batch_rows_are_independent(right: int, changes: dict) -> None:
    encoder = make(right_context_length=right, **changes)
    items = [features(n, seed=n) for n in (331, 90, 5)]
    lengths = torch.tensor([len(x) for x in items])
    for padding in (float("nan"), 3.0):
        batch = torch.full((3, 331, BINS), padding).double()
        for row, x in zip(batch, items):
            row[: len(x)] = x
        y, y_lengths = encoder(batch, lengths)
        for row, n, x in zip(y, y_lengths.tolist(), items):
            assert_same(row[:n], offline(encoder, x))
            assert bool((row[n:] == 0).all())


@family
@pytest.mark.parametrize("right", [0, 2])
def test_causality(right: int, changes: dict) -> None:
    """Frames of a segment depend on nothing behind its right context."""
    encoder = make(right_context_length=right, **changes)
    segment = encoder.segment_length // encoder.subsampler.factor
    x, other = features(400), features(400, seed=2)
    seen = 4 * (7 * segment + right)  # features that the seventh segment and its right context cover
    changed = torch.cat([x[:seen], other[seen:]])
    before, after = offline(encoder, x), offline(encoder, changed)
    assert_same(after[: 7 * segment], before[: 7 * segment])
    assert not torch.allclose(after[7 * segment :], before[7 * segment :])


@family
def test_streams_of_any_age_share_a_batch(changes: dict) -> None:
    encoder = make(right_context_length=1, **changes)
    items = [features(n, seed=n) for n in (500, 237, 33)]
    heard, states, outputs = [411, 37, 0], [], []
    for x, n in zip(items, heard):
        y, _, state = encoder.step(x[None, :n], torch.tensor([n]), encoder.init_state(1))
        states.append(state)
        outputs.append([y[0]])
    state = EncoderState.stack(states)
    rest = [len(x) - n for x, n in zip(items, heard)]
    chunk = torch.full((3, max(rest), BINS), float("nan")).double()
    for row, x, n in zip(chunk, items, heard):
        row[: len(x) - n] = x[n:]
    y, lengths, state = encoder.step(chunk, torch.tensor(rest), state, torch.tensor([True] * 3))
    for i, x in enumerate(items):
        assert_same(torch.cat([*outputs[i], y[i, : lengths[i]]]), offline(encoder, x))
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), encoder.init_state(3).tensors()))


@family
def test_state_is_a_bounded_value(changes: dict) -> None:
    encoder = make(right_context_length=1, **changes)
    state = some_state(encoder)
    before = state.map(torch.clone)
    x, lengths = features(3, 300, seed=5), torch.tensor([300, 3, 0])
    _y, _, after = encoder.step(x, lengths, state, torch.tensor([False, True, False]))
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors()))
    assert after.nbytes == state.nbytes == encoder.init_state(3).nbytes
    loaded = encoder.init_state(3).from_arrays(after.arrays())
    assert all(torch.equal(a, b) for a, b in zip(after.tensors(), loaded.tensors()))
    assert all(torch.equal(a, b) for a, b in zip(EncoderState.stack(after.unstack()).tensors(), after.tensors()))


@family
@pytest.mark.parametrize("right", [0, 1])
def test_every_parameter_gets_a_gradient(right: int, changes: dict) -> None:
    torch.manual_seed(0)
    encoder = EchoStreamEncoder(replace(TINY, right_context_length=right, **changes)).train()
    y, _ = encoder(features(2, 400).float(), torch.tensor([400, 90]))
    y.square().mul(torch.randn_like(y)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


def test_relative_bias_is_one_number_per_head_and_distance() -> None:
    """Attention scores of one segment with left and right context, written out."""
    encoder = make(encoder_relative_bias=True, memory_size=0, encoder_layers=1, right_context_length=1)
    layer, left, size, width = encoder.layers[0], 30, 4, 5
    x = torch.randn(1, 60, 16).double()
    got = encoder.forward_layers(x, torch.tensor([60]))[0]
    for start in range(0, 56, size):
        keys = x[0, max(0, start - left) : start + width]
        at = torch.arange(max(0, start - left), start + width)
        q, k, v = ((t @ w.T + b).view(-1, 2, 8).transpose(0, 1) for t, w, b in zip(
            (x[0, start : start + size], keys, keys), layer.qkv_proj.weight.chunk(3), layer.qkv_proj.bias.chunk(3)
        ))  # fmt: skip
        distance = torch.arange(start, start + size)[:, None] - at + width - 1
        scores = q @ k.transpose(1, 2) / 8**0.5 + layer.relative_bias.weight[:, distance]
        attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        y = layer.attention_norm(x[0, start : start + size] + layer.out_proj(attended))
        assert_same(got[start : start + size], layer.ffn_norm(y + layer.fc2(torch.relu(layer.fc1(y)))))


def test_positions_repeat_and_start_anywhere_in_training() -> None:
    encoder = make(encoder_position_period=8, memory_size=0, left_context_length=0)
    x = features(96)
    x[32:64] = x[:32]
    y = offline(encoder, x)
    assert_same(y[12:16], y[4:8])  # the segment at the period's beginning has other features in its convolutions
    encoder.position_period = 9
    assert not torch.allclose(offline(encoder, x)[12:16], y[4:8])
    encoder.train()
    encoder.dropout = 0.0
    for layer in encoder.layers:
        layer.dropout = layer.attention_dropout = layer.activation_dropout = 0.0
    torch.manual_seed(1)
    draws = {tuple(encoder(x[None], torch.tensor([len(x)]))[0][0, 4].tolist()) for _ in range(60)}
    assert len(draws) == 9


@pytest.mark.parametrize("segment", [4, 8, 16])
def test_a_segment_is_complete_with_its_own_sound(segment: int) -> None:
    """Whisper's stem looks ahead; with 20 ms of silence before the stream no segment waits for more than its own."""
    extractor, encoder = FEATURES["whisper"], make(segment_length=segment, **WHISPER, input_feat_per_channel=80)
    rng = np.random.default_rng(1)
    state, features_state, given = encoder.init_state(1), extractor.init_state(), 0
    per_segment = segment * SAMPLE_RATE * 40 // 1000
    for number in range(1, 5):
        for part in (per_segment - 1, 1):  # one sample less is not enough only where a frame needs it
            mel, features_state = extractor.step(rng.standard_normal(part).astype(np.float32), features_state)
            x = torch.from_numpy(extractor.cmvn.apply(mel))[None].double()
            _y, lengths, state = encoder.step(x, torch.tensor([x.shape[1]]), state)
            given += int(lengths)
        assert given == number * segment


def whisper_encoder(encoder: EchoStreamEncoder, mel: torch.Tensor) -> torch.Tensor:
    """Whisper's encoder over log-mel [T, F], by torch's own layers: [T / 2, D]."""
    stem = encoder.subsampler
    x = F.gelu(F.conv1d(mel.T[None], stem.conv1.weight, stem.conv1.bias, padding=1))
    x = F.gelu(F.conv1d(x, stem.conv2.weight, stem.conv2.bias, stride=2, padding=1))[0].T
    half = x.shape[1] // 2
    scale = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half).double())
    angles = torch.arange(len(x))[:, None] * scale
    x = x + torch.cat([angles.sin(), angles.cos()], dim=1)
    for layer in encoder.layers:
        h = layer.attention_norm(x)
        weight, bias = layer.qkv_proj.weight, layer.qkv_proj.bias
        attended, _ = F.multi_head_attention_forward(
            h[:, None], h[:, None], h[:, None], x.shape[1], layer.num_heads, weight, bias, None, None, False, 0.0,
            layer.out_proj.weight, layer.out_proj.bias, training=False, need_weights=False,
        )  # fmt: skip
        x = x + attended[:, 0]
        x = x + layer.fc2(F.gelu(layer.fc1(layer.ffn_norm(x))))
    return encoder.final_norm(x)


def test_with_full_context_it_is_whispers_encoder() -> None:
    encoder = make(**{**WHISPER, "encoder_position_period": 1500}, full_context=True)
    x = features(199)
    # What the features leave out: Whisper's first frame, of the 20 ms of silence before the stream.
    mel = torch.cat([torch.full((1, BINS), WHISPER_SILENCE).double(), x])
    assert_same(offline(encoder, x), encoder.merge(whisper_encoder(encoder, mel)[None])[0], atol=1e-5)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="encoder_final_norm belongs to encoder_normalize_before"):
        EchoStreamConfig(encoder_final_norm=True)
    with pytest.raises(ConfigError, match="input_channels is 2"):
        EchoStreamConfig(encoder_stem="whisper", input_channels=2)
    with pytest.raises(ConfigError, match="encoder_stem is 'wav2vec'"):
        EchoStreamConfig(encoder_stem="wav2vec")
