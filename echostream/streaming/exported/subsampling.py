"""What the subsampler's convolutions see, gathered for the exported encoder, where they are products of matrices.

The first one's outputs are numbered place by place: time -1 to 2 N - 1, and at each time ``2 * bins`` + 1 bins from -1
on, where N encoder frames of ``bins`` bins each leave the second one. Places outside of the stream or its bins are
zero, as the second convolution's padding is.
"""

from __future__ import annotations

import functools

import numpy as np

KERNEL, STRIDE = 3, 2


def windows(features: np.ndarray, channels: int, valid: np.ndarray, first: np.ndarray) -> np.ndarray:
    """What the first convolution sees at each place, and a 1 for its bias; all zero outside.

    Args:
        features: [B, 3 + 4 N, F], three frames of context first, zero where there is no speech.
        channels: that F is made of.
        valid: [B] feature frames that there are, without the context.
        first: [B] does the stream begin with them?

    Returns:
        float32 [B, (1 + 2 N) * (2 * bins + 1), 9 * channels + 1].
    """
    batch, size, width = features.shape
    flat = np.zeros((batch, size * width + 2), dtype=np.float32)
    flat[:, :-2], flat[:, -1] = features.reshape(batch, -1), 1
    kinds = list(zip(valid.tolist(), first.tolist()))
    if len(set(kinds)) == 1:
        return flat.take(_window_index(size, width, channels, *kinds[0]), axis=1)
    return np.stack([row.take(_window_index(size, width, channels, *kind)) for row, kind in zip(flat, kinds)])


@functools.lru_cache(maxsize=256)
def _window_index(size: int, width: int, channels: int, valid: int, first: bool) -> np.ndarray:
    """Where ``windows`` finds its numbers among a stream's features [size * width], a 0 and a 1."""
    zero, one = size * width, size * width + 1
    bins = width // channels
    numbers = np.full((size, channels, 1 + bins + STRIDE), zero)  # padded on both sides
    numbers[:, :, 1 : 1 + bins] = np.arange(size * width).reshape(size, channels, bins)
    seen = np.lib.stride_tricks.sliding_window_view(numbers, (KERNEL, KERNEL), axis=(0, 2))[::STRIDE, :, ::STRIDE]
    count = -(-bins // STRIDE)  # bins that leave the first convolution
    seen = seen[:, :, :count].transpose(0, 2, 1, 3, 4)  # [times, bins, channels, 3, 3]
    index = np.full((len(seen), STRIDE * -(-count // STRIDE) + 1, channels * KERNEL**2 + 1), zero)
    index[:, 1 : 1 + count, :-1] = seen.reshape(len(seen), count, -1)
    index[:, 1 : 1 + count, -1] = one
    time = np.arange(-1, len(seen) - 1)
    index[(time >= -(-valid // STRIDE)) | ((time < 0) & first)] = zero
    return index.reshape(-1, index.shape[2])


@functools.lru_cache(maxsize=64)
def patches(frames: int, bins: int) -> np.ndarray:
    """Which places the second convolution sees for each of ``bins`` bins of ``frames`` encoder frames:
    [frames * bins, 9]; not to be written to."""
    width = STRIDE * bins + 1
    corner = STRIDE * (np.arange(frames)[:, None] * width + np.arange(bins))
    taps = np.arange(KERNEL)[:, None] * width + np.arange(KERNEL)
    return corner.reshape(-1, 1) + taps.reshape(-1)
