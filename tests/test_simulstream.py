"""simulstream's own classes over our processor, and OmniSTEval reading the log that they write."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import yaml

pytest.importorskip("torch")
pytest.importorskip("simulstream", reason="needs the extra simulstream")
pytest.importorskip("librosa", reason="needs the extra simulstream")

from simulstream.config import yaml_config
from simulstream.inference import run_inference
from simulstream.metrics.logger import METRICS_LOGGER, setup_metrics_logger
from simulstream.metrics.readers import LogReader
from simulstream.server.message_processor import MessageProcessor
from simulstream.server.speech_processors import build_speech_processor

from echostream.agent.simulstream import EchoStreamProcessor
from echostream.audio.io import load_audio
from echostream.checkpoint import DEFAULT_BUNDLE, load_bundle
from echostream.errors import EchoStreamError
from echostream.streaming import SentenceEnd, StreamingSession, Waveform

ASSETS = DEFAULT_BUNDLE.parent
CONFIG = ASSETS / "simulstream.yaml"


def make(tiny_bundle: Path, **changes: object) -> EchoStreamProcessor:
    config = {**vars(yaml_config(str(CONFIG))), "checkpoint_dir": str(tiny_bundle), **changes}
    return build_speech_processor(SimpleNamespace(**config))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two demo recordings as simulstream reads them: 16-bit WAV at 16 kHz."""
    paths = [tmp_path_factory.mktemp("wavs") / f"{name}.wav" for name in ("01", "02")]
    for path in paths:
        soundfile.write(path, load_audio(ASSETS / "demo" / f"{path.stem}.ogg"), 16000, subtype="PCM_16")
    return paths


@pytest.fixture
def log(tmp_path: Path):
    """simulstream's log, which it writes through one logger of its own."""
    path = tmp_path / "metrics.jsonl"
    METRICS_LOGGER.setLevel("INFO")
    setup_metrics_logger(SimpleNamespace(enabled=True, filename=str(path)))
    yield path
    for handler in METRICS_LOGGER.handlers:
        handler.close()
    METRICS_LOGGER.handlers.clear()


def test_the_shipped_file_and_model_say_what_a_session_says(recordings: list[Path], log: Path) -> None:
    processor = build_speech_processor(yaml_config(str(CONFIG)))
    run_inference(processor, [str(path) for path in recordings], tgt_lang="en", src_lang="es-ES")
    found = LogReader(yaml_config(str(CONFIG)), str(log)).final_outputs_and_latencies()
    bundle = load_bundle(threads=1)
    for path in recordings:
        session = StreamingSession(bundle, speech=False)
        events = session.push(load_audio(path)) + session.finish()
        text = " ".join(event.text for event in events if isinstance(event, SentenceEnd))
        assert found[path.stem].final_text.split() == text.split() and text
        delays, aware = found[path.stem].ideal_delays, found[path.stem].computational_aware_delays
        assert len(delays) == len(text.split()) and delays == sorted(delays)
        assert delays[-1] <= len(load_audio(path)) / 16000 + 1e-6 and all(np.array(aware) > delays)


@pytest.mark.parametrize("output", ["text", "speech", "source"])
def test_what_is_new_joins_to_the_whole(tiny_bundle: Path, output: str) -> None:
    """Chunk by chunk through simulstream's message processor, twice; a client only appends."""
    samples = (0.1 * np.random.default_rng(0).normal(size=40000)).astype(np.float32)
    pcm = (samples * 32767).astype("<i2")
    session = StreamingSession(load_bundle(tiny_bundle), policy="wait-k", wait_k=2)
    events = session.push(pcm.astype(np.float32) / 32768) + session.finish()
    ends = [event for event in events if isinstance(event, SentenceEnd)]
    expected = " ".join(end.source_text if output == "source" else end.text for end in ends)
    processor = make(tiny_bundle, output=output, policy="wait-k", wait_k=2)
    assert processor.speech_chunk_size == 0.32
    for _ in range(2):
        messages = MessageProcessor(0, processor)
        shown = ""
        for start in range(0, len(pcm), 5120):
            new = messages.process_speech(pcm[start : start + 5120].tobytes())
            shown += new.new_string if new else ""
        last = messages.end_of_stream()
        shown += last.new_string
        assert last.deleted_tokens == [] and shown.split() == expected.split() and shown == shown.strip()
    assert processor.load_model(processor.config) is processor.bundle  # one model for all streams


def test_what_does_not_fit_is_refused(tiny_bundle: Path) -> None:
    for changes, message in (
        ({"polcy": "ctc"}, "unknown key 'polcy'"), ({"output": "both"}, "output is 'both'"),
        ({"speech_chunk_size": "1"}, "speech_chunk_size is '1'"), ({"policy": "ctc", "wait_k": 3}, "wait_k is no knob"),
    ):  # fmt: skip
        with pytest.raises(EchoStreamError, match=message):
            make(tiny_bundle, **changes)
    processor = make(tiny_bundle)
    processor.set_target_language("en-GB")
    with pytest.raises(EchoStreamError, match="'de' was asked for; this model speaks 'en' only"):
        processor.set_target_language("de")
    with pytest.raises(EchoStreamError, match="hears 'es' only"):
        processor.set_source_language("fr")


def test_omnisteval_reads_the_log(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """LongYAAL, plain and computation-aware, of a log in the processor's form, against the definition by hand."""
    cli = pytest.importorskip("omnisteval.cli", reason="needs the extra simulstream")
    talk = [("The", 1.0), ("▁hou", 1.0), ("se", 1.5), ("▁is", 1.5), ("▁big", 2.0)]
    talk += [("▁Hel", 3.5), ("lo", 4.0), ("▁friend", 4.0)]
    lines = [{"id": 0, "metadata": {"wav_name": "talks/talk.wav"}}]
    for time in sorted({time for _, time in talk}):
        tokens = [token for token, at in talk if at == time]
        lines.append({"id": 0, "total_audio_processed": time, "computation_time": 0.25, "generated_tokens": tokens,
                      "deleted_tokens": []})  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    segments = [{"wav": "talk.wav", "offset": offset, "duration": 2.0} for offset in (0.0, 3.0)]
    (tmp_path / "segments.yaml").write_text(yaml.safe_dump(segments))
    (tmp_path / "references.txt").write_text("The house is big\nHello friend\n")
    monkeypatch.setattr("sys.argv", [
        "omnisteval", "longform", "--word_level", "--hypothesis_format", "simulstream", "--hypothesis_file",
        str(tmp_path / "metrics.jsonl"), "--simulstream_config_file", str(CONFIG), "--speech_segmentation",
        str(tmp_path / "segments.yaml"), "--ref_sentences_file", str(tmp_path / "references.txt"), "--lang", "zh",
        "--output_folder", str(tmp_path / "out"),
    ])  # fmt: skip
    cli.main()
    rows = [line.split("\t") for line in (tmp_path / "out" / "scores.tsv").read_text().splitlines()]
    scores = {name.lower(): value for name, value in (row[:2] for row in rows)}
    # A word counts when its last subword comes: 1, 1.5, 1.5, 2 s, and from its own sentence's start 1, 1 s. An even
    # speaker would give words of 2 s of speech at 0, 0.5, 1, 1.5 s, and at 0, 1 s.
    first, second = np.mean([1000, 1000, 500, 500]), np.mean([1000, 0])
    assert float(scores["longyaal (cu)"]) == pytest.approx((first + second) / 2)
    assert float(scores["longyaal (ca)"]) == pytest.approx((first + second) / 2 + 250)
    assert float(scores["bleu"]) == pytest.approx(100)


def test_speech_is_given_out_with_its_text(tiny_bundle: Path) -> None:
    """With ``output: speech`` subwords come not before the speech that says them."""
    samples = (0.1 * np.random.default_rng(1).normal(size=48000)).astype(np.float32)
    text, speech = make(tiny_bundle), make(tiny_bundle, output="speech")
    counts = {text: [], speech: []}
    for processor, found in counts.items():
        for start in range(0, len(samples), 5120):
            found.append(len(processor.process_chunk(samples[start : start + 5120]).new_tokens))
        found.append(len(processor.end_of_stream().new_tokens))
    assert sum(counts[text]) == sum(counts[speech]) > 0
    assert all(np.cumsum(counts[speech]) <= np.cumsum(counts[text]))
    session = StreamingSession(load_bundle(tiny_bundle))
    assert any(isinstance(event, Waveform) for event in session.push(samples) + session.finish())
