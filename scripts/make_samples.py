#!/usr/bin/env python3
"""Samples to hear before installing: source, streamed output, timeline (`make samples`), by any model.

python scripts/make_samples.py                                         # the demo's sentences, into docs/samples
python scripts/make_samples.py talk.wav --checkpoint-dir bundles/fr-en --output samples
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from echostream.checkpoint import DEFAULT_BUNDLE, load_bundle
from echostream.errors import EchoStreamError
from echostream.evaluation.samples import make_sample, page
from echostream.files import keep_apart, run_command, write_text
from echostream.streaming import StreamingSession

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "echostream" / "assets" / "demo"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, nargs="*", help="recordings (default: the demo's sentences)")
    parser.add_argument("--checkpoint-dir", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--chunk-ms", type=int, help="source audio from one decision to the next")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "samples")
    args = parser.parse_args(argv)
    recordings = args.recordings or sorted(DEMO.glob("*.ogg"))
    names = [path.stem for path in recordings]
    if len(set(names)) < len(names):
        raise EchoStreamError("two recordings have one name; their samples would be one file")
    files = [args.output / f"{name}{end}" for name in names for end in ("-source.opus", "-output.opus", ".png")]
    keep_apart({str(path): path for path in files}, {str(path): path for path in recordings})
    bundle = load_bundle(args.checkpoint_dir)
    options = {} if args.chunk_ms is None else {"chunk_ms": args.chunk_ms}
    session = StreamingSession(bundle, speech=bundle.vocoder is not None, **options)
    args.output.mkdir(parents=True, exist_ok=True)
    bar = tqdm(recordings, desc="samples", unit="recording")
    samples = [make_sample(session, path, args.output, path.stem) for path in bar]
    model = f"the {bundle.source_lang}-{bundle.target_lang} model {bundle.digest[:12]}"
    write_text(args.output / "README.md", page(samples, model))
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{len(samples)} samples, {size / 1e6:.2f} MB: {args.output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
