"""Policies by their names.

| name | waits for | paper |
|---|---|---|
| ``ctc`` | new subwords of both CTC heads | StreamSpeech, Zhang et al., 2024 |
| ``wait-k`` | k source units more than were written | Ma et al., 2019; with strides Zeng et al., 2021 |
| ``local-agreement`` | the same words from n looks in a row | Liu et al., 2020 |
| ``alignatt`` | attention to leave the newest frames | Papi et al., 2023 |
| ``sentence`` | the sentence's end | (the reference) |
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from echostream.errors import ConfigError
from echostream.streaming.policies.base import Policy
from echostream.streaming.policies.counting import CTCCountPolicy, WaitForSentenceEnd, WaitKPolicy
from echostream.streaming.policies.hypotheses import AlignAttPolicy, LocalAgreementPolicy

POLICIES: dict[str, type] = {
    "ctc": CTCCountPolicy,
    "wait-k": WaitKPolicy,
    "local-agreement": LocalAgreementPolicy,
    "alignatt": AlignAttPolicy,
    "sentence": WaitForSentenceEnd,
}


def knobs_of(name: str) -> list[str]:
    """The knobs of a policy.

    Raises:
        ConfigError: there is no policy of that name.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    return [f.name for f in fields(POLICIES[name])]


def make_policy(name: str = "ctc", **knobs: Any) -> Policy:
    """A policy by its name (see ``POLICIES``); knobs it does not have are refused.

    Raises:
        ConfigError: unknown name or knob, or a value out of range.
    """
    known = knobs_of(name)
    for knob in knobs:
        if knob not in known:
            raise ConfigError(f"policy {name!r} has no knob {knob!r}; it has: {', '.join(known) or 'none'}")
    policy: Policy = POLICIES[name](**knobs)
    return policy
