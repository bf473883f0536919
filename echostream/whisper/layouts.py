"""Files that Whisper's weights come in: CTranslate2, Hugging Face safetensors, OpenAI's ``.pt``.

Each layout finds a parameter by the name OpenAI gave it. Only headers are read at first: a tensor's place, type and
shape are checked against the file's size before memory is asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from echostream.errors import CheckpointError
from echostream.loading import parse_json, read_bytes
from echostream.weights import read_weights

Heads = tuple[tuple[int, int], ...]  # (decoder layer, head)

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_TENSORS = 100_000
MAX_RANK = 8
CTRANSLATE2_VERSIONS = (4, 5, 6)  # of one form: 4 brought the type and size of every variable
_CTRANSLATE2_TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
_SAFETENSORS_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8",
                      "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
_STORED_AS = {"bfloat16": "<u2", "float32": "<f4", "float16": "<f2", "float64": "<f8", "int8": "i1", "int16": "<i2",
              "int32": "<i4", "int64": "<i8", "uint8": "u1", "bool": "u1"}  # fmt: skip
_QUANTIZED = ("int8", "int16")


class Parameter(Protocol):
    """One of Whisper's parameters, not read yet.

    Attributes:
        key: what the file calls it.
        shape: of what ``read`` gives.
    """

    key: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Its values as float32; raises CheckpointError if the file cannot give them."""


@dataclass(frozen=True)
class Layout:
    """What a source says about itself before any weight is read.

    Attributes:
        path: the file with the weights, for messages; of several the index.
        find: parameter by OpenAI's name, or None if the source has none.
        key: what this layout calls the parameter of a name, for messages.
        stated: dimensions that the source states beside the weights, by the names of ``WhisperDims``.
        alignment_heads: see ``WhisperWeights``.
    """

    path: Path
    find: Callable[[str], Parameter | None]
    key: Callable[[str], str]
    stated: Mapping[str, int] = field(default_factory=dict)
    alignment_heads: Heads | None = None


@dataclass(frozen=True)
class Stored:
    """A tensor at its place in a file, row-major, little-endian; implements ``Parameter``.

    Attributes:
        dtype: numpy's name of the type, or bfloat16.
        scale: of a quantised tensor: value = stored / scale, one scale in all or one a row.
    """

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scale: Stored | None = None

    @property
    def size(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * np.dtype(_STORED_AS[self.dtype]).itemsize

    def rows(self, part: int, parts: int) -> Stored:
        """One of ``parts`` equal slices along the first dimension.

        Raises:
            CheckpointError: the first dimension is not a multiple of ``parts``.
        """
        if not self.shape or self.shape[0] % parts:
            raise CheckpointError(f"{self.path}: {self.key} {list(self.shape)} does not fall into {parts} equal parts")
        shape = (self.shape[0] // parts, *self.shape[1:])
        scale = self.scale if self.scale is None or self.scale.shape in ((), (1,)) else self.scale.rows(part, parts)
        return Stored(self.path, self.key, self.dtype, shape, self.offset + part * (self.size // parts), scale)

    def read(self) -> np.ndarray:
        if self.dtype not in ("float32", "float16", "bfloat16", "float64", *_QUANTIZED):
            raise CheckpointError(f"{self.path}: {self.key} holds {self.dtype}, which no weight of Whisper is")
        if self.dtype in _QUANTIZED and self.scale is None:
            raise CheckpointError(f"{self.path}: {self.key} holds {self.dtype} without a scale ({self.key}_scale)")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise CheckpointError(f"{self.path} is truncated: {self.key} ends early; fetch it again")
        values = np.frombuffer(data, _STORED_AS[self.dtype]).reshape(self.shape)
        if self.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(all="ignore"):  # what is not finite is told by name, see read_whisper
            values = values.astype(np.float32)
            if self.scale is not None and self.dtype in _QUANTIZED:
                scale = self.scale.read()
                if scale.size not in (1, self.shape[0]):
                    raise CheckpointError(
                        f"{self.path}: {self.scale.key} has {scale.size} values for {self.shape[0]} rows of {self.key}"
                    )
                values /= scale.reshape(-1, *(1,) * (values.ndim - 1)) if scale.size > 1 else scale.reshape(())
        return values


# --- CTranslate2 ---------------------------------------------------------------------------------------------------

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
    config = _json(directory / "config.json") if (directory / "config.json").exists() else {}
    heads = _heads(directory / "config.json", config.get("alignment_heads"))
    return Layout(path, find, lambda name: _ctranslate2_place(name)[0], stated, heads)


def _read_ctranslate2(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    total = path.stat().st_size
    stored: dict[str, Stored] = {}
    with open(path, "rb") as file:
        (version,) = _unpack(file, path, "I")
        if version not in CTRANSLATE2_VERSIONS:
            raise CheckpointError(
                f"{path} is of CTranslate2's format {version}; formats {CTRANSLATE2_VERSIONS[0]} to "
                f"{CTRANSLATE2_VERSIONS[-1]} are read. Convert the model again"
            )
        model = _name(file, path)
        if model != "WhisperSpec":
            raise CheckpointError(f"{path} holds a {model!r}, not CTranslate2's 'WhisperSpec'")
        _, count = _unpack(file, path, "II")
        if count > MAX_TENSORS:
            raise CheckpointError(f"{path} announces {count} variables; no Whisper has more than {MAX_TENSORS}")
        for _ in range(count):
            key = _name(file, path)
            (rank,) = _unpack(file, path, "B")
            if rank > MAX_RANK:
                raise CheckpointError(f"{path}: {key} has {rank} dimensions; at most {MAX_RANK} are possible")
            shape = _unpack(file, path, f"{rank}I")
            kind, size = _unpack(file, path, "BI")
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
        (count,) = _unpack(file, path, "I")
        if count > MAX_TENSORS:
            raise CheckpointError(f"{path} announces {count} aliases; no Whisper has more than {MAX_TENSORS}")
        aliases = {_name(file, path): _name(file, path) for _ in range(count)}
    return stored, aliases


def _unpack(file: BinaryIO, path: Path, form: str) -> tuple[int, ...]:
    form = "<" + form
    data = file.read(struct.calcsize(form))
    if len(data) != struct.calcsize(form):
        raise CheckpointError(f"{path} is truncated at byte {file.tell()}; fetch it again")
    return struct.unpack(form, data)


def _name(file: BinaryIO, path: Path) -> str:
    (length,) = _unpack(file, path, "H")
    data = file.read(length)
    if len(data) != length or not data.endswith(b"\0"):
        raise CheckpointError(f"{path} is damaged or truncated: no name ends at byte {file.tell()}; fetch it again")
    return data[:-1].decode("utf-8", errors="replace")


def _scalar(tensor: Stored) -> int:
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.size)
    return int(np.frombuffer(data, _STORED_AS[tensor.dtype])[0])


# --- Hugging Face --------------------------------------------------------------------------------------------------

_HF_BLOCKS = {
    "attn_ln": "self_attn_layer_norm", "attn.query": "self_attn.q_proj", "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj", "attn.out": "self_attn.out_proj", "cross_attn_ln": "encoder_attn_layer_norm",
    "cross_attn.query": "encoder_attn.q_proj", "cross_attn.key": "encoder_attn.k_proj",
    "cross_attn.value": "encoder_attn.v_proj", "cross_attn.out": "encoder_attn.out_proj",
    "mlp_ln": "final_layer_norm", "mlp.0": "fc1", "mlp.2": "fc2",
}  # fmt: skip
_HF_OTHERS = {
    "encoder.positional_embedding": "encoder.embed_positions.weight",
    "decoder.positional_embedding": "decoder.embed_positions.weight",
    "decoder.token_embedding.weight": "decoder.embed_tokens.weight",
    "encoder.ln_post.weight": "encoder.layer_norm.weight", "encoder.ln_post.bias": "encoder.layer_norm.bias",
    "decoder.ln.weight": "decoder.layer_norm.weight", "decoder.ln.bias": "decoder.layer_norm.bias",
}  # fmt: skip
_HF_STATED = {
    "n_mels": "num_mel_bins", "n_audio_ctx": "max_source_positions", "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads", "n_audio_layer": "encoder_layers", "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions", "n_text_state": "d_model", "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}  # fmt: skip


def _hf_key(name: str) -> str:
    """OpenAI's name -> that of ``WhisperForConditionalGeneration``."""
    if ".blocks." in name:
        side, _, index, module = name.split(".", 3)
        module, _, kind = module.rpartition(".")
        return f"model.{side}.layers.{index}.{_HF_BLOCKS[module]}.{kind}"
    return f"model.{_HF_OTHERS.get(name, name)}"


def open_huggingface(directory: Path) -> Layout:
    """A directory with ``config.json`` and ``model.safetensors``, or its shards with their index.

    Raises:
        CheckpointError: a file is missing, truncated, or contradicts itself.
    """
    config = _json(directory / "config.json")
    if config.get("model_type", "whisper") != "whisper":
        raise CheckpointError(f"{directory / 'config.json'} is of a model {config['model_type']!r}, not 'whisper'")
    path = directory / "model.safetensors"
    if path.exists():
        stored = _read_safetensors(path)
    else:
        path = directory / "model.safetensors.index.json"
        places = _json(path).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise CheckpointError(f"{path} has no 'weight_map' from weights to files")
        stored = {}
        for shard in sorted(set(places.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{path} names {shard!r}, which is no file beside it")
            stored.update(_read_safetensors(directory / shard))

    def find(name: str) -> Stored | None:
        key = _hf_key(name)
        # Whisper without its output layer (WhisperModel) is stored without the prefix.
        return stored.get(key) or stored.get(key.removeprefix("model."))

    stated = {name: config[key] for name, key in _HF_STATED.items() if key in config}
    generation = directory / "generation_config.json"
    heads = _heads(generation, _json(generation).get("alignment_heads")) if generation.exists() else None
    return Layout(path, find, _hf_key, stated, heads)


def _read_safetensors(path: Path) -> dict[str, Stored]:
    """The header: u64 its length, JSON with type, shape and place of every tensor in the bytes behind it."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    total = path.stat().st_size
    with open(path, "rb") as file:
        (length,) = _unpack(file, path, "Q")
        if length > min(MAX_HEADER, total - 8):
            raise CheckpointError(f"{path} is truncated or no safetensors file: header of {length} bytes in {total}")
        header = _parse_json(path, file.read(length))
    start = 8 + length
    stored = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, begin, end)
        except (TypeError, KeyError, ValueError):
            raise CheckpointError(f"{path}: {key} lacks its dtype, shape or data_offsets") from None
        if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n <= total for n in numbers):
            raise CheckpointError(f"{path}: {key} has the impossible shape {list(shape)[:9]} at {begin} to {end}")
        if not isinstance(kind, str) or kind not in _SAFETENSORS_TYPES:
            continue  # of a type that no weight has; told as missing if one does
        tensor = Stored(path, key, _SAFETENSORS_TYPES[kind], shape, start + begin)
        if tensor.size != end - begin:
            raise CheckpointError(f"{path}: {key} {list(shape)} in {kind} takes {tensor.size} bytes, not {end - begin}")
        if start + end > total:
            raise CheckpointError(f"{path} is truncated: {key} ends early; fetch it again")
        stored[key] = tensor
    return stored


# --- OpenAI --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A torch tensor in memory; implements ``Parameter``."""

    path: Path
    key: str
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> np.ndarray:
        import torch

        tensor = self.tensor
        whole = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
        # A file may claim any shape for a storage of a few bytes (strides of 0).
        if not whole or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise CheckpointError(f"{self.path}: {self.key} is no plain tensor of floating point numbers")
        return tensor.detach().float().contiguous().numpy()


def open_openai(path: Path) -> Layout:
    """OpenAI's ``.pt``: ``{"dims": {...}, "model_state_dict": {...}}``, read without running anything in it.

    Raises:
        CheckpointError: it is damaged, would run code, or is something else.
    """
    import torch

    checkpoint = read_weights(path, "Whisper checkpoint")
    if not isinstance(checkpoint, Mapping) or not {"dims", "model_state_dict"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is not a Whisper checkpoint of OpenAI's: it lacks 'dims' or 'model_state_dict'")
    dims, state = checkpoint["dims"], checkpoint["model_state_dict"]
    if not isinstance(dims, Mapping) or not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: 'dims' and 'model_state_dict' must map names to values")

    def find(name: str) -> Loaded | None:
        tensor = state.get(name)
        return Loaded(path, name, tensor) if isinstance(tensor, torch.Tensor) else None

    return Layout(path, find, lambda name: name, dict(dims))


# --- JSON beside the weights ---------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    return _parse_json(path, read_bytes(path, "configuration", CheckpointError, MAX_HEADER))


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    return parse_json(data, str(path), CheckpointError)


def _heads(path: Path, value: Any) -> Heads | None:
    if value is None:
        return None
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(p, list) and len(p) == 2 and all(type(n) is int for n in p) for p in pairs):
        raise CheckpointError(f"{path}: alignment_heads must be a list of [layer, head]")
    return tuple((layer, head) for layer, head in pairs)
