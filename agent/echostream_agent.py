"""SimulEval's speech-to-speech agent: a thin shell over the streaming session.

simuleval --agent agent/echostream_agent.py --source wavs.txt --target references.txt --output out \
    --checkpoint-dir echostream/assets/es-en --chunk-ms 320 --quality-metrics BLEU ASR_BLEU \
    --latency-metrics StartOffset EndOffset AL LAAL --computation-aware

To score a finished run again: simuleval --user-dir agent --score-only --output out --quality-metrics BLEU ...
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
from simuleval.agents import SpeechToSpeechAgent
from simuleval.agents.actions import Action, ReadAction, WriteAction
from simuleval.agents.states import AgentStates
from simuleval.data.segments import EmptySegment, Segment, SpeechSegment
from simuleval.utils import entrypoint

from echostream.checkpoint import DEFAULT_BUNDLE, Bundle, load_bundle
from echostream.errors import EchoStreamError
from echostream.evaluation.simul import register
from echostream.streaming.events import SentenceEnd, SourceText, TargetText, TargetUnits, Waveform
from echostream.streaming.policy import make_policy
from echostream.streaming.session import StreamingSession
from echostream.text import WORD_START

register()

KNOBS = {
    "lagging_k1": "target CTC subwords that the text stays behind",
    "stride_n1": "source and target CTC subwords from one writing of text to the next",
    "lagging_k2": "subwords that the speech stays behind the text",
    "stride_n2": "subwords from one writing of speech to the next",
}
CHUNK_MS = 320
SEGMENT_MS = 40  # SimulEval's own default hands out single milliseconds


class SessionStates(AgentStates):
    """A stream's memory: its session, and of the source only what was pushed last."""

    def __init__(self, bundle: Bundle, options: dict) -> None:
        self.session = StreamingSession(bundle, **options)
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.session.reset()
        self.pushed = np.zeros(0, dtype=np.float32)
        self.unsaid: list[str] = []  # the current sentence's subwords that have no sound yet
        self.said = 0  # how many of its subwords have one
        self.heard: dict[int, str] = {}  # source text of each sentence

    def update_source(self, segment: Segment) -> None:
        self.source_finished = segment.finished
        self.tgt_lang = segment.tgt_lang if isinstance(segment.tgt_lang, str) else None
        self.pushed = np.asarray(segment.content, dtype=np.float32)
        if self.pushed.ndim == 2:  # [N, channels], from a loader that does not average
            self.pushed = self.pushed.mean(axis=1)
        self.source_sample_rate = getattr(segment, "sample_rate", self.source_sample_rate)

    def say(self, count: int | None) -> list[str]:
        """The subwords that now have a sound: up to ``count`` of the sentence, or all. A space starts a word."""
        now = len(self.unsaid) if count is None else max(0, count - self.said)
        pieces, self.unsaid = self.unsaid[:now], self.unsaid[now:]
        self.said += len(pieces)
        return pieces

    def update_target(self, segment: Segment) -> None:
        self.target_finished = segment.finished


@entrypoint
class EchoStreamAgent(SpeechToSpeechAgent):
    """Speech in, speech out; the text of each piece of speech rides in the segment's ``config``."""

    def __init__(self, args: Namespace) -> None:
        if args.threads < 1:
            raise EchoStreamError(f"--threads is {args.threads}; it must be at least 1")
        torch.set_num_threads(args.threads)
        self.bundle = load_bundle(args.checkpoint_dir, args.device)
        if self.bundle.vocoder is None:
            raise EchoStreamError(f"checkpoint directory {args.checkpoint_dir} has no vocoder; this agent speaks")
        asked = {name: getattr(args, name) for name in (*KNOBS, "chunk_ms", "segmenter")}
        chosen = {**self.bundle.policy, **{name: value for name, value in asked.items() if value is not None}}
        policy = make_policy("ctc", **{knob: chosen[knob] for knob in KNOBS if knob in chosen})
        self.options = {
            "policy": policy,
            "chunk_ms": chosen.get("chunk_ms", CHUNK_MS),
            "segmenter": chosen.get("segmenter", "punctuation"),
        }
        super().__init__(args)

    def build_states(self) -> SessionStates:
        return SessionStates(self.bundle, self.options)

    def policy(self, states: SessionStates | None = None) -> Action:
        """Hand the session what was pushed, and on what it says. The one call that sees the end flushes it all."""
        states = self.states if states is None else states
        events = []
        try:
            if len(states.pushed):
                events += states.session.push(states.pushed, states.source_sample_rate)
                states.pushed = np.zeros(0, dtype=np.float32)
            if states.source_finished:
                events += states.session.finish()
        except EchoStreamError as error:
            sys.exit(f"error: {error}")
        pieces, samples, rate = [], [], 0
        for event in events:
            if isinstance(event, TargetText):
                states.unsaid += [self.bundle.target_dict[token].replace(WORD_START, " ") for token in event.tokens]
            elif isinstance(event, TargetUnits):
                # Read from MT states, the speech may stay some subwords behind the text.
                pieces += states.say(event.inputs if self.bundle.config.unit_decoder_input == "mt" else None)
            elif isinstance(event, Waveform):
                samples.append(event.samples)
                rate = event.sample_rate
            elif isinstance(event, SourceText):
                states.heard[event.sentence] = event.text
            elif isinstance(event, SentenceEnd):
                states.heard[event.sentence] = event.source_text
                pieces += [*states.say(None), " "]
                states.said = 0
        config = {"pieces": pieces, "source_text": " ".join(text for text in states.heard.values() if text)}
        if samples and sum(map(len, samples)):
            # tgt_lang must be said: SimulEval's default for it is no value that JSON knows.
            segment: Segment = SpeechSegment(
                content=np.concatenate(samples),
                sample_rate=rate,
                finished=states.source_finished,
                tgt_lang=states.tgt_lang,
                config=config,
            )
        elif pieces or states.source_finished:
            segment = EmptySegment(finished=states.source_finished, config=config)
        else:
            return ReadAction()
        states.update_target(segment)
        return WriteAction(segment, finished=segment.finished)

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--checkpoint-dir", type=Path, default=DEFAULT_BUNDLE, help="made by scripts/export_checkpoint.py"
        )
        for knob, text in KNOBS.items():
            parser.add_argument(f"--{knob.replace('_', '-')}", type=int, help=f"{text} (default: the checkpoint's)")
        parser.add_argument(
            "--chunk-ms", type=int, help=f"source audio from one decision to the next (default: {CHUNK_MS})"
        )
        parser.add_argument(
            "--segmenter",
            choices=("punctuation", "none"),
            help="where sentences end: at the model's punctuation (default), or with the recording only",
        )
        # Steps this small leave a second thread nothing but waiting; on a busy machine two were 20 times slower.
        parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model (default: 1)")
        parser.set_defaults(source_segment_size=SEGMENT_MS)

    @classmethod
    def from_args(cls, args: Namespace) -> EchoStreamAgent:
        try:
            return cls(args)
        except EchoStreamError as error:
            sys.exit(f"error: {error}")

    def to(self, device: str, *args: object, fp16: bool = False, **kwargs: object) -> None:
        """The model was loaded onto ``--device``; here only its precision may change."""
        self.device = device
        if fp16:
            self.bundle.model.half()
            self.states = self.build_states()
