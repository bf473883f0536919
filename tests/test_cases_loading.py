"""The faults 14 to 17 and 19 of issue 15's list, as far as they come from files: each kind, not only its example."""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from echostream.checkpoint import load_bundle  # noqa: E402
from echostream.checkpoint.layout import config_path, sha256  # noqa: E402
from echostream.config import EchoStreamConfig  # noqa: E402
from echostream.data.manifest import read_manifest  # noqa: E402
from echostream.data.source import load_features, load_samples  # noqa: E402
from echostream.errors import AudioError, CheckpointError, ConfigError, EchoStreamError, ManifestError, SessionError  # noqa: E402
from echostream.export.directory import export_directory, make_voice_graphs  # noqa: E402
from echostream.loading import inside, read_array, read_json, read_npz, read_yaml  # noqa: E402
from echostream.rules import Rule, check  # noqa: E402
from echostream.streaming import SessionBatch, StreamingSession  # noqa: E402
from echostream.streaming.exported.names import graph_names  # noqa: E402
from echostream.streaming.options import add_policy_arguments, add_segmenter_arguments, session_options  # noqa: E402
from echostream.streaming.resolve import OPTIONS, resolve  # noqa: E402
from echostream.tensor_file import TensorFile, write_tensors  # noqa: E402
from echostream.text import Vocabulary  # noqa: E402
from echostream.units.kmeans import KMeans, Projection, load_kmeans  # noqa: E402
from echostream.weights import read_weights  # noqa: E402
from tests.conftest import tiny_config, tiny_voice  # noqa: E402
from tests.fuzz.material import noise  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def exported(traced_once: None, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_directory(tiny_bundle, tmp_path_factory.mktemp("exported") / "fp32")[0]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def graphs(exported: Path, tmp_path: Path) -> Path:
    """A copy of an export that a test may break."""
    return Path(shutil.copytree(exported, tmp_path / "graphs"))


def settings(directory: Path, change: Callable[[dict], object]) -> None:
    """Change ``config.yaml`` or ``config.json``; no digests are kept, as in directories of strangers."""
    path = config_path(directory)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values.pop("digests", None)
    change(values)
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values), encoding="utf-8")


def refusal(error: type[EchoStreamError], work: Callable[[], object]) -> str:
    """The one line with which ``work`` is refused."""
    with pytest.raises(error) as caught:
        work()
    line = str(caught.value)
    assert "\n" not in line and 10 < len(line) < 1000
    return line


class Cost:
    """Seconds of computing and MB that a block takes."""

    def __enter__(self) -> Cost:
        self.started, self.before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.started
        self.megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before) / 1024


# ------------------------------------------------------------------------------- 14: a cost that the input chooses


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda v: v["policy"].update(beam=100_000), "policy: beam is 100000", id="beam"),
        pytest.param(lambda v: v["policy"].update(chunk_ms=10**9), "policy: chunk_ms is 1000000000", id="chunk"),
        pytest.param(lambda v: v["policy"].update(agreement_n=10**9), "policy: agreement_n", id="agreement"),
        pytest.param(lambda v: v["model"].update(encoder_layers=10**9), "encoder_layers is 1", id="layers"),
        pytest.param(lambda v: v["model"].update(encoder_layers=100), "the checkpoint lacks", id="more-layers"),
        pytest.param(lambda v: v["model"].update(encoder_embed_dim=8192), "model.pt: ", id="width"),
        pytest.param(lambda v: v["model"].update(max_sentence_frames=10**6), "max_sentence_frames", id="frames"),
        pytest.param(
            lambda v: v["model"].update(max_target_tokens=4096, ctc_upsample_ratio=128, unit_decoder_layers=64),
            "MB, at most 300", id="buffers",
        ),
        pytest.param(lambda v: v["model"].update(num_units=2**40), "model: num_units is", id="units"),
    ],
)  # fmt: skip
def test_14_a_configuration_cannot_choose_any_cost(bundle: Path, change: Callable, named: str) -> None:
    settings(bundle, change)
    with Cost() as cost:
        line = refusal(EchoStreamError, lambda: load_bundle(bundle))
    assert named in line and str(bundle) in line
    assert cost.seconds < 5 and cost.megabytes < 300


def test_14_beam_by_the_interface(tiny_bundle: Path) -> None:
    loaded = load_bundle(tiny_bundle)
    assert "at most 32" in refusal(ConfigError, lambda: StreamingSession(loaded, beam=100_000))
    assert "at most 32" in refusal(ConfigError, lambda: SessionBatch(loaded, beam=33))
    StreamingSession(loaded, beam=32)


def test_14_the_default_models_fit_their_own_limits() -> None:
    for config in (EchoStreamConfig(), EchoStreamConfig.small(), tiny_config()):
        assert 0 < config.stream_bytes < 150e6


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param(LAUGHS, "aliases", id="laughs"),
        pytest.param("a: &a {b: 1}\nc: {<<: *a}", "aliases", id="merge"),
        pytest.param("a: " + "[" * 100_000, "nested", id="deep"),
        pytest.param("a: {" * 20 + "}" * 20, "nested", id="nested"),
        pytest.param("a: 1\nb: 2\na: 3", "'a' is there twice", id="double"),
        pytest.param("a: " + "9" * 100_000, "cannot be read", id="digits"),
        pytest.param("a: 2001-99-99", "cannot be read", id="date"),
        pytest.param("x" * (1 << 21), "at most", id="size"),
        pytest.param("? [a]\n: 1", "not YAML", id="key"),
        pytest.param("a: !!python/object/apply:os.system [touch owned]", "not YAML", id="python"),
        pytest.param("- a", "holds list", id="list"),
    ],
)
def test_14_yaml_bombs(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with Cost() as cost:
        line = refusal(ConfigError, lambda: read_yaml(path, "configuration", ConfigError))
    assert named in line and str(path) in line and cost.seconds < 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1, "a": 2}', "[]", '{"a": ' + "9" * 10_000 + "}", "{'a': 1}"])
def test_14_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vocoder.json"
    path.write_text(text)
    assert str(path) in refusal(ConfigError, lambda: read_json(path, "vocoder configuration", ConfigError))


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """A .npy file; its header says ``shape``."""
    file = io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape if shape is None else shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def test_14_zlib_bombs_in_archives(tmp_path: Path, bundle: Path) -> None:
    """A few kilobytes that unpack to gigabytes, and headers that promise them."""
    bomb, promise = tmp_path / "bomb.npz", tmp_path / "promise.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mean.npy", "w") as file:
        for _ in range(600):
            file.write(bytes(1 << 20))
    with zipfile.ZipFile(promise, "w") as archive:
        for name in ("mean", "std"):
            archive.writestr(f"{name}.npy", npy(np.zeros(3, np.float32), (10**12,)))
    assert bomb.stat().st_size < 1 << 20
    session = StreamingSession(load_bundle(bundle))
    with Cost() as cost:
        for path in (bomb, promise):
            shutil.copyfile(path, bundle / "gcmvn.npz")
            assert "gcmvn.npz" in refusal(ManifestError, lambda: load_bundle(bundle))
            assert str(path) in refusal(SessionError, lambda p=path: session.restore(p))
            assert str(path) in refusal(CheckpointError, lambda p=path: load_kmeans(p))
        assert "needs 4000000000000 bytes" in refusal(
            AudioError, lambda: read_array(npy(np.zeros(3, np.float32), (10**12,)), "x.npy", AudioError)
        )
    assert cost.seconds < 5 and cost.megabytes < 300


def test_14_weights_that_promise_more_than_they_hold(bundle: Path) -> None:
    """A view that repeats one number a thousand million times, and a compressed archive."""
    content = torch.load(bundle / "model.pt", weights_only=True)
    name = next(iter(content["model"]))
    content["model"][name] = torch.zeros(1).expand(10**9)
    torch.save(content, bundle / "model.pt")
    with Cost() as cost:
        line = refusal(CheckpointError, lambda: load_bundle(bundle))
        assert f"{name} has shape [1000000000], but not so many" in line
        with zipfile.ZipFile(bundle / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(1 << 28))
        assert "would unpack to" in refusal(CheckpointError, lambda: read_weights(bundle / "model.pt"))
    assert cost.seconds < 5 and cost.megabytes < 300


# ------------------------------------------------------------------------------------------- 15: paths from files


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "a/../../secret", "", 7, None, "a\0b"])
def test_15_names_stay_inside(tmp_path: Path, name: Any) -> None:
    directory = tmp_path / "inner"
    directory.mkdir()
    assert "file" in refusal(CheckpointError, lambda: inside(directory, name, "files.x", CheckpointError))
    assert inside(directory, "a/b.txt", "files.x", CheckpointError) == directory / "a" / "b.txt"


def test_15_a_checkpoint_reads_and_exports_its_own_files_only(bundle: Path, graphs: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    links = [(name, bundle) for name in ("spm.src.model", "dict.tgt.txt", "MODEL_CARD.md")]
    for file, link in (*links, ("onnx/mt.onnx", graphs), ("model.safetensors", graphs)):
        kept = (link / file).read_bytes()
        (link / file).unlink()
        (link / file).symlink_to(secret)
        if file == "MODEL_CARD.md":
            line = refusal(CheckpointError, lambda: export_directory(bundle, tmp_path / "out"))
        else:
            line = refusal(CheckpointError, lambda d=link: load_bundle(d))
        assert "leads out of" in line
        (link / file).unlink()
        (link / file).write_bytes(kept)
    for name in ("/etc/passwd", "../secret"):
        settings(bundle, lambda v, n=name: v["files"].update(source_spm=n))
        for work in (lambda: load_bundle(bundle), lambda: export_directory(bundle, tmp_path / "out")):
            assert "files.source_spm" in refusal(CheckpointError, work)
    assert not (tmp_path / "out").exists()
    settings(bundle, lambda v: v.update(files={"source_spm": 7}))
    assert "files.source_spm is 7" in refusal(CheckpointError, lambda: load_bundle(bundle))


HEADER = "id\tsrc_audio\tsrc_n_frames\tsrc_text\ttgt_text\ttgt_audio\ttgt_n_frames\n"


@pytest.mark.parametrize("audio", ["/etc/passwd", "../../x.wav", "clips/../../x.npy", "../x.zip:0:10"])
def test_15_manifests_stay_inside_their_audio_root(tmp_path: Path, audio: str) -> None:
    root = tmp_path / "inner"
    root.mkdir()
    (root / "train.tsv").write_text(f"{HEADER}u\t{audio}\t90\thola\thello\t1 2\t2\n")
    assert "line 2: src_audio" in refusal(ManifestError, lambda: read_manifest(root / "train.tsv"))
    for work in (load_samples, load_features):
        assert "leads out of" in refusal(AudioError, lambda w=work: w(root, audio))


def test_15_links_in_an_audio_root(tmp_path: Path) -> None:
    root = tmp_path / "inner"
    root.mkdir()
    np.save(tmp_path / "x.npy", np.zeros((3, 80), np.float32))
    (root / "x.npy").symlink_to(tmp_path / "x.npy")
    assert "leads out of" in refusal(AudioError, lambda: load_features(root, "x.npy"))
    np.save(root / "y.npy", np.zeros((3, 80), np.float32))
    assert load_features(root, "y.npy").shape == (3, 80)


def test_15_ready_speech_stays_inside(tmp_path: Path) -> None:
    from echostream.data.corpus.sources import ReadySpeech

    ready = tmp_path / "ready"
    ready.mkdir()
    (ready / "manifest.tsv").write_text("row\taudio\tvoice\n0\t../../x.wav\ta\n")
    assert "leads out of" in refusal(AudioError, lambda: ReadySpeech(ready).load("000000"))


# --------------------------------------------------------------------------- 16: values used before they are checked


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda v: v.update(policy=[1]), "config.yaml: policy", id="policy-list"),
        pytest.param(lambda v: v["policy"].update(beem=3), "policy has the unknown key 'beem'", id="misspelt"),
        pytest.param(lambda v: v["policy"].update(policy="magic"), "policy: policy is 'magic'", id="policy"),
        pytest.param(lambda v: v["policy"].update(alignatt_frames="15"), "alignatt_frames is", id="knob"),
        pytest.param(lambda v: v["policy"].update(segmenter="wish"), "policy: segmenter is 'wish'", id="segmenter"),
        pytest.param(lambda v: v["policy"].update(segmenter=["pause"]), "segmenter is [", id="segments"),
        pytest.param(lambda v: v["policy"].update(speech="no"), "policy: speech is 'no'", id="speech"),
        pytest.param(lambda v: v.update(source_lang=7), "config.yaml: source_lang is 7", id="language"),
        pytest.param(lambda v: v.update(sample_rate=8000), "config.yaml: sample_rate is 8000", id="rate"),
        pytest.param(lambda v: v.update(files="all"), "config.yaml: files is 'all'", id="files"),
        pytest.param(lambda v: v["files"].update(weights="model.pt"), "files has the unknown key 'weights'", id="file"),
        pytest.param(lambda v: v.update(model=None), "config.yaml: model", id="no-model"),
        pytest.param(lambda v: v["model"].update({7: 8}), "model", id="number-as-key"),
        pytest.param(lambda v: v["model"].update(dropout="x"), "model: dropout is 'x'", id="dropout"),
        pytest.param(lambda v: v["model"].update(full_context=3), "model: full_context is 3", id="bool"),
        pytest.param(lambda v: v["model"].update(encoder_layers=None), "model: encoder_layers is None", id="null"),
        pytest.param(lambda v: v["model"].update(encoder_layers=True), "model: encoder_layers is True", id="true"),
        pytest.param(lambda v: v["model"].update(unit_decoder_input=["mt"]), "model: unit_decoder_input", id="choice"),
        pytest.param(lambda v: v["model"].update(train_contexts=[8]), "model: train_contexts is [8]", id="text"),
        pytest.param(lambda v: v["model"].update(input_feat_per_channel=82), "features have 80 bins", id="bins"),
        pytest.param(lambda v: v.update(digests={"model.pt": "0" * 64}), "model.pt is not the file", id="digest"),
        pytest.param(lambda v: v.update(digests={"../x": "0" * 64}), "leads out of", id="digest-path"),
        pytest.param(lambda v: v.update(digests={"model.pt": 7}), "digests.model.pt is 7", id="digest-kind"),
        pytest.param(lambda v: v.update(format=None), "is of format None", id="format"),
    ],
)  # fmt: skip
def test_16_every_value_of_a_configuration(bundle: Path, change: Callable, named: str) -> None:
    settings(bundle, change)
    assert named in refusal(EchoStreamError, lambda: load_bundle(bundle))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda v: v.pop("digest"), "lacks the key 'digest'", id="no-digest"),
        pytest.param(lambda v: v.update(digest="0" * 64), "not those that its config.json names", id="digest"),
        pytest.param(lambda v: v.update(precision="fp8"), "precision is 'fp8'", id="precision"),
        pytest.param(lambda v: v.update(vocoder="yes"), "vocoder is 'yes'", id="vocoder"),
        pytest.param(lambda v: v.update(parameters={"encoder": "x"}), "parameters.encoder is 'x'", id="parameters"),
    ],
)  # fmt: skip
def test_16_every_value_of_an_export(graphs: Path, change: Callable, named: str) -> None:
    settings(graphs, change)
    assert named in refusal(CheckpointError, lambda: load_bundle(graphs))


def resaved(path: Path, change: Callable[[dict], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("file", ["model.pt", "vocoder.pt"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda s, n: s[n].reshape(-1).fill_(float("nan")), "holds NaN or infinity", id="nan"),
        pytest.param(lambda s, n: s[n].reshape(-1)[:1].fill_(float("inf")), "holds NaN or infinity", id="inf"),
        pytest.param(lambda s, n: s.update({n: None}), "", id="none"),
        pytest.param(lambda s, n: s.update({n: s[n].to_sparse()}), "of a kind that is not read", id="sparse"),
        pytest.param(lambda s, n: s.update({n: s[n].to(torch.complex64)}), "of a kind that is not read", id="complex"),
        pytest.param(lambda s, n: s.update({n: s[n].new_zeros(2, 2)}), "", id="shape"),
        pytest.param(lambda s, n: s.update({7: s.pop(n)}), "no name of a weight", id="name"),
        pytest.param(lambda s, n: s.clear(), "", id="empty"),
    ],
)
def test_16_weights(bundle: Path, file: str, change: Callable, named: str) -> None:
    def break_one(content: dict) -> None:
        state = content.get("model") or content["generator"]
        change(state, next(name for name in state if name.endswith("weight") or name.endswith("weight_v")))

    resaved(bundle / file, break_one)
    settings(bundle, lambda v: None)
    line = refusal(CheckpointError, lambda: load_bundle(bundle))
    assert named in line and file in line


@pytest.mark.parametrize("content", [{}, [], {"format": "echostream/1"}, {"format": "echostream/1", "model": 7}, 3])
def test_16_models_that_are_none(bundle: Path, content: Any) -> None:
    torch.save(content, bundle / "model.pt")
    assert "model.pt" in refusal(CheckpointError, lambda: load_bundle(bundle))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param(b"hola 1\nhola 2\n", "line 2: 'hola' has been there before", id="double"),
        pytest.param(b"<unk> 1\n", "line 1: '<unk>' has been there before", id="special"),
        pytest.param("señor 1\n".encode("latin-1"), "not UTF-8", id="latin-1"),
        pytest.param("hola 1\n".encode("utf-16"), "UTF-16", id="utf-16"),
        pytest.param(b"hola\n", "line 1: 'hola' is not 'symbol count'", id="no-count"),
        pytest.param("hola ²\n".encode(), "is not 'symbol count'", id="no-number"),
    ],
)
def test_16_dictionaries(tmp_path: Path, text: bytes, named: str) -> None:
    path = tmp_path / "dict.txt"
    path.write_bytes(text)
    line = refusal(ManifestError, lambda: Vocabulary.load(path))
    assert named in line and str(path) in line


def test_16_dictionaries_with_odd_letters_and_marks(tmp_path: Path) -> None:
    path = tmp_path / "dict.txt"
    path.write_bytes("\ufeffa 1\r\n\u2028 2\n\x0c 3\na 4 #fairseq:overwrite\n".encode())
    assert Vocabulary.load(path).symbols[4:] == ["a", "\u2028", "\x0c", "a"]


def test_16_subword_models(bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    from echostream.checkpoint import save_bundle
    from echostream.checkpoint.fairseq import read_fairseq_checkpoint

    good = (bundle / "spm.src.model").read_bytes()
    other = (bundle / "spm.tgt.model").read_bytes()
    settings(bundle, lambda v: None)
    for data, named in ((b"garbage", "not a Sentence"), (b"", "not a Sentence"), (other, "pieces that dict")):
        (bundle / "spm.src.model").write_bytes(data)
        assert named in refusal(ManifestError, lambda: load_bundle(bundle))
        with pytest.raises(ManifestError):
            export_directory(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (bundle / "spm.src.model").write_bytes(good)
    load_bundle(bundle)
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (data / "spm.src.model").write_bytes(b"garbage")
    state = torch.load(bundle / "model.pt", weights_only=True)["model"]
    with pytest.raises(ManifestError):
        save_bundle(tmp_path / "saved", state, tiny_config(), data)
    assert not (tmp_path / "saved").exists()
    torch.save({"model": {"w": torch.tensor([float("nan")])}, "cfg": 7}, tmp_path / "f.pt")
    assert "f.pt: w holds NaN" in refusal(CheckpointError, lambda: read_fairseq_checkpoint(tmp_path / "f.pt"))


def test_16_graphs_are_those_that_were_exported(graphs: Path) -> None:
    """A damaged graph, one in another's place, and one of another model that signs itself."""
    mt, units = graphs / "onnx" / "mt.onnx", graphs / "onnx" / "units.onnx"
    whole = mt.read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 1
    mt.write_bytes(broken)
    assert "digest" in refusal(CheckpointError, lambda: load_bundle(graphs))
    mt.write_bytes(units.read_bytes())
    assert "digest" in refusal(CheckpointError, lambda: load_bundle(graphs))

    def sign(values: dict) -> None:
        values["digest"] = load_digest(graphs)

    settings(graphs, sign)
    signed = load_bundle(graphs)
    assert "mt.onnx is of another model: its inputs differ in" in refusal(
        CheckpointError, lambda: StreamingSession(signed)
    )
    mt.write_bytes(whole)
    settings(graphs, sign)
    StreamingSession(load_bundle(graphs)).push(noise(0.5))


def test_16_weights_and_what_graphs_want_of_them(graphs: Path) -> None:
    """Weights that are not finite, of another size or missing, and graphs that would read other files."""
    onnx = pytest.importorskip("onnx")
    encoder, weights = graphs / "onnx" / "encoder.onnx", graphs / "model.safetensors"
    graph, good = onnx.load(encoder, load_external_data=False), TensorFile(weights)
    tensors, name = {name: np.array(good[name]) for name in good.names}, "encoder.layers.0.fc1.bias"

    def refused(tensors: dict[str, np.ndarray], change: Callable[[Any], object] = lambda g: None) -> str:
        write_tensors(weights, tensors, good.metadata)
        changed = type(graph)()
        changed.CopyFrom(graph)
        change(changed.graph)
        encoder.write_bytes(changed.SerializeToString())
        settings(graphs, lambda v: v.update(digest=load_digest(graphs)))
        return refusal(CheckpointError, lambda: StreamingSession(load_bundle(graphs)))

    def elsewhere(graph: Any) -> None:
        (graphs / "onnx" / "weights").write_bytes(bytes(4))
        tensor = onnx.TensorProto(name="x", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="weights")
        node = onnx.helper.make_node("Constant", [], ["x"], value=tensor)
        graph.node.insert(0, node)

    assert f"{name} holds NaN or infinity" in refused({**tensors, name: np.full_like(tensors[name], np.nan)})
    assert "encoder.onnx wants" in refused({**tensors, name: tensors[name][1:]})
    assert f"lack '{name}'" in refused({key: value for key, value in tensors.items() if key != name})
    assert "weights in other files" in refused(tensors, elsewhere)


def load_digest(directory: Path) -> str:
    names = ("encoder", "heads", "mt_memory", "mt", "unit_memory", "units", "voice_units", "voice_frames")
    return sha256(directory / "model.safetensors", *(directory / "onnx" / f"{name}.onnx" for name in names))


@pytest.mark.parametrize("changes", [
    {}, {"right_context_length": 2}, {"unit_decoder_input": "mt-tokens"}, {"unit_decoder_input": "encoder"},
    {"st_decoder_layers": 0, "memory_size": 0}, {"encoder_stem": "whisper", "encoder_position_period": 50},
    {"encoder_conv_kernel": 3, "encoder_relative_bias": True}, {"asr_decoder_layers": 2, "st_decoder_layers": 0},
], ids=str)  # fmt: skip
def test_16_names_of_graphs_are_those_that_are_written(changes: dict) -> None:
    """The table of names and the export say the same, so that neither changes alone."""
    from echostream.models.decoders.vocoder import CodeHiFiGAN
    from echostream.models.echostream_model import build_echostream_model
    from echostream.models.graphs import model_graphs

    config, voice = tiny_config(**changes), tiny_voice()

    steps = model_graphs(build_echostream_model(config).eval())
    written = {name: (set(step.inputs), set(step(step.example()))) for name, step in steps.items()}
    for name, model in make_voice_graphs(CodeHiFiGAN(voice).eval()).items():
        graph = model.graph
        written[name] = {value.name for value in graph.input}, {value.name for value in graph.output}
    assert graph_names(config, voice) == written


@pytest.mark.parametrize(
    "key", ["upsample_rates", "resblock_dilation_sizes", "causal", "num_embeddings", "frame_layers"]
)
@pytest.mark.parametrize("value", ["x", [["x"]], {"a": 1}, -1, 10**9, 1e30, [10**9] * 4], ids=str)
def test_16_vocoder_configurations(bundle: Path, key: str, value: Any) -> None:
    values = json.loads((bundle / "vocoder.json").read_text())
    (bundle / "vocoder.json").write_text(json.dumps({**values, key: value}))
    settings(bundle, lambda v: None)
    line = refusal(ConfigError, lambda: load_bundle(bundle))
    assert key in line and "vocoder.json" in line


def test_16_a_voice_of_other_units(bundle: Path) -> None:
    values = json.loads((bundle / "vocoder.json").read_text())
    (bundle / "vocoder.json").write_text(json.dumps({**values, "num_embeddings": 5}))
    settings(bundle, lambda v: None)
    assert "vocoder.pt" in refusal(CheckpointError, lambda: load_bundle(bundle))


def test_16_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = KMeans(rng.standard_normal((4, 3)).astype(np.float32), Projection.identity(3), "mfcc")
    path = tmp_path / "kmeans.npz"
    model.save(path)
    assert load_kmeans(path).features == "mfcc"
    whole = dict(np.load(path))
    for name, array in {
        "centroids": np.full((4, 3), np.nan, np.float32), "mean": np.zeros(4, np.float32), "scale": np.zeros((3, 3)),
        "remove": np.array(["a"]), "features": np.array({}, dtype=object),
    }.items():  # fmt: skip
        np.savez(path, **{**whole, name: array})
        assert name in refusal(CheckpointError, lambda: load_kmeans(path))
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.npy", npy(np.zeros(2)))
        archive.writestr("a.npy", npy(np.zeros(2)))
    assert "twice" in refusal(ConfigError, lambda: read_npz(path, "archive", ConfigError, 10**6))


def test_16_rules_speak_of_key_and_value() -> None:
    rules = {"n": Rule(int, 1, 9), "names": Rule(list, 0, 2, of=Rule(str, 1, 3)), "on": Rule(bool, needed=True)}
    check({"n": 3, "names": ["a"], "on": True, "other": 1}, rules, "x.yaml", ConfigError)
    for values, message in (
        ({"on": 1}, "x.yaml: on is 1; it must be true or false"),
        ({"on": True, "n": 10}, "x.yaml: n is 10; it must be a whole number from 1 to 9"),
        ({"on": True, "n": 1.0}, "x.yaml: n is 1.0"),
        ({"on": True, "names": ["a", ""]}, "x.yaml: names.1 is ''; it must be text from 1 to 3 letters"),
        ({}, "x.yaml lacks the key 'on': true or false"),
        ([], "x.yaml is []; it must be key: value lines"),
    ):
        assert message in refusal(ConfigError, lambda v=values: check(v, rules, "x.yaml", ConfigError))
    assert "unknown key 'other'" in refusal(
        ConfigError, lambda: check({"on": True, "other": 1}, rules, "x", ConfigError, others=False)
    )


# ------------------------------------------------------------------------------------------- 16: saved sessions


def saved_with(path: Path, header: Callable[[dict], object] | None = None, **arrays: Any) -> None:
    """Change a saved session: its header, or some of its arrays (None takes one out)."""
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    if header is not None:
        values = json.loads(found["header"].tobytes())
        header(values)
        found["header"] = np.frombuffer(json.dumps(values).encode(), np.uint8)
    found.update({name.replace("__", "."): array for name, array in arrays.items()})
    np.savez(path, **{name: array for name, array in found.items() if array is not None})


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(dict(header=lambda v: v["clock"].update(due=-(10**12))), id="due"),
        pytest.param(dict(header=lambda v: v["clock"].update(rate=10**9)), id="rate"),
        pytest.param(dict(header=lambda v: v["clock"]["resample"].update(count=10**6)), id="resampler"),
        pytest.param(dict(header=lambda v: v.update(seconds={})), id="seconds"),
        pytest.param(dict(header=lambda v: v.update(elapsed_s="long")), id="elapsed"),
        pytest.param(dict(header=lambda v: v["stream"]["sentence"].update(memory=[-1] * 3)), id="memory"),
        pytest.param(
            dict(header=lambda v: v["stream"]["sentence"].update(memory=[9], begun=True)), id="part-of-a-memory"
        ),
        pytest.param(dict(header=lambda v: v["stream"].update(source_symbol=10**6)), id="symbol"),
        pytest.param(dict(header=lambda v: v["stream"]["sentence"].update(start=10**6)), id="start"),
        pytest.param(dict(header=lambda v: v["stream"]["sentence"].pop("index")), id="index"),
        pytest.param(dict(stream__sentence__tokens=np.array([10**9])), id="tokens"),
        pytest.param(dict(stream__sentence__source=np.array([[5, 10**9]])), id="spoken"),
        pytest.param(dict(stream__recent=np.zeros((3, 7), np.float32)), id="recent"),
        pytest.param(dict(clock__samples=np.zeros(10**6, np.float32)), id="samples"),
        pytest.param(dict(clock__fbank__samples=np.full(400, np.nan, np.float32)), id="nan"),
        pytest.param(dict(clock__heard=None), id="lacks"),
        pytest.param(dict(header__=None), id="nothing"),
    ],
)
def test_16_saved_sessions(tiny_bundle: Path, exported: Path, tmp_path: Path, backend: str, damage: dict) -> None:
    session = StreamingSession(load_bundle(tiny_bundle if backend == "torch" else exported))
    path = tmp_path / "saved.npz"
    session.push(noise(2.0))
    session.save(path)
    if "header__" in damage:
        np.savez(path, header=np.zeros(0, np.uint8))
    else:
        saved_with(path, **damage)
    assert str(path) in refusal(SessionError, lambda: session.restore(path))
    session.push(noise(0.5))
    session.finish()


def test_16_a_missing_array_is_told_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    """A saved session has sixty arrays, whose names are not all told."""
    session = StreamingSession(load_bundle(tiny_bundle))
    session.save(tmp_path / "saved.npz")
    arrays = dict(np.load(tmp_path / "saved.npz"))
    np.savez(tmp_path / "saved.npz", **{f"{name}x": array for name, array in arrays.items()})
    message = refusal(SessionError, lambda: session.restore(tmp_path / "saved.npz"))
    assert "lacks the array 'header'; it has: " in message and len(message) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_16_every_array_of_a_saved_session(tiny_bundle: Path, exported: Path, tmp_path: Path, backend: str) -> None:
    """Each array in turn of another shape, of another kind, and full of what it must not hold."""
    session = StreamingSession(load_bundle(tiny_bundle if backend == "torch" else exported))
    path = tmp_path / "saved.npz"
    session.push(noise(2.0))
    session.save(path)
    whole = dict(np.load(path))
    for name, array in whole.items():
        if name == "header":
            continue
        others = [np.zeros((2, 3, 1), array.dtype), array.astype(np.complex64)]
        if array.size:
            others.append(np.full_like(array, np.nan if array.dtype.kind == "f" else -7))
        for other in others:
            np.savez(path, **{**whole, name: other})
            assert str(path) in refusal(SessionError, lambda: session.restore(path))
    np.savez(path, **whole)
    session.restore(path)
    session.finish()


# ------------------------------------------------------------------------------------------- 17: whole or not at all


EXPORTS_THAT_DIE = """
import os, shutil, signal, sys
import onnx
from echostream.export import directory
from echostream.streaming.exported.model import SPEECH_GRAPHS, TEXT_GRAPHS, VOICE_GRAPHS

source, exported, folder, traced = sys.argv[1:5]
names = (*TEXT_GRAPHS, *SPEECH_GRAPHS, *VOICE_GRAPHS)
graphs = {name: onnx.load(f"{traced}/{name}.onnx") for name in names}  # for tracing takes seconds
directory.make_graphs = lambda model, vocoder: graphs
directory.compare = lambda bundle, exported: {}
events = "open os.mkdir os.rename os.remove os.rmdir shutil.rmtree shutil.copyfile ctypes.dlopen".split()
for point in map(int, sys.argv[5:]):
    out = f"{folder}/{point}"
    shutil.copytree(exported, out)
    if (pid := os.fork()) == 0:
        left = point

        def hook(event, args):
            global left
            if event in events and (event == "ctypes.dlopen" or folder in str(args[:1])):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        directory.export_directory(source, out, int8=True)
        os._exit(0)
    print(point, os.waitpid(pid, 0)[1], flush=True)
"""


def test_17_kill_during_export(
    tiny_bundle: Path, exported: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Wherever in its writing the process is killed, the directory is the old export or the new one."""
    import onnx

    from echostream.export.directory import make_graphs

    source, traced = load_bundle(tiny_bundle), tmp_path_factory.mktemp("traced")
    for name, graph in make_graphs(source.model, source.vocoder).items():
        onnx.save(graph, traced / f"{name}.onnx")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    points = [*range(0, 40, 5), 10_000]
    command = [sys.executable, "-c", EXPORTS_THAT_DIE, str(tiny_bundle), str(exported), str(tmp_path), str(traced)]
    command += map(str, points)
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True).stdout
    ends = dict(map(int, line.split()) for line in said.splitlines())
    assert list(ends) == points and ends[10_000] == 0 and sum(code == signal.SIGKILL for code in ends.values()) > 5
    old = load_bundle(exported).digest
    found = {}
    for point in points:
        bundle = load_bundle(tmp_path / str(point))
        found[point] = bundle.model.precision
        assert (bundle.digest == old) == (bundle.model.precision == "fp32")
    assert found[0] == "fp32" and found[10_000] == "int8"
    StreamingSession(bundle).push(noise(0.4))


def test_17_a_failed_save_keeps_the_one_before(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, path = StreamingSession(load_bundle(tiny_bundle)), tmp_path / "saved.npz"
    session.push(noise(1.0))
    session.save(path)
    before = path.read_bytes()

    def half(file: Any, **arrays: Any) -> None:
        file.write(b"PK\x03\x04 half")
        raise OSError(28, "No space left on device")

    session.push(noise(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        assert "No space left" in refusal(EchoStreamError, lambda: session.save(path))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["saved.npz"]
    session.restore(path)


# ------------------------------------------------------------------------------- 19: one bundle, one way to translate


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_policy_arguments(parser)
    add_segmenter_arguments(parser)
    return parser.parse_args(arguments)


def by_command_line(bundle: Any, *arguments: str) -> StreamingSession:
    return StreamingSession(bundle, **session_options(parsed(*arguments), bundle))


PREFERRED = dict(
    policy="alignatt", alignatt_frames=15, lagging_k1=3, chunk_ms=640, beam=4, segmenter="none", max_sentence_s=5.0
)


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ({}, ()),
        ({"policy": "alignatt"}, ("--policy", "alignatt")),
        ({"policy": "ctc"}, ("--policy", "ctc")),
        ({"alignatt_frames": 3}, ("--alignatt-frames", "3")),
        ({"policy": "wait-k", "wait_k": 5}, ("--policy", "wait-k", "--wait-k", "5")),
        ({"segmenter": "punctuation", "beam": 1}, ("--segmenter", "punctuation", "--beam", "1")),
        ({"chunk_ms": 320, "max_sentence_s": 8.0}, ("--chunk-ms", "320", "--max-sentence-s", "8")),
    ],
    ids=str,
)
def test_19_interface_command_line_and_agent_agree(bundle: Path, said: dict, arguments: tuple[str, ...]) -> None:
    settings(bundle, lambda v: v.update(policy=PREFERRED))
    loaded = load_bundle(bundle)
    engines = [
        StreamingSession(loaded, **said).engine, SessionBatch(loaded, capacity=1, **said).engine,
        by_command_line(loaded, *arguments).engine,
    ]  # fmt: skip
    pytest.importorskip("simuleval")
    from agent.echostream_agent import EchoStreamTextAgent

    parser = argparse.ArgumentParser()
    EchoStreamTextAgent.add_args(parser)
    args = parser.parse_args(["--checkpoint-dir", str(bundle), *arguments])
    args.device, args.output_type = "cpu", "text"
    engines.append(EchoStreamTextAgent(args).build_states().session.engine)
    first = engines[0]
    for engine in engines[1:]:
        assert (engine.policy, engine.segmenter.name, engine.max_frames) == (
            first.policy, first.segmenter.name, first.max_frames
        )  # fmt: skip
        assert (engine.settings.chunk_ms, engine.settings.beam) == (first.settings.chunk_ms, first.settings.beam)
    assert first.segmenter.name == said.get("segmenter", "none") + "+speech(0.5, 480 ms)"
    if said.get("policy", "alignatt") == "alignatt":
        assert first.policy.alignatt_frames == said.get("alignatt_frames", 15)
    if said.get("policy") == "ctc":
        assert first.policy.lagging_k1 == 3
    assert first.max_frames == (200 if "max_sentence_s" in said else 125)


def test_19_options_are_refused_by_their_spelling(tiny_bundle: Path) -> None:
    loaded = load_bundle(tiny_bundle)
    for said, message in (
        ({"wish": 1}, "unknown setting 'wish'"),
        ({"policy": "ctc", "wait_k": 3}, "wait_k is no knob of policy 'ctc'"),
        ({"min_pause_ms": 300}, "min_pause_ms is for segmenter pause, not for punctuation"),
        ({"max_sentence_s": 1e9}, "max_sentence_s is 1e+09"),
        ({"max_sentence_s": "8"}, "max_sentence_s is '8'"),
        ({"speech": 1}, "speech is 1; it must be true or false"),
    ):
        assert message in refusal(ConfigError, lambda s=said: StreamingSession(loaded, **s))
    policy = resolve(loaded, {}).policy
    assert "made already" in refusal(ConfigError, lambda: resolve(loaded, {"policy": policy, "lagging_k1": 2}))
    assert "--wait-k is no knob" in refusal(ConfigError, lambda: session_options(parsed("--wait-k", "3"), loaded))
    assert len(OPTIONS) == len(set(OPTIONS))
