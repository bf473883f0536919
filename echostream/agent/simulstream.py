"""simulstream's speech processor over a streaming session: chunks of speech in, subwords out, none ever taken back.

simulstream_inference --speech-processor-config echostream/assets/simulstream.yaml --wav-list-file wavs.txt \
    --metrics-log-file metrics.jsonl
omnisteval longform --word_level --lang en --hypothesis_format simulstream --hypothesis_file metrics.jsonl \
    --simulstream_config_file echostream/assets/simulstream.yaml \
    --speech_segmentation segments.yaml --ref_sentences_file references.txt

The log of the first is what OmniSTEval (0.1.7 or later) reads for LongYAAL, plain and computation-aware.
``simulstream_server`` takes the same file; each processor of its pool is one stream, and all share one model.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from echostream.agent.pieces import OUTPUTS, Pieces
from echostream.checkpoint import DEFAULT_BUNDLE, Bundle, load_bundle, use_threads
from echostream.constants import SAMPLE_RATE
from echostream.errors import ConfigError, EchoStreamError, require
from echostream.streaming.events import Event
from echostream.streaming.resolve import OPTIONS
from echostream.streaming.session import StreamingSession
from echostream.text import WORD_START

require("simulstream", "simulstream")

from simulstream.server.speech_processors import SpeechProcessor  # noqa: E402  (after the check that it is there)
from simulstream.server.speech_processors.incremental_output import IncrementalOutput  # noqa: E402

MODEL = {"checkpoint_dir": None, "device": "cpu", "backend": None, "threads": 1}
# Keys that simulstream itself, or whoever reads its log, needs.
HOST = ("type", "speech_chunk_size", "detokenizer_type", "latency_unit")
# What the session is told besides; its outputs are chosen by ``output`` instead.
SESSION = tuple(name for name in OPTIONS if name not in ("settings", "speech", "text"))
CHOICES = ("text", "speech", "source")


class EchoStreamProcessor(SpeechProcessor):
    """One stream.

    Args:
        config: the YAML file's keys; ``echostream/assets/simulstream.yaml`` explains them. ``output`` chooses what the
            subwords are: ``text`` of the translation when it is written, or, with ``speech``, when the speech that says
            it is given out; or ``source``, what was heard.

    Raises:
        EchoStreamError: a key is unknown or out of range, or the checkpoint cannot be used.
    """

    _bundles: ClassVar[dict[tuple[str, ...], Bundle]] = {}

    def __init__(self, config: SimpleNamespace):
        super().__init__(config)
        given = vars(config)
        self.output = given.get("output", "text")
        for name in given:
            if name not in (*HOST, *MODEL, *SESSION, "output"):
                known = ", ".join((*HOST, *MODEL, "output", *SESSION))
                raise ConfigError(f"simulstream's configuration has the unknown key {name!r}; known: {known}")
        if self.output not in CHOICES:
            raise ConfigError(f"output is {self.output!r} in simulstream's configuration; choose {', '.join(CHOICES)}")
        size = given.get("speech_chunk_size")
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0.01 <= size <= 60:
            raise ConfigError(f"speech_chunk_size is {size!r} in simulstream's configuration; 0.01 to 60 seconds")
        self.bundle = self.load_model(config)
        if self.output == "speech" and self.bundle.vocoder is None:
            raise ConfigError(f"checkpoint directory {given.get('checkpoint_dir')} has no vocoder; take output: text")
        options = {name: given[name] for name in SESSION if given.get(name) is not None}
        self.session = StreamingSession(self.bundle, **OUTPUTS[self.output], **options)
        self._start()

    @classmethod
    def load_model(cls, config: SimpleNamespace) -> Bundle:
        """The model, loaded once however many processors share it."""
        given: dict[str, Any] = {name: getattr(config, name, default) for name, default in MODEL.items()}
        key = tuple(map(str, given.values()))
        if key not in cls._bundles:
            directory = given["checkpoint_dir"] or DEFAULT_BUNDLE
            cls._bundles[key] = load_bundle(directory, given["device"], given["backend"], given["threads"])
            use_threads(cls._bundles[key], given["threads"])
        return cls._bundles[key]

    def process_chunk(self, waveform: np.ndarray) -> IncrementalOutput:
        """Hear float32 [N] at 16 kHz."""
        return self._said(self.session.push(waveform, SAMPLE_RATE))

    def end_of_stream(self) -> IncrementalOutput:
        return self._said(self.session.finish())

    def clear(self) -> None:
        self.session.reset()
        self._start()

    def set_source_language(self, language: str) -> None:
        self._check(language, self.bundle.source_lang, "hears")

    def set_target_language(self, language: str) -> None:
        self._check(language, self.bundle.target_lang, "speaks")

    def tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace(WORD_START, " ")

    def _start(self) -> None:
        self.pieces = Pieces(self.bundle, self.output)
        self.gap = False  # the next subword starts a word whatever it is
        self.empty = True  # nothing was said yet: the stream's first word needs no space before it

    def _said(self, events: list[Event]) -> IncrementalOutput:
        tokens = []
        for piece in self.pieces.take(events)[0]:
            if piece == " ":  # a sentence's end, or a word's start alone
                self.gap = True
                continue
            starts = self.gap or piece.startswith(" ")
            tokens.append((WORD_START if starts and not self.empty else "") + piece.removeprefix(" "))
            self.gap = self.empty = False
        return IncrementalOutput(tokens, self.tokens_to_string(tokens), [], "")

    @staticmethod
    def _check(asked: Any, own: str, verb: str) -> None:
        """A model here has one pair of languages; regions do not matter."""
        short = str(asked).replace("_", "-").partition("-")[0].lower()
        if own and short != own.partition("-")[0].lower():
            raise EchoStreamError(f"language {asked!r} was asked for; this model {verb} {own!r} only")
