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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generator, Iterator, NamedTuple

import numpy as np

from echostream.config import EchoStreamConfig
from echostream.constants import BLANK, BOS, EOS, NUM_SPECIALS, PAD
from echostream.errors import ConfigError
from echostream.loading import shown
from echostream.streaming.events import Event, SentenceEnd, SourceText, TargetText, TargetUnits, Waveform
from echostream.streaming.policy import Draft, Policy, Progress
from echostream.streaming.search import Chosen
from echostream.streaming.segmenters.base import AudioMemory, CTCToken, Segmenter
from echostream.streaming.sentence import FRAME_S, Sentence
from echostream.streaming.stages import Encode, Extend, NewSentence, ReadUnits, Request, Rewind, Search, Vocode, Write
from echostream.text import WORD_START, Vocabulary

Work = Generator[Request, Any, Any]

# A sentence may hold this many target subwords, and this many more per second of source it can see: no speaker needs
# more, and a decoder that has lost its way stops.
BASE_TOKENS, TOKENS_PER_SECOND = 16, 12
# The same run of subwords this often in a row, covering this many, is a decoder going round in circles.
LOOP_COPIES, LOOP_TOKENS, LONGEST_LOOP = 3, 9, 8


# Least and most of each number; the most of ``beam`` and ``chunk_ms`` bound what a decision costs.
LIMITS = {
    "chunk_ms": (10, 60_000),
    "tail_frames": (0, 1000),
    "lookback_frames": (1, 10_000),
    "beam": (1, 32),
    "max_sentence_frames": (25, 1 << 20),
}


@dataclass(frozen=True)
class Settings:
    """How a stream is translated.

    Attributes:
        chunk_ms: milliseconds of source audio from one decision to the next.
        whole_words: commit text, and so speech, in whole words only (until the sentence's end).
        speech: without, only text is written: neither the unit decoder nor the vocoder is run.
        text: without (and without ``speech``), only the source is written down: the MT decoder is not run either.
        max_sentence_frames: encoder frames (40 ms) after which a sentence is ended whatever it says; None: as many as
            the model's buffers hold. Rounded down to those.
        tail_frames: encoder frames behind its closing token that a sentence may see.
        beam: hypotheses of the beam search that finishes a sentence once its end is known; 1: greedy, as before it.
        lookback_frames: encoder frames kept for the next sentence: how far before the present it may begin, and how
            much of a pause before its first CTC token it sees.

    Raises:
        ConfigError: a value is out of range.
    """

    chunk_ms: int = 320
    whole_words: bool = True
    speech: bool = True
    text: bool = True
    max_sentence_frames: int | None = None
    tail_frames: int = 4
    lookback_frames: int = 125
    beam: int = 1

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is None and name == "max_sentence_frames":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {shown(value)}; it must be a whole number of at least {least}")
            if value > most:
                raise ConfigError(f"{name} is {shown(value)}; it must be at most {most}")
        for name in ("whole_words", "speech", "text"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}; it must be true or false")
        if self.speech and not self.text:
            raise ConfigError("speech is True, but text is False; speech is made from text")


@dataclass
class Stream:
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
        self.attention_heads = _single_heads(policy.attention_heads, config)

    # ---- one decision ------------------------------------------------------------------------------------------

    def decide(
        self, stream: Stream, features: np.ndarray, finished: bool, now: float, samples: np.ndarray | None = None
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
            stream.recent = heard.frames[:0].copy()
            stream.sentence = self._new_sentence(0, 0, stream.recent)
        self._take(stream, heard)
        events: list[Event] = []
        while True:
            sentence = stream.sentence
            self._begin(stream, finished)
            if not sentence.begun:
                break
            end = self._find_end(stream, finished)
            closes = end is not None
            yield from self._extend(stream, end.visible if closes else stream.frames)
            self._give_source(sentence, events, closes, now)
            yield from self._write_text(sentence, events, closes, now)
            yield from self._write_units(sentence, events, closes, now)
            if not closes:
                break
            events.append(self._close(sentence, end.reason, now))
            yield from self._start_next(stream, end)
        stream.recent = stream.recent[-self.lookback :].copy()
        return events

    def _new_sentence(self, index: int, start: int, like: np.ndarray) -> Sentence:
        width = self.config.mt_decoder_embed_dim if self.units_read_text else self.config.encoder_embed_dim
        return Sentence(index, start, self.policy.initial(), np.zeros((0, width), dtype=like.dtype))

    def _take(self, stream: Stream, heard: Any) -> None:
        """Append new frames and collapse both heads' symbols: repeats merged, blanks dropped (greedy CTC)."""
        sentence = stream.sentence
        source, target = [], []
        for symbols, last, found in (
            (heard.source, stream.source_symbol, source),
            (heard.target, stream.target_symbol, target),
        ):
            for frame, symbol in enumerate(symbols.tolist(), stream.frames):
                if symbol != last and symbol >= NUM_SPECIALS and self.segmenter.voiced(frame, stream.audio):
                    found.append(CTCToken(symbol, frame))
                last = symbol
        if len(heard.frames):
            stream.source_symbol, stream.target_symbol = int(heard.source[-1]), int(heard.target[-1])
            stream.recent = np.concatenate([stream.recent, heard.frames])
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

    def _find_end(self, stream: Stream, finished: bool) -> End | None:
        """Where and why the current sentence ends; None while it goes on."""
        sentence = stream.sentence
        limit = sentence.start + self.max_frames
        ending = self.segmenter.find(sentence.source, sentence.target, stream.frames, stream.audio)
        if ending is not None and ending.place < limit:
            if ending.closing is not None:
                visible = min(ending.closing + 1 + self.settings.tail_frames, stream.frames, limit)
                return End(visible, ending.closing, ending.reason)
            visible = min(ending.until, stream.frames, limit)
            return End(visible, _last_token(sentence.target, visible), ending.reason)
        if stream.frames < limit and not finished:
            return None
        visible = min(stream.frames, limit)
        reason = "length" if stream.frames > limit or not finished else "finish"
        return End(visible, _last_token(sentence.target, visible), reason)

    def _begin(self, stream: Stream, finished: bool) -> None:
        """Begin the sentence once there is something to translate; until then it starts no earlier than the lookback.

        The ST head decides. At the end of a stream the first sentence also begins if only the ASR head has heard words:
        a weak ST head should not silence a whole recording. Where only the source is written, ASR words are enough.
        """
        sentence = stream.sentence
        if sentence.begun:
            return
        enough = not self.settings.text or (finished and sentence.index == 0)
        if sentence.target or (enough and sentence.source):
            sentence.begun = True
        first = sentence.target[0].frame if sentence.target else stream.frames
        earliest = max(first - self.lookback, stream.frames - len(stream.recent))
        if sentence.start < earliest:
            sentence.start = sentence.extended = earliest

    def _extend(self, stream: Stream, visible: int) -> Work:
        sentence = stream.sentence
        if visible <= sentence.extended:
            return
        begin = sentence.extended - stream.frames + len(stream.recent)
        frames = stream.recent[begin : begin + visible - sentence.extended]
        sentence.extended = visible
        if not self.settings.text:
            return
        yield Extend(frames)
        if not self.units_read_text:
            sentence.inputs = np.concatenate([sentence.inputs, frames])

    # ---- writing -----------------------------------------------------------------------------------------------

    def _give_source(self, sentence: Sentence, events: list[Event], closes: bool, now: float) -> None:
        source = sentence.visible_source()
        if len(source) > sentence.source_given or (closes and source):
            events.append(
                SourceText(
                    sentence=sentence.index,
                    source_time_s=now,
                    tokens=tuple(source[sentence.source_given :]),
                    text=self.source_dict.detokenize(source),
                    final=closes,
                )
            )
            sentence.source_given = len(source)

    def _progress(self, sentence: Sentence) -> Progress:
        first = min(spoken[0].frame for spoken in (sentence.source, sentence.target) if spoken)
        begun = sum(self.source_dict.starts_word(s.token) for s in sentence.source)
        return Progress(
            frames=sentence.visible,
            source_tokens=len(sentence.source),
            target_tokens=len(sentence.target),
            target_token_frames=tuple(s.frame - sentence.start for s in sentence.target),
            written=len(sentence.tokens),
            units_read_text=self.units_read_text,
            source_words=max(0, begun - 1),
            first_frame=max(0, first - sentence.start),
            written_words=sum(self.target_dict.starts_word(token) for token in sentence.tokens),
        )

    def _write_text(self, sentence: Sentence, events: list[Event], closes: bool, now: float) -> Work:
        """Draft tokens with the MT decoder and commit what may be committed.

        A word is known to be whole when the token after it starts another one: one token more than allowed is drafted
        to see that. (``</s>`` does not tell: with half of the source in view, so does a decoder that has closed the
        sentence too early, full stop included.) What is drafted but not committed is forgotten and written anew later,
        with more of the source in view. Once the sentence's end is known nothing is: then a beam search may look
        for the best way to finish it.
        """
        if not self.settings.text:
            return
        committed, vocabulary = len(sentence.tokens), self.target_dict
        room = min(self.config.max_target_tokens - 1, BASE_TOKENS + int(TOKENS_PER_SECOND * sentence.visible * FRAME_S))
        progress = None if closes else self._progress(sentence)
        if closes:
            allowed = room
        else:
            allowed, sentence.memory = self.policy.text(progress, sentence.memory)
            allowed = min(allowed, room)
        wanted = allowed - committed
        if wanted <= 0 and not closes:
            return
        words = self.settings.whole_words and not closes
        heads = () if closes else self.attention_heads
        before = tuple(sentence.tokens)
        draft: list[int] = []
        hidden: list[np.ndarray] = []
        places: list[int] = []  # where the draft may be cut
        starts, looped, ended = 0, 0, False
        last = before[-1] if before else EOS
        found: Iterator[Chosen] | None = None
        if closes and self.settings.beam > 1:
            found = iter((yield Search(last, self.settings.beam, max(0, wanted))))
        while closes or len(draft) < wanted + words:
            if found is not None:
                token, _, state = next(found)
                looked = None
            else:
                written = yield Write(draft[-1] if draft else last, heads)
                token, state, looked = best_token(written.scores), written.hidden, written.attention
            hidden.append(state)
            if token == EOS or (closes and len(draft) >= wanted):
                # Out of room at a sentence's end: this position stands for </s>.
                ended = closes
                break
            if words and vocabulary.starts_word(token):
                places.append(len(draft))
            starts += vocabulary.starts_word(token)
            drafted = Draft(before, (*draft, token), starts, looked)
            if not closes and self.policy.stops(progress, drafted):
                starts -= vocabulary.starts_word(token)
                break
            draft.append(token)
            if not words:
                places.append(len(draft))
            looped = loop_length(sentence.tokens + draft)
            if looped:
                # Nothing of the circle's repetitions is kept; it is where the decoder must stop.
                ended = closes
                break
        most = min(wanted, len(draft) - looped)
        if not closes:
            settled = Draft(before, tuple(draft), starts)
            agreed, sentence.memory = self.policy.settle(progress, settled, sentence.memory)
            most = min(most, agreed)
        keep = max((place for place in places if place <= most), default=0)
        if len(hidden) != keep and not closes:
            yield Rewind(committed + keep)
        if self.units_read_text:
            states = hidden[: keep + ended]  # at the end the state of </s> too, as in training
            if states:
                sentence.inputs = np.concatenate([sentence.inputs, np.stack(states)])
        if keep == 0:
            return
        new = draft[:keep]
        text_before = joined(vocabulary, sentence.tokens)
        sentence.tokens += new
        sentence.frames += [sentence.visible] * keep
        sentence.times += [now] * keep
        text = joined(vocabulary, sentence.tokens)
        events.append(
            TargetText(
                sentence=sentence.index,
                source_time_s=now,
                tokens=tuple(new),
                frames=(sentence.visible,) * keep,
                text=text[len(text_before) :],
                sentence_text=text,
            )
        )

    def _write_units(self, sentence: Sentence, events: list[Event], closes: bool, now: float) -> Work:
        if not self.settings.speech:
            sentence.inputs = sentence.inputs[:0]
            return
        ready = len(sentence.inputs)
        if not closes:
            ready = min(ready, self.policy.units(self._progress(sentence)) - sentence.inputs_read)
        new: list[int] = []
        if ready > 0:
            symbols = yield ReadUnits(sentence.inputs[:ready], self._written(sentence, ready))
            sentence.inputs = sentence.inputs[ready:].copy()
            sentence.inputs_read += ready
            for symbol in symbols.tolist():
                if symbol != sentence.last_symbol and symbol >= NUM_SPECIALS:
                    new.append(symbol - NUM_SPECIALS)
                sentence.last_symbol = symbol
        if new:
            sentence.units += new
            events.append(
                TargetUnits(
                    sentence=sentence.index,
                    source_time_s=now,
                    units=tuple(new),
                    frames=sentence.visible,
                    inputs=sentence.inputs_read,
                )
            )
        if self.sample_rate is None or not sentence.units or not (new or closes):
            return
        samples = yield Vocode(np.asarray(new, dtype=np.int64), closes)
        if len(samples):
            if not sentence.samples:
                sentence.first_audio_s = now
            sentence.samples.append(samples)
            events.append(
                Waveform(sentence=sentence.index, source_time_s=now, samples=samples, sample_rate=self.sample_rate)
            )

    def _written(self, sentence: Sentence, count: int) -> np.ndarray | None:
        """The tokens of the next ``count`` MT states that the unit decoder reads; the last of a sentence is </s>'s."""
        if not self.units_read_text:
            return None
        read = sentence.inputs_read
        return np.array([*sentence.tokens, EOS][read : read + count], dtype=np.int64)

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

    def _start_next(self, stream: Stream, end: End) -> Work:
        old = stream.sentence
        start = max(end.last, end.visible - self.lookback, stream.frames - len(stream.recent))
        new = self._new_sentence(old.index + 1, start, stream.recent)
        new.target = tuple(s for s in old.target if s.frame > end.last)
        new.source = tuple(s for s in old.source if s.frame >= old.extended)
        stream.sentence = new
        self._drop_leading_marks(new)
        yield NewSentence()


def _single_heads(heads: Sequence[tuple[int, int | None]], config: EchoStreamConfig) -> tuple[tuple[int, int], ...]:
    """Heads as (layer from 0, head), a whole layer as all of its heads.

    Raises:
        ConfigError: the MT decoder has no such layer or head.
    """
    layers, count = config.mt_decoder_layers, config.mt_decoder_heads
    found: list[tuple[int, int]] = []
    for layer, head in heads:
        if not -layers <= layer < layers:
            raise ConfigError(f"the policy reads attention of layer {layer}, but the MT decoder has {layers} layers")
        if head is not None and head >= count:
            raise ConfigError(f"the policy reads attention of head {head}, but the MT decoder has {count} a layer")
        found += [(layer % layers, h) for h in (range(count) if head is None else (head,))]
    return tuple(found)


def _last_token(tokens: tuple[CTCToken, ...], before: int) -> int:
    """The frame of the last of ``tokens`` that came before frame ``before``."""
    return max((s.frame for s in tokens if s.frame < before), default=before - 1)


def best_token(scores: np.ndarray) -> int:
    """The best token of scores [V]; ``<s>`` and padding are none."""
    scores = scores.copy()
    scores[[BOS, PAD]] = -np.inf
    return int(scores.argmax())


def loop_length(tokens: list[int]) -> int:
    """If ``tokens`` end in a circle (see ``LOOP_COPIES``): how many tokens at their end are repetitions, else 0."""
    for period in range(1, LONGEST_LOOP + 1):
        copies = max(LOOP_COPIES, -(-LOOP_TOKENS // period))
        span = copies * period
        if len(tokens) >= span and all(tokens[-i] == tokens[-i - period] for i in range(1, span - period + 1)):
            return span - period
    return 0


def joined(vocabulary: Vocabulary, tokens: list[int]) -> str:
    """Text of a sentence's subwords as far as written; a longer sentence's text begins with it."""
    return "".join(vocabulary[t] for t in tokens if t >= NUM_SPECIALS).replace(WORD_START, " ").lstrip()
