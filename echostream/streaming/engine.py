"""The logic of one stream, without a model: what happens at each decision on the audio clock.

``Engine.decide`` is a generator. It yields requests (see ``stages``), is sent their answers, and returns events;
whoever drives it may serve many streams at once. In order, at every decision:

1. Encode: the new features become encoder frames and, of each, the best symbol of both CTC heads.
2. Where does the current sentence end, if it does? By the segmenter, or with the stream, or at the maximum length.
3. Extend: the decoders see the sentence's new frames. A sentence found to end at frame f sees ``tail_frames`` more at
   most, so that it never reads far into the next one.
4. Write text: as much as the policy allows, or, at a sentence's end, up to ``</s>``, by beam search if so set.
5. Write units, then speech, likewise.
6. At an end: the vocoder is flushed, the sentence given out whole, and the next one begins at the frame of the old
   one's last CTC token. The decoders see the frames from there on again, from a buffer of recent frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from echostream.config import EchoStreamConfig
from echostream.constants import BLANK, NUM_SPECIALS
from echostream.streaming.events import Event, SentenceEnd, SourceText
from echostream.streaming.policies.base import Policy
from echostream.streaming.segmenters.base import AudioMemory, CTCToken, Segmenter
from echostream.streaming.sentence import FRAME_S, Sentence
from echostream.streaming.settings import Settings
from echostream.streaming.stages import Encode, EncoderOutput, Extend, NewSentence
from echostream.streaming.writing import Work, Writer, joined
from echostream.text import Vocabulary


@dataclass
class EngineState:
    """State of one stream behind the features.

    Attributes:
        frames: encoder frames so far.
        recent: [K, D] the last K of them, all that no sentence has seen yet among them.
        source_symbol, target_symbol: last raw symbols of the two CTC heads.
        sentence: the current one; None before the first decision.
        audio: what the segmenter remembers of the sound; None before the first decision.
    """

    frames: int = 0
    recent: np.ndarray | None = None
    source_symbol: int = BLANK
    target_symbol: int = BLANK
    sentence: Sentence | None = None
    audio: AudioMemory | None = None

    @property
    def underway(self) -> tuple[Sentence, np.ndarray, AudioMemory]:
        """``sentence``, ``recent`` and ``audio`` of a stream about which there has been a decision."""
        assert self.sentence is not None and self.recent is not None and self.audio is not None
        return self.sentence, self.recent, self.audio


class End(NamedTuple):
    """The end of a sentence: it sees the frames before ``visible``; its last ST CTC token came at frame ``last``."""

    visible: int
    last: int
    reason: str


class Engine:
    """Decides what to write; one engine serves any number of streams.

    Args:
        config: the model's.
        source_dict, target_dict: its dictionaries.
        policy, segmenter, settings: how to translate.
        sample_rate: of the vocoder; None without one.

    Raises:
        ConfigError: the settings do not fit the model.
    """

    def __init__(
        self,
        config: EchoStreamConfig,
        source_dict: Vocabulary,
        target_dict: Vocabulary,
        policy: Policy,
        segmenter: Segmenter,
        settings: Settings,
        sample_rate: int | None,
    ):
        self.config, self.source_dict, self.target_dict = config, source_dict, target_dict
        self.policy, self.segmenter, self.settings = policy, segmenter, settings
        self.sample_rate = sample_rate if settings.speech else None
        self.units_read_text = config.units_read_text
        self.max_frames = min(settings.max_sentence_frames or config.max_sentence_frames, config.max_sentence_frames)
        # A forced end must leave the next sentence room to grow before it, too, is full.
        self.lookback = min(settings.lookback_frames, self.max_frames // 2)
        self.writer = Writer(config, source_dict, target_dict, policy, settings, self.sample_rate)

    # ---- one decision ------------------------------------------------------------------------------------------

    def decide(
        self, stream: EngineState, features: np.ndarray, finished: bool, now: float, samples: np.ndarray | None = None
    ) -> Work:
        """Take what has been heard since the last decision and write what can be written.

        Args:
            stream: its state; changed.
            features: float32 [T, 80], normalised.
            finished: the stream ends here.
            now: the audio clock, in seconds.
            samples: float32 [N] at 16 kHz, the sound itself, for a segmenter that listens.

        Returns:
            The events, as the generator's value.
        """
        if stream.audio is None:
            stream.audio = self.segmenter.init_audio()
        if self.segmenter.listens and samples is not None:
            stream.audio = self.segmenter.hear(samples, stream.audio)
        heard = yield Encode(features, finished)
        if stream.sentence is None:
            yield NewSentence()
            stream.recent = recent = heard.frames[:0].copy()
            stream.sentence = self._new_sentence(0, 0, recent)
        self._take(stream, heard)
        events: list[Event] = []
        while True:
            sentence, recent, _ = stream.underway
            self._begin(stream, finished)
            if not sentence.begun:
                break
            end = self._find_end(stream, finished)
            closes = end is not None
            yield from self._extend(stream, stream.frames if end is None else end.visible)
            events += self._give_source(sentence, closes, now)
            events += yield from self.writer.text(sentence, closes, now)
            events += yield from self.writer.speech(sentence, closes, now)
            if end is None:
                break
            events.append(self._close(sentence, end.reason, now))
            yield from self._start_next(stream, end)
        stream.recent = recent[-self.lookback :].copy()
        return events

    def _new_sentence(self, index: int, start: int, like: np.ndarray) -> Sentence:
        width = self.config.mt_decoder_embed_dim if self.units_read_text else self.config.encoder_embed_dim
        return Sentence(index, start, self.policy.initial(), np.zeros((0, width), dtype=like.dtype))

    def _take(self, stream: EngineState, heard: EncoderOutput) -> None:
        """Append new frames and collapse both heads' symbols: repeats merged, blanks dropped (greedy CTC)."""
        sentence, recent, audio = stream.underway
        source: list[CTCToken] = []
        target: list[CTCToken] = []
        for symbols, last, found in (
            (heard.source, stream.source_symbol, source),
            (heard.target, stream.target_symbol, target),
        ):
            for frame, symbol in enumerate(symbols.tolist(), stream.frames):
                if symbol != last and symbol >= NUM_SPECIALS and self.segmenter.voiced(frame, audio):
                    found.append(CTCToken(symbol, frame))
                last = symbol
        if len(heard.frames):
            stream.source_symbol, stream.target_symbol = int(heard.source[-1]), int(heard.target[-1])
            stream.recent = np.concatenate([recent, heard.frames])
            stream.frames += len(heard.frames)
        sentence.source += tuple(source)
        sentence.target += tuple(target)
        self._drop_leading_marks(sentence)

    def _drop_leading_marks(self, sentence: Sentence) -> None:
        """A sentence does not open with the mark that closes one: it is an echo of the sentence before."""
        for name, vocabulary in (("source", self.source_dict), ("target", self.target_dict)):
            tokens = getattr(sentence, name)
            while tokens and vocabulary.ends_sentence(tokens[0].token) and not vocabulary.has_letters(tokens[0].token):
                tokens = tokens[1:]
            setattr(sentence, name, tokens)

    def _find_end(self, stream: EngineState, finished: bool) -> End | None:
        """Where and why the current sentence ends; None while it goes on."""
        sentence, _, audio = stream.underway
        limit = sentence.start + self.max_frames
        ending = self.segmenter.find(sentence.source, sentence.target, stream.frames, audio)
        if ending is not None and ending.place < limit:
            if ending.closing is not None:
                visible = min(ending.closing + 1 + self.settings.tail_frames, stream.frames, limit)
                return End(visible, ending.closing, ending.reason)
            visible = min(ending.place + 1, stream.frames, limit)
            return End(visible, _last_token(sentence.target, visible), ending.reason)
        if stream.frames < limit and not finished:
            return None
        visible = min(stream.frames, limit)
        reason = "length" if stream.frames > limit or not finished else "finish"
        return End(visible, _last_token(sentence.target, visible), reason)

    def _begin(self, stream: EngineState, finished: bool) -> None:
        """Begin the sentence once there is something to translate; until then it starts no earlier than the lookback.

        The ST head decides. At the end of a stream the first sentence also begins if only the ASR head has heard words:
        a weak ST head should not silence a whole recording. Where only the source is written, ASR words are enough.
        """
        sentence, recent, _ = stream.underway
        if sentence.begun:
            return
        enough = not self.settings.text or (finished and sentence.index == 0)
        if sentence.target or (enough and sentence.source):
            sentence.begun = True
        first = sentence.target[0].frame if sentence.target else stream.frames
        earliest = max(first - self.lookback, stream.frames - len(recent))
        if sentence.start < earliest:
            sentence.start = sentence.extended = earliest

    def _extend(self, stream: EngineState, visible: int) -> Work:
        sentence, recent, _ = stream.underway
        if visible <= sentence.extended:
            return
        begin = sentence.extended - stream.frames + len(recent)
        frames = recent[begin : begin + visible - sentence.extended]
        sentence.extended = visible
        if not self.settings.text:
            return
        yield Extend(frames)
        if not self.units_read_text:
            sentence.inputs = np.concatenate([sentence.inputs, frames])

    def _give_source(self, sentence: Sentence, closes: bool, now: float) -> list[Event]:
        source = sentence.visible_source()
        new = source[sentence.source_given :]
        if not (new or (closes and source)):
            return []
        sentence.source_given = len(source)
        text = self.source_dict.detokenize(source)
        return [SourceText(sentence=sentence.index, source_time_s=now, tokens=tuple(new), text=text, final=closes)]

    # ---- from one sentence to the next -------------------------------------------------------------------------

    def _close(self, sentence: Sentence, reason: str, now: float) -> SentenceEnd:
        waveform = np.concatenate(sentence.samples) if sentence.samples else np.zeros(0, dtype=np.float32)
        heard = [s.frame for s in (*sentence.source, *sentence.target) if s.frame < sentence.extended]
        return SentenceEnd(
            sentence=sentence.index,
            source_time_s=now,
            reason=reason,
            source_text=self.source_dict.detokenize(sentence.visible_source()),
            text=joined(self.target_dict, sentence.tokens),
            tokens=tuple(sentence.tokens),
            frames=tuple(sentence.frames),
            units=tuple(sentence.units),
            waveform=waveform,
            sample_rate=self.sample_rate or 0,
            start_s=sentence.start * FRAME_S,
            end_s=sentence.extended * FRAME_S,
            first_heard_s=min(heard, default=sentence.start) * FRAME_S,
            last_heard_s=max(heard, default=sentence.extended) * FRAME_S,
            lag=sentence.lag(),
        )

    def _start_next(self, stream: EngineState, end: End) -> Work:
        old, recent, _ = stream.underway
        start = max(end.last, end.visible - self.lookback, stream.frames - len(recent))
        new = self._new_sentence(old.index + 1, start, recent)
        new.target = tuple(s for s in old.target if s.frame > end.last)
        new.source = tuple(s for s in old.source if s.frame >= old.extended)
        stream.sentence = new
        self._drop_leading_marks(new)
        yield NewSentence()


def _last_token(tokens: tuple[CTCToken, ...], before: int) -> int:
    """The frame of the last of ``tokens`` that came before frame ``before``."""
    return max((s.frame for s in tokens if s.frame < before), default=before - 1)
