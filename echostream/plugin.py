"""EchoStream as a fairseq plugin: ``fairseq-train --user-dir echostream``, and programs of ours that call fairseq."""

from __future__ import annotations

import importlib

from echostream import compat
from echostream.errors import require


def register_with_fairseq() -> None:
    """Register EchoStream's task, criterion and model with fairseq.

    For ve-fairseq 0.12.3 and fairseq-fixed 0.12.3.1: ``import_user_module`` imports the files of ``tasks/`` and
    ``models/`` only while it imports the package itself, and skips both when ``echostream`` is already in
    ``sys.modules``, as it is in every program of ours that then calls fairseq in the same process.

    Can go when ``fairseq.utils.import_user_module`` looks into ``tasks/`` and ``models/`` of an imported package.

    Raises:
        MissingExtraError: fairseq is not installed.
    """
    require("fairseq", "train")
    compat.apply()
    importlib.import_module("echostream.tasks")
    importlib.import_module("echostream.fairseq_model")
