"""Exported graphs against the torch model, on random input over many steps of streams of different ages."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from echostream.checkpoint import Bundle
from echostream.config import EchoStreamConfig
from echostream.errors import CheckpointError
from echostream.models.decoders.layers import AttentionProbe
from echostream.streaming.exported.stages import ExportedStages
from echostream.streaming.stages import Encode, Extend, NewSentence, ReadUnits, Vocode, Write

TOLERANCE = 1e-4
ROWS = 2


class _Recorded:
    """An executor of steps that remembers the last outputs of each."""

    def __init__(self, model: Any):
        self.model, self.last, self.dtype = model, {}, model.dtype

    def check(self, names: tuple[str, ...]) -> None:
        self.model.check(names)

    def run(self, name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.last[name] = self.model.run(name, feeds)
        return self.last[name]


class _Runs(NamedTuple):
    """What ``ExportedStages`` needs of a bundle."""

    config: EchoStreamConfig
    model: _Recorded
    vocoder: Any


class Comparison:
    """Runs a torch bundle and its export side by side.

    Args:
        bundle: the torch model.
        exported: its exported twin.
        seed: of the random input.
    """

    def __init__(self, bundle: Bundle, exported: Bundle, seed: int = 0):
        self.bundle, self.model = bundle, bundle.model
        self.recorded = _Recorded(exported.model)
        self.speech = exported.vocoder is not None
        self.stages = ExportedStages(_Runs(exported.config, self.recorded, exported.vocoder), rows=ROWS)
        self.rng = np.random.default_rng(seed)
        self.differences: dict[str, float] = {}

    @torch.inference_mode()
    def run(self) -> dict[str, float]:
        """The largest difference of each stage's outputs, relative to the largest value if that is above 1."""
        frames = self._hear()
        hidden = self._write(frames)
        self._units(frames, hidden)
        if self.speech:
            self._speak()
        return self.differences

    def _note(self, stage: str, expected: Tensor | np.ndarray, found: np.ndarray) -> None:
        expected = np.asarray(expected)
        if expected.shape != found.shape:
            raise CheckpointError(f"the exported {stage} gives {list(found.shape)}, torch {list(expected.shape)}")
        if expected.size:
            error = float(np.abs(expected - found).max() / max(1.0, float(np.abs(expected).max())))
            # NaN compares as smaller than nothing, so it is asked for
            self.differences[stage] = np.inf if np.isnan(error) else max(error, self.differences.get(stage, 0.0))

    def _random(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def _hear(self) -> np.ndarray:
        """Features in pieces of all sizes; stream 1 begins later, stream 0 ends on the way and begins anew."""
        model, cfg = self.model, self.model.config
        bins = cfg.input_feat_per_channel * cfg.input_channels
        encoder, asr, st = (part.init_state(ROWS) for part in (model.encoder, model.asr_head, model.st_decoder))
        whole = 4 * cfg.segment_length
        # pieces of a stream's features; the memory bank and the left context fill up and wrap around
        sizes = [[whole * 2 + 3, 0], [5, whole + 1], [whole * 9, whole], [7, 7], [1, whole * 11 + 2], [whole, whole]]
        heard = []
        for step, lengths in enumerate(sizes * 2):
            parts = [self._random(n, bins) for n in lengths]
            ends = [step == 4, False]
            padded = np.zeros((ROWS, max(lengths), bins), dtype=np.float32)
            for row, part in enumerate(parts):
                padded[row, : len(part)] = part
            finished = torch.tensor(ends)
            x, counts, encoder = model.encoder.step(torch.from_numpy(padded), torch.tensor(lengths), encoder, finished)
            source, _, asr = model.asr_head.step(x, counts, asr)
            target, _, st = model.st_decoder.step(x, counts, st)
            asr, st = asr.restart(finished), st.restart(finished)
            answers = self.stages.run(list(enumerate(Encode(part, end) for part, end in zip(parts, ends))))
            for row, answer in enumerate(answers):
                n = int(counts[row])
                self._note("encoder", x[row, :n], answer.frames)
                self._symbols("ASR head", source[row, :n], answer.source)
                self._symbols("ST head", target[row, :n], answer.target)
            heard.append(answers[1].frames)
        return np.concatenate(heard)

    def _symbols(self, stage: str, scores: Tensor, chosen: np.ndarray) -> None:
        """Chosen symbols are right if torch scores them as high as its own choice, within the tolerance."""
        taken = scores.gather(-1, torch.from_numpy(chosen)[:, None])
        self._note(stage, scores.amax(-1, keepdim=True), taken.numpy())

    def _write(self, frames: np.ndarray) -> np.ndarray:
        """Sentences of which one sees frames earlier than the other; one token at a time."""
        decoder, vocabulary = self.model.mt_decoder, self.model.config.mt_vocab_size
        state = decoder.init_state(ROWS)
        self.stages.run([(row, NewSentence()) for row in range(ROWS)])
        hidden, at = [], 0
        heads = ((0, 0), (len(decoder.layers) - 1, decoder.heads - 1))
        for step, seen in enumerate(([0, 3], [4, 1], [1, 0], [9, 2])):
            given = [frames[at : at + n] for n in seen]
            state = decoder.extend(_padded(given), torch.tensor(seen), state)
            for row, part in enumerate(given):
                if len(part):
                    self.stages.run([(row, Extend(part))])
            at += max(seen)
            for _ in range(2):
                active = torch.tensor([True, step % 2 == 0])
                tokens = torch.from_numpy(self.rng.integers(4, vocabulary, (ROWS, 1)))
                probe = AttentionProbe(heads)
                scores, states, state = decoder.step(tokens, active, state, probe=probe)
                rows = [row for row in range(ROWS) if active[row]]
                for row, answer in zip(rows, self.stages.run([(r, Write(int(tokens[r, 0]), heads)) for r in rows])):
                    self._note("MT decoder", scores[row, 0], answer.scores)
                    self._note("MT decoder", states[row, 0], answer.hidden)
                    self._note("MT attention", probe.weights[row, 0, : int(state.frames[row])], answer.attention)
                    hidden.append(answer.hidden)
        return np.stack(hidden)

    def _units(self, frames: np.ndarray, hidden: np.ndarray) -> None:
        decoder = self.model.unit_decoder
        config = self.model.config
        inputs = hidden if config.units_read_text else frames
        tokens = self.rng.integers(4, config.mt_vocab_size, len(inputs)) if config.units_read_text else None
        state = decoder.init_state(ROWS)
        self.stages.run([(row, NewSentence()) for row in range(ROWS)])
        at = 0
        for step, counts in enumerate(([2, 1], [1, 3], [3, 1])):
            given = [frames[at : at + n] for n in (5, 2 + step)]
            state = decoder.extend(_padded(given), torch.tensor([len(g) for g in given]), state)
            self.stages.run([(row, Extend(part)) for row, part in enumerate(given)])
            read = [inputs[at : at + n] for n in counts]
            written = [None if tokens is None else tokens[at : at + n] for n in counts]
            padded = None if tokens is None else _padded(written)
            scores, lengths, state = decoder.step(_padded(read), torch.tensor(counts), state, tokens=padded)
            for row, n in enumerate(lengths.tolist()):
                self.stages.run([(row, ReadUnits(read[row], written[row]))])
                self._note("unit decoder", scores[row, :n], self.recorded.last["units"]["scores"][0])
            at += max(counts)

    def _speak(self) -> None:
        vocoder = self.bundle.vocoder
        state = vocoder.init_state(ROWS)
        for counts, ends in (([1, 0], [0, 0]), ([7, 2], [0, 0]), ([4, 12], [1, 0]), ([3, 5], [0, 1])):
            units = [self.rng.integers(0, vocoder.config.num_embeddings, n) for n in counts]
            padded = np.zeros((ROWS, max(counts)), dtype=np.int64)
            for row, part in enumerate(units):
                padded[row, : len(part)] = part
            samples, sizes, state = vocoder.step(
                torch.from_numpy(padded), torch.tensor(counts), state, torch.tensor(ends, dtype=torch.bool)
            )
            requests = [Vocode(part, bool(end)) for part, end in zip(units, ends)]
            for row, answer in enumerate(self.stages.run(list(enumerate(requests)))):
                self._note("vocoder", samples[row, : int(sizes[row])], answer)


def _padded(arrays: list[np.ndarray]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(a) for a in arrays], batch_first=True)


def compare(bundle: Bundle, exported: Bundle, **options: Any) -> dict[str, float]:
    """The largest difference between a torch bundle's and its export's outputs, by stage."""
    return Comparison(bundle, exported, **options).run()
