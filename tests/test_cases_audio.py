"""Faults that others' reports and fuzzing found, each with its kind: sound in, sound out, sessions, files written.

The numbers are those of the list the faults were collected in.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

from echostream import files
from echostream.audio.decode import find_ffmpeg
from echostream.audio.formats import sniff
from echostream.audio.io import load_audio, read_audio, write_audio
from echostream.audio.level import LevelWatch
from echostream.audio.resample import Resampler, check_rate
from echostream.audio.stream import open_file, open_pipe, to_pcm, wav_stream_header
from echostream.cli import main
from echostream.data.corpus.rows import Ledger
from echostream.data.corpus.speech import _reason
from echostream.data.source import load_features
from echostream.errors import AudioError, AudioWarning, EchoStreamError, LongAudioError, OutputError, SessionError
from echostream.output.speech import SpeechFile
from echostream.output.subtitles import SubtitleFile
from echostream.output.terminal import LiveText
from echostream.streaming.batch import SessionBatch
from echostream.streaming.events import Waveform
from echostream.streaming.session import StreamingSession
from tests.test_cli import SAMPLES, Pipe, sentence, wav
from tests.test_streaming import BUNDLES, assert_same, speech, translate

FULL_DISK = Path("/dev/full")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "talk.wav"
    write_audio(path, SAMPLES)
    return path


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "echostream", *map(str, arguments)], capture_output=True, timeout=300, **options
    )


def samples_of(data: bytes, **options) -> np.ndarray:
    """What a pipe of these bytes gives, at its own rate."""
    source = open_pipe(io.BytesIO(data), 16000, **options)
    try:
        return np.concatenate([np.zeros(0, np.float32), *source.blocks])
    finally:
        source.close()


# --------------------------------------------------------------------------------- 1: outputs that are inputs


@pytest.mark.parametrize("link", ["itself", "hard link", "symbolic link", "other name", "flac"])
def test_case_01_outputs_are_compared_with_the_input(link, tiny_bundle, recording, tmp_path, capsys):
    if link == "flac":
        recording = tmp_path / "talk.flac"
        write_audio(recording, SAMPLES)
    before, output = recording.read_bytes(), tmp_path / f"out{recording.suffix}"
    if link == "hard link":
        os.link(recording, output)
    elif link == "symbolic link":
        output.symlink_to(recording)
    else:
        output = recording if link != "other name" else tmp_path / "new" / ".." / recording.name
    (tmp_path / "new").mkdir()
    assert main(["translate", str(recording), "-o", str(output), "--checkpoint-dir", str(tiny_bundle)]) == 1
    shown = capsys.readouterr().err
    assert "-o and the input are the same file" in shown and len(shown.splitlines()) == 1
    assert recording.read_bytes() == before


def test_case_01_outputs_are_compared_with_each_other_and_with_pipes(tiny_bundle, recording, tmp_path, capsys):
    subtitles = tmp_path / "talk.srt"
    (tmp_path / "out.wav").symlink_to(subtitles)  # neither exists yet
    options = ["-o", str(tmp_path / "out.wav"), "--subtitles", str(subtitles), "--checkpoint-dir", str(tiny_bundle)]
    assert main(["translate", str(recording), *options]) == 1
    assert "--subtitles and -o are the same file" in capsys.readouterr().err
    before = recording.read_bytes()
    with recording.open("rb") as talk:  # es translate - < talk.wav -o talk.wav
        done = run("translate", "-", "-o", recording, "--checkpoint-dir", tiny_bundle, stdin=talk)
    assert done.returncode == 1 and b"the input are the same file" in done.stderr and recording.read_bytes() == before


def test_case_01_other_commands(tmp_path, tiny_bundle, capsys):
    units = tmp_path / "units.wav"
    units.write_text("1 2 3\n")
    assert main(["vocode", str(units), "-o", str(units), "-q"]) == 1
    assert "-o and the units are the same file" in capsys.readouterr().err and units.read_text() == "1 2 3\n"
    assert main(["export", str(tiny_bundle), "-o", str(tiny_bundle)]) == 1
    (tmp_path / "model.pt").write_text("another model")
    assert main(["export", str(tiny_bundle), "-o", str(tmp_path)]) == 1  # export over a checkpoint
    assert "is a checkpoint, which would be lost" in capsys.readouterr().err
    files.keep_apart({"-o": "/dev/null"}, {"the input": "/dev/null"})  # devices are nobody's


# -------------------------------------------------------------------------------- 2: samples that overflow


@pytest.mark.parametrize("value", [1e15, -3e38, 1e12, 3e9])
def test_case_02_impossible_samples_are_refused_and_forgotten(value):
    bundle, samples = BUNDLES["mt"], speech(2.0)
    session = StreamingSession(bundle)
    events = session.push(samples[:7000])
    broken = samples[7000:20000].copy()
    broken[[100, 3000, 7000]] = value
    with pytest.raises(AudioError, match="3 samples beyond 2e.09 .* the first at position 100"):
        session.push(broken)
    assert_same(events + session.push(samples[7000:]) + session.finish(), translate(bundle, samples, policy=None))


def test_case_02_neighbours_in_a_batch_are_untouched():
    bundle, samples = BUNDLES["mt"], speech(2.0)
    batch = SessionBatch(bundle, 2)
    one, other = batch.join(), batch.join()
    broken = samples.copy()
    broken[5] = 1e16
    with pytest.raises(AudioError, match="beyond"):
        batch.push({one: samples, other: broken})
    events = batch.push({one: samples, other: samples[:100]})[one]
    assert_same(events + batch.finish(one, other)[one], translate(bundle, samples, policy=None))


def test_case_02_files_are_named(tmp_path, tiny_bundle, capsys):
    path = tmp_path / "flipped.wav"
    samples = SAMPLES.copy()
    samples[20000] = 1e20
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    for read in (load_audio, read_audio, lambda path: load_features(tmp_path, path.name)):
        with pytest.raises(EchoStreamError, match="flipped.wav.* the first at position 20000"):
            read(path)
    subtitles = tmp_path / "talk.srt"
    options = ["--subtitles", str(subtitles), "--checkpoint-dir", str(tiny_bundle), "-q"]
    assert main(["translate", str(path), *options]) == 1
    assert "flipped.wav has 1 samples beyond" in capsys.readouterr().err
    assert " --> " in subtitles.read_text()  # what came before is translated


def test_case_02_the_largest_sample_allowed_leaves_no_trace_of_nan():
    bundle, samples = BUNDLES["mt"], speech(1.0)
    session = StreamingSession(bundle)
    loud = samples.copy()
    loud[4000] = 2.0**31
    with np.errstate(over="raise", invalid="raise"), pytest.warns(AudioWarning):
        session.push(loud)
        session.push(samples)
        session.finish()


# ------------------------------------------------------------------------------- 4: formats through pipes

PIPED = {
    "au": ("AU", "PCM_16"), "aiff": ("AIFF", "PCM_16"), "w64": ("W64", "PCM_16"), "rf64": ("RF64", "PCM_16"),
    "flac": ("FLAC", "PCM_16"), "caf": ("CAF", "PCM_16"), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"), "ulaw": ("AU", "ULAW"), "wav24": ("WAV", "PCM_24"), "wave": ("WAVEX", "FLOAT"),
    "voc": ("VOC", "PCM_16"), "nist": ("NIST", "PCM_16"), "big": ("WAV", "PCM_16"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PIPED)
def test_case_04_a_pipe_gives_what_the_file_gives(kind, tmp_path):
    form, subtype = PIPED[kind]
    path = tmp_path / f"talk.{kind}"
    endian = "BIG" if kind == "big" else "FILE"
    soundfile.write(path, SAMPLES, 16000, format=form, subtype=subtype, endian=endian)
    source = open_pipe(Pipe(path.read_bytes(), list(range(1, 400))), 44100)  # in pieces, another rate promised
    piped = np.concatenate(list(source.blocks))
    source.close()
    assert (source.rate, source.wav) == (16000, True)
    whole, rate = read_audio(path)
    assert rate == 16000 and len(piped) == len(whole)
    np.testing.assert_allclose(piped, whole, atol=1e-6)


@pytest.mark.parametrize("order", "<>")
def test_case_04_sox_pipes(order):
    values = (SAMPLES * 2**30).astype(np.int32)
    head = struct.pack(order + "IQdII", 36, 0, 22050.0, 2, 5) + b"hello\0\0\0"
    data = (b".SoX" if order == "<" else b"XoS.") + head + np.repeat(values, 2).astype(order + "i4").tobytes()
    source = open_pipe(io.BytesIO(data), 16000)
    assert source.rate == 22050
    np.testing.assert_allclose(np.concatenate(list(source.blocks)), SAMPLES / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>x</body></html>" * 3, "an HTML page"),
        ("¿Qué tal? Esto no es sonido, sino un texto cualquiera que alguien ha enviado.\n".encode() * 3, "text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
        (b"%PDF-1.7\n" + bytes(100), "a PDF document"),
        (b"PK\x03\x04" + bytes(100), "a ZIP archive"),
        (b"\x1f\x8b\x08\0" + bytes(100), "gzip data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_case_04_what_is_no_sound_is_refused_by_name(data, name, tmp_path):
    with pytest.raises(AudioError, match=f"standard input is {name}, not audio"):
        open_pipe(io.BytesIO(data), 16000)
    assert len(samples_of(data, raw=True)) == len(data) // 2  # --input-raw
    path = tmp_path / "talk.mp3"
    path.write_bytes(data)
    with pytest.raises(AudioError, match=f"talk.mp3 cannot be read as audio: it is {name}"):
        load_audio(path)


@pytest.mark.parametrize("seed", range(4))
def test_case_04_raw_pcm_stays_raw(seed):
    """Noise, silence, a constant, and sound that begins like a frame of MPEG audio."""
    rng = np.random.default_rng(seed)
    values = [rng.integers(-32768, 32767, 3000), np.zeros(500), np.full(500, 0x2020), rng.integers(-900, 900, 20000)]
    data = np.asarray(values[seed], dtype="<i2").tobytes()
    data = b"\xff\xfb\x90\x64" + data if seed == 3 else data
    assert sniff(data) is None
    np.testing.assert_array_equal(samples_of(data) * 32768, np.frombuffer(data, "<i2"))


def test_case_04_damaged_streams_are_one_line(tmp_path):
    path = tmp_path / "talk.flac"
    soundfile.write(path, SAMPLES, 16000)
    for data in (path.read_bytes()[:60], b"fLaC" + bytes(200), b"OggS" + bytes(500), b".snd" + bytes(100)):
        with pytest.raises(AudioError) as caught:
            samples_of(data)
        assert "\n" not in str(caught.value)


def test_case_04_lengths_that_are_not_known(tmp_path):
    """As ``ffmpeg -f flac -`` writes it, which cannot go back to the header."""
    path = tmp_path / "open.flac"
    soundfile.write(path, SAMPLES, 16000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    source = open_file(path)
    assert source.seconds is None
    for found in (np.concatenate(list(source.blocks)), samples_of(bytes(data))):
        np.testing.assert_allclose(found, SAMPLES, atol=1e-4)


@pytest.mark.parametrize("kind", ["flac", "ogg"])
def test_case_04_a_pipe_that_breaks_is_one_line(kind, tmp_path, capfd):
    path = tmp_path / f"talk.{kind}"
    soundfile.write(path, np.tile(SAMPLES, 4), 16000)

    class Broken(Pipe):
        def read1(self, size: int) -> bytes:
            if len(self.data) < 3000:
                raise OSError(5, "Input/output error")
            return super().read1(min(size, 500))

    with pytest.raises(AudioError, match="standard input cannot be read: Input/output error"):
        list(open_pipe(Broken(path.read_bytes(), []), 16000).blocks)
    assert capfd.readouterr().err == ""


def test_case_04_ffmpeg_reads_the_rest(tmp_path, monkeypatch):
    program = find_ffmpeg()
    if program is None:
        pytest.skip("no ffmpeg")
    path = tmp_path / "talk.wav"
    write_audio(path, SAMPLES)
    for suffix in ("m4a", "webm"):
        other = tmp_path / f"-talk.{suffix}"
        subprocess.run([program, "-v", "error", "-i", path, f"file:{other}"], check=True)
        found, piped = load_audio(other), samples_of(other.read_bytes())
        rate = open_file(other).rate
        assert abs(len(found) - len(SAMPLES)) < 2000 and np.abs(np.corrcoef(found[:38000], SAMPLES[:38000])[0, 1]) > 0.8
        np.testing.assert_allclose(Resampler(rate, 16000).resample(piped), found, atol=1e-5)
    cut = tmp_path / "cut.m4a"
    cut.write_bytes((tmp_path / "-talk.m4a").read_bytes()[:300])
    with pytest.raises(AudioError, match="cut.m4a cannot be read as audio: .*"):
        load_audio(cut)
    monkeypatch.setattr("echostream.audio.decode.find_ffmpeg", lambda: None)
    for read in (load_audio, lambda path: samples_of(path.read_bytes())):
        with pytest.raises(AudioError, match=r"is an MPEG-4 .*; reading it needs ffmpeg .*echostream\[formats\]"):
            read(tmp_path / "-talk.m4a")


def test_case_04_play_lists_open_no_other_files(tmp_path):
    """ffmpeg would follow them."""
    write_audio(tmp_path / "secret.wav", SAMPLES)
    for text in ("ffconcat version 1.0\nfile secret.wav\n", "#EXTM3U\n#EXTINF:1,\nsecret.wav\n"):
        path = tmp_path / "list.m4a"
        path.write_text(text)
        with pytest.raises(AudioError):
            load_audio(path)


# ---------------------------------------------------------------------------- 13: sizes in headers are hints


@pytest.mark.parametrize("size", [0, 1000, 0x7FFFEFFC, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [(1, 16), (1, 24)], ids=["16", "24"])
def test_case_13_sound_behind_what_the_header_says(size, kind, tmp_path):
    values = np.round(SAMPLES * 32767).astype("<i2")
    body = values if kind == (1, 16) else np.frombuffer(
        b"".join(b"\0" + v.tobytes() for v in values), np.uint8
    )  # fmt: skip
    data = wav(kind, body, 16000, size=size)
    path = tmp_path / "died.wav"
    path.write_bytes(data)
    for found in (samples_of(data), read_audio(path)[0], np.concatenate(list(open_file(path).blocks))):
        np.testing.assert_allclose(found, values / 32768, atol=1e-4)


def test_case_13_what_follows_the_sound_is_not_heard(tmp_path):
    values = np.round(SAMPLES * 32767).astype("<i2")
    for tail in (b"LIST\x04\0\0\0junk", b"id3 \x06\0\0\0abcdef", b""):
        path = tmp_path / "tagged.wav"
        path.write_bytes(wav((1, 16), values, 16000) + tail)
        assert len(samples_of(path.read_bytes())) == len(read_audio(path)[0]) == len(values)


def test_case_13_two_recordings_in_one_pipe():
    values = np.round(SAMPLES * 32767).astype("<i2")
    one = wav((1, 16), values, 16000)
    assert len(samples_of(one + one)) == 2 * len(values)
    with pytest.raises(AudioError, match="goes on with a WAV of another format"):
        samples_of(one + wav((1, 16), values, 8000))


@pytest.mark.parametrize("between", [b"", b"TAG" + bytes(125), bytes(300), b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)])
def test_case_13_mp3s_behind_each_other_are_all_heard(between, tmp_path):
    """The first one says how long it is; libsndfile believes it and ends there."""
    parts = [mp3(tone(seconds)) for seconds in (0.8, 0.5, 0.3)]
    path = tmp_path / "joined.mp3"
    path.write_bytes(between.join(parts))
    expected = np.concatenate([np.concatenate(list(open_pipe(io.BytesIO(part), 16_000).blocks)) for part in parts])
    for source in (open_file(path), open_pipe(io.BytesIO(path.read_bytes()), 16_000)):
        np.testing.assert_array_equal(np.concatenate(list(source.blocks)), expected)
        source.close()
    np.testing.assert_array_equal(load_audio(path), expected)


def test_case_13_mp3s_of_two_rates_are_refused(tmp_path):
    path = tmp_path / "joined.mp3"
    path.write_bytes(mp3(tone(0.5)) + mp3(tone(0.5), 24_000))
    with pytest.raises(AudioError, match="joined.mp3 goes on at 24000 Hz after 16000 Hz"):
        load_audio(path)


def tone(seconds: float) -> np.ndarray:
    return (0.3 * np.sin(0.2 * np.arange(int(16_000 * seconds)))).astype(np.float32)


def mp3(samples: np.ndarray, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="MP3")
    return file.getvalue()


def test_case_13_nothing_is_no_recording(tmp_path, tiny_bundle, capsys):
    path = tmp_path / "nothing.wav"
    path.write_bytes(wav((1, 16), np.zeros(0, "<i2"), 16000))
    with open(os.devnull, "rb") as nothing:
        done = run("translate", "-", "--subtitles", tmp_path / "x.srt", "--checkpoint-dir", tiny_bundle, stdin=nothing)
    assert done.returncode == 1 and b"standard input holds no samples" in done.stderr
    assert main(["translate", str(path), "--checkpoint-dir", str(tiny_bundle)]) == 1
    assert "nothing.wav holds no samples" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_case_13_our_own_recording_survives_signals(number, tiny_bundle, tmp_path):
    out, subtitles = tmp_path / "english.wav", tmp_path / "talk.srt"
    command = [sys.executable, "-m", "echostream", "translate", "-", "-o", out, "--subtitles", subtitles]
    process = subprocess.Popen(
        [*map(str, command), "--checkpoint-dir", str(tiny_bundle)], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup would have it ignored
    )  # fmt: skip
    talk = to_pcm(speech(12.0, seed=9))
    process.stdin.write(talk)
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out.exists() and out.stat().st_size > 20_000):
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    with out.open("rb") as raw:
        declared = struct.unpack("<I", raw.read(44)[40:])[0]
    assert declared > 0 and abs(declared - (out.stat().st_size - 44)) <= (0 if number != signal.SIGKILL else 64000)
    assert len(read_audio(out)[0]) == (out.stat().st_size - 44) // 2
    if number != signal.SIGKILL:
        assert process.returncode == 130, said
        assert " --> " in subtitles.read_text() and b"Traceback" not in said


# ----------------------------------------------------------------------------------- 14: bounded cost


@pytest.mark.parametrize("rate", [767_999, 95_971, 44_056, 15_999, 1001])
def test_case_14_odd_rates_are_cheap_and_right(rate):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    times = np.arange(rate // 10) / rate
    resampler = Resampler(rate, 16000)
    found = resampler.resample(0.5 * np.sin(2 * np.pi * 300 * times).astype(np.float32))
    assert resampler.filters.nbytes < 2e6
    assert time.process_time() - started < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kilobytes
    expected = 0.5 * np.sin(2 * np.pi * 300 * np.arange(len(found)) / 16000)
    middle = slice(len(found) // 2 - 50, len(found) // 2 + 50)
    np.testing.assert_allclose(found[middle], expected[middle], atol=2e-3 if rate == 1001 else 2e-5)


def test_case_14_odd_rates_stream_bit_by_bit():
    rng = np.random.default_rng(0)
    samples, resampler = rng.standard_normal(30_000).astype(np.float32), Resampler(95_971, 16000)
    state, parts, at = resampler.init_state(), [], 0
    while at < len(samples):
        size = int(rng.integers(1, 4000))
        part, state = resampler.step(samples[at : at + size], state)
        parts.append(part)
        at += size
    parts.append(resampler.step(samples[:0], state, finished=True)[0])
    np.testing.assert_array_equal(np.concatenate(parts), resampler.resample(samples))


def test_case_14_headers_that_promise_much(tmp_path):
    path = tmp_path / "long.flac"
    soundfile.write(path, SAMPLES, 16000)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # total samples: 36 bits, from the low half of byte 21 on
    data[22:26] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (load_audio, lambda path: samples_of(path.read_bytes())):
        try:
            assert abs(len(read(path)) - len(SAMPLES)) < 5000
        except AudioError as error:
            assert "long.flac" in str(error) or "standard input" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    endless = b"RIFF\xff\xff\xff\xffWAVE" + b"LIST\xff\xff\xff\xff"
    with pytest.raises(AudioError, match="MB before its sound"):
        samples_of(endless + bytes(1000))
    with pytest.raises(AudioError, match="2000 channels"):
        samples_of(wav((1, 16), np.zeros(9, "<i2"), 16000, channels=2000))


def test_case_14_what_is_read_at_once_has_a_limit(monkeypatch, recording):
    monkeypatch.setattr("echostream.audio.io.LONGEST_S", 2)
    with pytest.raises(LongAudioError, match="talk.wav is longer than 2 s"):
        load_audio(recording)
    assert len(load_audio(recording, longest_s=3)) == len(SAMPLES)
    with pytest.raises(AudioError) as caught:
        load_audio(recording, longest_s=1.5)
    assert _reason(caught.value) == "too long"


# --------------------------------------------------------------------------------------- 18: write edges


def full(tmp_path: Path, name: str) -> Path:
    """A place without any room."""
    if not FULL_DISK.exists():
        pytest.skip("no /dev/full")
    (tmp_path / name).symlink_to(FULL_DISK)
    return tmp_path / name


def one_line(text: str | bytes) -> bool:
    text = text.decode() if isinstance(text, bytes) else text
    return "Traceback" not in text and len([line for line in text.splitlines() if "error" in line]) == 1


@pytest.mark.parametrize("option", ["-o x.wav", "-o x.flac", "--subtitles x.vtt", "--timeline x.png"])
def test_case_18_no_room(option, tiny_bundle, recording, tmp_path, capsys):
    if "png" in option:
        pytest.importorskip("matplotlib")
    option, name = option.split()
    path = full(tmp_path, name)
    other = ["--subtitles", str(tmp_path / "other.srt")] if option != "--subtitles" else []
    arguments = ["translate", str(recording), option, str(path), *other, "--checkpoint-dir", str(tiny_bundle), "-q"]
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert one_line(shown) and name in shown and "cannot be written" in shown


def test_case_18_a_disk_that_fills_up_keeps_what_was_made(tmp_path):
    piece = Waveform(sentence=0, source_time_s=0.0, samples=np.full(16000, 0.5, np.float32), sample_rate=16000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (80_001, limit[1]))
        speech_file, subtitles = SpeechFile(tmp_path / "x.wav", 16000, gaps=False), SubtitleFile(tmp_path / "x.srt")
        with pytest.raises(EchoStreamError, match="x.wav cannot be written"):
            for _ in range(4):
                speech_file.take(piece)
        speech_file.take(piece)
        speech_file.close()
        with pytest.raises(OutputError, match="x.srt cannot be written"):
            for number in range(3000):
                subtitles.take(sentence("Good morning.", 2.0 * number, 2.0 * number + 1, number))
        subtitles.close()
        (tmp_path / "old").write_text("old")
        with pytest.raises(OutputError, match="old cannot be written: File too large"):
            files.write_text(tmp_path / "old", "new" * 50_000)
        ledger = Ledger(tmp_path, "work", ("id", "cell"))
        with pytest.raises(OutputError, match="File too large"):
            for number in range(200):
                ledger.append([(number, "x" * 1000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(read_audio(tmp_path / "x.wav")[0]) == (80_000 - 44) // 2
    assert (tmp_path / "x.srt").read_text().endswith("\n\n")
    assert (tmp_path / "old").read_text() == "old"
    assert len(ledger.read()) > 50 and (tmp_path / "work.0-of-1.tsv").read_bytes().endswith(b"x\n")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(files.PARTIAL)]


@pytest.mark.parametrize("place", ["file/x.wav", "directory.wav"])
def test_case_18_places_that_cannot_be_written(place, tiny_bundle, recording, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.wav").mkdir()
    assert main(["translate", str(recording), "-o", str(tmp_path / place), "--checkpoint-dir", str(tiny_bundle)]) == 1
    assert one_line(capsys.readouterr().err)
    session = StreamingSession(BUNDLES["mt"])
    with pytest.raises(OutputError, match="cannot be written"):
        session.save(tmp_path / place)
    with pytest.raises(OutputError, match="cannot be written"):
        files.write_json(tmp_path / place, {})


def test_case_18_nobody_looks_at_the_terminal(tiny_bundle, recording, tmp_path):
    """``2> >(head -1)``, and standard error closed: the work goes on."""
    for name, options in {"gone": {}, "closed": {"preexec_fn": lambda: os.close(2)}}.items():
        reading, writing = os.pipe()
        os.close(reading)
        out = tmp_path / f"{name}.wav"
        command = [sys.executable, "-m", "echostream", "translate", recording, "-o", out]
        done = subprocess.run(
            [*map(str, command), "--checkpoint-dir", str(tiny_bundle)], stderr=writing, timeout=300, **options
        )
        os.close(writing)
        assert done.returncode == 0 and len(read_audio(out)[0]) > 0

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    text = LiveText(Gone(), "es", "en", live=True)
    text.take(sentence("Good morning."))
    text.show(1.0)
    text.message("done")
    text.close()


def test_case_18_standard_output(tiny_bundle, recording):
    if not FULL_DISK.exists():
        pytest.skip("no /dev/full")
    for command in (["info", tiny_bundle], ["translate", recording, "-o", "-", "--checkpoint-dir", tiny_bundle]):
        with FULL_DISK.open("wb") as full_disk:
            done = subprocess.run(
                [sys.executable, "-m", "echostream", *map(str, command)], stdout=full_disk, stderr=subprocess.PIPE,
                timeout=300,
            )  # fmt: skip
        assert done.returncode == 1 and one_line(done.stderr) and b"standard output cannot be written" in done.stderr
    shell = f"{sys.executable} -m echostream info {tiny_bundle} --json | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {shell}"], capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout == b"{\n"


def test_case_18_system_errors_at_the_edge_are_one_line(capsys):
    def fail() -> int:
        raise PermissionError(13, "Permission denied", "/somewhere/x.tsv")

    assert files.run_command(fail, "prog") == 1
    assert capsys.readouterr().err == "prog: /somewhere/x.tsv: Permission denied\n"


def test_case_18_what_a_step_has_finished_stays_when_it_fails(tmp_path):
    ledger = Ledger(tmp_path, "work", ("id", "cell"))
    with pytest.raises(PermissionError), ledger.batches(2) as record:
        for number in range(5):
            record(number, "x")
        raise PermissionError(13, "Permission denied", "/somewhere/else.wav")  # not the ledger's fault
    assert list(ledger.read()) == ["0", "1", "2", "3"]


# ------------------------------------------------------- 17 as far as it is written here: at once or not at all


def test_case_17_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "session.npz"
    files.write_text(path, "old")

    def write_and_die() -> None:
        with files.replacing(path, "w") as file:
            file.write("new")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=write_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and path.read_text() == "old"
    link = tmp_path / "link"
    link.symlink_to(path)
    path.chmod(0o640)
    files.write_text(link, "new")
    assert link.is_symlink() and path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640


def test_case_17_directories_change_at_once(tmp_path):
    target = tmp_path / "model"

    def owned(name: str) -> bool:
        return name.startswith(("a", "b", "config"))

    def fill(*names: str) -> None:
        with files.replacing_directory(target, owned) as new:
            for name in names:
                (new / name).write_text(name)
            if "fail" in names:
                raise KeyError

    fill("a", "b", "config.yaml")
    before = target.stat().st_ino
    fill("a", "config.yaml")
    assert sorted(path.name for path in target.iterdir()) == ["a", "config.yaml"] and target.stat().st_ino != before
    with pytest.raises(KeyError):
        fill("b", "fail")
    assert sorted(path.name for path in target.iterdir()) == ["a", "config.yaml"]
    (target / "notes").write_text("mine")  # nothing of others is lost
    fill("b", "config.yaml")
    assert sorted(path.name for path in target.iterdir()) == ["b", "config.yaml", "notes"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_case_17_two_at_one_file(tmp_path):
    held, go = multiprocessing.get_context("fork").Event(), multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with Ledger(tmp_path, "work", ("id", "cell")).batches(1) as add, files.growing(tmp_path / "x.srt"):
            add("1", "a")
            held.set()
            go.wait(60)
            add("2", "b")

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert held.wait(60)
    try:
        with pytest.raises(OutputError, match="another process is writing it"):
            Ledger(tmp_path, "work", ("id", "cell")).append([("3", "c")])
        with pytest.raises(OutputError, match="another process is writing it"):
            SubtitleFile(tmp_path / "x.srt")
    finally:
        go.set()
        process.join(60)
    assert [line["cell"] for line in Ledger(tmp_path, "work", ("id", "cell")).read().values()] == ["a", "b"]


# ------------------------------------------------------------------------------- 19: the session's interface


def test_case_19_a_stream_named_twice_is_not_finished():
    bundle, samples = BUNDLES["mt"], speech(1.5)
    batch = SessionBatch(bundle, 2)
    number = batch.join()
    events = batch.push({number: samples})[number]
    with pytest.raises(SessionError, match="twice"):
        batch.finish(number, number)
    assert_same(events + batch.finish(number)[number], translate(bundle, samples, policy=None))


@pytest.mark.parametrize("rate", [None, "16000", [16000], True, 16000.5, float("inf"), 10**400, 16000 + 0j])
def test_case_19_rates_that_are_none(rate):
    with pytest.raises(AudioError, match="sample rate"):
        StreamingSession(BUNDLES["mt"]).push(speech(0.1), rate)
    with pytest.raises(AudioError):
        check_rate(rate)


@pytest.mark.parametrize("samples", [[[0.1], [0.1, 0.2]], None, "abc", [None], {"a": 1}, [1 + 2j], object()])
def test_case_19_samples_that_are_none(samples):
    session = StreamingSession(BUNDLES["mt"])
    batch = SessionBatch(BUNDLES["mt"], 1)
    number = batch.join()
    for push in (session.push, lambda samples: batch.push({number: samples})):
        with pytest.raises(AudioError, match="pushed samples"):
            push(samples)
    assert session.push([0.0] * 100) == [] and session.push(np.array([], dtype="U1")) == []
    with pytest.raises(SessionError, match="no stream"):
        batch.push({"x": [0.0]})
    with pytest.raises(SessionError, match="by its number"):
        batch.push([0.0])


def test_case_19_threads_take_turns():
    """No sample is lost, and every stream's events are those of one order of the pushes."""
    session = StreamingSession(BUNDLES["mt"])
    silence = np.zeros(800, dtype=np.float32)

    def feed() -> None:
        for _ in range(20):
            session.push(silence)

    threads = [threading.Thread(target=feed) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.source_time_s == pytest.approx(4 * 20 * 800 / 16000)
    session.finish()


def test_case_19_no_call_within_another():
    session = StreamingSession(BUNDLES["mt"])

    class Samples:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            session.finish()
            return np.zeros(10, np.float32)

    with pytest.raises(SessionError, match="in the middle of another call"):
        session.push(Samples())
    assert not session.finished
    session.push(np.zeros(10, np.float32))


# ------------------------------------------------------------------------------------ 20: names and formats


def test_case_20_names_that_are_no_text(tiny_bundle, tmp_path, capsys):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/charla-\xe9")
    for suffix in (".wav", ".flac"):
        write_audio(name + suffix, SAMPLES)
        assert len(load_audio(name + suffix)) == len(SAMPLES)
    options = ["--subtitles", name + ".srt", "-o", name + ".ogg", "--checkpoint-dir", str(tiny_bundle)]
    assert main(["translate", name + ".wav", *options]) == 0
    assert len(read_audio(name + ".ogg")[0]) and Path(name + ".srt").exists()
    done = run("translate", name + ".mp3", "--checkpoint-dir", tiny_bundle)
    assert done.returncode == 1 and one_line(done.stderr) and b"does not exist" in done.stderr
    done = run("info", name)
    assert done.returncode == 1 and one_line(done.stderr)


def test_case_20_a_page_saved_as_a_recording_is_not_missing(tmp_path):
    path = tmp_path / "clip.mp3"
    reasons = []
    for content in (None, "<html><body>The file does not exist</body></html>" * 9):
        if content:
            path.write_text(content)
        with pytest.raises(AudioError) as caught:
            load_audio(path)
        reasons.append(_reason(caught.value))
    assert reasons == ["missing audio", "unusable audio"]


# --------------------------------------------------------------------------- 21: levels that cannot be speech


def test_case_21_integers_in_floats_are_warned_of_once():
    session = StreamingSession(BUNDLES["mt"])
    loud = speech(1.0) * 32768
    with pytest.warns(AudioWarning, match="full scale is 1: .*divide them by theirs") as caught:
        session.push(loud)
        session.push(loud)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = StreamingSession(BUNDLES["mt"])
        fine.push(speech(1.0) * 3)  # louder than full scale, but a recording
        fine.push((speech(1.0) * 32767).astype(np.int16))


def test_case_21_silence_is_warned_of_once():
    watch = LevelWatch()
    heard = [watch.hear(np.full(16000, 1e-5, np.float32), 16000) for _ in range(30)]
    assert [bool(said) for said in heard] == [second == 19 for second in range(30)]
    assert "below -100 dB" in heard[19] and "microphone" in heard[19]
    watch = LevelWatch()
    assert not any(watch.hear(speech(1.0) * 0.05, 16000) for _ in range(30))


def test_case_21_the_command_line_says_it_in_one_line(tiny_bundle, tmp_path, capsys):
    path = tmp_path / "scale.wav"
    soundfile.write(path, SAMPLES * 32768, 16000, subtype="FLOAT")
    assert main(["translate", str(path), "-q", "--checkpoint-dir", str(tiny_bundle)]) == 0
    shown = capsys.readouterr().err
    assert re.fullmatch(r"warning: samples reach \d+, but full scale is 1.*\n", shown)
    with pytest.warns(AudioWarning, match="scale.wav: samples reach"):
        load_audio(path)


def test_wav_header_of_a_stream_is_read_by_ourselves():
    data = wav_stream_header(16000) + to_pcm(SAMPLES)
    assert len(samples_of(data)) == len(SAMPLES) and json.dumps(sniff(data).name) == '"a WAV"'
