"""What is written of a sentence at one decision: target text, units and speech, as requests to the model.

Text is drafted while the sentence goes on, as far as the policy allows, and finished once its end is known, by greedy
or by beam search. The unit decoder and the vocoder follow the text, as far behind as the policy says.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from echostream.config import EchoStreamConfig
from echostream.constants import BOS, EOS, NUM_SPECIALS, PAD
from echostream.errors import ConfigError
from echostream.streaming.events import Event, TargetText, TargetUnits, Waveform
from echostream.streaming.policies.base import Draft, Policy, Progress
from echostream.streaming.sentence import FRAME_S, Sentence
from echostream.streaming.settings import Settings
from echostream.streaming.stages import ReadUnits, Request, Rewind, Search, Vocode, Write
from echostream.text import WORD_START, Vocabulary

Work = Generator[Request, Any, Any]

# A sentence may hold this many target subwords, and this many more per second of source it can see: no speaker needs
# more, and a decoder that has lost its way stops.
BASE_TOKENS, TOKENS_PER_SECOND = 16, 12
# The same run of subwords this often in a row, covering this many, is a decoder going round in circles.
LOOP_COPIES, LOOP_TOKENS, LONGEST_LOOP = 3, 9, 8


class Committed(NamedTuple):
    """Tokens to commit, and the MT decoder's states that they come from; at a sentence's end that of ``</s>``."""

    tokens: list[int]
    states: list[np.ndarray]


class Writer:
    """Writes the sentences of any number of streams.

    Args:
        sample_rate: of the vocoder; None without one.
        others: as for ``Engine``.

    Raises:
        ConfigError: the policy reads attention that the MT decoder does not have.
    """

    def __init__(
        self,
        config: EchoStreamConfig,
        source_dict: Vocabulary,
        target_dict: Vocabulary,
        policy: Policy,
        settings: Settings,
        sample_rate: int | None,
    ):
        self.config, self.source_dict, self.target_dict = config, source_dict, target_dict
        self.policy, self.settings, self.sample_rate = policy, settings, sample_rate
        self.units_read_text = config.units_read_text
        self.attention_heads = single_heads(policy.attention_heads, config)

    def progress(self, sentence: Sentence) -> Progress:
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

    # ---- text --------------------------------------------------------------------------------------------------

    def text(self, sentence: Sentence, closes: bool, now: float) -> Work:
        """Write target text; ``closes``: the sentence's end is known. The events, as the generator's value."""
        if not self.settings.text:
            return []
        room = min(self.config.max_target_tokens - 1, BASE_TOKENS + int(TOKENS_PER_SECOND * sentence.visible * FRAME_S))
        tokens, states = yield from (self._finish if closes else self._draft)(sentence, room)
        if self.units_read_text and states:
            sentence.inputs = np.concatenate([sentence.inputs, np.stack(states)])
        return [self._commit(sentence, tokens, now)] if tokens else []

    def _draft(self, sentence: Sentence, room: int) -> Work:
        """``Committed`` as far as the policy allows, of at most ``room`` tokens in the sentence.

        A word is known to be whole when the token after it starts another one: one token more than allowed is drafted
        to see that. (``</s>`` does not tell: with half of the source in view, so does a decoder that has closed the
        sentence too early, full stop included.) What is drafted but not committed is forgotten and written anew later,
        with more of the source in view.
        """
        before, vocabulary, words = tuple(sentence.tokens), self.target_dict, self.settings.whole_words
        progress = self.progress(sentence)
        allowed, sentence.memory = self.policy.text(progress, sentence.memory)
        wanted = min(allowed, room) - len(before)
        if wanted <= 0:
            return Committed([], [])
        last = before[-1] if before else EOS
        draft: list[int] = []
        states: list[np.ndarray] = []
        places: list[int] = []  # where the draft may be cut
        begun = repeated = 0  # words in it, tokens that only go round in circles
        while len(draft) < wanted + words and not repeated:
            answer = yield Write(draft[-1] if draft else last, self.attention_heads)
            token = best_token(answer.scores)
            states.append(answer.hidden)
            if token == EOS:
                break
            starts = vocabulary.starts_word(token)
            if words and starts:
                places.append(len(draft))
            if self.policy.stops(progress, Draft(before, (*draft, token), begun + starts, answer.attention)):
                break
            draft.append(token)
            begun += starts
            if not words:
                places.append(len(draft))
            repeated = loop_length([*before, *draft])
        agreed, sentence.memory = self.policy.settle(progress, Draft(before, tuple(draft), begun), sentence.memory)
        most = min(wanted, len(draft) - repeated, agreed)
        keep = max((place for place in places if place <= most), default=0)
        if len(states) != keep:
            yield Rewind(len(before) + keep)
        return Committed(draft[:keep], states[:keep])

    def _finish(self, sentence: Sentence, room: int) -> Work:
        """``Committed`` to the sentence's end, of ``room`` tokens at most: greedily, or by beam search if so set."""
        before = sentence.tokens
        wanted = max(0, room - len(before))
        last = before[-1] if before else EOS
        draft: list[int] = []
        states: list[np.ndarray] = []
        repeated = 0
        chosen = iter((yield Search(last, self.settings.beam, wanted))) if self.settings.beam > 1 else None
        while not repeated:  # of a circle's repetitions nothing is kept; it is where the decoder must stop
            if chosen is not None:
                token, _, state = next(chosen)
            else:
                answer = yield Write(draft[-1] if draft else last)
                token, state = best_token(answer.scores), answer.hidden
            states.append(state)
            if token == EOS or len(draft) >= wanted:  # out of room: this position stands for </s>
                break
            draft.append(token)
            repeated = loop_length(before + draft)
        keep = max(0, len(draft) - repeated)  # the circle may have begun in what was committed
        return Committed(draft[:keep], states[: keep + 1])  # the state of </s> too, as in training

    def _commit(self, sentence: Sentence, tokens: list[int], now: float) -> TargetText:
        before = joined(self.target_dict, sentence.tokens)
        frames = [sentence.visible] * len(tokens)
        sentence.tokens += tokens
        sentence.frames += frames
        sentence.times += [now] * len(tokens)
        text = joined(self.target_dict, sentence.tokens)
        return TargetText(
            sentence=sentence.index,
            source_time_s=now,
            tokens=tuple(tokens),
            frames=tuple(frames),
            text=text[len(before) :],
            sentence_text=text,
        )

    # ---- units and speech --------------------------------------------------------------------------------------

    def speech(self, sentence: Sentence, closes: bool, now: float) -> Work:
        """Write units, and speak them. The events, as the generator's value."""
        if not self.settings.speech:
            sentence.inputs = sentence.inputs[:0]
            return []
        events: list[Event] = []
        new = yield from self._units(sentence, closes)
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
            return events
        samples = yield Vocode(np.asarray(new, dtype=np.int64), closes)
        if len(samples):
            if not sentence.samples:
                sentence.first_audio_s = now
            sentence.samples.append(samples)
            events.append(
                Waveform(sentence=sentence.index, source_time_s=now, samples=samples, sample_rate=self.sample_rate)
            )
        return events

    def _units(self, sentence: Sentence, closes: bool) -> Work:
        """The units of the inputs that the unit decoder may read now: repeats merged, blanks dropped."""
        ready = len(sentence.inputs)
        if not closes:
            ready = min(ready, self.policy.units(self.progress(sentence)) - sentence.inputs_read)
        if ready <= 0:
            return []
        symbols = yield ReadUnits(sentence.inputs[:ready], self._tokens_of(sentence, ready))
        sentence.inputs = sentence.inputs[ready:].copy()
        sentence.inputs_read += ready
        new: list[int] = []
        for symbol in symbols.tolist():
            if symbol != sentence.last_symbol and symbol >= NUM_SPECIALS:
                new.append(symbol - NUM_SPECIALS)
            sentence.last_symbol = symbol
        return new

    def _tokens_of(self, sentence: Sentence, count: int) -> np.ndarray | None:
        """The tokens of the next ``count`` MT states that the unit decoder reads; the last of a sentence is </s>'s."""
        if not self.units_read_text:
            return None
        read = sentence.inputs_read
        return np.array([*sentence.tokens, EOS][read : read + count], dtype=np.int64)


def single_heads(heads: Sequence[tuple[int, int | None]], config: EchoStreamConfig) -> tuple[tuple[int, int], ...]:
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
