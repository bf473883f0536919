"""``benchmark.py vocoder``: what speaking costs, whole sequences against a stream in chunks.

The preset ``small`` with the shipped voice's weights, ``v1`` with random ones (its cost does not depend on them), on
random units with the durations that the vocoder predicts. A chunk is as many units as last ``--chunk-ms`` on average.
Whole and streamed passes take turns; the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor
from tqdm import tqdm

from echostream.benchmarks.common import add_options, clock_of, describe, surroundings
from echostream.constants import UNIT_RATE
from echostream.models.decoders.vocoder import PRESETS, CodeHiFiGAN, VocoderConfig
from echostream.models.decoders.vocoder_layers import arrange_weights
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
        model = load(None, None) if name == "small" else CodeHiFiGAN(VocoderConfig.preset(name)).eval()
        arrange_weights(model)
        seconds = args.seconds / (3 if name == "v1" else 1)
        report["presets"][name] = measure(model, seconds, args.chunk_ms, args.repeats, clock, name)
    return report


@torch.inference_mode()
def measure(model: CodeHiFiGAN, seconds: float, chunk_ms: int, repeats: int, clock, name: str) -> dict[str, float]:
    """Costs of about ``seconds`` of speech, offline and in chunks, and how far ahead the vocoder looks."""
    vocabulary = model.config.num_embeddings
    probe = torch.randint(vocabulary, (1, 100))
    frames = model(probe)[0].shape[1] / model.hop
    units = torch.randint(vocabulary, (1, max(1, round(seconds * UNIT_RATE * 100 / frames))))
    size = max(1, round(chunk_ms / 1000 * UNIT_RATE * 100 / frames))

    def streamed() -> Tensor:
        state, out = model.init_state(1), []
        chunks = units.split(size, dim=1)
        for i, chunk in enumerate(chunks):
            last = torch.tensor([i == len(chunks) - 1])
            waveform, _, state = model.step(chunk, torch.tensor([chunk.shape[1]]), state, last)
            out.append(waveform)
        return torch.cat(out, dim=1)

    candidates = {"offline": lambda: model(units)[0], "streaming": streamed}
    times: dict[str, list[float]] = {kind: [] for kind in candidates}
    spoken = {}
    for round_ in tqdm(range(repeats + 1), name):
        for kind, speak in candidates.items():
            start = clock()
            spoken[kind] = speak()
            if round_:
                times[kind].append(clock() - start)
    length = spoken["offline"].shape[1] / model.config.sampling_rate
    offline, streaming = (statistics.median(times[kind]) for kind in candidates)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": length,
        "offline_times_realtime": length / offline,
        "streaming_times_realtime": length / streaming,
        "ratio": streaming / offline,
        "lookahead_ms": model.lookahead_ms,
        "largest_difference": float((spoken["offline"] - spoken["streaming"]).abs().max()),
    }


def show(report: dict) -> None:
    print(f"{report['chunk_ms']} ms chunks, {describe(report)}")
    names = ("parameters", "offline", "streaming", "ratio", "look-ahead", "difference")
    print(f"{'preset':<8}" + "".join(f"{name:>{width}}" for name, width in zip(names, (12, 10, 11, 7, 12, 12))))
    for name, row in report["presets"].items():
        print(
            f"{name:<8}{row['parameters'] / 1e6:>11.2f}M{row['offline_times_realtime']:>9.1f}x"
            f"{row['streaming_times_realtime']:>10.1f}x{row['ratio']:>7.2f}{row['lookahead_ms']:>9.0f} ms"
            f"{row['largest_difference']:>12.0e}"
        )
    print(f"bars for small at 320 ms: offline {REALTIME:g}x real time, ratio {RATIO:g}")
