"""Sentences that end where a CT-Transformer sets a full stop (Chen et al., 2020, arXiv 2003.01309).

The controllable time-delay transformer reads words without punctuation and says which mark follows each. Directories of
two makes are read as they are: FunASR's exports (``model.onnx`` or ``model_quant.onnx``, ``tokens.json``,
``config.yaml``) and sherpa-onnx's conversions (``model.onnx`` or ``model.int8.onnx``, which hold tokens and marks as
metadata). Both take token ids int32 [1, T] and their number int32 [1] and give scores [1, T, marks]; the exports made
for speech in real time take two attention masks [1, 1, T, T] more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echostream.errors import CheckpointError, ConfigError
from echostream.loading import read_mapping
from echostream.streaming.exported.onnx_runtime import describe_inputs, open_graph
from echostream.streaming.segmenters.base import AudioMemory, CTCToken, Ending, SegmenterBase
from echostream.text import WORD_START, Vocabulary
from echostream.text_file import read_json, read_lines

MODEL_FILES = ("model.onnx", "model.int8.onnx", "model_quant.onnx")
FULL_STOPS = frozenset("。？！.?!…")
KEPT_RESULTS = 64  # texts whose marks are remembered: streams ask again until they have heard more


@dataclass(frozen=True)
class CTPunctuation:
    """A CT-Transformer: marks for words.

    Attributes:
        path: of the graph.
        token_ids: what the graph numbers its tokens.
        unknown: the id of everything else.
        marks: the mark of each class of its output; ``_`` is none.
    """

    path: Path
    graph: Any = field(repr=False, compare=False)
    token_ids: dict[str, int] = field(repr=False)
    unknown: int = 0
    marks: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> CTPunctuation:
        """Open a directory, or its .onnx file.

        Raises:
            CheckpointError: the directory, its graph, tokens or marks are missing or do not fit each other.
            MissingExtraError: ONNX Runtime is not installed.
        """
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"punctuation model {path} does not exist")
        if path.is_dir():
            present = [path / name for name in MODEL_FILES if (path / name).is_file()]
            if not present:
                raise CheckpointError(f"punctuation model {path} holds none of {', '.join(MODEL_FILES)}")
            path = present[0]
        graph = open_graph(path, "punctuation model")
        kinds = [value.type for value in graph.get_inputs()]
        integers = all(kind in ("tensor(int32)", "tensor(int64)") for kind in kinds[:2])
        if len(kinds) not in (2, 4) or not integers or any(kind != "tensor(float)" for kind in kinds[2:]):
            raise CheckpointError(
                f"{path} has the inputs {describe_inputs(graph)}; a CT-Transformer has token ids and their number"
                " (and two masks)"
            )
        metadata = graph.get_modelmeta().custom_metadata_map
        tokens, unknown = _read_tokens(path, metadata)
        marks = _read_marks(path, metadata)
        classes = graph.get_outputs()[0].shape[-1]
        if isinstance(classes, int) and classes != len(marks):
            raise CheckpointError(f"{path} tells {classes} marks apart, but {len(marks)} are listed: {' '.join(marks)}")
        ids = {token: i for i, token in enumerate(tokens)}
        return cls(path, graph, ids, ids.get(unknown, len(tokens) - 1), marks)

    def split(self, word: str) -> list[int]:
        """Token ids of one word: its own, else those of its ASCII runs and single other letters, as in training."""
        for form in (word, word.lower()):
            if form in self.token_ids:
                return [self.token_ids[form]]
        parts: list[str] = []
        for letter in word.lower():
            if parts and letter.isascii() and parts[-1].isascii():
                parts[-1] += letter
            else:
                parts.append(letter)
        return [self.token_ids.get(part, self.unknown) for part in parts]

    def punctuate(self, words: Sequence[str]) -> list[str]:
        """The mark after each word, ``_`` for none."""
        if not words:
            return []
        pieces = [self.split(word) for word in words]
        ids = np.array([[i for piece in pieces for i in piece]])
        given = [ids, np.array([ids.shape[1]])]
        inputs = self.graph.get_inputs()
        given = [a.astype(np.int64 if v.type == "tensor(int64)" else np.int32) for a, v in zip(given, inputs)]
        given += [np.ones((1, 1, ids.shape[1], ids.shape[1]), dtype=np.float32)] * (len(inputs) - 2)
        scores = self.graph.run(None, {value.name: array for value, array in zip(inputs, given)})[0]
        best = scores[0].argmax(-1)
        ends = np.cumsum([len(piece) for piece in pieces]) - 1  # a word's mark follows its last token
        return [self.marks[best[end]] for end in ends]


def _read_tokens(path: Path, metadata: dict[str, str]) -> tuple[list[str], str]:
    """All tokens, in order, and the one that stands for unknown ones."""
    folder = path.parent
    if "tokens" in metadata:
        tokens = metadata["tokens"].split("|")
        size = metadata.get("vocab_size", str(len(tokens)))
        if size != str(len(tokens)):
            raise CheckpointError(f"{path} names {len(tokens)} tokens, but says its vocabulary has {size}")
        return tokens, metadata.get("unk_symbol", tokens[-1])
    try:
        if (folder / "tokens.json").is_file():
            tokens = read_json(folder / "tokens.json", CheckpointError)
        elif (folder / "tokens.txt").is_file():
            lines = read_lines(folder / "tokens.txt", CheckpointError)
            tokens = [line.split()[0] if line.split() else line for line in lines]  # a number may follow
        else:
            raise CheckpointError(f"{folder} has neither tokens.json nor tokens.txt, and {path.name} names no tokens")
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the token list in {folder} cannot be read: {error}") from None
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"the token list in {folder} is not a list of strings")
    return tokens, "<unk>" if "<unk>" in tokens else tokens[-1]


def _read_marks(path: Path, metadata: dict[str, str]) -> tuple[str, ...]:
    if "punctuations" in metadata:
        return tuple(metadata["punctuations"].split("|"))
    config = path.parent / "config.yaml"
    values = read_mapping(config, CheckpointError, "; it lists the marks (model_conf: punc_list)")
    for section in (values.get("model_conf"), values):
        marks = section.get("punc_list") if isinstance(section, dict) else None
        if isinstance(marks, list) and marks:
            return tuple(map(str, marks))
    raise CheckpointError(f"{config} lists no marks (model_conf: punc_list)")


@dataclass(frozen=True)
class CTSegmenter(SegmenterBase):
    """The first full stop that a CT-Transformer sets into the text of a CTC head.

    The head's own punctuation is taken out first. The last words of a text are not judged: what follows them decides,
    and is not known yet (the time delay of the paper).

    Args:
        model: the CT-Transformer.
        vocabulary: of the head; side: which one, ``target`` (ST CTC) or ``source`` (ASR CTC).
        lookahead: words that must follow a full stop before it counts.

    Raises:
        ConfigError: ``lookahead`` is not a whole number of at least 1.
    """

    model: CTPunctuation
    vocabulary: Vocabulary = field(repr=False)
    side: str = "target"
    lookahead: int = 2
    results: OrderedDict[tuple[str, ...], list[str]] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.lookahead, bool) or not isinstance(self.lookahead, int) or self.lookahead < 1:
            raise ConfigError(f"lookahead is {self.lookahead!r}; it must be a whole number of at least 1")

    @property
    def name(self) -> str:
        return f"ct({self.model.path.parent.name}, {self.side}, {self.lookahead})"

    def find(
        self, source: tuple[CTCToken, ...], target: tuple[CTCToken, ...], frames: int, memory: AudioMemory
    ) -> Ending | None:
        words, ends = self._words(target if self.side == "target" else source)
        if len(words) <= self.lookahead:
            return None
        for mark, frame in list(zip(self._marks(words), ends))[: -self.lookahead]:
            if mark in FULL_STOPS:
                if self.side == "target":
                    return Ending("ct", closing=frame)
                return Ending("ct", until=frame + 1)
        return None

    def _words(self, tokens: tuple[CTCToken, ...]) -> tuple[tuple[str, ...], list[int]]:
        """Words without punctuation, and the frame of the last token of each (a full stop of its own included)."""
        words: list[str] = []
        ends: list[int] = []
        for spoken in tokens:
            text = self.vocabulary[spoken.token]
            letters = "".join(c for c in text.replace(WORD_START, "") if c.isalnum() or c in "'-")
            if letters and (not words or text.startswith(WORD_START)):
                words.append(letters)
                ends.append(spoken.frame)
            elif words:
                words[-1] += letters
                ends[-1] = spoken.frame
        return tuple(words), ends

    def _marks(self, words: tuple[str, ...]) -> list[str]:
        if words not in self.results:
            self.results[words] = self.model.punctuate(words)
            while len(self.results) > KEPT_RESULTS:
                self.results.popitem(last=False)
        return self.results[words]
