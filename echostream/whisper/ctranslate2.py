"""Whisper as CTranslate2 stores it."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from echostream.errors import CheckpointError
from echostream.whisper.layouts import MAX_RANK, MAX_TENSORS, STORED_AS, Layout, Stored, heads_of, settings_of, unpack

CTRANSLATE2_VERSIONS = (4, 5, 6)  # of one form: 4 brought the type and size of every variable
_CTRANSLATE2_TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
_CTRANSLATE2_BLOCKS = {
    "attn_ln": "self_attention/layer_norm", "attn.query": "self_attention/linear_0",
    "attn.key": "self_attention/linear_0", "attn.value": "self_attention/linear_0",
    "attn.out": "self_attention/linear_1", "cross_attn_ln": "attention/layer_norm",
    "cross_attn.query": "attention/linear_0", "cross_attn.key": "attention/linear_1",
    "cross_attn.value": "attention/linear_1", "cross_attn.out": "attention/linear_2", "mlp_ln": "ffn/layer_norm",
    "mlp.0": "ffn/linear_0", "mlp.2": "ffn/linear_1",
}  # fmt: skip
# Queries, keys and values stand in one matrix, those of the cross-attention's memory in another.
_CTRANSLATE2_PARTS = {
    "attn.query": (0, 3), "attn.key": (1, 3), "attn.value": (2, 3),
    "cross_attn.key": (0, 2), "cross_attn.value": (1, 2),
}  # fmt: skip
_CTRANSLATE2_OTHERS = {
    "encoder.positional_embedding": "encoder/position_encodings/encodings",
    "decoder.positional_embedding": "decoder/position_encodings/encodings",
    "decoder.token_embedding.weight": "decoder/embeddings/weight",
    "encoder.ln_post": "encoder/layer_norm", "decoder.ln": "decoder/layer_norm",
    "encoder.conv1": "encoder/conv1", "encoder.conv2": "encoder/conv2",
}  # fmt: skip


def _ctranslate2_place(name: str) -> tuple[str, int, int]:
    """OpenAI's name -> CTranslate2's, and which part of how many it is in there.

    The fused biases hold zeros for the keys, which have none: a bias common to all keys leaves the softmax as it is.
    """
    if name in _CTRANSLATE2_OTHERS:
        return _CTRANSLATE2_OTHERS[name], 0, 1
    base, _, kind = name.rpartition(".")
    part, parts = 0, 1
    if ".blocks." in base:
        side, _, index, module = base.split(".", 3)
        place = f"{side}/layer_{index}/{_CTRANSLATE2_BLOCKS[module]}"
        part, parts = _CTRANSLATE2_PARTS.get(module, (0, 1))
    else:
        place = _CTRANSLATE2_OTHERS[base]
    if place.endswith("layer_norm"):
        kind = {"weight": "gamma", "bias": "beta"}[kind]
    return f"{place}/{kind}", part, parts


def open_ctranslate2(directory: Path) -> Layout:
    """A directory with ``model.bin`` and, mostly, ``config.json``.

    ``model.bin``: u32 version, name, u32 revision, u32 count; per variable its name (u16 length with a final zero),
    u8 rank, u32 dimensions, u8 type, u32 bytes, data; u32 count of aliases, pairs of names.

    Raises:
        CheckpointError: it is truncated, of another version or model, or sizes in it contradict each other.
    """
    path = directory / "model.bin"
    stored, aliases = _read_ctranslate2(path)

    def find(name: str) -> Stored | None:
        key, part, parts = _ctranslate2_place(name)
        key = aliases.get(key, key)
        tensor = stored.get(key)
        if tensor is None:
            return None
        tensor = Stored(path, key, tensor.dtype, tensor.shape, tensor.offset, stored.get(f"{key}_scale"))
        return tensor if parts == 1 else tensor.rows(part, parts)

    stated = {}
    for name, key in (("n_audio_head", "encoder/num_heads"), ("n_text_head", "decoder/num_heads")):
        if key in stored and stored[key].shape == ():
            stated[name] = _scalar(stored[key])
    config = settings_of(directory / "config.json") if (directory / "config.json").exists() else {}
    heads = heads_of(directory / "config.json", config.get("alignment_heads"))
    return Layout(path, find, lambda name: _ctranslate2_place(name)[0], stated, heads)


def _read_ctranslate2(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    total = path.stat().st_size
    stored: dict[str, Stored] = {}
    with open(path, "rb") as file:
        (version,) = unpack(file, path, "I")
        if version not in CTRANSLATE2_VERSIONS:
            raise CheckpointError(
                f"{path} is of CTranslate2's format {version}; formats {CTRANSLATE2_VERSIONS[0]} to "
                f"{CTRANSLATE2_VERSIONS[-1]} are read. Convert the model again"
            )
        model = _name(file, path)
        if model != "WhisperSpec":
            raise CheckpointError(f"{path} holds a {model!r}, not CTranslate2's 'WhisperSpec'")
        _, count = unpack(file, path, "II")
        if count > MAX_TENSORS:
            raise CheckpointError(f"{path} announces {count} variables; no Whisper has more than {MAX_TENSORS}")
        for _ in range(count):
            key = _name(file, path)
            (rank,) = unpack(file, path, "B")
            if rank > MAX_RANK:
                raise CheckpointError(f"{path}: {key} has {rank} dimensions; at most {MAX_RANK} are possible")
            shape = unpack(file, path, f"{rank}I")
            kind, size = unpack(file, path, "BI")
            if kind >= len(_CTRANSLATE2_TYPES):
                raise CheckpointError(f"{path}: {key} is of the unknown type {kind}")
            tensor = Stored(path, key, _CTRANSLATE2_TYPES[kind], shape, file.tell())
            if tensor.size != size:
                raise CheckpointError(
                    f"{path}: {key} {list(shape)} in {tensor.dtype} takes {tensor.size} bytes, not {size}"
                )
            if tensor.offset + size > total:
                raise CheckpointError(f"{path} is truncated: {key} ends early; fetch it again")
            if key in stored:
                raise CheckpointError(f"{path} holds {key} twice")
            stored[key] = tensor
            file.seek(size, 1)
        (count,) = unpack(file, path, "I")
        if count > MAX_TENSORS:
            raise CheckpointError(f"{path} announces {count} aliases; no Whisper has more than {MAX_TENSORS}")
        aliases = {_name(file, path): _name(file, path) for _ in range(count)}
    return stored, aliases


def _name(file: BinaryIO, path: Path) -> str:
    (length,) = unpack(file, path, "H")
    data = file.read(length)
    if len(data) != length or not data.endswith(b"\0"):
        raise CheckpointError(f"{path} is damaged or truncated: no name ends at byte {file.tell()}; fetch it again")
    return data[:-1].decode("utf-8", errors="replace")


def _scalar(tensor: Stored) -> int:
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.size)
    return int(np.frombuffer(data, STORED_AS[tensor.dtype])[0])
