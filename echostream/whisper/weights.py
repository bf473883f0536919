"""Whisper's weights in one neutral form, whatever file they come in: OpenAI's names, float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echostream.errors import CheckpointError
from echostream.whisper.ctranslate2 import open_ctranslate2
from echostream.whisper.huggingface import open_huggingface
from echostream.whisper.layouts import Heads, Layout
from echostream.whisper.openai import open_openai

HEAD_DIM = 64  # every published Whisper has heads of this width
# Far above every published size (large: 128 mels, 1280 wide, 32 layers, 20 heads, 51866 tokens).
LIMITS = {"n_mels": 512, "n_audio_ctx": 65536, "n_audio_state": 8192, "n_audio_head": 128, "n_audio_layer": 128,
          "n_vocab": 1_000_000, "n_text_ctx": 65536, "n_text_state": 8192, "n_text_head": 128,
          "n_text_layer": 128}  # fmt: skip


@dataclass(frozen=True)
class WhisperDims:
    """The sizes of a Whisper model, as OpenAI names them.

    Attributes:
        n_mels: mel bands a frame of 10 ms.
        n_audio_ctx: encoder positions, 20 ms each (1500).
        n_audio_state, n_audio_head, n_audio_layer: width, heads and layers of the encoder.
        n_vocab: tokens, timestamps and specials included.
        n_text_ctx: decoder positions (448).
        n_text_state, n_text_head, n_text_layer: width, heads and layers of the decoder.
    """

    n_mels: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int
    n_vocab: int
    n_text_ctx: int
    n_text_state: int
    n_text_head: int
    n_text_layer: int


# The multilingual models (large-v3 alone has 128 mel bands, which the features here have not).
PUBLISHED = {
    size: WhisperDims(mels, 1500, width, heads, layers, vocab, 448, width, heads, decoder_layers)
    for size, (mels, width, heads, layers, decoder_layers, vocab) in {
        "tiny": (80, 384, 6, 4, 4, 51865),
        "base": (80, 512, 8, 6, 6, 51865),
        "small": (80, 768, 12, 12, 12, 51865),
        "medium": (80, 1024, 16, 24, 24, 51865),
        "large": (80, 1280, 20, 32, 32, 51865),
    }.items()
}


@dataclass(frozen=True)
class WhisperWeights:
    """A Whisper model.

    Attributes:
        dims: its sizes.
        parameters: float32 arrays by OpenAI's names, exactly those of ``parameter_shapes(dims)``. Keys have no bias.
        alignment_heads: (decoder layer, head) whose cross-attention follows the sound, where the source tells them.
            Converters write the upper half of the layers, all heads, for models of which none were published.
        source: the file they came from.
    """

    dims: WhisperDims
    parameters: dict[str, np.ndarray]
    alignment_heads: Heads | None
    source: Path


def parameter_shapes(dims: WhisperDims) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of a model of these sizes: its name and shape."""
    audio, text = dims.n_audio_state, dims.n_text_state
    for name, inputs in (("conv1", dims.n_mels), ("conv2", audio)):
        yield f"encoder.{name}.weight", (audio, inputs, 3)
        yield f"encoder.{name}.bias", (audio,)
    yield "encoder.positional_embedding", (dims.n_audio_ctx, audio)
    for i in range(dims.n_audio_layer):
        yield from _block(f"encoder.blocks.{i}", audio)
    yield from _norm("encoder.ln_post", audio)
    yield "decoder.token_embedding.weight", (dims.n_vocab, text)
    yield "decoder.positional_embedding", (dims.n_text_ctx, text)
    for i in range(dims.n_text_layer):
        yield from _block(f"decoder.blocks.{i}", text, memory=audio)
    yield from _norm("decoder.ln", text)


def _norm(name: str, dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (dim,)
    yield f"{name}.bias", (dim,)


def _attention(name: str, dim: int, memory: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part, inputs in (("query", dim), ("key", memory), ("value", memory), ("out", dim)):
        yield f"{name}.{part}.weight", (dim, inputs)
        if part != "key":
            yield f"{name}.{part}.bias", (dim,)


def _block(name: str, dim: int, memory: int | None = None) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.attn_ln", dim)
    yield from _attention(f"{name}.attn", dim, dim)
    if memory is not None:
        yield from _norm(f"{name}.cross_attn_ln", dim)
        yield from _attention(f"{name}.cross_attn", dim, memory)
    yield from _norm(f"{name}.mlp_ln", dim)
    for part, outputs, inputs in ((0, 4 * dim, dim), (2, dim, 4 * dim)):
        yield f"{name}.mlp.{part}.weight", (outputs, inputs)
        yield f"{name}.mlp.{part}.bias", (outputs,)


def read_whisper(source: str | Path) -> WhisperWeights:
    """Read Whisper of any size.

    Args:
        source: directory with CTranslate2's ``model.bin`` (float32, float16, bfloat16, int16 or int8), Hugging Face's
            with ``config.json`` and ``model.safetensors`` (or its shards), or OpenAI's ``.pt`` file (needs torch).

    Raises:
        CheckpointError: nothing of the three is there; a weight is missing, of another shape, truncated or not finite;
            or the sizes that the source states are not those of its weights. Nothing in a file is ever run.
    """
    source = Path(source)
    try:
        layout = _open(source)
        dims = _dims(layout)
        parameters = {name: _read(layout, name, shape) for name, shape in parameter_shapes(dims)}
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror or error}") from None
    heads = layout.alignment_heads
    if heads is not None and not all(0 <= i < dims.n_text_layer and 0 <= h < dims.n_text_head for i, h in heads):
        raise CheckpointError(
            f"{layout.path.parent}: alignment_heads {[list(pair) for pair in heads]} name a head beyond "
            f"{dims.n_text_layer} layers of {dims.n_text_head} heads"
        )
    return WhisperWeights(dims, parameters, heads, layout.path)


def _open(source: Path) -> Layout:
    if source.is_file():
        if source.name == "model.bin":
            return open_ctranslate2(source.parent)
        return open_huggingface(source.parent) if source.name.startswith("model.safetensors") else open_openai(source)
    if not source.is_dir():
        raise CheckpointError(f"Whisper model {source} does not exist")
    if (source / "model.bin").is_file():
        return open_ctranslate2(source)
    if any((source / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return open_huggingface(source)
    raise CheckpointError(
        f"{source} holds no Whisper model: neither model.bin (CTranslate2) nor model.safetensors (Hugging Face); "
        "OpenAI's .pt is named as a file"
    )


def _dims(layout: Layout) -> WhisperDims:
    """Sizes from the weights' shapes; heads as stated, else ``HEAD_DIM`` wide. What is stated must agree."""
    audio, mels = _shape(layout, "encoder.conv1.weight", 3)[:2]
    vocab, text = _shape(layout, "decoder.token_embedding.weight", 2)
    stated = {name: value for name, value in layout.stated.items() if name in LIMITS}
    found = {
        "n_mels": mels,
        "n_audio_ctx": _shape(layout, "encoder.positional_embedding", 2)[0],
        "n_audio_state": audio,
        "n_audio_head": stated.get("n_audio_head", audio // HEAD_DIM),
        "n_audio_layer": _layers(layout, "encoder"),
        "n_vocab": vocab,
        "n_text_ctx": _shape(layout, "decoder.positional_embedding", 2)[0],
        "n_text_state": text,
        "n_text_head": stated.get("n_text_head", text // HEAD_DIM),
        "n_text_layer": _layers(layout, "decoder"),
    }
    for name, value in found.items():
        if type(value) is not int or not 1 <= value <= LIMITS[name]:
            raise CheckpointError(f"{layout.path}: {name} is {value!r}; it must be 1 to {LIMITS[name]}")
        if name in stated and stated[name] != value:
            raise CheckpointError(f"{layout.path}: {name} is stated as {stated[name]!r}, but the weights have {value}")
    dims = WhisperDims(**found)
    for width, heads in ((audio, dims.n_audio_head), (text, dims.n_text_head)):
        if width % heads:
            raise CheckpointError(f"{layout.path}: a width of {width} does not fall into {heads} heads")
    return dims


def _shape(layout: Layout, name: str, rank: int) -> tuple[int, ...]:
    parameter = layout.find(name)
    if parameter is None:
        raise CheckpointError(f"{layout.path} lacks {layout.key(name)}; is it a whole Whisper model?")
    if len(parameter.shape) != rank:
        raise CheckpointError(f"{layout.path}: {parameter.key} has the shape {list(parameter.shape)}, not {rank} sizes")
    return parameter.shape


def _layers(layout: Layout, side: str) -> int:
    limit = LIMITS["n_audio_layer"] + 1
    return next((i for i in range(limit) if layout.find(f"{side}.blocks.{i}.attn_ln.weight") is None), limit)


def _read(layout: Layout, name: str, shape: tuple[int, ...]) -> np.ndarray:
    parameter = layout.find(name)
    if parameter is None:
        raise CheckpointError(f"{layout.path} lacks {layout.key(name)}; is it a whole Whisper model?")
    if parameter.shape != shape:
        raise CheckpointError(
            f"{layout.path}: {parameter.key} ({name}) has the shape {list(parameter.shape)}; {list(shape)} was expected"
        )
    values = parameter.read()
    if not np.isfinite(values).all():
        raise CheckpointError(f"{layout.path}: {parameter.key} ({name}) holds values that are not finite")
    return values
