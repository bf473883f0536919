"""What the engine asks of a model, as values: a backend (torch, or any other) answers these requests.

Every request belongs to one stream, a *row* of the backend. Requests of one kind from many streams can be answered
together, which is how sessions share a batch. Arrays are numpy. Letters: T feature frames (10 ms), N new encoder frames
(40 ms), D widths, V target vocabulary, P inputs of the unit decoder, R its upsampling ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True)
class Encode:
    """Encode normalised features [T, 80]; with ``finished`` give out the rest and be ready for a new stream."""

    features: np.ndarray
    finished: bool


class EncoderOutput(NamedTuple):
    """Answer to ``Encode``: encoder frames [N, D], and the best symbol of each for the ASR and the ST CTC head [N]."""

    frames: np.ndarray
    source: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class NewSentence:
    """Start the MT and the unit decoder anew. Answer: None."""


@dataclass(frozen=True)
class Extend:
    """Let the MT and the unit decoder see these encoder frames [N, D] too. Answer: None."""

    frames: np.ndarray


@dataclass(frozen=True)
class Write:
    """Feed the MT decoder one token at the next position. Answer: ``Written``.

    With ``heads``, each (MT decoder layer, head), the answer tells where these looked.
    """

    token: int
    heads: tuple[tuple[int, int], ...] = ()


class Written(NamedTuple):
    """Scores of the next token [V], the hidden state [D] they come from, and, if asked for, the cross-attention's
    weights over all frames the sentence has been extended by [frames], the mean of the heads asked for."""

    scores: np.ndarray
    hidden: np.ndarray
    attention: np.ndarray | None = None


@dataclass(frozen=True)
class Search:
    """Finish the sentence by beam search. Answer: the best continuation, a list of ``Chosen``, ``</s>`` last.

    The MT decoder stays where it is: only ``NewSentence`` may follow.

    Attributes:
        token: to be fed first, as with ``Write``.
        beam: hypotheses kept at a time.
        most: tokens before ``</s>`` at most.
    """

    token: int
    beam: int
    most: int


@dataclass(frozen=True)
class Rewind:
    """Forget the MT decoder's positions from ``positions`` on: a draft was not committed. Answer: None."""

    positions: int


@dataclass(frozen=True)
class ReadUnits:
    """Feed the unit decoder inputs [P, D]. Answer: the best symbol of each position, int64 [P * R].

    ``tokens``: int64 [P], those written from the inputs, where they are MT states.
    """

    inputs: np.ndarray
    tokens: np.ndarray | None = None


@dataclass(frozen=True)
class Vocode:
    """Feed the vocoder units [U]; with ``finished`` flush it. Answer: samples, float32 [M]."""

    units: np.ndarray
    finished: bool


Request = Encode | NewSentence | Extend | Write | Search | Rewind | ReadUnits | Vocode

# Under which name the time of each kind of request is booked.
STAGE_NAMES: dict[type, str] = {
    Encode: "encoder",
    NewSentence: "text",
    Extend: "text",
    Write: "text",
    Search: "text",
    Rewind: "text",
    ReadUnits: "units",
    Vocode: "vocoder",
}

STAGE_ORDER = list(STAGE_NAMES)  # as they follow each other in a decision


class Stages(Protocol):
    """A model that serves rows of streams."""

    def run(self, requests: Sequence[tuple[int, Request]]) -> list[Any]:
        """Answer (row, request) pairs, all of one kind and of different rows, in their order."""

    @property
    def rows(self) -> int:
        """How many streams there is room for."""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' states; bounded, whatever is heard."""

    def reset(self, row: int) -> None:
        """A new stream in ``row``."""

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        """The state of ``row`` as named arrays."""

    def restore(self, row: int, arrays: dict[str, np.ndarray]) -> None:
        """Put what ``snapshot`` gave into ``row``.

        Raises:
            KeyError, ValueError: the arrays are of another model.
        """


class Answering:
    """Base of a backend: ``run`` hands requests to the method for their kind, with their rows."""

    def run(self, requests: Sequence[tuple[int, Request]]) -> list[Any]:
        """See ``Stages.run``."""
        rows = [row for row, _ in requests]
        values = [request for _, request in requests]
        answers: list[Any] = getattr(self, _METHODS[type(values[0])])(rows, values)
        return answers


_METHODS: dict[type, str] = {
    Encode: "_encode",
    NewSentence: "_new_sentence",
    Extend: "_extend",
    Write: "_write",
    Search: "_search",
    Rewind: "_rewind",
    ReadUnits: "_read_units",
    Vocode: "_vocode",
}


class Backend(Protocol):
    """Makes the stages of a model; a class whose constructor takes these arguments is one."""

    def __call__(self, bundle: Any, *, rows: int, speech: bool) -> Stages: ...
