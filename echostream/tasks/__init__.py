"""The fairseq task. fairseq imports a plugin's tasks and models only, so that the criterions are imported here."""

from echostream import compat

compat.apply()

from echostream import criterions  # noqa: E402,F401
from echostream.tasks import echostream_task  # noqa: E402,F401
