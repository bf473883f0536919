"""The fairseq task. fairseq imports a plugin's tasks and models only, so that the criterions are imported here."""

import sys
from pathlib import Path

from echostream import compat
from echostream.data.corpus.streamspeech import refuse_flags

compat.apply()
# Before fairseq says of each that it is no valid choice.
if Path(sys.argv[0]).name == "fairseq-train" and (refusal := refuse_flags(sys.argv[1:])):
    sys.exit(f"error: {refusal}")

from echostream import criterions  # noqa: E402,F401
from echostream.tasks import echostream_task  # noqa: E402,F401
