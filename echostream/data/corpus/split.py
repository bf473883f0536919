"""The split rule: no sentence of either language is ever on both sides of it.

Pairs that share a source or a target sentence (after normalisation) belong to one group, and so on transitively. The
group's key is its smallest target sentence as it stands in the file; sha1(key) mod 50 decides: 0 test, 1 dev,
anything else train. The rule depends on nothing but the text, so everyone who has the file has the same split.
"""

from __future__ import annotations

import hashlib
from typing import Iterable, Sequence

from echostream.data.corpus.normalize import count_words, normalize_text

MODULUS = 50
TEST_WORDS = (4, 12)  # fewest and most words on either side of a pair of the fixed test set
TEST_SIZE = 1000


class _Groups:
    """Union-find over hashable items."""

    def __init__(self) -> None:
        self._parent: dict[object, object] = {}

    def find(self, item: object) -> object:
        parent = self._parent.setdefault(item, item)
        while parent != item:
            grandparent = self._parent[parent]
            self._parent[item] = grandparent
            item, parent = grandparent, self._parent[grandparent]
        return item

    def join(self, a: object, b: object) -> None:
        self._parent[self.find(a)] = self.find(b)


def split_of_key(key: str) -> str:
    """``test``, ``dev`` or ``train`` for the smallest target sentence of a group."""
    remainder = int(hashlib.sha1(key.encode("utf-8")).hexdigest(), 16) % MODULUS
    return {0: "test", 1: "dev"}.get(remainder, "train")


def split_pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The split of every (source, target) pair, in order, by the rule above."""
    groups = _Groups()
    sides = [(("source", normalize_text(s)), ("target", normalize_text(t))) for s, t in pairs]
    for source, target in sides:
        groups.join(source, target)
    smallest: dict[object, str] = {}
    roots = [groups.find(source) for source, _ in sides]
    for root, (_, target) in zip(roots, pairs):
        if root not in smallest or target < smallest[root]:
            smallest[root] = target
    by_root = {root: split_of_key(key) for root, key in smallest.items()}
    return [by_root[root] for root in roots]


def fixed_test_rows(pairs: Sequence[tuple[str, str]], splits: Iterable[str], size: int = TEST_SIZE) -> list[int]:
    """Indices of the test set proper: the first ``size`` test pairs with both sides 4 to 12 words long."""
    low, high = TEST_WORDS
    rows = (
        i for i, (pair, split) in enumerate(zip(pairs, splits))
        if split == "test" and all(low <= count_words(side) <= high for side in pair)
    )
    return [i for i, _ in zip(rows, range(size))]
