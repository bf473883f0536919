"""One copy of the weights: the file, int8 and back, graphs without weights, and what an exported directory is for."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import echostream
from echostream.audio.io import write_audio
from echostream.checkpoint import load_bundle
from echostream.errors import CheckpointError, MissingExtraError
from echostream.streaming import SentenceEnd, StreamingSession, Waveform
from echostream.streaming.exported.graph_file import weights_outside
from echostream.tensor_file import AGAIN, FORMAT, TensorFile, dequantise, quantise, read_state, write_tensors
from tests.test_streaming import speech

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float16).reshape(3, 4),
    "a.bias": np.ones(3, np.float32),
    "b": np.array([[7]], np.uint8),
    "count": np.array(5, np.int64),
    "empty": np.zeros((0, 2), np.float32),
}


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, TENSORS, {"format": FORMAT})
    file = TensorFile(path)
    assert file.metadata == {"format": FORMAT} and set(file.names) == set(TENSORS)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(file[name], array)
        assert file[name].dtype == array.dtype and file[name].flags.aligned and not file[name].flags.writeable
    with pytest.raises(CheckpointError, match="lack 'c'"):
        file["c"]


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    write_tensors(tmp_path / "ours", TENSORS, {"format": FORMAT})
    theirs = safetensors.load_file(tmp_path / "ours")
    safetensors.save_file(TENSORS, tmp_path / "theirs", {"format": "x"})
    ours = TensorFile(tmp_path / "theirs")
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name], array)


def with_header(header: object, data: bytes = bytes(8)) -> bytes:
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def entry(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "truncated"),
        (b"\xff" * 40, "truncated or no safetensors"),
        (struct.pack("<Q", 50) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (with_header({"w": 7}), "key: value lines"),
        (with_header(entry(dtype="F8")), "dtype is 'F8'"),
        (with_header(entry(shape=[2, -1])), "shape.1 is -1"),
        (with_header(entry(shape=[1] * 9)), "shape is"),
        (with_header(entry(shape=[1 << 34, 1 << 34])), "does not fit its place"),
        (with_header(entry(data_offsets=[0, 800])), "does not fit its place"),
        (with_header(entry(data_offsets=[8, 0])), "does not fit its place"),
        (with_header(entry(shape=[4], data_offsets=[0, 16])), "does not fit its place"),
        (with_header({"__metadata__": {"x": 7}, **entry()}), "metadata"),
        (with_header(entry(), np.array([1, np.nan], np.float32).tobytes()), "w holds NaN or infinity"),
        (with_header({"w": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}, b"\0\x7c"), "w holds NaN"),
    ],
)
def test_damaged_and_hostile_files_are_refused(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        TensorFile(path)["w"]
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("shape", [(5, 128), (3, 70), (4, 6, 7), (2, 3, 5, 5)])
def test_int8_and_back(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight[1] = 0
    weight[0] *= 1e-6  # a quiet row loses nothing by a loud one
    numbers, scale = quantise(weight)
    again = dequantise(numbers, scale, shape)
    assert numbers.dtype == np.int8 and scale.dtype == np.float32 and numbers.min() >= -127
    assert numbers.shape == (weight[0].size, len(weight)) and scale.shape == (len(weight),)
    assert again.shape == shape and not again[1].any()
    most = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    error = np.abs(again - weight).reshape(len(weight), -1).max(axis=1)
    assert (error <= 0.5 * most / 127 * 1.002).all()
    np.testing.assert_array_equal(quantise(again)[0], numbers)
    with pytest.raises(ValueError, match="are not those of"):
        dequantise(numbers, scale, (shape[0], 1))


def test_whole_matrices_only(tmp_path: Path) -> None:
    numbers, scale = quantise(np.ones((2, 64), np.float32))
    path, names = tmp_path / "w", ("w.int8", "w.scale")
    for tensors, shapes, named in (
        ((numbers, scale), {"w": [2, 64]}, ""),
        ((numbers, scale[:1]), {"w": [2, 64]}, "are not those of"),
        ((numbers, scale), {"w": [1 << 34, 1 << 34]}, "are not those of"),
        ((numbers, scale), {"w": "x"}, "shapes: w is 'x'"),
    ):
        write_tensors(path, dict(zip(names, tensors)), {"format": FORMAT, "shapes": json.dumps(shapes)})
        if not named:
            np.testing.assert_allclose(read_state(path)["w"], 1, atol=1e-3)
            continue
        with pytest.raises(CheckpointError, match=named):
            read_state(path)
    write_tensors(path, TENSORS, {"format": "another/1"})
    with pytest.raises(CheckpointError, match="of format 'another/1'"):
        read_state(path)


@pytest.mark.parametrize("content", [b"\x3a\xff\x01", b"\x3a\x05abc", b"\xff" * 12, b"\x0b"])
def test_what_is_no_graph(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="x.onnx is damaged"):
        weights_outside(content, "x.onnx")


# ---- exported directories --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(traced_once: None, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("onnxruntime")
    from echostream.export.directory import export_directory

    folder = tmp_path_factory.mktemp("exports")
    return {name: export_directory(tiny_bundle, folder / name, int8=name == "int8")[0] for name in ("fp32", "int8")}


def events_of(bundle: object, seed: int = 2) -> list:
    session = StreamingSession(bundle)
    return session.push(speech(3.0, seed=seed)) + session.finish()


def test_every_weight_is_there_once(exports: dict[str, Path], tiny_bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = load_bundle(tiny_bundle)
    own = {name: value.numpy() for name, value in model.model.state_dict().items()}
    own |= {f"vocoder.{name}": value.numpy() for name, value in model.vocoder.state_dict().items()}
    exact = read_state(exports["fp32"] / "model.safetensors")
    assert exact.keys() == own.keys()
    for name, array in own.items():
        np.testing.assert_array_equal(exact[name], array, err_msg=name)
    file = TensorFile(exports["int8"] / "model.safetensors")
    assert {name.removesuffix(".int8").removesuffix(".scale") for name in file.names} == own.keys()
    assert not any(name.startswith("vocoder.") and name.endswith(".int8") for name in file.names)
    for folder in exports.values():
        wanted = set()
        for path in (folder / "onnx").iterdir():
            graph = onnx.load(path, load_external_data=False).graph
            outside = weights_outside(path.read_bytes(), path.name)
            assert all(np.prod(t.dims) <= 256 for t in graph.initializer if t.name not in outside)
            wanted |= {name.partition(AGAIN)[0] for name in outside}
        names = TensorFile(folder / "model.safetensors").names
        assert wanted <= set(names) and len(wanted) > 0.4 * len(names)  # equal weights share a name


def test_embeddings_are_read_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is the matrix of a product, too, is there in int8 alone; so is a large one; others in half precision.
    A weight that both reads and products want in single precision is there once.
    """
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    from echostream.export import weights
    from echostream.streaming.exported.model import ExportedModel

    rng = np.random.default_rng(0)
    state = {
        "tied": rng.standard_normal((40, 48)).astype(np.float32),
        "small": rng.standard_normal((30, 32)).astype(np.float32),
        "large": rng.standard_normal((50, 64)).astype(np.float32),
    }
    monkeypatch.setattr(weights, "MANY", 900)
    monkeypatch.setattr(weights, "EMBEDDING", 3000)
    nodes = [helper.make_node("Gather", [name, "ids"], [f"{name}.rows"]) for name in state]
    nodes.append(helper.make_node("MatMul", ["x", "turned"], ["scores"]))
    nodes.append(helper.make_node("Add", ["small", "small"], ["twice"]))
    constants = [numpy_helper.from_array(a, name) for name, a in {**state, "turned": state["tied"].T}.items()]
    outputs = [*(f"{name}.rows" for name in state), "scores", "twice"]
    graph = helper.make_graph(
        nodes, "g",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "N"]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 48]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    weights.write_graphs(tmp_path, {"g": model}, state, int8=True)
    names = set(TensorFile(tmp_path / "model.safetensors").names)
    assert names == {"tied.int8", "tied.scale", "large.int8", "large.scale", "small"}
    stored = read_state(tmp_path / "model.safetensors")
    ids, x = np.array([[3, 29], [0, 7]]), rng.standard_normal((2, 48)).astype(np.float32)
    found = ExportedModel(tmp_path).run("g", {"ids": ids, "x": x})
    for name, array in stored.items():
        np.testing.assert_array_equal(found[f"{name}.rows"], array[ids], err_msg=name)
        assert 0 < np.abs(array - state[name]).max() < 0.02
    np.testing.assert_allclose(found["scores"], x @ stored["tied"].T, atol=0.3)  # inputs are rounded, too
    np.testing.assert_array_equal(found["twice"], 2 * stored["small"])
    exact = tmp_path / "exact"
    exact.mkdir()
    weights.write_graphs(exact, {"g": model}, state, int8=False)
    found = ExportedModel(exact).run("g", {"ids": ids, "x": x})
    np.testing.assert_allclose(found["scores"], x @ state["tied"].T, atol=1e-5)
    with pytest.raises(CheckpointError, match="none of the model's weights"):
        monkeypatch.setattr(weights, "CONSTANT", 100)
        weights.write_graphs(exact, {"g": model}, {"small": state["small"]}, int8=False)


def test_torch_takes_the_same_weights(exports: dict[str, Path], tiny_bundle: Path) -> None:
    def texts(events: list) -> list:
        return [(event.text, event.units) for event in events if isinstance(event, SentenceEnd)]

    original = events_of(load_bundle(tiny_bundle))
    exact = load_bundle(exports["fp32"], backend="torch")
    assert texts(events_of(exact)) == texts(original)
    rounded = load_bundle(exports["int8"], backend="torch")
    assert rounded.digest == load_bundle(exports["int8"]).digest != exact.digest
    for (name, mine), theirs in zip(rounded.model.state_dict().items(), exact.model.state_dict().values(), strict=True):
        assert 0 <= (mine - theirs).abs().max() <= 0.01 * max(1e-3, theirs.abs().max()), name
    assert any(isinstance(event, Waveform) for event in events_of(rounded))


def test_training_starts_from_it(exports: dict[str, Path], tiny_bundle: Path) -> None:
    pytest.importorskip("fairseq")
    from echostream.fairseq_model import DECODERS, ENCODER, HEADS, take_over
    from echostream.models.echostream_model import build_echostream_model

    original = load_bundle(tiny_bundle)
    for source in (exports["fp32"], tiny_bundle):
        model = build_echostream_model(original.config)
        taken = take_over(model, source, (*ENCODER, *DECODERS), HEADS)
        assert set(taken) == set(model.state_dict())
        for name, value in original.model.state_dict().items():
            np.testing.assert_array_equal(model.state_dict()[name], value, err_msg=name)


def test_an_export_is_exported_again(exports: dict[str, Path], tmp_path: Path) -> None:
    from echostream.export.directory import export_directory

    again, _ = export_directory(exports["fp32"], tmp_path / "again", int8=True)
    assert (again / "model.safetensors").read_bytes() == (exports["int8"] / "model.safetensors").read_bytes()
    assert (again / "README.md").read_text() == (exports["int8"] / "README.md").read_text()
    (again / "notes.txt").write_text("mine")  # a directory that is not all ours gets its files one by one
    export_directory(exports["fp32"], again, int8=True)
    assert (again / "notes.txt").exists() and load_bundle(again).model.precision == "int8"


def test_the_directory_is_as_on_the_hub(exports: dict[str, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    from echostream.export.directory import export_directory

    config = json.loads((exports["int8"] / "config.json").read_text())
    assert config["model_type"] == "echostream" and config["precision"] == "int8"
    card = (exports["int8"] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: echostream\n")
    assert card.endswith("---\n\nAn untrained model for tests.\n")
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "MODEL_CARD.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    (bundle / "kmeans.npz").write_bytes(b"units")
    out, _ = export_directory(bundle, tmp_path / "out")
    assert (out / "README.md").read_text() == "---\nlicense: mit\n---\n\nMine.\n"
    assert (out / "kmeans.npz").read_bytes() == b"units"
    (out / "kmeans.npz").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="kmeans.npz is not the file that config.json names"):
        load_bundle(out)


def test_from_pretrained(exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, asked = ModuleType("huggingface_hub"), []

    def snapshot_download(name: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        asked.append((name, revision, allow_patterns))
        if name != "someone/es-en":
            raise OSError("404: no such\nrepository")
        return str(exports["int8"])

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    bundle = echostream.from_pretrained("someone/es-en", revision="v1")
    assert bundle.digest == echostream.from_pretrained(exports["int8"]).digest
    (call,) = asked
    assert call[:2] == ("someone/es-en", "v1") and {"config.json", "model.safetensors"} <= set(call[2])
    assert echostream.from_pretrained(str(exports["fp32"]), backend="torch").config == bundle.config
    with pytest.raises(CheckpointError, match="could not be fetched from the hub: 404: no such$"):
        echostream.from_pretrained("someone/else")
    for name in (tmp_path / "none", "../none", "a/b/c"):
        with pytest.raises(CheckpointError, match="neither a directory nor a model's name"):
            echostream.from_pretrained(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"echostream\[hub\]"):
        echostream.from_pretrained("someone/es-en")


def test_a_session_translates_a_file(exports: dict[str, Path], tmp_path: Path) -> None:
    write_audio(tmp_path / "talk.wav", speech(3.0, seed=2))
    session = echostream.Session(load_bundle(exports["int8"]))
    session.push(speech(1.0, seed=3))  # forgotten
    found = [session.translate(tmp_path / "talk.wav") for _ in range(2)]
    assert found[0].text == found[1].text and len(found[0].events) == len(found[1].events)
    ends = [event for event in found[0].events if isinstance(event, SentenceEnd)]
    assert ends and found[0].text == "\n".join(end.text for end in ends)
    assert len(found[0].samples) == sum(len(end.waveform) for end in ends) and found[0].sample_rate == 16000
    assert not session.finished and session.source_time_s == 0
