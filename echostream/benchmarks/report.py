"""``echostream benchmark all``: every benchmark with short settings, and a page with a picture of what came out.

The picture shows what a segment of 160 ms costs each encoder after so many seconds of speech.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

from echostream.benchmarks import encoder, stream
from echostream.benchmarks.common import add_options, describe
from echostream.benchmarks.vocoder import RATIO, REALTIME
from echostream.errors import EchoStreamError, require
from echostream.evaluation.table import markdown
from echostream.files import write_text

NAMES = ("encoder", "stream", "vocoder", "train")
COLOURS = {
    encoder.EAGER: "#8172b3",
    encoder.SCRIPTED: "#937860",
    encoder.SCRIPTED_INT8: "#c44e52",
    encoder.OURS: "#4c72b0",
    encoder.FP32: "#55a868",
    encoder.INT8: "#2e7d32",
    encoder.RECOMPUTE: "#333333",
}
LIMITS = """\
- Weights are random and what the model says is forced, at the pace of real speech (3 subwords a second, 8 units each).
  Costs do not depend on the weights, but quality is not measured here; for it see `echostream evaluate`.
- Computing time alone: how late words come also depends on the policy, and on the audio that has to be waited for.
- One run on one machine. Medians hold against short disturbances; on a machine with other work every figure is too
  high, by the caches and the memory bus that are shared. Ratios between contenders of one table suffer less.
- torchaudio's Emformer stands behind our subsampler in eager torch in all its forms, since it has none of its own.
- On Linux exported graphs ask for pages of 2 MB for their weights (`memory.huge_pages`); torch's lie where malloc put
  them.
- `recompute` has the shape of StreamSpeech's encoder, not its code, and only the encoder; its decoders and features
  would be computed again, too. Between chunks it costs nothing, so its share per segment falls with longer chunks.
- int8 changes what is computed; how much quality that costs is not visible here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="leave the other benchmarks out")
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="speech fed to a session of each backend (default: 2)"
    )
    parser.add_argument("--segments", type=int, default=200, help="segments of the encoder benchmark (default: 200)")
    parser.add_argument("--small", action="store_true", help="the small model instead of the default configuration")
    parser.add_argument(
        "--report", type=Path, metavar="FILE.md", help="write a page with tables, and beside it a picture, FILE.svg"
    )
    add_options(parser)


def plan(args: argparse.Namespace) -> list[list[str]]:
    """The command lines to be run, without the script's name.

    Raises:
        EchoStreamError: the report's name does not end in ``.md``. MissingExtraError: matplotlib is not installed.
    """
    if args.report:
        if args.report.suffix != ".md":
            raise EchoStreamError(f"report {args.report} must end in .md")
        require("matplotlib", "simuleval")
    common = ["--threads", str(args.threads), "--clock", args.clock, "--matmul-precision", args.matmul_precision]
    size = ["--small"] if args.small else []
    batch = str(max(2, args.segments // 10))
    commands = {
        "encoder": [["--segments", str(args.segments), "--batch-segments", batch, *size]],
        "stream": [
            ["--backend", name, "--minutes", f"{args.minutes:g}", "--rounds", "2", "--sessions", "0", *size]
            for name in stream.BACKENDS
        ],
        "vocoder": [["--repeats", "3"]],
        "train": [["--batch", "1", "--seconds", "30", "--repeats", "2"]],
    }
    return [[name, *options, *common] for name in args.only for options in commands[name]]


def gather(args: argparse.Namespace, parts: list[dict]) -> dict:
    """All figures in one; written to ``args.report`` if there is one."""
    report = {"benchmark": "all", "date": datetime.date.today().isoformat(), "parts": parts}
    if args.report:
        picture = None
        for part in parts:
            if part["benchmark"] == "encoder" and "elapsed" in part:
                picture = args.report.with_suffix(".svg")
                draw(part, picture)
        write_text(args.report, page(report, picture))
        report["written"] = [str(path) for path in (args.report, picture) if path]
    return report


def show(report: dict) -> None:
    for path in report.get("written", ()):
        print(f"wrote {path}")


def page(report: dict, picture: Path | None) -> str:
    """The report as Markdown."""
    parts = report["parts"]
    first = parts[0]
    lines = [
        "# Benchmarks",
        f"Written by `make bench` (`echostream benchmark all`) on {report['date']}: {describe(first)}.",
        "Figures with a slash are the median and the 95th percentile, others medians. Encoders took turns segment by "
        "segment, as did training passes and vocoders; the backends of the whole chain ran one after the other.",
    ]
    sections = {"encoder": _encoder, "vocoder": _vocoder, "train": _train}
    for part in parts:
        if part["benchmark"] in sections:
            lines += sections[part["benchmark"]](part, picture)
        if part["benchmark"] == "stream" and part is next(p for p in parts if p["benchmark"] == "stream"):
            lines += _streams([p for p in parts if p["benchmark"] == "stream"])
    lines += ["## What these figures do not show", LIMITS, "## Commands"]
    commands = [f"echostream benchmark {part['command']}  # load {part['load']:.1f}" for part in parts]
    return "\n\n".join([*lines, "\n".join(["```", *commands, "```"])]) + "\n"


def _pair(figures: dict[str, float]) -> str:
    return f"{figures['p50']:.1f} / {figures['p95']:.1f}"


def _encoder(part: dict, picture: Path | None) -> list[str]:
    batches = part["batches"]
    header = ["contender", *(f"{b['batch']} stream{'s' * (b['batch'] > 1)}" for b in batches)]
    rows = [
        [name, *(f"{b['ms'][name]['p50']:.2f} / {b['ms'][name]['p95']:.2f}" for b in batches)]
        for name in batches[0]["ms"]
    ]
    lines = [
        "## Encoder",
        f"ms of the {part['model']} encoder, subsampler included, per {part['segment_ms']:g} ms segment and stream:",
        markdown(header, rows),
        *filter(None, ["\n".join(f"- {line}" for line in encoder.verdicts(part))]),
    ]
    if "elapsed" not in part:
        return lines
    marks = part["elapsed"]
    rows = [[name, *(f"{m['ms'][name]['p50']:.1f}" for m in marks)] for name in marks[0]["ms"]]
    return [
        *lines,
        f"The same after so much speech (medians). `{encoder.RECOMPUTE}` encodes the whole history again every "
        f"{part['chunk_ms']} ms; this is a segment's share of it:",
        markdown(["contender", *(f"{m['seconds']:.1f} s" for m in marks)], rows),
        *([f"![Cost of a segment against elapsed time]({picture.name})"] if picture else []),
    ]


def _streams(parts: list[dict]) -> list[str]:
    header = ["backend", "elapsed", *stream.STAGES, "whole", "real-time factor", "bar"]
    rows = []
    for part in parts:
        for mark in part["marks"]:
            last = mark is part["marks"][-1]
            rows.append(
                [
                    part["backend"],
                    f"{mark['elapsed_s']:g} s",
                    *(f"{mark['ms'][name]['p50']:.1f}" for name in stream.STAGES),
                    _pair(mark["ms"]["whole"]),
                    f"{part['stream']['real_time_factor']:.3f}" if last else "",
                    f"{stream.BAR_REAL_TIME[part['backend']]:g}" if last and part["model"] == "default" else "",
                ]
            )
    return [
        "## Whole chain",
        f"ms per {parts[0]['chunk_ms']} ms chunk of a session of the {parts[0]['model']} model that hears, translates "
        f"and speaks, sentences of {parts[0]['sentence_s']:g} s (stages: medians; the real-time factor is that of all "
        "speech fed, one session):",
        markdown(header, rows),
    ]


def _vocoder(part: dict, _: Path | None) -> list[str]:
    rows = [
        [
            f"{name}, {backend}",
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['offline_times_realtime']:.1f}x",
            f"{row['streaming_times_realtime']:.1f}x",
            f"{row['ratio']:.2f}",
        ]
        for name, found in part["presets"].items()
        for backend, row in found.items()
    ]
    header = ["preset", "parameters", "offline", f"in chunks of {part['chunk_ms']} ms", "streaming / offline"]
    return [
        "## Vocoder",
        f"Seconds of speech per second of computing, in torch and, for causal vocoders, through exported graphs (bars "
        f"of `small`: {REALTIME:g}x offline, ratio {RATIO:g}):",
        markdown(header, rows),
    ]


def _train(part: dict, _: Path | None) -> list[str]:
    rows = [
        [name, f"{1000 * seconds:.0f}", f"{part['audio_seconds_per_second'][name]:.1f}"]
        for name, seconds in part["seconds_per_pass"].items()
    ]
    return [
        "## Training",
        f"Forward and backward of {part['layers']} Emformer layers, batch {part['batch']}, {part['precision']}:",
        markdown(["contender", "ms a pass", "seconds of audio per second"], rows),
    ]


def draw(part: dict[str, Any], path: Path) -> None:
    """Cost of a segment against elapsed time, both axes logarithmic, as SVG."""
    require("matplotlib", "simuleval")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    marks = part["elapsed"]
    seconds = [mark["seconds"] for mark in marks]
    # Text stays text and nothing is random: the file is small, and the same for the same figures.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "echostream", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, colour in COLOURS.items():
            costs = [mark["ms"][name]["p50"] for mark in marks]
            style = "--" if name == encoder.RECOMPUTE else "-"
            axes.plot(seconds, costs, style, marker="o", markersize=4, color=colour, label=name)
        axes.axhline(part["segment_ms"], color="#999999", linewidth=1, linestyle=":", label="real time")
        axes.set(xscale="log", yscale="log", xlabel="seconds of speech so far", xticks=seconds)
        axes.set_ylabel(f"ms{' of CPU' if part['clock'] == 'cpu' else ''} per {part['segment_ms']:g} ms of speech")
        axes.set_title(f"Encoder and subsampler, {part['threads']} thread(s), {part['machine']}", fontsize=11)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.set_xticks(seconds, [f"{s:.1f}" for s in seconds])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right center", fontsize=9, frameon=False)
        figure.savefig(path, metadata={"Date": None})
