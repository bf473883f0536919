#!/usr/bin/env python
"""Prepare a training directory from parallel text or ready recordings. ``prepare_corpus.py STEP --help`` says more."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from echostream.data.corpus.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
