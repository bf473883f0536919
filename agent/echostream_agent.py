"""``simuleval --agent agent/echostream_agent.py``; the agents are those of ``echostream.agent``, see there."""

from __future__ import annotations

from simuleval.utils import entrypoint
from simuleval.utils.agent import get_agent_class_from_string
from simuleval.utils.arguments import check_argument

from echostream.agent.simuleval import (
    EchoStreamAgent,
    EchoStreamBothAgent,
    EchoStreamSourceAgent,
    EchoStreamSpeechAgent,
    EchoStreamTextAgent,
    SessionAgent,
    check_languages,
)

if __name__ == "agents":  # so SimulEval calls --agent's file; it takes the class that the file announces, whatever
    # --agent-class says. Imported by another name, this file is where --agent-class looks, and announces nothing.
    chosen = check_argument("agent_class")
    entrypoint(get_agent_class_from_string(chosen) if chosen else EchoStreamAgent)

__all__ = [
    "EchoStreamAgent", "EchoStreamBothAgent", "EchoStreamSourceAgent", "EchoStreamSpeechAgent", "EchoStreamTextAgent",
    "SessionAgent", "check_languages",
]  # fmt: skip
