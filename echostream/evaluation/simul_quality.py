"""SimulEval's scorers of quality; see ``simul``."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echostream.audio.io import load_audio
from echostream.constants import SAMPLE_RATE
from echostream.errors import EchoStreamError, require
from echostream.evaluation import quality
from echostream.evaluation.asr import Whisper, load_recogniser, recogniser_title
from echostream.evaluation.simul_instances import durations_of
from echostream.files import write_text
from echostream.text_file import read_lines

require("simuleval", "simuleval")

from simuleval.evaluator.scorers.quality_scorer import QualityScorer, WhisperASRSacreBLEUScorer, add_sacrebleu_args  # noqa: E402


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
