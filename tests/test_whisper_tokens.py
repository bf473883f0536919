"""Whisper's byte-level BPE, and vocabularies made of it that SentencePiece cuts alike."""

from __future__ import annotations

import base64
import csv
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echostream.constants import EOS, NUM_SPECIALS, UNK
from echostream.data.config import Subwords
from echostream.data.corpus.normalize import normalize_text
from echostream.data.corpus.subwords import train_subwords
from echostream.errors import CheckpointError, ManifestError, MissingExtraError
from echostream.text import Vocabulary
from echostream.whisper.subwords import TokenOrigins, piece_origins, same_segmentation, write_whisper_subwords
from echostream.whisper.tokens import _BYTES, END_OF_TEXT, WhisperBPE, split_words

PAIRS = Path(__file__).resolve().parents[2] / "shared" / "data" / "tatoeba-es-en.tsv.gz"
SENTENCES = [
    "The house isn't big, is it?", "He said: \"I'll be there at 10:45.\"", "What's your name?",
    "I've 1,250 dollars left.", "Mr. O'Neill lives at 221B Baker Street.",
    "We'd better go; they're waiting...", "Don't worry - nobody's café is closed!", "It costs 5% more in São Paulo.",
    "\"Well,\" she said, \"that's that.\"", "An über-naïve plan — but it works.",
]  # fmt: skip
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "Ã ©", "f Ã©", "c a", "ca fÃ©", "Ġ cafÃ©", "n d", "Ġa nd"]


def write_tokenizer(directory: Path, merges: list[str] = MERGES, form: str = "tokenizer") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokens = [*_BYTES, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if form == "tiktoken":
        lines = [base64.b64encode(bytes(map(_BYTES.__getitem__, token))).decode() for token in tokens]
        text = "".join(f"{line} {i}\n" for i, line in enumerate(lines))
        (directory / "multilingual.tiktoken").write_text(text)
        return directory
    if form == "files":
        (directory / "vocab.json").write_text(json.dumps({**vocabulary, END_OF_TEXT: len(tokens)}))
        (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        return directory
    pairs = merges if form == "tokenizer" else [merge.split(" ") for merge in merges]
    (directory / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": len(tokens), "content": END_OF_TEXT}],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs},
    }))  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> WhisperBPE:
    return WhisperBPE.load(write_tokenizer(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def whisper() -> Path:
    from echostream.units.features import packaged_whisper

    try:
        return packaged_whisper()
    except MissingExtraError as error:
        pytest.skip(str(error))


def english() -> list[str]:
    if not PAIRS.is_file():
        return SENTENCES
    with gzip.open(PAIRS, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return SENTENCES + [normalize_text(row["en"]) for row in rows[::40]]


def pieces_of(model: Path, dictionary: Path, texts: Iterable[str]) -> list[list[str]]:
    subwords = Subwords(model, dictionary)
    return [[subwords.vocabulary[i] for i in subwords.encode(text)] for text in texts]


@pytest.mark.parametrize("form", ["tokenizer", "pairs", "files", "tiktoken"])
def test_every_form_of_the_vocabulary(form: str, tmp_path: Path) -> None:
    bpe = WhisperBPE.load(write_tokenizer(tmp_path, form=form))
    assert bpe.tokens(" the café and a inn") == [b" the", " café".encode(), b" and", b" a", b" ", b"in", b"n"]
    assert bpe.end_of_text == 256 + len(MERGES) and bpe.encode(" the") == [258]
    (tmp_path / "base.pt").touch()
    assert WhisperBPE.load(tmp_path / "base.pt").ids == bpe.ids  # a model named by its file has its tokens beside it


def test_words_are_cut_as_gpt2_cuts_them() -> None:
    assert split_words(" Isn't it 10th? 'twas  so.\n") == [
        " Isn", "'t", " it", " 10", "th", "?", " '", "twas", " ", " so", ".", "\n"
    ]  # fmt: skip
    assert split_words("can't'll") == ["can", "'t", "'ll"] and split_words("") == []


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_in_cutting(text: str) -> None:
    assert "".join(split_words(text)) == text


@given(st.text(st.characters(codec="utf-8"), max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_is_tokens_and_back(tiny: WhisperBPE, text: str) -> None:
    assert b"".join(tiny.tokens(text)).decode("utf-8") == text


def test_pruned_vocabulary(tiny: WhisperBPE, tmp_path: Path) -> None:
    model, dictionary = tmp_path / "spm.model", tmp_path / "dict.txt"
    texts = ["the café and the inn", "a 日"]
    origins = write_whisper_subwords(tiny, texts, model, dictionary)
    assert pieces_of(model, dictionary, texts) == [["▁the", "▁café", "▁and", "▁the", "▁", "in", "n"], ["▁a", "▁", "日"]]
    assert pieces_of(model, dictionary, ["then cafés"]) == [["▁the", "n", "▁café", "<unk>"]]
    vocabulary = Vocabulary.load(dictionary)
    assert len(vocabulary) == len(origins) and piece_origins(tiny, vocabulary) == origins
    # "he" is a step to "▁the", never written: SentencePiece keeps it as unused.
    assert "he" not in vocabulary.index and "▁t" not in vocabulary.index and "▁the" in vocabulary.index
    assert origins.tokens[EOS] == (tiny.end_of_text,) and origins.tokens[UNK] == ()
    assert origins.tokens[vocabulary.index["▁the"]] == (258,)
    assert len(origins.tokens[vocabulary.index["日"]]) == 3  # no merge makes it: three bytes
    assert origins.single[vocabulary.index["日"]] == -1 == origins.single[UNK]
    lines = dict(line.rsplit(" ", 1) for line in dictionary.read_text(encoding="utf-8").splitlines())
    assert (lines["▁the"], lines["▁café"], lines["é"]) == ("2", "1", "0")


def test_few_pieces_still_write_everything(tiny: WhisperBPE, tmp_path: Path) -> None:
    model, dictionary = tmp_path / "spm.model", tmp_path / "dict.txt"
    texts = ["the café and the inn", "the and"]
    letters = len(set("".join(texts)))
    origins = write_whisper_subwords(tiny, texts, model, dictionary, max_pieces=letters + 2)
    assert len(origins) == NUM_SPECIALS + letters + 2
    subwords = Subwords(model, dictionary)
    cut = [subwords.vocabulary[i] for i in subwords.encode(texts[0])]
    # "▁café" had no room: it falls into what it was merged from, down to what there is.
    assert cut == ["▁the", "▁", "c", "a", "f", "é", "▁and", "▁the", "▁", "i", "n", "n"]
    assert subwords.decode(subwords.encode(texts[0])) == texts[0]
    with pytest.raises(ManifestError, match=f"{letters} different characters; 3 pieces"):
        write_whisper_subwords(tiny, texts, model, dictionary, max_pieces=3)
    with pytest.raises(ManifestError, match="no sentences"):
        write_whisper_subwords(tiny, [], model, dictionary)


def test_embeddings_of_pieces(tiny: WhisperBPE, tmp_path: Path) -> None:
    vocabulary = Vocabulary(["▁the", "ink", "é"])
    origins = piece_origins(tiny, vocabulary)
    table = np.random.default_rng(0).normal(size=(tiny.end_of_text + 1, 5)).astype(np.float16)
    found = origins.average(table)
    exact = table.astype(np.float32)
    assert found.shape == (len(vocabulary), 5) and found.dtype == np.float32
    np.testing.assert_allclose(found[EOS], exact[tiny.end_of_text], rtol=1e-6)
    np.testing.assert_allclose(found[NUM_SPECIALS], exact[258], rtol=1e-6)
    ink = exact[tiny.encode("ink")]
    assert len(ink) == 2
    np.testing.assert_allclose(found[NUM_SPECIALS + 1], ink.mean(axis=0), rtol=1e-5)
    known = found[[EOS, *range(NUM_SPECIALS, len(vocabulary))]]
    np.testing.assert_allclose(found[UNK], known.mean(axis=0), rtol=1e-5)
    with pytest.raises(ManifestError, match="100 embeddings, but the dictionary starts from token"):
        origins.average(table[:100])
    origins.save(tmp_path / "origin.npz")
    assert TokenOrigins.load(tmp_path / "origin.npz") == origins
    assert np.load(tmp_path / "origin.npz")["origin"].tolist() == origins.single.tolist()


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04", None])
def test_broken_origins_are_refused(contents: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "origin.npz"
    if contents is None:
        np.savez(path, tokens=np.arange(5), counts=np.array([1, 2]))
    else:
        path.write_bytes(contents)
    with pytest.raises(ManifestError, match="(token origins .*origin.npz|origin.npz holds no token origins)"):
        TokenOrigins.load(path)


BROKEN = {
    "nothing": ({}, "neither tokenizer.json, nor vocab.json"),
    "no-json": ({"tokenizer.json": "{"}, "is not JSON"),
    "no-model": ({"tokenizer.json": "{}"}, "lacks 'model'"),
    "no-end": ({"tokenizer.json": '{"model": {"vocab": {}, "merges": []}}'}, "no token <|endoftext|>"),
    "letters": ({"vocab.json": '{"日": 0, "<|endoftext|>": 1}', "merges.txt": ""}, "no byte-level BPE"),
    "merges": ({"vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": "a b c\n"}, "no byte-level BPE"),
    "tiktoken": ({"multilingual.tiktoken": "YQ== 0 1\n"}, "not 'base64 rank' lines"),
    "tiktoken-order": (
        {"multilingual.tiktoken": "YQ== 0\nYWE= 1\nYWFhYQ== 2\nYWFhYWFhYQ==  3\nYWFhYWFhYWE= 4\nYmE= 5\n"},
        "is no pair",
    ),
    "list": ({"tokenizer.json": '{"added_tokens": [1], "model": {"vocab": ["<|endoftext|>"], "merges": 3}}'}, "is"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_vocabularies_are_refused(case: str, tmp_path: Path) -> None:
    files, message = BROKEN[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as told:
        WhisperBPE.load(tmp_path)
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)


def test_bpe_is_whispers(whisper: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    oracle = tokenizers.Tokenizer.from_file(str(whisper / "tokenizer.json"))
    bpe = WhisperBPE.load(whisper)
    assert bpe.end_of_text == 50257
    published = tmp_path / "multilingual.tiktoken"
    by_id = sorted(bpe.ids.items(), key=lambda entry: entry[1])
    published.write_text("".join(f"{base64.b64encode(token).decode() or '='} {i}\n" for token, i in by_id))
    other = WhisperBPE.load(tmp_path)
    assert (other.ids, other.ranks, other.end_of_text) == (bpe.ids, bpe.ranks, bpe.end_of_text)
    odd = ["¿Qué hora es?  Son las dos…", "日本語 тест ½ Ⅷ 3²", "e\u0301 naïve\tx\n y", "'Twas '70s rock'n'roll"]
    for text in english() + odd:
        assert bpe.encode(" " + text) == oracle.encode(" " + text, add_special_tokens=False).ids, text


def test_sentencepiece_cuts_like_whisper(whisper: Path, tmp_path: Path, record_property) -> None:
    bpe, texts = WhisperBPE.load(whisper), english()
    model, dictionary = tmp_path / "spm.model", tmp_path / "dict.txt"
    origins = write_whisper_subwords(bpe, texts, model, dictionary)
    subwords = Subwords(model, dictionary)
    alike, sentences, shared, total = same_segmentation(bpe, subwords.processor, texts)
    record_property("sentences", alike / sentences)
    record_property("tokens", shared / total)
    assert alike >= 0.999 * sentences and shared >= 0.9995 * total
    for text in texts[::10]:
        ids = subwords.encode(text)
        assert UNK not in ids and subwords.decode(ids) == text
        if (tokens := origins.single[ids]).min() >= 0 and len(tokens) == len(bpe.encode(" " + text)):
            assert tokens.tolist() == bpe.encode(" " + text), text


def test_unigram_pieces_start_from_whispers_tokens(whisper: Path, tmp_path: Path) -> None:
    model, dictionary = tmp_path / "spm.model", tmp_path / "dict.txt"
    texts = SENTENCES * 20
    train_subwords(texts, model, dictionary, 80, coverage=1.0)
    bpe, vocabulary = WhisperBPE.load(whisper), Vocabulary.load(dictionary)
    origins = piece_origins(bpe, vocabulary)
    assert len(origins) == len(vocabulary) and all(origins.tokens[NUM_SPECIALS:])
    names = {i: token for token, i in bpe.ids.items()}
    for piece, ids in zip(vocabulary.symbols[NUM_SPECIALS:], origins.tokens[NUM_SPECIALS:]):
        assert b"".join(names[i] for i in ids).decode("utf-8") == piece.replace("▁", " ")
