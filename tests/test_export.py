"""Exported graphs: the same as the torch model, without torch, for streams of any age, and refusals."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import echostream  # noqa: E402
from echostream.audio.io import load_audio, read_audio, write_audio  # noqa: E402
from echostream.audio.stream import to_pcm  # noqa: E402
from echostream.checkpoint import load_bundle, save_bundle  # noqa: E402
from echostream.cli import main  # noqa: E402
from echostream.config import EchoStreamConfig  # noqa: E402
from echostream.errors import CheckpointError, ConfigError, EchoStreamError, SessionError, UnitError  # noqa: E402
from echostream.export import directory  # noqa: E402
from echostream.export.check import TOLERANCE, Comparison, compare  # noqa: E402
from echostream.export.directory import export_directory, make_voice_graphs  # noqa: E402
from echostream.export.weights import CONSTANT, weights_of, write_graphs  # noqa: E402
from echostream.models.decoders.vocoder import CodeHiFiGAN  # noqa: E402
from echostream.models.decoders.vocoder_config import VocoderConfig  # noqa: E402
from echostream.models.echostream_model import build_echostream_model  # noqa: E402
from echostream.models.graphs import EncoderGraph, StepGraph  # noqa: E402
from echostream.models.subsampler import Subsampler  # noqa: E402
from echostream.streaming import SentenceEnd, SessionBatch, StreamingSession, TargetText, Waveform  # noqa: E402
from echostream.streaming.exported import onnx_runtime  # noqa: E402
from echostream.streaming.exported.encoder import ring_ages, segment_mask, turn, write_ring  # noqa: E402
from echostream.streaming.exported.model import ExportedModel  # noqa: E402
from echostream.streaming.exported.names import graph_names  # noqa: E402
from echostream.streaming.exported.stages import ExportedStages  # noqa: E402
from echostream.streaming.exported.subsampling import patches, windows  # noqa: E402
from echostream.streaming.exported.torch_model import TorchModel  # noqa: E402
from echostream.streaming.exported.voice import ExportedVocoder  # noqa: E402
from echostream.streaming.search import Chosen  # noqa: E402
from echostream.streaming.stages import Encode, Extend, NewSentence, ReadUnits, Search, Vocode, Write  # noqa: E402
from tests.conftest import tiny_config, tiny_voice  # noqa: E402
from tests.test_streaming import speech  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def exported(traced_once: None, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_directory(tiny_bundle, tmp_path_factory.mktemp("exported") / "fp32")[0]


@pytest.fixture(scope="module")
def int8(traced_once: None, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_directory(tiny_bundle, tmp_path_factory.mktemp("exported") / "int8", int8=True)[0]


def bundle_of(data: Path, folder: Path, voice: VocoderConfig | None = None, **changes: object) -> Path:
    """A checkpoint directory of an untrained tiny model."""
    from echostream.models.decoders.vocoder_checkpoint import save_vocoder

    config = tiny_config(**changes)
    files = None
    if voice is not None:
        files = folder / "voice.pt", folder / "voice.json"
        torch.manual_seed(3)
        save_vocoder(CodeHiFiGAN(voice), *files)
    quiet = {"speech_gate": False}  # nobody speaks in what the tests make
    return save_bundle(folder / "bundle", random_model(config).state_dict(), config, data, vocoder=files, policy=quiet)


def random_model(config: EchoStreamConfig) -> torch.nn.Module:
    """An untrained model in which nothing is left at zero."""
    torch.manual_seed(3)
    model = build_echostream_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if model.unit_decoder.tokens is not None:
            torch.nn.init.normal_(model.unit_decoder.tokens.weight)
    return model


def said(session: StreamingSession, samples: np.ndarray) -> tuple[list, np.ndarray]:
    """What a session says of a recording pushed in uneven pieces: its events without times, and its speech."""
    events = []
    for part in np.split(samples, [100, 9000, 9001, 30000]):
        events += session.push(part)
    events += session.finish()
    waves = [e.samples for e in events if isinstance(e, Waveform)]
    texts = [(type(e).__name__, getattr(e, "tokens", ()), getattr(e, "units", ())) for e in events]
    return texts, np.concatenate([np.zeros(0, np.float32), *waves])


# ---------------------------------------------------------------------------------------------------- parity with torch


WHISPER = dict(
    encoder_stem="whisper", encoder_normalize_before=True, encoder_final_norm=True, encoder_activation="gelu",
    encoder_position_period=50, memory_size=0, mt_decoder_form="whisper", mt_decoder_prompt=3, st_decoder_embed_dim=16,
    st_decoder_ffn_dim=24,
)  # fmt: skip
FAMILY = {
    "default": {},
    "right-context": dict(right_context_length=2, encoder_normalize_before=True),
    "no-memory": dict(memory_size=0, left_context_length=9, segment_length=3),
    "no-left": dict(left_context_length=0, st_decoder_layers=0),
    "shifted": dict(left_context_length=5, right_context_length=1, shift_context=True),
    "encoder-units": dict(unit_decoder_input="encoder", ctc_upsample_ratio=1, st_left_context=1),
    "token-units": dict(unit_decoder_input="mt-tokens"),
    "single-frame": dict(
        segment_length=1, memory_size=5, unit_decoder_embed_dim=16, mt_decoder_embed_dim=48, mt_decoder_heads=3
    ),
    "gelu": dict(encoder_activation="gelu", encoder_normalize_before=True),
    "positions": dict(encoder_position_period=7),
    "relative-bias": dict(encoder_relative_bias=True, right_context_length=1),
    "convolution": dict(encoder_conv_kernel=5),
    "asr-layers": dict(asr_decoder_layers=2, st_decoder_embed_dim=16),
    "asr-condition": dict(asr_decoder_layers=3, asr_condition_every=2, st_decoder_embed_dim=16),
    "asr-layers-alone": dict(asr_decoder_layers=1, st_decoder_layers=0),
    "whisper": {**WHISPER, "right_context_length": 2},
    "shifted-whisper": {**WHISPER, "shift_context": True, "encoder_relative_bias": True},
    "everything": {
        **WHISPER, "memory_size": 3, "encoder_relative_bias": True, "encoder_conv_kernel": 4, "right_context_length": 1
    },
}  # fmt: skip
STAGES = {"encoder", "ASR head", "ST head", "MT decoder", "MT attention", "unit decoder"}


@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY)
def test_steps_and_their_bookkeeping_compute_what_the_model_does(changes: dict) -> None:
    """All options, run by torch, without an export."""
    config = tiny_config(**changes)
    bundle = SimpleNamespace(config=config, model=random_model(config), vocoder=None)
    stepping = SimpleNamespace(config=config, model=TorchModel(bundle.model), vocoder=None)
    differences = Comparison(bundle, stepping).run()
    assert differences.keys() == STAGES and max(differences.values()) <= 1e-5
    inputs = {name: set(step.inputs) for name, step in stepping.model.graphs.items()}
    assert inputs == {name: names.inputs for name, names in graph_names(config).items()}


@pytest.mark.parametrize("name", ["everything", "whisper"])
def test_graphs_compute_what_torch_does(tiny_data: Path, tmp_path: Path, name: str) -> None:
    checkpoint = bundle_of(tiny_data, tmp_path, tiny_voice(), **FAMILY[name])
    folder, differences = export_directory(checkpoint, tmp_path / "out")
    assert differences.keys() == STAGES | {"vocoder"} and max(differences.values()) <= TOLERANCE
    again = compare(load_bundle(checkpoint), load_bundle(folder), seed=5)
    assert max(again.values()) <= TOLERANCE


CHOICE = dict(
    encoder_embed_dim=20, var_pred_hidden_dim=12, var_pred_kernel_size=5, var_pred_max_frames=4, var_pred_layers=2
)


@pytest.mark.parametrize(
    "changes",
    [
        dict(resblock="1", resblock_stages=None),
        dict(context_layers=0, lookahead_units=0, position_buckets=0, frame_layers=0, dur_predictor_params=None),
        dict(lookahead_units=0, upsample_kernel_sizes=[11, 9, 5, 33]),
        dict(dur_predictor_params=CHOICE),
        dict(dur_predictor_params={**CHOICE, "var_pred_kernel_size": 3}, lookahead_units=1),
        dict(dur_predictor_params={**CHOICE, "var_pred_kernel_size": 7, "var_pred_layers": 0}),
    ],
    ids=["type-1-blocks", "bare", "odd-kernels", "choice", "short-choice", "wide-choice"],
)
def test_voices_sound_the_same(tmp_path: Path, changes: dict) -> None:
    torch.manual_seed(3)
    vocoder = CodeHiFiGAN(VocoderConfig.from_dict({**tiny_voice().to_dict(), **changes})).eval()
    write_graphs(tmp_path, make_voice_graphs(vocoder), weights_of(vocoder=vocoder), int8=False)
    speaker = ExportedVocoder(vocoder.config, ExportedModel(tmp_path), rows=1)
    units = np.random.default_rng(0).integers(0, vocoder.config.num_embeddings, 40)
    with torch.inference_mode():
        expected = vocoder(torch.from_numpy(units)[None])[0][0].numpy()
    for sizes in ([40], [1, 7, 12, 20]):
        parts = np.split(units, np.cumsum(sizes)[:-1])
        said = [speaker.vocode(0, part, i == len(parts) - 1) for i, part in enumerate(parts)]
        np.testing.assert_allclose(np.concatenate(said), expected, atol=TOLERANCE)


def test_a_wrong_graph_is_refused(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes something else, and one with weights that are not the model's."""

    def other(step: StepGraph) -> Any:
        graph = once(step)
        if isinstance(step, EncoderGraph):
            spoil(graph.graph)
        return graph

    def sharper(graph: Any) -> None:
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                    attribute.f = 0.5

    def louder(graph: Any) -> None:
        largest = max(graph.initializer, key=lambda constant: len(constant.raw_data))
        assert len(largest.raw_data) > 4 * CONSTANT
        largest.raw_data = (0.5 * np.frombuffer(largest.raw_data, np.float32)).tobytes()

    once = directory.make_graph
    monkeypatch.setattr(directory, "make_graph", other)
    for spoil, named in (  # noqa: B007  # ``other`` uses it
        (sharper, r"the exported encoder differs from torch by \d.*nothing was written"),
        (louder, r"the graph encoder has a constant that is none of the model's weights .*nothing was written"),
    ):
        with pytest.raises(CheckpointError, match=named):
            export_directory(tiny_bundle, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("beam", [1, 3])
def test_a_session_says_the_same(tiny_bundle: Path, exported: Path, beam: int) -> None:
    samples = speech(4.0, seed=2)
    texts, wave = said(StreamingSession(load_bundle(tiny_bundle), beam=beam), samples)
    session = StreamingSession(load_bundle(exported), beam=beam)
    for _ in range(2):  # reset() makes it new
        exported_texts, exported_wave = said(session, samples)
        assert exported_texts == texts and any(name == "TargetText" for name, *_ in texts)
        np.testing.assert_allclose(exported_wave, wave, atol=1e-4)
        assert len(wave)
        session.reset()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_batches_of_all_ages_say_what_each_says_alone(exported: Path, int8: Path, precision: str) -> None:
    bundle = load_bundle(exported if precision == "fp32" else int8)
    streams = {i: speech(2.0 + 0.7 * i, seed=20 + i) for i in range(3)}
    batch = SessionBatch(bundle, capacity=3)
    events: dict[int, list] = {}
    numbers = {}
    at = dict.fromkeys(streams, 0)
    for step in range(12):
        if step in (0, 2, 3):  # one after the other they join; the second row ends early and is taken by no one
            number = batch.join()
            numbers[len(numbers)] = number
            events[number] = []
        pushed = {}
        for i, number in numbers.items():
            size = 5000 + 900 * i
            if at[i] < len(streams[i]):
                pushed[number] = streams[i][at[i] : at[i] + size]
                at[i] += size
        for number, found in batch.push(pushed).items():
            events[number] += found
    for number, found in batch.finish(*events).items():
        events[number] += found
    for i, number in numbers.items():
        alone = StreamingSession(bundle)
        expected = alone.push(streams[i]) + alone.finish()
        assert [type(e) for e in events[number]] == [type(e) for e in expected]
        tokens = [[e.tokens for e in found if isinstance(e, TargetText)] for found in (events[number], expected)]
        assert tokens[0] == tokens[1]
        units = [[e.units for e in found if isinstance(e, SentenceEnd)] for found in (events[number], expected)]
        assert units[0] == units[1] and any(units[0])
        waves = [
            np.concatenate([np.zeros(0), *(e.samples for e in found if isinstance(e, Waveform))])
            for found in (events[number], expected)
        ]
        np.testing.assert_allclose(*waves, atol=1e-4)


def test_case_03_recordings_in_a_batch_of_int8(int8: Path) -> None:
    """Bit for bit what each recording gives alone, whoever steps beside it."""
    bundle = load_bundle(int8)
    demo = Path(echostream.__file__).parent / "assets" / "demo"
    recordings = [load_audio(demo / f"{i:02}.ogg")[: 28_000 + 6_000 * i] for i in (1, 2, 3)]
    batch = SessionBatch(bundle, capacity=3)
    streams = {batch.join(): samples for samples in recordings}
    events: dict[int, list] = {number: [] for number in streams}
    for at in range(0, 60_000, 5_000):
        for number, found in batch.push({n: samples[at : at + 5_000] for n, samples in streams.items()}).items():
            events[number] += found
    for number, found in batch.finish(*streams).items():
        events[number] += found
    for number, samples in streams.items():
        alone = StreamingSession(bundle)
        expected = alone.push(samples) + alone.finish()
        assert any(isinstance(event, TargetText) for event in expected)
        for mine, theirs in zip(events[number], expected, strict=True):
            assert type(mine) is type(theirs)
            for field in fields(mine):
                values = getattr(mine, field.name), getattr(theirs, field.name)
                if isinstance(values[0], np.ndarray):
                    np.testing.assert_array_equal(*values)
                elif field.name != "elapsed_s":
                    assert repr(values[0]) == repr(values[1])  # NaN is NaN


def test_a_saved_session_goes_on(exported: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, samples = load_bundle(exported), speech(4.0, seed=6)
    whole = StreamingSession(bundle)
    expected = whole.push(samples[:30000])
    whole.save(tmp_path / "session.npz")
    size = whole.nbytes
    expected = whole.push(samples[30000:]) + whole.finish()
    other = StreamingSession(bundle)
    other.push(speech(1.0, seed=7))
    other.restore(tmp_path / "session.npz")
    assert 0.7 * size < other.nbytes <= size  # by a page or two, which it need not have grown by
    found = other.push(samples[30000:]) + other.finish()
    assert [replace(e, elapsed_s=0.0) for e in found if isinstance(e, TargetText)] == [
        replace(e, elapsed_s=0.0) for e in expected if isinstance(e, TargetText)
    ]
    waves = [[e.samples for e in events if isinstance(e, Waveform)] for events in (found, expected)]
    assert len(waves[0]) == len(waves[1]) > 0
    for mine, theirs in zip(*waves):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(SessionError, match="was made with model"):
        StreamingSession(load_bundle(tiny_bundle)).restore(tmp_path / "session.npz")


def test_int8_is_smaller_and_near(exported: Path, int8: Path) -> None:
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (exported, int8)]
    assert sizes[1] < 0.6 * sizes[0]
    features = np.random.default_rng(0).standard_normal((200, 80)).astype(np.float32)
    heard = []
    for folder in (exported, int8):
        stages = ExportedStages(load_bundle(folder), rows=1, speech=False)
        heard.append(stages.run([(0, Encode(features, True))])[0].frames)
    error = np.abs(heard[0] - heard[1]).mean() / np.abs(heard[0]).mean()
    assert 0 < error < 0.1  # rounded, and not wrong


def test_no_two_products_of_a_graph_share_a_matrix(tiny_data: Path, tmp_path: Path, monkeypatch) -> None:
    """On processors without VNNI ONNX Runtime turns a product's matrix into another, and stumbles over a second one."""
    checkpoint = bundle_of(tiny_data, tmp_path, **{**FAMILY["asr-condition"], "asr_condition_every": 1})
    folder, _ = export_directory(checkpoint, tmp_path / "out", int8=True)
    matrices = {
        path.stem: [node.input[1] for node in onnx.load(path, load_external_data=False).graph.node
                    if node.op_type == "MatMulIntegerToFloat"]
        for path in (folder / "onnx").glob("*.onnx")
    }  # fmt: skip
    assert any("#2" in name for name in matrices["heads"])
    for name, found in matrices.items():
        assert len(found) == len(set(found)), name
    monkeypatch.setattr(onnx_runtime, "adds_int8_in_32_bits", lambda: False)
    events, _ = said(StreamingSession(load_bundle(folder), speech=False), speech(2.0, seed=2))
    assert events[-1][0] == "SentenceEnd"


def test_state_is_as_large_as_what_was_heard_of_the_sentence(exported: Path) -> None:
    """Little between sentences; it grows with one, alone and in a batch, and is given back when the next one begins."""
    bundle = load_bundle(exported)
    config = bundle.config
    rng = np.random.default_rng(0)
    stages = ExportedStages(bundle, rows=3)
    least = stages.nbytes
    places = {"mt": config.mt_decoder_layers * config.mt_decoder_embed_dim}
    places["unit"] = config.unit_decoder_layers * config.unit_decoder_embed_dim
    sizes = []
    for _ in range(10):
        frames = rng.standard_normal((20, config.encoder_embed_dim)).astype(np.float32)
        stages.run([(0, Extend(frames)), (2, Extend(frames[:5]))])
        sizes.append(stages.nbytes)
    assert all(a <= b for a, b in itertools.pairwise(sizes))
    for count, size in ((20, sizes[0]), (200, sizes[-1])):
        held = 8 * sum(places.values()) * (count + count // 4)  # keys and values in single precision
        assert held <= size - least <= 1.2 * held + 8 * sum(places.values()) * 6 * 16
    saved = stages.snapshot(2)
    assert saved["mt.memory"].shape[2] == 51 and sum(a.nbytes for a in saved.values()) < sizes[-1] / 3
    stages.run([(0, NewSentence()), (2, NewSentence())])
    assert stages.nbytes == least
    stages.restore(1, saved)
    assert least < stages.nbytes < sizes[3]
    stages.reset(1)
    assert stages.nbytes == least


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_searches_of_a_batch_find_what_each_finds_alone(exported: Path, int8: Path, precision: str) -> None:
    bundle, rng = load_bundle(exported if precision == "fp32" else int8), np.random.default_rng(2)
    rows = {row: rng.standard_normal((int(n), bundle.config.encoder_embed_dim)) for row, n in enumerate((3, 70, 9, 40))}
    requests = {row: Search(5 + row, beam=2 + row, most=4 * row) for row in rows}

    def search(some: list[int]) -> list[list[Chosen]]:
        stages = ExportedStages(bundle, rows=len(rows))
        for row in some:
            stages.run([(row, NewSentence())])
            stages.run([(row, Extend(rows[row].astype(np.float32)))])
            for token in range(4, 4 + row):
                stages.run([(row, Write(token))])
        return stages.run([(row, requests[row]) for row in some])

    for row, found in zip(rows, search(list(rows))):
        (alone,) = search([row])
        assert [c.token for c in found] == [c.token for c in alone]
        for mine, theirs in zip(found, alone):
            np.testing.assert_array_equal(mine.scores, theirs.scores)
            np.testing.assert_array_equal(mine.hidden, theirs.hidden)


def life(config: EchoStreamConfig, seed: int) -> Iterator[list]:
    """What a stream asks for in its life, a list of requests at a time: two sentences of its own lengths."""
    rng = np.random.default_rng(seed)

    def noise(count: int, width: int) -> np.ndarray:
        return rng.standard_normal((count, width)).astype(np.float32)

    for _ in range(2):
        yield NewSentence()
        for _ in range(int(rng.integers(2, 5))):
            yield Encode(noise(int(rng.integers(1, 90)), 80), False)
            yield Extend(noise(int(rng.integers(1, 40)), config.encoder_embed_dim))
            for _ in range(int(rng.integers(0, 7))):
                yield Write(int(rng.integers(4, config.mt_vocab_size)), ((1, 1),))
            yield ReadUnits(noise(int(rng.integers(1, 4)), config.mt_decoder_embed_dim))
    yield Encode(noise(7, 80), True)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_stream_gets_bit_for_bit_what_it_gets_alone(exported: Path, int8: Path, precision: str) -> None:
    """Whoever else is in the batch, and however old."""
    bundle = load_bundle(exported if precision == "fp32" else int8)
    count = 4

    def answers(lives: dict[int, list]) -> dict[int, list]:
        stages, found = ExportedStages(bundle, rows=count), {row: [] for row in lives}
        for at in range(max(map(len, lives.values()))):
            due = [(row, requests[at]) for row, requests in lives.items() if at < len(requests)]
            kinds = sorted({type(request) for _, request in due}, key=str)
            for kind in kinds:
                some = [(row, request) for row, request in due if isinstance(request, kind)]
                for (row, _), answer in zip(some, stages.run(some)):
                    found[row].append(answer)
        return found

    lives = {row: list(life(bundle.config, 40 + row)) for row in range(count)}
    together = answers(lives)
    for row, mine in lives.items():
        for request, expected, answer in zip(mine, answers({row: mine})[row], together[row], strict=True):
            if answer is not None:
                for before, now in zip(as_arrays(expected), as_arrays(answer), strict=True):
                    np.testing.assert_array_equal(before, now, err_msg=f"stream {row}, {type(request).__name__}")


def as_arrays(answer: Any) -> list[np.ndarray]:
    return [answer] if isinstance(answer, np.ndarray) else list(answer)


# ---------------------------------------------------------------------------------------------------- without torch

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchaudio", "fairseq", "onnx", "simuleval"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from echostream.cli import main

sys.exit(main(sys.argv[1:]))
"""


def run_without_torch(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BLOCKED, *map(str, arguments)], capture_output=True, text=True)


def test_the_directory_runs_without_torch(tiny_bundle: Path, exported: Path, tmp_path: Path) -> None:
    write_audio(tmp_path / "talk.wav", speech(2.4, seed=9))
    done = run_without_torch(
        "translate", tmp_path / "talk.wav", "-o", tmp_path / "english.wav", "--subtitles", tmp_path / "talk.srt",
        "--checkpoint-dir", exported, "--no-gaps",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    session = StreamingSession(load_bundle(tiny_bundle))
    events = session.push(read_audio(tmp_path / "talk.wav")[0]) + session.finish()
    wave = np.concatenate([e.samples for e in events if isinstance(e, Waveform)])
    found = np.round(read_audio(tmp_path / "english.wav")[0] * 32768)
    np.testing.assert_allclose(found, np.frombuffer(to_pcm(wave), "<i2"), atol=1)
    assert (tmp_path / "talk.srt").exists()
    refused = run_without_torch("translate", tmp_path / "talk.wav", "--checkpoint-dir", tiny_bundle)
    assert refused.returncode == 1 and "torch is not installed" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- the command line


def test_export_and_info(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "exported"
    assert main(["export", str(tiny_bundle), "-o", str(out), "--int8"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^encoder +differs from torch by \de-\d\d in single precision$", printed, re.MULTILINE)
    assert "onnx/encoder.onnx" in printed and "model.safetensors" in printed and str(out) in printed
    files = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert {"config.json", "gcmvn.npz", "spm.tgt.model", "vocoder.json", "README.md", "onnx/units.onnx"} <= files
    assert not any(name.endswith(".pt") for name in files)
    assert main(["info", str(out), "--json"]) == 0
    described = yaml.safe_load(capsys.readouterr().out)
    assert main(["info", str(tiny_bundle), "--json"]) == 0
    original = yaml.safe_load(capsys.readouterr().out)
    assert described["backend"] == "onnx, int8" and original["backend"] == "torch"
    for section in ("parameters", "languages", "look-ahead (ms)", "vocabularies", "configuration"):
        assert described[section] == original[section], section


def test_text_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    folder, differences = export_directory(tiny_bundle, tmp_path / "out", vocoder=False)
    assert "vocoder" not in differences and not list(folder.glob("voice*"))
    bundle = load_bundle(folder)
    assert bundle.vocoder is None
    events = (session := StreamingSession(bundle)).push(speech(2.0, seed=9)) + session.finish()
    assert events and not any(isinstance(e, Waveform) for e in events)


def test_refusals(tiny_bundle: Path, exported: Path, tiny_data: Path, tmp_path: Path, capsys) -> None:
    write_audio(tmp_path / "talk.wav", speech(0.5))

    def error(*arguments: object) -> str:
        assert main([*map(str, arguments)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    translate = ("translate", tmp_path / "talk.wav", "--checkpoint-dir")
    assert f"echostream export {tiny_bundle} -o DIRECTORY" in error(*translate, tiny_bundle, "--backend", "onnx")
    assert "run on the CPU, not on 'cuda'" in error(*translate, exported, "--device", "cuda")
    assert "export it to another directory" in error("export", tiny_bundle, "-o", tiny_bundle)
    assert "echostream export-checkpoint" in error("export", tiny_bundle / "model.pt", "-o", tmp_path / "x")
    wide = VocoderConfig.preset("v1", num_embeddings=20, upsample_initial_channel=32)
    looks_ahead = bundle_of(tiny_data, tmp_path, wide)
    assert "only causal vocoders can be exported" in error("export", looks_ahead, "-o", tmp_path / "x")
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    graphs = broken / "onnx"
    (graphs / "mt.onnx").unlink()
    assert "lacks mt.onnx; fetch or export it again" in error(*translate, broken)
    (graphs / "mt.onnx").write_bytes(b"")
    assert "are not those that its config.json names" in error(*translate, broken)
    (broken / "config.yaml").write_text("format: echostream/1\n")
    assert "holds config.json and config.yaml" in error(*translate, broken)
    (broken / "config.json").unlink()
    assert "holds a config.yaml of something else" in error("export", tiny_bundle, "-o", broken)


def test_stages_refuse_what_does_not_fit(exported: Path) -> None:
    bundle = load_bundle(exported)
    assert isinstance(bundle.model, ExportedModel)
    stages = ExportedStages(bundle, rows=2)
    with pytest.raises(UnitError, match="unit 20 is out of range; this vocoder knows 0..19"):
        stages.run([(1, Vocode(np.array([3, 20]), False))])
    frames = np.zeros((200, bundle.config.encoder_embed_dim), dtype=np.float32)
    stages.run([(0, NewSentence())])
    stages.run([(0, Extend(frames))])
    with pytest.raises(EchoStreamError, match="400 encoder frames does not fit the 256 .* raise max_sentence_frames"):
        stages.run([(0, Extend(frames))])
    with pytest.raises(EchoStreamError, match="33 positions does not fit the 32 .* raise max_target_tokens"):
        for _ in range(33):
            stages.run([(0, Write(5))])
    saved = stages.snapshot(0)
    with pytest.raises(KeyError):
        stages.restore(1, {name: array for name, array in saved.items() if name != "mt.own"})
    with pytest.raises(ValueError):
        stages.restore(1, {**saved, "encoder.ring": saved["encoder.ring"][:, :, :, 1:]})
    with pytest.raises(ConfigError):
        VocoderConfig.from_json(exported / "config.json")


def test_the_agent_takes_an_exported_directory(tiny_bundle: Path, exported: Path) -> None:
    pytest.importorskip("simuleval")
    from tests.test_agent import make_agent, summary, translate

    samples = speech(2.0, seed=9)
    spoken = []
    for folder, backend in ((tiny_bundle, "torch"), (exported, "onnx")):
        agent = make_agent(folder, "--backend", backend)
        spoken.append(summary(translate(agent, samples, 16000, 300)))
    assert spoken[0][0] == spoken[1][0] and len(spoken[0][1])
    np.testing.assert_allclose(spoken[0][1], spoken[1][1], atol=1e-4)
    with pytest.raises(SystemExit, match="--fp16 is for torch"):
        agent.to("cpu", fp16=True)


# ---------------------------------------------------------------------------------------------------- small parts


def test_rings() -> None:
    ring, rng = np.zeros((2, 1, 5, 1), dtype=np.float32), np.random.default_rng(0)
    history = np.zeros((2, 1, 0, 1), dtype=np.float32)
    for size in (1, 3, 2, 9, 5, 4):
        new = rng.standard_normal((2, size, 1)).astype(np.float32)
        write_ring(ring, new, history.shape[2])
        history = np.concatenate([history, new[:, None]], axis=2)
        count = history.shape[2]
        for place, age in enumerate(ring_ages(np.array([count]), 5)[0]):
            if age >= -count:
                np.testing.assert_array_equal(ring[:, :, place], history[:, :, age])
            else:
                assert not ring[:, :, place].any()


@pytest.mark.parametrize(
    "sizes", [(4, 30, 0, 8), (4, 30, 2, 8), (3, 7, 1, 0), (2, 0, 0, 3), (1, 5, 0, 2), (2, 0, 0, 0)]
)
def test_masks_repeat_once_the_rings_are_full(sizes: tuple[int, ...]) -> None:
    segment, left, right, memory = sizes
    full, period = turn(segment, left, memory)
    for before in range(full, full + 2 * period):
        for frames, count in ((segment + right, 1), (2 * segment - 1, 2)):
            early, late = (segment_mask(*sizes, b, frames, count, shift=False) for b in (before, before + 5 * period))
            np.testing.assert_array_equal(early, late)
    masks = [segment_mask(*sizes, full + b, 9, 3, shift=False) for b in range(period)]
    assert period == 1 or any((mask != masks[0]).any() for mask in masks)


@pytest.mark.parametrize("channels, bins", [(1, 80), (1, 13), (2, 9)])
def test_gathered_windows_make_the_subsampler(channels: int, bins: int) -> None:
    """Products over windows and patches are the two convolutions, at a stream's beginning, middle and end."""
    torch.manual_seed(1)
    subsampler = Subsampler(channels * bins, channels, 6, 4).eval()
    frames, size = 3, 3 + 4 * 3
    features = torch.randn(3, size, channels * bins)
    valid, first = np.array([12, 12, 5]), np.array([True, False, False])
    features[2, 3 + 5 :] = 0
    features[0, :3] = 0
    with torch.no_grad():
        places = torch.from_numpy(windows(features.numpy(), channels, valid, first))
        weight = torch.cat([subsampler.conv1.weight.flatten(1), subsampler.conv1.bias[:, None]], dim=1)
        x = torch.relu(places @ weight.T)[:, torch.from_numpy(patches(frames, -(-bins // 4)))]  # [B, N * bins, 9, C]
        x = x.flatten(2) @ subsampler.conv2.weight.permute(0, 2, 3, 1).flatten(1).T + subsampler.conv2.bias
        ours = subsampler.proj(torch.relu(x).unflatten(1, (frames, -1)).flatten(2))
        ages = torch.from_numpy(valid), torch.from_numpy(first)
        theirs = subsampler._convolve(features, *ages, torch.tensor([3, 3, 2]))
    assert torch.allclose(ours[:2], theirs[:2], atol=1e-5)
    assert torch.allclose(ours[2, :2], theirs[2, :2], atol=1e-5)  # what lies behind the end is nobody's


def test_an_exported_directory_as_the_shipped_model(exported: Path, tiny_bundle: Path, monkeypatch) -> None:
    """It lends its voice, to ``vocode`` and to other pairs, and the server takes it as it is."""
    from echostream import vocode
    from echostream.commands import export_checkpoint
    from echostream.models.decoders.vocoder_checkpoint import load_vocoder
    from echostream.serve.command import model_directory

    mine = vocode.load(exported, None)
    true = load_vocoder(tiny_bundle / "vocoder.pt", tiny_bundle / "vocoder.json")
    for name, weight in true.state_dict().items():
        assert torch.allclose(mine.state_dict()[name], weight, atol=2e-3), name
    saved = export_checkpoint.voice_files(SimpleNamespace(vocoder=exported), exported.parent)
    again = load_vocoder(*saved)
    for name, weight in mine.state_dict().items():
        assert torch.allclose(again.state_dict()[name], weight, atol=1e-5), name
    monkeypatch.setattr("echostream.checkpoint.layout.DEFAULT_BUNDLE", exported)
    args = SimpleNamespace(checkpoint_dir=None, backend=None, device="cpu")
    assert model_directory(args) == exported
