"""DNSMOS: what listeners would say of a recording's quality, predicted from the recording alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from echostream.constants import SAMPLE_RATE
from echostream.errors import AudioError, require
from echostream.streaming.exported.onnx_runtime import open_graph


class DNSMOS:
    """Overall quality after ITU-T P.835, from 1 (bad) to 5 (Reddy et al., ICASSP 2022); it hears noise, not words.

    The network comes from Microsoft's package speechmos (MIT). It reads samples, so that the package's own code, which
    imports librosa for another network, is not needed.

    Raises:
        MissingExtraError: speechmos or ONNX Runtime is not installed.
    """

    name = "DNSMOS OVRL (P.835)"
    WINDOW = 144_160  # samples, 9.01 s: what the network was trained on
    SCALE = (-0.06766283, 1.11546468, 0.04602535)  # polynomial from the network's output to listeners' marks

    def __init__(self, threads: int = 1) -> None:
        models = Path(str(require("speechmos", "mos").__file__)).parent / "dnsmos_models"
        self.graph = open_graph(models / "sig_bak_ovr.onnx", "DNSMOS network", threads)

    def score(self, samples: np.ndarray) -> float:
        """The mark of mono ``samples`` (float32 [N] at 16 kHz), the mean over its windows.

        Raises:
            AudioError: there are no samples.
        """
        if not len(samples):
            raise AudioError("DNSMOS needs at least one sample")
        inputs = self.graph.get_inputs()[0].name
        marks = [self.graph.run(None, {inputs: window[None]})[0][0, 2] for window in self.windows(samples)]
        return float(np.mean(np.polyval(self.SCALE, marks)))

    def windows(self, samples: np.ndarray) -> list[np.ndarray]:
        """A window a second; less than a window is repeated until it fills one.

        speechmos repeats to twice the length and scores every second of that, which are shifts of one sound: the mean
        of ten sentences differed by 0.01, the time by a factor of three.
        """
        samples = np.asarray(samples, np.float32)
        if len(samples) <= self.WINDOW:
            return [np.resize(samples, self.WINDOW)]
        count = max(1, len(samples) // SAMPLE_RATE - 9)
        return [samples[second * SAMPLE_RATE :][: self.WINDOW] for second in range(count)]
