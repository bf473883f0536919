"""What is counted, for Prometheus: its own registry for every server, with quantiles over the last minutes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from echostream.streaming.events import Event, SentenceEnd, TargetText, Waveform

WINDOW = 4096  # decisions and sentences that quantiles are taken over
QUANTILES = (0.5, 0.95, 0.99)
_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 2.0, 5.0)


class Metrics:
    """Counters of one server. ``step`` is called in the engine's thread, all else in the event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = lambda name, text: Counter(f"echostream_{name}", text, registry=self.registry)  # noqa: E731
        self.refused = counter("sessions_refused", "Sessions refused because all places were taken")
        self.cut = counter("connections_cut", "Connections ended because the client did not read, or sent nonsense")
        self.late = counter("decisions_late", "Decisions that came out more than a second after their sound")
        self.heard = counter("audio_seconds", "Seconds of sound heard")
        self.spoken = counter("speech_seconds", "Seconds of speech given out")
        self.words = counter("text_events", "Pieces of translation given out")
        self.sentences = counter("sentences", "Sentences completed")
        self.computed = counter("compute_seconds", "Seconds of computing")
        self.delay = Histogram(
            "echostream_decision_seconds", "From a decision's sound to its events", buckets=_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.steps: deque[tuple[float, int, float]] = deque(maxlen=WINDOW)
        self.delays: deque[float] = deque(maxlen=WINDOW)
        self.queues: deque[float] = deque(maxlen=WINDOW)
        self.lags: deque[float] = deque(maxlen=WINDOW)
        self.levels: Callable[[], dict[str, float]] = dict  # sessions and the like, asked for when shown
        self.registry.register(self)

    def step(self, seconds: float, streams: int, heard: float) -> None:
        """A step of the engine: how long it took, streams in it, seconds of sound in it."""
        self.steps.append((seconds, streams, heard))
        self.computed.inc(seconds)
        self.heard.inc(heard)

    def decision(self, delay: float, queued: float) -> None:
        """Seconds from a decision's sound to its events, and until its step began."""
        self.delays.append(delay)
        self.queues.append(queued)
        self.delay.observe(delay)
        if delay > 1:
            self.late.inc()

    def event(self, event: Event) -> None:
        if isinstance(event, Waveform):
            self.spoken.inc(len(event.samples) / event.sample_rate)
        elif isinstance(event, TargetText):
            self.words.inc()
        elif isinstance(event, SentenceEnd):
            self.sentences.inc()
            if event.lag.laal_s == event.lag.laal_s:  # not nan
                self.lags.append(event.lag.laal_s)

    def collect(self) -> Iterable[Any]:
        """For prometheus_client: gauges, made when they are asked for."""
        steps = list(self.steps)
        quantiles: dict[str, tuple[str, Sequence[float]]] = {
            "chunk_seconds": ("Time of a step of all streams that are ready", [seconds for seconds, _, _ in steps]),
            "delay_seconds": ("From a decision's sound to its events", list(self.delays)),
            "queue_seconds": ("Of that, until its step began", list(self.queues)),
            "lag_seconds": ("Length-adaptive average lagging of sentences, on the audio clock", list(self.lags)),
            "step_streams": ("Streams in a step", [streams for _, streams, _ in steps]),
        }
        for name, (text, values) in quantiles.items():
            text = f"{text}, quantiles of the last {WINDOW}"
            family = GaugeMetricFamily(f"echostream_{name}", text, labels=["quantile"])
            for quantile in QUANTILES if values else ():
                family.add_metric([str(quantile)], float(np.quantile(values, quantile)))
            yield family
        heard = sum(heard for _, _, heard in steps)
        levels = {"real_time_factor": sum(s for s, _, _ in steps) / heard if heard else 0.0, **self.levels()}
        for name, value in levels.items():
            yield GaugeMetricFamily(f"echostream_{name}", name.replace("_", " "), value=value)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
