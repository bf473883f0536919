"""What sessions and batches share: rows of a model, the streams in them, and the loop that answers their requests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from echostream.streaming import archive, stream
from echostream.streaming.backends import backend_of
from echostream.streaming.clock import AudioClock
from echostream.streaming.engine import Engine
from echostream.streaming.events import Event
from echostream.streaming.resolve import resolve
from echostream.streaming.stages import STAGE_NAMES, STAGE_ORDER, Backend, Request, Stages
from echostream.streaming.stream import AudioInput, Decision, StreamState
from echostream.streaming.writing import Work

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

Key = TypeVar("Key")  # by which whoever calls knows a stream
Job = tuple[StreamState, Decision]


class StreamCore:
    """Translates streams, each in a row of the model's state, as their ``StreamState`` says how far each is.

    Args:
        bundle: a loaded checkpoint.
        rows: how many streams.
        backend: makes what runs the model; default: what the bundle is for (see ``backend_of``).
        given: how to translate (see ``resolve``).

    Raises:
        ConfigError: a setting is unknown or out of range.
    """

    def __init__(self, bundle: Bundle, rows: int, backend: Backend | None = None, **given: Any):
        self.bundle, self.engine = bundle, make_engine(bundle, **given)
        settings = self.engine.settings
        self.input = AudioInput(AudioClock(settings.chunk_ms, bundle.config.features), bundle.cmvn)
        self.stages: Stages = (backend or backend_of(bundle))(bundle, rows=rows, speech=settings.speech)

    def open(self, row: int, engine: Engine | None = None) -> StreamState:
        """A new stream in ``row``, decided for by ``engine`` (default: the core's own)."""
        self.stages.reset(row)
        return StreamState(row, engine or self.engine, self.input.clock.init_state())

    def push(self, parts: Mapping[Key, tuple[StreamState, Any, Any]]) -> dict[Key, list[Event]]:
        """Hear more of some streams: the state, the samples [N] and their rate of each. Returns the events of each.

        Raises:
            AudioError, SessionError: as ``AudioInput.push``; then nothing of any stream was heard.
        """
        pending = {}
        for key, (state, samples, rate) in parts.items():
            pending[key] = self.input.push(state, samples, rate)
        events: dict[Key, list[Event]] = {key: [] for key in parts}
        while pending:
            jobs = {}
            for key, decisions in list(pending.items()):
                decision = next(decisions, None)
                if decision is None:
                    del pending[key]
                else:
                    jobs[key] = (parts[key][0], decision)
            for key, found in self._decide(jobs).items():
                events[key] += found
        return events

    def finish(self, states: Mapping[Key, StreamState]) -> dict[Key, list[Event]]:
        """These streams have ended: translate what is left of them. Raises SessionError: one has been finished."""
        return self._decide({key: (state, self.input.finish(state)) for key, state in states.items()})

    def snapshot(self, state: StreamState) -> Callable[[str | Path], None]:
        """A stream as it is now; the function returned writes it to a file, later and in any thread."""
        kept = copy.deepcopy(state, {id(state.engine): state.engine})
        arrays = self.stages.snapshot(state.row)
        return lambda path: archive.write(path, self.bundle, kept, arrays)

    def restore(self, path: str | Path, row: int, engine: Engine | None = None) -> StreamState:
        """A saved stream, gone on with in ``row``.

        Raises:
            SessionError: the file is missing, damaged, or of another version, model, policy or setting.
        """
        state, arrays = archive.read(path, self.bundle, row, engine or self.engine)
        archive.fit(path, lambda: self.stages.restore(row, arrays))
        return state

    def _decide(self, jobs: Mapping[Key, Job]) -> dict[Key, list[Event]]:
        """One decision for each; those of one engine together."""
        groups: dict[int, list[Key]] = {}
        for key, (state, _) in jobs.items():
            groups.setdefault(id(state.engine), []).append(key)
        events: dict[Key, list[Event]] = {}
        for keys in groups.values():
            engine = jobs[keys[0]][0].engine
            events.update(zip(keys, decide(engine, self.stages, [jobs[key] for key in keys]), strict=True))
        return events


def make_engine(bundle: Bundle, **given: Any) -> Engine:
    """The engine for a bundle; ``given`` as for ``resolve``.

    Raises:
        ConfigError: an unknown name, or a setting out of range.
    """
    policy, segmenter, settings = resolve(bundle, given)
    sample_rate = None if bundle.vocoder is None else bundle.vocoder.config.sampling_rate
    return Engine(bundle.config, bundle.source_dict, bundle.target_dict, policy, segmenter, settings, sample_rate)


def decide(engine: Engine, stages: Stages, jobs: Sequence[Job]) -> list[list[Event]]:
    """Take one decision for each of several streams, their requests of one kind answered together.

    Of the kinds waiting the one that comes first in the chain is served, so that streams that are behind catch up and
    the later stages see as many rows as possible. What a stream gets does not depend on its neighbours.
    """
    works = [engine.decide(s.stream, d.features, d.finished, d.now, d.samples) for s, d in jobs]
    events: list[list[Event]] = [[] for _ in jobs]
    waiting: dict[int, Request] = {}

    def advance(i: int, work: Work, answer: Any) -> None:
        started = stream.timer()
        try:
            waiting[i] = work.send(answer)
        except StopIteration as stop:
            events[i] = stop.value
        jobs[i][0].elapsed_s += stream.timer() - started

    for i, work in enumerate(works):
        advance(i, work, None)
    while waiting:
        kind = min((type(request) for request in waiting.values()), key=STAGE_ORDER.index)
        served = [i for i, request in waiting.items() if type(request) is kind]
        requests = [(jobs[i][0].row, waiting.pop(i)) for i in served]
        started = stream.timer()
        answers = stages.run(requests)
        seconds = stream.timer() - started
        for i in range(len(jobs)):
            if i in served:
                jobs[i][0].book(STAGE_NAMES[kind], seconds)
            elif i in waiting:
                jobs[i][0].elapsed_s += seconds
        for i, answer in zip(served, answers):
            advance(i, works[i], answer)
    return [[replace(e, elapsed_s=s.elapsed_s) for e in found] for (s, _), found in zip(jobs, events)]
