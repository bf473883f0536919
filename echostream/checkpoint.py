"""Checkpoint directories: everything a trained model needs, in one place and without anybody's paths.

A directory (a *bundle*) holds ``config.yaml``, ``model.pt`` (fp16 weights), the dictionaries and SentencePiece models,
``gcmvn.npz`` and, if it speaks, ``vocoder.pt`` with ``vocoder.json``. All weights are read with ``weights_only=True``.

``echostream export`` makes of it the form that is shipped (``export.directory``): ``config.json``,
``model.safetensors`` with every weight once, and graphs in ``onnx/``. It runs without torch, and with torch, too.
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
from echostream.errors import CheckpointError, ConfigError, ManifestError, require
from echostream.files import replacing_directory, write_text
from echostream.loading import (
    MAX_SETTINGS,
    Rule,
    check,
    inside,
    pieces_of,
    read_json,
    read_subwords,
    read_text,
    read_yaml,
    shown,
)
from echostream.streaming.exported.model import GRAPHS_FOLDER, SPEECH_GRAPHS, TEXT_GRAPHS, VOICE_GRAPHS
from echostream.tensor_file import WEIGHTS, read_state
from echostream.text import Vocabulary
from echostream.weights import check_tensors, read_weights, uninitialised

if TYPE_CHECKING:
    import torch

    from echostream.models.decoders.vocoder import CodeHiFiGAN
    from echostream.models.echostream_model import EchoStreamModel
    from echostream.streaming.exported.model import ExportedModel, ExportedVoice

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
MAX_STREAM_BYTES = 300_000_000  # of a stream's buffers and masks
_SHA256, _LANGUAGE = Rule(str, 64, 64), Rule(str, 0, 35)
_RULES = {
    "source_lang": _LANGUAGE, "target_lang": _LANGUAGE, "sample_rate": Rule(int, choices=(SAMPLE_RATE,)),
    "policy": Rule(dict), "files": Rule(dict, of=Rule(str, 1, 255)), "digests": Rule(dict, of=_SHA256),
    "model": Rule(dict, needed=True),
}  # fmt: skip
_EXPORTED_RULES = {
    **_RULES, "model_type": Rule(str, choices=("echostream",)),
    "precision": Rule(str, choices=("fp32", "int8"), needed=True), "vocoder": Rule(bool, needed=True),
    "digest": Rule(str, 64, 64, needed=True), "exported_from": _SHA256, "parameters": Rule(dict, of=Rule(int, 0)),
}  # fmt: skip
COPIED = ("source_spm", "target_spm", "source_dict", "target_dict", "unit_dict", "cmvn")  # from the corpus as they are
_ASSETS = Path(__file__).parent / "assets"
# The shipped model: exported, which needs no torch, where that is there; else the checkpoint.
DEFAULT_BUNDLE = _ASSETS / ("es-en-int8" if (_ASSETS / "es-en-int8").is_dir() else "es-en")


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
        digest: sha256 of ``model.pt`` (of ``model.safetensors`` and all graphs), hexadecimal: names the weights a saved
            session belongs to.
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
        backend: ``torch`` or ``onnx``. Default: torch for a checkpoint, which has no graphs; onnx for an exported
            directory, whose weights torch takes dequantised.
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
    values = read_config(directory)
    exported = values["format"] == EXPORTED_FORMAT
    if backend == "onnx" and not exported:
        raise CheckpointError(f"{directory} holds a torch model; first: echostream export {directory} -o DIRECTORY")
    where = config_path(directory)
    try:
        config = EchoStreamConfig.from_dict(values["model"])
    except ConfigError as error:
        raise ConfigError(f"{where}: model: {error}") from None
    size = config.stream_bytes
    if size > MAX_STREAM_BYTES:
        raise ConfigError(
            f"{where}: model: a stream of this model would take {size / 1e6:,.0f} MB, at most "
            f"{MAX_STREAM_BYTES / 1e6:.0f} are allowed; lower max_sentence_frames, max_target_tokens or the contexts"
        )
    paths = files_of(directory, values)

    source_dict, target_dict, unit_dict = (
        Vocabulary.load(paths[name]) for name in ("source_dict", "target_dict", "unit_dict")
    )
    check_vocabulary(paths["source_dict"], source_dict, config.asr_vocab_size, "asr_vocab_size")
    check_vocabulary(paths["target_dict"], target_dict, config.st_vocab_size, "st_vocab_size")
    check_vocabulary(paths["target_dict"], target_dict, config.mt_vocab_size, "mt_vocab_size")
    check_vocabulary(paths["unit_dict"], unit_dict, config.num_units + NUM_SPECIALS, "num_units (4 specials more)")
    check_subwords(paths["source_spm"], paths["source_dict"], source_dict)
    check_subwords(paths["target_spm"], paths["target_dict"], target_dict)
    cmvn = GlobalCMVN.load(paths["cmvn"])
    load = _load_torch if not exported else _load_dequantised if backend == "torch" else _load_exported
    model, vocoder, digest = load(directory, values, config, paths, device, threads)
    if vocoder is not None and vocoder.config.num_embeddings < config.num_units:
        raise CheckpointError(
            f"{paths['vocoder_config']}: num_embeddings is {vocoder.config.num_embeddings}, but the model has "
            f"{config.num_units} units; take the vocoder that was trained on the same units"
        )
    check_digests(directory, values.get("digests") or {})
    return Bundle(
        directory=directory,
        config=config,
        model=model,
        source_dict=source_dict,
        target_dict=target_dict,
        unit_count=config.num_units,
        cmvn=cmvn,
        vocoder=vocoder,
        policy=values.get("policy") or {},
        source_lang=values.get("source_lang") or "",
        target_lang=values.get("target_lang") or "",
        digest=digest,
    )


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


def _load_torch(
    directory: Path, values: dict[str, Any], config: EchoStreamConfig, paths: dict[str, Path], device: str,
    threads: int | None,
) -> tuple[EchoStreamModel, CodeHiFiGAN | None, str]:  # fmt: skip
    """Model, vocoder and digest of a checkpoint directory."""
    require("torch", "simuleval")
    weights = read_weights(paths["model"])
    found = weights.get("format") if isinstance(weights, Mapping) else type(weights).__name__
    if not isinstance(weights, Mapping) or found != FORMAT or "model" not in weights:
        raise CheckpointError(
            f"{paths['model']} is not an EchoStream model (format {shown(found)}, expected {FORMAT!r}); "
            "make one with scripts/export_checkpoint.py"
        )
    state = check_tensors(weights["model"], str(paths["model"]))
    model = _torch_model(config, state, paths["model"], device, threads)
    vocoder = None
    if paths["vocoder"].exists() or paths["vocoder_config"].exists():
        from echostream.models.decoders.vocoder_checkpoint import load_vocoder

        vocoder = load_vocoder(paths["vocoder"], paths["vocoder_config"], device).eval()
    return model, vocoder, sha256(paths["model"])


def _torch_model(
    config: EchoStreamConfig, state: Mapping[str, torch.Tensor], path: Path, device: str, threads: int | None
) -> EchoStreamModel:
    """A model with these weights; ``path`` is where they come from."""
    import torch

    from echostream.models.echostream_model import build_echostream_model, check_weights

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with uninitialised(shapes_only=True):  # a configuration of another size than the weights stops here
            check_weights(build_echostream_model(config).state_dict(), state)
        with uninitialised():
            model = build_echostream_model(config)
        model.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model.float().eval().to(_device(device))


def _load_dequantised(
    directory: Path, values: dict[str, Any], config: EchoStreamConfig, paths: dict[str, Path], device: str,
    threads: int | None,
) -> tuple[EchoStreamModel, CodeHiFiGAN | None, str]:  # fmt: skip
    """The same of an exported directory, by torch."""
    require("torch", "simuleval")
    _check_model_digest(directory, values)
    state = read_exported_state(directory)
    own = {name: tensor for name, tensor in state.items() if not name.startswith("vocoder.")}
    model = _torch_model(config, own, directory / WEIGHTS, device, threads)
    vocoder = None
    if values["vocoder"]:
        from echostream.models.decoders.vocoder_checkpoint import vocoder_of
        from echostream.models.decoders.vocoder_config import VocoderConfig

        voice = {name.removeprefix("vocoder."): t for name, t in state.items() if name.startswith("vocoder.")}
        shape = VocoderConfig.from_json(paths["vocoder_config"])
        vocoder = vocoder_of(shape, voice, str(directory / WEIGHTS), str(paths["vocoder_config"]), device)
    return model, vocoder, values["digest"]


def read_exported_state(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of an exported directory as torch tensors, in single precision; the vocoder's as ``vocoder.*``.

    Raises:
        CheckpointError: they are missing or cannot be used.
    """
    import torch

    state = read_state(inside(directory, WEIGHTS, "weights", CheckpointError))
    return {name: torch.from_numpy(array) for name, array in state.items()}


def _check_model_digest(directory: Path, values: Mapping[str, Any]) -> None:
    """Raises CheckpointError: weights or graphs are not those that the configuration names."""
    graphs = GRAPHS if values["vocoder"] else (*TEXT_GRAPHS, *SPEECH_GRAPHS)
    names = (WEIGHTS, *(f"{GRAPHS_FOLDER}/{name}.onnx" for name in graphs))
    if sha256(*(inside(directory, name, "exported model", CheckpointError) for name in names)) != values["digest"]:
        raise CheckpointError(
            f"weights and graphs in {directory} are not those that its {EXPORTED_CONFIG} names (digest); export the "
            "checkpoint again"
        )


def _load_exported(
    directory: Path, values: dict[str, Any], config: EchoStreamConfig, paths: dict[str, Path], device: str,
    threads: int | None,
) -> tuple[ExportedModel, ExportedVoice | None, str]:  # fmt: skip
    """The same of an exported directory."""
    from echostream.models.decoders.vocoder_config import VocoderConfig
    from echostream.streaming.exported.model import ExportedModel, ExportedVoice
    from echostream.streaming.exported.names import graph_names

    require("onnxruntime", "onnx")
    if device != "cpu":
        raise CheckpointError(f"exported graphs run on the CPU, not on {device!r}; leave the device out")
    voice = ExportedVoice(VocoderConfig.from_json(paths["vocoder_config"])) if values["vocoder"] else None
    _check_model_digest(directory, values)
    names = graph_names(config, voice.config if voice is not None else None)
    model = ExportedModel(directory, values["precision"], threads or 1, values.get("parameters") or {}, names)
    return model, voice, values["digest"]


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


def read_fairseq_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], EchoStreamConfig | None]:
    """Weights and, where the file tells it, configuration of a checkpoint written by fairseq-train; or those of an
    exported directory, dequantised.

    Raises:
        CheckpointError: see ``read_weights`` and ``read_state``; or the file holds no ``model``.
    """
    if Path(path).is_dir():
        values = read_config(Path(path))
        if values["format"] == EXPORTED_FORMAT:
            return read_exported_state(Path(path)), EchoStreamConfig.from_dict(values["model"])
        path = files_of(Path(path), values)["model"]
    checkpoint = read_weights(path)
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("model"), Mapping):
        raise CheckpointError(f"{path} is not a fairseq checkpoint: it has no 'model'")
    tree = checkpoint.get("cfg")
    arguments = (tree.get("model") if isinstance(tree, Mapping) else None) or checkpoint.get("args")
    if isinstance(arguments, Mapping):
        arguments = argparse.Namespace(**{str(name): value for name, value in arguments.items()})
    try:
        config = EchoStreamConfig.from_args(arguments) if arguments is not None else None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return check_tensors(checkpoint["model"], str(path)), config


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
        data: corpus directory with dictionaries, SentencePiece models, ``gcmvn.npz`` and ``config.yaml``; its
            k-means goes along.
        vocoder: checkpoint and ``config.json`` of a CodeHiFiGAN; only the generator is kept, as fp16.
        policy: the policy's defaults for this model.
        card: text of ``MODEL_CARD.md``.

    Raises:
        CheckpointError, ManifestError: a file is missing, or a dictionary does not fit the model.
        OutputError: the directory cannot be written; what was there is as before.
    """
    import torch

    directory, data = Path(directory), Path(data)
    corpus = read_yaml(data / CONFIG, "configuration", CheckpointError) if (data / CONFIG).exists() else {}
    check(corpus, {"source_lang": _LANGUAGE, "target_lang": _LANGUAGE}, str(data / CONFIG), CheckpointError)
    source_dict, target_dict, unit_dict = (
        Vocabulary.load(data / FILES[name]) for name in ("source_dict", "target_dict", "unit_dict")
    )
    check_vocabulary(data / FILES["source_dict"], source_dict, config.asr_vocab_size, "asr_vocab_size")
    check_vocabulary(data / FILES["target_dict"], target_dict, config.mt_vocab_size, "mt_vocab_size")
    check_vocabulary(data / FILES["unit_dict"], unit_dict, config.num_units + NUM_SPECIALS, "num_units")
    cmvn = feature_extractor(config.features).cmvn or GlobalCMVN.load(data / FILES["cmvn"])
    for name, vocabulary in (("source", source_dict), ("target", target_dict)):
        model, dictionary = data / FILES[f"{name}_spm"], data / FILES[f"{name}_dict"]
        if not model.exists():
            raise ManifestError(f"{model} does not exist; make it with scripts/prepare_corpus.py")
        check_subwords(model, dictionary, vocabulary)

    voice = None
    if vocoder is not None:
        from echostream.models.decoders.vocoder_checkpoint import load_vocoder, save_vocoder

        voice = load_vocoder(*vocoder)
    weights = {name: _half(tensor) for name, tensor in state.items() if not name.startswith("vocoder.")}
    with replacing_directory(directory, lambda name: name in (CONFIG, CARD, *FILES.values())) as new:
        for name in COPIED:
            if name != "cmvn":
                shutil.copyfile(data / FILES[name], new / FILES[name])
        cmvn.save(new / FILES["cmvn"])
        torch.save({"format": FORMAT, "model": weights}, new / FILES["model"])
        if (data / "units" / FILES["kmeans"]).is_file():
            shutil.copyfile(data / "units" / FILES["kmeans"], new / FILES["kmeans"])
        if voice is not None:
            save_vocoder(voice, new / FILES["vocoder"], new / FILES["vocoder_config"], half=True)
        values = {
            "format": FORMAT,
            "source_lang": corpus.get("source_lang") or "",
            "target_lang": corpus.get("target_lang") or "",
            "sample_rate": SAMPLE_RATE,
            "policy": dict(policy or {}),
            "files": FILES,
            "digests": {file.name: sha256(file) for file in sorted(new.iterdir())},
            "model": config.to_dict(),
        }
        write_text(new / CONFIG, yaml.safe_dump(values, sort_keys=False))
        if card:
            write_text(new / CARD, card)
    return directory


def _half(tensor: torch.Tensor) -> torch.Tensor:
    # clone: a view would drag its whole storage into the file
    return (tensor.half() if tensor.is_floating_point() else tensor).clone().contiguous()


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"device {name!r} cannot be used ({reason}); 'cpu' always works") from None
    return device
