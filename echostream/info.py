"""``echostream info``: what a checkpoint holds, as plain values and as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from echostream.checkpoint import Bundle, load_bundle
from echostream.checkpoint.fairseq import read_fairseq_checkpoint
from echostream.config import EchoStreamConfig
from echostream.constants import ENCODER_FRAME_MS, FRAME_LENGTH, SAMPLE_RATE
from echostream.streaming.exported.model import ExportedModel

COMPONENTS = {
    "encoder": "encoder",
    "asr_head": "ASR CTC head",
    "st_decoder": "ST CTC head",
    "mt_decoder": "MT decoder",
    "unit_decoder": "unit decoder",
    "vocoder": "vocoder",
}
UNIT_INPUTS = {"encoder": "encoder frames", "mt": "MT states", "mt-tokens": "MT states and tokens"}


def describe(path: Path) -> dict[str, Any]:
    """Sections of plain values about a checkpoint directory, or about a checkpoint of fairseq-train.

    Raises:
        EchoStreamError: it cannot be loaded.
    """
    return _describe_file(path) if path.is_file() else _describe_directory(path)


def _describe_directory(path: Path) -> dict[str, Any]:
    from echostream.streaming.session import StreamingSession

    bundle = load_bundle(path)
    if isinstance(bundle.model, ExportedModel):
        backend, parameters = f"onnx, {bundle.model.precision}", bundle.model.parameters
    else:
        backend, parameters = "torch", count_parameters(bundle)
    session = StreamingSession(bundle, segmenter="none")  # the bundle's own may need packages that are not here
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    files = {str(file.relative_to(path)): file.stat().st_size for file in found}
    return {
        "checkpoint": str(path),
        "backend": backend,
        "languages": {"source": bundle.source_lang, "target": bundle.target_lang},
        "parameters": {**parameters, "in all": sum(parameters.values())},
        "vocabularies": {
            "source subwords": len(bundle.source_dict),
            "target subwords": len(bundle.target_dict),
            "units": bundle.unit_count,
        },
        "look-ahead (ms)": _lookahead(bundle.config, bundle.vocoder),
        "streaming": {
            "policy": repr(session.engine.policy),
            "segmenter": bundle.policy.get("segmenter", "punctuation"),
            "chunk (ms)": session.settings.chunk_ms,
            "longest sentence (s)": session.engine.max_frames * ENCODER_FRAME_MS / 1000,
            "unit decoder reads": UNIT_INPUTS[bundle.config.unit_decoder_input],
            "state of a stream (bytes)": session.nbytes,
        },
        "files (bytes)": {**files, "in all": sum(files.values())},
        "configuration": bundle.config.to_dict(),
        "sha256 of the model": bundle.digest,
    }


def count_parameters(bundle: Bundle) -> dict[str, int]:
    """Parameters of a torch bundle's components."""
    modules = {name: getattr(bundle.model, name) for name in COMPONENTS if name != "vocoder"}
    if bundle.vocoder is not None:
        modules["vocoder"] = bundle.vocoder
    return {COMPONENTS[name]: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def _describe_file(path: Path) -> dict[str, Any]:
    state, config = read_fairseq_checkpoint(path)
    parameters: dict[str, int] = {}
    for name, tensor in state.items():
        part = name.split(".")[0]
        parameters[COMPONENTS.get(part, part)] = parameters.get(COMPONENTS.get(part, part), 0) + tensor.numel()
    described = {
        "checkpoint": str(path),
        "parameters": {**parameters, "in all": sum(parameters.values())},
        "files (bytes)": {path.name: path.stat().st_size},
    }
    if config is not None:
        described["vocabularies"] = {
            "source subwords": config.asr_vocab_size, "target subwords": config.mt_vocab_size, "units": config.num_units
        }  # fmt: skip
        described["look-ahead (ms)"] = _lookahead(config, None)
        described["configuration"] = config.to_dict()
    return described


def _lookahead(config: EchoStreamConfig, vocoder: Any) -> dict[str, float]:
    """How long each part waits for what comes after, at worst."""
    ahead = {
        "features (window)": 1000 * FRAME_LENGTH / SAMPLE_RATE,
        "encoder segment": config.segment_length * ENCODER_FRAME_MS,
        "encoder right context": config.right_context_length * ENCODER_FRAME_MS,
    }
    if vocoder is not None:
        ahead["vocoder (of its output)"] = vocoder.lookahead_ms
    return ahead


def show(described: dict[str, Any]) -> str:
    """The sections as aligned text."""
    lines = []
    for title, section in described.items():
        if not isinstance(section, dict):
            lines.append(f"{title}: {section}")
            continue
        lines += ["", title]
        width = max(map(len, section), default=0)
        for name, value in section.items():
            lines.append(f"  {name:<{width}}  {_text(value)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value if isinstance(value, str) else json.dumps(value)
    return f"{value:>14,}" if isinstance(value, int) else f"{value:>14,.1f}"
