"""Confidence intervals and comparisons by bootstrap resampling (Koehn, 2004), drawn by sacrebleu from a given seed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from echostream.errors import EchoStreamError, require
from echostream.evaluation.quality import spoken_form, spoken_words, tokenizer_for

require("sacrebleu", "simuleval")

from sacrebleu.metrics import BLEU, CHRF  # noqa: E402  (after the check that it is there)
from sacrebleu.metrics.base import Metric, Score  # noqa: E402
from sacrebleu.significance import PairedTest, Result  # noqa: E402


class WordErrorRate(Metric):
    """Word errors in percent of the reference's words, in the form that sacrebleu's resampling takes."""

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"reference": refs[0]}

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict[str, Any]) -> list[int]:
        reference = ref_kwargs["reference"]
        if not reference.split():  # jiwer refuses these
            return [len(hypothesis.split()), 0]
        found = require("jiwer", "simuleval").process_words(reference, hypothesis)
        return [found.substitutions + found.deletions + found.insertions, len(reference.split())]

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        errors, words = map(float, stats)
        return Score("WER", 100.0 * errors / max(1.0, words))

    def _aggregate_and_compute(self, stats: Sequence[Sequence[int]]) -> Score:
        return self._compute_score_from_stats([sum(column) for column in zip(*stats)])


@dataclass(frozen=True)
class Measure:
    """A figure of a text against its reference, with the normalisation that it is read after.

    Attributes:
        name: of its column in a table.
        hypothesis, reference: which texts of a system it compares.
        metric: sacrebleu's, made anew for every use.
        clean: what is done to both texts first.
        falls: less is better.
    """

    name: str
    hypothesis: str
    reference: str
    metric: Callable[[], Metric]
    clean: Callable[[str], str] = str
    falls: bool = False


def measures(language: str = "en") -> tuple[Measure, ...]:
    """The measures of translations into a language."""
    bleu = functools.partial(BLEU, tokenize=tokenizer_for(language))
    heard = functools.partial(spoken_form, numbers=language.partition("-")[0] in ("", "en"))
    return (
        Measure("WER", "asr", "asr_ref", WordErrorRate, functools.partial(spoken_words, numbers=False), falls=True),
        Measure("ST BLEU", "st", "mt_ref", bleu),
        Measure("ST chrF", "st", "mt_ref", CHRF),
        Measure("BLEU", "mt", "mt_ref", bleu),
        Measure("chrF", "mt", "mt_ref", CHRF),
        Measure("ASR-BLEU", "heard", "mt_ref", bleu, heard),
    )


MEASURES = measures()


def bootstrap(
    measure: Measure, outputs: Sequence[Sequence[str]], references: Sequence[str], samples: int, seed: int
) -> list[Result]:
    """The figure of every system's outputs, and how sure it is.

    Args:
        outputs: of each system, a text for each of ``references``.
        samples: how often sentences are drawn anew.
        seed: at least 1.

    Returns:
        Per system ``score``, ``ci`` (half the width of its 95 % interval) and, but for the first, ``p_value``: of a
        difference from the first system as large as this one's if there were none, sentences drawn for both alike.

    Raises:
        EchoStreamError: there is no reference, or seed or samples are less than 1 (to sacrebleu a seed of 0 is none).
    """
    if not references:
        raise EchoStreamError("there is nothing to resample: no sentence is common to all systems")
    if seed < 1 or samples < 1:
        raise EchoStreamError(f"--seed {seed} and --samples {samples} must be at least 1")
    named = [(str(i), [measure.clean(text) for text in texts]) for i, texts in enumerate(outputs)]
    cleaned = [[measure.clean(reference) for reference in references]]
    with _seeded(seed):
        _, columns = PairedTest(named, {measure.name: measure.metric()}, cleaned, test_type="bs", n_samples=samples)()
    (results,) = (column for name, column in columns.items() if name != "System")
    for result in results[1:]:
        if result.score == results[0].score:
            result.p_value = 1.0  # sacrebleu 2.6 gives two equal systems the smallest p there is
    return results


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """sacrebleu takes its seed from the environment."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before
