"""Tiny Whisper models of random weights, written in each layout that published ones come in."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from echostream.whisper.weights import WhisperDims, parameter_shapes

DIMS = WhisperDims(n_mels=8, n_audio_ctx=20, n_audio_state=16, n_audio_head=2, n_audio_layer=2, n_vocab=30,
                   n_text_ctx=12, n_text_state=16, n_text_head=2, n_text_layer=3)  # fmt: skip
HEADS = [[1, 0], [2, 1]]
TYPES = {"float32": 0, "int8": 1, "int16": 2, "float16": 4, "bfloat16": 5}


def random_parameters(dims: WhisperDims = DIMS, seed: int = 0) -> dict[str, np.ndarray]:
    """Values that float16 and bfloat16 hold exactly, so that every layout gives the same ones back."""
    rng = np.random.default_rng(seed)
    return {name: (rng.integers(-127, 128, shape) / 128).astype(np.float32) for name, shape in parameter_shapes(dims)}


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def ctranslate2_variables(parameters: dict[str, np.ndarray], dims: WhisperDims = DIMS) -> dict[str, np.ndarray]:
    """CTranslate2's names: norms as gamma and beta, projections that read the same input in one matrix."""
    out: dict[str, np.ndarray] = {
        "encoder/num_heads": np.int16(dims.n_audio_head), "decoder/num_heads": np.int16(dims.n_text_head),
        "decoder/alignment_layer": np.int16(-1),
        "encoder/position_encodings/encodings": parameters["encoder.positional_embedding"],
        "decoder/position_encodings/encodings": parameters["decoder.positional_embedding"],
        "decoder/embeddings/weight": parameters["decoder.token_embedding.weight"],
    }  # fmt: skip

    def norm(key: str, name: str) -> None:
        out[f"{key}/gamma"], out[f"{key}/beta"] = parameters[f"{name}.weight"], parameters[f"{name}.bias"]

    def linear(key: str, *names: str) -> None:
        weights = [parameters[f"{name}.weight"] for name in names]
        biases = [parameters.get(f"{name}.bias", np.zeros(len(w), np.float32)) for name, w in zip(names, weights)]
        out[f"{key}/weight"], out[f"{key}/bias"] = np.concatenate(weights), np.concatenate(biases)

    linear("encoder/conv1", "encoder.conv1")
    linear("encoder/conv2", "encoder.conv2")
    norm("encoder/layer_norm", "encoder.ln_post")
    norm("decoder/layer_norm", "decoder.ln")
    for side, layers in (("encoder", dims.n_audio_layer), ("decoder", dims.n_text_layer)):
        for i in range(layers):
            key, name = f"{side}/layer_{i}", f"{side}.blocks.{i}"
            norm(f"{key}/self_attention/layer_norm", f"{name}.attn_ln")
            linear(f"{key}/self_attention/linear_0", *(f"{name}.attn.{part}" for part in ("query", "key", "value")))
            linear(f"{key}/self_attention/linear_1", f"{name}.attn.out")
            norm(f"{key}/ffn/layer_norm", f"{name}.mlp_ln")
            linear(f"{key}/ffn/linear_0", f"{name}.mlp.0")
            linear(f"{key}/ffn/linear_1", f"{name}.mlp.2")
            if side == "decoder":
                norm(f"{key}/attention/layer_norm", f"{name}.cross_attn_ln")
                linear(f"{key}/attention/linear_0", f"{name}.cross_attn.query")
                linear(f"{key}/attention/linear_1", f"{name}.cross_attn.key", f"{name}.cross_attn.value")
                linear(f"{key}/attention/linear_2", f"{name}.cross_attn.out")
    return out


def write_ctranslate2(
    directory: Path, variables: dict[str, np.ndarray], kind: str = "float32", version: int = 6,
    name: str = "WhisperSpec",
) -> Path:  # fmt: skip
    """``model.bin`` as CTranslate2's converters write it; int8 with a scale a row, int16 with one in all."""
    directory.mkdir(parents=True, exist_ok=True)

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    stored: list[tuple[str, np.ndarray, str]] = []
    for key, value in variables.items():
        value = np.asarray(value)
        if value.ndim == 0:
            stored.append((key, value, value.dtype.name))
        elif kind in ("int8", "int16") and key.endswith("weight"):
            rows = np.abs(value).reshape(len(value), -1).max(axis=1)
            scale = 127.0 / rows if kind == "int8" else np.float32(1024.0 / np.abs(value).max())
            spread = scale.reshape(-1, *(1,) * (value.ndim - 1))
            stored.append((key, np.rint(value * spread).astype(kind), kind))
            stored.append((f"{key}_scale", scale.astype(np.float32), "float32"))
        elif kind == "bfloat16":
            stored.append((key, to_bfloat16(value), "bfloat16"))
        else:
            dtype = kind if kind == "float16" else "float32"
            stored.append((key, value.astype(dtype), dtype))
    data = struct.pack("<I", version) + text(name) + struct.pack("<II", 3, len(stored))
    for key, value, dtype in stored:
        data += text(key) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        data += struct.pack("<BI", TYPES[dtype], value.nbytes) + value.tobytes()
    aliases = {"decoder/projection/weight": "decoder/embeddings/weight"}
    data += struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases.items())
    (directory / "model.bin").write_bytes(data)
    (directory / "config.json").write_text(json.dumps({"alignment_heads": HEADS, "lang_ids": [1, 2]}))
    return directory


def huggingface_tensors(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's names."""
    renames = [
        (".blocks.", ".layers."),
        (".cross_attn_ln.", ".encoder_attn_layer_norm."),
        (".attn_ln.", ".self_attn_layer_norm."),
        (".mlp_ln.", ".final_layer_norm."),
        (".cross_attn.", ".encoder_attn."),
        (".attn.", ".self_attn."),
        (".query.", ".q_proj."),
        (".key.", ".k_proj."),
        (".value.", ".v_proj."),
        (".out.", ".out_proj."),
        (".mlp.0.", ".fc1."),
        (".mlp.2.", ".fc2."),
        (".ln_post.", ".layer_norm."),
        ("decoder.ln.", "decoder.layer_norm."),
        ("positional_embedding", "embed_positions.weight"),
        ("token_embedding", "embed_tokens"),
    ]
    out = {}
    for name, value in parameters.items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        out[f"model.{name}"] = value
    return out


def safetensors(tensors: dict[str, np.ndarray], kind: str = "F32") -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for key, value in tensors.items():
        raw = to_bfloat16(value) if kind == "BF16" else value.astype({"F32": "<f4", "F16": "<f2"}[kind])
        header[key] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [len(data), len(data) + raw.nbytes]}
        data += raw.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_huggingface(
    directory: Path, tensors: dict[str, np.ndarray], kind: str = "F32", shards: int = 1, dims: WhisperDims = DIMS
) -> Path:
    """``config.json``, ``generation_config.json`` and ``model.safetensors``, or shards with their index."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "whisper", "num_mel_bins": dims.n_mels, "max_source_positions": dims.n_audio_ctx,
        "d_model": dims.n_audio_state, "encoder_attention_heads": dims.n_audio_head,
        "encoder_layers": dims.n_audio_layer,
        "vocab_size": dims.n_vocab, "max_target_positions": dims.n_text_ctx, "decoder_layers": dims.n_text_layer,
        "decoder_attention_heads": dims.n_text_head,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"alignment_heads": HEADS}))
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors(tensors, kind))
        return directory
    places = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        (directory / name).write_bytes(safetensors(part, kind))
        places.update(dict.fromkeys(part, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def write_openai(path: Path, parameters: dict[str, np.ndarray], dims: WhisperDims = DIMS, half: bool = True) -> Path:
    """OpenAI's ``.pt``."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: torch.from_numpy(value.copy()) for name, value in parameters.items()}
    if half:
        state = {name: value.half() for name, value in state.items()}
    torch.save({"dims": dict(vars(dims)), "model_state_dict": state}, path)
    return path
