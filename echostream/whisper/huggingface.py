"""Whisper as Hugging Face's transformers store it."""

from __future__ import annotations

from pathlib import Path

from echostream.errors import CheckpointError
from echostream.whisper.layouts import (
    MAX_HEADER,
    MAX_RANK,
    Layout,
    Stored,
    heads_of,
    parse_settings,
    settings_of,
    unpack,
)

_SAFETENSORS_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8",
                      "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
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
    config = settings_of(directory / "config.json")
    if config.get("model_type", "whisper") != "whisper":
        raise CheckpointError(f"{directory / 'config.json'} is of a model {config['model_type']!r}, not 'whisper'")
    path = directory / "model.safetensors"
    if path.exists():
        stored = _read_safetensors(path)
    else:
        path = directory / "model.safetensors.index.json"
        places = settings_of(path).get("weight_map")
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
    heads = heads_of(generation, settings_of(generation).get("alignment_heads")) if generation.exists() else None
    return Layout(path, find, _hf_key, stated, heads)


def _read_safetensors(path: Path) -> dict[str, Stored]:
    """The header: u64 its length, JSON with type, shape and place of every tensor in the bytes behind it."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    total = path.stat().st_size
    with open(path, "rb") as file:
        (length,) = unpack(file, path, "Q")
        if length > min(MAX_HEADER, total - 8):
            raise CheckpointError(f"{path} is truncated or no safetensors file: header of {length} bytes in {total}")
        header = parse_settings(path, file.read(length))
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
