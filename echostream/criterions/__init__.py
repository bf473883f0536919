"""Training criterions; importing this registers them with fairseq."""

from echostream.criterions.multitask_criterion import MultitaskCriterion

__all__ = ["MultitaskCriterion"]
