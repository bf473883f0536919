"""The encoder: sizes, streaming equal to offline, independence of a batch's rows, parity with torchaudio."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from echostream.compat import import_torchaudio
from echostream.config import EchoStreamConfig
from echostream.errors import ConfigError
from echostream.models import attention, emformer_layer
from echostream.models.decoders.layers import sinusoidal_positions
from echostream.models.dropout import dropout, relu_dropout
from echostream.models.echostream_encoder import EchoStreamEncoder, EncoderState
from echostream.models.gather import GatherBlocks

BINS = 12
TINY = EchoStreamConfig(
    input_feat_per_channel=BINS,
    conv_channels=4,
    encoder_embed_dim=16,
    encoder_layers=3,
    encoder_attention_heads=2,
    encoder_ffn_embed_dim=24,
    st_decoder_heads=2,
)


def make(seed: int = 0, **changes: object) -> EchoStreamEncoder:
    """A tiny encoder in double precision, all of whose parameters matter (no zero bias, no unit norm)."""
    torch.manual_seed(seed)
    encoder = EchoStreamEncoder(replace(TINY, **changes)).double().eval()
    for parameter in encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return encoder.requires_grad_(False)


def features(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, BINS, generator=torch.Generator().manual_seed(seed)).double()


def splits(length: int, seed: int) -> Iterator[int]:
    """Random chunk sizes, empty and single ones among them, that sum to ``length``."""
    generator = np.random.default_rng(seed)
    while length:
        size = min(length, int(generator.choice([0, 1, 1, 2, 5, 16, 33, 90])))
        yield size
        length -= size


def stream(
    encoder: EchoStreamEncoder, x: Tensor, sizes: Iterator[int] | list[int], state: EncoderState | None = None
) -> Tensor:
    """Encode one utterance [T, F] in chunks -> [T', D]."""
    state, outputs, at = state or encoder.init_state(1), [], 0
    for size in sizes:
        y, _, state = encoder.step(x[None, at : at + size], torch.tensor([size]), state)
        outputs.append(y[0])
        at += size
    y, y_lengths, _ = encoder.step(x[None, at:], torch.tensor([len(x) - at]), state, torch.tensor([True]))
    assert y_lengths.tolist() == [y.shape[1]]
    return torch.cat([*outputs, y[0]])


def offline(encoder: EchoStreamEncoder, x: Tensor) -> Tensor:
    return encoder(x[None], torch.tensor([len(x)]))[0][0]


def assert_same(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 15_592_448),
        ({"memory_size": 0}, 14_539_776),
        ({"encoder_normalize_before": True}, 15_592_448 + 8_192),
        ({"full_context": True}, 14_539_776),
    ],
    ids=["default", "no memory", "pre-norm", "full context"],
)
def test_parameter_counts(changes: dict, expected: int) -> None:
    with torch.device("meta"):
        encoder = EchoStreamEncoder(EchoStreamConfig(**changes))
    assert sum(p.numel() for p in encoder.parameters()) == expected
    if not changes:
        assert {sum(p.numel() for p in layer.parameters()) for layer in encoder.layers} == {855_552}


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_output_shape_and_lengths(length: int) -> None:
    y, lengths = make()(features(2, length), torch.tensor([length, 1]))
    assert y.shape == (2, -(-length // 4), 16)
    assert lengths.tolist() == [-(-length // 4), 1]
    assert bool((y[1, 1:] == 0).all()) and bool(y.isfinite().all())


@pytest.mark.parametrize("normalize_before", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("memory", [0, 3, 8])
@pytest.mark.parametrize("right", [0, 1, 2, 6])
def test_streaming_equals_offline(right: int, memory: int, normalize_before: bool) -> None:
    encoder = make(right_context_length=right, memory_size=memory, encoder_normalize_before=normalize_before)
    for length in (1, 14, 16, 331):  # 331 features are 83 frames: 20 segments and a partial one
        x = features(length)
        expected = offline(encoder, x)
        assert_same(stream(encoder, x, splits(length, seed=length)), expected)
    assert_same(stream(encoder, x, [1] * length), expected)
    assert_same(stream(encoder, x, []), expected)


@pytest.mark.parametrize(
    ("segment", "left"), [(1, 30), (3, 0), (4, 7), (4, 100), (5, 33), (40, 30)], ids=lambda value: str(value)
)
def test_streaming_equals_offline_in_other_sizes(segment: int, left: int) -> None:
    encoder = make(segment_length=segment, left_context_length=left, right_context_length=1)
    x = features(431)
    assert_same(stream(encoder, x, splits(len(x), seed=segment)), offline(encoder, x))


@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(right_context_length=2), dict(segment_length=1), dict(segment_length=6, left_context_length=0)],
    ids=str,
)
def test_streaming_equals_offline_with_shifted_context(sizes: dict) -> None:
    encoder, plain = make(shift_context=True, **sizes), make(**sizes)
    for length in (3, 70, 321, 331, 336):  # 81, 83 and 84 frames: one, three and no frames in the last segment
        x = features(length)
        expected = offline(encoder, x)
        assert_same(stream(encoder, x, splits(length, seed=length)), expected)
        assert_same(stream(encoder, x, [1] * length), expected)
        # What whole segments see has not changed, and at the very end it has, if that is not whole.
        segment, right = encoder.segment_length, encoder.right_context_length
        whole = max(0, (len(expected) - right) // segment * segment)
        assert_same(expected[:whole], offline(plain, x)[:whole])
        if length > 300 and whole < len(expected):
            assert not torch.allclose(expected[whole:], offline(plain, x)[whole:])


@pytest.mark.parametrize("right", [0, 1, 3])
def test_shifted_context_keeps_the_number_of_keys(right: int) -> None:
    segment, left, block, width = 4, 9, 3, 4 + right
    for missing in range(width + segment):
        frames = torch.tensor([block * segment + right - missing])
        sizes = (segment, left + width - 1, right, 2)
        mask = emformer_layer.attention_mask(torch.tensor([50]), frames, block, *sizes, torch.float64, shift=True)
        keys = (mask[0, 0] == 0).sum(-1).view(block, width)
        for number in range(block):
            own = max(0, min(segment, int(frames) - number * segment))  # behind them comes padding, which sees itself
            assert keys[number, :own].tolist() == [left + width + 2] * own


def test_streaming_equals_offline_in_single_precision() -> None:
    encoder = make().float()
    x = features(800).float()
    assert_same(stream(encoder, x, splits(len(x), seed=3)), offline(encoder, x), atol=1e-4)


@pytest.mark.parametrize("group", [1, 3, 8, 50])
def test_size_of_the_blocks_does_not_matter(group: int) -> None:
    encoder = make(right_context_length=2)
    x = features(331)
    expected = offline(encoder, x)
    encoder.block_segments = group
    assert_same(offline(encoder, x), expected)


@pytest.mark.parametrize("memory", [0, 8])
@pytest.mark.parametrize("right", [0, 1, 3])
def test_segment_by_segment_definition(right: int, memory: int) -> None:
    """The layers computed as the paper writes them: one segment at a time, contexts picked by index."""
    encoder = make(right_context_length=right, memory_size=memory)
    size, left, time = 4, 30, 61
    x = torch.randn(time, 16).double()
    blocks = [[x[i : i + size], x[i + size : i + size + right]] for i in range(0, time, size)]
    for layer in encoder.layers:
        weight, bias = layer.qkv_proj.weight, layer.qkv_proj.bias
        main = torch.cat([block[0] for block in blocks])
        after = []
        for i, (own, ahead) in enumerate(blocks):
            keys = [main[max(0, i * size - left) : i * size], own, ahead]
            if memory:
                keys += [layer.summary_proj(blocks[j][0].mean(0, True)) for j in range(max(0, i - memory), i)]
            query = torch.cat([own, ahead])
            q = (query @ weight[:16].T + bias[:16]).view(-1, 2, 8).transpose(0, 1)
            k, v = ((torch.cat(keys) @ weight[s].T + bias[s]).view(-1, 2, 8).transpose(0, 1) for s in SLICES)
            attended = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
            y = layer.attention_norm(query + layer.out_proj(attended.transpose(0, 1).flatten(1)))
            y = layer.ffn_norm(y + layer.fc2(torch.relu(layer.fc1(y))))
            after.append([y[: len(own)], y[len(own) :]])
        blocks = after
    expected = torch.cat([block[0] for block in blocks])
    assert_same(encoder.forward_layers(x[None], torch.tensor([time]))[0], expected)


SLICES = (slice(16, 32), slice(32, 48))  # key and value rows of a projection of width 16


@pytest.mark.parametrize(
    "changes",
    [*({"right_context_length": n} for n in (0, 1, 3)), {"shift_context": True}, {"full_context": True}],
    ids=str,
)
def test_batch_rows_are_independent(changes: dict) -> None:
    encoder = make(**changes)
    lengths = torch.tensor([203, 1, 60, 118, 203])
    x = features(5, 203)
    x.masked_fill_((torch.arange(203) >= lengths[:, None])[:, :, None], float("nan"))
    y, y_lengths = encoder(x, lengths)
    for row, n, item, length in zip(y, y_lengths, x, lengths):
        assert_same(row[:n], offline(encoder, item[:length]))
        assert bool((row[n:] == 0).all())


@pytest.mark.parametrize("right", [0, 2])
def test_causality(right: int) -> None:
    """New features never change a frame that lies more than a segment and the right context before them."""
    encoder = make(right_context_length=right)
    x = features(320)
    y = offline(encoder, x)
    for changed in (100, 160, 161, 300):
        z = offline(encoder, torch.cat([x[:changed], features(320 - changed, seed=2)]))
        safe = max(0, (changed // 4 - right) // 4 * 4)
        assert torch.equal(y[:safe], z[:safe])
        assert not torch.allclose(y[safe:], z[safe:])


@pytest.mark.parametrize("changes", [{"encoder_normalize_before": norm} for norm in (False, True)], ids=str)
def test_full_context_is_a_bidirectional_transformer(changes: dict) -> None:
    """Every frame depends on every feature, order included; a torch encoder layer of the same weights agrees."""
    encoder = make(full_context=True, **changes)
    x = features(203).requires_grad_(True)
    y = offline(encoder, x)
    for frame in (0, 17, 50):
        (gradient,) = torch.autograd.grad(y[frame].sum(), x, retain_graph=True)
        assert bool((gradient != 0).any(1).all())
    h = torch.randn(2, 50, 16).double()
    swapped = h[:, torch.arange(50).roll(1)]
    lengths = torch.tensor([50, 31])
    got = encoder.forward_layers(h, lengths)
    assert not torch.allclose(encoder.forward_layers(swapped, lengths).sum(1), got.sum(1))
    expected = h + sinusoidal_positions(torch.arange(50), 16, h.dtype)
    for layer in encoder.layers:
        norms = dict(batch_first=True, norm_first=layer.normalize_before)
        other = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, **norms).double().eval()
        theirs = other.self_attn
        theirs.in_proj_weight.data, theirs.in_proj_bias.data = layer.qkv_proj.weight, layer.qkv_proj.bias
        pairs = [(theirs.out_proj, layer.out_proj), (other.linear1, layer.fc1), (other.linear2, layer.fc2)]
        pairs += [(other.norm1, layer.attention_norm), (other.norm2, layer.ffn_norm)]
        for copy, ours in pairs:
            copy.load_state_dict(ours.state_dict())
        with torch.no_grad():
            expected = other(expected, src_key_padding_mask=torch.arange(50) >= lengths[:, None])
        expected = layer.output_norm(expected) if layer.normalize_before else expected
    for row, n in enumerate(lengths):
        assert_same(got[row, :n], expected[row, :n])


def test_full_context_cannot_stream() -> None:
    with pytest.raises(ConfigError, match="^full_context is set: .* cannot stream; decode offline$"):
        make(full_context=True).init_state(1)
    with pytest.raises(ConfigError, match="full_context has no segments"):
        replace(TINY, full_context=True, shift_context=True)


@pytest.mark.parametrize("right", [0, 1])
def test_mixed_ages_share_a_batch(right: int) -> None:
    """States of an old, a young and a new stream are stacked; each goes on as if it were alone, and ends apart."""
    encoder = make(right_context_length=right, shift_context=right == 1)
    items = [features(n, seed=n) for n in (500, 237, 90, 33)]
    heard = [411, 37, 5, 0]
    states, outputs = [], []
    for x, n in zip(items, heard):
        y, _, state = encoder.step(x[None, :n], torch.tensor([n]), encoder.init_state(1))
        states.append(state)
        outputs.append([y[0]])
    state, at = EncoderState.stack(states), torch.tensor(heard)
    lengths = torch.tensor([len(x) for x in items])
    generator = torch.Generator().manual_seed(0)
    while bool((at < lengths).any()):
        count = torch.minimum(torch.randint(0, 45, (4,), generator=generator), lengths - at)
        chunk = torch.full((4, int(count.max()), BINS), float("nan")).double()
        for row, x in enumerate(items):
            chunk[row, : count[row]] = x[at[row] : at[row] + count[row]]
        last = (at + count == lengths) & (at < lengths)
        y, y_lengths, state = encoder.step(chunk, count, state, last)
        at = at + count
        for row in range(4):
            outputs[row].append(y[row, : y_lengths[row]])
            assert bool((y[row, y_lengths[row] :] == 0).all())
    for parts, x in zip(outputs, items):
        assert_same(torch.cat(parts), offline(encoder, x))
    # Every stream has ended, and every row is as good as new.
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), encoder.init_state(4).tensors()))


def some_state(encoder: EchoStreamEncoder, heard: tuple[int, ...] = (133, 18, 2)) -> EncoderState:
    x = features(len(heard), max(heard))
    return encoder.step(x, torch.tensor(heard), encoder.init_state(len(heard)))[2]


@pytest.mark.parametrize("batch", [1, 3])
def test_step_leaves_the_callers_state_alone(batch: int) -> None:
    encoder = make(right_context_length=1)
    state = some_state(encoder, (133, 18, 2)[:batch])
    before = state.map(torch.clone)
    x, lengths = features(batch, 50, seed=5), torch.tensor([50, 3, 0])[:batch]
    last = torch.tensor([False, True, False])[:batch]
    first = encoder.step(x, lengths, state, last)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors()))
    for tensor in first[2].tensors():
        tensor.fill_(7)  # a state that shared memory with the one it came from would now change it
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors()))
    assert torch.equal(first[0], encoder.step(x, lengths, state, last)[0])


def test_stack_and_unstack_are_inverse() -> None:
    state = some_state(make())
    parts = state.unstack()
    assert [part.batch_size for part in parts] == [1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(EncoderState.stack(parts).tensors(), state.tensors()))


def test_state_survives_npz() -> None:
    encoder = make(right_context_length=1)
    state = some_state(encoder)
    file = io.BytesIO()
    np.savez(file, **state.arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        loaded = encoder.init_state(3).from_arrays(dict(arrays))
    x, lengths = features(3, 60, seed=9), torch.tensor([60, 1, 44])
    a, _, after_a = encoder.step(x, lengths, state)
    b, _, after_b = encoder.step(x, lengths, loaded)
    assert torch.equal(a, b)
    assert all(torch.equal(s, t) for s, t in zip(after_a.tensors(), after_b.tensors()))


def test_state_does_not_grow() -> None:
    encoder = make(right_context_length=1)
    state = encoder.init_state(1)
    sizes, shapes = {state.nbytes}, [t.shape for t in state.tensors()]
    x = features(1, 700)
    for at in range(0, 700, 35):
        _, _, state = encoder.step(x[:, at : at + 35], torch.tensor([35]), state)
        sizes.add(state.nbytes)
        assert [t.shape for t in state.tensors()] == shapes
        # What a state holds on to is what it reports: no view into a larger buffer.
        assert sum(t.untyped_storage().nbytes() for t in state.tensors()) == state.nbytes
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "changes", [{}, {"memory_size": 0}, {"encoder_normalize_before": True}, {"full_context": True}], ids=str
)
@pytest.mark.parametrize("right", [0, 1])
def test_every_parameter_gets_a_gradient(right: int, changes: dict) -> None:
    torch.manual_seed(0)
    encoder = EchoStreamEncoder(replace(TINY, right_context_length=right, **changes)).train()
    y, _ = encoder(features(2, 200).float(), torch.tensor([200, 90]))
    y.square().mul(torch.randn_like(y)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("right", [0, 2])
@pytest.mark.parametrize("memory", [0, 2, 8])
@pytest.mark.parametrize("left", [0, 5, 30])
def test_gathering_has_the_right_gradient(left: int, memory: int, right: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 3, 2, 4 + right, 12).double().requires_grad_(True)
    summary = torch.randn(2, 3, 2, 8).double().requires_grad_(True) if memory else None
    assert torch.autograd.gradcheck(
        lambda qkv, summary: GatherBlocks.apply(qkv, summary, 4, left, memory, 2), (qkv, summary), fast_mode=True
    )


def test_padding_gets_no_gradient() -> None:
    encoder = make(right_context_length=1).requires_grad_(True)
    x = features(2, 100).requires_grad_(True)
    y, _ = encoder(x, torch.tensor([100, 37]))
    y.square().sum().backward()
    assert bool((x.grad[1, 37:] == 0).all()) and bool((x.grad[1, :37] != 0).any())


@pytest.mark.parametrize("right", [0, 1, 4])
def test_parity_with_torchaudio(right: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, memory 0, pre-norm: whole segments of a full-length utterance with real frames behind it."""
    import_torchaudio()
    from torchaudio.models import Emformer

    torch.manual_seed(0)
    time, heads, dim = 96, 2, 16
    theirs = Emformer(dim, heads, 24, 3, 4, left_context_length=30, right_context_length=right).double().eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ours = make(right_context_length=right, memory_size=0, encoder_normalize_before=True)
    for layer, other in zip(ours.layers, theirs.emformer_layers, strict=True):
        attention, ffn = other.attention, other.pos_ff
        layer.qkv_proj.weight.copy_(torch.cat([attention.emb_to_query.weight, attention.emb_to_key_value.weight]))
        layer.qkv_proj.bias.copy_(torch.cat([attention.emb_to_query.bias, attention.emb_to_key_value.bias]))
        pairs = [(layer.out_proj, attention.out_proj), (layer.attention_norm, other.layer_norm_input)]
        pairs += [(layer.ffn_norm, ffn[0]), (layer.fc1, ffn[1]), (layer.fc2, ffn[4])]
        pairs += [(layer.output_norm, other.layer_norm_output)]
        for mine, copied in pairs:
            mine.load_state_dict(copied.state_dict())
    # torchaudio takes the last segment's right context from frames behind the utterance and gives none of them out; to
    # us they are one more segment.
    x = torch.randn(2, time + right, dim).double()
    with torch.no_grad(), monkeypatch.context() as patch:
        # torchaudio rounds its attention scores to single precision, which alone makes a difference of 1e-7.
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        expected, _ = theirs(x, torch.tensor([time, time]))
        y = ours.forward_layers(x, torch.tensor([time + right, time + right]))[:, :time]
    assert_same(y, expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_precision(dtype: torch.dtype) -> None:
    encoder = make(right_context_length=1).float()
    x = features(1, 203).float()
    expected = offline(encoder, x[0])
    encoder = encoder.to(dtype)
    y = offline(encoder, x[0].to(dtype))
    streamed = stream(encoder, x[0].to(dtype), [70, 1, 60])
    assert y.dtype == streamed.dtype == dtype
    for result in (y, streamed):
        assert (result.float() - expected).abs().max() < (0.2 if dtype is torch.bfloat16 else 0.03)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_bf16_autocast(training: bool) -> None:
    torch.manual_seed(0)
    encoder = EchoStreamEncoder(TINY).train(training)
    x, lengths = features(2, 100).float(), torch.tensor([100, 50])
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = encoder(x, lengths)
        if not training:
            with torch.no_grad():
                step, _, state = encoder.step(x, lengths, encoder.init_state(2), torch.tensor([True, True]))
            assert (step.float() - y.float()).abs().max() < 0.2
            assert {t.dtype for t in state.tensors()} == {torch.float32, torch.int64}
    y.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters())


def test_attention_of_training_equals_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, attention with dropout takes its own path; without what it drops it is the same function."""
    encoder = make(right_context_length=1)
    x = features(150)
    expected = offline(encoder, x)
    monkeypatch.setattr(attention, "cheap_dropout", lambda x, p, training: x)
    monkeypatch.setattr(emformer_layer, "dropout", lambda x, p, training: x)
    monkeypatch.setattr(emformer_layer, "activate", lambda x, activation, p, training: x.relu())
    for layer in encoder.layers:
        layer.train()
    assert_same(offline(encoder, x), expected)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 333, requires_grad=True)
    y = dropout(x, p, True)
    assert abs((y == 0).double().mean() - p) < 0.01
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)), rtol=1e-4, atol=0)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    z = relu_dropout(torch.cat([x, -x]), p, True)
    assert bool((z[301:] == 0).all()) and abs((z[:301] == 0).double().mean() - p) < 0.01
    assert dropout(x, p, False) is x and dropout(x, 0.0, True) is x
    torch.manual_seed(5)
    a = dropout(x, p, True)
    torch.manual_seed(5)
    assert torch.equal(a, dropout(x, p, True))


def test_training_forward_is_linear_in_memory_and_time() -> None:
    """Four times the frames need four times the multiplications and the same mask width, never a T x T matrix."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = EchoStreamEncoder(TINY)
    flops = {}
    for time in (320, 1280):
        x = torch.randn(1, time, TINY.encoder_embed_dim)
        with FlopCounterMode(display=False) as counter:
            encoder.forward_layers(x, torch.tensor([time])).sum().backward()
        flops[time] = counter.get_total_flops()
    assert flops[1280] <= 4.01 * flops[320]
