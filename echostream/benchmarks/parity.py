"""What a session promises to be the same, measured: cut otherwise, saved and restored, in a batch, and in training.

The last is the spec's third reading: the training forward, teacher-forced with the sentences that were streamed and
with cross-attention limited to the frames that were visible then, gives the scores that were computed while streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from echostream.audio.features import feature_extractor
from echostream.checkpoint import Bundle
from echostream.constants import EOS, PAD
from echostream.models.echostream_model import SentenceWindows
from echostream.streaming import Event, SentenceEnd, SessionBatch, StreamingSession, Waveform
from echostream.streaming.exported.torch_model import TorchStages
from echostream.streaming.sentence import FRAME_S
from echostream.streaming.stages import Extend, NewSentence, ReadUnits, Request, Search, Write

# ------------------------------------------------------------------------------------------------- ways to stream


def translate(bundle: Bundle, samples: np.ndarray, pieces: Sequence[int] = (), **options: Any) -> list[Event]:
    """Everything a session gives out for a recording at 16 kHz, pushed in pieces of so many samples, then the rest."""
    session, events, at = StreamingSession(bundle, **options), [], 0
    for size in (*pieces, len(samples)):
        events += session.push(samples[at : at + size])
        at += size
    return events + session.finish()


def random_pieces(total: int, rng: np.random.Generator, largest: int) -> list[int]:
    """Sizes from 0 to ``largest`` that add up to ``total`` or a little more."""
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(int(rng.integers(0, largest + 1)))
    return sizes


def translate_with_breaks(
    bundle: Bundle, samples: np.ndarray, breaks: Sequence[int], path: Path, **options: Any
) -> list[Event]:
    """The same, but at each of these samples the session is saved to ``path`` and another one goes on."""
    session, events, at = StreamingSession(bundle, **options), [], 0
    for stop in (*sorted(breaks), len(samples)):
        events += session.push(samples[at:stop])
        at = stop
        session.save(path)
        session = StreamingSession(bundle, **options)
        session.push(samples[:8000])  # what it has heard before must not matter
        session.restore(path)
    return events + session.finish()


def translate_together(
    bundle: Bundle, recordings: Sequence[np.ndarray], capacity: int, rng: np.random.Generator, **options: Any
) -> list[list[Event]]:
    """Recordings in one batch, joining at random times, pushed at random paces, leaving when they end."""
    batch = SessionBatch(bundle, capacity=capacity, **options)
    events: list[list[Event]] = [[] for _ in recordings]
    waiting, playing = list(range(len(recordings))), {}  # stream -> [recording, samples pushed]
    while waiting or playing:
        if waiting and len(playing) < capacity and (not playing or rng.random() < 0.4):
            playing[batch.join()] = [waiting.pop(0), 0]
        parts = {}
        for number, place in playing.items():
            if rng.random() < 0.7:
                size = int(rng.integers(0, 9000))
                parts[number] = recordings[place[0]][place[1] : place[1] + size]
                place[1] += size
        for number, found in batch.push(parts).items():
            events[playing[number][0]] += found
        ended = [number for number, (which, at) in playing.items() if at >= len(recordings[which])]
        for number, found in batch.finish(*ended).items():
            events[playing[number][0]] += found
            batch.leave(number)
            del playing[number]
    return events


# ------------------------------------------------------------------------------------------------------ the same?


def differs(left: list[Event], right: list[Event]) -> str:
    """The first thing that two runs said or did at another time or not at all; waveforms aside. Empty: nothing."""
    for a, b in zip(left, right):
        for name, value in vars(a).items():
            # repr: lag statistics may hold nan, which is not equal to itself.
            if name not in ("elapsed_s", "samples", "waveform") and repr(value) != repr(vars(b).get(name)):
                return f"{type(a).__name__} at {a.source_time_s:.2f} s: {name} is {value!r}, {vars(b).get(name)!r}"
    if len(left) != len(right):
        return f"{len(left)} events, {len(right)}"
    return ""


def wave_difference(left: list[Event], right: list[Event]) -> float:
    """The largest difference of two waveforms' samples; infinite if one is longer."""
    a, b = (
        np.concatenate([np.zeros(0), *(event.samples for event in events if isinstance(event, Waveform))])
        for events in (left, right)
    )
    return float("inf") if len(a) != len(b) else float(np.abs(a - b).max(initial=0.0))


# ------------------------------------------------------------------------------------------ as in training


@dataclass
class Scores:
    """What the decoders computed for one sentence while it was streamed.

    Attributes:
        visible: encoder frames of the sentence that they could see last.
        text: of every MT position the last scores [V] computed there, and the frames visible then.
        units: unit scores, [P * R, units + 4] of every reading, and unit_visible, the frames visible to every input.
    """

    visible: int = 0
    text: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict)
    units: list[Tensor] = field(default_factory=list)
    unit_visible: list[int] = field(default_factory=list)


class RecordingStages(TorchStages):
    """A backend that remembers the scores behind its answers, sentence by sentence, of the stream in row 0."""

    def __init__(self, bundle: Bundle, rows: int = 1, speech: bool = True):
        super().__init__(bundle, rows, speech)
        self.output = bundle.model.unit_decoder.output
        self.sentences: list[Scores] = []

    def run(self, requests: Sequence[tuple[int, Request]]) -> list[Any]:
        (_, request), position = requests[0], int(self.mt.positions[0])
        if isinstance(request, NewSentence):
            self.sentences.append(Scores())
        if not isinstance(request, ReadUnits):
            answers = super().run(requests)
        else:
            sentence = self.sentences[-1]
            hook = self.output.register_forward_hook(lambda _m, _i, y: sentence.units.append(y[0]))
            answers = super().run(requests)
            hook.remove()
            sentence.unit_visible += [sentence.visible] * len(request.inputs)
        if isinstance(request, Extend):
            self.sentences[-1].visible += len(request.frames)
        if isinstance(request, Write):
            self.sentences[-1].text[position] = (answers[0].scores, self.sentences[-1].visible)
        if isinstance(request, Search):
            for place, chosen in enumerate(answers[0], position):
                self.sentences[-1].text[place] = (chosen.scores, self.sentences[-1].visible)
        return answers


class Difference(NamedTuple):
    """Largest difference of the streamed scores to those of the training forward, and of how many positions."""

    tokens: int
    text: float
    unit_positions: int
    units: float


@torch.no_grad()
def compare_with_training(bundle: Bundle, samples: np.ndarray, **options: Any) -> tuple[Difference, list[SentenceEnd]]:
    """Stream a recording at 16 kHz, then run the model's training forward over it, all sentences at once."""
    made: list[RecordingStages] = []

    def backend(*args: Any, **kwargs: Any) -> RecordingStages:
        made.append(RecordingStages(*args, **kwargs))
        return made[0]

    events = translate(bundle, samples, backend=backend, **options)
    ends = [event for event in events if isinstance(event, SentenceEnd)]
    if not ends:
        return Difference(0, 0.0, 0, 0.0), ends
    sentences = made[0].sentences[: len(ends)]
    size = 1 + max(len(end.tokens) for end in ends)
    prev = torch.full((len(ends), size), PAD)
    visible = torch.ones(len(ends), size, dtype=torch.long)
    unit_visible = torch.ones(len(ends), max(len(s.unit_visible) for s in sentences), dtype=torch.long)
    for i, (end, sentence) in enumerate(zip(ends, sentences)):
        row = [EOS, *end.tokens]
        prev[i, : len(row)] = torch.tensor(row)
        visible[i, : len(row)] = torch.tensor([*end.frames, sentence.visible])
        unit_visible[i, : len(sentence.unit_visible)] = torch.tensor(sentence.unit_visible)
    extracted = feature_extractor(bundle.config.features).extract(samples)
    features = torch.from_numpy(bundle.cmvn.apply(extracted))[None].to(bundle.model.asr_head.weight.dtype)
    out = bundle.model(
        features,
        torch.tensor([features.shape[1]]),
        prev,
        windows=SentenceWindows(
            torch.zeros(len(ends), dtype=torch.long),
            torch.tensor([round(end.start_s / FRAME_S) for end in ends]),
            torch.tensor([round(end.end_s / FRAME_S) for end in ends]),
        ),
        visible=visible,
        unit_visible=unit_visible,
        parts=("mt", "unit"),
    )
    tokens, text, positions, units = 0, 0.0, 0, 0.0
    for i, (end, sentence) in enumerate(zip(ends, sentences)):
        for position in range(len(end.tokens) + 1):
            scores, seen = sentence.text[position]
            if seen != int(visible[i, position]):  # the g that was told must be the one that was used
                text = float("inf")
            text = max(text, float((out["mt_logits"][i, position] - torch.from_numpy(scores)).abs().max()))
        streamed = torch.cat(sentence.units)
        if len(streamed) != int(out["unit_lengths"][i]):
            units = float("inf")
        else:
            units = max(units, float((out["unit_logits"][i, : len(streamed)] - streamed).abs().max()))
        tokens, positions = tokens + len(end.tokens) + 1, positions + len(streamed)
    return Difference(tokens, text, positions, units), ends
