"""Which utterances an epoch's items are made of: single ones, and several joined with pauses between them.

A simultaneous translator hears one sentence after another, so that it must meet several in a row in training. An
epoch's plan is drawn from (seed, epoch) alone: every worker and a resumed run draw the same one, and the length of
every item is known before any audio is read, which bucketing by length needs. Each utterance appears once an epoch.

Times here are hops of 10 ms unless an encoder frame (40 ms) is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echostream.constants import SUBSAMPLING
from echostream.data.augment import perturbed_frames
from echostream.errors import ConfigError

# A recording of f frames is 160 f + 240 to 160 f + 399 samples long; among others it is given f + 2 whole hops.
EXTRA_HOPS = 2
# A window may start this many encoder frames before the previous speech ends: CTC often has its last token early.
EARLY_FRAMES = 6
# ... and both of its ends may reach this many encoder frames into the neighbour's speech, for CTC may be late as well.
LATE_FRAMES = 2


@dataclass(frozen=True)
class JoinPolicy:
    """How utterances are joined.

    Attributes:
        probability: share of the items that join several utterances.
        smallest, largest: how many utterances such an item joins (fewer where ``max_frames`` leaves no room).
        shortest_pause, longest_pause: seconds between two of them.
        max_frames: no joined item is longer, in feature frames.
    """

    probability: float = 0.5
    smallest: int = 2
    largest: int = 6
    shortest_pause: float = 0.1
    longest_pause: float = 1.0
    max_frames: int = 3000

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"share of joined items is {self.probability}; it must lie in [0, 1]")
        if not 2 <= self.smallest <= self.largest:
            raise ConfigError(f"joined items hold {self.smallest} to {self.largest} utterances; from 2, and in order")
        if not 0 <= self.shortest_pause <= self.longest_pause:
            raise ConfigError(f"pauses last {self.shortest_pause} to {self.longest_pause} s; at least 0, and in order")


@dataclass(frozen=True)
class Item:
    """One training item: the utterances it joins, in order.

    Attributes:
        utterances: their numbers in the manifest.
        speeds: speed factor of each.
        lengths: feature frames of each, after the change of speed.
        pauses: hops of pause behind each but the last.
    """

    utterances: tuple[int, ...]
    speeds: tuple[float, ...]
    lengths: tuple[int, ...]
    pauses: tuple[int, ...] = ()

    @property
    def n_frames(self) -> int:
        """Feature frames of the whole item."""
        extra = EXTRA_HOPS * (len(self.utterances) - 1)
        return sum(self.lengths) + sum(self.pauses) + extra

    def speech(self) -> list[tuple[int, int]]:
        """First and behind-last hop of each utterance."""
        spans, at = [], 0
        for i, length in enumerate(self.lengths):
            end = at + length + EXTRA_HOPS
            spans.append((at, end))
            at = end + (self.pauses[i] if i < len(self.pauses) else 0)
        return spans

    def windows(self, rng: np.random.Generator | None = None) -> list[tuple[int, int]]:
        """The encoder frames ``[start, end)`` that each sentence's decoders may attend.

        A sentence starts where the previous one's speech ends (its last CTC token, when streaming) and ends behind its
        own speech; both are moved at random within the pause and a little beyond. Without ``rng``: exactly there.
        """
        frames = -(-self.n_frames // SUBSAMPLING)
        spans = self.speech()
        ends = [min(frames, -(-end // SUBSAMPLING)) for _, end in spans]
        pauses = [pause // SUBSAMPLING for pause in self.pauses]
        windows = []
        for i in range(len(spans)):
            start, end = (ends[i - 1] if i else 0), (ends[i] if i < len(pauses) else frames)
            if rng is not None and i:
                start += int(rng.integers(-EARLY_FRAMES, pauses[i - 1] + LATE_FRAMES + 1))
            if rng is not None and i < len(pauses):
                end += int(rng.integers(0, pauses[i] + LATE_FRAMES + 1))
            start, end = max(0, start), min(frames, end)
            windows.append((min(start, end - 1), end))
        return windows


def plan_epoch(
    frames: Sequence[int],
    fixed_speed: Sequence[bool],
    speeds: Sequence[float],
    policy: JoinPolicy | None,
    rng: np.random.Generator,
) -> list[Item]:
    """Draw an epoch's items.

    Args:
        frames: feature frames of every utterance of the manifest.
        fixed_speed: which of them keep their speed (ready features).
        speeds: factors to draw from, one a utterance.
        policy: how to join; None joins nothing.
    """
    order = rng.permutation(len(frames))
    factors = np.asarray(speeds)[rng.integers(0, len(speeds), len(frames))]
    factor = [1.0 if fixed else float(f) for fixed, f in zip(fixed_speed, factors)]
    length = [perturbed_frames(int(n), f) for n, f in zip(frames, factor)]

    def item(members: list[int], pauses: list[int]) -> Item:
        return Item(tuple(members), tuple(factor[m] for m in members), tuple(length[m] for m in members), tuple(pauses))

    items, at = [], 0
    while at < len(order):
        members, pauses = [int(order[at])], []
        total = length[members[0]]
        at += 1
        if policy is not None and rng.random() < policy.probability:
            wanted = int(rng.integers(policy.smallest, policy.largest + 1))
            while len(members) < wanted and at < len(order):
                pause = round(100 * rng.uniform(policy.shortest_pause, policy.longest_pause))
                following = int(order[at])
                longer = total + EXTRA_HOPS + pause + length[following]
                if longer > policy.max_frames:
                    break
                members.append(following)
                pauses.append(pause)
                total = longer
                at += 1
        items.append(item(members, pauses))
    return items
