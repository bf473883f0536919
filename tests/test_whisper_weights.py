"""Whisper's weights from the three layouts they are published in, and from files that lie about themselves."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from echostream.errors import CheckpointError, MissingExtraError
from echostream.whisper.weights import WhisperDims, parameter_shapes, read_whisper
from tests.whisper_models import (
    DIMS,
    HEADS,
    ctranslate2_variables,
    huggingface_tensors,
    random_parameters,
    safetensors,
    write_ctranslate2,
    write_huggingface,
    write_openai,
)

PARAMETERS = random_parameters()
VARIABLES = ctranslate2_variables(PARAMETERS)
TENSORS = huggingface_tensors(PARAMETERS)


def openai(directory: Path, **options: bool) -> Path:
    pytest.importorskip("torch")
    return write_openai(directory / "tiny.pt", PARAMETERS, **options)


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "ctranslate2-fp32": lambda d: write_ctranslate2(d, VARIABLES),
    "ctranslate2-fp16": lambda d: write_ctranslate2(d, VARIABLES, "float16"),
    "ctranslate2-bf16": lambda d: write_ctranslate2(d, VARIABLES, "bfloat16"),
    "ctranslate2-format-5": lambda d: write_ctranslate2(d, VARIABLES, version=5),
    "ctranslate2-file": lambda d: write_ctranslate2(d, VARIABLES) / "model.bin",
    "huggingface-fp32": lambda d: write_huggingface(d, TENSORS),
    "huggingface-fp16": lambda d: write_huggingface(d, TENSORS, "F16"),
    "huggingface-bf16-shards": lambda d: write_huggingface(d, TENSORS, "BF16", shards=3),
    "huggingface-bare": lambda d: write_huggingface(d, {k.removeprefix("model."): v for k, v in TENSORS.items()}),
    "openai-fp16": openai,
    "openai-fp32": lambda d: openai(d, half=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_weights(layout: str, tmp_path: Path) -> None:
    found = read_whisper(LAYOUTS[layout](tmp_path / "model"))
    assert found.dims == DIMS
    assert found.alignment_heads == (None if layout.startswith("openai") else tuple(map(tuple, HEADS)))
    assert list(found.parameters) == list(PARAMETERS)
    for name, value in found.parameters.items():
        assert value.dtype == np.float32 and value.flags.writeable
        np.testing.assert_array_equal(value, PARAMETERS[name], err_msg=name)


@pytest.mark.parametrize("kind, steps", [("int8", 127), ("int16", 1024)])
def test_quantised_weights_are_right_to_half_a_step(kind: str, steps: int, tmp_path: Path) -> None:
    found = read_whisper(write_ctranslate2(tmp_path, VARIABLES, kind))
    for name, value in found.parameters.items():
        # bound by the largest of all, for rows share a scale with at most that
        step = np.abs(PARAMETERS[name]).max() / steps if name.endswith("weight") else 0.0
        if (kind == "int16" and ".attn." in name) or ".cross_attn." in name:
            step = 1.0 / steps  # queries, keys and values share one
        np.testing.assert_allclose(value, PARAMETERS[name], atol=step / 2 + 1e-6, err_msg=name)
    if kind == "int8":  # a loud row costs the quiet ones nothing: each has its own scale
        quiet = {
            **VARIABLES,
            "encoder/layer_0/self_attention/linear_0/weight": VARIABLES[
                "encoder/layer_0/self_attention/linear_0/weight"
            ]
            * np.geomspace(1e-4, 1, 48)[:, None],
        }
        found = read_whisper(write_ctranslate2(tmp_path, quiet, kind)).parameters["encoder.blocks.0.attn.query.weight"]
        expected = quiet["encoder/layer_0/self_attention/linear_0/weight"][:16]
        assert (np.abs(found - expected) <= np.abs(expected).max(axis=1, keepdims=True) / 253).all()


def test_aliases_are_followed(tmp_path: Path) -> None:
    path = write_ctranslate2(tmp_path, VARIABLES, "int8") / "model.bin"
    data = path.read_bytes()
    # What is alias and what is variable is the converter's choice: swap the two names.
    table, output = b"decoder/embeddings/weight", b"decoder/projection/weight"
    assert data.count(output) == 1 and len(table) == len(output)
    path.write_bytes(data.replace(output, b"@" * 25).replace(table, output).replace(b"@" * 25, table))
    found = read_whisper(tmp_path).parameters["decoder.token_embedding.weight"]
    np.testing.assert_allclose(found, PARAMETERS["decoder.token_embedding.weight"], atol=0.5 / 127 + 1e-6)


def test_heads_are_64_wide_where_the_source_does_not_tell(tmp_path: Path) -> None:
    dims = replace(DIMS, n_audio_state=128, n_text_state=128, n_audio_layer=1, n_text_layer=1)
    variables = ctranslate2_variables(random_parameters(dims), dims)
    del variables["encoder/num_heads"], variables["decoder/num_heads"]
    write_ctranslate2(tmp_path, variables)
    (tmp_path / "config.json").unlink()
    found = read_whisper(tmp_path)
    assert (found.dims.n_audio_head, found.dims.n_text_head, found.alignment_heads) == (2, 2, None)


def refused(source: Path) -> str:
    with pytest.raises(CheckpointError) as told:
        read_whisper(source)
    message = str(told.value)
    assert "\n" not in message and str(source.parent) in message
    return message


@pytest.mark.parametrize("layout", ["ctranslate2-fp16", "huggingface-fp16", "openai-fp16"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_files_are_refused(layout: str, share: float, tmp_path: Path) -> None:
    source = LAYOUTS[layout](tmp_path / "model")
    path = source if source.is_file() else next(p for p in source.iterdir() if p.suffix in (".bin", ".safetensors"))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(source)


@pytest.mark.parametrize("layout", ["ctranslate2-fp16", "huggingface-fp16"])
def test_damaged_headers_never_escape_as_another_error(layout: str, tmp_path: Path) -> None:
    source = LAYOUTS[layout](tmp_path / "model")
    path = next(p for p in source.iterdir() if p.suffix in (".bin", ".safetensors"))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 4000), 3):
            data[place] = int(rng.integers(0, 256))
        path.write_bytes(data)
        try:
            read_whisper(source)  # a flipped bit of a weight is a weight
        except CheckpointError:
            pass


HUGE = "decoder.token_embedding.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda d: d.mkdir(), "holds no Whisper model"),
    "ct2-missing": (
        lambda d: write_ctranslate2(d, {k: v for k, v in VARIABLES.items() if "layer_1/ffn/linear_0/bias" not in k}),
        "model.bin lacks encoder/layer_1/ffn/linear_0/bias",
    ),
    "ct2-shape": (
        lambda d: write_ctranslate2(d, {**VARIABLES, "decoder/layer_2/attention/linear_1/weight": np.zeros((32, 8))}),
        "decoder/layer_2/attention/linear_1/weight (decoder.blocks.2.cross_attn.key.weight) has the shape [16, 8]; "
        "[16, 16] was expected",
    ),
    "ct2-not-finite": (
        lambda d: write_ctranslate2(d, {**VARIABLES, "encoder/layer_norm/gamma": np.full(16, np.nan, np.float32)}),
        "encoder/layer_norm/gamma (encoder.ln_post.weight) holds values that are not finite",
    ),
    "ct2-version": (lambda d: write_ctranslate2(d, VARIABLES, version=9), "CTranslate2's format 9"),
    "ct2-model": (lambda d: write_ctranslate2(d, VARIABLES, name="TransformerSpec"), "'TransformerSpec'"),
    "ct2-heads": (
        lambda d: write_ctranslate2(d, {**VARIABLES, "encoder/num_heads": np.int16(3)}), "16 does not fall into 3 heads"
    ),
    "ct2-no-heads": (
        lambda d: write_ctranslate2(d, {**VARIABLES, "encoder/num_heads": np.int16(0)}), "n_audio_head is 0"
    ),
    "hf-missing": (
        lambda d: write_huggingface(d, {k: v for k, v in TENSORS.items() if "layers.1.fc1.bias" not in k}),
        "lacks model.encoder.layers.1.fc1.bias",
    ),
    "hf-shape": (
        lambda d: write_huggingface(d, {**TENSORS, "model.encoder.layer_norm.weight": np.zeros((16, 1))}),
        "model.encoder.layer_norm.weight (encoder.ln_post.weight) has the shape [16, 1]; [16] was expected",
    ),
    "hf-config": (
        lambda d: write_huggingface(d, TENSORS, dims=replace(DIMS, n_audio_layer=5)),
        "n_audio_layer is stated as 5, but the weights have 2",
    ),
    "hf-other-model": (
        lambda d: (write_huggingface(d, TENSORS) / "config.json").write_text('{"model_type": "bert"}'), "'bert'"
    ),
    "hf-no-config": (lambda d: (write_huggingface(d, TENSORS) / "config.json").unlink(), "config.json does not exist"),
    "hf-bad-json": (lambda d: (write_huggingface(d, TENSORS) / "config.json").write_text("{"), "is not JSON"),
    "hf-heads": (
        lambda d: (write_huggingface(d, TENSORS) / "generation_config.json").write_text(
            '{"alignment_heads": [[3, 0]]}'
        ),
        "[[3, 0]] name a head beyond 3 layers of 2 heads",
    ),
    "hf-shard-elsewhere": (
        lambda d: (write_huggingface(d, TENSORS, shards=2) / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "../../secret.safetensors"}})
        ),
        "which is no file beside it",
    ),
    "hf-shard-missing": (
        lambda d: (write_huggingface(d, TENSORS, shards=2) / "model-00002-of-00002.safetensors").unlink(),
        "model-00002-of-00002.safetensors does not exist",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_sources_are_refused_by_name(case: str, tmp_path: Path) -> None:
    breakage, message = BROKEN[case]
    breakage(tmp_path / "model")
    assert message in refused(tmp_path / "model")


def test_sizes_are_checked_before_memory_is_asked_for(tmp_path: Path) -> None:
    """Files of some hundred bytes that announce exabytes."""
    huge = {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}
    text = json.dumps({"model.decoder.embed_tokens.weight": huge}).encode()
    (tmp_path / "config.json").write_text("{}")
    for data in (struct.pack("<Q", len(text)) + text, struct.pack("<Q", 1 << 60) + text):
        (tmp_path / "model.safetensors").write_bytes(data)
        refused(tmp_path)
    name = b"WhisperSpec\0"
    start = struct.pack("<IH", 6, len(name)) + name
    key = b"decoder/embeddings/weight\0"
    variable = struct.pack("<H", len(key)) + key + struct.pack("<B2I", 2, 0xFFFFFFFF, 0xFFFFFFFF)
    for rest in (
        struct.pack("<II", 3, 0xFFFFFFFF),
        struct.pack("<II", 3, 1) + variable + struct.pack("<BI", 0, 0xFFFFFFFF),
        struct.pack("<II", 3, 1) + struct.pack("<H", len(key)) + key + bytes([255]),
        struct.pack("<III", 3, 0, 0xFFFFFFFF),
    ):
        (tmp_path / "model.bin").write_bytes(start + rest)
        refused(tmp_path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_hostile_checkpoints_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    torch.save({"dims": {}, "model_state_dict": Malicious()}, path)
    assert "would run code" in refused(path)
    torch.save({"model": {}}, path)
    assert "not a Whisper checkpoint" in refused(path)
    torch.save({"dims": {}, "model_state_dict": {}}, path)
    assert "lacks encoder.conv1.weight" in refused(path)
    state = {name: torch.from_numpy(value) for name, value in PARAMETERS.items()}
    for name, fake in (
        ("encoder.blocks.1.mlp.0.weight", torch.zeros(1).expand(64, 16)),  # four bytes that claim to be a matrix
        ("encoder.ln_post.bias", torch.zeros(16).to_sparse()),
        ("encoder.ln_post.bias", torch.zeros(16, dtype=torch.int64)),
    ):
        torch.save({"dims": vars(DIMS), "model_state_dict": {**state, name: fake}}, path)
        assert f"{name} is no plain tensor" in refused(path)
    torch.save({"dims": {**vars(DIMS), "n_vocab": 31}, "model_state_dict": state}, path)
    assert "n_vocab is stated as 31, but the weights have 30" in refused(path)
    torch.save({"dims": vars(DIMS), "model_state_dict": {**state, HUGE: torch.zeros(1).expand(1 << 40, 16)}}, path)
    assert "n_vocab is 1099511627776" in refused(path)


def test_integers_without_a_scale_are_refused(tmp_path: Path) -> None:
    write_ctranslate2(tmp_path, VARIABLES, "int8")
    data = (tmp_path / "model.bin").read_bytes()
    key = b"encoder/conv1/weight_scale"
    (tmp_path / "model.bin").write_bytes(data.replace(key, b"encoder/conv1/weight_other"))
    assert "encoder/conv1/weight holds int8 without a scale" in refused(tmp_path)


def test_safetensors_are_those_of_the_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    assert package.load(safetensors(TENSORS)).keys() == TENSORS.keys()


def test_packaged_base_model(tmp_path: Path) -> None:
    from echostream.units.features import packaged_whisper

    try:
        directory = packaged_whisper()
    except MissingExtraError as error:
        pytest.skip(str(error))
    found = read_whisper(directory)
    assert found.dims == WhisperDims(80, 1500, 512, 8, 6, 51865, 448, 512, 8, 6)
    assert found.alignment_heads == ((3, 1), (4, 2), (4, 3), (4, 7), (5, 1), (5, 2), (5, 4), (5, 6))
    assert sum(value.size for value in found.parameters.values()) == 72_593_920
    assert [name for name, _ in parameter_shapes(found.dims)] == list(found.parameters)
