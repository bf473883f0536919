"""Valid inputs, small and quick: a corpus and a checkpoint directory, exports, recordings, saved sessions."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from tests.conftest import NUM_UNITS, make_tiny_bundle, make_tiny_data

MANIFEST = "\n".join([
    "id\tsrc_audio\tsrc_n_frames\tsrc_text\ttgt_text\ttgt_audio\ttgt_n_frames",
    *(f"u{i}\tclips/{i}.wav\t{90 + i}\tHola, amigo.\tHello, my friend.\t1 2 3 4\t4" for i in range(5)),
    "",
])  # fmt: skip


def noise(seconds: float, seed: int = 0, rate: int = 16_000) -> np.ndarray:
    """Something that an untrained model takes for speech: float32 [N]."""
    rng, time = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    voice = np.sin(2 * np.pi * (120 + 40 * np.sin(3 * time)) * time) * (0.6 + 0.4 * np.sin(9 * time))
    return (0.2 * voice + 0.02 * rng.standard_normal(len(time))).astype(np.float32)


@dataclass(frozen=True)
class Material:
    """Where the valid inputs lie.

    Attributes:
        data: corpus directory; bundle: checkpoint directory; exports: exported ones; saved: sessions of ``bundle``.
        recordings: files of many formats by their suffix.
    """

    data: Path
    bundle: Path
    exports: tuple[Path, ...]
    saved: tuple[Path, ...]
    recordings: dict[str, bytes]


def make_material(folder: Path) -> Material:
    """Everything, in ``folder``; takes some seconds."""
    from echostream.checkpoint import load_bundle
    from echostream.export.directory import export_directory
    from echostream.streaming import StreamingSession
    from echostream.units.kmeans import KMeans, Projection

    data = folder / "data"
    data.mkdir(parents=True)
    make_tiny_data(data)
    with (data / "config.yaml").open("a", encoding="utf-8") as file:
        file.write(f"num_units: {NUM_UNITS}\n")
    rng = np.random.default_rng(0)
    (data / "train.tsv").write_text(MANIFEST, encoding="utf-8")
    KMeans(rng.standard_normal((8, 5)).astype(np.float32), Projection.identity(5), "mfcc").save(data / "kmeans.npz")
    bundle = make_tiny_bundle(data, folder / "bundle")
    exports = []
    for name, int8 in (("fp32", False), ("int8", True)):
        exports.append(export_directory(bundle, folder / name, int8=int8)[0])
    saved = []
    for name, directory in (("torch", bundle), ("fp32", exports[0])):
        for seconds in (0.0, 1.7):
            session = StreamingSession(load_bundle(directory))
            session.push(noise(seconds))
            saved.append(folder / f"{name}-{seconds}.npz")
            session.save(saved[-1])
    recordings = {}
    samples = noise(1.5)
    for suffix, kind, subtype in (
        ("wav", "WAV", "PCM_16"), ("wav24", "WAV", "PCM_24"), ("float", "WAV", "FLOAT"), ("wavex", "WAVEX", "PCM_16"),
        ("flac", "FLAC", "PCM_16"), ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS"), ("au", "AU", "PCM_16"),
        ("aiff", "AIFF", "PCM_16"), ("w64", "W64", "PCM_16"), ("rf64", "RF64", "PCM_16"),
        ("mp3", "MP3", "MPEG_LAYER_III"),
    ):  # fmt: skip
        if kind in soundfile.available_formats():
            file = io.BytesIO()
            soundfile.write(file, np.stack([samples, samples], 1), 16_000, format=kind, subtype=subtype)
            recordings[suffix] = file.getvalue()
    return Material(data, bundle, tuple(exports), tuple(saved), recordings)
