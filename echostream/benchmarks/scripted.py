"""A model of random weights whose output is forced, so that every chunk costs what speech costs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echostream.audio.cmvn import GlobalCMVN
from echostream.checkpoint import Bundle
from echostream.config import EchoStreamConfig
from echostream.constants import BLANK, ENCODER_FRAME_MS, EOS, NUM_MEL_BINS, NUM_SPECIALS
from echostream.models.decoders.vocoder import CodeHiFiGAN, VocoderConfig
from echostream.models.decoders.vocoder_layers import pack_weights
from echostream.models.echostream_model import build_echostream_model
from echostream.streaming.exported.torch_model import TorchStages
from echostream.streaming.stages import Backend, Encode, NewSentence, ReadUnits, Request, Rewind, Write
from echostream.text import WORD_START, Vocabulary

CHUNK_MS = 320
SUBWORDS_PER_SECOND, UNITS_PER_SUBWORD, FRAMES_PER_UNIT = 3, 8, 2


@dataclass(frozen=True)
class Script:
    """What the model is made to say: the same sentence again and again, without a pause.

    Attributes:
        frames: encoder frames (40 ms) of a sentence.
        tokens: its subwords, the closing mark last; evenly spread.
        unit_rate: units per position of the unit decoder.
        units: how many different ones there are.
    """

    frames: int
    tokens: tuple[int, ...]
    unit_rate: Fraction
    units: int

    @classmethod
    def write(cls, config: EchoStreamConfig, sentence_s: float) -> Script:
        """A sentence of ``sentence_s`` seconds, made longer to a whole number of chunks, so that all cost the same."""
        chunks = -(-sentence_s * 1000 // CHUNK_MS)
        seconds = chunks * CHUNK_MS / 1000
        count = round(seconds * SUBWORDS_PER_SECOND)
        words = np.random.default_rng(1).integers(NUM_SPECIALS + 1, config.mt_vocab_size, count - 1)
        positions = Fraction(config.ctc_upsample_ratio)  # of the unit decoder, per subword
        if config.unit_decoder_input == "encoder":
            positions *= Fraction(1000, ENCODER_FRAME_MS * SUBWORDS_PER_SECOND)
        frames = int(chunks) * CHUNK_MS // ENCODER_FRAME_MS
        return cls(frames, (*words.tolist(), NUM_SPECIALS), UNITS_PER_SUBWORD / positions, config.num_units)

    def heard(self, frame: int) -> int:
        """The symbol that both CTC heads emit at a frame of the stream.

        The closing mark comes with the frame that the engine counts to the next sentence, so that the first sentence
        has as many frames as the others.
        """
        if not frame:
            return BLANK
        at, count = (frame - 1) % self.frames, len(self.tokens)
        i = (at + 1) * count // self.frames
        return self.tokens[i - 1] if i > at * count // self.frames else BLANK

    def written(self, position: int) -> int:
        """The token that the MT decoder predicts at a position of the sentence."""
        return self.tokens[position] if position < len(self.tokens) else EOS

    def unit(self, position: int) -> int:
        """The unit decoder's symbol at a position of the sentence: a new unit every now and then, else blank."""
        i = int((position + 1) * self.unit_rate)
        return NUM_SPECIALS + 37 * i % self.units if i > int(position * self.unit_rate) else BLANK


class ScriptedStages:
    """A backend around another one, which does all the work; only then its answers are made to follow the script."""

    def __init__(
        self, bundle: Bundle, rows: int = 1, speech: bool = True, *, script: Script, backend: Backend = TorchStages
    ):
        self.stages, self.script, self.rows = backend(bundle, rows=rows, speech=speech), script, rows
        # Of each row: frames of the stream, and of the sentence positions of the MT and of the unit decoder.
        self.counts = np.zeros((rows, 3), dtype=np.int64)

    def run(self, requests: list[tuple[int, Request]]) -> list[Any]:
        answers = self.stages.run(requests)
        return [self._say(self.counts[row], request, answer) for (row, request), answer in zip(requests, answers)]

    def _say(self, counts: np.ndarray, request: Request, answer: Any) -> Any:
        frames, position, units = counts.tolist()
        if isinstance(request, Encode):
            counts[0] = 0 if request.finished else frames + len(answer.frames)
            symbols = np.array([self.script.heard(frames + i) for i in range(len(answer.frames))], dtype=np.int64)
            return answer._replace(source=symbols, target=symbols)
        if isinstance(request, NewSentence):
            counts[1:] = 0
        if isinstance(request, Rewind):
            counts[1] = request.positions
        if isinstance(request, Write):
            counts[1] += 1
            scores = answer.scores.copy()
            scores[self.script.written(position)] = scores.max() + 1
            return answer._replace(scores=scores)
        if isinstance(request, ReadUnits):
            counts[2] += len(answer)
            return np.array([self.script.unit(units + i) for i in range(len(answer))], dtype=np.int64)
        return answer

    @property
    def nbytes(self) -> int:
        return self.stages.nbytes

    def reset(self, row: int) -> None:
        self.stages.reset(row)
        self.counts[row] = 0

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        return {**self.stages.snapshot(row), "script": self.counts[row].copy()}

    def restore(self, row: int, arrays: dict[str, np.ndarray]) -> None:
        self.counts[row] = arrays["script"]
        self.stages.restore(row, arrays)


def random_bundle(config: EchoStreamConfig, voice: VocoderConfig | None = None) -> Bundle:
    """A model of random weights and a voice (default: ``small``) in which a unit lasts ``FRAMES_PER_UNIT`` frames."""
    torch.manual_seed(1)
    words = [f"{WORD_START if i % 4 else ''}w{i}" for i in range(config.mt_vocab_size - NUM_SPECIALS - 1)]
    vocabulary = Vocabulary([".", *words])
    vocoder = CodeHiFiGAN(voice or VocoderConfig.preset("small", config.num_units)).eval()
    with torch.no_grad():
        assert vocoder.dur_predictor is not None
        proj = vocoder.dur_predictor.proj
        proj.weight.zero_()
        if proj.out_features == 1:  # log(frames + 1)
            proj.bias.fill_(np.log(FRAMES_PER_UNIT + 1))
        else:  # a choice among 1, 2 ... frames
            proj.bias.copy_(50.0 * (torch.arange(proj.out_features) == FRAMES_PER_UNIT - 1))
    pack_weights(vocoder)
    return Bundle(
        directory=Path(),
        config=config,
        model=build_echostream_model(config).eval(),
        source_dict=vocabulary,
        target_dict=vocabulary,
        unit_count=config.num_units,
        cmvn=GlobalCMVN(np.full(NUM_MEL_BINS, 10, np.float32), np.full(NUM_MEL_BINS, 3, np.float32)),
        vocoder=vocoder,
        digest="random",
    )
