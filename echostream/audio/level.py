"""Is this loud enough, or far too loud, to be speech whose full scale is 1?"""

from __future__ import annotations

import numpy as np

TOO_LOUD = 8.0  # 18 dB beyond full scale: floats that hold integers reach hundreds or thousands
TOO_QUIET = 1e-3  # -60 dB: a whisper beside a microphone that is turned down stays above it
PATIENCE_S = 20.0  # of sound, before silence is remarkable


class LevelWatch:
    """Watches one stream, and has at most one thing to say about it."""

    def __init__(self) -> None:
        self.peak, self.seconds, self.said = 0.0, 0.0, False

    def hear(self, samples: np.ndarray, rate: int) -> str | None:
        """Samples, float32 [N]. A sentence for people as soon as something cannot be right, and None otherwise."""
        if self.said or not len(samples):
            return None
        self.peak = max(self.peak, float(np.abs(samples).max()))
        self.seconds += len(samples) / rate
        said = None
        if self.peak > TOO_LOUD:
            said = (
                f"samples reach {self.peak:.0f}, but full scale is 1: they look like integers stored as floats; divide "
                "them by theirs (32768 for 16 bits), or what is understood is nonsense"
            )
        elif self.seconds >= PATIENCE_S and self.peak < TOO_QUIET:
            level = f"below {20 * np.log10(max(self.peak, 1e-9)):.0f} dB of full scale" if self.peak else "silence"
            said = f"the first {self.seconds:.0f} s are {level}: nothing can be understood; is the microphone on?"
        self.said = said is not None
        return said
