"""Does streaming keep its promises on real recordings? A table, and exit status 1 if not.

    echostream check-streaming                                           # the shipped model, its demo recordings
    echostream check-streaming --manifest data/es-en/test.tsv --count 20 --checkpoint-dir bundles/es-en

- ``split``: pushed in random pieces, a recording gives the same events (tokens, g, units, times), the same waveform.
- ``restore``: saved at random points and taken up by another session, likewise.
- ``training``, for every policy: the training forward, limited to the frames that were visible, gives the streamed MT
  and unit scores.
- ``batch``: streams of mixed ages in one batch give what they give alone; in fp64, since products of other shapes
  round otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from echostream.audio.io import load_audio
from echostream.benchmarks import parity
from echostream.checkpoint import DEFAULT_BUNDLE, Bundle, load_bundle
from echostream.data.manifest import read_manifest
from echostream.errors import EchoStreamError
from echostream.files import write_json
from echostream.streaming import SentenceEnd, make_policy
from echostream.streaming.policies.factory import POLICIES

DEMO = DEFAULT_BUNDLE.parent / "demo"
BAR = 1e-4  # of waveforms and scores


@dataclass
class Check:
    """A line of the table: what was compared, and what was found.

    Attributes:
        differing: runs that did not do the same.
        largest: difference of waveforms (split, restore, batch) or scores (training).
        first: what differed first.
    """

    name: str
    runs: int = 0
    sentences: int = 0
    tokens: int = 0
    units: int = 0
    differing: int = 0
    largest: float = 0.0
    first: str = ""

    def take(self, ends: list[SentenceEnd], difference: str, largest: float) -> None:
        self.runs += 1
        self.sentences += len(ends)
        self.tokens += sum(len(end.tokens) for end in ends)
        self.units += sum(len(end.units) for end in ends)
        self.differing += bool(difference)
        self.largest = max(self.largest, largest)
        self.first = self.first or difference

    @property
    def kept(self) -> bool:
        return not self.differing and self.largest <= BAR


def check(bundle: Bundle, recordings: list[np.ndarray], splits: int, seed: int) -> list[Check]:
    rng = np.random.default_rng(seed)
    rows = {name: Check(name) for name in ("split", "restore", *(f"training, {name}" for name in POLICIES), "batch")}

    def compare(name: str, found: list, expected: list) -> None:
        ends = [event for event in expected if isinstance(event, SentenceEnd)]
        rows[name].take(ends, parity.differs(found, expected), parity.wave_difference(found, expected))

    with tempfile.TemporaryDirectory() as folder:
        for samples in tqdm(recordings, desc="recordings"):
            expected = parity.translate(bundle, samples)
            for _ in range(splits):
                pieces = parity.random_pieces(len(samples), rng, int(rng.integers(1, len(samples))))
                compare("split", parity.translate(bundle, samples, pieces), expected)
            breaks = rng.integers(0, len(samples), 3).tolist()
            broken = parity.translate_with_breaks(bundle, samples, breaks, Path(folder) / "saved.npz")
            compare("restore", broken, expected)
            for name in POLICIES:
                found, ends = parity.compare_with_training(bundle, samples, policy=make_policy(name))
                rows[f"training, {name}"].take(ends, "", max(found.text, found.units))
    exact = replace(bundle, model=bundle.model.double(), vocoder=bundle.vocoder and bundle.vocoder.double())
    alone = [parity.translate(exact, samples) for samples in tqdm(recordings, desc="alone, fp64")]
    for found, expected in zip(parity.translate_together(exact, recordings, 4, rng), alone):
        compare("batch", found, expected)
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "echostream check-streaming", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint-dir", type=Path, default=DEFAULT_BUNDLE, help="default: the shipped model")
    parser.add_argument("--manifest", type=Path, help="recordings of a manifest (default: the demo's)")
    parser.add_argument("--audio-root", type=Path, help="of its src_audio (default: the manifest's folder)")
    parser.add_argument("--count", type=int, default=20, help="at most so many recordings, evenly chosen (default: 20)")
    parser.add_argument("--splits", type=int, default=2, help="random splits of each recording (default: 2)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        if args.manifest:
            root = args.audio_root or args.manifest.parent
            paths = [root / utterance.audio for utterance in read_manifest(args.manifest, need=("id", "src_audio"))]
        else:
            paths = sorted(DEMO.glob("*.ogg"))
        paths = paths[:: max(1, len(paths) // args.count)][: args.count]
        recordings = [load_audio(path) for path in paths]
        rows = check(load_bundle(args.checkpoint_dir), recordings, args.splits, args.seed)
    except EchoStreamError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{len(recordings)} recordings, {sum(map(len, recordings)) / 16000:.0f} s; bar: nothing differs, {BAR:g}")
    print("| check | runs | sentences | subwords | units | differing | largest difference | |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        figures = f"{row.runs} | {row.sentences} | {row.tokens} | {row.units} | {row.differing} | {row.largest:.1e}"
        print(f"| {row.name} | {figures} | {'kept' if row.kept else row.first or 'too much'} |")
    if args.json:
        write_json(args.json, [asdict(row) for row in rows])
    sys.exit(not all(row.kept for row in rows))
