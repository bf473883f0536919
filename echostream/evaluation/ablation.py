"""Variants of a recipe side by side: their figures, and how far each is from the first of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from echostream.errors import ConfigError
from echostream.evaluation.quality import unit_error_rate
from echostream.evaluation.significance import MEASURES, bootstrap
from echostream.evaluation.table import markdown

UNITS = "UER"  # unit error rate: no test of significance
KNOWN = {measure.name: measure for measure in MEASURES}


def compare(
    arms: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str], samples: int, seed: int = 1
) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of every arm.

    Args:
        arms: by name, the rows of its generate-<subset>.jsonl; all of the same sentences. The first is the reference.
        names: of measures, as in ``significance.MEASURES``, or UER.

    Returns:
        By arm and measure ``value``; of texts ``ci``, half the width of the 95 % interval; but for the first arm
        ``difference`` from it and, of texts, its ``p`` (paired bootstrap).

    Raises:
        ConfigError: there is no such measure.
    """
    by_id = {arm: {row["id"]: row for row in rows} for arm, rows in arms.items()}
    first = next(iter(arms))

    def column(arm: str, key: str) -> list[Any]:
        return [by_id[arm][i][key] for i in by_id[first]]

    figures: dict[str, dict[str, dict[str, float]]] = {arm: {} for arm in arms}
    for name in names:
        if name == UNITS:
            for arm in arms:
                texts = [[" ".join(map(str, units)) for units in column(arm, key)] for key in ("units", "units_ref")]
                figures[arm][name] = {"value": unit_error_rate(*texts)}
        elif name in KNOWN:
            measure = KNOWN[name]
            outputs = [column(arm, measure.hypothesis) for arm in arms]
            results = bootstrap(measure, outputs, column(first, measure.reference), samples, seed)
            for arm, result in zip(arms, results):
                figures[arm][name] = {"value": float(result.score), "ci": float(result.ci)}
                if result.p_value is not None:
                    figures[arm][name]["p"] = float(result.p_value)
        else:
            raise ConfigError(f"there is no measure {name!r}; there are {', '.join(KNOWN)} and {UNITS}")
        for arm in list(arms)[1:]:
            figures[arm][name]["difference"] = figures[arm][name]["value"] - figures[first][name]["value"]
    return figures


def table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of arms, each with ``about``, ``updates`` (by step), ``cpu_s`` and ``figures`` (``compare``)."""
    measures = list(next(iter(arms.values()))["figures"])
    rows = []
    for name, arm in arms.items():
        row = [name, arm["about"], " + ".join(map(str, arm["updates"].values())), f"{arm['cpu_s'] / 60:.1f}"]
        for figure in arm["figures"].values():
            cell = f"{figure['value']:.2f}"
            if "difference" in figure:
                cell += f" ({figure['difference']:+.2f}" + (f", p {figure['p']:.3f})" if "p" in figure else ")")
            row.append(cell)
        rows.append(row)
    return markdown(["arm", "differs in", "updates", "CPU min", *measures], rows)
