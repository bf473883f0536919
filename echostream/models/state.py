"""Streaming state as a value: typed dataclasses of tensors that can be copied, stacked, parted and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="State")


@dataclass(frozen=True)
class State:
    """Base of all streaming states.

    Every field is a tensor whose first dimension is the stream (B), another ``State``, or a tuple of states (one per
    layer). Sizes never change while a stream runs. A step never writes into the state it was given.
    """

    def map(self: S, fn: Callable[[Tensor], Tensor]) -> S:
        """The same structure with ``fn`` applied to every tensor."""
        return _zip(lambda tensors: fn(tensors[0]), [self])

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(keep)
        return found

    @property
    def batch_size(self) -> int:
        return self.tensors()[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by the state's tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def index_select(self: S, rows: Tensor) -> S:
        """The streams ``rows`` [N], in that order, as a new state (a row may appear more than once)."""
        return self.map(lambda t: t.index_select(0, rows))

    def where(self: S, keep: Tensor, other: S) -> S:
        """Row by row: this state where ``keep`` [B] is true, ``other`` elsewhere."""
        return _zip(
            lambda pair: torch.where(keep.view(-1, *[1] * (pair[0].dim() - 1)), pair[0], pair[1]), [self, other]
        )

    def to(self: S, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> S:
        """The state on another device, its floating-point tensors in another type; counts stay whole numbers."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def unstack(self: S) -> list[S]:
        """One state of batch size 1 per stream; the inverse of ``stack``."""
        return [self.map(lambda t: t[i : i + 1].clone()) for i in range(self.batch_size)]  # noqa: B023  # called at once

    @staticmethod
    def stack(states: Sequence[S]) -> S:
        """Join the states of several streams, of any age, into one batch."""
        return _zip(lambda tensors: torch.cat(tensors, dim=0), list(states))

    def arrays(self, prefix: str = "") -> dict[str, Any]:
        """The state as flat ``{name: numpy array}``, for saving as npz."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            _flatten(f"{prefix}{f.name}", getattr(self, f.name), out)
        return out

    def from_arrays(self: S, arrays: dict[str, Any], prefix: str = "") -> S:
        """A state shaped like this one, filled from what ``arrays()`` gave.

        Raises:
            KeyError: an array is missing. ValueError: one has another shape.
        """
        names = iter(self.arrays(prefix))

        def load(t: Tensor) -> Tensor:
            name = next(names)
            value = torch.from_numpy(arrays[name].copy()).to(device=t.device, dtype=t.dtype)
            if value.shape[1:] != t.shape[1:]:
                raise ValueError(f"state array {name} has shape {tuple(value.shape)}, expected {tuple(t.shape)}")
            return value

        return self.map(load)


def _zip(fn: Callable[[list[Tensor]], Tensor], values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return fn(values)
    if isinstance(first, tuple):
        return tuple(_zip(fn, list(parts)) for parts in zip(*values, strict=True))
    return type(first)(**{f.name: _zip(fn, [getattr(v, f.name) for v in values]) for f in dataclasses.fields(first)})


def _flatten(name: str, value: Any, out: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        out[name] = value.detach().cpu().numpy()
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            _flatten(f"{name}.{i}", part, out)
    else:
        out.update(value.arrays(f"{name}."))
