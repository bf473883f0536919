"""Features to encoder frames and CTC symbols, with the exported encoder and heads.

Letters: B streams, G segments, S frames of the layers in a segment, R of right context, W = S + R, L of left context,
M summaries, H heads, d width of a head, Q queries, k frames of the layers per encoder frame of 40 ms (2 behind
Whisper's stem, else 1).

Keys and values of the past lie in rings: frame f in place ``f % L``, segment j's summary in place ``j % M``. Attention
does not mind the order of its keys, so nothing is ever moved; the masks know what stands where.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from echostream.config import EchoStreamConfig
from echostream.constants import SUBSAMPLING, SUBSAMPLING_CONTEXT, WHISPER_SILENCE
from echostream.models.segments import visible_keys
from echostream.streaming.exported.model import Graphs, RowStates, additive, layers, pick, unstack
from echostream.streaming.exported.subsampling import patches, windows
from echostream.streaming.stages import Encode, EncoderOutput

MAX_SEGMENTS = 8  # computed at once when so many have arrived; the weights are then read once for all of them


class ExportedEncoder(RowStates):
    """Stem, encoder and both CTC heads for ``rows`` streams."""

    def __init__(self, config: EchoStreamConfig, model: Graphs, rows: int):
        self.config, self.model = config, model
        self.right, self.window = config.right_context_length, config.st_left_context - 1
        self.factor = config.frame_rate_factor
        bins = config.input_feat_per_channel * config.input_channels
        self.bins = -(-config.input_feat_per_channel // SUBSAMPLING)  # per channel, when subsampled
        dim, heads, st_heads = config.encoder_embed_dim, config.encoder_attention_heads, config.st_decoder_heads
        places = config.memory_size + config.left_frames
        waiting = SUBSAMPLING_CONTEXT + SUBSAMPLING * (config.segment_length + self.right)

        def zeros(*shape: int, dtype: Any = model.dtype) -> np.ndarray:
            return np.zeros(shape, dtype=dtype)

        # SUBSAMPLING_CONTEXT frames that were used, then those that wait
        self.features = zeros(rows, waiting, bins, dtype=np.float32)
        self.waiting, self.segments, self.frames = (zeros(rows, dtype=np.int64) for _ in range(3))
        self.ring = zeros(2 * config.encoder_layers, rows, heads, places, dim // heads)
        self.ctc_ring = zeros(2 * config.ctc_layers, rows, st_heads, self.window, config.st_dim // st_heads)
        kept = max(0, config.encoder_conv_kernel - 1)  # what the convolutions last saw
        self.conv = zeros(config.encoder_layers if config.encoder_conv_kernel else 0, rows, kept, dim)
        self.arrays = {
            "features": (self.features, 0),
            "waiting": (self.waiting, 0),
            "segments": (self.segments, 0),
            "frames": (self.frames, 0),
            "ring": (self.ring, 1),
            "st_ring": (self.ctc_ring, 1),  # its name in archives since the ASR head had no layers
            "conv": (self.conv, 1),
        }
        self.most = {"waiting": waiting - SUBSAMPLING_CONTEXT}
        for row in range(rows):
            self.reset(row)

    def reset(self, row: int) -> None:
        super().reset(row)
        if self.config.encoder_stem == "whisper":
            self.features[row, SUBSAMPLING_CONTEXT - 1] = WHISPER_SILENCE

    def encode(self, rows: list[int], requests: list[Encode]) -> list[EncoderOutput]:
        """Answers ``Encode`` requests of different rows."""
        segment = self.config.segment_length
        held: dict[int, np.ndarray] = {}  # by row: context and features not encoded yet
        ready: dict[int, int] = {}  # by row: segments that can be computed
        for row, request in zip(rows, requests):
            kept = self.features[row, : SUBSAMPLING_CONTEXT + self.waiting[row]]
            held[row] = np.concatenate([kept, request.features])
            waiting = len(held[row]) - SUBSAMPLING_CONTEXT
            if request.finished:
                ready[row] = -(-waiting // (SUBSAMPLING * segment))
            else:
                ready[row] = max(0, waiting // SUBSAMPLING - self.right) // segment
        found: dict[int, list[EncoderOutput]] = {row: [] for row in rows}
        while any(ready.values()):
            # Only streams with as many segments go together: each is computed in the blocks in which it would be alone,
            # whose sums differ in the last bit from those of other blocks.
            counts = {row: min(MAX_SEGMENTS, ready[row]) for row in rows if ready[row]}
            for count in sorted(set(counts.values())):
                due = [row for row in counts if counts[row] == count]
                for row, heard in zip(due, self._step(due, held, count)):
                    found[row].append(heard)
                    held[row] = held[row][SUBSAMPLING * segment * count :]
                    ready[row] -= count
        for row, request in zip(rows, requests):
            if request.finished:
                self.reset(row)
            else:
                self.features[row, : len(held[row])] = held[row]
                self.waiting[row] = len(held[row]) - SUBSAMPLING_CONTEXT
        return [self._join(found[row]) for row in rows]

    def _join(self, parts: list[EncoderOutput]) -> EncoderOutput:
        if len(parts) == 1:
            return parts[0]
        if not parts:
            none = np.zeros(0, dtype=np.int64)
            return EncoderOutput(np.zeros((0, self.config.encoder_embed_dim), dtype=self.model.dtype), none, none)
        return EncoderOutput(*(np.concatenate(part) for part in zip(*parts)))

    def _step(self, rows: list[int], held: dict[int, np.ndarray], count: int) -> list[EncoderOutput]:
        """The next ``count`` segments of each row."""
        cfg, factor = self.config, self.factor
        segment, right = factor * cfg.segment_length, factor * self.right
        size = count * cfg.segment_length + self.right  # encoder frames
        features = np.zeros(
            (len(rows), SUBSAMPLING_CONTEXT + SUBSAMPLING * size, self.features.shape[2]), dtype=np.float32
        )
        for window, row in zip(features, rows):
            part = held[row][: len(window)]
            window[: len(part)] = part
        valid = np.array([min(len(held[row]) - SUBSAMPLING_CONTEXT, SUBSAMPLING * size) for row in rows])
        before, frames = self.segments[rows], -(-valid // SUBSAMPLING)
        own = np.arange(count)[:, None] * segment + np.arange(segment + right)
        feeds = {
            **self._stem(features, valid, before == 0),
            "places": own,
            "mask": self._mask(before, factor * frames, count),
            **layers(("keys", "values"), pick(self.ring, rows)),
            **{f"conv.{i}": part for i, part in enumerate(pick(self.conv, rows))},
        }
        if cfg.encoder_position_period:
            start = before[:, None] * segment
            feeds["positions"] = (start + np.arange(factor * size)) % cfg.encoder_position_period
        if cfg.encoder_relative_bias:
            sizes = segment, cfg.left_frames, right, cfg.memory_size
            feeds["distance"] = np.stack([segment_distance(*sizes, b, count) for b in self._turned(before)])
        out = self.model.run("encoder", feeds)
        memory, new, size = cfg.memory_size, count * segment, count * (segment + right)
        for i, row in enumerate(rows):
            ring, age = self.ring[:, row], int(self.segments[row])
            kept = unstack(out["kept"][i], len(ring))
            fresh = kept[:, :size].reshape(len(ring), count, -1, kept.shape[2])[:, :, :segment]  # no right contexts
            write_ring(ring[:, :, :memory], kept[:, size:], age)
            write_ring(ring[:, :, memory:], fresh.reshape(len(ring), new, -1), age * segment)
        for i in range(len(self.conv)):
            self.conv[i, rows] = out[f"new.conv.{i}"]
        self.segments[rows] += count
        source, target = self._heads(rows, out["frames"])
        counts = np.minimum(frames, count * cfg.segment_length)
        return [EncoderOutput(out["frames"][i, :n], source[i, :n], target[i, :n]) for i, n in enumerate(counts)]

    def _stem(self, features: np.ndarray, valid: np.ndarray, first: np.ndarray) -> dict[str, np.ndarray]:
        """What the stem is given: features [B, 3 + 4 N, F], [B] valid ones behind the context, [B] whether the stream
        begins with them."""
        if self.config.encoder_stem == "whisper":
            time = np.arange(features.shape[1] - 2) - SUBSAMPLING_CONTEXT + 1  # the middle of what a convolution sees
            inside = (time < valid[:, None]) & ~((time < -1) & first[:, None])
            return {"features": features, "inside": inside.astype(np.float32)}
        frames = patches(features.shape[1] // SUBSAMPLING, self.bins)
        return {
            "windows": windows(features, self.config.input_channels, valid, first),
            "patches": frames.reshape(-1, self.bins, frames.shape[1]),
        }

    def _heads(self, rows: list[int], frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best symbol of each frame [B, N] for the ASR and the ST CTC head."""
        feeds = {"frames": frames}
        if len(self.ctc_ring):
            query = np.arange(frames.shape[1])
            age = self.frames[rows]
            place = ring_ages(age, self.window)
            past = (place[:, None] >= query[:, None] - self.window) & (place >= -age[:, None])[:, None]
            new = (query <= query[:, None]) & (query >= query[:, None] - self.window)
            mask = np.concatenate([past, np.broadcast_to(new, (len(rows), *new.shape))], axis=2)
            feeds |= {"mask": additive(mask)[:, None], **layers(("keys", "values"), pick(self.ctc_ring, rows))}
        out = self.model.run("heads", feeds)
        if len(self.ctc_ring):
            for i, row in enumerate(rows):
                write_ring(self.ctc_ring[:, row], unstack(out["kept"][i], len(self.ctc_ring)), int(self.frames[row]))
        self.frames[rows] += frames.shape[1]
        return out["source"].argmax(-1), out["target"].argmax(-1)

    def _mask(self, before: np.ndarray, frames: np.ndarray, count: int) -> np.ndarray:
        """Which keys the queries of ``count`` segments may attend: [B, 1, Q, M + L + G W + G], to be added to scores.

        Args:
            before: [B] segments of the stream before these.
            frames: [B] the layers' frames of the stream from these segments' first one on, as far as it has come.
        """
        cfg, k = self.config, self.factor
        sizes = k * cfg.segment_length, cfg.left_frames, k * cfg.right_context_length, cfg.memory_size
        rows = zip(self._turned(before), frames.tolist())
        masks = [segment_mask(*sizes, row, n, count, cfg.shift_context) for row, n in rows]
        return masks[0] if len(masks) == 1 else np.concatenate(masks)

    def _turned(self, before: np.ndarray) -> list[int]:
        """Segments before [B] that leave the rings as these do. Once the rings are full they repeat themselves: all
        that counts is where the oldest items stand."""
        cfg = self.config
        full, period = turn(self.factor * cfg.segment_length, cfg.left_frames, cfg.memory_size)
        return [b if b < full else full + (b - full) % period for b in before.tolist()]


def turn(segment: int, left: int, memory: int) -> tuple[int, int]:
    """Segments until both rings are full, and after how many more they stand as they stood."""
    return max(memory, -(-left // segment)), math.lcm(left // math.gcd(left, segment) or 1, memory or 1)


@functools.lru_cache(maxsize=512)
def segment_mask(
    segment: int, left: int, right: int, memory: int, before: int, frames: int, count: int, shift: bool
) -> np.ndarray:
    """``ExportedEncoder._mask`` of one stream, [1, 1, Q, M + L + G W + G]; not to be written to."""
    index, bank = np.arange(count), ring_ages(np.array([before]), memory)[0]
    sees_past, sees_own, sees_bank = visible_keys(
        index.repeat(segment + right), np.tile(np.arange(segment + right), count),
        ring_ages(np.array([before * segment]), left)[0], np.concatenate([bank, index]), before, frames,
        segment, left, right, memory, shift,
    )  # fmt: skip
    parts = [sees_past, sees_own | np.eye(len(sees_own), dtype=bool)]
    if memory:
        parts = [sees_bank[:, :memory], *parts, sees_bank[:, memory:]]
    return additive(np.concatenate(parts, axis=1))[None, None]


@functools.lru_cache(maxsize=512)
def segment_distance(segment: int, left: int, right: int, memory: int, before: int, count: int) -> np.ndarray:
    """Columns of the relative bias for the queries and keys of ``segment_mask``, [Q, M + L + G W + G]; not to be
    written to. The twin of ``models.emformer_layer.relative_distance``."""
    index, width = np.arange(count), segment + right
    own = (index[:, None] * segment + np.arange(width)).reshape(-1)
    frames = np.concatenate([ring_ages(np.array([before * segment]), left)[0], own])
    distance: np.ndarray = (own[:, None] - frames + width - 1).clip(0, left + 2 * width - 2)
    if not memory:
        return distance
    bank = np.concatenate([ring_ages(np.array([before]), memory)[0], index])
    age = left + 2 * width - 2 + (index.repeat(width)[:, None] - bank).clip(1, memory)
    return np.concatenate([age[:, :memory], distance, age[:, memory:]], axis=1)


def ring_ages(count: np.ndarray, size: int) -> np.ndarray:
    """What stands in each place of rings that ``count`` [B] items went through: [B, size], -1 for the newest item, -2
    for the one before; below -count where there is none yet."""
    if not size:
        return np.zeros((len(count), 0), dtype=np.int64)
    return -1 - (count[:, None] - 1 - np.arange(size)) % size


def write_ring(ring: np.ndarray, new: np.ndarray, count: int) -> None:
    """Put new items [n, N, H * d] into one stream's ring [n, H, size, d] that ``count`` items went through before."""
    size = ring.shape[2]
    if not size:
        return
    skipped = max(0, new.shape[1] - size)
    at, new = (count + skipped) % size, new[:, skipped:]
    new = new.reshape(*new.shape[:2], ring.shape[1], -1).transpose(0, 2, 1, 3)
    head = min(new.shape[2], size - at)
    ring[:, :, at : at + head] = new[:, :, :head]
    ring[:, :, : new.shape[2] - head] = new[:, :, head:]
