"""What many do today: Whisper translates all that has been heard, again after every chunk, and what it repeats is kept.

LocalAgreement-n (Liu et al., 2020, "Low-Latency Sequence-to-Sequence Speech Recognition and Translation by Partial
Hypothesis Selection"), as in whisper_streaming (Macháček et al., 2023): words are given out as soon as n translations
in a row begin with them. They are never taken back. Its cost grows with the sentence.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from echostream.audio.io import load_audio
from echostream.constants import SAMPLE_RATE
from echostream.data.manifest import Utterance
from echostream.errors import EchoStreamError
from echostream.evaluation import latency, quality
from echostream.evaluation.asr import Recogniser
from echostream.files import add, appending
from echostream.text_file import read_json_lines


@dataclass
class Rerun:
    """What came of a recording.

    Attributes:
        words: the translation.
        delays: ms of the recording heard when each word was given out.
        seconds: its length.
        computing: seconds that the translations took, CPU time of the process.
    """

    words: list[str]
    delays: list[float]
    seconds: float
    computing: float


def translate_growing(
    translate: Callable[[np.ndarray], str], samples: np.ndarray, chunk_ms: int, agreement: int
) -> Rerun:
    """Translate the first chunk of ``samples`` [N] (16 kHz), the first two, and so on.

    Args:
        translate: speech to text.
        chunk_ms: what comes in at a time.
        agreement: translations in a row that must begin with a word.
    """
    given: list[str] = []
    delays: list[float] = []
    last: list[list[str]] = []
    begin, step = time.process_time(), chunk_ms * SAMPLE_RATE // 1000
    for end in range(step, len(samples) + step, step):
        heard = min(end, len(samples))
        last = [*last, translate(samples[:heard]).split()][-agreement:]
        agreed = last[-1]
        if heard < len(samples):
            same = takewhile(lambda words: len(set(words)) == 1, zip(*last))
            agreed = [words[0] for words in same] if len(last) == agreement else []
        new = agreed[len(given) :]
        given += new
        delays += [1000 * heard / SAMPLE_RATE] * len(new)
    return Rerun(given, delays, len(samples) / SAMPLE_RATE, time.process_time() - begin)


def run_again(
    rows: Sequence[Utterance], root: Path, results: Path, translator: Recogniser, chunk_ms: int, agreement: int
) -> dict[str, float]:
    """Translate the recordings of ``rows``, which lie under ``root``; ``results`` keeps what is done, line by line.

    Returns:
        ``BLEU``, ``AL`` and ``LAAL`` (ms), ``silent`` recordings, and ``RTF``, CPU seconds a second of speech.

    Raises:
        EchoStreamError: the file is damaged or was made otherwise. AudioError: a recording cannot be read.
    """
    by = f"{translator.name}, every {chunk_ms} ms, agreement of {agreement}"
    found = {line.get("id"): line for line in read_json_lines(results, EchoStreamError)} if results.is_file() else {}
    for line in found.values():
        if line.get("by") != by:
            raise EchoStreamError(f"{results} is by {line.get('by')!r}, not {by!r}; name another --output")
    with appending(results, wait=False) as file:
        for row in tqdm([row for row in rows if row.id not in found], desc="rerun", unit="sentence"):
            made = translate_growing(translator.transcribe, load_audio(root / row.audio), chunk_ms, agreement)
            line = {"id": row.id, "by": by, "mt": " ".join(made.words), "mt_ref": row.tgt_text, **vars(made)}
            add(file, json.dumps(line, ensure_ascii=False) + "\n")
            found[row.id] = line
    return figures([found[row.id] for row in rows])


def figures(lines: Sequence[dict]) -> dict[str, float]:
    """See ``run_again``; a recording without words is in no mean of the latency."""
    rows = [(line["delays"], 1000 * line["seconds"], len(line["mt_ref"].split())) for line in lines]
    seconds = sum(line["seconds"] for line in lines)
    return {
        "BLEU": quality.bleu([line["mt"] for line in lines], [line["mt_ref"] for line in lines]),
        **latency.means(rows),
        "RTF": sum(line["computing"] for line in lines) / seconds,
    }
