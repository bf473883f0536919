"""SimulEval's instances and data loaders for speech and text output; see ``simul``."""

from __future__ import annotations

import json
import logging
import time
from argparse import Namespace
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echostream.audio.io import read_audio, write_audio
from echostream.constants import SAMPLE_RATE
from echostream.errors import AudioError, EchoStreamError, require
from echostream.evaluation import latency
from echostream.text import WORD_START, has_letters
from echostream.text_file import read_lines

require("simuleval", "simuleval")


from simuleval.data.dataloader.s2t_dataloader import SpeechToSpeechDataloader  # noqa: E402
from simuleval.data.segments import Segment, SpeechSegment, TextSegment  # noqa: E402
from simuleval.evaluator.instance import SpeechToSpeechInstance  # noqa: E402

SCORED_HERE = "speech of EchoStream, which is scored by simuleval --user-dir agent, or python -m echostream.agent, only"

logger = logging.getLogger("echostream.evaluation")


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
                    if has_letters(part):  # a full stop that follows later makes no sound
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
        waveform, self.silences = latency.played(self.intervals, self.prediction_list, rate)
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


def durations_of(instance: Any) -> list[float] | None:
    """Of each piece of speech (ms); None for text."""
    return None if isinstance(instance, TextInstance) else getattr(instance, "durations", None)
