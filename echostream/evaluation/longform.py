"""Long form: whole talks, unsegmented, translated in one session and scored against the talk's own sentences.

A directory of talks holds the recordings, ``segments.yaml`` (a list of ``{wav, offset, duration}`` in seconds, in
order), and ``references.txt`` and ``sources.txt`` with a line for each segment: the layout of the IWSLT and MuST-C test
sets, which OmniSTEval reads as it stands. ``make_talks`` joins one from the sentences of a manifest.

What a session says of a talk is one run of words. To be scored it is cut anew at the reference's sentences, by

* ``omnisteval``: SoftSegmenter (Polák et al., 2025, arXiv 2509.17349), a maintained package (extra ``longform``); or
* ``levenshtein``: each word goes where the reference word goes that it is aligned with when as few words as possible
  are inserted, left out and replaced (Matusov et al., 2005; mwerSegmenter). Words inserted go with the word before.

Sentence ends are scored by F1 on the same Levenshtein alignment: see ``boundary_places`` and ``f1``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echostream.errors import EchoStreamError, require
from echostream.evaluation import quality
from echostream.evaluation.latency import length_adaptive_average_lagging
from echostream.evaluation.talks import Span, Talk

RESEGMENTERS = ("omnisteval", "levenshtein")
# A sentence end counts as right so far from the true one: in words of the reference, and in seconds of source.
TOLERANCE_WORDS, TOLERANCE_S = 1, 0.5


@dataclass(frozen=True)
class Aligned:
    """What a talk's words say of one reference sentence: their text, and their delays, ms from its start.

    ``elapsed`` are the delays, computation-aware, where these were measured.
    """

    text: str
    delays: tuple[float, ...]
    elapsed: tuple[float, ...] = ()


# ---- alignment -----------------------------------------------------------------------------------------------------


def align(words: Sequence[str], references: Sequence[str]) -> list[int | None]:
    """Which reference word each word stands for (as many words right as possible); None for a word too many.

    Words are compared without case and punctuation.
    """
    levenshtein = require("rapidfuzz.distance", "simuleval").Levenshtein
    places: list[int | None] = [None] * len(words)
    for code in levenshtein.opcodes(_keys(words), _keys(references)):
        if code.tag in ("equal", "replace"):
            for i in range(code.src_end - code.src_start):
                places[code.src_start + i] = code.dest_start + i
    return places


def _keys(words: Sequence[str]) -> list[str]:
    return [quality.spoken_form(word, numbers=False).replace(" ", "") or word for word in words]


def boundary_places(ends: Sequence[int], places: Sequence[int | None], length: int) -> list[Span]:
    """Where in the reference sentences end that end after so many words: as (earliest, latest) counts of its words.

    The end lies behind the reference word of the last aligned word before it, and not behind the first aligned word
    after it; where the translation left words out between these, the alignment cannot tell, and any place will do.

    Args:
        ends: numbers of words, rising; an end behind the last word is no boundary and left out.
        places: of ``align``.
        length: words of the reference.
    """
    spans = []
    for end in ends:
        if 0 < end < len(places):
            before = next((p for p in reversed(places[:end]) if p is not None), -1)
            after = next((p for p in places[end:] if p is not None), length)
            spans.append((before + 1, after))
    return spans


def matches(found: Sequence[Span], true: Sequence[float], tolerance: float) -> int:
    """How many true places are met by a span (rising, widened by ``tolerance``), each by one of its own."""
    count, i, j = 0, 0, 0
    while i < len(found) and j < len(true):
        earliest, latest = found[i][0] - tolerance, found[i][1] + tolerance
        if earliest <= true[j] <= latest:
            count, i, j = count + 1, i + 1, j + 1
        elif latest < true[j]:
            i += 1
        else:
            j += 1
    return count


def f1(correct: int, found: int, true: int) -> dict[str, float]:
    """Precision, recall and their harmonic mean; 0 where there is nothing."""
    precision, recall = correct / max(1, found), correct / max(1, true)
    return {"precision": precision, "recall": recall, "f1": 2 * correct / max(1, found + true)}


# ---- resegmentation ------------------------------------------------------------------------------------------------


def resegment(
    talk: Talk, words: Sequence[str], delays: Sequence[float], elapsed: Sequence[float] = ()
) -> list[Aligned]:
    """Cut a talk's words at the reference's sentences, by ``levenshtein``.

    Args:
        words, delays: the words, and when each was given out, ms from the talk's start.
        elapsed: the delays, computation-aware.
    """
    counts = [len(reference.split()) for reference in talk.references]
    sentence_of = np.repeat(np.arange(len(counts)), counts)
    chosen: list[list[int]] = [[] for _ in counts]
    sentence = 0
    for i, place in enumerate(align(words, " ".join(talk.references).split())):
        if place is not None:
            sentence = int(sentence_of[place])
        chosen[sentence].append(i)
    return [
        Aligned(
            " ".join(words[i] for i in picked),
            *(tuple(times[i] - 1000 * s.offset for i in picked if len(times)) for times in (delays, elapsed)),
        )
        for picked, s in zip(chosen, talk.segments, strict=True)
    ]


def resegment_softly(
    talks: Sequence[Talk],
    words: Sequence[Sequence[str]],
    delays: Sequence[Sequence[float]],
    lang: str,
    elapsed: Sequence[Sequence[float]] | None = None,
) -> tuple[list[list[Aligned]], dict[str, float]]:
    """The same by OmniSTEval 0.1.10, which also knows LongYAAL (Polák et al., 2025).

    Args:
        lang: of the words, for Moses' tokenizer (it needs perl); zh, ja and none have no need of it.
        elapsed: the delays, computation-aware.

    Returns:
        What each reference sentence got, and ``LongYAAL``; with ``elapsed`` also ``LongYAAL_CA``.

    Raises:
        MissingExtraError: OmniSTEval is not installed.
    """
    omnisteval = require("omnisteval", "longform")
    if lang and lang not in ("zh", "ja"):
        require("mosestokenizer", "longform")
    segmentation, references, reference_words = [], [], []
    for talk in talks:
        end = 1000 * talk.seconds
        reference_words.append([])
        for s in talk.segments:
            offset, number = 1000 * s.offset, len(references)
            reference_words[-1] += [
                omnisteval.Word(word, emission_cu=offset, seq_id=number) for word in s.reference.lower().split()
            ]
            references.append(s.reference)
            segmentation.append(
                {"offset": offset, "duration": 1000 * s.duration, "time_to_recording_end": end - offset}
            )
    times = zip(words, delays, elapsed or [[None] * len(d) for d in delays], strict=True)
    spoken = [
        [omnisteval.Word(word, emission_cu=cu, emission_ca=ca) for word, cu, ca in zip(*talk, strict=True)]
        for talk in times
    ]
    instances, _ = omnisteval.resegment(reference_words, spoken, segmentation, references, lang=lang or None)
    found = iter(Aligned(i.prediction, tuple(i.emission_cu or ()), tuple(i.emission_ca or ())) for i in instances)
    aligned = [[next(found) for _ in talk.segments] for talk in talks]
    figures = {"LongYAAL": omnisteval.YAALScorer(is_longform=True)(instances)}
    if elapsed:
        figures["LongYAAL_CA"] = omnisteval.YAALScorer(computation_aware=True, is_longform=True)(instances)
    return aligned, figures


# ---- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TalkOutput:
    """What was made of a talk.

    Attributes:
        words, delays: the words, and when each was written, ms from the talk's start.
        ends: of each sentence the session ended: how many words there are up to there, and at what second it was heard.
        isolated: the translation of each sentence's recording alone.
        heard: when a player of the speech had said each word, ms; without speech none.
        elapsed, heard_elapsed: ``delays`` and ``heard``, computation-aware; none where that was not measured.
    """

    words: list[str]
    delays: list[float]
    ends: list[tuple[int, float]]
    isolated: list[str]
    heard: list[float] | None = None
    elapsed: list[float] | None = None
    heard_elapsed: list[float] | None = None


def choose_resegmenter(name: str) -> str:
    """``auto`` is OmniSTEval where it is installed.

    Raises:
        EchoStreamError: there is no such resegmenter.
    """
    if name == "auto":
        there = all(importlib.util.find_spec(name) for name in ("omnisteval", "mosestokenizer"))
        return RESEGMENTERS[not there]
    if name not in RESEGMENTERS:
        raise EchoStreamError(f"resegmenter {name!r} is unknown; choose auto, {' or '.join(RESEGMENTERS)}")
    return name


def score(
    talks: Sequence[Talk],
    spoken: Sequence[TalkOutput],
    resegmenter: str = "auto",
    lang: str = "en",
    tolerance_words: float = TOLERANCE_WORDS,
    tolerance_s: float = TOLERANCE_S,
) -> dict[str, float | str]:
    """Boundary F1, BLEU of the talks and of their sentences alone, and latency.

    Returns:
        ``boundary_*``: precision, recall and F1 of sentence ends inside the talks, by words (see ``boundary_places``).
        ``boundary_f1_ceiling``: the F1 by words of the sentences translated alone, whose ends are known; a weak
        translation aligns badly, and a segmenter can hardly reach more. ``boundary_time_*``: by the clock, the time of
        a sentence's last CTC token against the end of its recording. ``BLEU``, ``isolated_BLEU``, and the first as a
        ``share`` of the second. ``StreamLAAL`` (Papi et al., 2024, arXiv 2406.06097), ms: LAAL of each reference
        sentence with words, from its own start. With OmniSTEval ``LongYAAL``, ms. Where it was measured these again
        with ``_CA``, computation-aware, and with ``_speech``, of words heard; then also ``speech_behind``, ms that a
        word is heard after it was written, and ``speech_behind_end``, the same of the last tenth of each talk, which
        tells whether delay adds up.

    Raises:
        EchoStreamError: the resegmenter is unknown. MissingExtraError: it is not installed.
    """
    resegmenter = choose_resegmenter(resegmenter)
    aligned, latencies = _latencies(talks, spoken, "delays", "elapsed", resegmenter, lang)
    if all(s.heard is not None for s in spoken):
        _, heard = _latencies(talks, spoken, "heard", "heard_elapsed", resegmenter, lang)
        for name, value in heard.items():
            measure, aware, _ = name.partition("_CA")
            latencies[f"{measure}_speech{aware}"] = value
        behind = [np.subtract(s.heard, s.delays) for s in spoken if s.words]
        latencies["speech_behind"] = float(np.mean(np.concatenate(behind))) if behind else float("nan")
        last = [lag[-max(1, len(lag) // 10) :] for lag in behind]
        latencies["speech_behind_end"] = float(np.mean(np.concatenate(last))) if last else float("nan")
    totals = np.zeros((3, 3), dtype=np.int64)  # by words, by the clock, ceiling: right, found, true
    for talk, said in zip(talks, spoken, strict=True):
        times = [segment.offset + segment.duration for segment in talk.segments[:-1]]
        heard = [(second, second) for end, second in said.ends if end < len(said.words)]
        alone = [text.split() for text in said.isolated]
        totals += (
            _ends_by_words(talk, said.words, [end for end, _ in said.ends], tolerance_words),
            (matches(heard, times, tolerance_s), len(heard), len(times)),
            _ends_by_words(talk, sum(alone, []), np.cumsum([len(words) for words in alone]).tolist(), tolerance_words),
        )
    references = [reference for talk in talks for reference in talk.references]
    tokenizer = quality.tokenizer_for(lang)
    bleu = quality.bleu([part.text for parts in aligned for part in parts], references, tokenizer)
    isolated = quality.bleu([text for said in spoken for text in said.isolated], references, tokenizer)
    by_words, by_time, ceiling = totals.tolist()
    return {
        **{f"boundary_{name}": value for name, value in f1(*by_words).items()},
        "boundary_f1_ceiling": f1(*ceiling)["f1"],
        **{f"boundary_time_{name}": value for name, value in f1(*by_time).items()},
        "sentences_found": by_time[1] + len(talks),
        "sentences": by_time[2] + len(talks),
        "BLEU": bleu,
        "isolated_BLEU": isolated,
        "share": bleu / isolated if isolated else float("nan"),
        **latencies,
        "resegmenter": resegmenter,
    }


def _latencies(
    talks: Sequence[Talk], spoken: Sequence[TalkOutput], plain: str, aware: str, resegmenter: str, lang: str
) -> tuple[list[list[Aligned]], dict[str, float]]:
    """What each sentence got by the delays ``plain``, and its latencies; with ``_CA`` by ``aware``, if all have it."""
    words, delays = [s.words for s in spoken], [getattr(s, plain) for s in spoken]
    elapsed = [getattr(s, aware) for s in spoken]
    measured = all(times is not None for times in elapsed)
    extra: dict[str, float] = {}
    if resegmenter == "omnisteval":
        aligned, extra = resegment_softly(talks, words, delays, lang, elapsed if measured else None)
    else:
        given = zip(talks, words, delays, elapsed if measured else [()] * len(talks), strict=True)
        aligned = [resegment(*said) for said in given]
    figures = {"StreamLAAL": _stream_laal(talks, aligned, "delays")}
    if measured:
        figures["StreamLAAL_CA"] = _stream_laal(talks, aligned, "elapsed")
    return aligned, figures | extra


def _stream_laal(talks: Sequence[Talk], aligned: Sequence[Sequence[Aligned]], times: str) -> float:
    lags = [
        length_adaptive_average_lagging(given, 1000 * segment.duration, max(1, len(segment.reference.split())))
        for talk, parts in zip(talks, aligned, strict=True)
        for segment, part in zip(talk.segments, parts)
        if (given := getattr(part, times)) and segment.duration > 0
    ]
    return float(np.mean(lags)) if lags else float("nan")


def _ends_by_words(talk: Talk, words: Sequence[str], ends: Sequence[int], tolerance: float) -> tuple[int, int, int]:
    """Of sentence ends inside a talk: how many are right, how many there are, and how many there should be."""
    reference = " ".join(talk.references).split()
    true = np.cumsum([len(text.split()) for text in talk.references])[:-1].tolist()
    places = boundary_places(ends, align(words, reference), len(reference))
    return matches(places, true, tolerance), len(places), len(true)
