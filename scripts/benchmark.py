#!/usr/bin/env python
"""``echostream benchmark``, by the name that it had as a script."""

import sys

from echostream.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
