"""Whole talks: making them, cutting their translation at the reference's sentences, and the figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("rapidfuzz")
pytest.importorskip("sacrebleu")

from echostream.audio.io import read_audio, write_audio
from echostream.data.manifest import Utterance, write_manifest
from echostream.errors import EchoStreamError, MissingExtraError
from echostream.evaluation import longform
from echostream.evaluation.longform import TalkOutput
from echostream.evaluation.talks import Segment, Talk, cut, make_talks, read_talks

REFERENCES = ["The house is big.", "Hello, my friend.", "What time is it now?"]
TALK = Talk(Path("talk.wav"), tuple(Segment(3.0 * i, 2.0, text) for i, text in enumerate(REFERENCES)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Utterance]]:
    """Six recordings of one level each, so that a talk tells what it was made of; the manifest beside them."""
    folder = tmp_path_factory.mktemp("sentences")
    found = []
    for i in range(6):
        samples = np.full(8000 + 800 * i, 0.1 * (i + 1), dtype=np.float32)
        write_audio(folder / f"{i}.wav", samples)
        text = f"Sentence number {i}."
        found.append(Utterance(f"u{i}", f"{i}.wav", 48, f"Frase {i}.", text, np.array([1, 2], np.int16)))
    write_manifest(folder / "test.tsv", found)
    return folder, found


def test_talks_hold_their_sentences_where_they_say(rows: tuple[Path, list[Utterance]], tmp_path: Path) -> None:
    folder, utterances = rows
    talks = make_talks(utterances, folder, tmp_path, count=2, sentences=3, pauses=(0.2, 0.4), seed=3)
    every = [segment for talk in talks for segment in talk.segments]
    assert sorted(s.reference for s in every) == sorted(u.tgt_text for u in utterances)  # none twice before all once
    for talk in talks:
        samples, rate = read_audio(talk.path)
        last = talk.segments[-1]
        assert rate == 16000 and len(samples) == round(16000 * (last.offset + last.duration))
        for before, segment in zip((None, *talk.segments), talk.segments):
            level = 0.1 * (int(segment.reference.split()[-1][:-1]) + 1)
            np.testing.assert_allclose(cut(samples, segment), level, atol=1e-3)
            if before is not None:
                pause = segment.offset - before.offset - before.duration
                assert 0.2 <= pause <= 0.4 + 1e-3
                end = round(16000 * (before.offset + before.duration))
                assert not samples[end : end + round(16000 * pause)].any()
    again = read_talks(tmp_path)
    assert again == talks
    lines = (tmp_path / "segments.yaml").read_text().splitlines()
    assert len(lines) == 6 and yaml.safe_load(lines[0])[0].keys() == {"wav", "offset", "duration"}


def test_talks_follow_their_seed_and_their_length(rows: tuple[Path, list[Utterance]], tmp_path: Path) -> None:
    folder, utterances = rows
    made = [
        make_talks(utterances, folder, tmp_path / str(i), count=1, minutes=0.1, seed=seed)
        for i, seed in enumerate((1, 1, 2))
    ]
    texts = [made_one[0].references for made_one in made]
    assert texts[0] == texts[1] != texts[2]
    last = made[0][0].segments[-1]
    assert last.offset < 6 <= last.offset + last.duration  # more than the six sentences there are: some twice


@pytest.mark.parametrize("change", [{"count": 0}, {"sentences": 0}, {"minutes": 0.0}, {"pauses": (0.5, 0.1)}])
def test_impossible_talks(rows: tuple[Path, list[Utterance]], tmp_path: Path, change: dict) -> None:
    with pytest.raises(EchoStreamError, match="talks of|pauses of"):
        make_talks(rows[1], rows[0], tmp_path, **{"count": 1, **change})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("segments.yaml", "- {wav: a.wav, offset: 1}\n", "segment 1: .* lacks wav, offset or duration"),
        ("segments.yaml", "wav: [", "is not YAML in line 1"),
        ("segments.yaml", "wav: 1", "no list of segments"),
        ("references.txt", "one\ntwo\n", "1 segments, 2 references"),
        ("references.txt", None, "references.txt does not exist"),
    ],
)
def test_bad_folders_of_talks(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    (tmp_path / "segments.yaml").write_text("- {wav: a.wav, offset: 0, duration: 1.5}\n")
    (tmp_path / "references.txt").write_text("one\n")
    assert read_talks(tmp_path)[0].segments == (Segment(0.0, 1.5, "one"),)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(EchoStreamError, match=message):
        read_talks(tmp_path)


def test_alignment_ignores_case_and_marks() -> None:
    assert longform.align("the HOUSE was very big".split(), "The house is big.".split()) == [0, 1, 2, None, 3]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("The house is big. Hello, my friend. What time is it now?", REFERENCES, id="perfect"),
        # Its own sentence ends, case and marks do not matter, only the words do.
        pytest.param("the house. Is big hello my. Friend what time is it now", None, id="other-marks"),
        pytest.param("The house is big. What time is it now?", [REFERENCES[0], "", REFERENCES[2]], id="one-left-out"),
        pytest.param(
            "The house is big. Hello, my dear good friend. What time is it now?",
            [REFERENCES[0], "Hello, my dear good friend.", REFERENCES[2]],
            id="words-too-many",
        ),
        pytest.param("", ["", "", ""], id="silence"),
    ],
)
def test_resegmentation(words: str, expected: list[str] | None) -> None:
    spoken = words.split()
    delays = [1000.0 * i for i in range(len(spoken))]
    parts = longform.resegment(TALK, spoken, delays)
    assert " ".join(part.text for part in parts).split() == spoken  # every word once, in order
    if expected is None:
        assert [len(part.text.split()) for part in parts] == [4, 3, 5]
    else:
        assert [part.text for part in parts] == expected
    flat = [delay + 3000 * i for i, part in enumerate(parts) for delay in part.delays]
    assert flat == delays  # counted from each sentence's own start


def ends_of(*sentences: str) -> tuple[list[str], list[int]]:
    words = [sentence.split() for sentence in sentences]
    return sum(words, []), np.cumsum([len(w) for w in words]).tolist()


@pytest.mark.parametrize(
    ("sentences", "precision", "recall"),
    [
        pytest.param(REFERENCES, 1.0, 1.0, id="right"),
        pytest.param(["The house is", "big. Hello, my friend.", REFERENCES[2]], 1.0, 1.0, id="one-word-early"),
        pytest.param(["The house", "is big. Hello, my friend.", REFERENCES[2]], 0.5, 0.5, id="two-words-early"),
        pytest.param([" ".join(REFERENCES)], 0.0, 0.0, id="never"),
        pytest.param([*REFERENCES[:2], "What", "time", "is", "it", "now?"], 2 / 6, 1.0, id="too-often"),
        # The second sentence is missing: its end may be where the first one's is, but one end is not two.
        pytest.param([REFERENCES[0], REFERENCES[2]], 1.0, 0.5, id="one-left-out"),
        # Words left out before the end: where exactly it lies among them cannot be told, so it is right.
        pytest.param(["The house", "Hello, my friend.", REFERENCES[2]], 1.0, 1.0, id="words-left-out"),
    ],
)
def test_boundary_f1(sentences: list[str], precision: float, recall: float) -> None:
    words, ends = ends_of(*sentences)
    spoken = TalkOutput(words, [0.0] * len(words), [(end, 0.0) for end in ends], REFERENCES)
    figures = longform.score([TALK], [spoken], "levenshtein")
    assert figures["boundary_precision"] == pytest.approx(precision)
    assert figures["boundary_recall"] == pytest.approx(recall)
    total = precision + recall
    assert figures["boundary_f1"] == pytest.approx(2 * precision * recall / total if total else 0.0)
    assert figures["boundary_f1_ceiling"] == 1.0


def test_a_weak_translation_lowers_the_ceiling() -> None:
    """Its words align badly, so that even ends in the right places seem wrong."""
    words, ends = ends_of(*REFERENCES)
    alone = [REFERENCES[1], "Goodbye!", REFERENCES[2]]  # the first sentence came out as the second one's words
    spoken = TalkOutput(words, [0.0] * len(words), [(end, 0.0) for end in ends], alone)
    figures = longform.score([TALK], [spoken], "levenshtein")
    assert (figures["boundary_f1"], figures["boundary_f1_ceiling"]) == (1.0, 0.5)


def test_tolerance_is_what_it_says() -> None:
    words, ends = ends_of("The house", "is big. Hello, my friend.", REFERENCES[2])
    spoken = [TalkOutput(words, [0.0] * len(words), [(ends[0], 2.4), (ends[1], 6.0), (ends[2], 9.0)], REFERENCES)]
    for tolerance, expected in ((0, 0.5), (1, 0.5), (2, 1.0)):
        assert longform.score([TALK], spoken, "levenshtein", tolerance_words=tolerance)["boundary_f1"] == expected
    # By the clock: the true ends are at 2 s and 5 s, these at 2.4 s and 6 s.
    for tolerance, expected in ((0.3, 0.0), (0.5, 0.5), (1.0, 1.0)):
        assert longform.score([TALK], spoken, "levenshtein", tolerance_s=tolerance)["boundary_time_f1"] == expected


def test_score_of_a_perfect_talk() -> None:
    words, ends = ends_of(*REFERENCES)
    # Every sentence's words come one second after its start, all at once.
    starts = np.repeat([0.0, 3000.0, 6000.0], [4, 3, 5])
    spoken = TalkOutput(words, (starts + 1000).tolist(), [(end, 1.0) for end in ends], ["", *REFERENCES[1:]])
    figures = longform.score([TALK], [spoken], "levenshtein")
    assert figures["BLEU"] == pytest.approx(100) and 50 < figures["isolated_BLEU"] < 100
    assert figures["share"] == pytest.approx(100 / figures["isolated_BLEU"])
    # LAAL of n words, all after 1000 of 2000 ms: the mean of 1000 - i * 2000 / n.
    expected = np.mean([1000 - 2000 / n * (n - 1) / 2 for n in (4, 3, 5)])
    assert figures["StreamLAAL"] == pytest.approx(expected)
    assert (figures["sentences"], figures["sentences_found"], figures["resegmenter"]) == (3, 3, "levenshtein")


def test_latencies_of_computing_and_of_speech() -> None:
    """All text 1 s after its sentence began, computed in 0.2 s more; heard a second after that, the last one two."""
    words, ends = ends_of(*REFERENCES)
    starts = np.repeat([0.0, 3000.0, 6000.0], [4, 3, 5])
    heard = starts + 2000 + 1000 * (np.arange(12) == 11)
    said = dict(words=words, delays=(starts + 1000).tolist(), ends=[(end, 1.0) for end in ends], isolated=REFERENCES)
    times = dict(heard=heard.tolist(), elapsed=(starts + 1200).tolist(), heard_elapsed=(heard + 200).tolist())
    figures = longform.score([TALK], [TalkOutput(**said, **times)], "levenshtein")
    plain = longform.score([TALK], [TalkOutput(**said)], "levenshtein")
    assert not any("speech" in name or name.endswith("_CA") for name in plain)
    assert {name: figures[name] for name in plain} == plain
    assert figures["StreamLAAL_CA"] == pytest.approx(figures["StreamLAAL"] + 200)
    assert figures["StreamLAAL_speech"] > figures["StreamLAAL"] + 900
    assert "StreamLAAL_speech_CA" in figures
    assert figures["speech_behind"] == pytest.approx(1000 + 1000 / 12) and figures["speech_behind_end"] == 2000


def test_speech_that_is_longer_than_its_source_falls_behind() -> None:
    from echostream.output.words import HeardWords
    from echostream.streaming import SentenceEnd, TargetText, TargetUnits, Waveform
    from echostream.text import Vocabulary

    vocabulary = Vocabulary(["▁no", "▁hello", "▁wor", "ld", "."])
    first = len(vocabulary) - 5
    clock = HeardWords(vocabulary, units_read_text=False)

    def say(now: float, seconds: float, *tokens: int) -> None:
        common = dict(sentence=0, source_time_s=now)
        text = dict(frames=(0,) * len(tokens), text="", sentence_text="")
        clock.take(TargetText(tokens=tuple(first + token for token in tokens), **text, **common))
        clock.take(TargetUnits(units=(1,), frames=1, inputs=0, **common))
        clock.take(Waveform(samples=np.zeros(round(1000 * seconds), np.float32), sample_rate=1000, **common))

    say(1.0, 3.0, 1, 2)  # hello wor: 5 and 3 letters from 1 to 4 s
    assert [word.seconds for word in clock.words] == pytest.approx([1 + 3 * 5 / 8, 4])
    say(2.0, 1.0, 3, 4)  # ld. begins when there is silence, at 4 s
    assert [(word.text, word.seconds) for word in clock.words][1] == ("world.", pytest.approx(5))
    say(9.0, 1.0, 0)  # the player has waited
    clock.take(SentenceEnd(
        sentence=0, source_time_s=9.5, reason="finish", source_text="", text="", tokens=(), frames=(), units=(),
        waveform=np.zeros(0, np.float32), sample_rate=1000, start_s=0, end_s=9, first_heard_s=0, last_heard_s=9,
        lag=None,
    ))  # fmt: skip
    assert [word.seconds for word in clock.words] == pytest.approx([2.875, 5, 10]) and clock.free == 10


def test_longyaal_is_what_its_definition_gives() -> None:
    """By OmniSTEval without a tokenizer: the mean over sentences of delays less an even speaker's."""
    pytest.importorskip("omnisteval", reason="needs the extra longform")
    references = ["The house is big", "Hello friend"]
    talk = Talk(Path("talk.wav"), tuple(Segment(3.0 * i, 2.0, text) for i, text in enumerate(references)))
    delays = [1000.0, 1500, 1500, 2000, 4000, 4000]
    aligned, figures = longform.resegment_softly(
        [talk], [" ".join(references).split()], [delays], "", [[time + 100 for time in delays]]
    )
    assert [part.text for part in aligned[0]] == references and aligned[0][1].elapsed == (1100, 1100)
    by_hand = (np.mean([1000, 1000, 500, 500]) + np.mean([1000, 0])) / 2
    assert figures == pytest.approx({"LongYAAL": by_hand, "LongYAAL_CA": by_hand + 100})


def test_resegmenters_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EchoStreamError, match="'ruler' is unknown"):
        longform.choose_resegmenter("ruler")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert longform.choose_resegmenter("auto") == "levenshtein"
    monkeypatch.setitem(sys.modules, "omnisteval", None)
    with pytest.raises(MissingExtraError, match=r"echostream\[longform\]"):
        longform.resegment_softly([TALK], [["a"]], [[0.0]], "en")


def test_omnisteval_resegments_and_knows_longyaal() -> None:
    for name in ("omnisteval", "mosestokenizer"):
        pytest.importorskip(name, reason="needs the extra longform")
    words, ends = ends_of("The house is big.", "Hello, my dear friend.", "What time is it?")
    starts = np.repeat([0.0, 3000.0, 6000.0], [4, 4, 4])
    spoken = TalkOutput(words, (starts + 1500).tolist(), [(end, 1.0) for end in ends], REFERENCES)
    figures = longform.score([TALK], [spoken], "omnisteval")
    own = longform.score([TALK], [spoken], "levenshtein")
    assert figures["resegmenter"] == "omnisteval" and figures["BLEU"] == pytest.approx(own["BLEU"])
    assert figures["StreamLAAL"] == pytest.approx(own["StreamLAAL"])
    assert 0 < figures["LongYAAL"] < 1500
    aligned, _ = longform.resegment_softly([TALK], [words], [spoken.delays], "en")
    assert [part.text for part in aligned[0]] == ["The house is big.", "Hello, my dear friend.", "What time is it?"]


def test_command_line(rows: tuple[Path, list[Utterance]], tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.evaluate_script import evaluate

    folder, _ = rows
    talks, out = tmp_path / "talks", tmp_path / "out"
    made = evaluate("talks", "--manifest", folder / "test.tsv", "--count", 2, "--sentences", 2, "--output", talks)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("2 talks, 4 sentences")
    command = ["longform", "--talks", talks, "--checkpoint-dir", tiny_bundle, "--policy", "wait-k", "--output", out]
    done = evaluate(*command, "--resegmenter", "levenshtein")
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "longform.json").read_text())
    assert figures["sentences"] == 4 and figures["talks"] == 2 and 0 <= figures["boundary_f1"] <= 1
    assert f"{figures['isolated_BLEU']:.3f}" in done.stdout
    lines = [json.loads(line) for line in (out / "hypothesis.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["talk00.wav", "talk01.wav"]
    for line in lines:
        assert len(line["delays"]) == len(line["prediction"].split()) > 0
        assert line["delays"] == sorted(line["delays"]) and line["delays"][-1] <= line["source_length"]
    # The same, spoken and by the clock of this machine.
    live = [*command[:-1], tmp_path / "live", "--speech", "--computation-aware", "--resegmenter", "levenshtein"]
    done = evaluate(*live)
    assert done.returncode == 0, done.stderr
    timed = json.loads((tmp_path / "live" / "longform.json").read_text())
    assert timed["BLEU"] == figures["BLEU"] and timed["StreamLAAL"] == pytest.approx(figures["StreamLAAL"])
    assert timed["StreamLAAL_CA"] > timed["StreamLAAL"] and timed["StreamLAAL_speech_CA"] > timed["StreamLAAL_speech"]
    assert "StreamLAAL_speech_CA" in done.stdout and timed["speech_behind"] > 0
    for name in ("hypothesis.jsonl", "hypothesis-speech.jsonl"):
        for line in map(json.loads, (tmp_path / "live" / name).read_text().splitlines()):
            assert all(np.array(line["elapsed"]) > line["delays"])
    # A talk that is there already is not translated again, and other options are not mixed in.
    kept = json.loads((out / "talks" / "talk00.json").read_text())
    kept["spoken"]["isolated"] = ["Sentence number one.", "kept"]
    (out / "talks" / "talk00.json").write_text(json.dumps(kept))
    assert evaluate(*command).returncode == 0
    assert json.loads((out / "talks" / "talk00.json").read_text())["spoken"]["isolated"][1] == "kept"
    other = evaluate(*command, "--wait-k", 9)
    assert other.returncode == 1 and "was made with options" in other.stderr.splitlines()[-1]
