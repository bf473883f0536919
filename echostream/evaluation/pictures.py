"""Pictures of recorded results as SVG: quality against latency, training curves, the flow of a recipe's phases.

Text stays text and nothing is random: the same results give the same file. (The cost against elapsed time is drawn by
``scripts/benchmark.py all --report``.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echostream.errors import EchoStreamError, require
from echostream.evaluation.sweep import frontier
from echostream.files import replacing
from echostream.recipe import read_flags
from echostream.text_file import read_json, read_lines

COLOURS = ("#4c72b0", "#55a868", "#c44e52", "#8172b3", "#ccb974", "#64b5cd", "#8c8c8c")
STARTS = ("encoder-init", "decoder-init", "mt-init", "finetune-from-model")  # flags that take over a checkpoint
_FIGURE = re.compile(r"(\w+)[= ](-?\d+(?:\.\d+)?(?:e-?\d+)?)(?=[ ,|]|$)")  # in fairseq's log lines


def quality_against_latency(folder: Path, path: Path) -> None:
    """Of a sweep (``evaluate.py sweep --output FOLDER``): BLEU against AL, each policy's best points joined.

    Raises:
        EchoStreamError: there is no ``sweep.json``. MissingExtraError: matplotlib is not installed.
    """
    found = read_json(folder / "sweep.json", EchoStreamError, "results of a sweep")
    with picture(path, found["title"]) as axes:
        for colour, policy in zip(COLOURS, dict.fromkeys(point["policy"] for point in found["points"])):
            of = [point["figures"] for point in found["points"] if point["policy"] == policy]
            points = [(figures["AL"] / 1000, figures["BLEU"]) for figures in of]
            axes.scatter(*zip(*points), s=14, color=colour, alpha=0.5)
            axes.plot(*zip(*frontier(points)), color=colour, label=policy)
        axes.set(xlabel="AL, seconds", ylabel="BLEU")


def training_curves(logs: Mapping[str, Path], path: Path, measure: str = "bleu", of: str = "validation") -> None:
    """Of fairseq-train's logs by name: a figure against updates: you should be here after N of them.

    Args:
        of: "validation", or "training" (every ``--log-interval`` updates).

    Raises:
        EchoStreamError: a log has no such figure.
    """
    with picture(path, f"{measure} of the {of} set") as axes:
        for colour, (name, log) in zip(COLOURS, logs.items()):
            points = reported(read_lines(log, EchoStreamError), measure, of)
            if not points:
                raise EchoStreamError(f"{log} has no {of} with the figure {measure!r}")
            axes.plot(*zip(*points), marker="o", markersize=3, color=colour, label=name)
        axes.set(xlabel="updates", ylabel=measure)


def reported(lines: Iterable[str], measure: str, of: str = "validation") -> list[tuple[int, float]]:
    """(updates, figure) of each validation in fairseq's log, or of each of its reports on training."""
    points: dict[int, float] = {}
    for line in lines:
        if ("| valid on " if of == "validation" else "train_inner") in line:
            values = dict(_FIGURE.findall(line))
            if measure in values and "num_updates" in values:
                points[int(values["num_updates"])] = float(values[measure])
    return sorted(points.items())


def phases(recipes: Sequence[Path], pair: str) -> dict[str, list[str]]:
    """Which recipes each recipe takes a checkpoint of, by their names; from the paths that they write and read."""
    flags = {path.stem: read_flags(path, pair) for path in recipes}
    writes = {str(values["save-dir"]): name for name, values in flags.items()}
    return {
        name: list(dict.fromkeys(
            writes[folder] for start in STARTS if (folder := str(Path(str(values.get(start, ""))).parent)) in writes
        ))
        for name, values in flags.items()
    }  # fmt: skip


def flow(recipes: Sequence[Path], path: Path, pair: str = "fr-en") -> None:
    """The phases of a training, each behind those whose checkpoints it takes over."""
    from_where = phases(recipes, pair)
    depth: dict[str, int] = {}
    while len(depth) < len(from_where):
        ready = [name for name in from_where if name not in depth and all(f in depth for f in from_where[name])]
        if not ready:
            raise EchoStreamError(f"the recipes {', '.join(set(from_where) - set(depth))} wait for each other")
        depth |= {name: max((depth[f] + 1 for f in from_where[name]), default=0) for name in ready}
    columns = [[name for name in depth if depth[name] == d] for d in range(max(depth.values()) + 1)]
    places = {name: (2.2 * d, -1.0 * i) for d, names in enumerate(columns) for i, name in enumerate(names)}
    with picture(path, "", size=(2.2 * len(columns), 1.1 * max(map(len, columns)) + 0.4)) as axes:
        for name, (x, y) in places.items():
            box = {"boxstyle": "round,pad=0.6", "facecolor": "#eef2f8", "edgecolor": COLOURS[0]}
            axes.text(x, y, name, ha="center", va="center", bbox=box)
            for other in from_where[name]:
                start, arrow = places[other], {"arrowstyle": "->", "shrinkA": 24, "shrinkB": 24, "color": "#555555"}
                axes.annotate("", (x, y), start, arrowprops=arrow)
        axes.set(xlim=(-1, 2.2 * len(columns) - 1.2), ylim=(-max(map(len, columns)) + 0.4, 0.6))
        axes.set_axis_off()


@contextmanager
def picture(path: Path, title: str, size: tuple[float, float] = (7.5, 4.5)) -> Any:
    """Axes whose picture is written to ``path`` at the end."""
    require("matplotlib", "simuleval")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "echostream", "font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
        with replacing(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})


__all__ = ["flow", "phases", "quality_against_latency", "reported", "training_curves"]
