"""``echostream benchmark stream``: what a 320 ms chunk costs a session in its tenth second and in its sixtieth minute.

The model has random weights; a script says what comes out of it, at the pace of real speech. Everything is computed
as ever, and only then are the symbols of both CTC heads, the MT decoder's next token and the unit decoder's symbols
replaced (``ScriptedStages``, an ordinary backend of an ordinary session). The vocoder's durations are forced by the
bias of its duration predictor.

A stream is fed faster than real time and saved at every mark. The marks are then restored side by side and take turns,
chunk by chunk over a whole sentence, so that a busy neighbour slows all of them alike. Another pass over the same
chunks counts floating-point operations (torch's; ONNX Runtime's cannot be counted) and the bytes of the saved state.
Ctrl-C ends the feeding early, at the end of the sentence; what was reached is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm, trange

from echostream.benchmarks.common import add_options, clock_of, describe, exported, milliseconds, surroundings
from echostream.benchmarks.operations import FLOPS
from echostream.benchmarks.scripted import CHUNK_MS, Script, ScriptedStages, random_bundle
from echostream.checkpoint import Bundle
from echostream.config import EchoStreamConfig
from echostream.constants import ENCODER_FRAME_MS, SAMPLE_RATE
from echostream.streaming import SentenceEnd, SessionBatch, StreamingSession, TargetText, TargetUnits, Waveform
from echostream.streaming import stream as timing
from echostream.streaming.backends import backend_of
from echostream.streaming.exported.model import ExportedModel
from echostream.streaming.exported.torch_model import TorchModel

MARKS_S = (10, 30, 60, 600, 3600)
STAGES = ("features", "encoder", "ctc heads", "MT", "units", "vocoder", "rest")
BACKENDS = ("torch", "onnx", "onnx-int8")
BAR_MS, BAR_GROWTH, BAR_MB = 100.0, 1.1, 10.0  # a chunk's median; that of the last mark over the first; resident memory
BAR_REAL_TIME = {"torch": 0.2, "onnx": 0.2, "onnx-int8": 0.1}  # seconds of computing per second, the default model


class Sound:
    """Thirty seconds of coloured noise that swells and fades, over and over; a chunk at a time."""

    def __init__(self) -> None:
        noise = np.random.default_rng(2).standard_normal(30 * SAMPLE_RATE + 7)
        smooth = np.convolve(noise, np.ones(8) / 8, mode="valid")
        loud = 0.05 + 0.1 * np.sin(np.arange(len(smooth)) * (2 * np.pi * 1.5 / SAMPLE_RATE)) ** 2
        self.samples = np.tile((smooth * loud).astype(np.float32), 2)

    def chunk(self, index: int) -> np.ndarray:
        size = CHUNK_MS * SAMPLE_RATE // 1000
        start = index * size % (len(self.samples) // 2)
        return self.samples[start : start + size]


class Stopwatch:
    """Seconds by stage of what a session does. Two parts that the session books together are timed apart here.

    Of a step only the run itself is timed: what numpy does for the CTC heads counts as the encoder's.
    """

    def __init__(self, model: Any, clock: Callable[[], float]):
        self.clock = clock
        self.seconds = {"heads": 0.0, "unit_memory": 0.0}
        if isinstance(model, ExportedModel):
            model.run = self._timed(model.run, 0)
        else:  # every session makes its own of the torch model
            TorchModel.run = self._timed(TorchModel.run, 1)

    def _timed(self, work: Callable, place: int) -> Callable:
        """``work``, its time booked under its argument in that ``place``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = self.clock()
            try:
                return work(*args, **kwargs)
            finally:
                booked = args[place]
                self.seconds[booked] = self.seconds.get(booked, 0.0) + self.clock() - started

        return run

    def push(self, session: StreamingSession, samples: np.ndarray) -> tuple[list, np.ndarray]:
        """Push, and tell the events and the seconds [stages], their sum being all the time it took."""
        booked, own = session.stage_seconds, dict(self.seconds)
        started = self.clock()
        events = session.push(samples)
        whole = self.clock() - started
        took = {name: seconds - booked[name] for name, seconds in session.stage_seconds.items()}
        heads, extend = (self.seconds[name] - own[name] for name in ("heads", "unit_memory"))
        parts = [
            took["features"], took["encoder"] - heads, heads, took["text"] - extend, took["units"] + extend,
            took["vocoder"],
        ]  # fmt: skip
        return events, np.array([*parts, whole - sum(parts)])


@contextlib.contextmanager
def clock_for(name: str) -> Iterator[Callable[[], float]]:
    """The clock to measure with, which sessions book their time by, too."""
    before = timing.timer
    timing.timer = clock_of(name)
    try:
        yield timing.timer
    finally:
        timing.timer = before


def resident_mb() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(args: argparse.Namespace) -> dict:
    values = {"unit_decoder_input": args.unit_input, "ctc_upsample_ratio": 5 if args.unit_input == "encoder" else 25}
    config = EchoStreamConfig.small() if args.small else EchoStreamConfig(**values)
    script = Script.write(config, args.sentence)
    per_sentence = script.frames * ENCODER_FRAME_MS // CHUNK_MS
    last = args.minutes * 60
    # A mark stands at the first sentence that begins at that time or later.
    times = {int(-(-m * 1000 // (per_sentence * CHUNK_MS))) * per_sentence: m for m in (*MARKS_S, last) if m <= last}
    report = {
        "benchmark": "stream",
        "model": "small" if args.small else "default",
        "unit_decoder_input": config.unit_decoder_input,
        "chunk_ms": CHUNK_MS,
        "sentence_s": script.frames * ENCODER_FRAME_MS / 1000,
        "backend": args.backend,
        **surroundings(args),
        "rounds": args.rounds,
    }
    with clock_for(args.clock) as clock, tempfile.TemporaryDirectory() as folder:

        def load(threads: int) -> Bundle:
            bundle = random_bundle(config)
            if args.backend == "torch":
                return bundle
            return exported(bundle, Path(folder) / "graphs", args.backend == "onnx-int8", threads)

        bundle = load(args.threads)
        backend = partial(ScriptedStages, script=script, backend=backend_of(bundle))
        watch = Stopwatch(bundle.model, clock)
        session = StreamingSession(bundle, backend=backend, speech_gate=False)
        report["stream"], marks = feed(session, watch, times, per_sentence, Path(folder))
        sessions = [StreamingSession(bundle, backend=backend, speech_gate=False) for _ in marks]
        rounds = [take_turns(sessions, marks, per_sentence, watch) for _ in trange(args.rounds, desc="rounds")]
        report["marks"] = [
            {
                "elapsed_s": mark.elapsed_s,
                **percentiles(np.concatenate([times[i] for times in rounds])),
                **count_operations(session, mark, per_sentence, Path(folder) / "count.npz"),
            }
            for i, mark in enumerate(tqdm(marks, desc="counting"))
        ]
        if args.sessions:
            threads = args.batch_threads
            model = load(threads)
            report["batches"] = [run_batch(model, backend, n, threads, per_sentence, clock) for n in args.sessions]
    first, final = report["marks"][0], report["marks"][-1]
    report["p50_last_over_first"] = final["ms"]["whole"]["p50"] / first["ms"]["whole"]["p50"]
    counted = args.backend == "torch"
    report["operations_equal"] = all(m["flops"] == first["flops"] for m in report["marks"]) if counted else None
    report["state_bytes_equal"] = all(
        (m["state_bytes"], m["saved_bytes"]) == (first["state_bytes"], first["saved_bytes"]) for m in report["marks"]
    )
    return report


@dataclass(frozen=True)
class Mark:
    """A moment of the stream at the beginning of a sentence: its time, the next chunk's number, the saved session."""

    elapsed_s: float
    chunk: int
    saved: Path


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C only sets the event."""
    event, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def interrupt(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def feed(
    session: StreamingSession, watch: Stopwatch, times: dict[int, float], per_sentence: int, folder: Path
) -> tuple[dict, list[Mark]]:
    """The whole stream, up to the last of the marks (chunk -> seconds): what came out of it, and the marks reached."""
    sound, last, chunks_a_minute = Sound(), max(times), 60_000 // CHUNK_MS
    marks, rss, seconds = [], [], 0.0
    written = units = samples = sentences = 0
    with interruptible() as interrupted, tqdm(total=last, desc="chunks", unit="") as progress:
        for index in itertools.count():
            ends = index == last or (interrupted.is_set() and index and index % per_sentence == 0)
            if ends or index in times:
                marks.append(Mark(times.get(index, index * CHUNK_MS / 1000), index, folder / f"{index}.npz"))
                session.save(marks[-1].saved)
            if index and index % chunks_a_minute == 0:
                rss.append(resident_mb())
            if ends:
                break
            events, took = watch.push(session, sound.chunk(index))
            progress.update()
            seconds += took.sum()
            for event in events:
                written += len(event.tokens) if isinstance(event, TargetText) else 0
                units += len(event.units) if isinstance(event, TargetUnits) else 0
                samples += len(event.samples) if isinstance(event, Waveform) else 0
                sentences += isinstance(event, SentenceEnd)
    heard = index * CHUNK_MS / 1000
    report = {
        "seconds": heard,
        "real_time_factor": seconds / heard,
        "sentences": sentences,
        "subwords_per_second": written / heard,
        "units_per_subword": units / max(written, 1),
        "speech_seconds_per_second": samples / SAMPLE_RATE / heard,
        "resident_mb_each_minute": rss,
        "resident_mb_growth": max(rss) - rss[0] if rss else 0.0,
    }
    return report, marks


def take_turns(
    sessions: list[StreamingSession], marks: list[Mark], chunks: int, watch: Stopwatch
) -> list[list[np.ndarray]]:
    """From every mark one sentence on, a chunk of each in turn: seconds by stage of every chunk."""
    sound, times, order = Sound(), [[] for _ in marks], list(range(len(marks)))
    for mark, session in zip(marks, sessions):
        session.restore(mark.saved)
    for i in range(chunks):
        for which in order:
            times[which].append(watch.push(sessions[which], sound.chunk(marks[which].chunk + i))[1])
        order.append(order.pop(0))
    return times


def percentiles(times: np.ndarray) -> dict:
    """Of seconds [chunks, stages]: median and 95th percentile in ms, by stage and of whole chunks."""
    columns = dict(zip((*STAGES, "whole"), np.column_stack([times, times.sum(1)]).T))
    return {
        "chunks": len(times),
        "ms": {name: milliseconds(column) for name, column in columns.items()},
        "mean_ms": 1000 * float(columns["whole"].mean()),
    }


def count_operations(session: StreamingSession, mark: Mark, chunks: int, path: Path) -> dict:
    """From a mark one sentence on: operations of each chunk, and the bytes of the state behind it.

    These are the bytes allocated, and those that a saved session takes: of the buffers only what is in use, and
    everything that the engine remembers beside the model.
    """
    sound, flops, state, kept = Sound(), [], [], []
    session.restore(mark.saved)
    for i in range(chunks):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            session.push(sound.chunk(mark.chunk + i))
        flops.append(counter.get_total_flops())
        state.append(session.nbytes)
        session.save(path)
        with np.load(path) as file:
            kept.append(sum(file[name].nbytes for name in file.files if name != "header"))
    return {"flops": flops, "state_bytes": state, "saved_bytes": kept}


def run_batch(
    bundle: Bundle, backend: Callable, rows: int, threads: int, chunks: int, clock: Callable[[], float]
) -> dict:
    """Sessions of different ages in one batch, over one sentence: seconds to serve all of them a chunk."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    batch, sound = SessionBatch(bundle, capacity=rows, backend=backend, speech_gate=False), Sound()
    ages: dict[int, int] = {}
    times = []
    for i in tqdm(range(2 * chunks), desc=f"{rows} sessions"):
        while len(ages) < rows and i >= len(ages) * chunks // rows:
            ages[batch.join()] = 0
        parts = {number: sound.chunk(age) for number, age in ages.items()}
        started = clock()
        batch.push(parts)
        if i >= chunks:
            times.append(clock() - started)
        ages = {number: age + 1 for number, age in ages.items()}
    torch.set_num_threads(before)
    return {
        "sessions": rows,
        "threads": threads,
        "ms": milliseconds(times),
        "real_time_factor": float(np.mean(times)) * 1000 / CHUNK_MS,
    }


def show(report: dict) -> None:
    stream, unit = report["stream"], "CPU ms" if report["clock"] == "cpu" else "ms"
    counted = report["operations_equal"] is not None
    print(
        f"{unit} per {report['chunk_ms']} ms chunk (p50 / p95), model {report['model']}, backend {report['backend']}, "
        f"units from {report['unit_decoder_input']}, sentences of {report['sentence_s']:g} s, {report['rounds']} "
        f"rounds, {describe(report)}"
    )
    names = (*STAGES, "whole")
    print(f"{'elapsed':>8} " + " ".join(f"{name:>13}" for name in names) + f" {'GFLOP':>7} {'state MB':>9}")
    for mark in report["marks"]:
        cells = [f"{mark['ms'][name]['p50']:.1f} / {mark['ms'][name]['p95']:.1f}" for name in names]
        work = f"{sum(mark['flops']) / 1e9:.2f}" if counted else "-"
        print(
            f"{mark['elapsed_s']:>6g} s " + " ".join(f"{cell:>13}" for cell in cells)
            + f" {work:>7} {max(mark['state_bytes']) / 1e6:>9.2f}"
        )  # fmt: skip
    if counted:
        print(f"(GFLOP: of one sentence, {report['marks'][0]['chunks'] // report['rounds']} chunks)")
    first, final = report["marks"][0], report["marks"][-1]
    print(
        f"p50 at {final['elapsed_s']:g} s over p50 at {first['elapsed_s']:g} s: {report['p50_last_over_first']:.3f} "
        f"(bar: {BAR_GROWTH}); p50 {final['ms']['whole']['p50']:.1f} ms (bar: {BAR_MS:g})"
    )
    print(
        f"operations of every chunk the same at all marks: {report['operations_equal'] if counted else 'not counted'}; "
        f"state bytes, allocated and saved: {report['state_bytes_equal']}"
    )
    print(
        f"{stream['seconds']:.0f} s fed: real-time factor {stream['real_time_factor']:.3f} (bar of the default model: "
        f"{BAR_REAL_TIME[report['backend']]:g}), resident memory grew by {stream['resident_mb_growth']:.1f} MB after "
        f"the first minute (bar: {BAR_MB:g}); {stream['sentences']} sentences, "
        f"{stream['subwords_per_second']:.2f} subwords/s, {stream['units_per_subword']:.2f} units a subword, "
        f"{stream['speech_seconds_per_second']:.2f} s of speech per second"
    )
    for batch in report.get("batches", []):
        print(
            f"{batch['sessions']} sessions in a batch, {batch['threads']} thread(s): {batch['ms']['p50']:.0f} / "
            f"{batch['ms']['p95']:.0f} {unit} for a chunk of each, real-time factor {batch['real_time_factor']:.2f}"
        )


def _counts(text: str) -> list[int]:
    """``1,16`` as numbers; zeros are left out."""
    return [n for n in map(int, text.split(",")) if n]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0, help="audio fed (default: 60)")
    parser.add_argument("--sentence", type=float, default=10.0, metavar="S", help="seconds in a sentence (default: 10)")
    parser.add_argument("--backend", choices=BACKENDS, default="torch", help="what computes (default: torch)")
    parser.add_argument("--small", action="store_true", help="the small model instead of the default configuration")
    parser.add_argument(
        "--unit-input",
        choices=("encoder", "mt", "mt-tokens"),
        default="encoder",
        help="what the default model's unit decoder reads (default: encoder)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="sentences timed at each mark (default: 5)")
    parser.add_argument(
        "--sessions", type=_counts, default=[8], metavar="N,N", help="sessions in a batch, 0: no batch (default: 8)"
    )
    parser.add_argument("--batch-threads", type=int, default=2, help="threads for the batch (default: 2)")
    add_options(parser)
