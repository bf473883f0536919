"""``echostream export``: a checkpoint directory in the form in which models are shipped.

config.json          the configuration, the policy's defaults, digests
model.safetensors    every weight once (``tensor_file``)
onnx/<name>.onnx     graphs without weights (``weights``)
README.md            the model card
spm.*.model, dict.*.txt, gcmvn.npz, vocoder.json, and kmeans.npz where the checkpoint has it
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from echostream.checkpoint import Bundle, load_bundle
from echostream.checkpoint.layout import (
    CONFIG,
    COPIED,
    EXPORTED_CARD,
    EXPORTED_CONFIG,
    EXPORTED_FORMAT,
    FILES,
    card_of,
    files_of,
    read_config,
    sha256,
)
from echostream.errors import CheckpointError
from echostream.export.check import TOLERANCE, compare
from echostream.export.graphs import make_graph
from echostream.export.voice import check_voice, voice_frames_graph, voice_units_graph
from echostream.export.weights import weights_of, write_graphs
from echostream.files import replacing_directory, write_json, write_text
from echostream.info import count_parameters
from echostream.models.decoders.vocoder import CodeHiFiGAN
from echostream.models.echostream_model import EchoStreamModel
from echostream.models.graphs import model_graphs
from echostream.streaming.exported.model import GRAPHS_FOLDER
from echostream.tensor_file import WEIGHTS

_SETTINGS = (*COPIED, "kmeans", "vocoder_config")
_NEW = ("format", "files", "digests", "digest", "model", "precision", "vocoder", "exported_from", "parameters")


def export_directory(
    checkpoint: str | Path, directory: str | Path, int8: bool = False, vocoder: bool = True
) -> tuple[Path, dict[str, float]]:
    """Write a checkpoint directory's weights and graphs, and all that a session needs besides them.

    The single-precision graphs are compared with the torch model first, whatever is written then.

    Args:
        checkpoint: a directory that ``load_bundle`` reads.
        int8: weights of the encoder and the decoders as int8, the vocoder's in half precision: the rounding of int8
            would be heard. Computing goes on in single precision.
        vocoder: without, the export writes text and units.

    Returns:
        The directory, and the largest difference from torch of each stage in single precision.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its graphs compute something else.
        ConfigError: the vocoder is of a kind that cannot be exported.
        MissingExtraError: torch or onnx is not installed.
        OutputError: the directory cannot be written; what was there is as before.
    """
    checkpoint, directory = Path(checkpoint), Path(directory)
    if checkpoint.is_file():
        raise CheckpointError(
            f"{checkpoint} is a file; make a checkpoint directory of it first, with echostream export-checkpoint"
        )
    if directory.exists() and checkpoint.resolve() == directory.resolve():
        raise CheckpointError(f"{directory} is the checkpoint itself; export it to another directory")
    if (directory / FILES["model"]).exists():
        raise CheckpointError(f"{directory} is a checkpoint, which would be lost; export to another directory")
    if (directory / CONFIG).exists():
        raise CheckpointError(f"{directory} holds a {CONFIG} of something else; export to another directory")
    bundle = load_bundle(checkpoint, backend="torch")
    voice = vocoder and bundle.vocoder is not None
    if voice:
        check_voice(bundle.vocoder)
    graphs = make_graphs(bundle.model, bundle.vocoder if voice else None)
    with tempfile.TemporaryDirectory() as scratch:
        _write(bundle, Path(scratch), graphs, False, voice)
        differences = compare(bundle, load_bundle(scratch))
    for stage, value in differences.items():
        if value > TOLERANCE:
            raise CheckpointError(
                f"the exported {stage} differs from torch by {value:.1e} (at most {TOLERANCE:.0e} is allowed), so "
                "nothing was written; this is a defect of EchoStream's export, please report it"
            )
    with replacing_directory(directory, owned, EXPORTED_CONFIG) as new:
        _write(bundle, new, graphs, int8, voice)
    return directory, differences


def make_graphs(model: EchoStreamModel, vocoder: CodeHiFiGAN | None) -> dict[str, Any]:
    """Each graph of a model, and of its vocoder, in single precision, by name."""
    progress = tqdm(model_graphs(model).items(), desc="graphs", unit="graph", leave=False, disable=None)
    graphs = {name: make_graph(step) for name, step in progress}
    return graphs if vocoder is None else graphs | make_voice_graphs(vocoder)


def make_voice_graphs(vocoder: CodeHiFiGAN) -> dict[str, Any]:
    """The same of a vocoder alone."""
    return {
        "voice_units": voice_units_graph(vocoder).model(),
        "voice_frames": voice_frames_graph(vocoder).model(),
    }


def owned(name: str) -> bool:
    """Does this file belong to an export, and goes when another takes its place?"""
    files = EXPORTED_CONFIG, EXPORTED_CARD, WEIGHTS, GRAPHS_FOLDER
    return name in files or name in (FILES[n] for n in _SETTINGS)


def _write(bundle: Bundle, directory: Path, graphs: Mapping[str, Any], int8: bool, voice: bool) -> None:
    digest = write_graphs(directory, graphs, weights_of(bundle.model, bundle.vocoder if voice else None), int8)
    source = read_config(bundle.directory)
    files = files_of(bundle.directory, source)
    optional = [name for name, wanted in (("kmeans", files["kmeans"].exists()), ("vocoder_config", voice)) if wanted]
    for name in (*COPIED, *optional):
        shutil.copyfile(files[name], directory / FILES[name])
    others = (file for file in sorted(directory.iterdir()) if file.is_file() and file.name != WEIGHTS)
    digests = {file.name: sha256(file) for file in others}
    values = {
        "model_type": "echostream",
        **{key: value for key, value in source.items() if key not in _NEW},
        "format": EXPORTED_FORMAT,
        "precision": "int8" if int8 else "fp32",
        "vocoder": voice,
        "digest": digest,
        "digests": digests,
        "exported_from": bundle.digest,
        "parameters": {part: n for part, n in count_parameters(bundle).items() if voice or part != "vocoder"},
        "model": bundle.config.to_dict(),
    }
    write_text(directory / EXPORTED_CARD, _card(bundle, voice))
    write_json(directory / EXPORTED_CONFIG, values)


def _card(bundle: Bundle, voice: bool) -> str:
    """The checkpoint's model card, or a short one, behind the header that the Hugging Face hub reads."""
    card = card_of(bundle.directory)
    if card.startswith("---\n"):
        return card
    languages = [language for language in (bundle.source_lang, bundle.target_lang) if language]
    header = ["---", "library_name: echostream", f"pipeline_tag: {'audio-to-audio' if voice else 'translation'}"]
    if languages:
        header += ["language:", *(f"- {language}" for language in languages)]
    header += ["tags:", "- simultaneous-translation", "- speech-translation", "---", "", ""]
    if not card:
        kind = "speech and text" if voice else "text"
        card = (
            f"# EchoStream {'-'.join(languages) or 'model'}\n\nTranslates speech to {kind} while it is spoken.\n\n"
            "    import echostream\n\n"
            '    bundle = echostream.from_pretrained("this directory, or its name on the hub")\n'
            '    print(echostream.Session(bundle).translate("talk.wav").text)\n'
        )
    return "\n".join(header) + card
