"""Policies that look at what the decoder would write: do its hypotheses agree, and what does it look at?"""

from __future__ import annotations

import re
from dataclasses import dataclass

from echostream.errors import ConfigError
from echostream.loading import shown
from echostream.streaming.policies.base import UNLIMITED, Draft, Memory, PolicyBase, Progress


@dataclass(frozen=True)
class LocalAgreementPolicy(PolicyBase):
    """Local agreement: write what the last n looks at a growing source agree on.

    Liu et al., 2020 (arXiv 2005.11185, section 4.3), known as LA-n since Polák et al., 2022 (CUNI-KIT at IWSLT). At
    every decision that brings new frames the sentence is translated anew to its end, behind what is committed, which
    is never decoded again; the longest common prefix of this hypothesis and those of the ``agreement_n - 1`` decisions
    before is committed. The chunk size (``chunk_ms``) is the other knob: hypotheses agree less, and later, when more
    was said between them.

    Attributes:
        agreement_n: hypotheses in a row that must agree.
        lagging_k2: MT subwords that the speech stays behind the text.
        stride_n2: MT subwords from one writing of units to the next.

    Raises:
        ConfigError: ``agreement_n`` is below 2, or another knob is out of range.
    """

    agreement_n: int = 2
    lagging_k2: int = 0
    stride_n2: int = 1

    def __post_init__(self) -> None:
        self._check(agreement_n=2, lagging_k2=0, stride_n2=1)

    # Memory: the frames visible at the last hypothesis, then of each earlier hypothesis, oldest first, the number of
    # its tokens and these, from the sentence's start.

    def initial(self) -> Memory:
        return (0,)

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        # Nothing new was heard: the same hypothesis would agree with itself.
        return (UNLIMITED if progress.frames > memory[0] else 0), memory

    def settle(self, progress: Progress, draft: Draft, memory: Memory) -> tuple[int, Memory]:
        hypotheses = [*_unpack(memory[1:]), draft.committed + draft.tokens]
        agreed = 0
        if len(hypotheses) == self.agreement_n:
            agreed = min(_common(other, hypotheses[-1]) for other in hypotheses[:-1])
            hypotheses = hypotheses[1:]
        packed = tuple(number for tokens in hypotheses for number in (len(tokens), *tokens))
        return max(0, agreed - len(draft.committed)), (progress.frames, *packed)


def _unpack(numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
    sequences = []
    while numbers:
        size = 1 + numbers[0]
        sequences.append(numbers[1:size])
        numbers = numbers[size:]
    return sequences


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    shortest = min(len(left), len(right))
    return next((i for i in range(shortest) if left[i] != right[i]), shortest)


_HEADS = re.compile(r"(-?\d{1,3}\.\d{1,3}(,-?\d{1,3}\.\d{1,3})*)?")


@dataclass(frozen=True)
class AlignAttPolicy(PolicyBase):
    """AlignAtt: write until the decoder looks at what has only just been said.

    Papi, Turchi and Negri, 2023 (arXiv 2305.11408). Each drafted subword is aligned with the encoder frame to which
    the cross-attention that predicted it gives the most weight (mean of the heads asked for). If that is one of the
    last ``alignatt_frames`` visible frames, more of the source is needed: this subword and all after it wait.

    A decoder that looks at nothing in particular rests on the sentence's first frame, an attention sink (Xiao et al.,
    2023, arXiv 2309.17453, of the first token): in noise often with more weight than on any word. No subword is aligned
    with the first ``alignatt_skip`` frames, or it would be taken for one that was heard long ago.

    Attributes:
        alignatt_frames: encoder frames (40 ms), the f of the paper: more of them, more delay. 0 never waits.
        alignatt_layer: the MT decoder layer that is asked, counted from 0, or from the last one down with -1, -2, ...
        alignatt_heads: single heads instead, as ``layer.head`` separated by commas (``3.1,4.2``): in a decoder from
            Whisper a few follow the sound, and the others blur what these say.
        alignatt_skip: frames at the sentence's start that do not count.
        lagging_k2: MT subwords that the speech stays behind the text.
        stride_n2: MT subwords from one writing of units to the next.

    Raises:
        ConfigError: a knob is out of range.
    """

    alignatt_frames: int = 8
    alignatt_layer: int = -1
    alignatt_heads: str = ""
    alignatt_skip: int = 4
    lagging_k2: int = 0
    stride_n2: int = 1

    def __post_init__(self) -> None:
        self._check(alignatt_frames=0, alignatt_skip=0, lagging_k2=0, stride_n2=1)
        if isinstance(self.alignatt_layer, bool) or not isinstance(self.alignatt_layer, int):
            raise ConfigError(f"alignatt_layer is {shown(self.alignatt_layer)}; it must be a whole number")
        if not isinstance(self.alignatt_heads, str) or not _HEADS.fullmatch(self.alignatt_heads):
            raise ConfigError(f"alignatt_heads is {shown(self.alignatt_heads)}; it must be like 3.1,4.2 (layer.head)")

    @property
    def attention_heads(self) -> tuple[tuple[int, int | None], ...]:
        if not self.alignatt_heads:
            return ((self.alignatt_layer, None),)
        pairs = (entry.split(".") for entry in self.alignatt_heads.split(","))
        return tuple((int(layer), int(head)) for layer, head in pairs)

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        return (UNLIMITED if progress.frames > self.alignatt_frames else 0), memory

    def stops(self, progress: Progress, draft: Draft) -> bool:
        assert draft.attention is not None
        first = min(self.alignatt_skip, len(draft.attention) - 1)
        return first + int(draft.attention[first:].argmax()) >= progress.frames - self.alignatt_frames
