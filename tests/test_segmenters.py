"""Segmenters beside the model's own punctuation: CT-Transformer graphs of both makes, pauses, combinations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from echostream.audio.io import load_audio
from echostream.errors import CheckpointError, ConfigError, MissingExtraError
from echostream.evaluation import no_speech
from echostream.streaming import SentenceEnd, SessionBatch, StreamingSession
from echostream.streaming.policies.counting import CTCCountPolicy
from echostream.streaming.segmenters import silero
from echostream.streaming.segmenters.base import CombinedSegmenter, CTCToken, NoSegmenter
from echostream.streaming.segmenters.ct_transformer import CTPunctuation, CTSegmenter
from echostream.streaming.segmenters.factory import make_segmenter
from echostream.streaming.segmenters.pause import PauseSegmenter, SpeechGate
from echostream.streaming.segmenters.punctuation import PunctuationSegmenter
from echostream.streaming.segmenters.silero import load_silero
from echostream.text import Vocabulary

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ASSETS = Path(silero.WEIGHTS).parents[1]
REFERENCE = [  # of silero_vad_16k_op15.onnx in silero-vad 6.2.3
    0.001868, 0.007606, 0.009401, 0.008105, 0.119376, 0.945535, 0.990279, 0.998657, 0.999697, 0.999713,
    0.999733, 0.999921, 0.999942, 0.999953, 0.999972, 0.999974, 0.999956, 0.999990, 0.999987, 0.999982,
    0.999982, 0.999858, 0.999808, 0.999467, 0.999951, 0.999923, 0.999893, 0.999964, 0.999989, 0.999996,
    0.999996,
]  # fmt: skip
TOKENS = ["<blank>", "hola", "como", "estas", "hoy", "qu", "é", "it's", "<unk>"]
MARKS = ["<unk>", "_", "，", "。", "？", "、"]
AFTER = {"hola": "，", "estas": "？", "hoy": "。", "é": "。"}  # what the small graph sets behind which token


def write_ct(folder: Path, make: str = "funasr", inputs: int = 2, file: str = "model.onnx", classes: int = 6) -> Path:
    """A graph with a CT-Transformer's inputs and output that looks the mark of each token up in a table."""
    from onnx import TensorProto, helper, numpy_helper

    table = np.zeros((len(TOKENS), classes), dtype=np.float32)
    for i, token in enumerate(TOKENS):
        table[i, MARKS.index(AFTER.get(token, "_"))] = 5.0
    names = ["inputs" if inputs == 2 else "input", "text_lengths"]
    given = [
        helper.make_tensor_value_info(names[0], TensorProto.INT32, [1, "T"]),
        helper.make_tensor_value_info(names[1], TensorProto.INT32, [1]),
    ]
    nodes = [helper.make_node("Gather", ["table", names[0]], ["logits"])]
    for mask in ("vad_masks", "sub_masks")[: inputs - 2]:
        given.append(helper.make_tensor_value_info(mask, TensorProto.FLOAT, [1, 1, "T", "T"]))
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "T", classes])
    graph = helper.make_graph(nodes, "ct", given, [out], [numpy_helper.from_array(table, "table")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if make == "sherpa":
        values = {"tokens": "|".join(TOKENS), "vocab_size": str(len(TOKENS)), "unk_symbol": "<unk>"}
        helper.set_model_props(model, {**values, "punctuations": "|".join(MARKS)})
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / file)
    if make == "funasr":
        (folder / "tokens.json").write_text(json.dumps(TOKENS), encoding="utf-8")
        (folder / "config.yaml").write_text(
            f"model: CTTransformer\nmodel_conf:\n  punc_list: {json.dumps(MARKS)}\n", encoding="utf-8"
        )
    return folder


def write_vad(path: Path) -> Path:
    """A graph of silero's signature: a window whose newest 512 samples are loud is speech; the state counts windows."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Slice", ["input", "begin", "end", "axis"], ["new"]),
        helper.make_node("Abs", ["new"], ["size"]),
        helper.make_node("ReduceMean", ["size"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["mean", "gain"], ["loud"]),
        helper.make_node("Clip", ["loud", "zero", "one"], ["output"]),
        helper.make_node("Add", ["state", "one"], ["stateN"]),
        helper.make_node("Identity", ["sr"], ["unused"]),
    ]
    constants = {
        "begin": np.array([64]), "end": np.array([576]), "axis": np.array([1]),
        "gain": np.float32(50), "zero": np.float32(0), "one": np.float32(1),
    }  # fmt: skip
    given = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [None, None]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, None, 128]),
        helper.make_tensor_value_info("sr", TensorProto.INT64, []),
    ]
    out = [
        helper.make_tensor_value_info("output", TensorProto.FLOAT, [None, 1]),
        helper.make_tensor_value_info("stateN", TensorProto.FLOAT, [None, None, None]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "vad", given, out, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def spoken(*frames: int) -> tuple[CTCToken, ...]:
    return tuple(CTCToken(4, frame) for frame in frames)


# ------------------------------------------------------------------------------------------------ CT-Transformer


@pytest.mark.parametrize(
    ("make", "inputs", "file"),
    [("funasr", 2, "model.onnx"), ("funasr", 4, "model_quant.onnx"), ("sherpa", 2, "model.int8.onnx")],
)
def test_both_makes_are_read(make, inputs, file, tmp_path):
    model = CTPunctuation.load(write_ct(tmp_path / "ct", make, inputs, file))
    assert model.punctuate(["Hola", "como", "estas", "nunca", "hoy"]) == ["，", "_", "？", "_", "。"]
    assert model.punctuate([]) == []
    assert model.split("qué") == [TOKENS.index("qu"), TOKENS.index("é")] and model.split("IT'S") == [7]
    assert model.punctuate(["qué", "como"]) == ["。", "_"]  # the mark behind a word is that behind its last token


def test_tokens_in_a_text_file(tmp_path):
    folder = write_ct(tmp_path / "ct")
    (folder / "tokens.json").unlink()
    (folder / "tokens.txt").write_text("".join(f"{t} {i}\n" for i, t in enumerate(TOKENS)), encoding="utf-8")
    assert CTPunctuation.load(folder / "model.onnx").punctuate(["hoy"]) == ["。"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.onnx").unlink(), "holds none of model.onnx"),
        (lambda f: (f / "model.onnx").write_text("no graph"), "is not an ONNX graph"),
        (lambda f: (f / "tokens.json").unlink(), "neither tokens.json nor tokens.txt"),
        (lambda f: (f / "tokens.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.yaml").unlink(), "lists the marks"),
        (lambda f: (f / "config.yaml").write_text("model: x\n"), "lists no marks"),
        (lambda f: (f / "config.yaml").write_text("punc_list: ['_', '。']\n"), "tells 6 marks apart, but 2"),
        (lambda f: write_vad(f / "model.onnx"), "a CT-Transformer has token ids"),
    ],
)
def test_directories_that_are_none(damage, message, tmp_path):
    folder = write_ct(tmp_path / "ct")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        CTPunctuation.load(folder)
    assert "\n" not in str(caught.value)


def test_full_stops_of_the_ct_transformer(tmp_path):
    words = Vocabulary(["▁Hola", ",", "▁como", "▁est", "as", ".", "▁hoy"])
    hola, comma, como, est, tas, stop, hoy = range(4, 11)
    segmenter = CTSegmenter(CTPunctuation.load(write_ct(tmp_path / "ct")), words, lookahead=2)
    tokens = [(hola, 3), (comma, 5), (como, 8), (est, 11), (tas, 14), (stop, 17), (hoy, 20), (como, 25)]
    heard = tuple(CTCToken(*pair) for pair in tokens)
    for count in range(len(heard)):
        assert segmenter.find((), heard[:count], 99, {}) is None  # two words must follow
    ending = segmenter.find((), heard, 99, {})
    assert (ending.closing, ending.until, ending.reason) == (17, None, "ct")  # the head's own full stop belongs to it
    source = CTSegmenter(segmenter.model, words, "source", lookahead=1)
    assert source.find(heard[:7], spoken(2, 30), 99, {}).until == 18
    assert len(segmenter.results) == 4  # each text of three words and more was asked about once


# ------------------------------------------------------------------------------------------------------- pauses


def sound(*parts: tuple[float, float]) -> np.ndarray:
    """(seconds, amplitude) stretches of noise at 16 kHz."""
    rng = np.random.default_rng(0)
    return np.concatenate([a * rng.standard_normal(int(s * 16000)) for s, a in parts]).astype(np.float32)


def test_pauses_end_sentences(tmp_path):
    segmenter = PauseSegmenter(load_silero(write_vad(tmp_path / "vad.onnx")), min_pause_ms=480)
    samples = sound((1.0, 0), (1.024, 0.1), (0.256, 0), (1.024, 0.1), (1.0, 0), (1.0, 0.1))
    whole = segmenter.hear(samples, segmenter.init_audio())
    # Silence before the first word and a short one are none; the long one begins at 3.304 s.
    assert len(whole["pauses"]) == 1 and abs(int(whole["pauses"][0]) * 0.04 - (3.304 + 0.48)) < 0.08
    until = int(whole["pauses"][0])
    rng = np.random.default_rng(1)
    memory, at = segmenter.init_audio(), 0
    while at < len(samples):
        size = int(rng.integers(0, 3000))
        before = {name: array.copy() for name, array in memory.items()}
        after = segmenter.hear(samples[at : at + size], memory)
        for name, array in before.items():
            np.testing.assert_array_equal(memory[name], array)
        memory, at = after, at + size
    for name, array in whole.items():
        np.testing.assert_array_equal(memory[name], array)
    assert segmenter.find((), spoken(30, 60), until, whole).until == until
    assert segmenter.find((), spoken(30, 60), until - 1, whole) is None  # the encoder is not there yet
    assert segmenter.find((), spoken(until), 200, whole) is None  # no word before it
    assert segmenter.find((), (), 200, whole) is None


@pytest.mark.parametrize("name", ["pause", "punctuation+pause"])
def test_a_session_that_listens(name, tmp_path):
    from tests.test_streaming import BUNDLES, assert_same, cut, speech, translate

    bundle = BUNDLES["mt"]
    voice = speech(4.0, seed=9)
    samples = np.concatenate([voice[:32000], np.zeros(16000, np.float32), voice[32000:]])
    vad = write_vad(tmp_path / "vad.onnx")
    segmenter = make_segmenter(name, bundle.source_dict, bundle.target_dict, vad_model=vad, min_pause_ms=400)
    reference = translate(bundle, samples, segmenter=segmenter)
    ends = [e for e in reference if isinstance(e, SentenceEnd)]
    pauses = [e for e in ends if e.reason == "pause"]
    assert any(abs(e.end_s - 2.4) < 0.3 for e in pauses)
    splits = cut(len(samples), np.random.default_rng(5), 7000)
    assert_same(translate(bundle, samples, splits, segmenter=segmenter), reference)
    session = StreamingSession(bundle, policy="ctc", segmenter=segmenter)
    events = session.push(samples[:37000])
    session.save(tmp_path / "saved.npz")
    other = StreamingSession(bundle, policy="ctc", segmenter=segmenter)
    other.restore(tmp_path / "saved.npz")
    expected = translate(bundle, samples, policy="ctc", segmenter=segmenter)
    assert_same(events + other.push(samples[37000:]) + other.finish(), expected)


def test_the_gate_opens_about_speech_only(tmp_path):
    gate = SpeechGate(load_silero(write_vad(tmp_path / "vad.onnx")), margin_ms=200)
    samples = sound((2.0, 0.001), (1.024, 0.1), (2.0, 0.001))
    whole = gate.hear(samples, gate.init_audio())
    opened = [frame for frame in range(125) if gate.voiced(frame, whole)]
    assert opened == list(range(opened[0], opened[-1] + 1))  # one stretch
    assert abs(opened[0] * 0.04 - 1.8) < 0.08 and abs(opened[-1] * 0.04 - 3.224) < 0.08
    memory, rng = gate.init_audio(), np.random.default_rng(1)
    for piece in np.split(samples, np.sort(rng.integers(0, len(samples), 30))):
        memory = gate.hear(piece, memory)
    for name, array in whole.items():
        np.testing.assert_array_equal(memory[name], array)
    later = gate.hear(sound((20.0, 0)), whole)
    assert len(later["speech"]) == 256 and not gate.voiced(60, later)  # forgotten
    assert gate.find((), spoken(1), 200, whole) is None


def test_no_words_where_nobody_speaks(tmp_path):
    from tests.test_streaming import BUNDLES, speech, translate

    bundle, gated = BUNDLES["mt"], dict(segmenter="none", speech_gate=True, vad_model=write_vad(tmp_path / "vad.onnx"))
    quiet, voice = sound((4.0, 0.0002)), speech(4.0, seed=9)
    assert translate(bundle, quiet, segmenter="none") and translate(bundle, quiet, **gated) == []
    assert translate(bundle, voice, **gated) == translate(bundle, voice, segmenter="none")
    # Silence before and behind speech changes neither its first word nor its last.
    framed = translate(bundle, np.concatenate([quiet, voice, quiet]), **gated)
    assert [e.first_heard_s > 3.5 for e in framed if isinstance(e, SentenceEnd)][:1] == [True]
    with pytest.raises(ConfigError, match="margin_ms is -1"):
        SpeechGate(load_silero(), margin_ms=-1)


def bundle_without(bundle: SimpleNamespace) -> SimpleNamespace:
    """The same without what it prefers, and so with the gate."""
    return SimpleNamespace(**{**vars(bundle), "policy": {}})


def test_the_gate_is_the_default():
    from tests.test_streaming import BUNDLES

    bundle = bundle_without(BUNDLES["mt"])
    for segmenter in (None, "none", "pause", NoSegmenter()):
        assert StreamingSession(bundle, segmenter=segmenter).engine.segmenter.name.endswith("+speech(0.5, 480 ms)")
        session = StreamingSession(bundle, segmenter=segmenter, speech_gate=False)
        assert "speech" not in session.engine.segmenter.name
    own = CombinedSegmenter((NoSegmenter(), SpeechGate(load_silero(), 0.7)))
    assert StreamingSession(bundle, segmenter=own).engine.segmenter is own
    with pytest.raises(ConfigError, match="speech_gate is 'yes'; it must be true or false"):
        StreamingSession(bundle, speech_gate="yes")
    with pytest.raises(ConfigError, match="vad_model is for segmenter pause"):
        StreamingSession(bundle, speech_gate=False, vad_model="vad.onnx")
    session = StreamingSession(bundle, policy=CTCCountPolicy(1, 1))
    assert not session.push(sound((3.0, 0.05))) + session.finish()


def test_a_gated_session_is_split_saved_and_batched(tmp_path):
    """Real speech between noise: any split, an archive and neighbours in a batch change nothing."""
    from tests.test_streaming import BUNDLES, assert_same, cut, translate

    bundle = bundle_without(BUNDLES["mt"])
    spoken_words = load_audio(next(ASSETS.glob("demo/01.*")))[:48000]
    samples = np.concatenate([sound((1.0, 0.01)), spoken_words, sound((1.5, 0.01))])
    whole = translate(bundle, samples, segmenter="none")
    assert any(isinstance(e, SentenceEnd) for e in whole)
    assert_same(translate(bundle, samples, cut(len(samples), np.random.default_rng(5), 7000), segmenter="none"), whole)
    options = dict(policy=CTCCountPolicy(1, 1), segmenter="none")
    first, second = StreamingSession(bundle, **options), StreamingSession(bundle, **options)
    events = first.push(samples[:40001])
    first.save(tmp_path / "saved.npz")
    assert (tmp_path / "saved.npz").stat().st_size < 1 << 20
    second.restore(tmp_path / "saved.npz")
    assert_same(events + second.push(samples[40001:]) + second.finish(), whole)
    batch = SessionBatch(bundle, 3, **options)
    streams = {batch.join(): part for part in (samples, sound((4.0, 0.05)), spoken_words)}
    found = {number: [] for number in streams}
    for at in range(0, len(samples), 4000):
        parts = {number: part[at : at + 4000] for number, part in streams.items()}
        for number, some in batch.push(parts).items():
            found[number] += some
    for number, some in batch.finish(*streams).items():
        found[number] += some
    alone = (whole, [], translate(bundle, spoken_words, segmenter="none"))
    for number, expected in zip(streams, alone):
        assert_same(found[number], expected)


def test_sounds_that_are_no_speech_and_speech():
    """The network that comes with the package: what it says of sounds and of a recording."""
    gate = SpeechGate(load_silero())

    def share(samples: np.ndarray) -> float:
        return float(gate.hear(samples, gate.init_audio())["speech"].mean())

    for name in no_speech.SOUNDS:
        assert share(np.concatenate(list(no_speech.play(name, 6.0)))) == 0, name
    voice = load_audio(next(ASSETS.glob("demo/01.*")))
    assert share(voice) > 0.6 and share(voice * np.float32(10 ** (-35 / 20))) > 0.5


def test_the_network_gives_what_the_graph_gives():
    """Probabilities of silero_vad_16k_op15.onnx for the first second of a recording."""
    net = load_silero()
    found = net.read(np.zeros(64, np.float32), load_audio(next(ASSETS.glob("demo/01.*")))[:16000], net.init_state())[0]
    np.testing.assert_allclose(found, REFERENCE, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("stft"), "lacks the array 'stft'"),
        (lambda a: a.update({"out.bias": np.full(1, np.nan, np.float32)}), "out.bias holds NaN"),
        (lambda a: a.update({"conv0.bias": np.zeros(3, np.float32)}), "conv0.bias has shape"),
    ],
)
def test_damaged_networks_are_refused(change, message, tmp_path):
    arrays = dict(silero.load_silero().weights)
    change(arrays)
    np.savez(tmp_path / "vad.npz", **arrays)
    with pytest.raises(CheckpointError, match=message):
        silero.SileroNetwork.load(tmp_path / "vad.npz")


def test_the_detector_needs_neither_torch_nor_onnxruntime():
    check = """
import sys, numpy as np
sys.modules["torch"] = sys.modules["onnxruntime"] = None
from echostream.streaming.segmenters.pause import PauseSegmenter
from echostream.streaming.segmenters.silero import load_silero
segmenter = PauseSegmenter(load_silero(), 300)
memory = segmenter.hear(np.zeros(32000, np.float32), segmenter.init_audio())
assert memory["count"].tolist() == [62, 0, -1], memory["count"]
"""
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# ------------------------------------------------------------------------------------------------------- choosing


def test_the_first_end_counts():
    class At:
        listens, name = False, "at"

        def __init__(self, frame):
            self.frame = frame

        def init_audio(self):
            return {"x": np.array([self.frame])}

        def hear(self, samples, memory):
            return {"x": memory["x"] + len(samples)}

        def find(self, source, target, frames, memory):
            from echostream.streaming.segmenters.base import Ending

            return None if self.frame is None else Ending("at", closing=int(memory["x"][0]))

    both = CombinedSegmenter((At(9), At(4)))
    assert both.name == "at+at" and not both.listens
    memory = both.hear(np.zeros(2), both.init_audio())
    assert set(memory) == {"0.x", "1.x"}
    assert both.find((), (), 99, memory).closing == 6


def test_names(tmp_path):
    words = Vocabulary(["▁a", "."])
    assert isinstance(make_segmenter("punctuation", words, words), PunctuationSegmenter)
    model = write_ct(tmp_path / "ct")
    both = make_segmenter("ct+punctuation", words, words, punctuation_model=model, punctuation_side="source")
    assert both.name == "ct(ct, source, 2)+punctuation" and not both.listens
    for name, message in (("wish", "unknown segmenter 'wish'"), ("ct", "needs a CT-Transformer"),
                          ("none+punctuation", "makes no sense"), ("ct+ct", "makes no sense")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            make_segmenter(name, words, words)
    with pytest.raises(CheckpointError, match="does not exist"):
        make_segmenter("pause", words, words, vad_model=tmp_path / "none.onnx")
    with pytest.raises(CheckpointError, match="silero's silero_vad.onnx"):
        load_silero(model / "model.onnx")
    vad = load_silero(write_vad(tmp_path / "vad.onnx"))
    for values, message in ((dict(min_pause_ms=10), "min_pause_ms is 10"), (dict(threshold=1.0), "threshold is 1.0")):
        with pytest.raises(ConfigError, match=message):
            PauseSegmenter(vad, **values)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    vad = write_vad(tmp_path / "vad.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'echostream\[onnx\]'"):
        load_silero(vad)
