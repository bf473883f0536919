"""``python -m echostream.agent`` is ``simuleval`` that knows EchoStream's scorers from the start, with its options.

The same as ``--user-dir agent`` in a checkout, for who has installed the package.
"""

from __future__ import annotations

import sys

from echostream.errors import EchoStreamError, require


def main() -> None:
    sys.argv[0] = "simuleval"
    try:
        require("simuleval", "simuleval")
        from simuleval.cli import main as simuleval

        from echostream.evaluation.simul import register

        register()
    except EchoStreamError as error:
        sys.exit(f"error: {error}")
    simuleval()


if __name__ == "__main__":
    main()
