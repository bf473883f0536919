"""What a prepared data directory holds: ``config.yaml``, subword models, dictionaries and the global CMVN."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from echostream.audio.cmvn import GlobalCMVN
from echostream.audio.features import FeatureExtractor, feature_extractor
from echostream.constants import NUM_SPECIALS, SAMPLE_RATE
from echostream.errors import ConfigError, ManifestError
from echostream.loading import inside, pieces_of, read_mapping, read_subwords, shown
from echostream.text import Vocabulary


@dataclass(frozen=True)
class DataConfig:
    """``config.yaml`` of a data directory; keys left out keep these defaults, further keys are ignored.

    Attributes:
        directory: where the other files lie.
        audio_root: what ``src_audio`` of the manifests is relative to; empty means ``directory``.
        features: log-mel features by name (see ``audio.features``); ``whisper`` needs no ``gcmvn``.
    """

    directory: Path
    audio_root: str = ""
    sample_rate: int = SAMPLE_RATE
    source_lang: str = ""
    target_lang: str = ""
    num_units: int = 1000
    spm_src: str = "spm.src.model"
    spm_tgt: str = "spm.tgt.model"
    dict_src: str = "dict.src.txt"
    dict_tgt: str = "dict.tgt.txt"
    dict_unit: str = "dict.unit.txt"
    gcmvn: str = "gcmvn.npz"
    features: str = "kaldi"

    @classmethod
    def load(cls, directory: str | Path, name: str = "config.yaml") -> DataConfig:
        """Read ``directory/name``.

        Raises:
            ManifestError: the directory does not exist.
            ConfigError: the file is missing, is not YAML, or a value cannot be used.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ManifestError(f"data directory {directory} does not exist; echostream prepare makes one")
        path = directory / name
        values = read_mapping(path, missing="; echostream prepare writes one")
        known: dict[str, Any] = {"directory": directory}
        for f in dataclasses.fields(cls):
            if f.name == "directory" or values.get(f.name) is None:
                continue
            value = values[f.name]
            kind = int if f.type == "int" else str
            if not isinstance(value, kind) or isinstance(value, bool):
                wanted = "whole number" if kind is int else "text"
                raise ConfigError(f"{path}: {f.name} is {shown(value)}; it must be a {wanted}")
            known[f.name] = value
        config = cls(**known)
        if config.sample_rate != SAMPLE_RATE:
            raise ConfigError(f"{path}: sample_rate is {config.sample_rate}; features are made at {SAMPLE_RATE} Hz")
        return config

    @property
    def root(self) -> Path:
        """What ``src_audio`` is relative to; a relative ``audio_root`` starts at the data directory."""
        return self.directory / self.audio_root

    def path(self, name: str) -> Path:
        """The file that the key ``name`` (``dict_src`` ...) points to.

        Raises:
            ConfigError: it lies outside the directory.
        """
        return inside(self.directory, getattr(self, name), f"{self.directory / 'config.yaml'}: {name}", ConfigError)

    @cached_property
    def source(self) -> Subwords:
        return Subwords(self.path("spm_src"), self.path("dict_src"))

    @cached_property
    def target(self) -> Subwords:
        return Subwords(self.path("spm_tgt"), self.path("dict_tgt"))

    @property
    def extractor(self) -> FeatureExtractor:
        return feature_extractor(self.features)

    @cached_property
    def cmvn(self) -> GlobalCMVN:
        """The normalisation of the features: their own fixed one, or the training set's."""
        return self.extractor.cmvn or GlobalCMVN.load(self.path("gcmvn"))

    def check_units(self) -> Vocabulary:
        """The unit dictionary, checked against ``num_units``.

        Raises:
            ManifestError: it is missing, or does not list units ``0 .. num_units - 1`` in order.
        """
        path = self.path("dict_unit")
        units = Vocabulary.load(path)
        listed = units.symbols[NUM_SPECIALS:]
        if len(listed) != self.num_units:
            raise ManifestError(f"dictionary {path} lists {len(listed)} units, but num_units is {self.num_units}")
        wrong = next((i for i, symbol in enumerate(listed) if symbol != str(i)), None)
        if wrong is not None:
            raise ManifestError(f"dictionary {path}, line {wrong + 1}: {listed[wrong]!r} where unit {wrong} belongs")
        return units


class Subwords:
    """Text to dictionary indices: a SentencePiece model and the dictionary built with it.

    Raises:
        ManifestError: a file is missing, is not a SentencePiece model, or the two do not belong together.
    """

    def __init__(self, model: Path, dictionary: Path):
        self.vocabulary = Vocabulary.load(dictionary)
        self.processor = read_subwords(model)
        pieces = pieces_of(self.processor)
        missing = [piece for piece in pieces if piece not in self.vocabulary.index]
        if missing:
            raise ManifestError(
                f"dictionary {dictionary} lacks {len(missing)} of the {len(pieces)} pieces of {model.name}, the first "
                f"{missing[0]!r}; build both from the same text"
            )

    def encode(self, text: str) -> list[int]:
        """Dictionary indices of a sentence, no end symbol; unknown pieces become ``<unk>``."""
        return self.vocabulary.ids(self.processor.EncodeAsPieces(text))

    def decode(self, ids: list[int]) -> str:
        return self.vocabulary.detokenize(ids)
