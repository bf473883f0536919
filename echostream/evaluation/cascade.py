"""The cascade that a direct model is measured against: Whisper translates the speech, the target voice says it.

Whisper (Radford et al., 2022) reads a sentence when it is over, so that its latency is that of waiting for the end. The
results have the layout of fairseq-generate's (``echostream.generator``), as far as a cascade has the parts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from echostream.audio.io import load_audio, write_audio
from echostream.data.corpus.tts import Engine
from echostream.data.manifest import Utterance
from echostream.errors import EchoStreamError
from echostream.evaluation.asr import Recogniser
from echostream.files import add, appending
from echostream.text import has_letters
from echostream.text_file import read_lines


def run_cascade(
    rows: Sequence[Utterance], root: Path, results: Path, translator: Recogniser, voice: Engine | None, seed: int = 1
) -> Path:
    """Translate and speak ``rows``; what ``results`` has already is kept, so that an interrupted run goes on.

    Args:
        rows: of a manifest; their recordings lie under ``root``.
        results: the ``generate-<subset>.jsonl`` to write; recordings go to ``wav/`` beside it.
        translator: speech to English text.
        voice: speaks it; None leaves the recordings out.
        seed: of the voice's noise.

    Returns:
        ``results``.

    Raises:
        EchoStreamError: the file is of another cascade or damaged. AudioError: a recording cannot be read.
    """
    by = " + ".join([translator.name, *([voice.version] if voice else [])])
    done = set()
    if results.is_file():
        for number, line in enumerate(read_lines(results, EchoStreamError), 1):
            try:
                found = json.loads(line)
                done.add(found["id"])
            except (ValueError, KeyError, TypeError):
                raise EchoStreamError(f"{results}, line {number} is damaged; delete that line or the file") from None
            if found.get("by") != by:
                raise EchoStreamError(f"{results} is by {found.get('by')!r}, not {by!r}; name another --output")
    with appending(results, wait=False) as file:
        for row in tqdm([row for row in rows if row.id not in done], desc="cascade", unit="sentence"):
            text = translator.transcribe(load_audio(root / row.audio))
            line = {"id": row.id, "audio": row.audio, "by": by, "mt": text}
            line |= {"asr_ref": row.src_text, "mt_ref": row.tgt_text}
            if voice is not None:
                line["wav"] = f"wav/{row.id.replace('/', '_')}.wav"
                write_audio(results.parent / line["wav"], _say(voice, text, row.id, seed))
            add(file, json.dumps(line, ensure_ascii=False) + "\n")
    return results


def _say(voice: Engine, text: str, name: str, seed: int) -> np.ndarray:
    if not has_letters(text):
        return np.zeros(0, dtype=np.float32)
    return voice.speak(text, voice.plan(name, seed))
