"""Dictionaries and subwords: fairseq's ``dict.txt`` format read without fairseq, and SentencePiece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from echostream.constants import BLANK, BOS, EOS, NUM_SPECIALS, PAD, UNK
from echostream.errors import ManifestError
from echostream.loading import MAX_DICTIONARY, read_text, shown
from echostream.text_file import lines_of

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
OVERWRITE = " #fairseq:overwrite"  # a line's end that lets it repeat a symbol
SENTENCE_ENDS = ".!?…。！？؟।"  # Latin, Chinese and Japanese, Arabic, Devanagari
WORD_START = "\u2581"  # SentencePiece's mark of a space before the piece


class Vocabulary:
    """The symbols of one dictionary, special symbols first, as fairseq numbers them.

    Args:
        symbols: the dictionary's own symbols, in file order, without the four specials.
    """

    def __init__(self, symbols: Iterable[str]):
        self.symbols = [*SPECIALS, *symbols]
        self.index = {symbol: i for i, symbol in enumerate(self.symbols)}

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read ``symbol count`` lines.

        Raises:
            ManifestError: the file is missing, too large, not UTF-8, or a line is not of that form or repeats a symbol
                (without fairseq's mark that it does so on purpose).
        """
        symbols: list[str] = []
        seen = set(SPECIALS)
        text = read_text(path, "dictionary", ManifestError, MAX_DICTIONARY)
        for number, line in enumerate(lines_of(text), 1):
            entry = line.rstrip(" ").removesuffix(OVERWRITE)
            symbol, _, count = entry.rpartition(" ")
            if not symbol or not (count.isascii() and count.isdigit()):
                raise ManifestError(f"dictionary {path}, line {number}: {shown(line)} is not 'symbol count'")
            if symbol in seen and not line.rstrip(" ").endswith(OVERWRITE):
                raise ManifestError(f"dictionary {path}, line {number}: {shown(symbol)} has been there before")
            seen.add(symbol)
            symbols.append(symbol)
        return cls(symbols)

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, index: int) -> str:
        return self.symbols[index]

    def ids(self, pieces: Iterable[str]) -> list[int]:
        return [self.index.get(piece, UNK) for piece in pieces]

    def detokenize(self, ids: Iterable[int]) -> str:
        """Subword ids to text: pieces joined, word marks turned into spaces, specials left out."""
        pieces = [self.symbols[i] for i in ids if i >= NUM_SPECIALS or i == UNK]
        return "".join(pieces).replace(WORD_START, " ").strip()

    def starts_word(self, index: int) -> bool:
        return self.symbols[index].startswith(WORD_START)

    def ends_sentence(self, index: int) -> bool:
        """Does this subword close a sentence (``.``, ``!``, ``?``, ``…`` as its last letter, or their like)?"""
        return index >= NUM_SPECIALS and self.symbols[index][-1] in SENTENCE_ENDS

    def has_letters(self, index: int) -> bool:
        """Is there more to this subword than punctuation?"""
        return has_letters(self.symbols[index])


def has_letters(text: str) -> bool:
    """Is there a letter or a digit in it? Punctuation alone makes no sound."""
    return any(letter.isalnum() for letter in text)


def collapse_ctc(ids: Sequence[int], previous: int = BLANK, blank: int = BLANK) -> list[int]:
    """Greedy CTC output: repeats merged, blanks dropped. ``previous`` is the raw symbol before ``ids[0]``."""
    out = []
    for symbol in ids:
        if symbol != previous and symbol != blank:
            out.append(symbol)
        previous = symbol
    return out


__all__ = ["BLANK", "BOS", "EOS", "PAD", "UNK", "Vocabulary", "collapse_ctc", "has_letters"]
