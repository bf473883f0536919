"""SimulEval's agents, a thin shell over the streaming session: speech in; speech, text, both, or a transcript out.

simuleval --agent-class echostream.agent.EchoStreamAgent --source wavs.txt --target references.txt --output out \
    --checkpoint-dir echostream/assets/es-en --policy ctc --chunk-ms 320 --quality-metrics BLEU ASR_BLEU \
    --latency-metrics StartOffset EndOffset AL LAAL --computation-aware

What comes out is chosen by ``--output-type``, or by the class, one for each of them: ``EchoStreamTextAgent`` ...
In a checkout ``--agent agent/echostream_agent.py`` is the same.

With ``--output-type both`` the text's own latencies are AL_TEXT, LAAL_TEXT and StartOffset_TEXT; SimulEval reads the
names of metrics before it loads an agent, and knows these only with ``--user-dir agent`` or as
``python -m echostream.agent``. To score a finished run again, the same:
python -m echostream.agent --score-only --output out --quality-metrics BLEU ...
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
from simuleval.agents import GenericAgent
from simuleval.agents.actions import Action, ReadAction, WriteAction
from simuleval.agents.states import AgentStates
from simuleval.data.segments import EmptySegment, Segment, TextSegment

from echostream.agent.pieces import OUTPUTS, Pieces
from echostream.checkpoint import BACKENDS, DEFAULT_BUNDLE, Bundle, load_bundle, use_threads
from echostream.errors import EchoStreamError
from echostream.evaluation.simul import register
from echostream.evaluation.simul_instances import SpeechPiece
from echostream.evaluation.simul_quality import add_recogniser_arguments
from echostream.streaming.events import Event, Waveform
from echostream.streaming.exported.model import ExportedModel
from echostream.streaming.options import add_policy_arguments, add_segmenter_arguments, session_options
from echostream.streaming.session import StreamingSession
from echostream.text_file import read_lines

register()

SEGMENT_MS = 40  # SimulEval's own default hands out single milliseconds


def check_languages(path: str | None, bundle: Bundle) -> None:
    """SimulEval's ``--tgt-lang`` asks for a language for each recording; a model here has one."""
    own = bundle.target_lang.partition("-")[0]
    for number, line in enumerate(read_lines(path, EchoStreamError, "list") if path else (), 1):
        asked = line.strip()
        if own and asked and asked.partition("-")[0] != own:
            raise EchoStreamError(f"list {path}, line {number} asks for {asked!r}; this model speaks {own!r} only")


class SessionStates(AgentStates):
    """A stream's memory: its session, and of the source only what was pushed last."""

    source_sample_rate: int

    def __init__(self, bundle: Bundle, output: str, options: dict[str, Any]) -> None:
        self.bundle, self.output = bundle, output
        self.session = StreamingSession(bundle, **OUTPUTS[output], **options)
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.session.reset()
        self.pushed = np.zeros(0, dtype=np.float32)
        self.pieces = Pieces(self.bundle, self.output)

    def update_source(self, segment: Segment) -> None:
        self.source_finished = segment.finished
        self.tgt_lang = segment.tgt_lang if isinstance(segment.tgt_lang, str) else None
        self.pushed = np.asarray(segment.content, dtype=np.float32)
        if self.pushed.ndim == 2:  # [N, channels], from a loader that does not average
            self.pushed = self.pushed.mean(axis=1)
        self.source_sample_rate = getattr(segment, "sample_rate", self.source_sample_rate)

    def update_target(self, segment: Segment) -> None:
        self.target_finished = segment.finished

    def events(self) -> list[Event]:
        """Hand the session what was pushed. The one call that sees the source's end flushes it all."""
        events = []
        if len(self.pushed):
            events += self.session.push(self.pushed, self.source_sample_rate)
            self.pushed = np.zeros(0, dtype=np.float32)
        if self.source_finished:
            events += self.session.finish()
        return events


class SessionAgent(GenericAgent):
    """What all agents share; ``output`` is one of ``OUTPUTS``."""

    source_type = "speech"
    output = ""

    def __init__(self, args: Namespace) -> None:
        if args.threads < 1:
            raise EchoStreamError(f"--threads is {args.threads}; it must be at least 1")
        self.output = self.output or args.output_type
        self.target_type = "speech" if OUTPUTS[self.output]["speech"] else "text"
        for side in ("source", "target"):
            asked, given = getattr(args, f"{side}_type", None), getattr(self, f"{side}_type")
            if asked not in (None, given):
                raise EchoStreamError(
                    f"--{side}-type {asked}, but this agent's is {given}; what comes out is chosen by --output-type"
                )
        self.bundle = load_bundle(args.checkpoint_dir, args.device, args.backend, args.threads)
        use_threads(self.bundle, args.threads)
        if self.bundle.vocoder is None and self.target_type == "speech":
            raise EchoStreamError(
                f"checkpoint directory {args.checkpoint_dir} has no vocoder, so that it cannot speak; "
                "take --output-type text or source"
            )
        check_languages(getattr(args, "tgt_lang", None), self.bundle)
        self.options = session_options(args, self.bundle)
        super().__init__(args)

    def build_states(self) -> SessionStates:
        return SessionStates(self.bundle, self.output, self.options)

    def policy(self, states: SessionStates | None = None) -> Action:
        """Text rides in the segment's ``config``: ``pieces`` of what this segment says, ``written`` ahead of it."""
        states = self.states if states is None else states
        try:
            events = states.events()
        except EchoStreamError as error:
            sys.exit(f"error: {error}")
        if not events and not states.source_finished:
            return ReadAction()
        pieces, written = states.pieces.take(events)
        config = {"pieces": pieces, "source_text": states.pieces.source_text}
        if self.output == "both":
            config["written"] = written
        # tgt_lang must be said: SimulEval's default for it is no value that JSON knows.
        common = dict(finished=states.source_finished, tgt_lang=states.tgt_lang, config=config)
        waves = [event for event in events if isinstance(event, Waveform)]
        if waves:
            samples = np.concatenate([wave.samples for wave in waves])
            segment: Segment = SpeechPiece(content=samples, sample_rate=waves[-1].sample_rate, **common)
        elif self.target_type == "text" and (pieces or states.source_finished):
            segment = TextSegment(content="".join(pieces), **common)
        elif pieces or written or states.source_finished:
            segment = EmptySegment(**common)
        else:
            return ReadAction()
        states.update_target(segment)
        return WriteAction(segment, finished=segment.finished)

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--checkpoint-dir", type=Path, default=DEFAULT_BUNDLE, help="made by echostream export-checkpoint"
        )
        if not cls.output:
            parser.add_argument(
                "--output-type",
                choices=tuple(OUTPUTS),
                default="speech",
                help="translated speech (default), text, the source's own text, or speech and text, each timed",
            )
        parser.add_argument(
            "--backend", choices=BACKENDS, help="refuse a checkpoint of the other kind (default: whichever it is for)"
        )
        add_policy_arguments(parser)
        add_segmenter_arguments(parser)
        # Steps this small leave a second thread nothing but waiting; on a busy machine two were 20 times slower.
        parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model (default: 1)")
        add_recogniser_arguments(parser)  # SimulEval, without --user-dir, knows only its own scorers' options
        parser.set_defaults(source_segment_size=SEGMENT_MS)

    @classmethod
    def from_args(cls, args: Namespace) -> SessionAgent:
        try:
            return cls(args)
        except EchoStreamError as error:
            sys.exit(f"error: {error}")

    def to(self, device: str, *args: object, fp16: bool = False, **kwargs: object) -> None:
        """The model was loaded onto ``--device``; here only its precision may change."""
        self.device = device
        if fp16:
            if isinstance(self.bundle.model, ExportedModel):
                sys.exit("error: --fp16 is for torch; exported graphs keep the precision they were exported in")
            self.bundle.model.half()
            self.states = self.build_states()


class EchoStreamAgent(SessionAgent):
    """Speech to whatever ``--output-type`` says: speech, if it says nothing."""


class EchoStreamSpeechAgent(SessionAgent):
    """Speech to speech."""

    output = "speech"


class EchoStreamTextAgent(SessionAgent):
    """Speech to text."""

    output = "text"


class EchoStreamSourceAgent(SessionAgent):
    """Streaming speech recognition: speech to its own text."""

    output = "source"


class EchoStreamBothAgent(SessionAgent):
    """Speech to speech and to text, each with its own latency."""

    output = "both"
