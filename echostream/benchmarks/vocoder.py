"""``echostream benchmark vocoder``: what speaking costs, whole sequences against a stream in chunks.

The preset ``small`` with the shipped voice's weights, ``v1`` with random ones (its cost does not depend on them), on
random units with the durations that the vocoder predicts; causal ones also through their exported graphs, which have
less to do beside the arithmetic. A chunk is as many units as last ``--chunk-ms`` on average. All passes of a preset,
whole and streamed, take turns; the figures are medians.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echostream.benchmarks.common import add_options, clock_of, describe, interleaved_medians, surroundings
from echostream.constants import UNIT_RATE
from echostream.export.directory import make_voice_graphs
from echostream.export.weights import weights_of, write_graphs
from echostream.models.decoders.vocoder import PRESETS, CodeHiFiGAN, VocoderConfig
from echostream.models.decoders.vocoder_layers import pack_weights
from echostream.streaming.exported.model import ExportedModel
from echostream.streaming.exported.voice import ExportedVocoder
from echostream.vocode import load

RATIO = 1.3  # bar of small: streaming at 320 ms over offline
REALTIME = 20.0  # bar of small: seconds of speech per second, offline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=["small", "v1"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of speech, about (default: 10; v1 a third of it)")
    parser.add_argument("--chunk-ms", type=int, default=320, help="speech in a chunk (default: 320)")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default: 5)")
    add_options(parser, clock="cpu")


def run(args: argparse.Namespace) -> dict:
    clock = clock_of(args.clock)
    report = {"benchmark": "vocoder", "chunk_ms": args.chunk_ms, **surroundings(args), "presets": {}}
    for name in args.presets:
        torch.manual_seed(1)
        if name == "small":
            model = load(None, None)
        else:
            model = CodeHiFiGAN(VocoderConfig.preset(name)).eval()
            pack_weights(model)
        seconds = args.seconds / (3 if name == "v1" else 1)
        report["presets"][name] = measure(model, seconds, args.chunk_ms, args.repeats, clock, name)
    return report


@torch.inference_mode()
def measure(model: CodeHiFiGAN, seconds: float, chunk_ms: int, repeats: int, clock, name: str) -> dict[str, dict]:
    """Costs of about ``seconds`` of speech, offline and in chunks, by what computes it."""
    vocabulary = model.config.num_embeddings
    probe = torch.randint(vocabulary, (1, 100))
    frames = model(probe)[0].shape[1] / model.hop
    units = torch.randint(vocabulary, (1, max(1, round(seconds * UNIT_RATE * 100 / frames))))
    chunks = units.split(max(1, round(chunk_ms / 1000 * UNIT_RATE * 100 / frames)), dim=1)
    candidates = {"torch offline": lambda: model(units)[0][0], "torch streaming": lambda: stream(model, chunks)}
    with tempfile.TemporaryDirectory() as folder:
        if model.config.causal:
            speaker = exported_vocoder(model, Path(folder))
            candidates["exported offline"] = lambda: torch.from_numpy(speaker.vocode(0, units[0].numpy(), True))
            candidates["exported streaming"] = lambda: stream_exported(speaker, chunks)
        spoken = {kind: speak() for kind, speak in candidates.items()}
        medians = interleaved_medians(candidates, repeats, clock, name)
    reference = spoken["torch offline"]
    length = len(reference) / model.config.sampling_rate
    return {
        backend: {
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": length,
            "offline_times_realtime": length / medians[f"{backend} offline"],
            "streaming_times_realtime": length / medians[f"{backend} streaming"],
            "ratio": medians[f"{backend} streaming"] / medians[f"{backend} offline"],
            "lookahead_ms": model.lookahead_ms,
            "largest_difference": float((reference - spoken[f"{backend} streaming"]).abs().max()),
        }
        for backend in ("torch", "exported")
        if f"{backend} offline" in medians
    }


def stream(model: CodeHiFiGAN, chunks: Sequence[Tensor]) -> Tensor:
    """The waveform [T] of units that come in ``chunks`` [1, N]."""
    state, out = model.init_state(1), []
    for i, chunk in enumerate(chunks):
        last = torch.tensor([i == len(chunks) - 1])
        waveform, _, state = model.step(chunk, torch.tensor([chunk.shape[1]]), state, last)
        out.append(waveform)
    return torch.cat(out, dim=1)[0]


def exported_vocoder(model: CodeHiFiGAN, folder: Path) -> ExportedVocoder:
    """The same voice through graphs written to ``folder``, for one stream."""
    write_graphs(folder, make_voice_graphs(model), weights_of(vocoder=model), int8=False)
    return ExportedVocoder(model.config, ExportedModel(folder, threads=torch.get_num_threads()), rows=1)


def stream_exported(speaker: ExportedVocoder, chunks: Sequence[Tensor]) -> Tensor:
    parts = [speaker.vocode(0, chunk[0].numpy(), i == len(chunks) - 1) for i, chunk in enumerate(chunks)]
    return torch.from_numpy(np.concatenate(parts))


def show(report: dict) -> None:
    print(f"{report['chunk_ms']} ms chunks, {describe(report)}")
    names = ("parameters", "offline", "streaming", "ratio", "look-ahead", "difference")
    print(f"{'preset':<16}" + "".join(f"{name:>{width}}" for name, width in zip(names, (12, 10, 11, 7, 12, 12))))
    rows = [(f"{name}, {by}", row) for name, found in report["presets"].items() for by, row in found.items()]
    for name, row in rows:
        print(
            f"{name:<16}{row['parameters'] / 1e6:>11.2f}M{row['offline_times_realtime']:>9.1f}x"
            f"{row['streaming_times_realtime']:>10.1f}x{row['ratio']:>7.2f}{row['lookahead_ms']:>9.0f} ms"
            f"{row['largest_difference']:>12.0e}"
        )
    print(f"bars for small at 320 ms: offline {REALTIME:g}x real time, ratio {RATIO:g}")
