"""``echostream benchmark encoder``: what 160 ms of speech cost the encoder with its subsampler, next to other encoders.

All contenders take turns segment by segment, so that a busy neighbour slows all of them alike:

* torchaudio's Emformer in our sizes (``infer``): eager, scripted, and scripted with its linear layers in int8, each
  behind our subsampler in eager torch, which torchaudio has no counterpart of;
* EchoStream's encoder: eager torch, and the exported graphs in single precision and int8, as a session runs them,
  masks and caches included, the CTC heads left out;
* ``recompute``, an encoder in StreamSpeech's shape that runs over the whole history at every chunk of ``--chunk-ms``;
  at ``--elapsed`` seconds such a pass joins the rounds, and a segment's share of it is reported.

The weights are random, which no cost here depends on. Eager and exported outputs are compared on the way: a difference
above 1e-4 ends the benchmark.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from echostream.benchmarks.common import add_options, clock_of, describe, milliseconds, surroundings
from echostream.benchmarks.recompute import RecomputingEncoder
from echostream.compat import import_torchaudio
from echostream.config import EchoStreamConfig
from echostream.constants import ENCODER_FRAME_MS, SUBSAMPLING
from echostream.errors import EchoStreamError
from echostream.export.check import TOLERANCE
from echostream.export.graphs import make_graph
from echostream.export.weights import write_graphs
from echostream.models.echostream_encoder import EchoStreamEncoder
from echostream.models.graphs import EncoderGraph
from echostream.models.subsampler import Subsampler
from echostream.streaming.exported.encoder import ExportedEncoder
from echostream.streaming.exported.model import ExportedModel
from echostream.streaming.stages import Encode

Step = Callable[[np.ndarray], np.ndarray]  # features [B, 4 S, F] of a segment to encoder frames [B, S, D]

EAGER, SCRIPTED, SCRIPTED_INT8 = "torchaudio", "torchaudio scripted", "torchaudio scripted int8"
OURS, FP32, INT8 = "echostream torch", "echostream exported", "echostream int8"
RECOMPUTE = "recompute"
WARM_UP = 6  # segments of other streams before: scripted modules are compiled in the first calls
WINDOW = 5  # segments, and passes of ``recompute``, that are timed at each elapsed time
# (batch, faster, slower, how many times at least); milliseconds of a segment for one of 32 streams in int8
BARS = [(1, FP32, EAGER, 2.5), (1, INT8, EAGER, 4.0), (1, INT8, SCRIPTED_INT8, 1.5), (32, FP32, EAGER, 2.0)]
BAR_BATCH, BAR_MS = 32, 2.0


def torchaudio_emformer(cfg: EchoStreamConfig, dropout: float = 0.0) -> nn.Module:
    """torchaudio's Emformer in ``cfg``'s sizes; it has one dropout probability for everything."""
    import_torchaudio()
    from torchaudio.models import Emformer

    return Emformer(
        cfg.encoder_embed_dim,
        cfg.encoder_attention_heads,
        cfg.encoder_ffn_embed_dim,
        cfg.encoder_layers,
        cfg.segment_length,
        dropout=dropout,
        left_context_length=cfg.left_context_length,
        right_context_length=cfg.right_context_length,
        max_memory_size=cfg.memory_size,
    )


def torchaudio_forms(cfg: EchoStreamConfig) -> dict[str, nn.Module]:
    """One Emformer of torchaudio's in three forms."""
    emformer = torchaudio_emformer(cfg).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that both ways will go some day
        rounded = torch.ao.quantization.quantize_dynamic(emformer, {nn.Linear}, dtype=torch.qint8)
        return {EAGER: emformer, SCRIPTED: torch.jit.script(emformer), SCRIPTED_INT8: torch.jit.script(rounded)}


def torchaudio_step(subsampler: Subsampler, emformer: nn.Module, batch: int) -> Step:
    state, memory = subsampler.init_state(batch), None

    def step(features: np.ndarray) -> np.ndarray:
        nonlocal state, memory
        lengths = torch.full((batch,), features.shape[1])
        x, lengths, state = subsampler.step(torch.from_numpy(features), lengths, state)
        x, _, memory = emformer.infer(x, lengths, memory)
        return x.numpy()

    return step


def torch_step(encoder: EchoStreamEncoder, batch: int) -> Step:
    state = encoder.init_state(batch)

    def step(features: np.ndarray) -> np.ndarray:
        nonlocal state
        lengths = torch.full((batch,), features.shape[1])
        x, _, state = encoder.step(torch.from_numpy(features), lengths, state)
        return x.numpy()

    return step


class _EncoderAlone(ExportedEncoder):
    def _heads(self, rows: list[int], frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nothing = np.zeros(frames.shape[:2], dtype=np.int64)
        return nothing, nothing


def exported_step(cfg: EchoStreamConfig, model: ExportedModel, batch: int) -> Step:
    encoder = _EncoderAlone(cfg, model, batch)
    rows = list(range(batch))

    def step(features: np.ndarray) -> np.ndarray:
        return np.stack([heard.frames for heard in encoder.encode(rows, [Encode(f, False) for f in features])])

    return step


def run(args: argparse.Namespace) -> dict:
    return measure(EchoStreamConfig.small() if args.small else EchoStreamConfig(), args)


@torch.inference_mode()
def measure(cfg: EchoStreamConfig, args: argparse.Namespace) -> dict:
    """The report on an encoder of this configuration.

    Raises:
        EchoStreamError: the exported encoder computes something else than torch.
    """
    segment_s = cfg.segment_length * ENCODER_FRAME_MS / 1000
    clock = clock_of(args.clock)
    torch.manual_seed(1)
    encoder = EchoStreamEncoder(cfg).eval()
    theirs = torchaudio_forms(cfg)
    again = RecomputingEncoder(cfg, max(1, args.chunk_ms // ENCODER_FRAME_MS)).eval()
    report: dict[str, Any] = {
        "benchmark": "encoder",
        "model": "small" if args.small else "default",
        "segment_ms": 1000 * segment_s,
        "chunk_ms": args.chunk_ms,
        **surroundings(args),
        "parameters": {
            name: sum(p.numel() for p in module.parameters()) for name, module in ((OURS, encoder), (RECOMPUTE, again))
        },
        "batches": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        models, graphs = {}, {"encoder": make_graph(EncoderGraph(encoder))}
        weights = {f"encoder.{name}": value.numpy() for name, value in encoder.state_dict().items()}
        for name, int8 in ((FP32, False), (INT8, True)):
            models[name] = ExportedModel(Path(folder) / name.split()[-1], threads=args.threads)
            models[name].directory.mkdir()
            write_graphs(models[name].directory, graphs, weights, int8)
        for batch in args.batch:

            def streams(batch: int = batch) -> dict[str, Step]:
                return {
                    **{name: torchaudio_step(encoder.subsampler, module, batch) for name, module in theirs.items()},
                    OURS: torch_step(encoder, batch),
                    **{name: exported_step(cfg, model, batch) for name, model in models.items()},
                }

            # A mark's window begins with the segment at whose end so much has been heard.
            marks = [max(1, round(s / segment_s)) - 1 for s in sorted(args.elapsed)] if batch == 1 else []
            count = max([args.segments, *(at + WINDOW for at in marks)]) if batch == 1 else args.batch_segments
            take_turns(cfg, streams(), again, batch, WARM_UP, marks[:1], clock)
            times, passes, differences = take_turns(cfg, streams(), again, batch, count, marks, clock)
            check(differences)
            share = segment_s * 1000 / args.chunk_ms
            report["batches"].append(
                {
                    "batch": batch,
                    "segments": count,
                    "ms": {name: milliseconds(np.array(t) / batch) for name, t in times.items()},
                    "differences": differences,
                }
            )
            if marks:
                window = {name: {at: t[at : at + WINDOW] for at in marks} for name, t in times.items()}
                window[RECOMPUTE] = {at: [share * s for s in passes[at]] for at in marks}
                report["elapsed"] = [
                    {
                        "seconds": (at + 1) * segment_s,
                        "ms": {name: milliseconds(of[at]) for name, of in window.items()},
                    }
                    for at in marks
                ]
    return report


def take_turns(
    cfg: EchoStreamConfig,
    steps: dict[str, Step],
    again: nn.Module,
    batch: int,
    segments: int,
    marks: list[int],
    clock: Callable[[], float],
) -> tuple[dict[str, list[float]], dict[int, list[float]], dict[str, float]]:
    """Feed all contenders the same noise, a segment each in turn.

    Returns:
        Seconds of each segment by contender; seconds of passes over the history at each mark; the largest difference
        of the exported outputs from torch's, relative to the largest value if that is above 1.
    """
    rng, size = np.random.default_rng(1), SUBSAMPLING * cfg.segment_length
    times: dict[str, list[float]] = {name: [] for name in steps}
    passes: dict[int, list[float]] = {at: [] for at in marks}
    history: list[np.ndarray] = []
    differences = {FP32: 0.0, INT8: 0.0}
    order = list(steps)
    for i in tqdm(range(segments), desc=f"{batch} stream(s)", unit="segment"):
        features = rng.standard_normal((batch, size, cfg.input_feat_per_channel)).astype(np.float32)
        history.append(features)
        outputs = {}
        for name in order:
            started = clock()
            outputs[name] = steps[name](features)
            times[name].append(clock() - started)
        order.append(order.pop(0))
        for name in differences:
            error = np.abs(outputs[name] - outputs[OURS]).max() / max(1.0, np.abs(outputs[OURS]).max())
            differences[name] = max(differences[name], np.inf if np.isnan(error) else float(error))
        for at in marks:
            if at <= i < at + WINDOW:
                heard: Tensor = torch.from_numpy(np.concatenate(history[: at + 1], axis=1))
                started = clock()
                again(heard)
                passes[at].append(clock() - started)
    return times, passes, differences


def check(differences: dict[str, float]) -> None:
    """Raises EchoStreamError: the exported encoder in single precision computes something else than torch."""
    if not differences[FP32] <= TOLERANCE:
        raise EchoStreamError(
            f"the exported encoder differs from torch by {differences[FP32]:.1e} (at most {TOLERANCE:.0e} is allowed): "
            "its speed means nothing; this is a defect of EchoStream's export, please report it"
        )


def ratio(batch: dict, faster: str, slower: str) -> float:
    """How many times faster, by the medians."""
    return batch["ms"][slower]["p50"] / batch["ms"][faster]["p50"]


def verdicts(report: dict) -> list[str]:
    """The bars that this run can tell something about, a line each; they are those of the default model."""
    lines: list[str] = []
    if report["model"] != "default":
        return lines
    for batch in report["batches"]:
        for size, faster, slower, bar in BARS:
            if batch["batch"] == size:
                lines.append(f"batch {size}: {faster} is {ratio(batch, faster, slower):.2f}x {slower} (bar: {bar:g}x)")
        if batch["batch"] == BAR_BATCH:
            lines.append(f"batch {BAR_BATCH}: {INT8} takes {batch['ms'][INT8]['p50']:.2f} ms (bar: {BAR_MS:g} ms)")
    return lines


def show(report: dict) -> None:
    print(
        f"ms per {report['segment_ms']:g} ms segment and stream, subsampler included (p50 / p95), "
        f"model {report['model']}, {describe(report)}"
    )
    batches = report["batches"]
    print(f"{'contender':<26}" + "".join(f"{'batch ' + str(batch['batch']):>18}" for batch in batches))
    for name in batches[0]["ms"]:
        cells = [f"{batch['ms'][name]['p50']:.2f} / {batch['ms'][name]['p95']:.2f}" for batch in batches]
        print(f"{name:<26}" + "".join(f"{cell:>18}" for cell in cells))
    print("(segments: " + ", ".join(f"{batch['segments']} of batch {batch['batch']}" for batch in batches) + ")")
    if "elapsed" in report:
        print(f"after so much speech (p50; {RECOMPUTE}: a segment's share of a pass per {report['chunk_ms']} ms chunk)")
        print(f"{'contender':<26}" + "".join(f"{row['seconds']:>10.1f} s" for row in report["elapsed"]))
        for name in report["elapsed"][0]["ms"]:
            print(f"{name:<26}" + "".join(f"{row['ms'][name]['p50']:>12.2f}" for row in report["elapsed"]))
    for line in verdicts(report):
        print(line)
    worst = {name: max(batch["differences"][name] for batch in batches) for name in (FP32, INT8)}
    print(f"largest difference from torch: exported {worst[FP32]:.0e} (at most {TOLERANCE:g}), int8 {worst[INT8]:.0e}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="streams at once (default: 1 32)")
    parser.add_argument("--segments", type=int, default=200, help="segments timed of one stream (default: 200)")
    parser.add_argument("--batch-segments", type=int, default=20, help="of several streams (default: 20)")
    parser.add_argument(
        "--elapsed", type=float, nargs="*", default=[1.0, 5.0, 10.0, 30.0], metavar="S",
        help="seconds after which the whole history is encoded, too (default: 1 5 10 30)",
    )  # fmt: skip
    parser.add_argument("--chunk-ms", type=int, default=320, help="speech between such passes (default: 320)")
    parser.add_argument("--small", action="store_true", help="the small model instead of the default configuration")
    add_options(parser)
