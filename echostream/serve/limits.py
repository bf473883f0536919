"""What clients may do, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields

from echostream.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. Times are in seconds of the wall clock unless said otherwise.

    Attributes:
        sessions: streams at once; one more is refused.
        client_sessions: of them, by one address; 0: as many as there are.
        message_bytes: of one WebSocket message.
        idle_s: without any message, after which a client is gone.
        session_s: that a session may last.
        speed: times real time that sound is taken in at; faster senders are held back, never refused.
        burst_s: sound that is taken in at once before that.
        pending_s: sound that waits for the model before reading stops.
        unsent_bytes, unsent_s: what a client may leave unread, and for how long, before it is cut off.
        kept_bytes: events that wait for a client which is to come back; with more, its session ends.
        garbage: messages in a row that make no sense before a client is cut off.
        resume_s: that a session waits for its client to come back.
        drain_s: that running sessions get to end when the server is asked to.
    """

    sessions: int = 8
    client_sessions: int = 0
    message_bytes: int = 1 << 20
    idle_s: float = 60.0
    session_s: float = 86_400.0
    speed: float = 2.0
    burst_s: float = 2.0
    pending_s: float = 2.0
    unsent_bytes: int = 4 << 20
    unsent_s: float = 20.0
    kept_bytes: int = 32 << 20
    garbage: int = 20
    resume_s: float = 60.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if field.name in ("sessions", "message_bytes", "speed") else 0
            if not value >= least:
                raise ConfigError(f"{field.name} is {value}; it must be at least {least}")
