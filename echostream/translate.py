"""``echostream translate``: one source through one session into its outputs."""

from __future__ import annotations

import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from echostream.audio.io import check_finite
from echostream.audio.stream import AudioSource, open_file, open_pipe
from echostream.checkpoint import load_bundle, use_threads
from echostream.errors import AudioError, AudioWarning, CheckpointError, ConfigError, EchoStreamError
from echostream.files import complain, keep_apart
from echostream.output.speech import SpeechFile, SpeechPipe
from echostream.output.subtitles import SubtitleFile
from echostream.output.terminal import LiveText, clock
from echostream.streaming.events import Event, SentenceEnd
from echostream.streaming.options import session_options
from echostream.streaming.session import StreamingSession

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle
    from echostream.output.picture import TimelinePicture


def translate(args: Namespace) -> int:
    """Translate ``args.input`` as the options of ``echostream.cli`` say.

    Returns:
        0, or 130 if the source was ended by Ctrl-C.

    Raises:
        EchoStreamError: something cannot be read, written or loaded; before anything was written, as far as possible.
    """
    with ExitStack() as stack:
        output = args.output
        if output is None and args.input == "-" and sys.stdout is not None and not sys.stdout.isatty():
            output = "-"
        if output == "-" and sys.stdout is None:
            raise EchoStreamError("standard output is closed; name a file")
        if output == "-" and sys.stdout.isatty():
            raise EchoStreamError("standard output is a terminal; pipe the speech on (| aplay) or name a file")
        check_apart(args, output)
        source = open_source(args)
        stack.callback(source.close)
        if args.threads < 1:
            raise ConfigError(f"--threads is {args.threads}; it must be at least 1")
        bundle = load_bundle(args.checkpoint_dir, args.device, args.backend, args.threads)
        use_threads(bundle, args.threads)
        if output is not None and bundle.vocoder is None:
            raise CheckpointError(f"{args.checkpoint_dir} has no vocoder: it cannot speak, leave -o out")
        session = StreamingSession(
            bundle, speech=output is not None or args.timeline is not None, **session_options(args, bundle)
        )

        outputs: list[Any] = []

        def opened(made: Any) -> Any:
            stack.callback(made.close)  # whatever happens, what was written is complete
            outputs.append(made)
            return made

        if output is not None and bundle.vocoder is not None:
            opened(speech_output(args, output, bundle.vocoder.config.sampling_rate, source.wav))
        if args.subtitles is not None:
            opened(SubtitleFile(args.subtitles))
        picture = text = None
        if args.timeline is not None:
            picture = opened(timeline_output(args, bundle, source.rate))
        if not args.quiet:
            text = opened(LiveText(sys.stderr, bundle.source_lang, bundle.target_lang, source.seconds))
        stack.enter_context(warnings_as_lines(text))

        run = Run(session, outputs, text, picture, args.realtime and args.input != "-")
        with Interrupt() as interrupt:
            try:
                for samples in interrupt.guard(source.blocks):
                    run.hear(samples, source)
            except AudioError:  # of the source: what was heard before is translated all the same
                if not run.broken:
                    run.finish()
                raise
            if not run.heard and not interrupt.asked:
                raise AudioError(f"{source.name} holds no samples")
            run.finish()
        if text is not None:
            text.message(run.summary())
        return 130 if interrupt.asked else 0


class Run:
    """A session being fed."""

    def __init__(
        self,
        session: StreamingSession,
        outputs: list[Any],
        text: LiveText | None,
        picture: TimelinePicture | None,
        realtime: bool,
    ):
        self.session, self.outputs, self.text, self.picture, self.realtime = session, outputs, text, picture, realtime
        self.sentences = self.heard = 0
        self.broken = False  # an output is
        self.started = time.monotonic()

    def hear(self, samples: np.ndarray, source: AudioSource) -> None:
        check_finite(samples, source.name, self.heard)
        self.heard += len(samples)
        if self.picture is not None:
            self.picture.hear(samples)
        self._give_out(self.session.push(samples, source.rate))
        if self.realtime:
            time.sleep(max(0.0, self.started + self.session.source_time_s - time.monotonic()))

    def finish(self) -> None:
        self._give_out(self.session.finish())

    def _give_out(self, events: list[Event]) -> None:
        for event in events:
            self.sentences += isinstance(event, SentenceEnd)
            for output in self.outputs:
                try:
                    output.take(event)
                except EchoStreamError:
                    self.broken = True
                    raise
        if self.text is not None:
            self.text.show(self.session.source_time_s)

    def summary(self) -> str:
        heard, computed = self.session.source_time_s, self.session.elapsed_s
        share = f", {computed / heard:.2f} of real time" if heard else ""
        number = f"{self.sentences} sentence{'' if self.sentences == 1 else 's'}"
        return f"{number} in {clock(heard)} of speech; computed for {computed:.1f} s{share}"


class Interrupt:
    """Ctrl-C (SIGTERM, SIGHUP) as a wish: the first ends the source at the next piece, the second everything, at once.

    Computing is never torn apart, because a session does not survive that; waiting for the source is.
    """

    def __init__(self) -> None:
        self.asked = self.waiting = False

    def __enter__(self) -> Interrupt:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means it
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or self.waiting:
            raise KeyboardInterrupt

    def guard(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """``blocks`` until they end or an end is asked for."""
        while not self.asked:
            try:
                self.waiting = True
                samples = next(blocks, None)
            except KeyboardInterrupt:
                return
            finally:
                self.waiting = False
            if samples is None:
                return
            yield samples


@contextmanager
def warnings_as_lines(text: LiveText | None) -> Iterator[None]:
    """What a session warns of, as a line beside its text."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if text is not None:
            text.message(f"warning: {message}")
        else:
            complain(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", AudioWarning)
        before = warnings.showwarning
        warnings.showwarning = lambda message, category, *rest, **more: (
            show(message) if issubclass(category, AudioWarning) else before(message, category, *rest, **more)
        )
        yield


def check_apart(args: Namespace, output: str | None) -> None:
    """Refuse outputs that are inputs or each other.

    Raises:
        OutputError: naming both.
    """
    directory = args.checkpoint_dir
    inputs = {"the input": _number(sys.stdin) if args.input == "-" else args.input, "the model": directory}
    if directory is not None and Path(directory).is_dir():
        inputs |= {f"the model's {path.name}": path for path in Path(directory).iterdir()}
    for name in ("punctuation_model", "vad_model"):
        inputs[f"--{name.replace('_', '-')}"] = getattr(args, name, None)
    keep_apart(
        {
            "-o": _number(sys.stdout) if output == "-" else output,
            "--subtitles": args.subtitles,
            "--timeline": args.timeline,
        },
        inputs,
    )


def _number(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def open_source(args: Namespace) -> AudioSource:
    if args.input == "-":
        if sys.stdin is None:
            raise EchoStreamError("standard input is closed; pipe speech into it (arecord | …)")
        if sys.stdin.isatty():
            raise EchoStreamError("standard input is a terminal; pipe speech into it (arecord | …)")
        return open_pipe(sys.stdin.buffer, args.input_rate, args.input_channels, raw=getattr(args, "input_raw", False))
    return open_file(args.input, rate=args.input_rate, channels=args.input_channels)


def speech_output(args: Namespace, output: str, rate: int, wav: bool) -> SpeechFile | SpeechPipe:
    if output == "-":
        form = args.output_format or ("wav" if wav else "raw")
        return SpeechPipe(sys.stdout.buffer, rate, header=form == "wav")
    if args.output_format is not None:
        raise ConfigError(f"--output-format is for -o -; the suffix of {output} says its format")
    return SpeechFile(output, rate, gaps=not args.no_gaps)


def timeline_output(args: Namespace, bundle: Bundle, rate: int) -> TimelinePicture:
    from echostream.output.picture import TimelinePicture  # matplotlib's extra is asked for only here

    return TimelinePicture(
        args.timeline,
        rate,
        bundle.target_dict,
        speech=bundle.vocoder is not None,
        units_read_text=bundle.config.units_read_text,
        seconds=args.timeline_seconds,
    )
