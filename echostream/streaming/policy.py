"""When to write: policies that trade latency for quality. They decide on the audio clock, once per chunk.

A policy is a value without memory of its own; what it must remember of a sentence is a tuple of whole numbers that
the session carries (and saves). It says how many target subwords and how many unit-decoder inputs the sentence may have
*in all*; the session writes what is missing and never takes anything back. Once a sentence has ended no policy is
asked: the rest is written.

| name | waits for | paper |
|---|---|---|
| ``ctc`` | new subwords of both CTC heads | StreamSpeech, Zhang et al., 2024 |
| ``wait-k`` | k source units more than were written | Ma et al., 2019; with strides Zeng et al., 2021 |
| ``local-agreement`` | the same words from n looks in a row | Liu et al., 2020 |
| ``alignatt`` | attention to leave the newest frames | Papi et al., 2023 |
| ``sentence`` | the sentence's end | (the reference) |
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from echostream.constants import ENCODER_FRAME_MS
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
    """What the session asks of a policy. ``PolicyBase`` answers for those that only count.

    Attributes:
        attention_heads: heads of the MT decoder's cross-attention whose mean ``stops`` must see, each (layer, head),
            the layer negative from the last, the head None for all of the layer; empty if it needs none.
    """

    attention_heads: tuple[tuple[int, int | None], ...]

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
    attention_heads: tuple[tuple[int, int | None], ...] = ()

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


@dataclass(frozen=True)
class CTCCountPolicy(PolicyBase):
    """StreamSpeech's policy (Zhang et al., 2024, section 3.2): the two CTC heads say how much can be translated.

    With a and s the subwords that the ASR and the ST CTC head have emitted in this sentence: wait until both have grown
    by ``stride_n1`` since text was last allowed, then allow ``((s - lagging_k1) // stride_n1) * stride_n1`` subwords in
    all. Then speech: with m what the unit decoder's input follows, its inputs up to
    ``((m - lagging_k2) // stride_n2) * stride_n2`` are allowed.

    Attributes:
        lagging_k1: ST CTC subwords that the text stays behind.
        stride_n1: source and target CTC subwords from one writing of text to the next.
        lagging_k2: subwords that the speech stays behind the text: behind the committed MT subwords when the unit
            decoder reads MT states, behind the ST CTC subwords when it reads encoder frames (it may then read up to
            the frame at which the allowed subword was emitted).
        stride_n2: such subwords from one writing of units to the next.

    Raises:
        ConfigError: a lag is negative or a stride below 1.
    """

    lagging_k1: int = 0
    stride_n1: int = 1
    lagging_k2: int = 0
    stride_n2: int = 1

    def __post_init__(self) -> None:
        self._check(lagging_k1=0, stride_n1=1, lagging_k2=0, stride_n2=1)

    def initial(self) -> Memory:
        return (0, 0)

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        source, target = progress.source_tokens, progress.target_tokens
        if source < memory[0] + self.stride_n1 or target < memory[1] + self.stride_n1:
            return 0, memory
        return max(0, (target - self.lagging_k1) // self.stride_n1 * self.stride_n1), (source, target)

    def units(self, progress: Progress) -> int:
        return self._units(progress, progress.written if progress.units_read_text else progress.target_tokens)


WAIT_UNITS = ("ms", "tokens", "words")


@dataclass(frozen=True)
class WaitKPolicy(PolicyBase):
    """Wait-k: stay a fixed number of source units behind, whatever is said.

    Ma et al., 2019 (arXiv 1810.08398) for words; Ma et al., 2020 (2011.02048) for speech cut into pieces of fixed
    length; with strides Zeng et al., 2021 (RealTranS, 2106.04833). After ``wait_k`` source units the first
    ``wait_stride`` target units may be written, and ``wait_stride`` more for each ``wait_stride`` source units after
    that: with u source units, ``((u - wait_k) // wait_stride + 1) * wait_stride`` target units in all.

    Attributes:
        wait_k: source units before the first writing.
        wait_stride: source units from one writing to the next, and target units written each time.
        wait_unit: what is a source unit: ``ms``, a piece of ``wait_unit_ms`` of audio, counted from the sentence's
            first CTC token on; ``tokens``, a subword of the ASR CTC head; ``words``, a completed word of it. A target
            unit is a word for ``words``, a subword for the others.
        wait_unit_ms: milliseconds in a source unit of kind ``ms``. At 320 ms and 3 to 4 subwords a second a
            translation roughly keeps up with its speaker.
        lagging_k2: MT subwords that the speech stays behind the text.
        stride_n2: MT subwords from one writing of units to the next.

    Raises:
        ConfigError: a knob is out of range.
    """

    wait_k: int = 3
    wait_stride: int = 1
    wait_unit: str = "ms"
    wait_unit_ms: int = 320
    lagging_k2: int = 0
    stride_n2: int = 1

    def __post_init__(self) -> None:
        self._check(wait_k=1, wait_stride=1, wait_unit_ms=ENCODER_FRAME_MS, lagging_k2=0, stride_n2=1)
        if self.wait_unit not in WAIT_UNITS:
            raise ConfigError(f"wait_unit is {shown(self.wait_unit)}; it must be one of {', '.join(WAIT_UNITS)}")

    def allowed(self, progress: Progress) -> int:
        """Target units that may be written in all."""
        if self.wait_unit == "ms":
            heard = (progress.frames - progress.first_frame) * ENCODER_FRAME_MS // self.wait_unit_ms
        else:
            heard = progress.source_words if self.wait_unit == "words" else progress.source_tokens
        return max(0, ((heard - self.wait_k) // self.wait_stride + 1) * self.wait_stride)

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        allowed = self.allowed(progress)
        if self.wait_unit != "words":
            return allowed, memory
        # Of words only the draft shows how many subwords they have.
        return (UNLIMITED if allowed > progress.written_words else 0), memory

    def stops(self, progress: Progress, draft: Draft) -> bool:
        return self.wait_unit == "words" and progress.written_words + draft.words > self.allowed(progress)


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
        hypotheses = _unpack(memory[1:]) + [draft.committed + draft.tokens]
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

    Attributes:
        alignatt_frames: encoder frames (40 ms), the f of the paper: more of them, more delay. 0 never waits.
        alignatt_layer: the MT decoder layer that is asked, counted from 0, or from the last one down with -1, -2, ...
        alignatt_heads: single heads instead, as ``layer.head`` separated by commas (``3.1,4.2``): in a decoder from
            Whisper a few follow the sound, and the others blur what these say.
        lagging_k2: MT subwords that the speech stays behind the text.
        stride_n2: MT subwords from one writing of units to the next.

    Raises:
        ConfigError: a knob is out of range.
    """

    alignatt_frames: int = 8
    alignatt_layer: int = -1
    alignatt_heads: str = ""
    lagging_k2: int = 0
    stride_n2: int = 1

    def __post_init__(self) -> None:
        self._check(alignatt_frames=0, lagging_k2=0, stride_n2=1)
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
        return int(draft.attention.argmax()) >= progress.frames - self.alignatt_frames


@dataclass(frozen=True)
class WaitForSentenceEnd(PolicyBase):
    """Write nothing before the sentence has ended: the reference, with the quality of offline decoding."""

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        return 0, memory

    def units(self, progress: Progress) -> int:
        return 0


POLICIES: dict[str, type] = {
    "ctc": CTCCountPolicy,
    "wait-k": WaitKPolicy,
    "local-agreement": LocalAgreementPolicy,
    "alignatt": AlignAttPolicy,
    "sentence": WaitForSentenceEnd,
}


def knobs_of(name: str) -> list[str]:
    """The knobs of a policy.

    Raises:
        ConfigError: there is no policy of that name.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    return [f.name for f in fields(POLICIES[name])]


def make_policy(name: str = "ctc", **knobs: Any) -> Policy:
    """A policy by its name (see ``POLICIES``); knobs it does not have are refused.

    Raises:
        ConfigError: unknown name or knob, or a value out of range.
    """
    known = knobs_of(name)
    for knob in knobs:
        if knob not in known:
            raise ConfigError(f"policy {name!r} has no knob {knob!r}; it has: {', '.join(known) or 'none'}")
    return POLICIES[name](**knobs)
