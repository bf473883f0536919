"""What the criterion logs: sums that add up over batches and workers, and the figures that come of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fairseq.logging import metrics
from torch import Tensor


def empty_log(parts: Sequence[str], training: bool, unit_ce: bool, distill_target: str, like: Tensor) -> dict[str, Any]:
    """The log of a batch that has none of the texts, such as recordings alone.

    fairseq adds up what workers log by the order of its keys, tensors apart from numbers: every batch of a training
    needs the same of both, whatever it holds.

    Args:
        parts: those that have a loss, of ``asr``, ``st``, ``mt`` and ``unit``.
        unit_ce: is the units' loss a cross-entropy?
        distill_target: ``frames``, ``tokens`` or ``both``; empty without a teacher.
        like: gives the tensors their device and type.
    """
    errors = ["errors"] * (not training)
    counts = {part: ["tokens", "too_long", "targets", *errors] for part in ("asr", "st", "unit")} | {"mt": ["tokens"]}
    sums = {"asr": ["nll"], "st": ["nll"], "mt": ["nll", "correct"], "unit": ["nll"]}
    if unit_ce and not training:
        counts["unit"].append("references")
    frames, tokens = distill_target in ("frames", "both"), distill_target in ("tokens", "both")
    counts["distill"] = ["frames"] * frames + ["tokens"] * tokens
    sums["distill"] = ["error"] * frames + ["kl"] * tokens
    parts = [*parts, "distill"]
    log: dict[str, Any] = {f"_{part}_{key}": 0 for part in parts for key in counts[part]}
    return log | {f"_{part}_{key}": like.new_zeros(()) for part in parts for key in sums[part]}


def report(total: dict[str, float], parts: Sequence[str]) -> None:
    """Give fairseq's meters the figures of ``total``, sums of several batches."""
    size = total["sample_size"]
    metrics.log_scalar("loss", total["loss"] / size / math.log(2), size, round=3)
    metrics.log_speed("audio_s_per_s", total.get("source_frames", 0) / 100, priority=91, round=1)
    for i, part in enumerate(parts):
        tokens = total.get(f"_{part}_tokens", 0)
        if not tokens:
            continue
        metrics.log_scalar(f"{part}_loss", total[f"_{part}_nll"] / tokens / math.log(2), tokens, 10 + i, round=3)
        if f"_{part}_errors" in total:
            references = total.get(f"_{part}_references", tokens)
            name = "uer" if part == "unit" else f"{part}_ter"
            metrics.log_scalar(name, 100 * total[f"_{part}_errors"] / references, references, 20 + i, round=2)
        if total.get(f"_{part}_too_long"):
            metrics.log_scalar_sum(f"{part}_too_long", total[f"_{part}_too_long"], 30 + i)
    if total.get("_distill_frames"):
        frames = total["_distill_frames"]
        metrics.log_scalar("distill_error", total["_distill_error"] / frames, frames, 40, round=3)
    if total.get("_distill_tokens"):
        tokens = total["_distill_tokens"]
        metrics.log_scalar("distill_kl", total["_distill_kl"] / tokens / math.log(2), tokens, 41, round=3)
    if total.get("_mt_tokens"):
        share = 100 * total["_mt_correct"] / total["_mt_tokens"]
        metrics.log_scalar("mt_acc", share, total["_mt_tokens"], 25, round=2)
