"""Units to samples with the exported vocoder.

Streams take turns: they rarely have equally much to say, and a vocoder is all arithmetic, which batches do not make
cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echostream.errors import UnitError
from echostream.models.decoders.vocoder_config import VocoderConfig, kept_inputs
from echostream.streaming.exported.model import VOICE_GRAPHS, Graphs, VoiceStates

PER_UNIT = ("context.", "duration.")  # caches of the graph of units; all others are of the graph of frames


@dataclass(frozen=True)
class ExportedVoice:
    """An exported vocoder's shape; its graphs are the model's."""

    config: VocoderConfig

    @property
    def lookahead_ms(self) -> float:
        """As ``CodeHiFiGAN.lookahead_ms``."""
        return 1000.0 * self.config.lookahead_units * self.config.code_hop_size / self.config.sampling_rate

    def streams(self, model: Graphs, rows: int) -> ExportedVocoder:
        """See ``Voice``. Raises CheckpointError: a graph of it is missing, no graph, or of another model."""
        model.check(VOICE_GRAPHS)
        return ExportedVocoder(self.config, model, rows)


class ExportedVocoder(VoiceStates):
    """A causal vocoder for ``rows`` streams.

    A unit is given to the graphs once those within the look-ahead have come behind it; until then it waits here.
    """

    def __init__(self, config: VocoderConfig, model: Graphs, rows: int):
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
        """See ``VoiceStates``."""
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
        samples: np.ndarray = self._run("voice_frames", row, feeds)["samples"][0]
        return samples

    def _run(self, graph: str, row: int, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A graph's outputs; the new caches among them replace the row's."""
        per_unit = graph == "voice_units"
        own = {name: cache for name, cache in self.caches.items() if name.startswith(PER_UNIT) == per_unit}
        out = self.model.run(graph, {**feeds, **{name: cache[row : row + 1] for name, cache in own.items()}})
        for name, cache in own.items():
            cache[row] = out[f"new.{name}"][0]
        return out


def caches(config: VocoderConfig) -> dict[str, tuple[int, int]]:
    """What the graphs' convolutions keep of their past, by the name that the graphs have for it. The first ones over
    units keep nothing: their units are given again."""
    kept = kept_inputs(config).items()
    return {name: shape for name, shape in kept if name not in ("duration.look", "context.0")}
