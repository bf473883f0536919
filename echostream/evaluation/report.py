"""The report: what several systems reach, how sure that is, and what it costs in delay; Markdown with pictures.

Everything in it follows from the results, the manifest and the seed: the same command gives the same report.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from sacrebleu.significance import Result
from tqdm import tqdm

from echostream.constants import FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE
from echostream.data.corpus.tts import TEST_ONLY_VOICES
from echostream.data.manifest import Utterance
from echostream.errors import EchoStreamError, require
from echostream.evaluation import significance, sweep
from echostream.evaluation.run import LATENCY
from echostream.evaluation.significance import Measure, bootstrap
from echostream.evaluation.systems import System
from echostream.evaluation.table import markdown
from echostream.files import write_text
from echostream.text_file import read_json

LENGTH_BANDS = ((1, 4), (5, 8), (9, 12), (13, None))  # words of the reference
COMPARED = ("WER", "BLEU", "ASR-BLEU")
EQUAL_QUALITY = 1.0  # BLEU
NONE = "–"


@dataclass(frozen=True)
class Options:
    """How a report is made.

    Attributes:
        seed: of resampling and of the examples, at least 1.
        samples: bootstrap samples.
        examples: how many sentences to show.
        ceiling: name of the system of whose quality the simultaneous ones reach a share.
        language: of the translations, which BLEU's tokenizer follows.
    """

    seed: int = 1
    samples: int = 1000
    examples: int = 10
    ceiling: str | None = None
    language: str = "en"


def write(
    path: Path,
    systems: Sequence[System],
    manifest: Sequence[Utterance],
    sweep_folder: Path | None,
    longform_folder: Path | None,
    options: Options,
) -> None:
    """Write the report to ``path`` and its pictures beside it. Everything but ``path`` may be empty, not all of it.

    Raises:
        EchoStreamError: there is nothing to report, a result is missing or damaged, or two systems have different
            references for one sentence.
        MissingExtraError: matplotlib is not installed.
    """
    if options.seed < 1 or options.samples < 1 or options.examples < 0:
        raise EchoStreamError(
            f"--seed {options.seed} and --samples {options.samples} must be at least 1, --examples {options.examples} 0"
        )
    ceiling = next((system for system in systems if system.name == options.ceiling), None)
    if options.ceiling and ceiling is None:
        names = ", ".join(system.name for system in systems) or "none"
        raise EchoStreamError(f"--ceiling {options.ceiling!r} is none of the systems: {names}")
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [quality(systems, options)] if systems else []
    if systems:
        parts += [by_voice(systems, manifest, options), by_length(systems, options)]
    if any(system.latency for system in systems):
        parts.append(simultaneous(systems, ceiling, path.with_name(f"{path.stem}-simultaneous.png"), options))
    if sweep_folder:
        parts.append(policies(sweep_folder, manifest, path.with_name(f"{path.stem}-sweep.png")))
    if longform_folder:
        parts.append(long_form(longform_folder))
    if len(systems) > 1:
        parts.append(comparisons(systems, options))
    if systems and options.examples:
        parts.append(examples(systems, options))
    if not parts:
        raise EchoStreamError("there is nothing to report; name a --system NAME=PATH, a --sweep or a --longform folder")
    head = [
        "# Evaluation report",
        f"Bootstrap: {options.samples} samples of the sentences, seed {options.seed}; ± is half of a 95 % interval. "
        "WER and ASR-BLEU without case and punctuation, BLEU and chrF with them (sacrebleu).",
    ]
    write_text(path, "\n\n".join([*head, *parts]) + "\n")


# ---- quality -------------------------------------------------------------------------------------------------------


def figure(measure: Measure, systems: Sequence[System], ids: Sequence[str], options: Options) -> list[Result]:
    """Of ``bootstrap``, for sentences that all ``systems`` have."""
    references = [systems[0].sentences[i][measure.reference] for i in ids]
    for system in systems[1:]:
        for i, reference in zip(ids, references, strict=True):
            other = system.sentences[i][measure.reference]
            if other.split() != reference.split():
                raise EchoStreamError(
                    f"sentence {i!r} has the reference {reference!r} in {systems[0].name}, {other!r} in {system.name}; "
                    "systems can be compared on the same test set only"
                )
    outputs = [[system.sentences[i][measure.hypothesis] for i in ids] for system in systems]
    return bootstrap(measure, outputs, references, options.samples, options.seed)


def cells(measures: Iterable[Measure], system: System, ids: Sequence[str], options: Options) -> list[str]:
    """``score ± half interval`` of each measure that the system has, on some of its sentences."""
    row = []
    for measure in measures:
        if system.has(measure.hypothesis, measure.reference):
            (result,) = figure(measure, [system], ids, options)
            row.append(f"{result.score:.2f} ± {result.ci:.2f}")
        else:
            row.append(NONE)
    return row


def measures_of(systems: Sequence[System], options: Options, names: Sequence[str] = ()) -> list[Measure]:
    """The measures that at least one system has, of those named or of all."""
    return [
        measure
        for measure in significance.measures(options.language)
        if any(system.has(measure.hypothesis, measure.reference) for system in systems)
        and (not names or measure.name in names)
    ]


def quality(systems: Sequence[System], options: Options) -> str:
    """Every head of every system over all its sentences."""
    measures = measures_of(systems, options)
    if not measures:
        raise EchoStreamError("the results hold no hypothesis with its reference (asr, st, mt, heard with *_ref)")
    rows = [
        [system.name, str(len(system.sentences)), *cells(measures, system, list(system.sentences), options)]
        for system in tqdm(systems, desc="quality")
    ]
    lines = ["## Quality", markdown(["system", "sentences", *(measure.name for measure in measures)], rows)]
    heard = sorted({system.recogniser for system in systems if system.recogniser})
    if heard:
        lines.append(f"ASR-BLEU: what {' and '.join(heard)} heard.")
    if len({frozenset(system.sentences) for system in systems}) > 1:
        lines.append("Not all systems translated the same sentences: compare them under *Comparisons* only.")
    return "\n\n".join(lines)


def grouped(title: str, group: str, systems: Sequence[System], groups: Mapping[str, set[str]], options: Options) -> str:
    """A row for every system and every group of sentences that it has."""
    measures, rows = measures_of(systems, options), []
    for system in tqdm(systems, desc=title.lower()):
        for name, members in groups.items():
            ids = [i for i in system.sentences if i in members]
            if ids:
                rows.append([system.name, name, str(len(ids)), *cells(measures, system, ids, options)])
    table = markdown(["system", group, "sentences", *(measure.name for measure in measures)], rows)
    return f"## {title}\n\n{table}"


def by_voice(systems: Sequence[System], manifest: Sequence[Utterance], options: Options) -> str:
    """Voices that training heard, together and one by one, and those kept for tests."""
    voices: dict[str, set[str]] = {}
    for row in manifest:
        if row.extra.get("voice"):
            voices.setdefault(row.extra["voice"].split()[0], set()).add(row.id)  # without speed and pitch
    if not voices:
        return "## By voice\n\nNo voices are known: name a --manifest with a column `voice`."
    heard = {name: ids for name, ids in sorted(voices.items()) if name not in TEST_ONLY_VOICES}
    unheard = {f"{name} (unseen)": ids for name, ids in sorted(voices.items()) if name in TEST_ONLY_VOICES}
    groups = {"all voices of the training": set().union(*heard.values()), **unheard, **heard}
    return grouped("By voice", "voice", systems, groups, options)


def by_length(systems: Sequence[System], options: Options) -> str:
    """By how many words the reference has."""
    words = {
        i: len((texts.get("mt_ref") or texts.get("asr_ref", "")).split())
        for system in systems
        for i, texts in system.sentences.items()
    }
    groups = {
        f"{low} to {high} words" if high else f"{low} words and more": {
            i for i, count in words.items() if low <= count <= (high or math.inf)
        }
        for low, high in LENGTH_BANDS
    }
    return grouped("By length of the reference", "length", systems, groups, options)


# ---- delay ---------------------------------------------------------------------------------------------------------


def simultaneous(systems: Sequence[System], ceiling: System | None, picture: Path, options: Options) -> str:
    """Quality against every latency; times in ms, computation-aware ones in brackets."""
    running = [system for system in systems if system.latency]
    measures = [m for m in measures_of(running, options) if m.name in COMPARED]
    header = ["system", "options", *(m.name for m in measures), *LATENCY, "AL / source", "RTF", "silent"]
    shares = [m for m in measures if ceiling and ceiling.has(m.hypothesis, m.reference) and not m.falls]
    header += [f"{m.name} / {ceiling.name}" for m in shares]
    rows = []
    for system in running:
        figures = system.latency
        row = [system.name, system.options or NONE, *cells(measures, system, list(system.sentences), options)]
        row += [f"{figures[name]:.0f} ({figures[name + '_CA']:.0f})" for name in LATENCY]
        row += [f"{figures['AL'] / system.source_ms:.1%}", f"{figures['RTF']:.3f}", f"{figures['silent']:.0f}"]
        for measure in shares:
            row.append(share(measure, system, ceiling, options))
        rows.append(row)
    offline = [system for system in systems if not system.latency]
    draw(running, offline, measures, picture, options)
    length = ", ".join(sorted({f"{system.source_ms / 1000:.2f} s" for system in running}))
    return "\n\n".join([
        "## Simultaneous",
        markdown(header, rows),
        f"Times in ms, computation-aware in brackets; mean length of the recordings: {length}.",
        f"![quality against average lagging]({picture.name})",
    ])  # fmt: skip


def share(measure: Measure, system: System, ceiling: System, options: Options) -> str:
    """Of the ceiling's figure, on the sentences that both have."""
    ids = [i for i in system.sentences if i in ceiling.sentences]
    if not ids or not system.has(measure.hypothesis):
        return NONE
    own, best = figure(measure, [system, ceiling], ids, options)
    return f"{own.score / best.score:.1%}" if best.score else NONE


def draw(
    running: Sequence[System], offline: Sequence[System], measures: Sequence[Measure], path: Path, options: Options
) -> None:
    """Each quality over AL: a line for each run, hollow marks for computation-aware times; offline systems as lines.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "simuleval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7.0 * len(measures), 5.0), layout="constrained")
    FigureCanvasAgg(picture)
    families = list(dict.fromkeys(system.family for system in running))
    for axis, measure in zip(picture.subplots(1, len(measures), squeeze=False)[0], measures):
        for number, family in enumerate(families):
            colour, marker = (looks[number % len(looks)] for looks in (sweep.COLOURS, sweep.MARKERS))
            points = []
            for system in running:
                if system.family == family and system.has(measure.hypothesis, measure.reference):
                    (result,) = figure(measure, [system], list(system.sentences), options)
                    points.append((system.latency["AL"] / 1000, system.latency["AL_CA"] / 1000, result))
            if points:
                plain, aware, results = zip(*points)
                scores, intervals = [r.score for r in results], [r.ci for r in results]
                axis.errorbar(plain, scores, intervals, fmt=f"{marker}-", color=colour, capsize=3, label=family)
                axis.plot(aware, scores, marker, color=colour, markerfacecolor="none", linestyle=":")
        for number, system in enumerate(offline):
            if system.has(measure.hypothesis, measure.reference):
                (result,) = figure(measure, [system], list(system.sentences), options)
                style = {"color": "#555555", "linestyle": ("--", ":", "-.")[number % 3], "linewidth": 1}
                axis.axhline(result.score, label=system.name, **style)
        axis.set_xlabel("AL (s); hollow: computation-aware")
        axis.set_ylabel(measure.name)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    picture.savefig(path, dpi=130)


def policies(folder: Path, manifest: Sequence[Utterance], picture: Path) -> str:
    """All points of a sweep, its picture, and how early each policy is as good as waiting for the sentence's end."""
    found = _read_json(folder / "sweep.json", "echostream evaluate sweep writes it")
    results = [
        (sweep.Point(p["policy"], tuple(p["knobs"].items()), p["chunk_ms"]), p["figures"]) for p in found["points"]
    ]
    sweep.draw(results, picture, found["title"])
    length = _mean_source_ms(folder, results[0][0], manifest)
    header = ["policy", "knobs", "chunk_ms", *results[0][1], "AL / source"]
    rows = [[*sweep.row(*result), f"{result[1]['AL'] / length:.1%}" if length else NONE] for result in results]
    parts = ["## Policies", f"{found['title']}; AL and LAAL per word of the text unless a name ends in `_speech`."]
    parts += [markdown(header, rows), f"![policies]({picture.name})"]
    waiting = [figures for point, figures in results if point.policy == "sentence"]
    if waiting:
        parts.append(earlier(results, max(waiting, key=lambda figures: figures["BLEU"])))
    return "\n\n".join(parts)


def earlier(results: Sequence[tuple[sweep.Point, Mapping[str, float]]], waiting: Mapping[str, float]) -> str:
    """The earliest point of each policy whose BLEU is within ``EQUAL_QUALITY`` of ``waiting``'s."""
    rows = []
    for policy in dict.fromkeys(point.policy for point, _ in results):
        good = [r for r in results if r[0].policy == policy and r[1]["BLEU"] >= waiting["BLEU"] - EQUAL_QUALITY]
        if good:
            point, figures = min(good, key=lambda result: result[1]["AL"])
            cells = sweep.row(point, figures)[:3]
            rows.append([*cells, f"{figures['BLEU']:.2f}", f"{figures['AL']:.0f}",
                         f"{figures['AL'] / waiting['AL'] - 1:+.1%}"])  # fmt: skip
    table = markdown(["policy", "knobs", "chunk_ms", "BLEU", "AL", "AL against waiting"], rows)
    until = f"within {EQUAL_QUALITY:g} BLEU of waiting for the sentence's end ({waiting['BLEU']:.2f})"
    return f"The earliest point of each policy {until}:\n\n{table}"


def _mean_source_ms(folder: Path, point: sweep.Point, manifest: Sequence[Utterance]) -> float | None:
    """Of the sweep's recordings, if they are the first ones of this manifest."""
    of = _read_json(folder / "points" / f"{point.name}.json", "sweep writes it")["of"]
    rows = manifest[: of["recordings"]]
    if sweep.fingerprint([Path(row.audio).name for row in rows], [row.tgt_text for row in rows]) != of["data"]:
        return None
    if not all(row.n_frames for row in rows):
        return None
    samples = sum((row.n_frames - 1) * FRAME_SHIFT + FRAME_LENGTH for row in rows)
    return 1000 * samples / SAMPLE_RATE / len(rows)


def long_form(folder: Path) -> str:
    """The figures of whole talks."""
    figures = _read_json(folder / "longform.json", "echostream evaluate longform writes it")
    rows = [[name, f"{value:.3f}" if isinstance(value, float) else str(value)] for name, value in figures.items()]
    return f"## Whole talks\n\n{markdown(['measure', 'value'], rows)}"


def _read_json(path: Path, origin: str) -> dict[str, Any]:
    if not path.is_file():
        raise EchoStreamError(f"{path} does not exist; {origin}")
    return read_json(path, EchoStreamError)


# ---- one against another -------------------------------------------------------------------------------------------


def comparisons(systems: Sequence[System], options: Options) -> str:
    """Every pair of systems on the sentences that both have, by paired bootstrap."""
    rows = []
    for first, second in tqdm(list(combinations(systems, 2)), desc="comparisons"):
        ids = [i for i in first.sentences if i in second.sentences]
        for measure in measures_of([first, second], options, COMPARED):
            texts = (measure.hypothesis, measure.reference)
            if not ids or not (first.has(*texts) and second.has(*texts)):
                continue
            one, two = figure(measure, [first, second], ids, options)
            difference = two.score - one.score
            winner = NONE
            if two.p_value < 0.05 and difference:
                winner = second.name if (difference < 0) == measure.falls else first.name
            rows.append([
                measure.name, first.name, second.name, str(len(ids)), f"{one.score:.2f}", f"{two.score:.2f}",
                f"{difference:+.2f}", f"{two.p_value:.4f}", winner,
            ])  # fmt: skip
    header = ["measure", "A", "B", "sentences", "of A", "of B", "B − A", "p", "better (p < 0.05)"]
    text = "Paired bootstrap on the sentences that both have; p is not corrected for the number of comparisons."
    return f"## Comparisons\n\n{text}\n\n{markdown(header, rows)}"


def examples(systems: Sequence[System], options: Options) -> str:
    """Some sentences drawn by the seed, of those that every system has, or else that any has."""
    every = [set(system.sentences) for system in systems]
    ids = sorted(set.intersection(*every) or set.union(*every))
    parts = ["## Examples", f"Drawn at random, seed {options.seed}."]
    for i in random.Random(options.seed).sample(ids, min(options.examples, len(ids))):
        known = [(system, system.sentences[i]) for system in systems if i in system.sentences]
        lines = {label: next((t[key] for _, t in known if key in t), None) for label, key in
                 (("source", "asr_ref"), ("reference", "mt_ref"))}  # fmt: skip
        for system, texts in known:
            lines |= {f"{system.name}, {key}": texts[key] for key in ("asr", "st", "mt", "heard") if key in texts}
        rows = [[label, text.replace("|", "\\|") or NONE] for label, text in lines.items() if text is not None]
        parts.append(f"`{i}`\n\n{markdown(['', 'text'], rows)}")
    return "\n\n".join(parts)
