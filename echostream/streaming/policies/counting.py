"""Policies that count: subwords of the CTC heads, pieces of the source, or none before the sentence's end."""

from __future__ import annotations

from dataclasses import dataclass

from echostream.constants import ENCODER_FRAME_MS
from echostream.errors import ConfigError
from echostream.loading import shown
from echostream.streaming.policies.base import UNLIMITED, Draft, Memory, PolicyBase, Progress


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
        source_before, target_before = memory
        if source < source_before + self.stride_n1 or target < target_before + self.stride_n1:
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
class WaitForSentenceEnd(PolicyBase):
    """Write nothing before the sentence has ended: the reference, with the quality of offline decoding."""

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        return 0, memory

    def units(self, progress: Progress) -> int:
        return 0
