"""Damage: to bytes as flash memory and half downloads do it, to values as people and attackers do it."""

from __future__ import annotations

import copy
import random
import struct
from typing import Any

import numpy as np

NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 4095, 65535, 65536, 767_999, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64,
    -(2**31), -(2**63), 10**30, 0.5, -0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a\0b", "..", "../../../etc/passwd", "/etc/passwd", "/dev/zero", ".", "x" * 300, "\u2028", "\ufeff",
    "é", "😀", "a/b", "model.pt", "true", "null", "1e3", "!!python/object:os.system", "%s%n", "-", "cuda:7",
)  # fmt: skip

MARKS = (b"\n", b"\r\n", b"\t", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", "\u2028".encode(), b"<html>")


def bytes_of(data: bytes, rng: random.Random) -> bytes:
    """A few of: flipped bits, other bytes, numbers written over, cuts, repeats, holes of zeros, foreign beginnings."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out)) if out else 0
        # headers stand at the beginning, directories at the end
        at = min(at, rng.choice((32, 128, len(out)))) if rng.random() < 0.7 else max(at, len(out) - 256)
        what = rng.randrange(9)
        if what == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif what == 1 and out:
            out[at % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 10, rng.randrange(256)))
        elif what == 2:
            number = struct.pack(rng.choice(("<I", ">I", "<H", "<q")), rng.choice((0, 1, 0x7FFF)))
            if rng.random() < 0.5:
                number = b"\xff" * len(number)
            out[at : at + len(number)] = number
        elif what == 3:
            del out[at:]
        elif what == 4:
            del out[at : at + rng.randrange(1, 64)]
        elif what == 5:
            out[at:at] = out[at : at + rng.randrange(1, 512)] * rng.choice((1, 2, 50))
        elif what == 6:
            size = rng.randrange(1, 512)
            out[at : at + size] = bytes(size)
        elif what == 7:
            out[at:at] = rng.choice(MARKS)
        else:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
    return bytes(out)


def value(old: Any, rng: random.Random) -> Any:
    """Another value: near the old one, or of another kind altogether."""
    if isinstance(old, bool) and rng.random() < 0.5:
        return not old
    if isinstance(old, int) and rng.random() < 0.5:
        return old + rng.choice((-1, 1, 2, -old, old, 100, 9 * old))
    what = rng.randrange(7)
    if what <= 2:
        return rng.choice(NUMBERS)
    if what == 3:
        return rng.choice(TEXTS)
    if what == 4:
        return rng.choice((None, True, False, [], {}, [old], {"x": old}, [None], {"": None}))
    if what == 5:
        return [old] * rng.choice((2, 3, 1000))
    nested: Any = old
    for _ in range(rng.choice((3, 30))):
        nested = [nested]
    return nested


def tree(values: Any, rng: random.Random) -> Any:
    """A nested mapping or list with one to three places changed: another value, a key less, more or misspelt."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(values))
        if not places:
            return value(values, rng)
        holder, key = rng.choice(places)
        what = rng.randrange(8)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[rng.choice((f"{key}x", "", 7, None, True, "model"))] = holder.pop(key)
        elif what == 2 and isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[key] = value(holder[key], rng)
    return values


def _places(values: Any) -> Any:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, item in items:
        yield values, key
        yield from _places(item)


def lines(text: str, rng: random.Random) -> str:
    """A table with lines doubled, lost, swapped, or changed within."""
    rows = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
        what = rng.randrange(6)
        if what == 0:
            rows.insert(i, rows[j])
        elif what == 1 and len(rows) > 1:
            del rows[i]
        elif what == 2:
            rows[i], rows[j] = rows[j], rows[i]
        elif what == 3:
            rows[i] = rows[i].replace(rng.choice((" ", "\t", "1", "a")), rng.choice(("", "\t", "-1", "²", "9" * 30)), 1)
        elif what == 4:
            at = rng.randrange(len(rows[i]) + 1)
            rows[i] = rows[i][:at] + rng.choice(TEXTS) + rows[i][at:]
        else:
            rows[i] = rng.choice(TEXTS)
    return "\n".join(rows)


def array(old: np.ndarray, rng: random.Random) -> np.ndarray:
    """Another array in its place: other numbers, shape, kind or length."""
    what, flat = rng.randrange(9), old.copy()
    if what == 0 and old.size and old.dtype.kind == "f":
        flat.reshape(-1)[rng.randrange(old.size)] = rng.choice((np.nan, np.inf, -np.inf, 1e30, -1e30))
    elif what == 1 and old.size and old.dtype.kind in "iu":
        low, high = np.iinfo(old.dtype).min, np.iinfo(old.dtype).max
        flat.reshape(-1)[rng.randrange(old.size)] = min(max(rng.choice((-1, 1, 0, 10**3, 10**9, low, high)), low), high)
    elif what == 2:
        return old[: len(old) // 2] if old.ndim else old[None]
    elif what == 3:
        return np.concatenate([old, old]) if old.ndim else np.array([old, old])
    elif what == 4:
        return old[..., None] if rng.random() < 0.5 else old.reshape(-1)
    elif what == 5:
        with np.errstate(all="ignore"):
            return old.astype(rng.choice(("f8", "f2", "i8", "u1", "?", "c8")))
    elif what == 6:
        return np.zeros(rng.choice(((0,), (), (1,), (1, 0), (3, 3), (100_000,))), old.dtype)
    elif what == 7:
        return np.zeros_like(old)
    else:
        return np.full_like(old, rng.choice((1, 5)))
    return flat
