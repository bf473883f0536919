"""Checkpoint directories: everything a trained model needs, in one place and without anybody's paths.

A directory (a *bundle*) holds ``config.yaml``, ``model.pt`` (fp16 weights), the dictionaries and SentencePiece models,
``gcmvn.npz`` and, if it speaks, ``vocoder.pt`` with ``vocoder.json``. All weights are read with ``weights_only=True``.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from echostream.audio.cmvn import GlobalCMVN
from echostream.audio.features import feature_extractor
from echostream.config import EchoStreamConfig
from echostream.constants import NUM_SPECIALS, SAMPLE_RATE
from echostream.errors import CheckpointError, ManifestError, require
from echostream.text import Vocabulary
from echostream.weights import read_weights

if TYPE_CHECKING:
    import torch

    from echostream.models.decoders.vocoder import CodeHiFiGAN
    from echostream.models.echostream_model import EchoStreamModel
    from echostream.streaming.exported.model import ExportedModel, ExportedVoice

FORMAT = "echostream/1"
EXPORTED_FORMAT = "echostream-onnx/2"  # graphs in place of weights, written by ``echostream export``
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
}
DEFAULT_BUNDLE = Path(__file__).parent / "assets" / "es-en"


@dataclass(frozen=True)
class Bundle:
    """A loaded checkpoint directory.

    Attributes:
        directory: where it came from.
        config: the model's configuration.
        model: in eval mode, fp32, on the device asked for, the vocoder not attached; or the exported graphs.
        source_dict, target_dict: the text dictionaries.
        unit_count: number of discrete units.
        cmvn: normalisation of the source features.
        vocoder: None for a bundle that only writes text and units.
        policy: the policy's defaults that were chosen for this model (``lagging_k1`` and so on).
        source_lang, target_lang: language codes.
        digest: sha256 of ``model.pt`` (of all graphs), hexadecimal: names the weights a saved session belongs to.
    """

    directory: Path
    config: EchoStreamConfig
    model: EchoStreamModel | ExportedModel
    source_dict: Vocabulary
    target_dict: Vocabulary
    unit_count: int
    cmvn: GlobalCMVN
    vocoder: CodeHiFiGAN | ExportedVoice | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    source_lang: str = ""
    target_lang: str = ""
    digest: str = ""


def load_bundle(
    directory: str | Path = DEFAULT_BUNDLE, device: str = "cpu", backend: str | None = None, threads: int | None = None
) -> Bundle:
    """Load a checkpoint directory, or one that ``echostream export`` made of it.

    Args:
        device: where torch keeps the model; exported graphs run on the CPU.
        backend: ``torch`` or ``onnx``, to refuse a directory of the other kind. Default: what the directory holds.
        threads: CPU threads that compute. Default: torch's own choice; 1 for exported graphs.

    Raises:
        CheckpointError: a file is missing, truncated, of another format, would run code when loaded, or holds weights
            that do not fit the configuration; or the directory is not for this backend.
        ManifestError: a dictionary is missing, unreadable, or of another size than the model's.
        ConfigError: the configuration holds unknown keys or values out of range.
        MissingExtraError: torch (for exported graphs: ONNX Runtime) is not installed.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint directory {directory} does not exist")
    values = _read_config(directory / "config.yaml")
    exported = values["format"] == EXPORTED_FORMAT
    if backend == "torch" and exported:
        raise CheckpointError(f"{directory} holds exported graphs; they run on the backend onnx")
    if backend == "onnx" and not exported:
        raise CheckpointError(f"{directory} holds a torch model; first: echostream export {directory} -o DIRECTORY")
    config = EchoStreamConfig.from_dict(values["model"])
    paths = {name: directory / file for name, file in {**FILES, **values.get("files", {})}.items()}

    source_dict, target_dict, unit_dict = (
        Vocabulary.load(paths[name]) for name in ("source_dict", "target_dict", "unit_dict")
    )
    check_vocabulary(paths["source_dict"], source_dict, config.asr_vocab_size, "asr_vocab_size")
    check_vocabulary(paths["target_dict"], target_dict, config.st_vocab_size, "st_vocab_size")
    check_vocabulary(paths["target_dict"], target_dict, config.mt_vocab_size, "mt_vocab_size")
    check_vocabulary(paths["unit_dict"], unit_dict, config.num_units + NUM_SPECIALS, "num_units (4 specials more)")
    load = _load_exported if exported else _load_torch
    model, vocoder, digest = load(directory, values, config, paths, device, threads)
    return Bundle(
        directory=directory,
        config=config,
        model=model,
        source_dict=source_dict,
        target_dict=target_dict,
        unit_count=config.num_units,
        cmvn=GlobalCMVN.load(paths["cmvn"]),
        vocoder=vocoder,
        policy=values.get("policy", {}),
        source_lang=values.get("source_lang", ""),
        target_lang=values.get("target_lang", ""),
        digest=digest,
    )


def _load_torch(
    directory: Path, values: dict[str, Any], config: EchoStreamConfig, paths: dict[str, Path], device: str,
    threads: int | None,
) -> tuple[EchoStreamModel, CodeHiFiGAN | None, str]:  # fmt: skip
    """Model, vocoder and digest of a checkpoint directory."""
    torch = require("torch", "simuleval")
    from echostream.models.echostream_model import build_echostream_model

    if threads is not None:
        torch.set_num_threads(threads)
    weights = read_weights(paths["model"])
    if not isinstance(weights, Mapping) or weights.get("format") != FORMAT or not isinstance(weights["model"], Mapping):
        found = weights.get("format") if isinstance(weights, Mapping) else type(weights).__name__
        raise CheckpointError(
            f"{paths['model']} is not an EchoStream model (format {found!r}, expected {FORMAT!r}); "
            "make one with scripts/export_checkpoint.py"
        )
    model = build_echostream_model(config)
    try:
        model.load_state_dict(weights["model"])
    except CheckpointError as error:
        raise CheckpointError(f"{paths['model']}: {error}") from None
    model = model.float().eval().to(_device(device))

    vocoder = None
    if paths["vocoder"].exists() or paths["vocoder_config"].exists():
        from echostream.models.decoders.vocoder_checkpoint import load_vocoder

        vocoder = load_vocoder(paths["vocoder"], paths["vocoder_config"], device).eval()
    return model, vocoder, hashlib.sha256(paths["model"].read_bytes()).hexdigest()


def _load_exported(
    directory: Path, values: dict[str, Any], config: EchoStreamConfig, paths: dict[str, Path], device: str,
    threads: int | None,
) -> tuple[ExportedModel, ExportedVoice | None, str]:  # fmt: skip
    """The same of an exported directory."""
    from echostream.models.decoders.vocoder_config import VocoderConfig
    from echostream.streaming.exported.model import ExportedModel, ExportedVoice

    require("onnxruntime", "onnx")
    if device != "cpu":
        raise CheckpointError(f"exported graphs run on the CPU, not on {device!r}; leave the device out")
    voice = ExportedVoice(VocoderConfig.from_json(paths["vocoder_config"])) if values.get("vocoder") else None
    model = ExportedModel(directory, values.get("precision", "fp32"), threads or 1, values.get("parameters", {}))
    return model, voice, values.get("digest", "")


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


def read_fairseq_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], EchoStreamConfig | None]:
    """Weights and, where the file tells it, configuration of a checkpoint written by fairseq-train.

    Raises:
        CheckpointError: see ``read_weights``; or the file holds no ``model``.
    """
    checkpoint = read_weights(path)
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("model"), Mapping):
        raise CheckpointError(f"{path} is not a fairseq checkpoint: it has no 'model'")
    arguments = (checkpoint.get("cfg") or {}).get("model") or checkpoint.get("args")
    if isinstance(arguments, Mapping):
        arguments = argparse.Namespace(**arguments)
    config = EchoStreamConfig.from_args(arguments) if arguments is not None else None
    return dict(checkpoint["model"]), config


def average_checkpoints(paths: Iterable[str | Path]) -> tuple[dict[str, torch.Tensor], EchoStreamConfig | None]:
    """The mean of the weights of several fairseq checkpoints of one run (float64 sums); the last one's configuration.

    Raises:
        CheckpointError: a checkpoint cannot be read, or its weights differ in name or shape from the first one's.
    """
    paths = [Path(path) for path in paths]
    total: dict[str, torch.Tensor] = {}
    config = None
    for path in paths:
        state, config = read_fairseq_checkpoint(path)
        if total and {k: v.shape for k, v in total.items()} != {k: v.shape for k, v in state.items()}:
            raise CheckpointError(f"{path} cannot be averaged with {paths[0]}: it is of another model")
        for name, tensor in state.items():
            value = tensor.double() if tensor.is_floating_point() else tensor
            total[name] = total[name] + value if name in total and tensor.is_floating_point() else value
    return {k: (v / len(paths)).float() if v.is_floating_point() else v for k, v in total.items()}, config


def save_bundle(
    directory: str | Path,
    state: Mapping[str, torch.Tensor],
    config: EchoStreamConfig,
    data: str | Path,
    vocoder: tuple[str | Path, str | Path] | None = None,
    policy: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write a checkpoint directory that ``load_bundle`` reads.

    Args:
        state: the model's weights; those of an attached vocoder (``vocoder.*``) are left out. Stored as fp16.
        data: corpus directory with dictionaries, SentencePiece models, ``gcmvn.npz`` and ``config.yaml``.
        vocoder: checkpoint and ``config.json`` of a CodeHiFiGAN; only the generator is kept, as fp16.
        policy: the policy's defaults for this model.
        card: text of ``MODEL_CARD.md``.

    Raises:
        CheckpointError, ManifestError: a file is missing, or a dictionary does not fit the model.
    """
    import torch

    directory, data = Path(directory), Path(data)
    corpus = _yaml(data / "config.yaml") if (data / "config.yaml").exists() else {}
    source_dict, target_dict, unit_dict = (
        Vocabulary.load(data / FILES[name]) for name in ("source_dict", "target_dict", "unit_dict")
    )
    check_vocabulary(data / FILES["source_dict"], source_dict, config.asr_vocab_size, "asr_vocab_size")
    check_vocabulary(data / FILES["target_dict"], target_dict, config.mt_vocab_size, "mt_vocab_size")
    check_vocabulary(data / FILES["unit_dict"], unit_dict, config.num_units + NUM_SPECIALS, "num_units")
    cmvn = feature_extractor(config.features).cmvn or GlobalCMVN.load(data / FILES["cmvn"])

    directory.mkdir(parents=True, exist_ok=True)
    for name in ("source_spm", "target_spm", "source_dict", "target_dict", "unit_dict"):
        if not (data / FILES[name]).exists():
            raise ManifestError(f"{data / FILES[name]} does not exist; make it with scripts/prepare_corpus.py")
        shutil.copyfile(data / FILES[name], directory / FILES[name])
    cmvn.save(directory / FILES["cmvn"])
    weights = {name: _half(tensor) for name, tensor in state.items() if not name.startswith("vocoder.")}
    torch.save({"format": FORMAT, "model": weights}, directory / FILES["model"])
    if vocoder is not None:
        from echostream.models.decoders.vocoder_checkpoint import load_vocoder, save_vocoder

        voice = load_vocoder(*vocoder)
        save_vocoder(voice, directory / FILES["vocoder"], directory / FILES["vocoder_config"], half=True)
    values = {
        "format": FORMAT,
        "source_lang": corpus.get("source_lang", ""),
        "target_lang": corpus.get("target_lang", ""),
        "sample_rate": SAMPLE_RATE,
        "policy": dict(policy or {}),
        "files": FILES,
        "model": config.to_dict(),
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    if card:
        (directory / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return directory


def _half(tensor: torch.Tensor) -> torch.Tensor:
    # clone: a view would drag its whole storage into the file
    return (tensor.half() if tensor.is_floating_point() else tensor).clone().contiguous()


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a checkpoint directory?") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not key: value lines")
    return values


def _read_config(path: Path) -> dict[str, Any]:
    values = _yaml(path)
    if values.get("format") not in (FORMAT, EXPORTED_FORMAT):
        raise CheckpointError(
            f"{path} is of format {values.get('format')!r}; this EchoStream reads {FORMAT!r} and {EXPORTED_FORMAT!r}"
        )
    if not isinstance(values.get("model"), dict):
        raise CheckpointError(f"{path} lacks the section 'model'")
    return values


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"device {name!r} cannot be used ({reason}); 'cpu' always works") from None
    return device
