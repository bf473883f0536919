"""SimulEval for speech and text output: instances, data loaders and scorers that replace those of SimulEval 1.1.4.

``register()`` puts them into SimulEval's registries under the names users know (BLEU, ASR_BLEU, AL, LAAL, StartOffset,
EndOffset, ...), so that ``simuleval --agent-class echostream.agent.EchoStreamAgent`` gets them without further flags;
for ``--score-only``, which never imports the agent, say ``--user-dir agent``, or ``python -m echostream.agent`` for
``simuleval``. All of this is for simuleval 1.1.4, and an entry can go when the defect it names is gone:

* whole corpus as lists of Python floats, each file decoded three times → ``SpeechDataloader``, ``SpeechInstance``;
* ``elapsed`` written empty, so that computation-aware scoring crashes → ``SpeechInstance.summarize``;
* empty translations write no wav → written with no samples;
* BLEU of speech compares the wav's *path* with the reference → ``TextBLEU``;
* ASR_BLEU shells out to a file pip does not install and logs the failure only → ``SpeechBLEU``;
* AL and LAAL count emitted pieces of speech against words of the reference → per word here;
* ATD takes the speech of a finished run (``--score-only``) for text → from the log's durations;
* ``--computation-aware`` replaces the plain figures instead of adding to them → ``from_args``;
* RTF is 1.0 by construction, Discontinuity* assert on logged instances → from what the log holds;
* AP, DAL and NumChunks of speech count its pieces, and crash when nobody said anything → per unit here;
* WHISPER_ASR_BLEU without the package whisper is 0 → refused (``HostWhisperBLEU``);
* ``--remote-eval`` asks the evaluator for an attribute that it has not, and numpy is no JSON → ``register``,
  ``SpeechPiece``.

The host's own options are obeyed: ``--eval-latency-unit`` (``unit_times``), ``--sacrebleu-tokenizer``,
``--target-speech-lang``, ``--no-use-ref-len``, ``--start-index``, ``--end-index``, ``--continue-unfinished``.

Log lines (``instances.log``) gain ``text`` (what was said), ``source_text`` (what was heard), ``words`` (each with
``text``, and ``delay`` and ``elapsed`` in ms of the ``segment`` of speech that brought its end; of text output, of when
it was written), ``pieces`` (the text as it came, ``[text, delay, elapsed]``) and ``compute`` (ms). Where speech and
text are both wanted, ``written`` and ``written_pieces`` have the words as text.

SimulEval scores a finished run without importing anything of ours unless it is told to, and would give other figures.
Its ``config.yaml`` therefore names a source type that only ``register()`` knows (``SCORED_HERE``): without it
``--score-only`` ends with a KeyError that says what is missing.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from argparse import ArgumentParser, Namespace
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from echostream.audio.io import load_audio, read_audio, write_audio
from echostream.constants import SAMPLE_RATE
from echostream.errors import AudioError, EchoStreamError, require
from echostream.evaluation import latency, quality
from echostream.evaluation.asr import Whisper, load_recogniser, recogniser_title
from echostream.files import write_text
from echostream.text import WORD_START
from echostream.text_file import read_lines

require("simuleval", "simuleval")

from simuleval.data.dataloader import DATALOADER_DICT  # noqa: E402  (after the check that it is there)
from simuleval.data.dataloader.s2t_dataloader import SpeechToSpeechDataloader  # noqa: E402
from simuleval.data.segments import Segment, SpeechSegment, TextSegment  # noqa: E402
from simuleval.evaluator.evaluator import SentenceLevelEvaluator  # noqa: E402
from simuleval.evaluator.instance import INSTANCE_TYPE_DICT, SpeechToSpeechInstance  # noqa: E402
from simuleval.evaluator.scorers.latency_scorer import LATENCY_SCORERS_DICT, LATENCY_SCORERS_NAME_DICT, LatencyScorer  # noqa: E402
from simuleval.evaluator.scorers.quality_scorer import (  # noqa: E402
    QUALITY_SCORERS_DICT,
    QualityScorer,
    WhisperASRSacreBLEUScorer,
    add_sacrebleu_args,
)

logger = logging.getLogger("echostream.evaluation")


SCORED_HERE = "speech of EchoStream, which is scored by simuleval --user-dir agent, or python -m echostream.agent, only"


class Samples(np.ndarray):
    """Samples that can be added to a list, which is what SimulEval's own agents do with what they are sent."""

    def __radd__(self, other: Any) -> Any:
        return other + self.tolist() if isinstance(other, list) else super().__radd__(other)


@dataclass
class SpeechPiece(SpeechSegment):
    """Speech, float32 [N], that can be sent over the wire (``--standalone``, ``--remote-eval``)."""

    def json(self) -> str:
        return json.dumps({**vars(self), "content": np.asarray(self.content).tolist()})


class SpeechDataloader(SpeechToSpeechDataloader):
    """Sources as numpy arrays, decoded when their turn comes; any format, channels averaged, own sample rate."""

    @classmethod
    def from_files(cls, source: str | Path, target: str | Path, tgt_lang: str | Path | None = None) -> SpeechDataloader:
        """Lists with an item a line.

        Raises:
            EchoStreamError: a list is missing or no UTF-8 text, or they are of unequal length.
        """
        if source is None or target is None:
            raise EchoStreamError("simuleval needs --source and --target, lists with an item a line")
        sources, targets = (
            [line.strip() for line in read_lines(path, EchoStreamError, "list")] for path in (source, target)
        )
        if len(sources) != len(targets):
            raise EchoStreamError(f"{source} has {len(sources)} lines, {target} has {len(targets)}; they must match")
        languages = read_lines(tgt_lang, EchoStreamError, "list") if tgt_lang is not None else []
        return cls(sources, targets, [language.strip() for language in languages])

    @classmethod
    def from_args(cls, args: Namespace) -> SpeechDataloader:
        loader = super().from_args(args)
        args.source_type = SCORED_HERE
        if getattr(args, "continue_unfinished", False) and args.output:
            drop_partial_line(Path(args.output) / "instances.log")
        return loader

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Samples float32 [N] and their rate."""
        try:
            return read_audio(self.get_source_audio_path(index))
        except AudioError as error:  # SimulEval would show its own stack
            raise SystemExit(f"error: {error}") from None


class TextDataloader(SpeechDataloader):
    """The same for text output."""

    @classmethod
    def from_args(cls, args: Namespace) -> TextDataloader:
        loader = super().from_args(args)
        args.target_type = "text"
        return loader


def drop_partial_line(log: Path) -> None:
    """Take away what a run that was killed had begun to write: SimulEval would stumble over it."""
    if log.is_file():
        data = log.read_bytes()
        if not data.endswith(b"\n"):
            log.write_bytes(data[: data.rfind(b"\n") + 1])


class Words:
    """Words in the making, from pieces of text. A piece with a leading space starts a word, one with a trailing space
    ends it.

    Attributes:
        done: the words.
        pieces: the text as it came: ``[text, delay, elapsed]``, what came at one time in one entry.
    """

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self.pieces: list[list[Any]] = []
        self.gap = False  # the text so far ended with a space

    def add(self, pieces: list[str], **timing: float) -> None:
        text, times = "".join(pieces), [timing["delay"], timing["elapsed"]]
        if text and self.pieces and self.pieces[-1][1:] == times:
            self.pieces[-1][0] += text
        elif text:
            self.pieces.append([text, *times])
        for piece in pieces:
            for i, part in enumerate(piece.split()):
                if i or self.gap or piece[0].isspace() or not self.done:
                    self.done.append({"text": part, **timing})
                else:
                    word = self.done[-1]
                    word["text"] += part
                    if any(c.isalnum() for c in part):  # a full stop that follows later makes no sound
                        word.update(timing)
            self.gap = piece[-1:].isspace() or (self.gap and not piece)


class SpeechInstance(SpeechToSpeechInstance):
    """One utterance: hands out its source and collects the speech and the words that come back."""

    def __init__(self, index: int, dataloader: SpeechDataloader | None, args: Namespace | None):
        if not 0 <= index < len(dataloader):
            raise EchoStreamError(
                f"recording {index} of 0..{len(dataloader) - 1} does not exist; see --start-index and --end-index"
            )
        if args.output is None:  # the base class wants a place for recordings, though text needs none
            if args.target_type == "speech":
                raise EchoStreamError("speech output needs --output, the directory for its recordings")
            args = copy(args)
            args.output = ""
        # The base class would decode every recording of the corpus at once; so it is not shown the loader.
        super().__init__(index, None, args)
        self.dataloader = dataloader
        self.reference = dataloader.get_target(index)
        self.tgt_lang = dataloader.get_tgt_lang(index)
        self.out = Words()
        self.ahead = Words()  # of an agent that also gives out text ahead of its speech
        self.waiting: list[str] = []
        self.source_text = ""
        self.recording: np.ndarray | None = None

    def send_source(self, segment_size: int = 10) -> Segment:
        """The next ``segment_size`` ms, as float32 [N]."""
        if self.recording is None:
            self.recording, self.rate = self._read()
            self.sample_count = len(self.recording)
            self.start_time = time.time()
        start = self.step
        self.step = min(start + max(1, round(segment_size / 1000 * self.rate)), self.sample_count)
        samples = self.recording[start : self.step]
        self.source_finished_reading = self.step == self.sample_count
        if self.source_finished_reading:
            self.recording = self.recording[:0].copy()  # read to its end: a long corpus must not pile up
        return SpeechPiece(
            index=self.len_sample_to_ms(self.step),
            content=samples.view(Samples),
            sample_rate=self.rate,
            finished=self.source_finished_reading,
            tgt_lang=self.tgt_lang,
        )

    def _read(self) -> tuple[np.ndarray, int]:
        if isinstance(self.dataloader, SpeechDataloader):
            return self.dataloader.read(self.index)
        # of --dataloader-class
        samples = np.asarray(self.dataloader.get_source(self.index), dtype=np.float32)
        samples = samples.mean(axis=1) if samples.ndim == 2 else samples
        return samples, self.dataloader.get_source_audio_info(self.index).samplerate

    @property
    def sample_rate(self) -> int:
        return self.rate

    @property
    def source_length(self) -> float:
        """Milliseconds."""
        return self.len_sample_to_ms(self.sample_count)

    def receive_prediction(self, segment: Segment) -> None:
        """Take one piece of output. Text comes in ``segment.config["pieces"]`` and is timed by the speech that follows.

        Text whose audio is not there yet waits for the next speech. Text that is written ahead of its speech, for
        listeners who also read, comes in ``"written"`` as well, and counts there at once.
        """
        self._receive(segment)
        self.waiting += segment.config.get("pieces", [])
        if "written" in segment.config:
            self.ahead.add(segment.config["written"], **self._now())
        if isinstance(segment, SpeechSegment) and len(segment.content) > 0:
            if self.target_sample_rate < 0:
                self.target_sample_rate = segment.sample_rate
            self.prediction_list.append(np.asarray(segment.content, dtype=np.float32))
            self.durations.append(1000 * len(segment.content) / segment.sample_rate)
            self.delays.append(self.len_sample_to_ms(self.step))
            self.elapsed.append(self.delays[-1] + self.compute_ms)
            self._give_out_words()
        if segment.finished:
            self._give_out_words()  # said in text only: no audio will come for them any more

    @property
    def words(self) -> list[dict[str, Any]]:
        return self.out.done

    @property
    def pieces(self) -> list[list[Any]]:
        return self.out.pieces

    @property
    def text(self) -> str:
        return " ".join(word["text"] for word in self.words)

    def _receive(self, segment: Segment) -> None:
        self.compute_ms = 1000 * (time.time() - self.start_time)
        self.finish_prediction = segment.finished
        self.source_text = segment.config.get("source_text", self.source_text)

    def _now(self) -> dict[str, float]:
        delay = self.len_sample_to_ms(self.step)
        return {"delay": delay, "elapsed": delay + self.compute_ms}

    def _give_out_words(self) -> None:
        self.out.add(self.waiting, **self._now(), segment=len(self.delays) - 1)
        self.waiting = []

    def _summary(self) -> dict[str, Any]:
        """What the log lines of all kinds of output have in common."""
        return {
            "index": self.index,
            "text": self.text,
            "source_text": self.source_text,
            "words": self.words,
            "pieces": self.pieces,
            "compute": self.compute_ms,
            "source_length": self.source_length,
            "reference": self.reference,
            "source": str(self.dataloader.get_source_audio_path(self.index)),
        }

    def summarize(self) -> dict[str, Any]:
        """The log line; also writes the wav: silence where the listener waits, from the first piece of speech on."""
        rate = self.target_sample_rate if self.target_sample_rate > 0 else SAMPLE_RATE
        self.intervals = [list(interval) for interval in latency.playback(self.delays, self.durations)]
        pieces, self.silences = [np.zeros(0, dtype=np.float32)], []
        end = self.intervals[0][0] if self.intervals else 0.0
        for (start, duration), samples in zip(self.intervals, self.prediction_list, strict=True):
            if start > end:
                pieces.append(np.zeros(round(rate * (start - end) / 1000), dtype=np.float32))
                self.silences.append(start - end)
            pieces.append(samples)
            end = start + duration
        waveform = np.concatenate(pieces)
        write_audio(self.wav_path, waveform, rate)
        return {
            **self._summary(),
            **({"written": self.ahead.done, "written_pieces": self.ahead.pieces} if self.ahead.done else {}),
            "prediction": self.wav_path.as_posix(),
            "delays": self.delays,
            "elapsed": self.elapsed,
            "durations": self.durations,
            "intervals": self.intervals,
            "silences": self.silences,
            "prediction_offset": self.intervals[0][0] if self.intervals else self.source_length,
            "prediction_length": 1000 * len(waveform) / rate,
        }


class TextInstance(SpeechInstance):
    """One utterance whose translation, or transcript, is text. Its log line has a delay for each unit of it: a word, or
    what ``--eval-latency-unit`` says."""

    def receive_prediction(self, segment: Segment) -> None:
        """Take one piece of output: the segment's ``config["pieces"]``, or, of an agent without, its content."""
        self._receive(segment)
        content = segment.content if isinstance(segment, TextSegment) else ""
        if self.latency_unit == "word" and content:
            content += " "
        elif self.latency_unit == "spm":  # such agents give pieces with a space between two
            content = "".join(content.split()).replace(WORD_START, " ")
        self.out.add(segment.config.get("pieces", [content]), **self._now())
        if segment.finished:
            self.delays, self.elapsed = unit_times(self), unit_times(self, elapsed=True)

    def summarize(self) -> dict[str, Any]:
        """The log line: as SimulEval's own of text, with ``words``."""
        timing = {"delays": self.delays, "elapsed": self.elapsed, "prediction_length": len(self.delays)}
        if self.latency_unit == "spm":
            timing["prediction_spm"] = self.target_spm_model.encode(self.text, out_type=str)
        return {**self._summary(), "prediction": self.text, **timing}


def unit_times(instance: Any, elapsed: bool = False, written: bool = False) -> list[float]:
    """When each unit of the output was given out (ms): words, characters without spaces, or pieces of SentencePiece.

    The unit is the instance's ``latency_unit``, SimulEval's ``--eval-latency-unit``. A word, or a piece, came when its
    last character did; a character of a log without ``pieces`` when its word did.

    Args:
        elapsed: by the clock, with all computing so far, in place of the source that was read.
        written: of the text that comes ahead of its speech (``--output-type both``).
    """
    words = getattr(instance, "written" if written else "words", [])
    unit, name = getattr(instance, "latency_unit", "word"), "elapsed" if elapsed else "delay"
    if unit == "word":
        return [word[name] for word in words]
    pieces = getattr(instance, "written_pieces" if written else "pieces", None)
    pieces = pieces or [[word["text"], word["delay"], word["elapsed"]] for word in words]
    times = [piece[1 + elapsed] for piece in pieces for c in piece[0] if not c.isspace()]
    if unit == "char":
        return times
    text, ends = " ".join(word["text"] for word in words), []
    for piece in instance.target_spm_model.encode(text, out_type="immutable_proto").pieces:
        count = sum(not c.isspace() for c in text[: piece.end])
        ends.append(times[max(0, count - 1)])
    return ends


class TextBLEU(QualityScorer):
    """BLEU of the streamed text (of the prediction itself for text output), by ``--sacrebleu-tokenizer``."""

    def __init__(self, tokenizer: str = quality.TOKENIZER) -> None:
        self.tokenizer = tokenizer

    def __call__(self, instances: dict[int, Any]) -> float:
        texts, references = [spoken_text(i) for i in instances.values()], [i.reference for i in instances.values()]
        return quality.bleu(texts, references, self.tokenizer)

    add_args = staticmethod(add_sacrebleu_args)

    @classmethod
    def from_args(cls, args: Namespace) -> TextBLEU:
        return cls(getattr(args, "sacrebleu_tokenizer", quality.TOKENIZER))


class TextWER(QualityScorer):
    """Word error rate of a streaming transcript against the source's text, in percent."""

    def __call__(self, instances: dict[int, Any]) -> float:
        references = [instance.reference for instance in instances.values()]
        return quality.word_error_rate([spoken_text(i) for i in instances.values()], references, numbers=False)

    @classmethod
    def from_args(cls, args: Namespace) -> TextWER:
        return cls()


class SpeechBLEU(QualityScorer):
    """ASR-BLEU: BLEU of what the recogniser named in ``asr.txt`` hears, case and punctuation left out.

    Transcripts are written beside the log as ``asr_transcripts.txt``, so that scoring again does not listen again.
    """

    def __init__(
        self,
        recogniser: str = "auto",
        model: str | None = None,
        language: str = "en",
        tokenizer: str = quality.TOKENIZER,
    ) -> None:
        self.recogniser, self.model, self.language, self.tokenizer = recogniser, model, language, tokenizer

    def __call__(self, instances: dict[int, Any]) -> float:
        references = [i.reference for i in instances.values()]
        return quality.asr_bleu(self.transcribe(instances), references, self.tokenizer, self.language == "en")

    def transcribe(self, instances: dict[int, Any], alone: bool = False) -> list[str]:
        return transcribe(instances, self.recogniser, alone, self.model, self.language)

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        add_sacrebleu_args(parser)
        parser.add_argument("--target-speech-lang", default="en", help="language of the target speech (default: en)")
        add_recogniser_arguments(parser)

    @classmethod
    def from_args(cls, args: Namespace) -> SpeechBLEU:
        # SimulEval asks the scorers for their options before it imports the agent that brings them: without
        # --user-dir the options are those of its own scorers, and the agent adds what they lack.
        return cls(
            getattr(args, "asr", "auto"),
            getattr(args, "asr_model", None),
            getattr(args, "target_speech_lang", "en"),
            getattr(args, "sacrebleu_tokenizer", quality.TOKENIZER),
        )


class SpeechWER(SpeechBLEU):
    """Word error rate of the recogniser's transcript against the text the model meant to say: is the voice clear?"""

    alone = False

    def __call__(self, instances: dict[int, Any]) -> float:
        texts = [spoken_text(i) for i in instances.values()]
        if not any(text.strip() for text in texts):
            return math.nan
        heard = self.transcribe(instances, self.alone)
        return quality.word_error_rate(heard, texts, numbers=self.language == "en")


class VoiceWER(SpeechWER):
    """The same of the speech alone, the silences cut out in which the listener waits for more.

    Recognisers mishear words beside a sudden silence. The difference from ``ASR_WER`` is what waiting costs them.
    Transcripts are written as ``voice_transcripts.txt``.
    """

    alone = True


class HostWhisperBLEU(WhisperASRSacreBLEUScorer):
    """SimulEval's own, refused where it would count every transcript as empty."""

    def __call__(self, instances: dict[int, Any]) -> float:
        try:
            import whisper  # noqa: F401
        except ModuleNotFoundError:
            raise EchoStreamError(
                "WHISPER_ASR_BLEU needs openai-whisper (pip install openai-whisper); ASR_BLEU does without"
            ) from None
        return super().__call__(instances)


def add_recogniser_arguments(parser: ArgumentParser) -> None:
    """Who listens, for ASR_BLEU, ASR_WER and VOICE_WER."""
    parser.add_argument(
        "--asr", default="auto", help="recogniser for ASR_BLEU and ASR_WER: auto, whisper or pocketsphinx"
    )
    parser.add_argument(
        "--asr-model", metavar="DIR", help="another Whisper for it, in CTranslate2's form; multilingual if need be"
    )


def durations_of(instance: Any) -> list[float] | None:
    """Of each piece of speech (ms); None for text."""
    return None if isinstance(instance, TextInstance) else getattr(instance, "durations", None)


def spoken_text(instance: Any) -> str:
    return getattr(instance, "text", None) or ("" if hasattr(instance, "words") else instance.prediction)


def transcribe(
    instances: dict[int, Any],
    recogniser: str = "auto",
    alone: bool = False,
    model: str | None = None,
    language: str = "en",
) -> list[str]:
    """What the recogniser hears in each instance's wav, in order; kept in the output directory for the next call.

    ``alone``: in the speech without the silences in which the listener waits. The others as ``load_recogniser``.
    """
    from tqdm import tqdm

    if any(durations_of(instance) is None for instance in instances.values()):
        raise EchoStreamError("text has no recording that a recogniser could hear; take BLEU or WER")
    wavs = [Path(instance.prediction) for instance in instances.values()]
    folder = wavs[0].parent.parent
    cache, name_file = folder / f"{'voice' if alone else 'asr'}_transcripts.txt", folder / "asr.txt"
    newest = max((wav.stat().st_mtime for wav in wavs if wav.exists()), default=math.inf)
    if cache.exists() and name_file.exists() and cache.stat().st_mtime >= newest:
        lines, name = read_lines(cache, EchoStreamError), read_lines(name_file, EchoStreamError)[0]
        title = recogniser_title(recogniser, model, language)
        usual = title is None and (name == Whisper.name or not name.startswith("Whisper "))
        if len(lines) == len(wavs) and (name == title or usual):
            return lines
    engine = load_recogniser(recogniser, *([model, language] if model or language != "en" else []))
    lines = []
    for wav, instance in zip(tqdm(wavs, desc=f"listening ({engine.name})"), instances.values()):
        if alone and getattr(instance, "silences", None):
            line = engine.transcribe(without_silences(wav, instance.intervals))
        else:
            line = engine.transcribe_file(wav)
        lines.append(line.replace("\n", " "))
    write_text(name_file, engine.name + "\n")
    write_text(cache, "".join(f"{line}\n" for line in lines))
    return lines


def without_silences(wav: Path, intervals: Sequence[Sequence[float]]) -> np.ndarray:
    """The samples [T] at 16 kHz of a written wav, of its ``intervals`` ((start, duration) in ms, as logged) alone."""
    samples = load_audio(wav)
    begin = intervals[0][0]
    edges = [(start - begin, start - begin + duration) for start, duration in intervals]
    return np.concatenate([samples[round(a * SAMPLE_RATE / 1000) : round(b * SAMPLE_RATE / 1000)] for a, b in edges])


class WordScorer(LatencyScorer):
    """Base of the latency scorers here. Utterances without output are skipped and counted in a warning, not averaged.

    Computation-aware figures (``--computation-aware``, name with ``_CA``) use ``elapsed``: the source read so far plus
    all the time spent computing so far, as SimulEval defines it (no overlap of listening and computing).
    """

    name = ""

    def measure(self, instance: Any) -> float | None:
        """The instance's figure; None when it has no output to measure."""
        raise NotImplementedError

    def __call__(self, instances: dict[int, Any]) -> float:
        figures = []
        for instance in instances.values():
            figure = self.measure(instance)
            if figure is not None:
                instance.metrics[self.metric_name] = figure
                figures.append(figure)
        if len(figures) < len(instances):
            logger.warning(f"{self.metric_name}: {len(instances) - len(figures)} utterances without output left out")
        return float(np.mean(figures)) if figures else math.nan

    @property
    def metric_name(self) -> str:
        return self.name + ("_CA" if self.computation_aware else "")

    def word_delays(self, instance: Any) -> list[float]:
        """When each word, or other unit of ``--eval-latency-unit``, was given out."""
        if hasattr(instance, "words"):
            return unit_times(instance, self.computation_aware)
        return list(getattr(instance, self.timestamp_type, []))

    def given_out(self, instance: Any) -> list[float]:
        """When each piece of speech was given out, or each unit of text."""
        if durations_of(instance) is not None:
            return list(instance.elapsed if self.computation_aware else instance.delays)
        return self.word_delays(instance)

    def reference_words(self, instance: Any) -> int:
        unit = getattr(instance, "latency_unit", "word")
        words = len(instance.reference.split()) if unit == "word" else instance.reference_length
        return words if self.use_ref_len and words else len(self.word_delays(instance))

    @classmethod
    def from_args(cls, args: Namespace) -> WordScorer:
        # SimulEval adds the computation-aware scorer beside this one; this one is the plain figure.
        return cls(computation_aware=False, use_ref_len=not args.no_use_ref_len)


class WordAL(WordScorer):
    """AL per target word at the emission of its audio (ms)."""

    name = "AL"
    lagging = staticmethod(latency.average_lagging)

    def measure(self, instance: Any) -> float | None:
        delays = self.word_delays(instance)
        if not delays:
            return None
        return self.lagging(delays, instance.source_length, self.reference_words(instance))


class WordLAAL(WordAL):
    """LAAL per target word at the emission of its audio (ms)."""

    name = "LAAL"
    lagging = staticmethod(latency.length_adaptive_average_lagging)


class TokenDelay(WordScorer):
    """ATD per 300 ms of speech, or per word of text (ms). SimulEval's own takes a finished run for text."""

    name = "ATD"

    def measure(self, instance: Any) -> float | None:
        emitted = self.given_out(instance)
        if not emitted:
            return None
        delays = TokenDelay().given_out(instance)
        return latency.average_token_delay(delays, durations_of(instance), emitted)


class WordAP(WordAL):
    """AP per target word at the emission of its audio (a share of the source)."""

    name = "AP"
    lagging = staticmethod(latency.average_proportion)


class WordDAL(WordAL):
    """DAL per target word at the emission of its audio (ms)."""

    name = "DAL"

    def measure(self, instance: Any) -> float | None:
        delays = self.word_delays(instance)
        return latency.differentiable_average_lagging(delays, instance.source_length) if delays else None


class ChunkCount(WordScorer):
    """How many pieces of speech, or units of text, were given out."""

    name = "NumChunks"

    def measure(self, instance: Any) -> float | None:
        return float(len(self.given_out(instance))) or None


class WrittenScorer(WordScorer):
    """For speech with text: figures of the words as they were written, ahead of their speech."""

    def word_delays(self, instance: Any) -> list[float]:
        return unit_times(instance, self.computation_aware, written=True)


class WrittenAL(WrittenScorer, WordAL):
    """AL per target word at its writing (ms)."""

    name = "AL_TEXT"


class WrittenLAAL(WrittenScorer, WordLAAL):
    """LAAL per target word at its writing (ms)."""

    name = "LAAL_TEXT"


class WrittenStart(WrittenScorer):
    """From the start of the source to the first word written (ms)."""

    name = "StartOffset_TEXT"

    def measure(self, instance: Any) -> float | None:
        return next(iter(self.word_delays(instance)), None)


class StartOffset(WordScorer):
    """From the start of the source to the first sound of the translation (ms)."""

    name = "StartOffset"

    def measure(self, instance: Any) -> float | None:
        return next(iter(self.given_out(instance)), None)


class EndOffset(WordScorer):
    """From the end of the source to the end of the translation as it is played (ms)."""

    name = "EndOffset"

    def measure(self, instance: Any) -> float | None:
        times = self.given_out(instance)
        if not times:
            return None
        durations = durations_of(instance) or [0.0] * len(times)
        return sum(latency.playback(times, durations)[-1]) - instance.source_length


class RealTimeFactor(WordScorer):
    """Seconds of computing for a second of source."""

    name = "RTF"

    def measure(self, instance: Any) -> float | None:
        return instance.compute / instance.source_length if hasattr(instance, "compute") else None


class SilenceSum(WordScorer):
    """Silence inside the translation, where the listener waits for more (ms, plain clock)."""

    name = "DiscontinuitySum"

    def measure(self, instance: Any) -> float | None:
        return float(sum(instance.silences)) if instance.delays and hasattr(instance, "silences") else None


class SilenceNumber(SilenceSum):
    """How many such silences there are."""

    name = "DiscontinuityNum"

    def measure(self, instance: Any) -> float | None:
        return float(len(instance.silences)) if instance.delays and hasattr(instance, "silences") else None


class SilenceAverage(SilenceSum):
    """How long one such silence is (ms)."""

    name = "DiscontinuityAve"

    def measure(self, instance: Any) -> float | None:
        total, count = super().measure(instance), len(getattr(instance, "silences", []))
        return total if not total else total / count


LATENCY_SCORERS = (
    WordAL, WordLAAL, WordAP, WordDAL, TokenDelay, StartOffset, EndOffset, RealTimeFactor, ChunkCount,
    SilenceSum, SilenceNumber, SilenceAverage, WrittenAL, WrittenLAAL, WrittenStart,
)  # fmt: skip
QUALITY_SCORERS = {
    "BLEU": TextBLEU, "WER": TextWER, "ASR_BLEU": SpeechBLEU, "ASR_WER": SpeechWER, "VOICE_WER": VoiceWER,
    "WHISPER_ASR_BLEU": HostWhisperBLEU,
}  # fmt: skip


def register() -> None:
    """Put everything of this file into SimulEval's registries; may be called again."""
    import simuleval

    version = _version("simuleval")
    if version != "1.1.4":
        logger.warning(f"simuleval {version}: EchoStream's scorers were made for 1.1.4 ({simuleval.__file__})")
    DATALOADER_DICT.update({"speech-to-speech": SpeechDataloader, "speech-to-text": TextDataloader})
    for source in ("speech", "youtube", SCORED_HERE):
        INSTANCE_TYPE_DICT.update({f"{source}-speech": SpeechInstance, f"{source}-text": TextInstance})
    INSTANCE_TYPE_DICT[f"{SCORED_HERE}-{SCORED_HERE}"] = SpeechInstance  # SimulEval notes the source's type twice
    if not hasattr(SentenceLevelEvaluator, "instance_iterator"):  # what RemoteEvaluator goes through
        SentenceLevelEvaluator.instance_iterator = property(lambda evaluator: evaluator.iterator)
    if Path(sys.argv[0]).name in ("simuleval", "cli.py") and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _one_line
        if "--slurm" in sys.argv:
            raise EchoStreamError("--slurm of simuleval 1.1.4 does not work on the command line; call it from sbatch")
    QUALITY_SCORERS_DICT.update(QUALITY_SCORERS)
    for scorer in LATENCY_SCORERS:
        LATENCY_SCORERS_DICT[scorer.name] = scorer
        LATENCY_SCORERS_NAME_DICT[scorer.__name__] = scorer.name


def _one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """SimulEval shows every error with its stack; ours are made to be read without."""
    if isinstance(error, EchoStreamError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


__all__ = [
    "SpeechDataloader", "SpeechInstance", "SpeechPiece", "TextInstance", "add_recogniser_arguments", "register",
    "spoken_text", "transcribe", "unit_times",
]  # fmt: skip
