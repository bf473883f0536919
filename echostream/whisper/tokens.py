"""From Whisper's tokens to a target vocabulary that the project reads as any other: SentencePiece and a dictionary.

Whisper writes with byte-level BPE (GPT-2's, 50,257 tokens for every language there is). SentencePiece's own BPE, given
the tokens that one language needs and the ranks of their merges, cuts text in the same places; so a decoder can start
from Whisper's with a tenth of its embeddings. A vocabulary of another cut (a unigram model) can start there too: the
embedding of each piece is the mean of those of its Whisper tokens.
"""

from __future__ import annotations

import base64
import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from echostream.errors import CheckpointError, ConfigError
from echostream.loading import parse_json, read_text
from echostream.text_file import lines_of

END_OF_TEXT = "<|endoftext|>"
MAX_FILE = 100_000_000  # bytes of a vocabulary file
# In the order of their tokens; the last came with large-v3.
LANGUAGES = (
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg "
    "lt la mi ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so "
    "af oc ka be tg sd gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue"
).split()
TASKS = ("translate", "transcribe")
ENGLISH_ALONE = 50256  # where the text ends for models that know nothing else (tiny.en ...)
TIMESTAMPS = 1501  # Whisper's last tokens
# GPT-2's pattern on the classes of the characters: letters, numbers, spaces, other white space, the rest.
_WORD = re.compile(r" ?L+| ?N+| ?P+|[ S]+(?![LNP])|[ S]+")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class WhisperBPE:
    """Whisper's byte-level BPE (Sennrich et al., 2016, in GPT-2's form).

    Args:
        ids: token id by the token's bytes.
        merges: pairs of bytes that become one token, first come first.
        end_of_text: id of ``<|endoftext|>``.
    """

    def __init__(self, ids: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]], end_of_text: int):
        self.ids, self.end_of_text = ids, end_of_text
        self.ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
        self._words: dict[bytes, tuple[bytes, ...]] = {}
        self._halves: dict[bytes, tuple[bytes, bytes] | None] = {}

    @classmethod
    def load(cls, directory: str | Path) -> WhisperBPE:
        """Read ``tokenizer.json``, ``vocab.json`` with ``merges.txt``, or OpenAI's ``multilingual.tiktoken``.

        Args:
            directory: of the model, the model's file in it, or the ``.tiktoken`` file itself.

        Raises:
            CheckpointError: none is there, or it is no byte-level BPE.
        """
        directory = Path(directory)
        if directory.suffix == ".tiktoken":
            return cls._load_tiktoken(directory)
        directory = directory.parent if directory.is_file() else directory
        path = directory / "tokenizer.json"
        if path.is_file():
            values = _read_json(path)
            model = values.get("model")
            if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys():
                raise CheckpointError(f"{path} is no BPE: it lacks 'model' with 'vocab' and 'merges'")
            vocabulary, merges = model["vocab"], model["merges"]
            added = values.get("added_tokens") or []
            specials = {entry.get("content"): entry.get("id") for entry in added if isinstance(entry, dict)}
        elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            path = directory / "vocab.json"
            vocabulary = specials = _read_json(path)
            lines = lines_of(_read(directory / "merges.txt"))
            merges = [line for line in lines if line and not line.startswith("#version")]
            if (directory / "added_tokens.json").is_file():
                specials = {**vocabulary, **_read_json(directory / "added_tokens.json")}
        elif (directory / "multilingual.tiktoken").is_file():
            return cls._load_tiktoken(directory / "multilingual.tiktoken")
        else:
            raise CheckpointError(
                f"{directory} holds neither tokenizer.json, nor vocab.json with merges.txt, nor multilingual.tiktoken"
            )
        end = specials.get(END_OF_TEXT, vocabulary.get(END_OF_TEXT) if isinstance(vocabulary, dict) else None)
        if type(end) is not int:
            raise CheckpointError(f"{path} has no token {END_OF_TEXT}; is it Whisper's?")
        try:
            pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
            ids = {_to_bytes(token): int(i) for token, i in vocabulary.items() if not token.startswith("<|")}
            return cls(ids, [(_to_bytes(first), _to_bytes(second)) for first, second in pairs], end)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is no byte-level BPE ({type(error).__name__}: {error})") from None

    @classmethod
    def _load_tiktoken(cls, path: Path) -> WhisperBPE:
        """OpenAI's form: base64 and rank of every token. A token's merge is what the earlier ones leave of it."""
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        try:
            lines = [line.split() for line in lines_of(_read(path)) if line]
            # "=" is how the published file writes its last token, which is empty.
            ids = {b"" if token == "=" else base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError as error:
            raise CheckpointError(f"{path} is not 'base64 rank' lines ({error})") from None
        bpe = cls(ids, [], len(ids))  # the specials follow the tokens, the end of the text first
        for token in sorted((token for token in ids if len(token) > 1), key=ids.__getitem__):
            parts = bpe._merge(token)
            if len(parts) != 2:
                raise CheckpointError(f"{path}: token {token!r} is no pair of those before it")
            bpe.ranks[parts[0], parts[1]] = len(bpe.ranks)
        return bpe

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands; a sentence of Whisper's begins with a space."""
        return [self.ids[token] for token in self.tokens(text)]

    def tokens(self, text: str) -> list[bytes]:
        """The same as bytes.

        Raises:
            CheckpointError: the vocabulary lacks a byte.
        """
        return [token for word in split_words(text) for token in self._word(word.encode("utf-8"))]

    def halves(self, token: bytes) -> tuple[bytes, bytes] | None:
        """The pair that was merged into a token; None for single bytes and for what no merge leads to."""
        if token not in self._halves:
            parts = self._merge(token, stop=2)
            whole = len(parts) == 2 and tuple(parts) in self.ranks
            self._halves[token] = (parts[0], parts[1]) if whole else None
        return self._halves[token]

    def _word(self, word: bytes) -> tuple[bytes, ...]:
        if word not in self._words:
            tokens = tuple(self._merge(word))
            unknown = next((token for token in tokens if token not in self.ids), None)
            if unknown is not None:
                raise CheckpointError(f"Whisper's vocabulary has no token {unknown!r} (in {word!r})")
            self._words[word] = tokens
        return self._words[word]

    def _merge(self, word: bytes, stop: int = 1) -> list[bytes]:
        """Merge the pair of the lowest rank, wherever it stands, until none is left or ``stop`` tokens are."""
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > stop:
            pair = min(itertools.pairwise(parts), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == pair
                merged.append(parts[i] + parts[i + 1] if both else parts[i])
                i += 2 if both else 1
            parts = merged
        return parts


def prompt(n_vocab: int, end_of_text: int, language: str, task: str = "translate") -> tuple[int, int, int, int]:
    """``<|startoftranscript|>``, language, task, ``<|notimestamps|>``: what Whisper's decoder reads before the text.

    Behind ``<|endoftext|>`` the tokens are: start, the languages, the two tasks, four others of which the last is
    ``<|notimestamps|>``, the timestamps.

    Raises:
        ConfigError: the model has no such language, or only English.
    """
    start, no_timestamps = end_of_text + 1, n_vocab - TIMESTAMPS - 1
    known = LANGUAGES[: max(0, no_timestamps - 5 - (start + 1))]
    if end_of_text == ENGLISH_ALONE:
        known = []  # it has the tokens, but has never learnt what they mean
    if language not in known:
        what = f"{len(known)} languages, by codes such as es" if known else "no language but English"
        raise ConfigError(f"source_lang is {language!r}; this Whisper knows {what}")
    return start, start + 1 + known.index(language), no_timestamps - 5 + TASKS.index(task), no_timestamps


def split_words(text: str) -> list[str]:
    """Cut a text as GPT-2 does before its BPE: letters, numbers, the rest, each with the space before it."""
    classes = "".join(map(_class, text))
    words, start = [], 0
    while start < len(text):
        word = next((c for c in _CONTRACTIONS if text.startswith(c, start)), None)
        if word is None:
            found = _WORD.match(classes, start)
            assert found is not None  # it takes any class
            end = found.end()
        else:
            end = start + len(word)
        words.append(text[start:end])
        start = end
    return words


@cache
def _class(character: str) -> str:
    if character.isspace():
        return " " if character == " " else "S"
    kind = unicodedata.category(character)[0]
    return kind if kind in "LN" else "P"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _to_bytes(token: str) -> bytes:
    return bytes(_BYTES[letter] for letter in token)


def _read(path: Path) -> str:
    return read_text(path, "vocabulary", CheckpointError, MAX_FILE)


def _read_json(path: Path) -> dict:
    return parse_json(_read(path), f"vocabulary {path}", CheckpointError)
