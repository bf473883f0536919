"""Programs behind ``echostream``'s longer commands: each module's ``main`` parses what follows the command's name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

PROGRAMS = {
    "prepare": ("echostream.data.corpus.cli", "make a training directory of parallel text or recordings"),
    "train": ("echostream.commands.train", "train by a recipe: a file of fairseq-train's flags"),
    "train-vocoder": ("echostream.commands.train_vocoder", "train the voice: units in, speech out"),
    "overfit": ("echostream.commands.overfit", "can the whole chain learn? memorise 64 utterances"),
    "ablate": ("echostream.commands.ablate", "variants of a recipe, trained for equal budgets and compared"),
    "export-checkpoint": ("echostream.commands.export_checkpoint", "make a checkpoint directory of what was trained"),
    "evaluate": ("echostream.commands.evaluate", "results: offline, simultaneous, of whole talks, in a report"),
    "benchmark": ("echostream.commands.benchmark", "measure the speed on this machine"),
    "unit-report": ("echostream.commands.unit_report", "purity, bit rate and speed of a corpus's units"),
    "check-streaming": ("echostream.commands.check_streaming", "splits, batches and restored sessions change nothing"),
    "count-parameters": ("echostream.commands.count_parameters", "parameters of a configuration, part by part"),
}


def run(name: str, arguments: Sequence[str]) -> int | None:
    """Run a program of ``PROGRAMS``; it exits by itself after an error, or returns its status."""
    return import_module(PROGRAMS[name][0]).main(arguments)
