"""A loaded checkpoint directory: its weights in the torch model, or as exported graphs, and what belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echostream.audio.cmvn import GlobalCMVN
from echostream.checkpoint.layout import (
    DEFAULT_BUNDLE,
    EXPORTED_CONFIG,
    EXPORTED_FORMAT,
    FORMAT,
    GRAPHS,
    check_digests,
    check_subwords,
    check_vocabulary,
    config_path,
    files_of,
    read_config,
    sha256,
)
from echostream.config import EchoStreamConfig
from echostream.constants import NUM_MEL_BINS, NUM_SPECIALS
from echostream.errors import CheckpointError, ConfigError, require
from echostream.loading import inside, shown
from echostream.streaming.exported.model import GRAPHS_FOLDER, SPEECH_GRAPHS, TEXT_GRAPHS, ExportedModel
from echostream.streaming.exported.voice import ExportedVoice
from echostream.tensor_file import WEIGHTS, read_state
from echostream.text import Vocabulary
from echostream.weights import check_tensors, read_weights, with_weights

if TYPE_CHECKING:
    import torch

    from echostream.models.decoders.vocoder import CodeHiFiGAN
    from echostream.models.echostream_model import EchoStreamModel

MAX_STREAM_BYTES = 300_000_000  # of a stream's buffers and masks


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
    directory: str | Path = DEFAULT_BUNDLE, device: str = "cpu", backend: str | None = None, threads: int = 1
) -> Bundle:
    """Load a checkpoint directory, or one that ``echostream export`` made of it.

    Args:
        device: where torch keeps the model; exported graphs run on the CPU.
        backend: ``torch`` or ``onnx``. Default: torch for a checkpoint, which has no graphs; onnx for an exported
            directory, whose weights torch takes dequantised.
        threads: CPU threads that compute exported graphs; torch has one number for all of a process (``use_threads``).

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
    bins = config.input_feat_per_channel * config.input_channels
    if bins != NUM_MEL_BINS:
        raise ConfigError(
            f"{where}: model: input_feat_per_channel times input_channels is {bins}; features have {NUM_MEL_BINS} bins"
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


def use_threads(bundle: Bundle, count: int) -> None:
    """For programs, whose process is their own: where torch computes the bundle, it does so in ``count`` threads."""
    if not isinstance(bundle.model, ExportedModel):
        import torch

        torch.set_num_threads(count)


def _load_torch(
    directory: Path, values: dict[str, Any], config: EchoStreamConfig, paths: dict[str, Path], device: str,
    threads: int,
) -> tuple[EchoStreamModel, CodeHiFiGAN | None, str]:  # fmt: skip
    """Model, vocoder and digest of a checkpoint directory."""
    require("torch", "simuleval")
    weights = read_weights(paths["model"])
    found = weights.get("format") if isinstance(weights, Mapping) else type(weights).__name__
    if not isinstance(weights, Mapping) or found != FORMAT or "model" not in weights:
        raise CheckpointError(
            f"{paths['model']} is not an EchoStream model (format {shown(found)}, expected {FORMAT!r}); "
            "make one with echostream export-checkpoint"
        )
    state = check_tensors(weights["model"], str(paths["model"]))
    model = _torch_model(config, state, paths["model"], device)
    vocoder = None
    if paths["vocoder"].exists() or paths["vocoder_config"].exists():
        from echostream.models.decoders.vocoder_checkpoint import load_vocoder

        vocoder = load_vocoder(paths["vocoder"], paths["vocoder_config"], device).eval()
    return model, vocoder, sha256(paths["model"])


def _torch_model(
    config: EchoStreamConfig, state: Mapping[str, torch.Tensor], path: Path, device: str
) -> EchoStreamModel:
    """A model with these weights; ``path`` is where they come from."""

    from echostream.models.echostream_model import build_echostream_model, check_weights

    try:
        model = with_weights(
            lambda: build_echostream_model(config), state, lambda empty: check_weights(empty.state_dict(), state)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model.float().eval().to(_device(device))


def _load_dequantised(
    directory: Path, values: dict[str, Any], config: EchoStreamConfig, paths: dict[str, Path], device: str,
    threads: int,
) -> tuple[EchoStreamModel, CodeHiFiGAN | None, str]:  # fmt: skip
    """The same of an exported directory, by torch."""
    require("torch", "simuleval")
    _check_model_digest(directory, values)
    state = read_exported_state(directory)
    own = {name: tensor for name, tensor in state.items() if not name.startswith("vocoder.")}
    model = _torch_model(config, own, directory / WEIGHTS, device)
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
    threads: int,
) -> tuple[ExportedModel, ExportedVoice | None, str]:  # fmt: skip
    """The same of an exported directory."""
    from echostream.models.decoders.vocoder_config import VocoderConfig
    from echostream.streaming.exported.names import graph_names

    require("onnxruntime", "onnx")
    if device != "cpu":
        raise CheckpointError(f"exported graphs run on the CPU, not on {device!r}; leave the device out")
    voice = ExportedVoice(VocoderConfig.from_json(paths["vocoder_config"])) if values["vocoder"] else None
    _check_model_digest(directory, values)
    names = graph_names(config, voice.config if voice is not None else None)
    model = ExportedModel(directory, values["precision"], threads, values.get("parameters") or {}, names)
    return model, voice, values["digest"]


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"device {name!r} cannot be used ({reason}); 'cpu' always works") from None
    return device
