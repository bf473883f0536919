"""OpenAI's realtime translation dialect, ``/v1/realtime/translations``, and our extensions of it.

A client sends ``session.update``, ``session.input_audio_buffer.append`` (base64 of PCM16, mono, 24 kHz) and
``session.close``; it gets ``session.created`` and ``session.updated``, deltas of both transcripts and of the translated
speech, ``error`` and ``session.closed``. Whatever the model cannot do is an ``error``, and the session goes on.

A client that connects with ``?echostream=1`` gets more, and can come back (docs/server.md has the whole of it):

- numbered events carry ``sequence`` and ``sentence``; ``echostream.sentence`` sums a sentence up;
- ``echostream.progress`` says how many samples have come in, and how many of them need never be sent again;
- it sends ``echostream.ack`` with the number of the last event that it has;
- ``session.update`` may hold ``session.echostream``: ``input_rate``, ``output_rate``, ``policy``, knobs, ``speech``;
- ``?session=ID&samples=N&last_event=M`` takes up a session whose connection broke.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from starlette.websockets import WebSocket

from echostream.audio.resample import Resampler, ResampleState
from echostream.audio.stream import to_pcm
from echostream.errors import ConfigError, SessionError
from echostream.loading import shown
from echostream.serve.connection import Connection, Invalid, same_language
from echostream.serve.hub import Hub
from echostream.serve.rows import STREAM_OPTIONS
from echostream.serve.session import Session
from echostream.streaming.events import Event, SentenceEnd, SourceText, TargetText, Waveform

RATE = 24_000  # of the dialect's sound, both ways
LEAST_RATE, MOST_RATE = 8_000, 192_000  # that an extended client may choose


class RealtimeRenderer:
    """A stream's events as server events of the dialect.

    Args:
        extended: the client knows our extensions.
    """

    def __init__(self, extended: bool):
        self.extended, self.transcript, self.rate = extended, False, RATE
        self._source = ""  # of the sentence in the making
        self._begun = [False, False]  # has anything been written before: source, target
        self._resampler: Resampler | None = None
        self._resample: ResampleState | None = None

    def render(self, event: Event) -> list[dict[str, Any] | None]:
        """See ``session.Renderer``."""
        if isinstance(event, SourceText):
            delta, self._source = _added(self._source, event.text), "" if event.final else event.text
            if not delta:
                return []
            if self._begun[0] and not event.text[: -len(delta)]:
                delta = " " + delta  # between two sentences
            self._begun[0] = True
            return [self._delta("session.input_transcript.delta", delta, event) if self.transcript else None]
        if isinstance(event, TargetText):
            if not event.text:
                return []
            first = event.sentence_text == event.text
            delta = " " + event.text.lstrip() if first and self._begun[1] else event.text
            self._begun[1] = True
            return [self._delta("session.output_transcript.delta", delta, event)]
        if isinstance(event, Waveform):
            return self._sound(event.samples, event.sample_rate, event, finished=False)
        if isinstance(event, SentenceEnd):
            rest = self._sound(event.waveform[:0], event.sample_rate, event, finished=True)
            return [*rest, self._sentence(event) if self.extended else None]
        return []

    def _delta(self, kind: str, delta: str, event: Event, **more: Any) -> dict[str, Any]:
        message = {"type": kind, "delta": delta, "elapsed_ms": round(event.source_time_s * 1000), **more}
        return {**message, "sentence": event.sentence} if self.extended else message

    def _sound(self, samples: np.ndarray, rate: int, event: Event, finished: bool) -> list[dict[str, Any] | None]:
        if self._resampler is None or self._resample is None:
            if finished:
                return []
            self._resampler = Resampler(rate, self.rate)
            self._resample = self._resampler.init_state()
        samples, self._resample = self._resampler.step(samples, self._resample, finished)
        if finished:
            self._resample = None
        if not len(samples):
            return []
        coded = base64.b64encode(to_pcm(samples)).decode("ascii")
        kind = "session.output_audio.delta"
        return [self._delta(kind, coded, event, format="pcm16", sample_rate=self.rate, channels=1)]

    @staticmethod
    def _sentence(event: SentenceEnd) -> dict[str, Any]:
        lag = {f"{name[:-2]}_ms": _ms(seconds) for name, seconds in asdict(event.lag).items()}
        return {
            "type": "echostream.sentence", "sentence": event.sentence, "source_text": event.source_text,
            "text": event.text, "reason": event.reason, "start_ms": _ms(event.start_s), "end_ms": _ms(event.end_s),
            "first_heard_ms": _ms(event.first_heard_s), "last_heard_ms": _ms(event.last_heard_s), "lag": lag,
            "elapsed_ms": _ms(event.source_time_s), "samples": len(event.waveform), "sample_rate": event.sample_rate,
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """See ``session.Renderer``."""
        state: dict[str, Any] = {
            "transcript": self.transcript, "rate": self.rate, "source": self._source, "begun": list(self._begun),
        }  # fmt: skip
        if self._resampler is not None and self._resample is not None:
            held = base64.b64encode(self._resample.samples.tobytes()).decode("ascii")
            state["resample"] = [self._resampler.source_rate, held, self._resample.count, self._resample.phase]
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``session.Renderer``."""
        self.transcript, self.rate = bool(state["transcript"]), int(state["rate"])
        self._source, self._begun = str(state["source"]), [bool(x) for x in state["begun"]]
        if "resample" in state:
            rate, held, count, phase = state["resample"]
            self._resampler = Resampler(rate, self.rate)
            samples = np.frombuffer(base64.b64decode(held), dtype=np.float32).copy()
            self._resample = ResampleState(samples, int(count), int(phase))


class RealtimeConnection(Connection):
    """One WebSocket of the dialect.

    Args:
        extended: the client knows our extensions.
        languages: source and target.
    """

    def __init__(self, websocket: WebSocket, hub: Hub, session: Session, extended: bool, languages: tuple[str, str]):
        super().__init__(websocket, hub, session)
        self.extended, self.languages = extended, languages
        self._counted = 0
        self._told = (-1, -1)

    async def run(self) -> None:
        self.control({"type": "session.created", "session": self.described()})
        await super().run()

    def control(self, message: dict[str, Any]) -> None:
        super().control({"event_id": f"event_c{self._counted}", **message})
        self._counted += 1

    def error(self, problem: Invalid) -> None:
        kind = "server_error" if problem.code == "server_error" else "invalid_request_error"
        error = {"type": kind, "code": problem.code, "message": problem.message, "param": problem.param}
        self.control({"type": "error", "error": {**error, "event_id": problem.event_id}})

    def ended(self) -> None:
        self.control({"type": "session.closed"})
        if not self.extended:  # the others confirm what they have got, and close
            self.close(1000)

    def progress(self) -> None:
        """Tell the client what it need not keep."""
        session = self.session
        safe = session.safe if self.hub.state_dir is not None else session.received
        if self.extended and (session.received, safe) != self._told:
            self._told = (session.received, safe)
            self.control({"type": "echostream.progress", "received_samples": session.received, "safe_samples": safe})

    async def take(self, message: Mapping[str, Any]) -> None:
        """See ``Connection``."""
        event = _parse(message)
        try:
            await self._take(event)
        except Invalid as problem:
            name = event.get("event_id")
            problem.event_id = name if isinstance(name, str) else None
            raise

    async def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind == "session.input_audio_buffer.append":
            await self._append(event)
        elif kind == "session.update":
            await self._update(event.get("session"))
        elif kind == "session.close":
            self.session.end()
        elif kind == "echostream.ack" and self.extended:
            number = event.get("sequence")
            if isinstance(number, bool) or not isinstance(number, int):
                raise Invalid("sequence is no number", "invalid_value", "sequence")
            self.session.confirm(number)
        else:
            raise Invalid(f"unknown event type {shown(kind)}", "unknown_event", "type")

    async def _append(self, event: dict[str, Any]) -> None:
        try:
            sound = base64.b64decode(event.get("audio", ""), validate=True)
        except (binascii.Error, ValueError, TypeError):
            raise Invalid("audio is no base64", "invalid_audio", "audio") from None
        if len(sound) % 2:
            raise Invalid("audio holds half a sample; send whole PCM16 samples", "invalid_audio", "audio")
        session = self.session
        if session.finished or (session.stream is not None and session.stream.ended):
            raise Invalid("the session has been closed", "session_closed")
        session.feed(np.frombuffer(sound, dtype="<i2"))
        if self.extended and session.received - self._told[0] >= session.rate:
            self.progress()
        await session.room()

    async def _update(self, asked: Any) -> None:
        asked = _section(asked, "session", ("audio", "echostream", "type", "model"))
        audio = _section(asked.get("audio"), "session.audio", ("input", "output"))
        into = _section(audio.get("input"), "session.audio.input", ("transcription", "noise_reduction", "format"))
        out = _section(audio.get("output"), "session.audio.output", ("language", "format"))
        language = out.get("language")
        if language is not None and not same_language(language, self.languages[1]):
            raise Invalid(
                f"language {shown(language)} is not spoken here; the model speaks {self.languages[1]}",
                "unsupported_language", "session.audio.output.language",
            )  # fmt: skip
        if into.get("noise_reduction") is not None:
            raise Invalid("noise is not reduced here", "unsupported_parameter", "session.audio.input.noise_reduction")
        for name, section in (("input", into), ("output", out)):
            if section.get("format") not in (None, "pcm16"):
                raise Invalid("sound is pcm16 here", "unsupported_parameter", f"session.audio.{name}.format")
        if "echostream" in asked:
            if not self.extended:
                raise Invalid("connect with ?echostream=1", "unknown_parameter", "session.echostream")
            await self._extend(asked["echostream"])
        if "transcription" in into:
            renderer: Any = self.session.renderer
            renderer.transcript = into["transcription"] is not None
        await self.hub.remember(self.session)
        self.control({"type": "session.updated", "session": self.described()})

    async def _extend(self, asked: Any) -> None:
        """Our own settings, which are the stream's from its beginning."""
        where = "session.echostream"
        asked = _section(asked, where, ("input_rate", "output_rate", *STREAM_OPTIONS))
        session = self.session
        if session.received or session.stream is None:
            raise Invalid("these are settled before the first sound", "too_late", where)
        renderer: Any = session.renderer
        rates = {"input_rate": session.rate, "output_rate": renderer.rate}
        for name in rates:
            rate = asked.get(name, rates[name])
            if isinstance(rate, bool) or not isinstance(rate, int) or not LEAST_RATE <= rate <= MOST_RATE:
                problem = f"{name} is {shown(rate)}, not {LEAST_RATE} to {MOST_RATE} Hz"
                raise Invalid(problem, "invalid_value", f"{where}.{name}")
            rates[name] = rate
        options = {name: asked[name] for name in STREAM_OPTIONS if asked.get(name) is not None}
        try:
            await self.hub.reopen(session, rates["input_rate"], **options)
        except (ConfigError, SessionError) as error:
            raise Invalid(str(error), "invalid_value", where) from None
        renderer.rate = rates["output_rate"]

    def described(self) -> dict[str, Any]:
        """The session as the dialect describes it."""
        session, renderer = self.session, self.session.renderer
        source, target = self.languages
        transcript = getattr(renderer, "transcript", False)
        described: dict[str, Any] = {
            "id": session.id, "type": "translation", "model": f"echostream-{source}-{target}",
            "expires_at": session.expires_at,
            "audio": {
                "input": {"transcription": {"model": "echostream"} if transcript else None, "noise_reduction": None},
                "output": {"language": target},
            },
        }  # fmt: skip
        if self.extended:
            described["echostream"] = {
                "input_rate": session.rate, "output_rate": getattr(renderer, "rate", RATE), **session.options,
                "received_samples": session.received, "resume_s": self.hub.limits.resume_s,
                "chunk_ms": self.hub.engine.chunk_ms, "source_language": source,
            }  # fmt: skip
        return described


def _parse(message: Mapping[str, Any]) -> dict[str, Any]:
    text = message.get("text")
    if text is None:
        raise Invalid("send JSON as text", "invalid_json")
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        raise Invalid("this is no JSON", "invalid_json") from None
    if not isinstance(event, dict):
        raise Invalid("an event is a JSON object", "invalid_json")
    return event


def _section(value: Any, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Invalid(f"{where} is no object", "invalid_value", where)
    for name in value:
        if name not in known:
            problem = f"{where} has no {shown(name)}; known: {', '.join(known)}"
            raise Invalid(problem, "unknown_parameter", f"{where}.{name}")
    return value


def _added(before: str, now: str) -> str:
    """What ``now`` says more than ``before``, which it begins with (but for spaces at its end)."""
    return now[len(before) :] if now.startswith(before) else now[len(before.rstrip()) :]


def _ms(seconds: float) -> int | None:
    return round(seconds * 1000) if math.isfinite(seconds) else None
