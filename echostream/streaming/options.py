"""How a stream is translated, as options of a command line: policy and its knobs, segmenter, chunk size.

Every front end takes them from here. Defaults are those the checkpoint was given for its model, then the classes'.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echostream.streaming.policies.counting import WAIT_UNITS
from echostream.streaming.policies.factory import POLICIES
from echostream.streaming.resolve import resolve
from echostream.streaming.segmenters.factory import CT_SIDES, SEGMENTERS

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle


@dataclass(frozen=True)
class Knob:
    help: str
    type: type = int
    choices: tuple[str, ...] | None = None


KNOB_OPTIONS = {
    "lagging_k1": Knob("ctc: subwords that the text stays behind the ST CTC head"),
    "stride_n1": Knob("ctc: source and target CTC subwords from one writing of text to the next"),
    "wait_k": Knob("wait-k: source units before the first writing"),
    "wait_stride": Knob("wait-k: source units from one writing to the next, and target units written each time"),
    "wait_unit": Knob("wait-k: what is a source unit: pieces of audio, ASR CTC subwords, or words", str, WAIT_UNITS),
    "wait_unit_ms": Knob("wait-k: milliseconds of audio in a source unit of kind ms"),
    "agreement_n": Knob("local-agreement: looks in a row that must agree"),
    "alignatt_frames": Knob("alignatt: newest encoder frames (40 ms) that a written subword must not look at"),
    "alignatt_layer": Knob("alignatt: MT decoder layer whose attention is read, negative from the last"),
    "alignatt_heads": Knob("alignatt: single heads instead, as layer.head,layer.head", str),
    "alignatt_skip": Knob("alignatt: encoder frames at a sentence's start that no subword is aligned with"),
    "lagging_k2": Knob("subwords that the speech stays behind the text"),
    "stride_n2": Knob("subwords from one writing of speech to the next"),
}


SEGMENTER_OPTIONS = (
    "segmenter", "punctuation_model", "punctuation_side", "vad_model", "min_pause_ms", "speech_gate", "max_sentence_s",
)  # fmt: skip


def add_policy_arguments(parser: ArgumentParser | argparse._ArgumentGroup, chunks: tuple[int, ...] = ()) -> None:
    """``--policy``, a flag for each knob of any policy, and ``--chunk-ms``. What is not given stays None.

    With ``chunks``, which are then its default, ``--chunk-ms`` takes any number of sizes.
    """
    parser.add_argument("--policy", choices=tuple(POLICIES), help="when to write (default: the checkpoint's, or ctc)")
    add_chunk_argument(parser, chunks)
    add_beam_argument(parser)
    for name, knob in KNOB_OPTIONS.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=knob.type,
            choices=knob.choices,
            metavar=None if knob.choices else "N",
            help=knob.help,
        )


def add_beam_argument(parser: ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--beam",
        type=int,
        metavar="N",
        help="hypotheses of the search that finishes a sentence, 1: greedy (default: the checkpoint's, or 1)",
    )


def add_chunk_argument(parser: ArgumentParser | argparse._ArgumentGroup, several: tuple[int, ...] = ()) -> None:
    """``--chunk-ms``; with ``several``, which are then its default, any number of them."""
    text = "source audio from one decision to the next"
    if several:
        text += f"; one run for each (default: {' '.join(map(str, several))})"
        parser.add_argument("--chunk-ms", type=int, nargs="+", default=list(several), metavar="MS", help=text)
    else:
        parser.add_argument("--chunk-ms", type=int, metavar="MS", help=f"{text} (default: the checkpoint's, or 320)")


def add_segmenter_arguments(parser: ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--segmenter`` and what its kinds need. What is not given stays None."""
    parser.add_argument(
        "--segmenter",
        metavar="NAME[+NAME]",
        help=f"where sentences end: {', '.join(SEGMENTERS)}, or several joined by + "
        "(default: the checkpoint's, or punctuation)",
    )
    parser.add_argument("--punctuation-model", type=Path, metavar="DIR", help="ct: a CT-Transformer's directory (ONNX)")
    parser.add_argument("--punctuation-side", choices=CT_SIDES, help="ct: it reads ST or ASR text (default: target)")
    parser.add_argument(
        "--vad-model", type=Path, metavar="FILE", help="another version's silero_vad.onnx (default: our own network)"
    )
    parser.add_argument(
        "--speech-gate",
        choices=("on", "off"),
        help="off: let words count where silero's detector hears nobody speak, too (default: on)",
    )
    parser.add_argument(
        "--min-pause-ms", type=int, metavar="MS", help="pause: silence that ends a sentence (default: 600)"
    )
    parser.add_argument(
        "--max-sentence-s", type=float, metavar="S", help="end a sentence after S seconds (default: the model's most)"
    )


def given_options(args: Namespace) -> dict[str, Any]:
    """The options of this file that were given, but for ``--chunk-ms``: to hand them on to another program."""
    names = ("policy", "beam", *KNOB_OPTIONS, *SEGMENTER_OPTIONS)
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def session_options(args: Namespace, bundle: Bundle) -> dict[str, Any]:
    """Keyword arguments of ``StreamingSession`` for parsed options; those that a parser does not have count as unsaid.

    Raises:
        ConfigError: a knob that the policy does not have, a value out of range, or an unknown segmenter.
        CheckpointError, MissingExtraError: what a segmenter needs is missing.
    """
    names = ("policy", *KNOB_OPTIONS, *SEGMENTER_OPTIONS, "chunk_ms", "beam")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if "speech_gate" in given:
        given["speech_gate"] = given["speech_gate"] == "on"
    found = resolve(bundle, given, spell=lambda name: f"--{name.replace('_', '-')}")
    return found._asdict()
