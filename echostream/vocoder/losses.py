"""Losses of vocoder training: spectral distances, LSGAN with feature matching (Kong et al., 2020), durations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.constants import SAMPLE_RATE, UNIT_HOP

FLOOR = 5e-3  # magnitudes below (about 80 dB under speech) count as silence: their logarithms would rule the gradient


def mel_filters(n_fft: int, n_mels: int = 80, low: float = 0.0, high: float = SAMPLE_RATE / 2) -> Tensor:
    """Triangular filters of unit height, evenly spaced on the mel scale 2595 log10(1 + f / 700): [n_mels, bins]."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    points = 700.0 * (10.0 ** (torch.linspace(mel(low), mel(high), n_mels + 2, dtype=torch.float64) / 2595.0) - 1.0)
    bins = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (bins - points[:-2, None]) / (points[1:-1] - points[:-2])[:, None]
    falling = (points[2:, None] - bins) / (points[2:] - points[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0)
    return (filters / filters.sum(1, keepdim=True).clamp(min=1e-8)).float()


def magnitude(wav: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    """STFT magnitudes of wav [B, T]: [B, bins, frames]; the square root is smoothed at 0 for its gradient."""
    spectrum = torch.stft(wav, n_fft, hop, window=window, center=True, return_complex=True, pad_mode="constant")
    return torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-7)


class SpectralLoss(nn.Module):
    """Log-mel L1, and spectral convergence plus log-magnitude L1 at several resolutions (Yamamoto et al., 2020).

    Args:
        resolutions: (n_fft, hop) pairs; the window is n_fft long. The mel spectrogram is of the first.
    """

    def __init__(self, resolutions: Sequence[tuple[int, int]] = ((1024, 256), (512, 128), (256, 64))):
        super().__init__()
        self.resolutions = tuple(resolutions)
        for n_fft, _ in self.resolutions:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("filters", mel_filters(self.resolutions[0][0]), persistent=False)

    def forward(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """fake, real [B, T] in [-1, 1]: (mel L1, multi-resolution STFT loss), both scalars."""
        stft = fake.new_zeros(())
        mel = stft
        for n_fft, hop in self.resolutions:
            window = getattr(self, f"window_{n_fft}")
            a, b = magnitude(fake, n_fft, hop, window), magnitude(real, n_fft, hop, window)
            convergence = (b - a).norm() / b.norm().clamp(min=1e-6)
            stft = stft + convergence + F.l1_loss(a.clamp(min=FLOOR).log(), b.clamp(min=FLOOR).log())
            if n_fft == self.resolutions[0][0]:
                a, b = self.filters @ a, self.filters @ b
                mel = F.l1_loss(a.clamp(min=FLOOR).log(), b.clamp(min=FLOOR).log())
        return mel, stft / len(self.resolutions)

    def frame_mel(self, wav: Tensor) -> Tensor:
        """Log-mel spectrogram of wav [B, T], one frame around the middle of every 20 ms: [B, 80, T / 320]."""
        n_fft = self.resolutions[0][0]
        before = (n_fft - UNIT_HOP) // 2
        padded = F.pad(wav, (before, n_fft - UNIT_HOP - before))
        spectrum = torch.stft(
            padded, n_fft, UNIT_HOP, window=getattr(self, f"window_{n_fft}"), center=False, return_complex=True
        )
        return (self.filters @ spectrum.abs()).clamp(min=FLOOR).log()


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """LSGAN: real scores towards 1, fake ones towards 0 (Mao et al., 2017)."""
    return sum(((1 - r.float()) ** 2).mean() + (f.float() ** 2).mean() for r, f in zip(real, fake))


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """LSGAN: fake scores towards 1."""
    return sum(((1 - f.float()) ** 2).mean() for f in fake)


def feature_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean absolute difference of the discriminators' inner features, summed over layers."""
    return sum(
        F.l1_loss(f.float(), r.float().detach()) for rs, fs in zip(real, fake, strict=True) for r, f in zip(rs, fs)
    )


def duration_loss(scores: Tensor, durations: Tensor, lengths: Tensor) -> Tensor:
    """The loss of either duration predictor, over the units within ``lengths`` [B].

    Args:
        scores: [B, U] predicted log(frames + 1): mean squared error. Or [B, U, N] logits of 1..N frames: cross-entropy,
            longer units counting as N frames. durations: [B, U] frames.
    """
    inside = torch.arange(durations.shape[1], device=durations.device) < lengths[:, None]
    scores, durations = scores[inside].float(), durations[inside]
    if scores.dim() == 2:
        return F.cross_entropy(scores, durations.clamp(max=scores.shape[1]) - 1)
    return F.mse_loss(scores, torch.log(durations.float() + 1))
