"""The log-mel features that an encoder hears, by name: for whole recordings and sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from echostream.audio import whisper_fbank
from echostream.audio.cmvn import GlobalCMVN
from echostream.audio.fbank import fbank
from echostream.constants import FRAME_LENGTH, FRAME_SHIFT, NUM_MEL_BINS, WHISPER_MEAN, WHISPER_STD
from echostream.errors import ConfigError


@dataclass(frozen=True)
class FeatureState:
    """Samples that the next frame needs.

    Attributes:
        samples: float32 [400], the first ``count`` of them in use.
        count: how many.
    """

    samples: np.ndarray
    count: int

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes + 8


@dataclass(frozen=True)
class FeatureExtractor:
    """Samples to feature frames, one every 160 samples from a window of 400.

    Attributes:
        name: ``kaldi`` or ``whisper``.
        transform: float32 [N] samples -> [1 + (N - 400) // 160, 80].
        lead: samples of silence that come before a stream.
        cmvn: the normalisation, where it is fixed; None: from the training set.
    """

    name: str
    transform: Callable[[np.ndarray], np.ndarray]
    lead: int = 0
    cmvn: GlobalCMVN | None = None

    def num_frames(self, num_samples: int) -> int:
        """Frames of a recording of ``num_samples`` at 16 kHz; only whole windows count."""
        return max(0, 1 + (num_samples + self.lead - FRAME_LENGTH) // FRAME_SHIFT)

    def extract(self, samples: np.ndarray) -> np.ndarray:
        """A whole recording, float [N] at 16 kHz -> float32 [T, 80], not normalised."""
        return self.step(samples, self.init_state())[0]

    def init_state(self) -> FeatureState:
        return FeatureState(np.zeros(FRAME_LENGTH, dtype=np.float32), self.lead)

    def step(self, samples: np.ndarray, state: FeatureState) -> tuple[np.ndarray, FeatureState]:
        """The frames completed by ``samples`` (float [N], any N, 0 included): (float32 [T, 80], next state).

        Whatever the splits, the frames of all steps together are those of the whole recording, bit by bit.
        """
        joined = np.concatenate([state.samples[: state.count], np.asarray(samples, dtype=np.float32)])
        features = self.transform(joined)
        rest = joined[len(features) * FRAME_SHIFT :]
        held = np.zeros(FRAME_LENGTH, dtype=np.float32)
        held[: len(rest)] = rest
        return features, FeatureState(held, len(rest))


_WHISPER_CMVN = GlobalCMVN(
    np.full(NUM_MEL_BINS, WHISPER_MEAN, dtype=np.float32), np.full(NUM_MEL_BINS, WHISPER_STD, dtype=np.float32)
)
FEATURES = {
    extractor.name: extractor
    for extractor in (
        FeatureExtractor("kaldi", fbank),
        FeatureExtractor("whisper", whisper_fbank.whisper_fbank, whisper_fbank.LEAD, _WHISPER_CMVN),
    )
}


def feature_extractor(name: str) -> FeatureExtractor:
    """The extractor called ``name``.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in FEATURES:
        raise ConfigError(f"features are {name!r}; they must be one of {', '.join(FEATURES)}")
    return FEATURES[name]
