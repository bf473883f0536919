#!/usr/bin/env python3
"""Damage recordings, checkpoint and exported directories, saved sessions, corpora and schedules, and use them.

Ten minutes, counts at the end: what was fine, refused in one line, and what must be mended (tracebacks, wrong output,
hangs, crashes, memory that grows):
    python scripts/fuzz.py --minutes 10

One case again, with its traceback:
    python scripts/fuzz.py --case bundle 17
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from tests.fuzz.runner import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
