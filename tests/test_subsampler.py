"""The convolutional subsampler: its arithmetic at the edges, and streaming equal to offline."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from echostream.models.subsampler import Subsampler, append_rows, take_rows

BINS = 12


@pytest.fixture
def subsampler() -> Subsampler:
    torch.manual_seed(0)
    module = Subsampler(num_bins=BINS, in_channels=1, channels=6, embed_dim=8).double().eval()
    for conv in (module.conv1, module.conv2):
        torch.nn.init.normal_(conv.bias)  # a bias of zero would hide mistakes in the padding
    return module


def reference(module: Subsampler, x: torch.Tensor) -> torch.Tensor:
    """The design as written: two Conv2d with padding 1 on every side, over one utterance [T, F]."""
    y = F.relu(F.conv2d(x[None, None], module.conv1.weight, module.conv1.bias, stride=2, padding=1))
    y = F.relu(F.conv2d(y, module.conv2.weight, module.conv2.bias, stride=2, padding=1))
    return module.proj(y[0].permute(1, 2, 0).flatten(1))


def test_default_parameters() -> None:
    module = Subsampler(num_bins=80, in_channels=1, channels=256, embed_dim=256)
    assert sum(p.numel() for p in module.parameters()) == 1_903_616
    assert module.proj.in_features == 5120


@pytest.mark.parametrize("length", range(1, 14))
def test_equals_plain_padded_convolutions(subsampler: Subsampler, length: int) -> None:
    x = torch.randn(length, BINS).double()
    y, lengths = subsampler(x[None], torch.tensor([length]))
    assert lengths.tolist() == [-(-length // 4)]
    torch.testing.assert_close(y[0], reference(subsampler, x), rtol=0, atol=1e-12)


def test_batch_padding_changes_nothing(subsampler: Subsampler) -> None:
    lengths = torch.tensor([31, 1, 9, 18, 0])
    x = torch.randn(len(lengths), 31, BINS).double()
    x.masked_fill_((torch.arange(31) >= lengths[:, None])[:, :, None], float("nan"))
    y, y_lengths = subsampler(x, lengths)
    assert y.shape == (5, 8, 8)
    for row, n, item, length in zip(y, y_lengths, x, lengths):
        assert bool((row[n:] == 0).all())
        if length:
            torch.testing.assert_close(row[:n], reference(subsampler, item[:length]), rtol=0, atol=1e-12)


def test_no_look_ahead_past_a_multiple_of_four(subsampler: Subsampler) -> None:
    x = torch.randn(1, 24, BINS).double()
    changed = torch.cat([x[:, :12], torch.randn(1, 12, BINS).double()], dim=1)
    length = torch.tensor([24])
    assert torch.equal(subsampler(x, length)[0][:, :3], subsampler(changed, length)[0][:, :3])


@pytest.mark.parametrize("length", [1, 3, 4, 5, 30])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 30])
def test_streaming_equals_offline(subsampler: Subsampler, length: int, chunk: int) -> None:
    x = torch.randn(1, length, BINS).double()
    state, outputs = subsampler.init_state(1), []
    for start in range(0, length, chunk):
        piece = x[:, start : start + chunk]
        last = torch.tensor([start + chunk >= length])
        y, y_lengths, state = subsampler.step(piece, torch.tensor([piece.shape[1]]), state, last)
        outputs.append(y[:, : y_lengths[0]])
    expected = subsampler(x, torch.tensor([length]))[0]
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-12)


def test_batched_streams_end_apart_and_start_anew(subsampler: Subsampler) -> None:
    """Rows that bring nothing, rows that end while others go on, and a row's next stream in the same batch."""
    lengths = [[17, 6], [40], [3, 3, 11]]
    streams = [[torch.randn(n, BINS).double() for n in row] for row in lengths]
    pieces = [[(x[i : i + 5], i + 5 >= len(x)) for x in row for i in range(0, len(x), 5)] for row in streams]
    state, outputs = subsampler.init_state(3), [[], [], []]
    turn = 0
    while any(pieces):
        x = torch.full((3, 5, BINS), float("nan")).double()
        count, last = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool)
        for row, waiting in enumerate(pieces):
            if waiting and (turn + row) % 3:  # every third turn a row is silent
                piece, last[row] = waiting.pop(0)
                count[row] = len(piece)
                x[row, : len(piece)] = piece
        y, y_lengths, state = subsampler.step(x, count, state, last)
        assert all(bool(t.isfinite().all()) for t in state.tensors())
        for row in range(3):
            outputs[row].append(y[row, : y_lengths[row]])
        turn += 1
    for row in range(3):
        expected = torch.cat([reference(subsampler, x) for x in streams[row]])
        torch.testing.assert_close(torch.cat(outputs[row]), expected, rtol=0, atol=1e-12)


def test_empty_step_gives_nothing_and_keeps_the_state(subsampler: Subsampler) -> None:
    _, _, state = subsampler.step(torch.randn(2, 7, BINS), torch.tensor([7, 2]), subsampler.init_state(2))
    y, y_lengths, after = subsampler.step(torch.empty(2, 0, BINS), torch.tensor([0, 0]), state)
    assert y.shape == (2, 0, 8) and y_lengths.tolist() == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), after.tensors()))


@pytest.mark.parametrize("batch", [1, 3])
def test_append_and_take_rows(batch: int) -> None:
    old, new = torch.randn(batch, 3, 2), torch.randn(batch, 4, 2)
    old_lengths, new_lengths = torch.tensor([1, 3, 0])[:batch], torch.tensor([4, 0, 2])[:batch]
    joined, total = append_rows(old, old_lengths, new, new_lengths)
    assert joined.shape == (batch, 7, 2) and torch.equal(total, old_lengths + new_lengths)
    for i in range(batch):
        row = torch.cat([old[i, : old_lengths[i]], new[i, : new_lengths[i]]])
        assert torch.equal(joined[i], F.pad(row, (0, 0, 0, 7 - len(row))))
    start = torch.tensor([2, 6, 0])[:batch]
    taken = take_rows(joined, start, 3)
    for i in range(batch):
        row = joined[i, start[i] : start[i] + 3]
        assert torch.equal(taken[i], F.pad(row, (0, 0, 0, 3 - len(row))))
