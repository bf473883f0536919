"""EchoStream as an agent of other tools: SimulEval's (``echostream.agent.EchoStreamTextAgent`` ...) and simulstream's.

Each tool is imported only when its own names are asked for.
"""

from __future__ import annotations

from typing import Any

AGENTS = (
    "EchoStreamAgent", "EchoStreamSpeechAgent", "EchoStreamTextAgent", "EchoStreamSourceAgent", "EchoStreamBothAgent",
)  # fmt: skip
__all__ = list(AGENTS)


def __getattr__(name: str) -> Any:
    if name not in AGENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from echostream.agent import simuleval

    return getattr(simuleval, name)
