"""Target speech with its units: the rows of ``units.tsv`` and random pieces of them to train a vocoder on."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from echostream.audio.io import check_finite
from echostream.constants import SAMPLE_RATE, UNIT_HOP
from echostream.errors import AudioError, ManifestError
from echostream.text_file import iter_lines, table_rows

COLUMNS = ("id", "audio", "units", "durations")


@dataclass(frozen=True)
class UnitUtterance:
    """One row: deduplicated units [U] and how many frames of 20 ms each lasts [U]."""

    id: str
    audio: Path
    units: np.ndarray
    durations: np.ndarray
    text: str | None = None
    speaker: int | None = None  # number, for multi-speaker vocoders

    @property
    def frames(self) -> int:
        return int(self.durations.sum())


def read_units(path: str | Path, num_units: int | None = None) -> list[UnitUtterance]:
    """Read ``units.tsv``: tab separated, a header with id, audio (relative to the file), units, durations.

    Columns ``text`` and ``speaker`` (a number from 0 up) are kept where there are any.

    Raises:
        ManifestError: the file or a column is missing, or a row contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; it holds the vocoder's units, made by echostream prepare")
    lines = iter_lines(path)
    header = next(lines, "")
    missing = [name for name in COLUMNS if name not in header.split("\t")]
    if missing:
        raise ManifestError(f"{path} has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}")
    rows = table_rows([header, *lines])
    found = [_utterance(path, number, row, num_units) for number, row in enumerate(rows, 2)]
    if not found:
        raise ManifestError(f"{path} has no rows")
    return found


def _utterance(path: Path, number: int, row: dict[str, str], num_units: int | None) -> UnitUtterance:
    try:
        units = np.array([int(u) for u in row["units"].split()], dtype=np.int64)
        durations = np.array([int(d) for d in row["durations"].split()], dtype=np.int64)
    except (ValueError, AttributeError):
        raise ManifestError(f"{path}, line {number}: units and durations must be whole numbers") from None
    if len(units) != len(durations) or not len(units):
        raise ManifestError(f"{path}, line {number}: {len(units)} units, {len(durations)} durations")
    if units.min() < 0 or durations.min() < 1:
        raise ManifestError(f"{path}, line {number}: a unit below 0 or a duration below 1")
    if num_units is not None and units.max() >= num_units:
        raise ManifestError(f"{path}, line {number}: unit {units.max()} is out of range 0..{num_units - 1}")
    speaker = row.get("speaker") or None
    if speaker is not None and not speaker.isdecimal():
        raise ManifestError(f"{path}, line {number}: speaker {speaker!r} is no whole number from 0 up")
    number_of = None if speaker is None else int(speaker)
    return UnitUtterance(row["id"], path.parent / row["audio"], units, durations, row.get("text"), number_of)


def hold_out(
    items: list[UnitUtterance], count: int, ids: set[str] | None = None
) -> tuple[list[UnitUtterance], list[UnitUtterance]]:
    """(training items, ``count`` items to validate on), chosen by the hash of their ids: the same in every run.

    Args:
        ids: these are kept out of training, all of them, and validation draws from them.
    """
    ranked = sorted(items, key=lambda item: hashlib.sha1(item.id.encode()).hexdigest())
    ranked = [item for item in ranked if ids is None or item.id in ids]
    held = {item.id for item in (ranked if ids is not None else ranked[:count])}
    return [item for item in items if item.id not in held], ranked[:count]


def read_samples(item: UnitUtterance, start_frame: int = 0, frames: int | None = None) -> np.ndarray:
    """Samples of ``frames`` frames from ``start_frame`` on, float32, zero behind the recording's end.

    Raises:
        AudioError: the recording cannot be read, or is not 16 kHz mono.
    """
    frames = item.frames - start_frame if frames is None else frames
    try:
        with soundfile.SoundFile(os.fsencode(item.audio)) as recording:  # a name may be anything but text
            if recording.samplerate != SAMPLE_RATE or recording.channels != 1:
                raise AudioError(
                    f"{item.audio} is {recording.samplerate} Hz with {recording.channels} channels; vocoder training "
                    f"needs {SAMPLE_RATE} Hz mono"
                )
            recording.seek(min(start_frame * UNIT_HOP, recording.frames))
            samples = recording.read(frames * UNIT_HOP, dtype="float32")
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(f"{item.audio} cannot be read: {error}") from None
    check_finite(samples, str(item.audio), start_frame * UNIT_HOP)
    return np.pad(samples, (0, frames * UNIT_HOP - len(samples)))


@dataclass(frozen=True)
class Batch:
    """Random pieces of utterances, all of the same number of frames.

    Attributes:
        units, durations: [B, U] of the whole utterances, padded with 0. lengths: [B] units.
        begin: [B] first frame of the piece. valid: [B] frames of the piece that are the utterance's.
        wav: [B, frames * 320] of the piece.
        speakers: [B] numbers; 0 where units.tsv names none.
    """

    units: Tensor
    durations: Tensor
    lengths: Tensor
    begin: Tensor
    valid: Tensor
    wav: Tensor
    speakers: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class PieceSampler:
    """Endless random batches; a function of (seed, step), so that a resumed run goes on with what it would have seen.

    Args:
        items: utterances; one is drawn with a chance in proportion to its frames.
        frames: frames per piece.
    """

    def __init__(self, items: list[UnitUtterance], batch_size: int, frames: int, seed: int):
        self.items, self.batch_size, self.frames, self.seed = items, batch_size, frames, seed
        self.ends = np.cumsum([item.frames for item in items])

    def batch(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}/{step}")
        chosen = [
            self.items[int(np.searchsorted(self.ends, rng.randrange(int(self.ends[-1])), side="right"))]
            for _ in range(self.batch_size)
        ]
        begin = [rng.randint(0, max(item.frames - self.frames, 0)) for item in chosen]
        wav = [read_samples(item, start, self.frames) for item, start in zip(chosen, begin)]
        return collate(chosen, begin, self.frames, np.stack(wav))


class UtteranceSampler:
    """Endless random batches of whole utterances, without their audio; a function of (seed, step), as above.

    Utterances of a batch are of like length: of four times as many, drawn at random, neighbours by length.
    """

    def __init__(self, items: list[UnitUtterance], batch_size: int, seed: int):
        self.items, self.batch_size, self.seed = items, batch_size, seed

    def batch(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}/{step}")
        drawn = sorted(rng.choices(self.items, k=4 * self.batch_size), key=lambda item: len(item.units))
        first = rng.randrange(4) * self.batch_size
        chosen = drawn[first : first + self.batch_size]
        return collate(chosen, [0] * len(chosen), 0, np.zeros((len(chosen), 0)))


def collate(items: list[UnitUtterance], begin: list[int], frames: int, wav: np.ndarray) -> Batch:
    longest = max(len(item.units) for item in items)

    def padded(rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]))

    valid = [min(frames, item.frames - start) for item, start in zip(items, begin)]
    return Batch(
        units=padded([item.units for item in items]),
        durations=padded([item.durations for item in items]),
        lengths=torch.tensor([len(item.units) for item in items]),
        begin=torch.tensor(begin),
        valid=torch.tensor(valid),
        wav=torch.from_numpy(wav.astype(np.float32)),
        speakers=torch.tensor([item.speaker or 0 for item in items]),
    )
