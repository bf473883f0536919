"""When to write: policies that trade latency for quality. They decide on the audio clock, once per chunk.

A policy is a value without memory of its own; what it must remember of a sentence is a tuple of whole numbers that
the session carries (and saves). It says how many target subwords and how many unit-decoder inputs the sentence may have
*in all*; the session writes what is missing and never takes anything back. Once a sentence has ended no policy is
asked: the rest is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from echostream.errors import ConfigError
from echostream.loading import shown

Memory = tuple[int, ...]
MOST = {"agreement_n": 1000, "wait_unit_ms": 60_000}  # of a knob; of all others:
MOST_KNOB = 10_000
UNLIMITED = 1 << 30  # subwords: the policy sets no limit in advance


@dataclass(frozen=True)
class Progress:
    """What a policy knows of the sentence at a decision.

    Attributes:
        frames: encoder frames (40 ms) of the sentence that are visible.
        source_tokens: subwords the ASR CTC head has emitted, repeats merged.
        target_tokens: subwords the ST CTC head has emitted, repeats merged.
        target_token_frames: the encoder frame of each of those, counted from the sentence's start.
        written: target subwords committed by the MT decoder.
        units_read_text: does the unit decoder read MT states (one a subword), and not encoder frames?
        source_words: words the ASR CTC head has completed: as many as it has begun, less the one it may be in.
        first_frame: the encoder frame of the sentence's first CTC token of either head, counted from its start.
        written_words: words begun by the committed subwords.
    """

    frames: int
    source_tokens: int
    target_tokens: int
    target_token_frames: tuple[int, ...]
    written: int
    units_read_text: bool
    source_words: int = 0
    first_frame: int = 0
    written_words: int = 0


@dataclass(frozen=True)
class Draft:
    """What the MT decoder would write now, behind the committed subwords and with all visible frames in view.

    Attributes:
        committed: the sentence's committed subwords.
        tokens: the subwords drafted after them.
        words: how many of those begin a word.
        attention: float [frames], where the decoder looked for the last of ``tokens``: weights over the visible frames,
            the mean of the policy's ``attention_heads``. None where it has none.
    """

    committed: tuple[int, ...]
    tokens: tuple[int, ...]
    words: int
    attention: np.ndarray | None = None


class Policy(Protocol):
    """What the session asks of a policy. ``PolicyBase`` answers for those that only count."""

    @property
    def attention_heads(self) -> tuple[tuple[int, int | None], ...]:
        """Heads of the MT decoder's cross-attention whose mean ``stops`` must see; empty if it needs none.

        Each is (layer, head), the layer negative from the last, the head None for all of the layer.
        """

    def initial(self) -> Memory:
        """The memory at the start of a sentence."""

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        """How many target subwords may be committed in all, and the memory from now on."""

    def stops(self, progress: Progress, draft: Draft) -> bool:
        """May the draft's last token not be written yet? Asked at each token; with it, drafting ends."""

    def settle(self, progress: Progress, draft: Draft, memory: Memory) -> tuple[int, Memory]:
        """How many of the drafted tokens may be committed, and the memory from now on. Asked after every drafting."""

    def units(self, progress: Progress) -> int:
        """How many inputs the unit decoder may have consumed in all. Asked after the text was written."""


class PolicyBase:
    """What most policies have in common: no interest in the draft, and speech that follows the text.

    ``units`` reads two knobs. With m subwords written, inputs up to ``((m - lagging_k2) // stride_n2) * stride_n2`` are
    allowed when the unit decoder reads MT states. When it reads encoder frames, it may read up to the frame at which
    the ST CTC head emitted as many subwords.
    """

    lagging_k2 = 0
    stride_n2 = 1

    @property
    def attention_heads(self) -> tuple[tuple[int, int | None], ...]:
        return ()

    def initial(self) -> Memory:
        return ()

    def stops(self, progress: Progress, draft: Draft) -> bool:
        return False

    def settle(self, progress: Progress, draft: Draft, memory: Memory) -> tuple[int, Memory]:
        return len(draft.tokens), memory

    def units(self, progress: Progress) -> int:
        return self._units(progress, progress.written)

    def _units(self, progress: Progress, count: int) -> int:
        if not progress.units_read_text:
            count = min(count, progress.target_tokens)
        allowed = max(0, (count - self.lagging_k2) // self.stride_n2 * self.stride_n2)
        if progress.units_read_text or allowed == 0:
            return allowed
        return progress.target_token_frames[allowed - 1] + 1

    def _check(self, **least: int) -> None:
        """Refuse knobs that are not whole numbers of at least ``least``.

        Raises:
            ConfigError: naming the first of them.
        """
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ConfigError(f"{name} is {shown(value)}; it must be a whole number of at least {bound}")
            if value > MOST.get(name, MOST_KNOB):
                raise ConfigError(f"{name} is {shown(value)}; it must be at most {MOST.get(name, MOST_KNOB)}")
