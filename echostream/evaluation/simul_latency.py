"""SimulEval's scorers of latency, and of what else speech costs the listener; see ``simul``."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import numpy as np

from echostream.errors import require
from echostream.evaluation import latency
from echostream.evaluation.simul_instances import durations_of, logger, unit_times

require("simuleval", "simuleval")

from simuleval.evaluator.scorers.latency_scorer import LatencyScorer  # noqa: E402


class WordScorer(LatencyScorer):
    """Base of the latency scorers here. Utterances without output are skipped and counted in a warning, not averaged.

    Computation-aware figures (``--computation-aware``, name with ``_CA``) use ``elapsed``: the source read so far plus
    all the time spent computing so far, as SimulEval defines it (no overlap of listening and computing).
    """

    name = ""

    def measure(self, instance: Any) -> float | None:
        """The instance's figure; None when it has no output to measure."""
        raise NotImplementedError

    def __call__(self, instances: dict[int, Any]) -> float:
        figures = []
        for instance in instances.values():
            figure = self.measure(instance)
            if figure is not None:
                instance.metrics[self.metric_name] = figure
                figures.append(figure)
        if len(figures) < len(instances):
            logger.warning(f"{self.metric_name}: {len(instances) - len(figures)} utterances without output left out")
        return float(np.mean(figures)) if figures else math.nan

    @property
    def metric_name(self) -> str:
        return self.name + ("_CA" if self.computation_aware else "")

    def word_delays(self, instance: Any) -> list[float]:
        """When each word, or other unit of ``--eval-latency-unit``, was given out."""
        if hasattr(instance, "words"):
            return unit_times(instance, self.computation_aware)
        return list(getattr(instance, self.timestamp_type, []))

    def given_out(self, instance: Any) -> list[float]:
        """When each piece of speech was given out, or each unit of text."""
        if durations_of(instance) is not None:
            return list(instance.elapsed if self.computation_aware else instance.delays)
        return self.word_delays(instance)

    def reference_words(self, instance: Any) -> int:
        unit = getattr(instance, "latency_unit", "word")
        words = len(instance.reference.split()) if unit == "word" else instance.reference_length
        return words if self.use_ref_len and words else len(self.word_delays(instance))

    @classmethod
    def from_args(cls, args: Namespace) -> WordScorer:
        # SimulEval adds the computation-aware scorer beside this one; this one is the plain figure.
        return cls(computation_aware=False, use_ref_len=not args.no_use_ref_len)


class WordAL(WordScorer):
    """AL per target word at the emission of its audio (ms)."""

    name = "AL"
    lagging = staticmethod(latency.average_lagging)

    def measure(self, instance: Any) -> float | None:
        delays = self.word_delays(instance)
        if not delays:
            return None
        return self.lagging(delays, instance.source_length, self.reference_words(instance))


class WordLAAL(WordAL):
    """LAAL per target word at the emission of its audio (ms)."""

    name = "LAAL"
    lagging = staticmethod(latency.length_adaptive_average_lagging)


class TokenDelay(WordScorer):
    """ATD per 300 ms of speech, or per word of text (ms). SimulEval's own takes a finished run for text."""

    name = "ATD"

    def measure(self, instance: Any) -> float | None:
        emitted = self.given_out(instance)
        if not emitted:
            return None
        delays = TokenDelay().given_out(instance)
        return latency.average_token_delay(delays, durations_of(instance), emitted)


class WordAP(WordAL):
    """AP per target word at the emission of its audio (a share of the source)."""

    name = "AP"
    lagging = staticmethod(latency.average_proportion)


class WordDAL(WordAL):
    """DAL per target word at the emission of its audio (ms)."""

    name = "DAL"

    def measure(self, instance: Any) -> float | None:
        delays = self.word_delays(instance)
        return latency.differentiable_average_lagging(delays, instance.source_length) if delays else None


class ChunkCount(WordScorer):
    """How many pieces of speech, or units of text, were given out."""

    name = "NumChunks"

    def measure(self, instance: Any) -> float | None:
        return float(len(self.given_out(instance))) or None


class WrittenScorer(WordScorer):
    """For speech with text: figures of the words as they were written, ahead of their speech."""

    def word_delays(self, instance: Any) -> list[float]:
        return unit_times(instance, self.computation_aware, written=True)


class WrittenAL(WrittenScorer, WordAL):
    """AL per target word at its writing (ms)."""

    name = "AL_TEXT"


class WrittenLAAL(WrittenScorer, WordLAAL):
    """LAAL per target word at its writing (ms)."""

    name = "LAAL_TEXT"


class WrittenStart(WrittenScorer):
    """From the start of the source to the first word written (ms)."""

    name = "StartOffset_TEXT"

    def measure(self, instance: Any) -> float | None:
        return next(iter(self.word_delays(instance)), None)


class StartOffset(WordScorer):
    """From the start of the source to the first sound of the translation (ms)."""

    name = "StartOffset"

    def measure(self, instance: Any) -> float | None:
        return next(iter(self.given_out(instance)), None)


class EndOffset(WordScorer):
    """From the end of the source to the end of the translation as it is played (ms)."""

    name = "EndOffset"

    def measure(self, instance: Any) -> float | None:
        times = self.given_out(instance)
        if not times:
            return None
        durations = durations_of(instance) or [0.0] * len(times)
        return sum(latency.playback(times, durations)[-1]) - instance.source_length


class RealTimeFactor(WordScorer):
    """Seconds of computing for a second of source."""

    name = "RTF"

    def measure(self, instance: Any) -> float | None:
        return instance.compute / instance.source_length if hasattr(instance, "compute") else None


class SilenceSum(WordScorer):
    """Silence inside the translation, where the listener waits for more (ms, plain clock)."""

    name = "DiscontinuitySum"

    def measure(self, instance: Any) -> float | None:
        return float(sum(instance.silences)) if instance.delays and hasattr(instance, "silences") else None


class SilenceNumber(SilenceSum):
    """How many such silences there are."""

    name = "DiscontinuityNum"

    def measure(self, instance: Any) -> float | None:
        return float(len(instance.silences)) if instance.delays and hasattr(instance, "silences") else None


class SilenceAverage(SilenceSum):
    """How long one such silence is (ms)."""

    name = "DiscontinuityAve"

    def measure(self, instance: Any) -> float | None:
        total, count = super().measure(instance), len(getattr(instance, "silences", []))
        return total if not total else total / count
