"""The streaming engine: samples in, events out, at a constant cost per chunk for streams without end.

``session`` and ``batch`` hold what users call, both over ``core``, which keeps a ``stream``'s state and drives its
``engine``: where sentences begin and end. ``writing`` writes one. Both ask the model for its next step through the
requests of ``stages``; ``exported`` answers them, with ONNX Runtime or with torch. ``policies`` say when to write,
``segmenters`` where sentences end, ``resolve`` which of them a stream gets, ``events`` what comes out.
"""

from echostream.streaming.batch import SessionBatch
from echostream.streaming.events import (
    Event,
    LagStatistics,
    SentenceEnd,
    SourceText,
    TargetText,
    TargetUnits,
    Waveform,
)
from echostream.streaming.policies.base import Policy
from echostream.streaming.policies.counting import CTCCountPolicy, WaitForSentenceEnd, WaitKPolicy
from echostream.streaming.policies.factory import make_policy
from echostream.streaming.policies.hypotheses import AlignAttPolicy, LocalAgreementPolicy
from echostream.streaming.segmenters.base import NoSegmenter, Segmenter
from echostream.streaming.segmenters.factory import make_segmenter
from echostream.streaming.segmenters.punctuation import PunctuationSegmenter
from echostream.streaming.session import StreamingSession

__all__ = [
    "AlignAttPolicy",
    "CTCCountPolicy",
    "Event",
    "LagStatistics",
    "LocalAgreementPolicy",
    "NoSegmenter",
    "Policy",
    "PunctuationSegmenter",
    "Segmenter",
    "SentenceEnd",
    "SessionBatch",
    "SourceText",
    "StreamingSession",
    "TargetText",
    "TargetUnits",
    "WaitForSentenceEnd",
    "WaitKPolicy",
    "Waveform",
    "make_policy",
    "make_segmenter",
]
