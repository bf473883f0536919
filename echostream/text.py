"""Dictionaries and subwords: fairseq's ``dict.txt`` format read without fairseq, and SentencePiece."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Sequence

from echostream.constants import BLANK, BOS, EOS, NUM_SPECIALS, PAD, UNK
from echostream.errors import ManifestError
from echostream.text_file import iter_lines

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
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
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read ``symbol count`` lines.

        Raises:
            ManifestError: the file is missing, or a line is not of that form.
        """
        symbols = []
        for number, line in enumerate(iter_lines(path, what="dictionary"), 1):
            symbol, _, count = line.rstrip().removesuffix(" #fairseq:overwrite").rpartition(" ")
            if not symbol or not count.isdigit():
                raise ManifestError(f"dictionary {path}, line {number}: {line!r} is not 'symbol count'")
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


def collapse_ctc(ids: Sequence[int], previous: int = BLANK, blank: int = BLANK) -> list[int]:
    """Greedy CTC output: repeats merged, blanks dropped. ``previous`` is the raw symbol before ``ids[0]``."""
    out = []
    for symbol in ids:
        if symbol != previous and symbol != blank:
            out.append(symbol)
        previous = symbol
    return out


__all__ = ["BLANK", "BOS", "EOS", "PAD", "UNK", "Vocabulary", "collapse_ctc"]
