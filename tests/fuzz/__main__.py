"""Damage recordings, checkpoint and exported directories, saved sessions, corpora and schedules, and use them.

Ten minutes, counts at the end: what was fine, refused in one line, and what must be mended (tracebacks, wrong output,
hangs, crashes, memory that grows):
    python -m tests.fuzz --minutes 10

One case again, with its traceback:
    python -m tests.fuzz --case bundle 17
"""

import sys

from tests.fuzz.runner import main

sys.exit(main())
