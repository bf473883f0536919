"""prepare_corpus.py recordings: speech without text, cut at its pauses."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from echostream.audio.io import load_audio, write_audio
from echostream.constants import SAMPLE_RATE
from echostream.data.corpus import cli
from echostream.data.corpus.recordings import MARGIN, Cut, find_recordings, pieces, speech_spans
from echostream.data.corpus.rows import read_table
from echostream.data.manifest import SPEECH, read_manifest
from echostream.errors import AudioError, ConfigError, ManifestError
from echostream.streaming.segmenters.silero import WINDOW

RATE = 22050


class Loudness:
    """A detector that takes what is loud for speech."""

    heard: list[int] = []
    broken_at = 10**9

    def init_state(self) -> None:
        return None

    def read(self, waiting: np.ndarray, samples: np.ndarray, state: None) -> tuple[list[float], np.ndarray, None]:
        if len(self.heard) == self.broken_at:
            raise KeyboardInterrupt
        self.heard.append(len(samples))
        count = len(samples) // WINDOW
        level = np.abs(samples[: count * WINDOW]).reshape(count, WINDOW).max(1)
        return np.where(level > 0.02, 0.9, 0.1).tolist(), waiting, state


def speak(path: Path, *seconds: float, rate: int = RATE, channels: int = 1) -> None:
    """Sound and silence in turn."""
    soundfile = pytest.importorskip("soundfile")
    parts = []
    for i, length in enumerate(seconds):
        time = np.arange(int(length * rate)) / rate
        parts.append((0.0 if i % 2 else 0.3) * np.sin(2 * np.pi * 440 * time))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.tile(np.concatenate(parts)[:, None], channels), rate)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("echostream.data.corpus.further.load_silero", lambda path=None: Loudness())
    monkeypatch.setattr(Loudness, "heard", [])
    speak(tmp_path / "in/a/talk.flac", 2.5, 0.6, 3.0, 5.0, 1.0, channels=2)  # the last is too short and too far
    speak(tmp_path / "in/b.wav", 1.2, 0.5, 1.3)
    speak(tmp_path / "in/silence.wav", 0.0, 4.0)
    (tmp_path / "in/notes.txt").write_text("no recording")
    (tmp_path / "in/.hidden").write_text("")
    return tmp_path / "in"


def run(source: Path, *options: str) -> int:
    return cli.main(["recordings", str(source), "-o", str(source.parent / "out"), *options])


def test_pieces_and_their_manifest(source: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(source) == 0
    out = source.parent / "out"
    rows = read_manifest(out / "train_recordings.tsv", need=SPEECH)
    assert [(row.id, row.extra["voice"]) for row in rows] == [
        ("a/talk-0000", "a/talk"), ("a/talk-0001", "a/talk"), ("b-0000", "b")
    ]  # fmt: skip
    assert not any(row.src_text or row.tgt_text or len(row.units) for row in rows)
    for row, seconds in zip(rows, (2.6, 3.2, 3.0)):
        samples = load_audio(out / row.audio)
        assert len(samples) / SAMPLE_RATE == pytest.approx(seconds, abs=0.1)
        assert row.n_frames == 1 + (len(samples) - 400) // 160
        assert np.abs(samples).max() == pytest.approx(0.3, abs=0.02)
    skipped = list(read_table(out / "skipped/recordings.0-of-1.tsv"))
    assert [(line["row"], line["reason"]) for line in skipped] == [("notes", "unreadable")]
    assert "3 pieces, 0.00" in capsys.readouterr().out and (out / "steps/recordings-train_recordings.json").is_file()


def test_goes_on_where_it_was_interrupted(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loudness, "broken_at", 2)
    assert run(source) == 130
    monkeypatch.setattr(Loudness, "broken_at", 10**9)
    assert run(source) == 0 and run(source) == 0
    assert len(Loudness.heard) == 3  # the two recordings, and the one without speech: each once
    assert len(read_manifest(source.parent / "out/train_recordings.tsv", need=SPEECH)) == 3


def test_shards_share_the_work(source: Path) -> None:
    for shard in ("0", "1"):
        assert run(source, "--num-shards", "2", "--shard", shard, "--manifest", "train_real") == 0
    assert len(Loudness.heard) == 3
    assert len(read_manifest(source.parent / "out/train_real.tsv", need=SPEECH)) == 3


def test_long_speech_is_cut_where_it_is_least_sure() -> None:
    cut = Cut(shortest=1.0, longest=4.0)
    probabilities = np.full(312, 0.9)  # 10 s
    probabilities[[100, 180]] = 0.6
    spans, short = pieces(probabilities, 312 * WINDOW, cut)
    assert spans[0] == (0, 100 * WINDOW) and spans[1] == (100 * WINDOW, 180 * WINDOW) and short == 0
    assert spans[-1][1] == 312 * WINDOW and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    rng = np.random.default_rng(0)
    for _ in range(200):
        probabilities = rng.random(int(rng.integers(1, 900))) ** rng.uniform(0.1, 2)
        total = len(probabilities) * WINDOW + int(rng.integers(WINDOW))
        spans, short = pieces(probabilities, total, cut)
        assert all(1.0 <= (end - start) / SAMPLE_RATE <= 4.0 for start, end in spans)
        assert all(a[1] <= b[0] for a, b in zip([(0, 0), *spans], [*spans, (total, total)]))
        speech = sum(end - start for start, end in speech_spans(probabilities, cut))
        kept = sum(min(end, b) - max(start, a) for a, b in spans for start, end in speech_spans(probabilities, cut)
                   if min(end, b) > max(start, a))  # fmt: skip
        assert kept + short >= speech - 2 * MARGIN * len(spans) and kept <= speech


def test_bad_input(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for options, message in (
        (("--shortest", "0"), "pieces last 0 to 20 s"),
        (("--shortest", "8"), "pieces last 8 to 20 s"),
        (("--pause-ms", "30"), "--pause-ms is 30; it must be at least 64"),
        (("--threshold", "1"), "--threshold is 1; it must lie between 0.15 and 1"),
        (("--num-shards", "2", "--shard", "2"), "--shard 2 is outside 0..1"),
    ):
        assert run(source, *options) == 1 and message in capsys.readouterr().err
    assert run(source / "silence.wav") == 1 and "no speech of 2 s or more" in capsys.readouterr().err
    with pytest.raises(AudioError, match="none does not exist"):
        find_recordings([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(AudioError, match="no recordings there"):
        find_recordings([tmp_path / "empty"])
    write_audio(source / "b.flac", np.zeros(4000, dtype=np.float32))
    with pytest.raises(ManifestError, match="would both be 'b'"):
        find_recordings([source])
    with pytest.raises(ConfigError):
        Cut(shortest=-1.0)
