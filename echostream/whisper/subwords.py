"""Whisper's tokens as SentencePiece: a model and a dictionary of them, and where their weights come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echostream.constants import EOS, NUM_SPECIALS
from echostream.errors import ManifestError, require
from echostream.files import replacing, write_text
from echostream.loading import read_npz
from echostream.text import WORD_START, Vocabulary
from echostream.whisper.tokens import MAX_FILE, WhisperBPE


@dataclass(frozen=True)
class TokenOrigins:
    """Where each entry of a dictionary starts from.

    Attributes:
        tokens: Whisper's token ids of each entry: one, several (their mean), or none (specials but ``</s>``).
    """

    tokens: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def single(self) -> np.ndarray:
        """int64 [V]: the Whisper token that an entry is, -1 where it is none or several."""
        return np.array([ids[0] if len(ids) == 1 else -1 for ids in self.tokens], dtype=np.int64)

    def average(self, embeddings: np.ndarray) -> np.ndarray:
        """Whisper's embeddings [n_vocab, D] -> the entries' [V, D], float32.

        An entry without tokens gets the mean of all the others: it is as likely as anything, and no loud stranger.

        Raises:
            ManifestError: the embeddings are of a smaller vocabulary.
        """
        largest = max((i for ids in self.tokens for i in ids), default=-1)
        if largest >= len(embeddings):
            raise ManifestError(f"{len(embeddings)} embeddings, but the dictionary starts from token {largest}")
        table = np.asarray(embeddings, dtype=np.float32)
        out = np.stack([table[list(ids)].mean(axis=0) if ids else np.zeros(table.shape[1]) for ids in self.tokens])
        known = np.array([bool(ids) for ids in self.tokens])
        out[~known] = out[known].mean(axis=0) if known.any() else 0.0
        return out.astype(np.float32)

    def save(self, path: str | Path) -> None:
        """Write an npz with ``origin`` (``single``), ``tokens`` (all ids in a row) and ``counts`` (of each entry)."""
        counts = np.array([len(ids) for ids in self.tokens], dtype=np.int64)
        flat = np.array([i for ids in self.tokens for i in ids], dtype=np.int64)
        with replacing(path) as file:
            np.savez(file, origin=self.single, tokens=flat, counts=counts)

    @classmethod
    def load(cls, path: str | Path) -> TokenOrigins:
        """Read what ``save`` wrote.

        Raises:
            ManifestError: the file is missing, or is something else.
        """
        try:
            arrays = read_npz(path, "token origins", ManifestError, MAX_FILE, ("tokens", "counts"), "iu")
            flat, counts = arrays["tokens"], arrays["counts"]
            if flat.ndim != 1 or counts.ndim != 1 or min(flat.min(initial=0), counts.min(initial=0)) < 0:
                raise ValueError("its arrays are no lists of ids")
            if counts.sum() != len(flat):
                raise ValueError("its arrays do not fit each other")
        except ManifestError:
            raise
        except ValueError as error:
            raise ManifestError(f"{path} holds no token origins: {(str(error).splitlines() or ['empty'])[0]}") from None
        parts = np.split(flat, np.cumsum(counts)[:-1]) if len(counts) else []
        return cls(tuple(tuple(int(i) for i in part) for part in parts))


def piece_origins(bpe: WhisperBPE, vocabulary: Vocabulary) -> TokenOrigins:
    """Where the entries of any SentencePiece dictionary start from: the token that a piece is, else those of its text.

    Of a dictionary that ``write_whisper_subwords`` made it gives what that returned.
    """
    pieces = vocabulary.symbols[NUM_SPECIALS:]
    specials = ((bpe.end_of_text,) if i == EOS else () for i in range(NUM_SPECIALS))
    return TokenOrigins((*specials, *(_piece_tokens(bpe, piece) for piece in pieces)))


def write_whisper_subwords(
    bpe: WhisperBPE, texts: Iterable[str], model: Path, dictionary: Path, max_pieces: int = 0
) -> TokenOrigins:
    """Whisper's vocabulary, pruned to what ``texts`` need, as a SentencePiece model and a dictionary.

    The pieces are every character of the texts and the tokens of Whisper's encoding of each sentence (after a space).
    All other tokens of these characters lie in the SentencePiece model as *unused*: they take part in the merging, so
    that what is kept is cut as Whisper cuts it, then fall apart into what they were merged from. The dictionary, and
    with it the decoder, knows nothing of them.

    Args:
        texts: sentences as training will see them (after ``normalize_text``).
        max_pieces: keep the most frequent tokens, so many pieces in all (0: all). Characters are always kept, so that
            every text can still be written.

    Raises:
        ManifestError: there is no text, or its characters alone are more than ``max_pieces``.
    """
    counts: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for text in texts:
        counts.update(_piece(token) for token in bpe.tokens(" " + text))
        characters.update(WORD_START + text.replace(" ", WORD_START))
    if not counts:
        raise ManifestError("no sentences to make a vocabulary of")
    if max_pieces and len(characters) > max_pieces:
        raise ManifestError(
            f"the text has {len(characters)} different characters; {max_pieces} pieces do not hold them"
        )
    ranks: dict[str, float] = {}
    for token in bpe.ids:
        if (piece := _piece(token)) and characters.keys() >= set(piece) and WORD_START not in piece[1:]:
            for part, rank in _derivation(bpe, piece).items():
                ranks[part] = min(rank, ranks.get(part, rank))
    room = max_pieces - len(characters) if max_pieces else None
    wanted = [piece for piece in sorted(counts, key=lambda piece: (-counts[piece], piece)) if piece in ranks][:room]
    # Early merges first, then the characters, as SentencePiece's own training writes them.
    kept = [
        *sorted(wanted, key=lambda piece: (ranks[piece], piece)),
        *sorted(characters, key=lambda c: (-characters[c], c)),
    ]
    unused = sorted(ranks.keys() - set(wanted), key=lambda piece: (ranks[piece], piece))
    lowest = len(bpe.ranks)
    scores = {piece: -ranks.get(piece, lowest + i) for i, piece in enumerate([*kept, *unused])}
    with replacing(model) as file:
        file.write(_sentencepiece_bpe(scores, set(unused)))
    write_text(dictionary, "".join(f"{piece} {counts[piece]}\n" for piece in kept))
    return piece_origins(bpe, Vocabulary(kept))


def same_segmentation(bpe: WhisperBPE, processor: Any, texts: Iterable[str]) -> tuple[int, int, int, int]:
    """How a SentencePiece model cuts text beside Whisper.

    Returns:
        sentences cut alike, sentences, Whisper's tokens in them that stand at the same place in both, Whisper's tokens.
    """
    alike = sentences = shared = total = 0
    for text in texts:
        ours = [_text(piece).encode("utf-8") for piece in processor.encode(text, out_type=str)]
        theirs = bpe.tokens(" " + text)
        sentences += 1
        alike += ours == theirs
        shared += len(_spans(ours) & _spans(theirs))
        total += len(theirs)
    return alike, sentences, shared, total


def _derivation(bpe: WhisperBPE, piece: str) -> dict[str, float]:
    """A token and all it is merged from, of more than one character: their ranks.

    Halves that end inside a character move to its end: SentencePiece starts from whole characters. What they become
    may be no token of Whisper's; then it is merged just before what it is needed for.
    """
    out: dict[str, float] = {}
    waiting = [(piece, float(len(bpe.ranks)))]
    while waiting:
        piece, before = waiting.pop()
        if len(piece) < 2:
            continue
        pair = bpe.halves(_text(piece).encode("utf-8"))
        rank = float(bpe.ranks[pair]) if pair else before - 0.5
        out[piece] = min(rank, out.get(piece, rank))
        cut = len(pair[0].decode("utf-8", errors="ignore")) if pair else len(piece) - 1
        cut = min(max(cut, 1), len(piece) - 1)
        waiting += [(piece[:cut], rank), (piece[cut:], rank)]
    return out


def _piece_tokens(bpe: WhisperBPE, piece: str) -> tuple[int, ...]:
    token = _text(piece).encode("utf-8")
    return (bpe.ids[token],) if token in bpe.ids else tuple(bpe.encode(_text(piece)))


def _text(piece: str) -> str:
    return piece.replace(WORD_START, " ")


def _piece(token: bytes) -> str:
    """A token as SentencePiece writes it; empty for one that ends inside a character, or holds the mark itself."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return "" if WORD_START in text else text.replace(" ", WORD_START)


def _spans(tokens: Sequence[bytes]) -> set[tuple[int, int]]:
    ends = np.cumsum([len(token) for token in tokens])
    return {(int(end) - len(token), int(end)) for end, token in zip(ends, tokens)}


def _sentencepiece_bpe(scores: Mapping[str, float], unused: Collection[str]) -> bytes:
    """A SentencePiece model of the type BPE with these pieces; ``<unk>``, ``<s>``, ``</s>`` first, text as it is."""
    require("google.protobuf", "train")
    proto = require("sentencepiece.sentencepiece_model_pb2", "all")
    model = proto.ModelProto()
    kinds = model.SentencePiece
    for piece, score, kind in (
        ("<unk>", 0.0, kinds.UNKNOWN), ("<s>", 0.0, kinds.CONTROL), ("</s>", 0.0, kinds.CONTROL),
        *((piece, score, kinds.UNUSED if piece in unused else kinds.NORMAL) for piece, score in scores.items()),
    ):  # fmt: skip
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(model.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = normalizer.escape_whitespaces = True
    return model.SerializeToString()
