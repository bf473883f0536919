"""Text normalisation: one spelling for quotes and spaces. Case and punctuation stay: sentence ends come from them."""

from __future__ import annotations

import unicodedata

_QUOTES = {
    **dict.fromkeys("“”„‟«»″", '"'),
    **dict.fromkeys("‘’‚‛‹›′`´", "'"),
}
_DASHES = dict.fromkeys("‐‑‒", "-")  # look-alikes of the hyphen; en and em dashes are punctuation of their own
_INVISIBLE = dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
_TABLE = str.maketrans({**_QUOTES, **_DASHES, **_INVISIBLE})


def normalize_text(text: str) -> str:
    """NFC, straight quotes, plain hyphens, single spaces, no control or invisible characters."""
    text = unicodedata.normalize("NFC", text).translate(_TABLE)
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zs", "Zl", "Zp") else c for c in text)
    return " ".join(text.split())


def count_words(text: str) -> int:
    """Words as the split rule counts them: whatever stands between spaces."""
    return len(text.split())


def words_of(text: str) -> list[str]:
    """Lower-case words without the punctuation around them, for vocabulary counts."""
    words = (word.strip("".join(c for c in word if not c.isalnum())).lower() for word in text.split())
    return [word for word in words if word]
