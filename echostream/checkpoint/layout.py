"""What lies where in a checkpoint directory, and whether it fits together.

A directory (a *bundle*) holds ``config.yaml``, ``model.pt`` (fp16 weights), the dictionaries and SentencePiece models,
``gcmvn.npz`` and, if it speaks, ``vocoder.pt`` with ``vocoder.json``. All weights are read with ``weights_only=True``.

``echostream export`` makes of it the form that is shipped (``export.directory``): ``config.json``,
``model.safetensors`` with every weight once, and graphs in ``onnx/``. It runs without torch, and with torch, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echostream.constants import SAMPLE_RATE
from echostream.errors import CheckpointError, ManifestError
from echostream.loading import MAX_SETTINGS, inside, pieces_of, read_json, read_subwords, read_text, read_yaml, shown
from echostream.rules import Rule, check
from echostream.streaming.exported.model import SPEECH_GRAPHS, TEXT_GRAPHS, VOICE_GRAPHS
from echostream.text import Vocabulary

FORMAT = "echostream/1"
EXPORTED_FORMAT = "echostream-onnx/4"  # weights in safetensors and graphs, written by ``echostream export``
BACKENDS = ("torch", "onnx")
FILES = {
    "model": "model.pt",
    "source_spm": "spm.src.model",
    "target_spm": "spm.tgt.model",
    "source_dict": "dict.src.txt",
    "target_dict": "dict.tgt.txt",
    "unit_dict": "dict.unit.txt",
    "cmvn": "gcmvn.npz",
    "vocoder": "vocoder.pt",
    "vocoder_config": "vocoder.json",
    "kmeans": "kmeans.npz",  # optional: units of further speech, so that the voice serves another pair
}
GRAPHS = (*TEXT_GRAPHS, *SPEECH_GRAPHS, *VOICE_GRAPHS)  # in the order in which an export's digest takes them
CONFIG = "config.yaml"
CARD = "MODEL_CARD.md"
EXPORTED_CONFIG, EXPORTED_CARD = "config.json", "README.md"  # as on the Hugging Face hub
_SHA256, LANGUAGE = Rule(str, 64, 64), Rule(str, 0, 35)
_RULES = {
    "source_lang": LANGUAGE, "target_lang": LANGUAGE, "sample_rate": Rule(int, choices=(SAMPLE_RATE,)),
    "policy": Rule(dict), "files": Rule(dict, of=Rule(str, 1, 255)), "digests": Rule(dict, of=_SHA256),
    "model": Rule(dict, needed=True),
}  # fmt: skip
_EXPORTED_RULES = {
    **_RULES, "model_type": Rule(str, choices=("echostream",)),
    "precision": Rule(str, choices=("fp32", "int8"), needed=True), "vocoder": Rule(bool, needed=True),
    "digest": Rule(str, 64, 64, needed=True), "exported_from": _SHA256, "parameters": Rule(dict, of=Rule(int, 0)),
}  # fmt: skip
COPIED = ("source_spm", "target_spm", "source_dict", "target_dict", "unit_dict", "cmvn")  # from the corpus as they are
_ASSETS = Path(__file__).resolve().parents[1] / "assets"
DEFAULT_BUNDLE = _ASSETS / "es-en"  # the shipped model, exported: it needs no torch


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration of a directory, all that we know in it checked but the model's own values.

    Raises:
        CheckpointError: it is missing, cannot be read, is of another format, or a value cannot be used.
    """
    from echostream.streaming.resolve import check_preferences

    path = config_path(directory)
    inside(directory, path.name, "configuration", CheckpointError)
    missing = f"; is {directory} a checkpoint directory?"
    read = read_json if path.name == EXPORTED_CONFIG else read_yaml
    values = read(path, "configuration", CheckpointError, missing)
    wanted = EXPORTED_FORMAT if path.name == EXPORTED_CONFIG else FORMAT
    if values.get("format") != wanted:
        raise CheckpointError(f"{path} is of format {shown(values.get('format'))}; this EchoStream reads {wanted!r}")
    check(values, _EXPORTED_RULES if wanted == EXPORTED_FORMAT else _RULES, str(path), CheckpointError)
    check(values.get("files") or {}, dict.fromkeys(FILES, Rule(str)), f"{path}: files", CheckpointError, others=False)
    values["policy"] = check_preferences(values.get("policy") or {}, f"{path}: policy")
    return values


def config_path(directory: Path) -> Path:
    """Where a directory's configuration lies: ``config.json`` of an exported one, ``config.yaml`` of a checkpoint.

    Raises:
        CheckpointError: both are there.
    """
    exported, own = directory / EXPORTED_CONFIG, directory / CONFIG
    if exported.exists() and own.exists():
        raise CheckpointError(f"{directory} holds {EXPORTED_CONFIG} and {CONFIG}; take away what is of another model")
    return exported if exported.exists() else own


def checkpoint_directory(path: Path | None) -> Path:
    """``path``, or the shipped model's directory.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if path is None and not config_path(DEFAULT_BUNDLE).is_file():
        raise CheckpointError(
            f"no model is shipped in {DEFAULT_BUNDLE}; train one as docs/training.md says, "
            "or name a checkpoint directory"
        )
    path = DEFAULT_BUNDLE if path is None else path
    if not path.is_dir():
        raise CheckpointError(f"checkpoint directory {path} does not exist")
    return path


def card_of(directory: Path) -> str:
    """The text of a directory's model card, empty if it has none.

    Raises:
        CheckpointError: it leads out of the directory or is no text.
    """
    for name in (CARD, EXPORTED_CARD):
        if (directory / name).exists() or (directory / name).is_symlink():
            path = inside(directory, name, "model card", CheckpointError)
            return read_text(path, "model card", CheckpointError, MAX_SETTINGS)
    return ""


def files_of(directory: Path, values: Mapping[str, Any]) -> dict[str, Path]:
    """The paths of a checkpoint directory's files, by what they are.

    Raises:
        CheckpointError: one leads out of the directory, by its name or by a symbolic link.
    """
    names = {**FILES, **{key: name for key, name in (values.get("files") or {}).items() if name is not None}}
    where = f"{config_path(directory)}: files"
    return {key: inside(directory, name, f"{where}.{key}", CheckpointError) for key, name in names.items()}


def sha256(*paths: Path) -> str:
    """Of the files one after the other, hexadecimal. Raises CheckpointError: one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent} lacks {path.name}; fetch or export it again") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def check_digests(directory: Path, digests: Mapping[str, str]) -> None:
    """Compare files with the sha256 that the configuration gives of them.

    Raises:
        CheckpointError: a file is missing, or another.
    """
    config = config_path(directory)
    for name, expected in digests.items():
        found = sha256(inside(directory, name, f"{config}: digests", CheckpointError))
        if found != expected:
            raise CheckpointError(
                f"{directory / name} is not the file that {config.name} names: its sha256 begins with {found[:12]}, "
                f"not {shown(expected[:12])}; fetch or export it again"
            )


def check_vocabulary(path: str | Path, vocabulary: Vocabulary, expected: int, name: str) -> None:
    """Refuse a dictionary that the model was not trained with.

    Raises:
        ManifestError: the sizes differ.
    """
    if len(vocabulary) != expected:
        raise ManifestError(
            f"{path} has {len(vocabulary)} symbols (4 specials included), but the model's {name} asks for {expected}; "
            "use the dictionary the model was trained with"
        )


def check_subwords(model: Path, dictionary: Path, vocabulary: Vocabulary) -> None:
    """Refuse a SentencePiece model that is none, or whose pieces the dictionary lacks.

    Raises:
        ManifestError: see above.
    """
    missing = [piece for piece in pieces_of(read_subwords(model)) if piece not in vocabulary.index]
    if missing:
        raise ManifestError(
            f"{model} has {len(missing)} pieces that {dictionary.name} lacks, the first {shown(missing[0])}; "
            "they are not of one model"
        )
