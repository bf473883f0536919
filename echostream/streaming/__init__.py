"""The streaming engine: samples in, events out, at a constant cost per chunk for streams without end.

``session`` holds what users call. One stream's logic is in ``engine`` (no torch), which asks the model for its next
step through the requests of ``stages``; ``torch_stages`` answers them, or, without torch, ``exported``. ``policy`` says
when to write, ``segmenter`` (with ``punctuation`` and ``pause``) where sentences end, ``events`` what comes out.
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
from echostream.streaming.policy import (
    AlignAttPolicy,
    CTCCountPolicy,
    LocalAgreementPolicy,
    Policy,
    WaitForSentenceEnd,
    WaitKPolicy,
    make_policy,
)
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
