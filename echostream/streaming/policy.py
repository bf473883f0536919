"""When to write: policies that trade latency for quality. They decide on the audio clock, once per chunk.

A policy is a value without memory of its own; what it must remember of a sentence is a tuple of whole numbers that
the session carries (and saves). It says how many target tokens and how many unit-decoder inputs the sentence may have
*in all*; the session writes what is missing and never takes anything back. Once a sentence has ended no policy is
asked: the rest is written.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

from echostream.errors import ConfigError

Memory = tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    """What a policy knows of the sentence at a decision.

    Attributes:
        frames: encoder frames (40 ms) of the sentence that are visible.
        source_tokens: subwords the ASR CTC head has emitted, repeats merged.
        target_tokens: subwords the ST CTC head has emitted, repeats merged.
        target_token_frames: the encoder frame of each of those, counted from the sentence's start.
        written: target subwords committed by the MT decoder.
        unit_inputs: inputs that the unit decoder has consumed: MT states (one a subword), or encoder frames.
        units_read_text: are they MT states (``unit_decoder_input: mt``)?
    """

    frames: int
    source_tokens: int
    target_tokens: int
    target_token_frames: tuple[int, ...]
    written: int
    unit_inputs: int
    units_read_text: bool


class Policy(Protocol):
    """What the session asks of a policy."""

    def initial(self) -> Memory:
        """The memory at the start of a sentence."""

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        """How many target subwords may be committed in all, and the memory from now on."""

    def units(self, progress: Progress) -> int:
        """How many inputs the unit decoder may have consumed in all. Asked after the text was written."""


@dataclass(frozen=True)
class CTCCountPolicy:
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
        for f in fields(self):
            value, least = getattr(self, f.name), 1 if f.name.startswith("stride") else 0
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{f.name} is {value!r}; it must be a whole number of at least {least}")

    def initial(self) -> Memory:
        return (0, 0)

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        source, target = progress.source_tokens, progress.target_tokens
        if source < memory[0] + self.stride_n1 or target < memory[1] + self.stride_n1:
            return 0, memory
        return max(0, (target - self.lagging_k1) // self.stride_n1 * self.stride_n1), (source, target)

    def units(self, progress: Progress) -> int:
        count = progress.written if progress.units_read_text else progress.target_tokens
        allowed = max(0, (count - self.lagging_k2) // self.stride_n2 * self.stride_n2)
        if progress.units_read_text or allowed == 0:
            return allowed
        return progress.target_token_frames[allowed - 1] + 1


@dataclass(frozen=True)
class WaitForSentenceEnd:
    """Write nothing before the sentence has ended: the reference, with the quality of offline decoding."""

    def initial(self) -> Memory:
        return ()

    def text(self, progress: Progress, memory: Memory) -> tuple[int, Memory]:
        return 0, memory

    def units(self, progress: Progress) -> int:
        return 0


POLICIES: dict[str, type] = {"ctc": CTCCountPolicy, "sentence": WaitForSentenceEnd}


def make_policy(name: str = "ctc", **knobs: Any) -> Policy:
    """A policy by its name (``ctc``, ``sentence``); knobs it does not have are refused.

    Raises:
        ConfigError: unknown name or knob, or a value out of range.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    known = [f.name for f in fields(POLICIES[name])]
    for knob in knobs:
        if knob not in known:
            raise ConfigError(f"policy {name!r} has no knob {knob!r}; it has: {', '.join(known) or 'none'}")
    return POLICIES[name](**knobs)
