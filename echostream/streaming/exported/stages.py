"""A model behind the streaming engine: rows of streams stepping together, run by ONNX Runtime or by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from echostream.streaming.exported.decoder import ExportedDecoder
from echostream.streaming.exported.encoder import ExportedEncoder
from echostream.streaming.exported.model import SPEECH_GRAPHS, TEXT_GRAPHS, Graphs, RowStates, Voice
from echostream.streaming.search import Chosen, search_together, searching
from echostream.streaming.stages import (
    Answering,
    Encode,
    EncoderOutput,
    Extend,
    NewSentence,
    ReadUnits,
    Rewind,
    Search,
    Vocode,
    Write,
    Written,
)

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle


class ExportedStages(Answering):
    """Answers the engine's requests for ``rows`` streams.

    Args:
        bundle: its ``model`` is ``Graphs``, its ``vocoder`` a ``Voice``: those of a loaded exported directory, or of
            ``torch_model``.
        rows: how many streams.
        speech: without, the unit decoder and the vocoder take no room and are never opened.
    """

    def __init__(self, bundle: Bundle, rows: int = 1, speech: bool = True):
        config, model = bundle.config, cast(Graphs, bundle.model)  # ``backend_of`` has seen that it has some
        voice = bundle.vocoder if speech else None
        model.check(TEXT_GRAPHS + (SPEECH_GRAPHS if speech else ()))
        self.rows, self.dtype = rows, model.dtype
        self.encoder = ExportedEncoder(config, model, rows)
        frames = config.max_sentence_frames
        self.mt = ExportedDecoder(
            model, "mt", "mt_memory", config.mt_decoder_layers, config.mt_decoder_heads, config.mt_decoder_embed_dim,
            config.max_target_tokens, frames, "max_target_tokens", rows,
        )  # fmt: skip
        self.parts: dict[str, RowStates] = {"encoder": self.encoder, "mt": self.mt}
        if speech:
            self.ratio, self.units_read_tokens = config.ctc_upsample_ratio, config.unit_decoder_input == "mt-tokens"
            limit = "max_target_tokens" if config.units_read_text else "max_sentence_frames"
            self.units = ExportedDecoder(
                model, "units", "unit_memory", config.unit_decoder_layers, config.unit_decoder_heads,
                config.unit_decoder_embed_dim, getattr(config, limit) * self.ratio, frames, limit, rows,
            )  # fmt: skip
            self.parts["units"] = self.units
        if voice is not None:
            self.vocoder = cast(Voice, voice).streams(model, rows)
            self.parts["voice"] = self.vocoder
        self.decoders = [part for part in self.parts.values() if isinstance(part, ExportedDecoder)]

    # ---- requests ----------------------------------------------------------------------------------------------

    def _encode(self, rows: list[int], requests: list[Encode]) -> list[EncoderOutput]:
        return self.encoder.encode(rows, requests)

    def _new_sentence(self, rows: list[int], requests: list[NewSentence]) -> list[None]:
        for decoder in self.decoders:
            decoder.restart(rows)
        return [None] * len(rows)

    def _extend(self, rows: list[int], requests: list[Extend]) -> list[None]:
        for decoder in self.decoders:
            decoder.extend(rows, [r.frames for r in requests])
        return [None] * len(rows)

    def _write(self, rows: list[int], requests: list[Write]) -> list[Written]:
        tokens = np.array([[r.token] for r in requests], dtype=np.int64)
        written = []
        for row, request, out in zip(rows, requests, self.mt.step(rows, {"tokens": tokens}, 1)):
            looked = None
            if request.heads:
                weights = out["attention"][:, :, 0, 1 : 1 + self.mt.frames[row]]
                looked = np.mean([weights[layer, head] for layer, head in request.heads], axis=0)
            written.append(Written(out["scores"][0], out["hidden"][0], looked))
        return written

    def _search(self, rows: list[int], requests: list[Search]) -> list[list[Chosen]]:
        decoder = self.mt.branch(rows)

        def step(tokens: np.ndarray, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            nonlocal decoder
            decoder = decoder.reorder(parents)
            out = decoder.step(list(range(len(tokens))), {"tokens": tokens[:, None]}, 1)
            return np.stack([o["scores"][0] for o in out]), np.stack([o["hidden"][0] for o in out])

        return search_together(step, [searching(r.token, r.beam, r.most) for r in requests])

    def _rewind(self, rows: list[int], requests: list[Rewind]) -> list[None]:
        self.mt.positions[rows] = [r.positions for r in requests]
        return [None] * len(rows)

    def _read_units(self, rows: list[int], requests: list[ReadUnits]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        sizes = {row: len(request.inputs) for row, request in zip(rows, requests)}
        for size in sorted(set(sizes.values())):  # padded, a row would get what it gets alone but for the last bit
            due = [(row, request) for row, request in zip(rows, requests) if sizes[row] == size]
            given = {"inputs": np.stack([request.inputs for _, request in due]).astype(self.dtype)}
            if self.units_read_tokens:
                written = [request.tokens for _, request in due if request.tokens is not None]
                given["tokens"] = np.stack(written).astype(np.int64)
            outs = self.units.step([row for row, _ in due], given, size * self.ratio)
            found |= {row: out["scores"].argmax(-1) for (row, _), out in zip(due, outs)}
        return [found[row] for row in rows]

    def _vocode(self, rows: list[int], requests: list[Vocode]) -> list[np.ndarray]:
        return self.vocoder.vocode_together(rows, [r.units for r in requests], [r.finished for r in requests])

    # ---- rows --------------------------------------------------------------------------------------------------

    def reset(self, row: int) -> None:
        """A new stream in ``row``."""
        for part in self.parts.values():
            part.reset(row)

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        """The state of ``row`` as named arrays, copied."""
        return {
            f"{name}.{key}": array for name, part in self.parts.items() for key, array in part.snapshot(row).items()
        }

    def restore(self, row: int, arrays: dict[str, np.ndarray]) -> None:
        """Put what ``snapshot`` gave into ``row``.

        Raises:
            KeyError, ValueError: the arrays are of another model.
        """
        for name, part in self.parts.items():
            part.restore(row, {key: arrays[f"{name}.{key}"] for key in part.names})

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' states: as much as was heard of their sentences, and what does not change."""
        return sum(part.nbytes for part in self.parts.values())
