"""The WebSocket protocol of the package simulstream (1.0), so that its clients and its page work unchanged.

A client sends a JSON object (``sample_rate``, ``source_lang``, ``target_lang``, ``metrics_metadata``, all of them
optional), then sound as binary int16, then ``{"end_of_stream": true}``; it gets ``{"new": ..., "deleted": ""}`` for
every piece of translation, for nothing is ever taken back, and ``{"end_of_processing": true}``. It may go on with the
next recording. There is no speech in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.websockets import WebSocket

from echostream.audio.resample import check_rate
from echostream.constants import SAMPLE_RATE
from echostream.errors import AudioError
from echostream.loading import shown
from echostream.serve.connection import POLICY, Connection, Invalid, same_language
from echostream.serve.hub import Hub
from echostream.serve.session import Refused, Session
from echostream.streaming.events import Event, TargetText


class SimulstreamRenderer:
    """A stream's events as the protocol's messages."""

    def __init__(self) -> None:
        self._begun = False

    def render(self, event: Event) -> list[dict[str, Any] | None]:
        """See ``session.Renderer``."""
        if not isinstance(event, TargetText) or not event.text:
            return []
        between = " " if self._begun and event.sentence_text == event.text else ""
        self._begun = True
        return [{"new": between + event.text, "deleted": ""}]

    def state(self) -> dict[str, Any]:
        """See ``session.Renderer``; sessions of this protocol are never archived."""
        return {"begun": self._begun}

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``session.Renderer``."""
        self._begun = bool(state["begun"])


async def open_session(hub: Hub, host: str) -> Session:
    """A session that writes text only.

    Raises:
        Refused: there is no place.
    """
    return await hub.open(host, SAMPLE_RATE, SimulstreamRenderer(), keep=False, speech=False)


class SimulstreamConnection(Connection):
    """One WebSocket, and one session after the other."""

    def __init__(self, websocket: WebSocket, hub: Hub, session: Session, languages: tuple[str, str]):
        super().__init__(websocket, hub, session)
        self.languages = languages

    def error(self, problem: Invalid) -> None:
        """The protocol has no errors; ours end the connection, with the reason as text before."""
        self.control({"error": problem.message})
        self.close(POLICY)

    def ended(self) -> None:
        self.control({"end_of_processing": True})

    async def take(self, message: Mapping[str, Any]) -> None:
        """See ``Connection``."""
        sound = message.get("bytes")
        if sound is not None:
            await self._hear(sound)
            return
        try:
            header = json.loads(message.get("text") or "")
        except (ValueError, RecursionError):
            raise Invalid("this is no JSON", "invalid_json") from None
        if not isinstance(header, dict):
            raise Invalid("a header is a JSON object", "invalid_json")
        if "end_of_stream" in header:
            await self._fresh()
            self.session.end()
        else:
            await self._begin(header)

    async def _hear(self, sound: bytes) -> None:
        if len(sound) % 2:
            raise Invalid("a message holds half a sample; send whole int16 samples", "invalid_audio")
        await self._fresh()
        if self.session.stream is not None and self.session.stream.ended:
            raise Invalid("sound behind end_of_stream, before end_of_processing", "session_closed")
        self.session.feed(np.frombuffer(sound, dtype="<i2"))
        await self.session.room()

    async def _begin(self, header: dict[str, Any]) -> None:
        for name, ours in zip(("source_lang", "target_lang"), self.languages):
            if header.get(name) and not same_language(header[name], ours):
                problem = f"{name} {shown(header[name])} is not what the model knows: {ours}"
                raise Invalid(problem, "unsupported_language")
        if "sample_rate" in header:
            try:
                check_rate(header["sample_rate"])
            except AudioError as error:
                raise Invalid(str(error), "invalid_value") from None
            await self._fresh()
            if self.session.received:
                raise Invalid("the sample rate is settled before the first sound", "too_late")
            if self.session.rate != header["sample_rate"]:
                await self.hub.reopen(self.session, int(header["sample_rate"]), **self.session.options)

    async def _fresh(self) -> None:
        """Behind ``end_of_processing`` the next recording is a new session."""
        if not self.session.finished:
            return
        self.session.connection = None
        self.hub.drop(self.session, "it is complete")
        try:
            session = await open_session(self.hub, self.session.host)
        except Refused as refused:
            raise Invalid(refused.message, "busy") from None
        session.connection, self.session, self._told_end = self, session, False
