"""``echostream evaluate`` as a command, but in this process: starting one takes longer than the tests themselves."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from echostream.commands import evaluate as script


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def evaluate(*arguments: object) -> Done:
    """Run it; an error ends with status 1 and its line on standard error, as in a shell."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            script.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = 1
            err.write(f"{stop.code}\n")
    return Done(status, out.getvalue(), err.getvalue())
