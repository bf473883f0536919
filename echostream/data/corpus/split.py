"""The split rule: no sentence of either language is ever on both sides of it.

Pairs that share a source or a target sentence (after normalisation) belong to one group, and so on transitively. The
group's key is its smallest target sentence as it stands in the file; sha1(key) mod 50 decides: 0 test, 1 dev,
anything else train. The rule depends on nothing but the text, so everyone who has the file has the same split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from echostream.data.corpus.normalize import count_words, normalize_text
from echostream.errors import ManifestError

MODULUS = 50
TEST_WORDS = (4, 12)  # fewest and most words on either side of a pair of the fixed test set
TEST_SIZE = 1000
LEAST = 8  # pairs of a test set, and of a dev set, where the rule gives fewer


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
    roots, smallest = _grouped(pairs)
    by_root = {root: split_of_key(key) for root, key in smallest.items()}
    return [by_root[root] for root in roots]


def _grouped(pairs: Sequence[tuple[str, str]]) -> tuple[list[object], dict[object, str]]:
    """The group of every pair, and the key of every group."""
    groups = _Groups()
    sides = [(("source", normalize_text(s)), ("target", normalize_text(t))) for s, t in pairs]
    for source, target in sides:
        groups.join(source, target)
    smallest: dict[object, str] = {}
    roots = [groups.find(source) for source, _ in sides]
    for root, (_, text) in zip(roots, pairs):
        if root not in smallest or text < smallest[root]:
            smallest[root] = text
    return roots, smallest


def fixed_test_rows(pairs: Sequence[tuple[str, str]], splits: Iterable[str], size: int = TEST_SIZE) -> list[int]:
    """Indices of the test set proper: the first ``size`` test pairs with both sides 4 to 12 words long."""
    low, high = TEST_WORDS
    rows = (
        i
        for i, (pair, split) in enumerate(zip(pairs, splits))
        if split == "test" and all(low <= count_words(side) <= high for side in pair)
    )
    return [i for i, _ in zip(rows, range(size))]


def least_sets(
    pairs: Sequence[tuple[str, str]],
    splits: Sequence[str],
    test: set[int],
    usable: Sequence[bool],
    test_size: int | None = None,
) -> tuple[list[str], set[int]]:
    """Splits and test rows with a least test and dev set, for corpora too small for the rule.

    What is missing from the test set comes from test pairs of other lengths, then, as what the dev set lacks, from the
    train groups that come first by sha1 of their keys; no group is parted.

    Args:
        splits, test: by the rule.
        usable: pairs that will not be skipped.
        test_size: pairs of the test set, if it was said; otherwise ``LEAST``, or an eighth of the usable pairs.

    Raises:
        ManifestError: it would leave less than half of the usable pairs for training.
    """
    total, splits, test = sum(usable), list(splits), set(test)
    least_dev = min(LEAST, total // 8)
    least_test = least_dev if test_size is None else test_size
    if least_test < 0:
        raise ManifestError(f"a test set of {least_test} pairs is impossible")
    short = ManifestError(
        f"{total} usable pairs cannot give a test set of {max(1, least_test) if test_size is None else least_test} and "
        f"a dev set of {max(1, least_dev)}, no sentence parted, and leave half of them for training; bring more pairs"
        + ("" if test_size is None else ", or lower --test-size")
    )
    if not least_dev:
        raise short
    others = [i for i, split in enumerate(splits) if split == "test" and i not in test and usable[i]]
    test.update(others[: max(0, least_test - sum(usable[i] for i in test))])
    roots, keys = _grouped(pairs)
    members: dict[object, list[int]] = {}
    for i, root in enumerate(roots):
        if splits[i] == "train":
            members.setdefault(root, []).append(i)
    order = sorted(members, key=lambda root: hashlib.sha1(keys[root].encode("utf-8")).hexdigest())
    left = sum(usable[i] for i, split in enumerate(splits) if split == "train")
    for name, least in (("test", least_test), ("dev", least_dev)):
        have = sum(usable[i] for i in (test if name == "test" else range(len(pairs))) if splits[i] == name)
        for root in list(order):
            rows = [i for i in members[root] if usable[i]]
            if have >= least:
                break
            if not rows or 2 * (left - len(rows)) < total:
                continue
            for i in members[root]:
                splits[i] = name
            if name == "test":
                test.update(rows[: least - have])
            order.remove(root)
            have, left = have + len(rows), left - len(rows)
        if have < least:
            raise short
    return splits, test
