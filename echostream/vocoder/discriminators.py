"""HiFi-GAN's discriminators (Kong et al., 2020): one set looks at every p-th sample, one at average-pooled waveforms.

``width`` scales all channels; 1.0 are the paper's 70M parameters, a 16th is what a CPU can train beside the generator.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

SLOPE = 0.1
Judgement = tuple[list[Tensor], list[list[Tensor]]]  # scores, and the features of every layer, per discriminator


def _scaled(channels: int, width: float, groups: int = 1) -> int:
    return max(groups, round(channels * width / groups) * groups, 4)


class PeriodDiscriminator(nn.Module):
    """2-d convolutions over the waveform folded to [T / period, period]."""

    def __init__(self, period: int, width: float):
        super().__init__()
        self.period = period
        sizes = [1, *(_scaled(c, width) for c in (32, 128, 512, 1024, 1024))]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (1 if i == 4 else 3, 1), padding=(2, 0)))
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        )
        self.post = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        """wav [B, T] to scores [B, N] and features."""
        short = -wav.shape[1] % self.period
        x = F.pad(wav.unsqueeze(1), (0, short), mode="reflect") if short else wav.unsqueeze(1)
        x = x.view(x.shape[0], 1, -1, self.period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        x = self.post(x)
        return x.flatten(1), [*features, x]


class ScaleDiscriminator(nn.Module):
    """Strided, grouped 1-d convolutions over a waveform."""

    def __init__(self, width: float, spectral: bool):
        super().__init__()
        norm = spectral_norm if spectral else weight_norm
        # (channels, kernel, stride, groups)
        shape = [(128, 15, 1, 1), (128, 41, 2, 4), (256, 41, 2, 16)]
        shape += [(512, 41, 4, 16), (1024, 41, 4, 16), (1024, 41, 1, 16), (1024, 5, 1, 1)]
        layers, before = [], 1
        for channels, kernel, stride, groups in shape:
            # Groups thin out with the width, so that every group keeps the paper's number of channels or so.
            groups = max(1, min(groups, int(groups * width * 4)))
            after = _scaled(channels, width, groups)
            while before % groups or after % groups:
                groups -= 1
            layers.append(norm(nn.Conv1d(before, after, kernel, stride, padding=kernel // 2, groups=groups)))
            before = after
        self.convs = nn.ModuleList(layers)
        self.post = norm(nn.Conv1d(before, 1, 3, padding=1))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        """wav [B, T] to scores [B, N] and features."""
        x, features = wav.unsqueeze(1), []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        x = self.post(x)
        return x.flatten(1), [*features, x]


class Discriminators(nn.Module):
    """Multi-period and multi-scale discriminators together.

    Args:
        width: scale of all channels.
        periods: folds of the multi-period part.
        scales: the multi-scale part hears the waveform averaged over 1, 2, 4 ... samples; the first is spectrally
            normalised, as in the paper.
    """

    def __init__(self, width: float = 1.0, periods: tuple[int, ...] = (2, 3, 5, 7, 11), scales: int = 3):
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(p, width) for p in periods)
        self.scales = nn.ModuleList(ScaleDiscriminator(width, spectral=i == 0) for i in range(scales))

    def forward(self, wav: Tensor) -> Judgement:
        """wav [B, T]: one score tensor and one list of features per discriminator."""
        scores, features = [], []
        for i, judge in enumerate((*self.periods, *self.scales)):
            scale = i - len(self.periods)
            if scale > 0:
                wav = F.avg_pool1d(wav.unsqueeze(1), 4, 2, padding=2).squeeze(1)
            score, inner = judge(wav)
            scores.append(score)
            features.append(inner)
        return scores, features


DISCRIMINATOR_PRESETS = {
    "field": dict(width=1.0),
    "half": dict(width=0.5),
    "tiny": dict(width=1 / 16, scales=1),  # on a CPU a scale costs as much as all periods
}


def build_discriminators(preset: str) -> Discriminators:
    return Discriminators(**DISCRIMINATOR_PRESETS[preset])
