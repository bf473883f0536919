"""How well a voice says units: recordings it never heard, through their units and back, beside the recordings.

Durations are predicted, as they are in translation. ASR-BLEU and WER tell whether a recogniser understands the words,
DNSMOS whether the sound is clean.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from echostream.audio.io import load_audio
from echostream.constants import SAMPLE_RATE
from echostream.data.corpus.rows import hash_int
from echostream.data.manifest import RECORDING, read_manifest
from echostream.errors import ManifestError, UnitError
from echostream.evaluation import quality
from echostream.evaluation.asr import Recogniser
from echostream.evaluation.mos import DNSMOS
from echostream.models.decoders.vocoder import CodeHiFiGAN
from echostream.vocoder.dataset import UnitUtterance, read_units

LEAST_ASR_BLEU = 85.0
MOST_WER = 8.0  # percent
MOST_DNSMOS_LOST = 0.3


def read_sentences(data: Path, manifest: Path | None, limit: int, seed: int = 1) -> list[UnitUtterance]:
    """Recordings with units and text, each of them once, drawn by the hash of their ids.

    Args:
        data: a corpus directory of ``echostream prepare``, or a ``units.tsv``.
        manifest: tells which rows of ``units.tsv`` are meant, and what they say (``tgt_text``; ids of the recordings
            in the column ``target``, else in ``id``). By default the corpus's ``test.tsv``; of a ``units.tsv`` all
            rows are meant, and its column ``text`` holds the texts.
        limit: at most so many.

    Raises:
        ManifestError: a file is missing or damaged, or no row has a recording and a text.
    """
    items = read_units(data / "target" / "units.tsv" if data.is_dir() else data)
    if manifest is None and data.is_dir():
        manifest = data / "test.tsv"
    if manifest is not None:
        texts = {row.extra.get("target") or row.id: row.tgt_text for row in read_manifest(manifest, need=RECORDING)}
        items = [replace(item, text=texts.get(item.id)) for item in items]
    items = [item for item in items if item.text and item.audio.is_file()]
    if limit < 1 or not items:
        raise ManifestError(f"{manifest or data} and --limit {limit} leave no sentence with units, text and recording")
    return sorted(items, key=lambda item: hash_int(seed, "resynthesis", item.id))[:limit]


@torch.inference_mode()
def resynthesize(model: CodeHiFiGAN, items: Sequence[UnitUtterance]) -> tuple[list[np.ndarray], float]:
    """What the voice makes of the units alone: float32 [N] at 16 kHz of each item, and the CPU seconds of all.

    Raises:
        UnitError: the voice does not know a unit or the speaker.
    """
    device = next(model.parameters()).device

    def speak(item: UnitUtterance) -> np.ndarray:
        speaker = None if item.speaker is None else torch.tensor([item.speaker], device=device)
        try:
            return model(torch.from_numpy(item.units)[None].to(device), speakers=speaker)[0][0].float().cpu().numpy()
        except UnitError as error:
            raise UnitError(f"{item.id}: {error}") from None

    speak(items[0])  # the first call also sets torch up
    begin = time.process_time()
    spoken = [speak(item) for item in tqdm(items, "speaking")]
    return spoken, time.process_time() - begin


def measure(
    model: CodeHiFiGAN, items: Sequence[UnitUtterance], recogniser: Recogniser, mos: DNSMOS | None, language: str = "en"
) -> dict[str, Any]:
    """Figures of the recordings (``original``) and of what the voice makes of their units (``resynthesis``).

    Returns:
        each with ``asr_bleu``, ``wer`` in percent, ``dnsmos`` if there is a ``mos``, and ``seconds`` of sound; the
        voice's ``times_realtime``, ``recogniser``, ``dnsmos`` (its name) and ``sentences`` with what was heard.
    """
    spoken, seconds = resynthesize(model, items)
    english = language.partition("-")[0] == "en"
    references = [item.text for item in items]
    report: dict[str, Any] = {"recogniser": recogniser.name, "dnsmos": mos.name if mos else None}
    sentences = [{"id": item.id, "text": item.text} for item in items]
    for kind, sounds in (("original", [load_audio(item.audio) for item in items]), ("resynthesis", spoken)):
        heard = [recogniser.transcribe(samples) for samples in tqdm(sounds, f"{kind}: {recogniser.name}")]
        report[kind] = {
            "asr_bleu": quality.asr_bleu(heard, references, quality.tokenizer_for(language), english),
            "wer": quality.word_error_rate(heard, references, english),
            "seconds": sum(map(len, sounds)) / SAMPLE_RATE,
        }
        for sentence, text in zip(sentences, heard):
            sentence[kind] = text
        if mos is not None:
            marks = [mos.score(samples) for samples in tqdm(sounds, f"{kind}: {mos.name}")]
            report[kind]["dnsmos"] = float(np.mean(marks))
    report["times_realtime"] = report["resynthesis"]["seconds"] / seconds
    return report | {"sentences": sentences}


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of ``measure``'s report: measure, original, resynthesis, bar, and whether it was reached."""
    before, after = report["original"], report["resynthesis"]

    def row(name: str, key: str, digits: int, bar: str = "", reached: bool | None = None) -> list[str]:
        verdict = {None: "", True: "yes", False: "no"}[reached]
        return [name, f"{before[key]:.{digits}f}", f"{after[key]:.{digits}f}", bar, verdict]

    rows = [
        row("ASR-BLEU", "asr_bleu", 1, f">= {LEAST_ASR_BLEU:g}", after["asr_bleu"] >= LEAST_ASR_BLEU),
        row("WER, %", "wer", 1, f"<= {MOST_WER:g}", after["wer"] <= MOST_WER),
    ]
    if report["dnsmos"]:
        least = before["dnsmos"] - MOST_DNSMOS_LOST
        rows.append(row(report["dnsmos"], "dnsmos", 2, f">= {least:.2f}", after["dnsmos"] >= least))
    rows.append(row("seconds of speech", "seconds", 1))
    return [*rows, ["times real time", "", f"{report['times_realtime']:.1f}", "", ""]]
