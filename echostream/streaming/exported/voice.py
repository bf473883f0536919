"""Units to samples with the exported vocoder.

Streams take turns: they rarely have equally much to say, and a vocoder is all arithmetic, which batches do not make
cheaper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from echostream.errors import UnitError
from echostream.streaming.exported.model import ExportedModel, RowStates

if TYPE_CHECKING:
    from echostream.models.decoders.vocoder_config import VocoderConfig

PER_UNIT = ("context.", "duration.")  # caches of the graph of units; all others are of the graph of frames


class ExportedVocoder(RowStates):
    """A causal vocoder for ``rows`` streams.

    A unit is given to the graphs once those within the look-ahead have come behind it; until then it waits here.
    """

    def __init__(self, config: VocoderConfig, model: ExportedModel, rows: int):
        self.config, self.model = config, model
        self.ahead = config.lookahead_units
        self.left = config.past_units
        self.ids = np.full((rows, self.left + self.ahead), config.num_embeddings, dtype=np.int64)
        self.waiting = np.zeros(rows, dtype=np.int64)
        self.caches = {
            name: np.zeros((rows, past, width), dtype=np.float32) for name, (past, width) in caches(config).items()
        }
        self.arrays = {"ids": (self.ids, 0), "waiting": (self.waiting, 0)}
        self.most = {"ids": config.num_embeddings, "waiting": self.ahead}
        self.arrays |= {name: (cache, 0) for name, cache in self.caches.items()}

    def reset(self, row: int) -> None:
        super().reset(row)
        self.ids[row] = self.config.num_embeddings  # silence

    def vocode(self, row: int, units: np.ndarray, finished: bool) -> np.ndarray:
        """Samples, float32 [M], of all units [U] whose look-ahead is there; ``finished`` flushes the rest.

        Raises:
            UnitError: a unit is not one of the vocoder's.
        """
        units = np.asarray(units, dtype=np.int64)
        bad = units[(units < 0) | (units >= self.config.num_embeddings)]
        if len(bad):
            raise UnitError(f"unit {bad[0]} is out of range; this vocoder knows 0..{self.config.num_embeddings - 1}")
        held = int(self.waiting[row]) + len(units)
        ids = np.concatenate([self.ids[row, : self.left + self.waiting[row]], units])
        ready = held if finished else max(0, held - self.ahead)
        samples = np.zeros(0, dtype=np.float32)
        if ready:
            silence = np.full(self.ahead if finished else 0, self.config.num_embeddings, dtype=np.int64)
            samples = self._vocode(row, np.concatenate([ids, silence])[: self.left + ready + self.ahead], ready)
        if finished:
            self.reset(row)
        else:
            ids = ids[ready:]
            self.ids[row, : len(ids)] = ids
            self.waiting[row] = held - ready
        return samples

    def _vocode(self, row: int, ids: np.ndarray, count: int) -> np.ndarray:
        out = self._run("voice_units", row, {"ids": ids[None]})
        durations = out["durations"][0] if "durations" in out else np.ones(count, dtype=np.int64)
        unit = np.repeat(np.arange(count), durations)
        feeds = {"frames": out["units"][:, unit]}
        if self.config.position_buckets:
            end = np.cumsum(durations)
            frame = np.arange(len(unit))
            since, until = frame - (end - durations)[unit], end[unit] - 1 - frame
            last = self.config.position_buckets - 1
            feeds |= {"since": np.minimum(since, last)[None], "until": np.minimum(until, last)[None]}
        return self._run("voice_frames", row, feeds)["samples"][0]

    def _run(self, graph: str, row: int, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A graph's outputs; the new caches among them replace the row's."""
        per_unit = graph == "voice_units"
        own = {name: cache for name, cache in self.caches.items() if name.startswith(PER_UNIT) == per_unit}
        out = self.model.run(graph, {**feeds, **{name: cache[row : row + 1] for name, cache in own.items()}})
        for name, cache in own.items():
            cache[row] = out[f"new.{name}"][0]
        return out


def caches(config: VocoderConfig) -> dict[str, tuple[int, int]]:
    """What each convolution keeps of its past: inputs and their width, by the name that the graphs have for it."""
    found: dict[str, tuple[int, int]] = {}

    def keep(name: str, past: int, width: int) -> None:
        if past:
            found[name] = past, width

    for i in range(1, config.context_layers):
        keep(f"context.{i}", config.context_kernel_size - 1, config.embedding_dim)
    params = config.dur_predictor_params
    if params is not None and params.var_pred_max_frames:
        for i in range(params.var_pred_layers):
            keep(f"duration.{i}", params.var_pred_kernel_size - 1, params.var_pred_hidden_dim)
    elif params is not None:
        keep("duration.1", params.var_pred_kernel_size - 1, params.encoder_embed_dim)
        keep("duration.2", params.var_pred_kernel_size - 1, params.var_pred_hidden_dim)
    keep("conv_pre", 6, config.input_width)
    for i in range(config.frame_layers):
        keep(f"frame_layers.{i}.convs.0", (config.frame_kernel_size - 1) * 2**i, config.upsample_initial_channel)
    widths = (config.upsample_initial_channel, *config.channels)
    stages = len(config.upsample_rates) if config.resblock_stages is None else config.resblock_stages
    kernels = len(config.resblock_kernel_sizes)
    for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes)):
        keep(f"ups.{i}", -(-kernel // rate) - 1, widths[i])
        if i >= stages:
            continue
        for j, (size, dilations) in enumerate(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes)):
            for k, dilation in enumerate(dilations):
                block = f"resblocks.{i * kernels + j}"
                if config.resblock == "2":
                    keep(f"{block}.convs.{k}", (size - 1) * dilation, widths[i + 1])
                else:
                    keep(f"{block}.convs1.{k}", (size - 1) * dilation, widths[i + 1])
                    keep(f"{block}.convs2.{k}", size - 1, widths[i + 1])
    keep("conv_post", 6, widths[-1])
    return found
