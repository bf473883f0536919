"""``echostream export``: a checkpoint directory as graphs, in a directory of its own that needs no other file."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any, Mapping

import yaml
from tqdm import tqdm

from echostream.checkpoint import (
    CARD,
    CONFIG,
    COPIED,
    EXPORTED_FORMAT,
    FILES,
    Bundle,
    files_of,
    load_bundle,
    read_config,
    sha256,
)
from echostream.errors import CheckpointError
from echostream.export.check import TOLERANCE, compare
from echostream.export.graphs import in_int8, make_graph
from echostream.export.voice import check_voice, voice_frames_graph, voice_units_graph
from echostream.files import replacing_directory, write_text
from echostream.info import count_parameters
from echostream.loading import inside
from echostream.models.decoders.vocoder import CodeHiFiGAN
from echostream.models.echostream_model import EchoStreamModel
from echostream.models.graphs import model_graphs
from echostream.streaming.exported.model import VOICE_GRAPHS

_SETTINGS = (*COPIED, "vocoder_config")


def export_directory(
    checkpoint: str | Path, directory: str | Path, int8: bool = False, vocoder: bool = True
) -> tuple[Path, dict[str, float]]:
    """Write a checkpoint directory's graphs, and all that a session needs besides them.

    The single-precision graphs are compared with the torch model first, whatever is written then.

    Args:
        checkpoint: a directory that ``load_bundle`` reads.
        int8: weights of the encoder and the decoders as int8. The vocoder stays in single precision: its rounding
            would be heard.
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
            f"{checkpoint} is a file; make a checkpoint directory of it first, with scripts/export_checkpoint.py"
        )
    if directory.exists() and checkpoint.resolve() == directory.resolve():
        raise CheckpointError(f"{directory} is the checkpoint itself; export it to another directory")
    if (directory / FILES["model"]).exists():
        raise CheckpointError(f"{directory} is a checkpoint, which would be lost; export to another directory")
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
    with replacing_directory(directory, owned) as new:
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


def write_graphs(directory: Path, graphs: Mapping[str, Any], int8: bool) -> str:
    """Write each graph to ``<name>.onnx``, in int8 if that is wanted and it is not of the vocoder; returns the sha256
    of all of them, hexadecimal."""
    digest = hashlib.sha256()
    for name, graph in graphs.items():
        graph = in_int8(graph) if int8 and name not in VOICE_GRAPHS else graph
        content = graph.SerializeToString(deterministic=True)
        (directory / f"{name}.onnx").write_bytes(content)
        digest.update(content)
    return digest.hexdigest()


def owned(name: str) -> bool:
    """Does this file belong to an export, and goes when another takes its place?"""
    return name.endswith(".onnx") or name in (CONFIG, CARD, *(FILES[n] for n in _SETTINGS))


def _write(bundle: Bundle, directory: Path, graphs: Mapping[str, Any], int8: bool, voice: bool) -> None:
    digest = write_graphs(directory, graphs, int8)
    source = read_config(bundle.directory)
    files = files_of(bundle.directory, source)
    for name in (*COPIED, *(("vocoder_config",) if voice else ())):
        shutil.copyfile(files[name], directory / FILES[name])
    digests = {file.name: sha256(file) for file in sorted(directory.iterdir()) if file.suffix != ".onnx"}
    if (bundle.directory / CARD).exists():
        card = inside(bundle.directory, CARD, "model card", CheckpointError)
        shutil.copyfile(card, directory / CARD)
    values = {
        **{key: value for key, value in source.items() if key not in ("format", "files", "digests", "model")},
        "format": EXPORTED_FORMAT,
        "precision": "int8" if int8 else "fp32",
        "vocoder": voice,
        "digest": digest,
        "digests": digests,
        "exported_from": bundle.digest,
        "parameters": {part: n for part, n in count_parameters(bundle).items() if voice or part != "vocoder"},
        "model": bundle.config.to_dict(),
    }
    write_text(directory / CONFIG, yaml.safe_dump(values, sort_keys=False))
