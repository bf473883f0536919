"""How a stream is translated: what is asked for, else what the bundle says, else the classes' defaults.

The Python interface, the agent and the command line all ask ``resolve``, so that one bundle means the same to each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from echostream.constants import ENCODER_FRAME_MS
from echostream.errors import CheckpointError, ConfigError
from echostream.loading import shown
from echostream.rules import Rule, check
from echostream.streaming.policies.base import Policy
from echostream.streaming.policies.factory import POLICIES, knobs_of, make_policy
from echostream.streaming.segmenters.base import CombinedSegmenter, Segmenter
from echostream.streaming.segmenters.factory import CT_SIDES, SEGMENTERS, make_segmenter
from echostream.streaming.segmenters.pause import SpeechGate
from echostream.streaming.segmenters.silero import load_silero
from echostream.streaming.settings import Settings

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

SETTINGS = tuple(f.name for f in fields(Settings))
KNOBS = tuple(dict.fromkeys(knob for name in POLICIES for knob in knobs_of(name)))
# What a kind of segmenter may be told, and which kind that is.
SEGMENTER_KNOBS = {
    "punctuation_model": "ct", "punctuation_side": "ct", "vad_model": "pause", "min_pause_ms": "pause",
}  # fmt: skip
OPTIONS = ("policy", *KNOBS, "segmenter", *SEGMENTER_KNOBS, "speech_gate", "max_sentence_s", "settings", *SETTINGS)
# A bundle names no files but its own, so that a segmenter's models are not among what it may say.
_PREFERENCES = {
    "policy": Rule(str, choices=tuple(POLICIES)), "segmenter": Rule(str, 1, 64),
    "punctuation_side": Rule(str, choices=CT_SIDES), "min_pause_ms": Rule(int, 64, 60_000),
    "speech_gate": Rule(bool), "max_sentence_s": Rule(float, 1, 3600),
    **dict.fromkeys(KNOBS, None), **dict.fromkeys(SETTINGS, None),
}  # fmt: skip


class Resolved(NamedTuple):
    """What an engine needs besides its bundle."""

    policy: Policy
    segmenter: Segmenter
    settings: Settings


def resolve(bundle: Bundle, overrides: Mapping[str, Any], spell: Callable[[str], str] = str) -> Resolved:
    """Policy, segmenter and settings for a bundle.

    Args:
        overrides: of ``OPTIONS`` by name; None is as good as left out. ``policy`` and ``segmenter`` are names or the
            things themselves; ``settings`` stands for all the bundle's settings, single ones go before it. Without
            ``speech_gate: False`` words count only where somebody may have spoken.
        spell: how whoever gave it spells an option (``--chunk-ms``), for errors.

    Raises:
        ConfigError: an option is unknown, out of range, or of another policy or segmenter than the one chosen.
        CheckpointError, MissingExtraError: what a segmenter needs is missing.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    preferred = getattr(bundle, "policy", None) or {}
    for name in overrides:
        if name not in OPTIONS:
            raise ConfigError(f"unknown setting {name!r}; known: {', '.join(OPTIONS)}")
    return Resolved(
        _policy(overrides, preferred, spell),
        _segmenter(bundle, overrides, preferred, spell),
        _settings(bundle, overrides, preferred, spell),
    )


def _policy(overrides: dict[str, Any], preferred: Mapping[str, Any], spell: Callable[[str], str]) -> Policy:
    name = overrides.get("policy", preferred.get("policy", "ctc"))
    chosen = {knob: overrides[knob] for knob in KNOBS if knob in overrides}
    if not isinstance(name, str):
        if chosen:
            raise ConfigError(f"{spell(next(iter(chosen)))} is for a policy by name; this one is made already")
        given: Policy = name
        return given
    own = knobs_of(name)
    for knob in chosen:
        if knob not in own:
            raise ConfigError(
                f"{spell(knob)} is no knob of policy {name!r}; it has: {', '.join(map(spell, own)) or 'none'}"
            )
    return make_policy(name, **{**{knob: preferred[knob] for knob in own if knob in preferred}, **chosen})


def _segmenter(
    bundle: Bundle, overrides: dict[str, Any], preferred: Mapping[str, Any], spell: Callable[[str], str]
) -> Segmenter:
    name = overrides.get("segmenter", preferred.get("segmenter", "punctuation"))
    parts = name.split("+") if isinstance(name, str) else ()
    gated = overrides.get("speech_gate", preferred.get("speech_gate", True))
    if not isinstance(gated, bool):
        raise ConfigError(f"{spell('speech_gate')} is {shown(gated)}; it must be true or false")
    for option, part in SEGMENTER_KNOBS.items():
        if option in overrides and part not in parts and not (option == "vad_model" and gated):
            raise ConfigError(
                f"{spell(option)} is for {spell('segmenter')} {part}, not for {name if parts else name.name}"
            )
    segmenter: Segmenter = name
    if parts:
        known = {k: v for k, v in {**preferred, **overrides}.items() if SEGMENTER_KNOBS.get(k) in parts}
        segmenter = make_segmenter(name, bundle.source_dict, bundle.target_dict, **known)
    if not gated or any(isinstance(part, SpeechGate) for part in getattr(segmenter, "parts", (segmenter,))):
        return segmenter
    return CombinedSegmenter((segmenter, SpeechGate(load_silero(overrides.get("vad_model")))))


def _settings(
    bundle: Bundle, overrides: dict[str, Any], preferred: Mapping[str, Any], spell: Callable[[str], str]
) -> Settings:
    chosen = {name: overrides[name] for name in SETTINGS if name in overrides}
    longest = overrides.get("max_sentence_s", None if "settings" in overrides else preferred.get("max_sentence_s"))
    if longest is not None and "max_sentence_frames" not in chosen:
        most = bundle.config.max_sentence_frames * ENCODER_FRAME_MS / 1000
        if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not 1 <= longest <= most:
            value = f"{longest:g}" if isinstance(longest, float) else shown(longest)
            raise ConfigError(f"{spell('max_sentence_s')} is {value}; this model's buffers allow 1 to {most:g}")
        chosen["max_sentence_frames"] = round(longest * 1000 / ENCODER_FRAME_MS)
    if "settings" in overrides:
        settings: Settings = overrides["settings"]
        return replace(settings, **chosen)
    return Settings(**{**{name: preferred[name] for name in SETTINGS if name in preferred}, **chosen})


def check_preferences(values: Any, where: str) -> dict[str, Any]:
    """A bundle's section ``policy``: everything in it is known and in range, whichever policy it chooses.

    Raises:
        CheckpointError: naming the file and the first key that does not fit.
    """
    check(values, {k: rule for k, rule in _PREFERENCES.items() if rule}, where, CheckpointError)
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name not in _PREFERENCES:
            raise CheckpointError(f"{where} has the unknown key {shown(name)}; known: {', '.join(_PREFERENCES)}")
    parts = given.get("segmenter", "none").split("+")
    if not set(parts) <= set(SEGMENTERS):
        raise CheckpointError(f"{where}: segmenter is {shown('+'.join(parts))}; known: {', '.join(SEGMENTERS)}")
    try:
        Settings(**{name: value for name, value in given.items() if name in SETTINGS})
        for policy in POLICIES:
            make_policy(policy, **{knob: given[knob] for knob in knobs_of(policy) if knob in given})
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return given
