"""The ST, MT and unit decoders: sizes, causality, and streaming that equals the offline pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from echostream.config import EchoStreamConfig
from echostream.constants import EOS, PAD
from echostream.errors import ConfigError, EchoStreamError
from echostream.models.decoders.ctc_decoder import ASRHead, STDecoder
from echostream.models.decoders.layers import CausalLayer, DecoderLayer, attend, sinusoidal_positions, visible_frames
from echostream.models.decoders.transformer_decoder import MTDecoder
from echostream.models.decoders.unit_decoder import UnitDecoder, greedy_units
from echostream.models.state import State
from echostream.text import collapse_ctc

D = 16
EXACT = dict(rtol=0, atol=1e-9)
UNIT_INPUTS = ["encoder", "mt", "mt-tokens"]


def config(**changes) -> EchoStreamConfig:
    values = dict(
        encoder_embed_dim=D,
        encoder_attention_heads=2,
        encoder_ffn_embed_dim=24,
        st_decoder_heads=2,
        st_vocab_size=11,
        st_left_context=5,
        mt_decoder_layers=2,
        mt_decoder_heads=2,
        mt_decoder_embed_dim=12,
        mt_decoder_ffn_dim=20,
        mt_vocab_size=13,
        unit_decoder_layers=2,
        unit_decoder_heads=2,
        unit_decoder_embed_dim=8,
        unit_decoder_ffn_dim=20,
        ctc_upsample_ratio=3,
        num_units=9,
        max_sentence_frames=40,
        max_target_tokens=12,
    )
    return EchoStreamConfig(**{**values, **changes})


def make(cls, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return cls(config(**changes)).double().eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def splits(total: int, generator: torch.Generator, largest: int = 6) -> list[int]:
    """Random cut of ``total`` into chunks, empty ones included."""
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(int(torch.randint(0, largest + 1, (), generator=generator)), total - sum(sizes)))
    return sizes


def snapshot(state: State) -> list[torch.Tensor]:
    return [t.clone() for t in state.tensors()]


def unchanged(state: State, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state.tensors(), before, strict=True))


# ---- building blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, expected",
    [
        (CausalLayer(256, 4, 1024, 128, 0.1, 0.1, 0.1), 789_760),
        (DecoderLayer(256, 256, 4, 1024, 0.1, 0.1, 0.1), 1_053_440),
    ],
    ids=["ST layer", "decoder layer"],
)
def test_layer_sizes(layer, expected):
    assert sum(p.numel() for p in layer.parameters()) == expected


def test_positions_are_those_of_the_paper():
    vectors = sinusoidal_positions(torch.tensor([0, 1, 5000]), 8, torch.float64)
    assert vectors[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(vectors[2, 0], torch.tensor(5000.0, dtype=torch.float64).sin(), **EXACT)
    half = sinusoidal_positions(torch.arange(300, 302), 8, torch.bfloat16)
    assert not torch.equal(half[0], half[1])


def test_visible_frames_counts():
    seen = visible_frames(torch.tensor([[0, 2], [3, 1]]), 3)
    assert seen.mask[1, 0].tolist() == [[True, True, True], [True, False, False]]
    assert seen.nothing[..., 0].tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_written_out_for_training_equals_the_fused_one(causal):
    q, k, v = random(2, 5, 8), random(2, 5 if causal else 7, 8), random(2, 5 if causal else 7, 8)
    mask = None if causal else visible_frames(torch.tensor([7, 3]), 7).mask
    dropped_never = attend(q, k, v, 2, mask, causal, dropout=1e-9)  # rounds to no element at all
    torch.testing.assert_close(dropped_never, attend(q, k, v, 2, mask, causal), **EXACT)
    dropped = torch.stack([attend(q, k, v, 2, mask, causal, dropout=0.5) for _ in range(2000)])
    assert (dropped.mean(0) - dropped_never).abs().max() < 0.15  # right on average


# ---- ST ----------------------------------------------------------------------------------------------------------


def reference_st(decoder: STDecoder, x: torch.Tensor) -> torch.Tensor:
    """The ST head with one T x T mask, one row at a time."""
    place = torch.arange(x.shape[1])
    mask = (place[None] <= place[:, None]) & (place[None] > place[:, None] - decoder.window)
    for layer in decoder.layers:
        x = layer._finish(x, layer.self_attention(*layer.self_attention.project(x), mask[None, None]))
    return decoder.head(x)


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("frames", [0, 1, 4, 5, 6, 10, 23])
def test_st_blocks_equal_a_full_mask(window, frames):
    decoder = make(STDecoder, st_left_context=window)
    x = random(2, frames, D)
    torch.testing.assert_close(decoder(x, torch.tensor([frames, frames])), reference_st(decoder, x), **EXACT)


def test_st_is_causal_with_a_window():
    decoder = make(STDecoder, st_decoder_layers=1)
    x = random(1, 20, D)
    base = decoder(x)
    for changed in range(20):
        other = x.clone()
        other[0, changed] += 1
        differs = (decoder(other) - base).abs().amax((0, 2)) > 1e-12
        assert differs.nonzero()[:, 0].tolist() == list(range(changed, min(changed + 5, 20)))


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("largest", [1, 3, 17])
def test_st_stream_equals_offline_whatever_the_ages(window, largest):
    generator = torch.Generator().manual_seed(largest)
    decoder = make(STDecoder, st_left_context=window)
    lengths = torch.tensor([31, 7, 0, 18])
    x = random(4, 31, D)
    expected = decoder(x, lengths)
    state, done, got = decoder.init_state(4), torch.zeros(4, dtype=torch.long), [[] for _ in range(4)]
    while bool((done < lengths).any()):
        take = torch.minimum(torch.randint(0, largest + 1, (4,), generator=generator), lengths - done)
        chunk = torch.full((4, int(take.max()) + 2, D), 1e4, dtype=torch.float64)  # padding that would show
        for row in range(4):
            chunk[row, : take[row]] = x[row, done[row] : done[row] + take[row]]
        before = snapshot(state)
        logits, counts, new = decoder.step(chunk, take, state)
        assert unchanged(state, before) and torch.equal(counts, take)
        state, done = new, done + take
        for row in range(4):
            got[row].append(logits[row, : take[row]])
    for row in range(4):
        torch.testing.assert_close(torch.cat(got[row]), expected[row, : lengths[row]], **EXACT)
    assert state.nbytes == decoder.init_state(4).nbytes


def test_st_restart_forgets():
    decoder = make(STDecoder)
    x = random(2, 4, D)
    _, _, state = decoder.step(x, torch.tensor([4, 4]), decoder.init_state(2))
    logits, _, _ = decoder.step(x, torch.tensor([4, 4]), state.restart(torch.tensor([True, False])))
    torch.testing.assert_close(logits[0], decoder(x)[0], **EXACT)
    assert (logits[1] - decoder(x)[1]).abs().max() > 1e-3


def test_st_forward_is_linear():
    torch.manual_seed(0)
    decoder = STDecoder(EchoStreamConfig(encoder_embed_dim=64, encoder_ffn_embed_dim=64, st_vocab_size=8)).eval()

    def operations(frames: int) -> int:
        with FlopCounterMode(display=False) as counter:
            decoder(torch.randn(1, frames, 64))
        return counter.get_total_flops()

    assert operations(16_384) <= 4 * operations(4_096)


@pytest.mark.parametrize("frames", [0, 1, 23])
def test_narrow_st_layers_stream(frames):
    decoder = make(STDecoder, st_decoder_embed_dim=8, st_decoder_ffn_dim=10)
    assert decoder.input.out_features == 8 and decoder.layers[0].ffn.inner.out_features == 10
    x, state, parts = random(2, frames, D), decoder.init_state(2), []
    for size in splits(frames, torch.Generator().manual_seed(1)):
        at = sum(part.shape[1] for part in parts)
        logits, _, state = decoder.step(x[:, at : at + size], torch.tensor([size, size]), state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat([random(2, 0, 11), *parts], dim=1), decoder(x), **EXACT)


@pytest.mark.parametrize(("layers", "every"), [(0, 0), (2, 0), (3, 1), (3, 2)])
def test_the_asr_head_streams_with_and_without_layers(layers, every):
    decoder = make(ASRHead, asr_decoder_layers=layers, st_decoder_embed_dim=8, asr_condition_every=every)
    names = {name.split(".")[0] for name in decoder.state_dict()}
    assert names == ({"input", "layers", "output"} if layers else {"output"}) | ({"condition"} if every else set())
    x, state, parts = random(2, 23, D), decoder.init_state(2), []
    for size in splits(23, torch.Generator().manual_seed(1)):
        at = sum(part.shape[1] for part in parts)
        logits, _, state = decoder.step(x[:, at : at + size], torch.tensor([size, size]), state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), decoder(x), **EXACT)
    changed = x.clone()
    changed[:, 11] += 1  # no later frame has a say in an earlier one's score
    differs = (decoder(changed) - decoder(x)).abs().amax((0, 2)) > 1e-12
    assert differs.nonzero()[:, 0].tolist() == list(range(11, min(23, 12 + layers * (decoder.window - 1))))


def test_the_asr_head_reads_its_own_predictions():
    decoder = make(ASRHead, asr_decoder_layers=3, st_decoder_embed_dim=8, asr_condition_every=1)
    x = random(2, 9, D)
    first, second, final = decoder.predictions(x)
    torch.testing.assert_close(final, decoder(x), **EXACT)
    assert first.shape == second.shape == final.shape
    # the first is a head's of one layer; what is said twice has a say in the rest, and learns from it
    one = make(ASRHead, asr_decoder_layers=1, st_decoder_embed_dim=8)
    one.load_state_dict({name: value for name, value in decoder.state_dict().items() if name in one.state_dict()})
    torch.testing.assert_close(first, one(x), **EXACT)
    with torch.enable_grad():
        decoder(x).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in decoder.condition.parameters())
    with torch.no_grad():
        decoder.condition.weight += 1
    assert not torch.allclose(decoder(x), final)
    with pytest.raises(ConfigError, match="asr_condition_every is 3; of asr_decoder_layers, 3, none come"):
        make(ASRHead, asr_decoder_layers=3, st_decoder_embed_dim=8, asr_condition_every=3)


def test_st_without_layers_is_a_linear_head():
    decoder = make(STDecoder, st_decoder_layers=0)
    x = random(1, 3, D)
    logits, _, _ = decoder.step(x, torch.tensor([3]), decoder.init_state(1))
    torch.testing.assert_close(logits, decoder.head(x), **EXACT)


# ---- MT ----------------------------------------------------------------------------------------------------------


FORMS = {
    "vaswani": {},
    "whisper": {"mt_decoder_form": "whisper"},
    "whisper with a prompt": {"mt_decoder_form": "whisper", "mt_decoder_prompt": 3},
}


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def sentences(lengths: list[int], vocab: int = 13, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(4, vocab, (length,), generator=generator)
        tokens[row, 0] = EOS
    return tokens


def test_mt_is_causal_and_reads_the_visible_frames_only(form):
    decoder = make(MTDecoder, **FORMS[form])
    tokens, memory = sentences([6]), random(1, 9, D)
    visible = torch.tensor([[0, 2, 2, 5, 9, 9]])
    base, _ = decoder(tokens, memory, torch.tensor([9]), visible)
    for changed in range(6):
        other = tokens.clone()
        other[0, changed] = 4 if other[0, changed] != 4 else 5
        differs = (decoder(other, memory, torch.tensor([9]), visible)[0] - base).abs().amax((0, 2)) > 1e-12
        assert differs.tolist() == [False] * changed + [True] * (6 - changed)
    for frame in range(9):
        other = memory.clone()
        other[0, frame] += 1
        differs = (decoder(tokens, other, torch.tensor([9]), visible)[0] - base).abs().amax((0, 2)) > 1e-12
        first = int((visible[0] > frame).nonzero()[0])
        assert differs.tolist() == [False] * first + [True] * (6 - first)


@pytest.mark.parametrize("visible", [None, torch.zeros(2, 3, dtype=torch.long)], ids=["no frames", "nothing visible"])
def test_mt_that_sees_nothing_is_finite_and_blind(visible, form):
    decoder = make(MTDecoder, **FORMS[form])
    tokens = sentences([3, 2])
    lengths = torch.tensor([0, 0]) if visible is None else torch.tensor([4, 4])
    with torch.enable_grad():
        memory = random(2, 4, D).requires_grad_()
        logits, _ = decoder(tokens, memory, lengths, visible)
        logits.sum().backward()
    assert logits.isfinite().all() and memory.grad.abs().max() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())
    torch.testing.assert_close(logits, decoder(tokens, random(2, 0, D), torch.tensor([0, 0]))[0], **EXACT)
    stepped, _, _ = decoder.step(tokens[:, :1], None, decoder.init_state(2))
    torch.testing.assert_close(stepped[:, 0], logits[:, 0], **EXACT)


def test_mt_neighbours_change_nothing(form):
    decoder = make(MTDecoder, **FORMS[form])
    lengths, frames = [5, 3], [7, 4]
    tokens, memory = sentences(lengths), random(2, 7, D)
    together, _ = decoder(tokens, memory, torch.tensor(frames))
    for row in range(2):
        alone, _ = decoder(
            tokens[row : row + 1, : lengths[row]], memory[row : row + 1, : frames[row]], torch.tensor([frames[row]])
        )
        torch.testing.assert_close(together[row, : lengths[row]], alone[0], **EXACT)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_mt_masked_forward_reproduces_the_stream(seed, in_place, form):
    """Rows write at different times; the recorded g(i) give the streamed scores back."""
    generator = torch.Generator().manual_seed(seed)
    decoder = make(MTDecoder, seed, **FORMS[form])
    lengths, frames = torch.tensor([8, 3, 6]), torch.tensor([30, 12, 0])
    tokens, memory = sentences(lengths.tolist(), seed=seed), random(3, 30, D)
    visible = torch.zeros_like(tokens)
    got, hiddens = random(3, 8, 13), random(3, 8, 12)
    state, written, heard = decoder.init_state(3), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    while bool((written < lengths).any()):
        take = torch.minimum(torch.randint(0, 7, (3,), generator=generator), frames - heard)
        chunk = torch.stack([memory[b].roll(-int(heard[b]), 0)[:8] for b in range(3)])
        before = snapshot(state)
        new = decoder.extend(chunk, take, state, in_place)
        assert in_place or unchanged(state, before)
        state, heard = new, heard + take
        for _ in range(int(torch.randint(0, 3, (), generator=generator))):
            active = (torch.rand(3, generator=generator) < 0.7) & (written < lengths)
            token = tokens.gather(1, written.clamp(max=7)[:, None])
            before = snapshot(state)
            logits, hidden, new = decoder.step(token, active, state, in_place)
            assert in_place or unchanged(state, before)
            state = new
            for row in active.nonzero()[:, 0].tolist():
                got[row, written[row]], hiddens[row, written[row]] = logits[row, 0], hidden[row, 0]
                visible[row, written[row]] = heard[row]
            written = written + active
    expected, expected_hidden = decoder(tokens, memory, frames, visible)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[row, :length], expected[row, :length], **EXACT)
        torch.testing.assert_close(hiddens[row, :length], expected_hidden[row, :length], **EXACT)
    assert state.nbytes == decoder.init_state(3).nbytes


def test_mt_prefix_at_once_equals_one_by_one(form):
    decoder = make(MTDecoder, **FORMS[form])
    tokens, memory = sentences([6, 3]), random(2, 5, D)
    state = decoder.extend(memory, torch.tensor([5, 4]), decoder.init_state(2))
    logits, _, state = decoder.step(tokens[:, :4], torch.tensor([4, 3]), state)
    last, _, _ = decoder.step(tokens[:, 4:5], torch.tensor([True, False]), state)
    expected, _ = decoder(tokens, memory, torch.tensor([5, 4]))
    torch.testing.assert_close(logits[0], expected[0, :4], **EXACT)
    torch.testing.assert_close(logits[1, :3], expected[1, :3], **EXACT)
    torch.testing.assert_close(last[0, 0], expected[0, 4], **EXACT)


def test_mt_states_stack_part_reorder_and_restart(form):
    decoder = make(MTDecoder, **FORMS[form])
    tokens, memory = sentences([3, 3]), random(2, 5, D)
    parts = []
    for row in range(2):
        state = decoder.extend(memory[row : row + 1], torch.tensor([5]), decoder.init_state(1))
        for place in range(1 + row):
            _, _, state = decoder.step(tokens[row : row + 1, place : place + 1], None, state)
        parts.append(state)
    state = State.stack(parts)
    token = tokens[[0, 1], [1, 2]][:, None]
    logits, _, _ = decoder.step(token, None, state)
    for row, part in enumerate(state.unstack()):
        torch.testing.assert_close(decoder.step(token[row : row + 1], None, part)[0][0], logits[row], **EXACT)
    beams = State.stack([parts[0], parts[0]])
    _, _, beams = decoder.step(torch.tensor([[4], [5]]), None, beams)
    swapped = decoder.step(token[:1].expand(2, 1), None, beams.reorder(torch.tensor([1, 1])))[0]
    torch.testing.assert_close(swapped, decoder.step(token[:1].expand(2, 1), None, beams)[0][[1, 1]], **EXACT)
    fresh = state.restart(torch.tensor([False, True]))
    fresh = decoder.extend(memory, torch.tensor([0, 5]), fresh)
    first, _, _ = decoder.step(tokens[:, :1], torch.tensor([False, True]), fresh)
    torch.testing.assert_close(first[1, 0], decoder(tokens, memory, torch.tensor([5, 5]))[0][1, 0], **EXACT)


def test_too_long_a_sentence_names_the_limit(form):
    decoder = make(MTDecoder, **FORMS[form])
    state = decoder.init_state(1)
    for _ in range(12):
        _, _, state = decoder.step(torch.tensor([[4]]), None, state)
    with pytest.raises(EchoStreamError, match="12.*max_target_tokens"):
        decoder.step(torch.tensor([[4]]), None, state)
    with pytest.raises(EchoStreamError, match="max_sentence_frames"):
        decoder.extend(random(1, 41, D), torch.tensor([41]), state)
    units = make(UnitDecoder)
    with pytest.raises(EchoStreamError, match="max_sentence_frames"):
        units.step(random(1, 41, D), torch.tensor([41]), units.init_state(1))


def test_mt_greedy_is_the_best_token_of_the_forward(form):
    decoder = make(MTDecoder, **FORMS[form])
    memory, lengths = random(3, 6, D), torch.tensor([6, 2, 4])
    tokens, hidden, counts = decoder.greedy(memory, lengths)
    previous = torch.cat([torch.full((3, 1), EOS), tokens[:, :-1]], dim=1)
    logits, expected = decoder(previous, memory, lengths)
    logits[..., [0, PAD]] = -torch.inf
    for row, count in enumerate(counts.tolist()):
        assert count == 12 or tokens[row, count - 1] == EOS
        assert torch.equal(logits[row, :count].argmax(-1), tokens[row, :count])
        torch.testing.assert_close(hidden[row, :count], expected[row, :count], **EXACT)


# ---- units -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", UNIT_INPUTS)
def test_unit_shapes(source):
    decoder = make(UnitDecoder, unit_decoder_input=source)
    inputs, tokens = random(2, 5, D if source == "encoder" else 12), torch.randint(4, 9, (2, 5))
    logits = decoder(inputs, torch.tensor([5, 2]), random(2, 7, D), torch.tensor([7, 3]), tokens=tokens)
    assert logits.shape == (2, 15, 13)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("source", UNIT_INPUTS)
def test_unit_masked_forward_reproduces_the_stream(source, in_place):
    generator = torch.Generator().manual_seed(3)
    decoder = make(UnitDecoder, unit_decoder_input=source)
    lengths, frames = torch.tensor([9, 4]), torch.tensor([20, 15])
    inputs, memory = random(2, 9, D if source == "encoder" else 12), random(2, 20, D)
    tokens = torch.randint(4, 9, (2, 9))
    if decoder.tokens is not None:  # they start at zero
        torch.nn.init.normal_(decoder.tokens.weight)
    visible, got = torch.zeros(2, 9, dtype=torch.long), random(2, 27, 13)
    state, done, heard = decoder.init_state(2), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    while bool((done < lengths).any()):
        take = torch.minimum(torch.randint(0, 6, (2,), generator=generator), frames - heard)
        chunk = torch.stack([memory[b].roll(-int(heard[b]), 0)[:6] for b in range(2)])
        state = decoder.extend(chunk, take, state, in_place)
        heard = heard + take
        take = torch.minimum(torch.randint(0, 4, (2,), generator=generator), lengths - done)
        chunk, written = (torch.stack([x[b].roll(-int(done[b]), 0)[:4] for b in range(2)]) for x in (inputs, tokens))
        before = snapshot(state)
        logits, counts, new = decoder.step(chunk, take, state, in_place, written)
        assert in_place or unchanged(state, before)
        assert torch.equal(counts, take * 3)
        state = new
        for row in range(2):
            start, end = int(done[row]), int(done[row] + take[row])
            got[row, start * 3 : end * 3] = logits[row, : (end - start) * 3]
            visible[row, start:end] = heard[row]
        done = done + take
    expected = decoder(inputs, lengths, memory, frames, visible, tokens)
    for row, length in enumerate((lengths * 3).tolist()):
        torch.testing.assert_close(got[row, :length], expected[row, :length], **EXACT)


def test_unit_forward_is_causal_and_alone_in_its_batch():
    decoder = make(UnitDecoder)
    inputs, memory = random(2, 6, D), random(2, 6, D)
    lengths = torch.tensor([6, 3])
    base = decoder(inputs, lengths, memory, lengths)
    alone = decoder(inputs[1:, :3], lengths[1:], memory[1:, :3], lengths[1:])
    torch.testing.assert_close(base[1, :9], alone[0], **EXACT)
    other = inputs.clone()
    other[0, 4] += 1
    differs = (decoder(other, lengths, memory, lengths) - base).abs().amax(2)[0] > 1e-12
    assert differs.tolist() == [False] * 12 + [True] * 6


def test_greedy_units_over_any_cut_equal_ctc_collapse():
    generator = torch.Generator().manual_seed(0)
    best = torch.randint(0, 7, (3, 40), generator=generator)
    lengths = torch.tensor([40, 25, 0])
    logits = torch.nn.functional.one_hot(best, 7).float()
    expected = [[u - 4 for u in collapse_ctc(best[b, : lengths[b]].tolist()) if u >= 4] for b in range(3)]
    units, counts, _ = greedy_units(logits, lengths)
    assert [units[b, : counts[b]].tolist() for b in range(3)] == expected
    got, last, start = [[] for _ in range(3)], None, 0
    for size in splits(40, generator):
        part = (lengths - start).clamp(0, size)
        units, counts, last = greedy_units(logits[:, start : start + size], part, last)
        start += size
        for row in range(3):
            got[row] += units[row, : counts[row]].tolist()
    assert got == expected
