"""The command line with an untrained model: recordings, pipes, subtitles, live text, pictures, Ctrl-C, refusals."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echostream.audio.io import read_audio, write_audio
from echostream.audio.stream import open_file, open_pipe, to_pcm, wav_stream_header
from echostream.checkpoint import load_bundle
from echostream.cli import main
from echostream.errors import AudioError, EchoStreamError
from echostream.output.speech import SpeechFile, SpeechPipe
from echostream.output.subtitles import LINE_LETTERS, SubtitleFile, cues, stamp
from echostream.output.terminal import LiveText, clock
from echostream.output.words import WordTimes
from echostream.streaming.events import LagStatistics, SentenceEnd, SourceText, TargetText, TargetUnits, Waveform
from echostream.streaming.session import StreamingSession
from echostream.text import Vocabulary
from tests.test_streaming import cut, speech

SAMPLES = speech(2.4, seed=9)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "talk.wav"
    write_audio(path, SAMPLES)
    return path


@pytest.fixture
def pcm(recording: Path) -> bytes:
    """The recording's samples, to the bit: an untrained model's choices hang on less."""
    return to_pcm(read_audio(recording)[0])


@pytest.fixture
def spoken(tiny_bundle: Path, recording: Path) -> tuple[list, np.ndarray]:
    """What a session says of the recording: its events, and all its speech as 16-bit samples."""
    session = StreamingSession(load_bundle(tiny_bundle))
    events = session.push(read_audio(recording)[0]) + session.finish()
    waves = [e.samples for e in events if isinstance(e, Waveform)]
    assert waves and any(isinstance(e, SentenceEnd) for e in events)
    return events, np.frombuffer(to_pcm(np.concatenate(waves)), "<i2")


class Pipe(io.RawIOBase):
    """Standard input that gives its bytes in pieces; at its end it does what it is told."""

    def __init__(self, data: bytes, sizes: list[int], at_end=lambda: None):
        self.data, self.sizes, self.at_end = data, sizes, at_end

    @property
    def buffer(self) -> Pipe:
        return self

    def isatty(self) -> bool:
        return False

    def read1(self, size: int) -> bytes:
        if not self.data:
            self.at_end()
        size = min(size, max(1, self.sizes.pop())) if self.sizes else size
        given, self.data = self.data[:size], self.data[size:]
        return given

    def read(self, size: int = -1) -> bytes:
        return self.read1(size)


class Out:
    def __init__(self, fail_after: int | None = None):
        self.data, self.fail_after = b"", fail_after

    @property
    def buffer(self) -> Out:
        return self

    def isatty(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        if self.fail_after is not None and len(self.data) >= self.fail_after:
            raise BrokenPipeError
        self.data += data

    def flush(self) -> None:
        pass


def sentence(text: str, first: float = 1.0, last: float = 3.0, index: int = 0, source: str = "Hola.") -> SentenceEnd:
    nan = float("nan")
    return SentenceEnd(
        sentence=index, source_time_s=last + 0.5, reason="punctuation", source_text=source, text=text, tokens=(),
        frames=(), units=(), waveform=np.zeros(0, np.float32), sample_rate=16000, start_s=max(0.0, first - 1),
        end_s=last + 0.2, first_heard_s=first, last_heard_s=last, lag=LagStatistics(nan, nan, nan, nan),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- translating


def test_a_recording(tiny_bundle, recording, spoken, tmp_path, capsys):
    events, _speech16 = spoken
    out = tmp_path / "new" / "english.wav"
    status = main(
        ["translate", str(recording), "-o", str(out), "--subtitles", str(tmp_path / "talk.srt"), "--checkpoint-dir",
         str(tiny_bundle)]
    )  # fmt: skip
    assert status == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    ends = [e for e in events if isinstance(e, SentenceEnd)]
    for end in ends:
        assert end.text in shown.err
    assert re.search(rf"^{len(ends)} sentences? in 00:02\.4 of speech; computed for ", shown.err, re.MULTILINE)
    # On the source's clock: silence, and each piece of speech no earlier than it was decided.
    samples, rate = read_audio(out)
    assert rate == 16000
    first = next(e for e in events if isinstance(e, Waveform))
    start = round(first.source_time_s * rate)
    assert not samples[:start].any()
    np.testing.assert_allclose(samples[start : start + len(first.samples)], first.samples, atol=1e-4)
    srt = (tmp_path / "talk.srt").read_text(encoding="utf-8")
    assert srt.count(" --> ") >= sum(bool(end.text.strip()) for end in ends)


def test_without_gaps(tiny_bundle, recording, spoken, tmp_path):
    out = tmp_path / "english.flac"
    options = ["-o", str(out), "--no-gaps", "-q", "--checkpoint-dir", str(tiny_bundle)]
    assert main(["translate", str(recording), *options]) == 0
    np.testing.assert_allclose(np.round(read_audio(out)[0] * 32768), spoken[1], atol=1)


@pytest.mark.parametrize("form", ["raw", "wav"])
def test_pipes_answer_in_kind(form, tiny_bundle, pcm, spoken, monkeypatch, capsys):
    _, speech16 = spoken
    data = wav_stream_header(16000) + pcm if form == "wav" else pcm
    out = Out()
    monkeypatch.setattr(sys, "stdin", Pipe(data, cut(len(data), np.random.default_rng(0), 3001)))
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["translate", "-", "--checkpoint-dir", str(tiny_bundle)]) == 0  # a pipe: -o - goes without saying
    said = out.data
    if form == "wav":
        assert said[:4] == b"RIFF" and said[8:16] == b"WAVEfmt " and said[36:40] == b"data"
        assert struct.unpack("<HHIIHH", said[20:36]) == (1, 1, 16000, 32000, 2, 16)
        said = said[44:]
    np.testing.assert_allclose(np.frombuffer(said, "<i2"), speech16, atol=1)


def test_a_real_pipe(tiny_bundle, pcm, spoken):
    """The program itself, as ``arecord | echostream translate - | aplay`` runs it."""
    command = [sys.executable, "-m", "echostream", "translate", "-", "-o", "-", "--input-rate", "16000"]
    command += ["--threads", "1", "--checkpoint-dir", str(tiny_bundle)]
    done = subprocess.run(command, input=pcm, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    np.testing.assert_allclose(np.frombuffer(done.stdout, "<i2"), spoken[1], atol=1)


def test_a_listener_who_leaves(tiny_bundle, pcm, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", Pipe(pcm, []))
    monkeypatch.setattr(sys, "stdout", Out(fail_after=0))
    subtitles = tmp_path / "talk.vtt"
    assert main(["translate", "-", "-o", "-", "--subtitles", str(subtitles), "--checkpoint-dir", str(tiny_bundle)]) == 0
    assert " --> " in subtitles.read_text(encoding="utf-8")


@pytest.mark.parametrize("moment", ["waiting", "computing"])
def test_ctrl_c_flushes(moment, tiny_bundle, pcm, spoken, monkeypatch, tmp_path):
    """Ctrl-C while the source is awaited, and amid computing: what was heard is translated, all files are whole."""
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    before = signal.getsignal(signal.SIGINT)
    if moment == "computing":
        push, heard = StreamingSession.push, []

        def interrupted(self, samples, rate):
            events = push(self, samples[:10], rate)
            heard.append(len(samples))
            if sum(heard) == len(SAMPLES):
                interrupt()
            return events + push(self, samples[10:], rate)

        monkeypatch.setattr(StreamingSession, "push", interrupted)
    monkeypatch.setattr(sys, "stdin", Pipe(pcm, [], interrupt if moment == "waiting" else lambda: None))
    out, subtitles = tmp_path / "english.wav", tmp_path / "talk.srt"
    options = ["-o", str(out), "--no-gaps", "--subtitles", str(subtitles), "--checkpoint-dir", str(tiny_bundle)]
    assert main(["translate", "-", *options]) == 130
    np.testing.assert_allclose(np.round(read_audio(out)[0] * 32768), spoken[1], atol=1)
    assert " --> " in subtitles.read_text(encoding="utf-8")
    assert signal.getsignal(signal.SIGINT) is before


def test_timeline(tiny_bundle, recording, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "talk.png"
    options = ["--timeline", str(picture), "--timeline-seconds", "2", "-q", "--checkpoint-dir", str(tiny_bundle)]
    assert main(["translate", str(recording), *options]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_knobs_reach_the_session(tiny_bundle, recording, monkeypatch):
    made = []
    init = StreamingSession.__init__
    monkeypatch.setattr(
        StreamingSession, "__init__", lambda self, *args, **kwargs: (made.append(self), init(self, *args, **kwargs))[1]
    )
    knobs = "--policy wait-k --wait-k 5 --wait-unit tokens --chunk-ms 640 --beam 3 --segmenter none".split()
    knobs += ["--max-sentence-s", "8"]
    assert main(["translate", str(recording), "-q", "--checkpoint-dir", str(tiny_bundle), *knobs]) == 0
    engine = made[0].engine
    assert (engine.policy.wait_k, engine.policy.wait_unit, engine.policy.wait_stride) == (5, "tokens", 1)
    assert (engine.settings.chunk_ms, engine.max_frames, engine.segmenter.name) == (640, 200, "none")
    assert engine.settings.beam == 3 and not engine.settings.speech


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.wav"], "audio file none.wav does not exist"),
        (["{talk}", "-o", "out.doc"], "out.doc has no suffix of an audio format; try out.wav"),
        (["{talk}", "--subtitles", "out.txt"], "subtitles out.txt must end in .srt or .vtt"),
        (["{talk}", "--timeline", "out.jpg"], "timeline out.jpg must end in .png"),
        (["{talk}", "--timeline", "out.png", "--timeline-seconds", "9999"], "a timeline of 9999 s cannot be drawn"),
        (["{talk}", "--wait-k", "3"], "--wait-k is no knob of policy 'ctc'; it has: --lagging-k1"),
        (["{talk}", "--segmenter", "wish"], "unknown segmenter 'wish'"),
        (["{talk}", "--segmenter", "ct"], "segmenter 'ct' needs a CT-Transformer's directory"),
        (["{talk}", "--min-pause-ms", "300"], "--min-pause-ms is for --segmenter pause, not for punctuation"),
        (["{talk}", "--max-sentence-s", "900"], "--max-sentence-s is 900; this model's buffers allow 1 to 10.24"),
        (["{talk}", "--threads", "0"], "--threads is 0"),
        (["{talk}", "--chunk-ms", "1"], "chunk_ms is 1"),
        (["{talk}", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["{talk}", "--checkpoint-dir", "nowhere"], "checkpoint directory nowhere does not exist"),
        (["{talk}", "-o", "o.wav", "--output-format", "raw"], "--output-format is for -o -"),
    ],
)
def test_refusals_are_one_line(arguments, message, tiny_bundle, recording, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [a.format(talk=recording) for a in arguments]
    if "--checkpoint-dir" not in arguments:
        arguments += ["--checkpoint-dir", str(tiny_bundle)]
    assert main(["translate", *arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}") and len(shown.splitlines()) == 1


def test_no_shipped_model(monkeypatch, recording, capsys, tmp_path):
    monkeypatch.setattr("echostream.checkpoint.layout.DEFAULT_BUNDLE", tmp_path / "none")
    for arguments in (["translate", str(recording)], ["info"]):
        assert main(arguments) == 1
        expected = r"error: no model is shipped in .*none; train one as docs/training.md says"
        assert re.match(expected, capsys.readouterr().err)


def test_help_and_version(capsys):
    for arguments in (["--help"], ["translate", "--help"], ["info", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "arecord" in shown and "--alignatt-frames" in shown and "echostream 0." in shown


# ----------------------------------------------------------------------------------------------------------- info


def test_info(tiny_bundle, capsys):
    assert main(["info", str(tiny_bundle)]) == 0
    shown = capsys.readouterr().out
    for expected in ("source", "es", "MT decoder", "vocoder", "look-ahead (ms)", "encoder segment", "CTCCountPolicy"):
        assert expected in shown
    assert main(["info", str(tiny_bundle), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    bundle = load_bundle(tiny_bundle)
    model = sum(p.numel() for p in bundle.model.parameters())
    voice = sum(p.numel() for p in bundle.vocoder.parameters())
    assert told["parameters"]["in all"] == model + voice and told["parameters"]["vocoder"] == voice
    assert told["vocabularies"] == {"source subwords": 39, "target subwords": 39, "units": 20}
    assert told["look-ahead (ms)"]["encoder segment"] == 160
    assert told["files (bytes)"]["model.pt"] == (tiny_bundle / "model.pt").stat().st_size


def test_info_of_a_training_checkpoint(tiny_bundle, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    bundle = load_bundle(tiny_bundle)
    path = tmp_path / "checkpoint_best.pt"
    torch.save({"model": bundle.model.state_dict(), "cfg": {"model": dict(bundle.config.to_dict())}}, path)
    assert main(["info", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"]["in all"] == sum(t.numel() for t in bundle.model.state_dict().values())
    assert told["configuration"]["encoder_embed_dim"] == 32


# -------------------------------------------------------------------------------------------------------- outputs


def test_subtitle_formats(tmp_path):
    long = "one two three four five six seven eight nine ten " * 4
    ends = [
        sentence("Hello & <welcome>.", 1.0, 2.0),
        sentence(long, 2.2, 12.2, 1),
        sentence("", 13.0, 14.0, 2),
        sentence("Bye.", 3723.0, 3724.0, 3),
    ]
    for name in ("talk.srt", "talk.vtt"):
        file = SubtitleFile(tmp_path / name)
        for end in ends:
            file.take(end)
        file.close()
    srt = (tmp_path / "talk.srt").read_text(encoding="utf-8")
    blocks = [block.split("\n") for block in srt.strip().split("\n\n")]
    assert [int(block[0]) for block in blocks] == list(range(1, len(blocks) + 1)) and len(blocks) >= 4
    times = [re.fullmatch(r"(\d\d:\d\d:\d\d,\d{3}) --> (\d\d:\d\d:\d\d,\d{3})", block[1]).groups() for block in blocks]
    flat = [time for pair in times for time in pair]
    assert flat == sorted(flat)  # no overlaps
    assert blocks[0][1:] == ["00:00:00,600 --> 00:00:02,000", "Hello & <welcome>."]
    assert times[-1] == ("01:02:02,600", "01:02:05,000") and times[-2][1] == "00:00:13,200"  # they linger a second
    assert all(len(block) <= 4 and max(map(len, block[2:])) <= LINE_LETTERS for block in blocks)
    assert " ".join(line for block in blocks[1:-1] for line in block[2:]) == long.strip()
    vtt = (tmp_path / "talk.vtt").read_text(encoding="utf-8")
    assert vtt.startswith("WEBVTT\n\n1\n00:00:00.600 --> 00:00:02.000\nHello &amp; &lt;welcome&gt;.\n")


def test_a_hasty_sentence_still_can_be_read():
    found = cues(sentence("Yes.", 5.0, 5.0), not_before=5.2)
    assert [(cue.start, cue.end) for cue in found] == [(5.2, 6.2)]
    assert stamp(59.9996, ".srt") == "00:01:00,000" and clock(3725.04) == "1:02:05" and clock(65.25) == "01:05.2"


def test_subtitles_are_valid_before_they_are_closed(tmp_path):
    file = SubtitleFile(tmp_path / "talk.srt")
    file.take(sentence("One.", 1.0, 2.0))
    file.take(sentence("Two.", 3.0, 4.0, 1))
    assert (tmp_path / "talk.srt").read_text(encoding="utf-8") == "1\n00:00:00,600 --> 00:00:02,600\nOne.\n\n"


class Screen(io.StringIO):
    """Just enough of a terminal to know what stands on it."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        rows, row = [""], 0
        for part in re.findall(r"\x1b\[[0-9]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if part.startswith("\x1b["):
                if part[-1] == "A":
                    row -= int(part[2:-1] or 1)
                elif part[-1] == "J":
                    rows = [*rows[:row], ""]
            elif part == "\n":
                row += 1
                rows += [""] * (row + 1 - len(rows))
            elif part != "\r":
                rows[row] += part
        return rows


def test_live_text_is_redrawn_in_place(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    text = LiveText(screen, "es", "en", seconds=65.0, width=40)
    text.take(SourceText(sentence=0, source_time_s=1.0, tokens=(5,), text="Hola", final=False))
    text.show(1.0)
    text.take(
        TargetText(sentence=0, source_time_s=1.3, tokens=(5,), frames=(4,), text="Hello", sentence_text="Hello" * 12)
    )
    text.show(1.28)
    assert screen.lines()[0] == "00:01.3/01:05.0  es  Hola"
    assert screen.lines()[1].endswith("HelloHello") and "…" in screen.lines()[1] and len(screen.lines()[1]) <= 40
    text.take(sentence("Hello.", 0.8, 1.9))
    text.show(2.0)
    text.close()
    assert screen.lines() == [" 00:00.8  es  Hola.", "          en  Hello.", ""]


def test_a_log_gets_finished_sentences_only():
    log = io.StringIO()
    text = LiveText(log, "es", "en")
    text.take(SourceText(sentence=0, source_time_s=1.0, tokens=(5,), text="Hola", final=False))
    text.show(1.0)
    assert log.getvalue() == ""
    text.take(sentence("Hello.", 0.8, 1.9))
    text.message("done")
    text.close()
    assert log.getvalue() == " 00:00.8  es  Hola.\n          en  Hello.\ndone\n"


def test_words_are_timed_by_their_sound():
    words = Vocabulary(["▁good", "▁mor", "ning", "."])
    common = dict(sentence=0)
    events = [
        TargetText(source_time_s=1.0, tokens=(4, 5, 6), frames=(1, 1, 1), text="", sentence_text="", **common),
        TargetUnits(source_time_s=1.2, units=(1,), frames=1, inputs=2, **common),
        TargetUnits(source_time_s=1.5, units=(2,), frames=1, inputs=3, **common),
        TargetText(source_time_s=1.9, tokens=(7,), frames=(1,), text="", sentence_text="", **common),
        sentence("good morning.", 0.1, 1.9),
    ]
    times = WordTimes(words, speech=True, units_read_text=True)
    for event in events:
        times.take(event)
    assert [(w.text, w.seconds) for w in times.words] == [("good", 1.2), ("morning.", 1.5)]
    written = WordTimes(words, speech=False, units_read_text=True)
    for event in events:
        written.take(event)
    assert [(w.text, w.seconds) for w in written.words] == [("good", 1.0), ("morning.", 1.0)]


def test_speech_keeps_the_clock(tmp_path):
    piece = np.full(1600, 0.5, np.float32)
    events = [Waveform(sentence=0, source_time_s=t, samples=piece, sample_rate=16000) for t in (0.2, 0.25, 12.0)]
    file = SpeechFile(tmp_path / "out.wav", 16000)
    for event in events:
        file.take(event)
    file.close()
    loud = read_audio(tmp_path / "out.wav")[0] > 0.1
    assert [int(i) for i in np.flatnonzero(np.diff(loud.astype(int)))] == [3199, 6399, 191999] and len(loud) == 193600
    out = Out(fail_after=1)
    pipe = SpeechPipe(out, 16000, header=False)
    for event in events:
        pipe.take(event)
    assert pipe.broken and out.data == to_pcm(piece)


# ---------------------------------------------------------------------------------------------------------- inputs


def wav(kind: tuple[int, int], values: np.ndarray, rate: int = 8000, channels: int = 1, size: int | None = None):
    """A WAV with a LIST chunk before its data."""
    tag, bits = kind
    body = values.tobytes()
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    size = len(body) if size is None else size
    return (
        b"RIFF" + struct.pack("<I", 0) + b"WAVE" + b"LIST" + struct.pack("<I", 3) + b"abc\0"
        + b"fmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", size) + body
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ((1, 8), np.array([128, 192, 64, 255], np.uint8)),
        ((1, 16), np.array([0, 16384, -16384, 32767], "<i2")),
        ((1, 24), np.frombuffer(bytes([0, 0, 0, 0, 0, 64, 0, 0, 192, 255, 255, 127]), np.uint8)),
        ((1, 32), np.array([0, 1 << 30, -(1 << 30), (1 << 31) - 1], "<i4")),
        ((3, 32), np.array([0, 0.5, -0.5, 1], "<f4")),
    ],
    ids=["u8", "s16", "s24", "s32", "f32"],
)
def test_wav_streams(kind, values):
    for size, rest in ((None, b"LIST\x04\0\0\0junk"), (0x7FFFFFFF, b"")):
        source = open_pipe(Pipe(wav(kind, values, size=size) + rest, [5] * 20), 16000)
        assert (source.rate, source.wav) == (8000, True)
        np.testing.assert_allclose(np.concatenate(list(source.blocks)), [0, 0.5, -0.5, 1], atol=0.01)


def test_channels_are_averaged():
    values = np.array([100, 300, -5, 5], "<i2")
    for data in (values.tobytes() + b"\0", wav((1, 16), values, 16000, 2)):  # an odd byte at the end is no sample
        source = open_pipe(Pipe(data, [3] * 40), 16000, channels=2)
        np.testing.assert_allclose(np.concatenate(list(source.blocks)) * 32768, [200, 0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"RIFF1234AVI ", "not a WAV stream"),
        (wav((1, 16), np.zeros(1, "<i2"))[:30], "ends inside its header"),
        (wav((6, 8), np.zeros(1, "u1")), "format 6 with 8 bits"),
        (wav((1, 16), np.zeros(1, "<i2"), rate=7), "sample rate 7"),
    ],
    ids=["avi", "cut", "a-law", "rate"],
)
def test_wav_streams_that_are_none(data, message):
    with pytest.raises(AudioError, match=message):
        open_pipe(Pipe(data, []), 16000)


def test_a_file_is_read_in_pieces(recording):
    source = open_file(recording, block_ms=50)
    blocks = list(source.blocks)
    source.close()
    assert source.seconds == pytest.approx(2.4) and {len(block) for block in blocks[:-1]} == {800}
    np.testing.assert_array_equal(np.concatenate(blocks), read_audio(recording)[0])


def test_subtitles_and_speech_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EchoStreamError, match="cannot be written"):
        SubtitleFile(tmp_path / "file" / "talk.srt")
    with pytest.raises(AudioError, match="cannot be written"):
        SpeechFile(tmp_path / "file" / "talk.wav", 16000)
