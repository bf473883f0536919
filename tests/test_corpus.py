"""Corpus preparation, without network and without voices: tones stand in for speech where audio is needed."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from echostream.audio.io import load_audio, write_audio
from echostream.constants import SAMPLE_RATE
from echostream.data.corpus import sources, speech, tts
from echostream.data.corpus.cli import main
from echostream.data.corpus.normalize import count_words, normalize_text, words_of
from echostream.data.corpus.rows import Ledger, Row, Skipped, read_rows, read_table, take_shard, write_rows
from echostream.data.corpus.split import fixed_test_rows, split_of_key, split_pairs
from echostream.data.corpus.subwords import train_subwords
from echostream.errors import EchoStreamError, ManifestError

NOUNS = ["gato", "perro", "libro", "coche", "árbol", "río", "pan", "vino", "tren", "barco"]
THINGS = ["cat", "dog", "book", "car", "tree", "river", "bread", "wine", "train", "ship"]


def tone(seconds: float, hertz: float = 200.0, rate: int = SAMPLE_RATE) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


class Tones:
    """An engine that hums: a tone as long as the text."""

    def __init__(self, voices: tuple[str, ...] = ("low", "high")):
        self.voices, self.version, self.spoken = voices, "tones", []

    def plan(self, row: str, seed: int) -> tts.Voice:
        return tts.Voice(self.voices[int(row) % len(self.voices)])

    def speak(self, text: str, voice: tts.Voice) -> np.ndarray:
        if "mudo" in text:
            raise EchoStreamError("no sound")
        self.spoken.append(text)
        return tone(0.05 * len(text), 150 + 10 * (sum(map(ord, text)) % 40))


def pairs(count: int = 120) -> list[tuple[str, str]]:
    return [
        (
            f"El {NOUNS[i % 10]} {NOUNS[i // 10 % 10]} número {i} es mío.",
            f"The {THINGS[i % 10]} {THINGS[i // 10 % 10]} number {i} is mine.",
        )
        for i in range(count)
    ]


def text_file(path: Path, lines: list[tuple[str, ...]]) -> Path:
    path.write_text("es\ten\n" + "".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return path


# --- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("«Hola», dijo.", '"Hola", dijo.'),
        ("“It’s”", '"It\'s"'),
        ("  dos\u00a0 espacios\t ", "dos espacios"),
        ("cafe\u0301", "café"),
        ("in\u200bvisible\ufeff", "invisible"),
        ("¿Qué? ¡NO! Tom's — 3,5", "¿Qué? ¡NO! Tom's — 3,5"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize_text(text) == expected
    assert normalize_text(expected) == expected


def test_words() -> None:
    assert words_of('"Hola", dijo Tom.') == ["hola", "dijo", "tom"]
    assert count_words("Esto cuesta 30 €.") == 4


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_split_never_parts_pairs_with_a_common_side(numbers: list[tuple[int, int]]) -> None:
    given_pairs = [(f"s{a}", f"t{b}") for a, b in numbers]
    splits = split_pairs(given_pairs)
    for side in (0, 1):
        seen: dict[str, str] = {}
        for pair, split in zip(given_pairs, splits):
            assert seen.setdefault(pair[side], split) == split


def test_split_follows_the_smallest_target_of_the_group() -> None:
    # a-x, a-y, b-y hang together; c-z stands alone
    splits = split_pairs([("a", "y"), ("a", "x"), ("b", "y"), ("c", "z")])
    assert splits == [split_of_key("x")] * 3 + [split_of_key("z")]


def test_split_joins_sides_that_differ_only_in_quotes() -> None:
    first, second = split_pairs([("uno", "it’s"), ("dos", "it's")])
    assert first == second == split_of_key("it's")


def test_split_values_are_fixed() -> None:
    keys = [f"Sentence {i}." for i in range(200)]
    found = {k: split_of_key(k) for k in keys}
    assert [k for k in keys if found[k] == "test"][:1] == ["Sentence 42."]
    assert [k for k in keys if found[k] == "dev"][:2] == ["Sentence 17.", "Sentence 24."]


def test_fixed_test_rows_are_four_to_twelve_words_in_file_order() -> None:
    given_pairs = [
        ("a b c", "a b c d"),
        ("a b c d", "e f g h"),
        ("a " * 13, "b " * 5),
        ("x y z w", "q r s t"),
        ("k k k k", "l l l l"),
    ]
    assert fixed_test_rows(given_pairs, ["test", "test", "test", "train", "test"]) == [1, 4]
    assert fixed_test_rows(given_pairs, ["test"] * 5, size=2) == [1, 3]


def test_bad_rows_are_listed(tmp_path: Path) -> None:
    path = text_file(tmp_path / "p.tsv", [("Hola.", "Hello."), ("", "Nothing."), ("solo",), ("a " * 50, "long")])
    skipped = Skipped(tmp_path, "text")
    rows = sources.rows_of_text(path, skipped)
    assert [row.row for row in rows] == ["000000"]
    assert [(line[1], line[2]) for line in skipped.lines] == [
        ("000001", "empty text"),
        ("000002", "empty text"),
        ("000003", "too long"),
    ]


def test_pairs_of_one_target_share_its_recording_and_rare_words_rank_last(tmp_path: Path) -> None:
    path = text_file(tmp_path / "p.tsv", [("Ve.", "Go."), ("Vete.", "Go."), ("Ve ya.", "Go now.")])
    rows = sources.rows_of_text(path, Skipped(tmp_path, "text"))
    assert [row.target for row in rows] == ["000000", "000000", "000002"]
    ranks = {
        row.src_text: row.rank
        for row in sources.with_ranks(
            [Row(str(i), "train", text, "x", str(i)) for i, text in enumerate(["a", "a", "a b", "a b c"])]
        )
    }
    assert ranks["a"] < ranks["a b"] < ranks["a b c"]


@pytest.mark.parametrize(
    "content, message",
    [(b"only one column\n", "one column"), (b"es\ten\n\xff\xfe\xff\n", "UTF-8"), (None, "does not exist")],
)
def test_unusable_text_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "p.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        sources.rows_of_text(path, Skipped(tmp_path, "text"))


# --- tables and shards -------------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_shards_are_a_partition(count: int, shards: int) -> None:
    parts = [take_shard(list(range(count)), i, shards) for i in range(shards)]
    assert sorted(sum(parts, [])) == list(range(count))


def test_shard_out_of_range() -> None:
    with pytest.raises(ManifestError, match="--shard 3 is outside 0..2"):
        take_shard([], 3, 3)


def test_ledger_survives_a_line_cut_short(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "set", ("id", "value"))
    ledger.append([("a", 1), ("b", 2)])
    with open(ledger.path, "a") as file:
        file.write("c\t3")  # interrupted before the end of the line: "3" may be the beginning of "30"
    assert list(ledger.read()) == ["a", "b"]
    ledger.append([("d", 4)])
    assert {k: v["value"] for k, v in ledger.read().items()} == {"a": "1", "b": "2", "d": "4"}


def test_table_without_a_column(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ManifestError, match="has no column 'c'; its columns are: a, b"):
        list(read_table(tmp_path / "t.tsv", ["c"]))


# --- speech ------------------------------------------------------------------------------------------------------


def rows_for(split: str, count: int) -> list[Row]:
    return [
        Row(f"{i:06d}", split, f"frase número {i} aquí", f"sentence number {i} here", f"{i:06d}", i)
        for i in range(count)
    ]


def ready_speech(directory: Path, voices: dict[int, str], as_tar: bool = False) -> sources.ReadySpeech:
    directory.mkdir()
    lines = ["row\taudio\tvoice\tspeed"] + [f"{row}\t{row:06d}.ogg\t{voice}\t1.0" for row, voice in voices.items()]
    (directory / "manifest.tsv").write_text("\n".join(lines) + "\n")
    tar = tarfile.open(directory / "speech.tar", "w") if as_tar else None
    for row in voices:
        buffer = io.BytesIO()
        soundfile.write(buffer, tone(0.5, 100 + row, 24000), 24000, format="OGG", subtype="VORBIS")
        if tar:
            info = tarfile.TarInfo(f"./{row:06d}.ogg")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
        else:
            (directory / f"{row:06d}.ogg").write_bytes(buffer.getvalue())
    if tar:
        tar.close()
    return sources.ReadySpeech(directory)


@pytest.mark.parametrize("as_tar", [False, True], ids=["files", "tar"])
def test_ready_speech_honours_the_split_and_santa_never_trains(tmp_path: Path, as_tar: bool) -> None:
    voices = {0: "ef_dora", 1: "em_santa", 2: "ef_dora:.5,em_santa:.5", 7: "em_alex"}
    ready = ready_speech(tmp_path / "r", voices, as_tar)
    rows = [*rows_for("train", 5), Row("000007", "test", "en la prueba", "in the test", "000007")]
    counts = speech.speech_set(tmp_path, "ready", rows, speech.Selection("train"), None, ready)
    assert counts["recorded"] == 1
    (line,) = Ledger(tmp_path / "speech", "ready", speech.SPEECH_COLUMNS).read().values()
    assert (line["row"], line["voice"], line["split"]) == ("000000", "ef_dora", "train")
    samples = load_audio(tmp_path / line["audio"])
    assert abs(len(samples) - SAMPLE_RATE // 2) < 20 and int(line["samples"]) == len(samples)
    # In the test split santa may speak.
    tests = [Row("000001", "test", "dos tres", "two three", "000001")]
    assert speech.speech_set(tmp_path, "t", tests, speech.Selection("test"), None, ready)["recorded"] == 1


@pytest.mark.parametrize("voice", ["em_santa", "ef_dora:.6,em_santa:.4"])
def test_an_engine_with_a_test_voice_may_not_train(tmp_path: Path, voice: str) -> None:
    with pytest.raises(ManifestError, match="kept for tests"):
        speech.speech_set(tmp_path, "s", rows_for("train", 2), speech.Selection("train"), Tones((voice,)), None)


def test_ready_speech_comes_before_the_voice(tmp_path: Path) -> None:
    ready = ready_speech(tmp_path / "r", {3: "em_alex"})
    engine = Tones()
    speech.speech_set(tmp_path, "s", rows_for("dev", 5), speech.Selection("dev", limit=2), engine, ready)
    lines = Ledger(tmp_path / "speech", "s", speech.SPEECH_COLUMNS).read()
    assert {k: v["voice"] for k, v in lines.items()} == {"s-000003": "em_alex", "s-000000": "low s1"}
    assert engine.spoken == ["frase número 0 aquí"]


def test_speech_resumes_and_shards_share_the_work(tmp_path: Path) -> None:
    rows, selection = rows_for("train", 60), speech.Selection("train", order="hash")

    def stop(items: list[Row]):
        for i, item in enumerate(items):
            if i == 25:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        speech.speech_set(tmp_path, "s", rows, selection, Tones(), None, num_shards=2, progress=stop)
    first, second = Tones(), Tones()
    counts = speech.speech_set(tmp_path, "s", rows, selection, first, None, num_shards=2)
    assert (counts["done"], counts["recorded"]) == (20, 10)  # ledgers are written every 20 recordings
    counts = speech.speech_set(tmp_path, "s", rows, selection, second, None, shard=1, num_shards=2)
    assert (counts["done"], counts["recorded"]) == (0, 30)
    assert len(Ledger(tmp_path / "speech", "s", speech.SPEECH_COLUMNS).read()) == 60
    again = Tones()
    speech.speech_set(tmp_path, "s", rows, selection, again, None)  # other shards: what is done stays done
    assert again.spoken == []


def test_recordings_that_fail_are_skipped_and_listed(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("this is no audio")
    write_audio(tmp_path / "long.wav", tone(3.0))
    write_audio(tmp_path / "short.wav", tone(0.01))
    write_audio(tmp_path / "fine.wav", tone(1.0))
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), SAMPLE_RATE, subtype="FLOAT")
    names = ["text", "long", "short", "fine", "nan", "gone"]
    rows = [Row(n, "train", "hola mundo", "hello world", n, 0, str(tmp_path / f"{n}.wav")) for n in names]
    rows.append(Row("000009", "train", "mudo", "mute", "000009"))
    counts = speech.speech_set(tmp_path, "s", rows, speech.Selection("train"), Tones(), None, max_seconds=2.0)
    assert (counts["recorded"], counts["skipped"]) == (1, 6)
    reasons = {line["row"]: line["reason"] for line in read_table(tmp_path / "skipped" / "speech-s.0-of-1.tsv")}
    assert reasons == {
        "text": "unusable audio",
        "long": "too long",
        "short": "unusable audio",
        "nan": "unusable audio",
        "gone": "missing audio",
        "000009": "unusable audio",
    }


def test_selection() -> None:
    rows = rows_for("train", 30)
    chosen = speech.Selection("train", max_rank=10, order="rank", limit=4, exclude=frozenset({"000001"})).choose(rows)
    assert [row.row for row in chosen] == ["000000", "000002", "000003", "000004"]
    mixed = [row.row for row in speech.Selection("train", order="hash").choose(rows)]
    assert sorted(mixed) == [row.row for row in rows] != mixed
    assert speech.Selection("train", min_words=5).choose(rows) == []
    with pytest.raises(ManifestError, match="'size' is not one of"):
        speech.Selection("train", order="size").choose(rows)


# --- voices ------------------------------------------------------------------------------------------------------


def test_kokoro_styles_blend(tmp_path: Path) -> None:
    for value, name in enumerate(["a", "b"]):
        np.full(510 * 256, value + 1, np.float32).tofile(tmp_path / f"{name}.bin")
    style = tts.load_style(tmp_path, "a:.25,b:.75")
    assert style.shape == (510, 256) and np.allclose(style, 1.75)
    with pytest.raises(EchoStreamError, match="has no Kokoro voice c.bin"):
        tts.load_style(tmp_path, "c")
    with tarfile.open(tmp_path / "kokoro-js.tgz", "w:gz") as tar:
        tar.add(tmp_path / "a.bin", "package/voices/a.bin")
    assert np.allclose(tts.load_style(tmp_path / "kokoro-js.tgz", "a"), 1.0)
    (tmp_path / "d.bin").write_bytes(b"1234")
    with pytest.raises(EchoStreamError, match="d.bin has 4 bytes"):
        tts.load_style(tmp_path, "d")


def test_santa_is_no_training_voice() -> None:
    assert not any("santa" in voice for voice in tts.KOKORO_TRAIN_VOICES)
    assert "em_santa" in tts.KOKORO_TEST_VOICES


def test_missing_espeak_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts.shutil, "which", lambda name: None)
    with pytest.raises(EchoStreamError, match="apt-get install espeak-ng"):
        tts.Espeak()


def test_missing_voice_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hibari", None)
    with pytest.raises(EchoStreamError, match=r"echostream\[corpus\]"):
        tts.Hibari()


def test_trim_silence_keeps_the_speech() -> None:
    sound = np.concatenate([np.zeros(16000), tone(0.5), np.zeros(16000)]).astype(np.float32)
    trimmed = tts.trim_silence(sound)
    assert abs(len(trimmed) - (0.5 + 0.15 + 0.2) * SAMPLE_RATE) < 200
    assert np.isclose((trimmed**2).sum(), (sound**2).sum())


@pytest.mark.skipif(tts.shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_speaks_and_phonemes_keep_punctuation() -> None:
    engine = tts.Espeak()
    voice = engine.plan("000001", 1)
    assert voice == engine.plan("000001", 1) and 130 <= voice.speed <= 190 and 30 <= voice.pitch <= 70
    samples = engine.speak("¿Qué hora es?", voice)
    assert 0.3 * SAMPLE_RATE < len(samples) < 3 * SAMPLE_RATE and np.abs(samples).max() > 0.05
    text = tts.phonemes("¿Qué hora es? Mucho, dijo: 1.000.")
    assert text.startswith("¿k") and text.count("?") == 1 and "," in text and "ʧ" in text and "^" not in text


def test_pico_disguises_its_voice_and_refuses_other_languages() -> None:
    pytest.importorskip("py_nanotts")
    engine = tts.Pico("es")
    voices = [engine.plan(f"{row:06d}", 1) for row in range(300)]
    assert voices[7] == tts.Pico("es").plan("000007", 1) != engine.plan("000007", 2)
    for name, (low, high) in (("pitch", engine.PITCHES), ("speed", engine.SPEEDS), ("formant", engine.FORMANTS)):
        values = [getattr(voice, name) for voice in voices]
        assert low <= min(values) < low + 0.03 and high - 0.03 < max(values) <= high
    assert str(tts.Voice("es-ES", 0.9, 1.2, formant=0.86)) == "es-ES s0.9 p1.2 f0.86"
    assert tts.Pico("en").voices == ("en-US", "en-GB") and tts.Pico("en_gb").voices == ("en-GB",)
    assert tts.Pico("es-MX").voices == ("es-ES",)
    with pytest.raises(EchoStreamError, match="does not speak 'pl', only es, en, de, fr, it"):
        tts.Pico("pl")
    with pytest.raises(EchoStreamError, match="'fr-FR' does not speak 'es'; choose from es-ES"):
        tts.Pico("es", ["fr-FR"])


def test_pico_speaks_at_the_voice_s_speed_and_formants() -> None:
    pytest.importorskip("py_nanotts")
    engine = tts.Pico("es")

    def spoken(text: str = "Mañana iremos a la estación de trenes.", **settings: float) -> np.ndarray:
        return engine.speak(text, tts.Voice("es-ES", **settings))

    plain = spoken()
    assert np.allclose(plain, spoken(), atol=1e-3)  # the engine's noise differs a little from call to call
    assert 1.5 < len(plain) / SAMPLE_RATE < 4.0 and np.abs(plain).max() < 0.99
    assert len(spoken(speed=0.8)) > 1.15 * len(plain)
    assert not np.allclose(plain[:8000], spoken(pitch=1.3)[:8000], atol=1e-2)
    margins = (0.15 + 0.2) * SAMPLE_RATE  # of silence; they stay as they are
    assert len(spoken(formant=0.8)) - margins == pytest.approx((len(plain) - margins) / 0.8, rel=0.02)
    quiet, read = spoken("Hola <volume level='0'> amigo."), spoken("Hola  volume level='0'  amigo.")
    assert np.allclose(quiet, read, atol=1e-3)  # what looks like a command is read out
    for text in ("", "...", "漢字"):
        with pytest.raises(EchoStreamError, match="Pico gave no sound"):
            spoken(text)
    with pytest.raises(EchoStreamError, match="a word of 150 characters, Pico takes at most 100"):  # it would hang
        spoken("Hola " + "a" * 150)


def test_missing_pico_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "py_nanotts", None)
    with pytest.raises(EchoStreamError, match=r"echostream\[corpus\]"):
        tts.Pico("es")


@pytest.mark.parametrize("language, status", [("es", 0), ("pl", 1)])
def test_speech_step_with_pico(language: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("py_nanotts")
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "text.json").write_text(json.dumps({"settings": {"source_lang": language}}))
    write_rows(tmp_path / "rows.tsv", [Row("000000", "train", "Buenos días, amigo.", "Good morning.", "000000")])
    assert main(["speech", "--output", str(tmp_path), "--set", "p", "--engine", "pico"]) == status
    if status:
        assert "Pico does not speak 'pl'" in capsys.readouterr().err
        return
    line = Ledger(tmp_path / "speech", "p", speech.SPEECH_COLUMNS).read()["p-000000"]
    assert line["voice"] == str(tts.Pico("es").plan("000000", 1))
    assert len(load_audio(tmp_path / line["audio"])) == int(line["samples"])


# --- CVSS and Common Voice ---------------------------------------------------------------------------------------


def cvss_layout(root: Path) -> tuple[Path, Path]:
    common_voice, cvss = root / "cv", root / "cvss"
    (common_voice / "clips").mkdir(parents=True)
    clips = {
        "clip_a": ("Hola, “mundo”.", "mp3", 48000),
        "clip_b": ("Adiós, mundo cruel.", "wav", 8000),
        "clip_c": ("", "mp3", 44100),
        "clip_d": ("Sin sonido aquí.", None, 0),
        "clip_e": ("Buenos días.", "mp3", 22050),
    }
    for name, (_, suffix, rate) in clips.items():
        if suffix:
            stereo = np.stack([tone(0.8, 300, rate)] * 2, axis=1)
            soundfile.write(common_voice / "clips" / f"{name}.{suffix}", stereo, rate)
    (common_voice / "validated.tsv").write_text(
        "client_id\tpath\tsentence\n" + "".join(f"x\t{n}.mp3\t{t}\n" for n, (t, _, _) in clips.items())
    )
    tables = {
        "train": "clip_a.mp3\tHello, world.\nclip_b.mp3\tGoodbye, cruel world.\nclip_c.mp3\tEmpty.\n"
        "clip_d.mp3\tNo sound here.\nclip_x.mp3\tNobody's.\n",
        "dev": "path\ttranslation\nclip_e.mp3\tGood morning.\n",
    }
    for split, content in tables.items():
        (cvss / split).mkdir(parents=True)
        (cvss / f"{split}.tsv").write_text(content)
    for split, name in (
        ("train", "clip_a"),
        ("train", "clip_b"),
        ("train", "clip_c"),
        ("train", "clip_d"),
        ("dev", "clip_e"),
    ):
        write_audio(cvss / split / f"{name}.mp3.wav", tone(0.7, 250, 24000), 24000)
    return common_voice, cvss


def test_cvss_layout(tmp_path: Path) -> None:
    skipped = Skipped(tmp_path, "text")
    rows = {row.row: row for row in sources.rows_of_cvss(*cvss_layout(tmp_path), skipped)}
    assert {name: row.split for name, row in rows.items()} == {"clip_a": "train", "clip_b": "train", "clip_e": "dev"}
    assert rows["clip_a"].src_text == 'Hola, "mundo".' and rows["clip_a"].tgt_text == "Hello, world."
    assert {line[1]: line[2] for line in skipped.lines} == {
        "clip_c": "empty text",
        "clip_d": "missing audio",
        "clip_x": "no source text",
    }


def test_cvss_without_tables(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no tsv with the columns 'path' and 'sentence'"):
        sources.rows_of_cvss(tmp_path, tmp_path, Skipped(tmp_path, "text"))


# --- the whole chain ---------------------------------------------------------------------------------------------


def ready_corpus(directory: Path, *options: str) -> Path:
    """All steps on forty recorded pairs in CVSS's layout, with MFCC units: the corpus."""
    common_voice, cvss = directory / "cv", directory / "cvss"
    (common_voice / "clips").mkdir(parents=True)
    lines = {"train": [], "dev": []}
    table = ["path\tsentence"]
    for i, (source, target) in enumerate(pairs(40)):
        split = "dev" if i % 10 == 0 else "train"
        table.append(f"c{i}.mp3\t{source}")
        lines[split].append(f"c{i}.mp3\t{target}")
        write_audio(common_voice / "clips" / f"c{i}.wav", tone(0.5 + 0.01 * i, 150 + 10 * i, 32000), 32000)
        write_audio(cvss / split / f"c{i}.mp3.wav", tone(0.5 + 0.01 * i, 900 - 15 * i, 24000), 24000)
    (common_voice / "all.tsv").write_text("\n".join(table) + "\n")
    for split, content in lines.items():
        (cvss / f"{split}.tsv").write_text("\n".join(content) + "\n")
    output = directory / "out"
    assert (
        main(
            [
                "all",
                "--output",
                str(output),
                "--cvss",
                str(cvss),
                "--common-voice",
                str(common_voice),
                "--vocab-size",
                "40",
                "--features",
                "mfcc",
                "--num-units",
                "20",
                "--positions",
                "0",
                *options,
            ]
        )
        == 0
    )
    return output


def test_all_steps_from_ready_recordings(tmp_path: Path) -> None:
    """CVSS layout to manifests; every file that training wants is there and agrees with the others."""
    output = ready_corpus(tmp_path)
    train = list(
        read_table(
            output / "train.tsv",
            ["id", "src_audio", "src_n_frames", "src_text", "tgt_text", "tgt_audio", "tgt_n_frames", "voice"],
        )
    )
    assert len(train) == 36 and len(list(read_table(output / "dev.tsv"))) == 4
    for line in train:
        samples = load_audio(output / line["src_audio"])
        assert int(line["src_n_frames"]) == 1 + (len(samples) - 400) // 160
        units = line["tgt_audio"].split()
        assert len(units) == int(line["tgt_n_frames"]) > 0 and all(0 <= int(u) < 20 for u in units)
        assert all(a != b for a, b in itertools.pairwise(units))
    for line in read_table(output / "target" / "units.tsv", ["id", "audio", "units", "durations"]):
        frames = sum(map(int, line["durations"].split()))
        assert frames == len(load_audio(output / "target" / line["audio"])) // 320
    assert len((output / "dict.unit.txt").read_text().splitlines()) == 20
    with np.load(output / "gcmvn.npz") as cmvn:
        assert cmvn["mean"].shape == cmvn["std"].shape == (80,) and (cmvn["std"] > 0).all()
    texts = list(read_table(output / "text_train.tsv", ["id", "src_text", "tgt_text", "tgt_audio"]))
    assert {(line["src_text"], line["tgt_audio"]) for line in train} <= {
        (line["src_text"], line["tgt_audio"]) for line in texts
    }
    corpus = json.loads((output / "corpus.json").read_text())
    assert corpus["text_pairs"]["text_train"]["written"] == len(texts)
    assert corpus["manifests"]["train"]["utterances"] == 36
    assert corpus["target"] == {**corpus["target"], "recordings": 40, "with_units": 40, "num_units": 20}
    assert corpus["steps"]["text"]["settings"]["seed"] == 1 and corpus["steps"]["text"]["versions"]["numpy"]
    assert (output / "config.yaml").is_file() and (output / "skipped.tsv").is_file()
    # A second run finds everything done and changes nothing.
    before = (output / "train.tsv").read_bytes(), (output / "units" / "kmeans.npz").read_bytes()
    assert main(["units", "--output", str(output), "--features", "mfcc", "--num-units", "20"]) == 0
    assert main(["manifests", "--output", str(output)]) == 0
    assert before == ((output / "train.tsv").read_bytes(), (output / "units" / "kmeans.npz").read_bytes())


def test_manifests_without_units(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "c"
    write_rows(output / "rows.tsv", rows_for("train", 3))
    (output / "steps").mkdir()
    (output / "steps" / "text.json").write_text(
        json.dumps({"settings": {"source_lang": "es", "target_lang": "en"}, "pairs": {}})
    )
    for side in ("src", "tgt"):
        texts = [f"{source} {target}" for source, target in pairs(40)]
        train_subwords(texts, output / f"spm.{side}.model", output / f"dict.{side}.txt", 50)
    speech.speech_set(output, "s", rows_for("train", 3), speech.Selection("train"), Tones(), None)
    assert main(["manifests", "--output", str(output)]) == 1
    assert "run the step 'units' first" in capsys.readouterr().err
    assert main(["manifests", "--output", str(output), "--without-units", "--cmvn-utterances", "0"]) == 0
    lines = list(read_table(output / "train.tsv"))
    assert len(lines) == 3 and {(line["tgt_audio"], line["tgt_n_frames"]) for line in lines} == {("", "0")}
    assert len((output / "dict.unit.txt").read_text().splitlines()) == 1000


class Whistler:
    """A target voice whose recordings are as long as their text."""

    version = "whistler"

    def plan(self, row: str, seed: int) -> str:
        return "whistler"

    def speak(self, text: str, voice: str) -> np.ndarray:
        return tone(0.1 + 0.02 * len(text), 300 + 10 * len(text), SAMPLE_RATE)


def test_respeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The target voice says what a model wrote: each text once, for every recording that was translated so."""
    monkeypatch.setattr(tts, "Hibari", Whistler)
    output = ready_corpus(tmp_path)
    train = list(read_table(output / "train.tsv"))
    texts = {train[0]["id"]: "A guess.", train[1]["id"]: "A guess.", train[2]["id"]: "Another one.", train[3]["id"]: ""}
    generated = tmp_path / "generate-train.jsonl"

    def respeak(texts: dict[str, str]) -> int:
        generated.write_text("".join(json.dumps({"id": name, "mt": text}) + "\n" for name, text in texts.items()))
        return main(
            [
                "respeak",
                "--output",
                str(output),
                "--generated",
                str(generated),
                "--manifest",
                "own",
                "--features",
                "mfcc",
                "--num-units",
                "20",
            ]
        )

    assert respeak(texts) == 0
    own = list(read_table(output / "own.tsv"))
    assert [(line["id"], line["tgt_text"]) for line in own] == [(f"own-{k}", v) for k, v in texts.items()][:3]
    assert [line["src_audio"] for line in own] == [line["src_audio"] for line in train[:3]]
    assert own[0]["target"] == own[1]["target"] != own[2]["target"] and own[0]["tgt_audio"] == own[1]["tgt_audio"]
    for line in own:
        samples = load_audio(output / "target" / f"{line['target']}.wav")
        assert len(samples) == len(Whistler().speak(line["tgt_text"], "whistler"))
    assert json.loads((output / "steps" / "respeak-own.json").read_text())["settings"]["generated"] == [generated.name]
    assert main(["manifests", "--output", str(output)]) == 0
    assert list(read_table(output / "train.tsv")) == train  # the true texts are as they were
    dev = next(read_table(output / "dev.tsv"))["id"]
    capsys.readouterr()
    assert respeak({dev: "A guess."}) == 1
    assert f"{dev!r} is no recording of the split train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["speech", "--set", "s"], "run the step 'text' first"),
        (["text", "--pairs", "nowhere.tsv"], "nowhere.tsv does not exist"),
        (["text", "--cvss", "somewhere"], "--cvss needs --common-voice"),
        (["units", "--features", "mfcc"], "run the step 'text' first"),
    ],
    ids=["no text", "no file", "no clips", "no rows"],
)
def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_text_step_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = text_file(tmp_path / "p.tsv", [*pairs(), ("", "No source.")])
    assert (
        main(
            [
                "text",
                "--output",
                str(tmp_path / "o"),
                "--pairs",
                str(path),
                "--vocab-size",
                "45",
                "--source-vocab-size",
                "40",
            ]
        )
        == 0
    )
    rows = read_rows(tmp_path / "o" / "rows.tsv")
    assert len(rows) == 120 and {row.split for row in rows} >= {"train"}
    dictionary = (tmp_path / "o" / "dict.tgt.txt").read_text(encoding="utf-8").splitlines()
    assert len(dictionary) == 42 and all(line.rsplit(" ", 1)[1].isdigit() for line in dictionary)
    assert "<unk>" not in "".join(dictionary)
    assert len((tmp_path / "o" / "dict.src.txt").read_text(encoding="utf-8").splitlines()) == 37
    assert main(["speech", "--output", str(tmp_path / "o"), "--set", "s"]) == 1
    assert "the pairs have no recordings: give --engine" in capsys.readouterr().err
    assert main(["text", "--output", str(tmp_path / "o"), "--pairs", str(path), "--vocab-size", "5000"]) == 1
    assert "do not give 5000 SentencePiece pieces; at most" in capsys.readouterr().err
