"""Report on the units of a corpus: purity against phones, PNMI, unit and bit rates.

    echostream unit-report DATA                                       # the corpus's own units
    echostream unit-report DATA --compare 100 500 1000 --features mfcc whisper --limit 300

Phones are espeak-ng's for the target texts; when each is spoken is found on MFCCs, see echostream/units/align.py.
--compare fits k-means on the recordings at hand, a quick look: figures of different --limit do not compare.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from echostream.audio.io import load_audio
from echostream.data.corpus import voices
from echostream.data.corpus.rows import hash_int
from echostream.data.corpus.tts import phonemes
from echostream.errors import ManifestError
from echostream.loading import read_mapping
from echostream.text_file import iter_lines, table_rows
from echostream.units.align import align, phone_states
from echostream.units.dedup import expand
from echostream.units.features import build_features
from echostream.units.kmeans import KMeans, Projection, fit_kmeans, load_kmeans
from echostream.units.report import bit_rate, purity
from echostream.vocoder.dataset import UnitUtterance, read_units

COLUMNS = {
    "units": "units",
    "used": "used",
    "phone_purity": "phone purity",
    "cluster_purity": "cluster purity",
    "pnmi": "PNMI",
    "runs_per_second": "units/s",
    "bits_per_second": "bits/s",
    "bits_per_second_runs": "dedup. bits/s",
    "bits_per_second_fixed": "log2(K) bits/s",
    "bits_per_second_runs_fixed": "dedup. log2(K)",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "echostream unit-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("data", type=Path, help="corpus directory of echostream prepare")
    p.add_argument("--limit", type=int, default=1000, metavar="N", help="recordings, by hash (default: 1000)")
    p.add_argument(
        "--language",
        help="espeak-ng's voice for the phones "
        "(default: the corpus's target language, en-us where config.yaml does not tell it)",
    )
    p.add_argument("--compare", type=int, nargs="+", metavar="K", help="fit so many clusters instead")
    p.add_argument("--features", nargs="+", default=["whisper"], choices=("whisper", "hubert", "mfcc"))
    p.add_argument("--features-model", type=Path, metavar="PATH", help="Whisper directory or HuBERT checkpoint")
    p.add_argument("--layers", type=int, nargs="+", default=[11], metavar="N", help="of HuBERT (default: 11)")
    p.add_argument("--steps", type=int, default=60, help="of mini-batch k-means with --compare (default: 60)")
    p.add_argument("--json", action="store_true")
    return p


def read_texts(data: Path) -> dict[str, str]:
    """Target recording -> its text, from the manifests."""
    texts: dict[str, str] = {}
    for path in sorted(data.glob("*.tsv")):
        for row in table_rows(iter_lines(path)):
            if {"id", "tgt_text"} <= set(row):
                texts[row.get("target") or row["id"]] = row["tgt_text"]
    if not texts:
        raise ManifestError(f"{data} has no manifest with the column tgt_text")
    return texts


def target_language(data: Path) -> str:
    """espeak-ng's name of what the corpus is translated into."""
    path = data / "config.yaml"
    language = str(read_mapping(path).get("target_lang") or "") if path.is_file() else ""
    return "en-us" if language in ("", "en") else voices.espeak_accents(language)[0]


def labels_of(items: list[UnitUtterance], texts: dict[str, str], language: str) -> list[np.ndarray | None]:
    """The phone of every frame of each recording."""
    mfcc = list(build_features("mfcc").extract([load_audio(item.audio) for item in tqdm(items, "reading")]))
    states = [phone_states(phonemes(texts[item.id], language)) for item in tqdm(items, "phones")]
    return align(mfcc, states, progress=lambda rounds: tqdm(rounds, "aligning"))


def measure(units: list[np.ndarray], labels: list[np.ndarray | None], count: int) -> dict[str, float]:
    pairs = [(u[:n], y[:n]) for u, y in zip(units, labels) if y is not None for n in [min(len(u), len(y))]]
    figures = purity(np.concatenate([u for u, _ in pairs]), np.concatenate([y for _, y in pairs]))
    return {"units": count, "recordings": len(pairs), **figures, **bit_rate(units, count)}


def compared(args: argparse.Namespace, items: list[UnitUtterance], labels: list[np.ndarray | None]) -> dict[str, dict]:
    """Figures of k-means with each number of clusters on each kind of features."""
    found = {}
    for kind in args.features:
        for layer in args.layers if kind == "hubert" else [0]:
            extractor = build_features(kind, None if kind == "mfcc" else args.features_model, layer)
            vectors = list(extractor.extract([load_audio(item.audio) for item in tqdm(items, extractor.name)]))
            projection = Projection.fit(vectors, 16 if kind == "whisper" else 0)
            frames = projection(np.concatenate(vectors))
            for count in args.compare:
                centroids = fit_kmeans(
                    frames,
                    count,
                    steps=args.steps,
                    batch=4000,
                    full_steps=1,
                    progress=lambda steps, name=f"{extractor.name} {count}": tqdm(steps, name),
                )
                model = KMeans(centroids, projection, extractor.name)
                found[f"{extractor.name} {count}"] = measure([model.units(v) for v in vectors], labels, count)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    items, texts = read_units(args.data / "target" / "units.tsv"), read_texts(args.data)
    items = [item for item in items if item.id in texts and item.audio.is_file()]
    items = sorted(items, key=lambda item: hash_int(1, "report", item.id))[: args.limit]
    if not items:
        raise ManifestError(f"{args.data} has no recording with units and a text")
    labels = labels_of(items, texts, args.language or target_language(args.data))
    if args.compare:
        report = compared(args, items, labels)
    else:
        kmeans = args.data / "units" / "kmeans.npz"
        largest = max(int(item.units.max()) for item in items) + 1
        model = load_kmeans(kmeans) if kmeans.is_file() else None
        units = [np.array(expand(item.units, item.durations)) for item in items]
        name, count = ("units.tsv", largest) if model is None else (model.features, len(model))
        report = {name: measure(units, labels, count)}
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print("| features | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, row in report.items():
        values = (f"{row[key]:.3f}" if 0 < row[key] < 1 else f"{row[key]:.4g}" for key in COLUMNS)
        print(f"| {name} | " + " | ".join(values) + " |")
    first = next(iter(report.values()))
    print(f"{first['recordings']} recordings, {first['hours']:.2f} h; 50 units/s before deduplication")
