"""The training loss: ASR CTC, ST CTC, MT cross-entropy and units, weighted 0.3, 0.3, 0.2 and 0.2.

Normalisation. Every sentence's loss is first averaged over that loss's own target tokens, so that the four are of one
scale although a sentence has eight times as many units as subwords, and then weighted by the sentence's MT target
tokens (by 1 with ``--sentence-avg``). The trainer divides by the sum of these weights. So the loss is a sum over
sentences in which nothing depends on what else is in the batch: gradient accumulation and several workers give what one
large batch would, and long sentences count as they do in ordinary translation training. What a teacher adds in training
(``--distill-weight``, see ``distillation``) is averaged over its frames or tokens and weighted in the same way.

A sentence that lacks a loss's targets has no part in it. Without a target text it weighs what its length usually has of
tokens, so that a teacher's frames count as much for it as for any other, and it is in the divisor as any other is.
"""

# No postponed annotations here: fairseq reads the types of the dataclass's fields.

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from echostream.constants import BLANK, NUM_SPECIALS, PAD, SUBSAMPLING
from echostream.criterions.distillation import TARGETS, WhisperTeacher, frame_loss, token_loss
from echostream.criterions.log import empty_log, report
from echostream.criterions.visibility import draw_chunk, heard_when_due
from echostream.errors import ConfigError, ManifestError
from echostream.fairseq_model import WHISPER
from echostream.models.echostream_model import SentenceWindows
from echostream.text import collapse_ctc

# What an ASR head feeds back to itself learns the same as its final prediction, at this weight each.
BETWEEN_WEIGHT = 0.5
# Too long unit targets are judged over this many of the latest ones.
LENGTH_WINDOW = 2000
LENGTH_WINDOW_LEAST = 1000
LENGTH_SHARE = 0.01

# Spanish speech has an MT target token in 260 to 320 ms; a row without a target text weighs as if it had one in 300.
FRAMES_PER_TOKEN = 30

PARTS = ("asr", "st", "mt", "unit")


@dataclass
class MultitaskCriterionConfig(FairseqDataclass):
    """Options of ``echostream_multitask``."""

    asr_weight: float = field(default=0.3, metadata={"help": "weight of the source-text CTC loss; 0 skips it"})
    st_weight: float = field(default=0.3, metadata={"help": "weight of the target-text CTC loss; 0 skips it"})
    mt_weight: float = field(default=0.2, metadata={"help": "weight of the MT cross-entropy; 0 skips it"})
    unit_weight: float = field(default=0.2, metadata={"help": "weight of the unit loss; 0 skips it"})
    label_smoothing: float = field(default=0.1, metadata={"help": "label smoothing of the MT cross-entropy"})
    unit_loss: ChoiceEnum(["ctc", "ce"]) = field(
        default="ctc",
        metadata={"help": "ctc: CTC over the upsampled positions; ce: cross-entropy, the units spread over them"},
    )
    mt_visible: ChoiceEnum(["full", "ctc"]) = field(
        default="full",
        metadata={
            "help": "what the MT decoder attends in training: full, the whole sentence; ctc, what has been heard when "
            "the ST CTC's expected counts say that a token is due"
        },
    )
    distill_weight: float = field(
        default=0.0, metadata={"help": "weight of what a full-context Whisper teaches in training; 0: no teacher"}
    )
    distill_teacher: Optional[str] = field(
        default=None, metadata={"help": "the teacher, whisper:SOURCE as for --encoder-init; never part of a checkpoint"}
    )
    distill_target: ChoiceEnum(TARGETS) = field(
        default="frames",
        metadata={
            "help": "frames: its encoder's output, for ours before pairs are merged; tokens: its decoder's "
            "distributions, for the MT decoder; both"
        },
    )
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("echostream_multitask", dataclass=MultitaskCriterionConfig)
class MultitaskCriterion(FairseqCriterion):
    """Weighted sum of the four losses, in fp32 whatever the model computes in.

    Raises:
        ConfigError: a weight is negative, or all are 0.
    """

    def __init__(
        self,
        task: Any,
        asr_weight: float = 0.3,
        st_weight: float = 0.3,
        mt_weight: float = 0.2,
        unit_weight: float = 0.2,
        label_smoothing: float = 0.1,
        unit_loss: str = "ctc",
        mt_visible: str = "full",
        distill_weight: float = 0.0,
        distill_teacher: str | None = None,
        distill_target: str = "frames",
        sentence_avg: bool = False,
    ):
        super().__init__(task)
        self.weights = dict(zip(PARTS, (asr_weight, st_weight, mt_weight, unit_weight)))
        for part, weight in self.weights.items():
            if not weight >= 0:
                raise ConfigError(f"--{part}-weight is {weight}; it must be at least 0")
        if not distill_weight >= 0:
            raise ConfigError(f"--distill-weight is {distill_weight}; it must be at least 0")
        if distill_weight and not (distill_teacher or "").startswith(WHISPER):
            raise ConfigError(f"--distill-teacher is {distill_teacher!r}; with a --distill-weight it is whisper:SOURCE")
        self.distill_weight = distill_weight
        self.distill_source = (distill_teacher or "").removeprefix(WHISPER)
        self.distill_target = str(getattr(distill_target, "value", distill_target))
        # Read when the first batch of a training needs it: validation asks no teacher, so that a checkpoint does not
        # depend on where one lay.
        self._teacher: WhisperTeacher | None = None
        if not any((*self.weights.values(), distill_weight)):
            raise ConfigError("all four loss weights are 0; give at least one of --asr-, --st-, --mt-, --unit-weight")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"--label-smoothing is {label_smoothing}; it must lie in [0, 1)")
        self.label_smoothing = label_smoothing
        self.unit_loss = str(getattr(unit_loss, "value", unit_loss))
        self.mt_visible = str(getattr(mt_visible, "value", mt_visible))
        if self.mt_visible == "ctc" and not st_weight:
            raise ConfigError("--mt-visible ctc follows the ST CTC; give it a --st-weight above 0")
        self.sentence_avg = sentence_avg
        self.keeps_frozen = bool(getattr(getattr(task, "cfg", None), "keep_frozen", 0.0))
        self._too_long: deque[tuple[int, int]] = deque()

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the model that the weights ask for."""
        parts = {part for part, weight in self.weights.items() if weight > 0}
        if self.distills and self.distill_target != "frames":
            parts.add("mt")
        if self.distills and self.distill_target != "tokens":
            parts.add("frames")
        return frozenset(parts)

    @property
    def teaches_frames(self) -> bool:
        """Can a training learn from speech whose texts nobody knows?"""
        return self.distill_weight > 0 and self.distill_target != "tokens"

    @property
    def distills(self) -> bool:
        """Is there a teacher now? Validation has none."""
        return self.training and self.distill_weight > 0

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, float, dict]:
        """Loss (a sum), its denominator (see the module's head) and what to log, sums throughout.

        Raises:
            ManifestError: in training, more than 1 % of the unit targets do not fit their upsampled input.
        """
        windows = sample["windows"]
        if windows is not None:
            windows = SentenceWindows(windows["row"], windows["start"], windows["end"])
        known = _known(sample)
        parts = frozenset(part for part in self.parts if part not in known or bool(known[part].any()))
        visible = None
        if self.training and self.mt_visible == "ctc" and parts & {"mt", "unit"}:
            visible = partial(heard_when_due, sample=sample, windows=windows, chunk=draw_chunk())
        kept = {"items": sample["id"]} if self.keeps_frozen and self.training else {}
        out = model(**sample["net_input"], windows=windows, visible=visible, parts=parts, **kept)
        source_frames = sample["net_input"]["src_lengths"]
        frames = -(-source_frames // SUBSAMPLING)
        row_of, rows = sample["sentence_row"], len(frames)
        # Weight of each sentence, and of each row: a joined row weighs as much as its sentences do together.
        sentence = torch.ones_like(row_of) if self.sentence_avg else sample["target_lengths"]
        sentence = sentence.float()
        row = torch.zeros(rows, device=sentence.device).index_add_(0, row_of, sentence)
        if not self.sentence_avg:
            row = torch.where(known["st"], row, (source_frames / FRAMES_PER_TOKEN).clamp(min=1.0))
        losses: dict[str, Tensor] = {}
        log: dict[str, Any] = {}
        if "asr" in parts:
            targets = sample["src_text"], sample["src_text_lengths"]
            losses["asr"] = self._ctc("asr", *_of(known["asr"], out["asr_logits"], frames, *targets, row), log)
            for scores in out["asr_between"] if self.training else ():
                loss = self._ctc("asr", *_of(known["asr"], scores, frames, *targets, row), {})
                losses["asr"] = losses["asr"] + BETWEEN_WEIGHT * loss
        if "st" in parts:
            targets = sample["tgt_text"], sample["tgt_text_lengths"]
            losses["st"] = self._ctc("st", *_of(known["st"], out["st_logits"], frames, *targets, row), log)
        if "mt" in parts and self.weights["mt"]:
            targets = sample["target"], sample["target_lengths"]
            losses["mt"] = self._cross_entropy(*_of(known["mt"], out["mt_logits"], *targets, sentence), log)
        if "unit" in parts:
            targets = sample["units"], sample["unit_lengths"]
            outputs = out["unit_logits"], out["unit_lengths"]
            losses["unit"] = self._unit_loss(*_of(known["unit"], *outputs, *targets, sentence), log)
        loss = sum((self.weights[part] * value for part, value in losses.items()), row.new_zeros(()))
        if self.distills:
            loss = loss + self.distill_weight * self._distill(out, sample, row, sentence, known["mt"], log)
        sample_size = float(row.sum())
        ce = self.unit_loss == "ce"
        targets = self.distill_target if self.distills else ""
        log = {**empty_log([part for part in PARTS if self.weights[part]], self.training, ce, targets, row), **log}
        log.update(
            loss=loss.detach(),
            sample_size=sample_size,
            ntokens=sample["ntokens"],
            nsentences=sample["nsentences"],
            source_frames=int(sample["net_input"]["src_lengths"].sum()),
        )
        return loss, sample_size, log

    # --- the four losses

    def _ctc(
        self,
        part: str,
        logits: Tensor,
        input_lengths: Tensor,
        target: Tensor,
        target_lengths: Tensor,
        weight: Tensor,
        log: dict[str, Any],
    ) -> Tensor:
        """CTC of ``logits`` [N, T, V] against ``target`` [N, L]: sum over items of weight · nll / length."""
        log_probs = F.log_softmax(logits.float(), dim=-1)
        # Positions behind an item's end reach neither the loss nor its gradient.
        nll = F.ctc_loss(
            log_probs.transpose(0, 1),
            target,
            input_lengths,
            target_lengths,
            blank=BLANK,
            reduction="none",
            zero_infinity=True,
        )
        repeats = ((target[:, 1:] == target[:, :-1]) & (target[:, 1:] != PAD)).sum(1)
        too_long = int((target_lengths + repeats > input_lengths).sum())
        log[f"_{part}_nll"] = nll.detach().sum()
        log[f"_{part}_tokens"] = int(target_lengths.sum())
        log[f"_{part}_too_long"] = too_long
        log[f"_{part}_targets"] = len(target)
        if part == "unit" and self.training:
            self._watch_lengths(too_long, len(target))
        if not self.training:
            best = logits.argmax(-1).cpu()
            log[f"_{part}_errors"] = sum(
                Levenshtein.distance(collapse_ctc(best[i, :n].tolist()), target[i, :m].tolist())
                for i, (n, m) in enumerate(zip(input_lengths.tolist(), target_lengths.tolist()))
            )
        return (nll * weight / target_lengths).sum()

    def _cross_entropy(
        self, logits: Tensor, target: Tensor, lengths: Tensor, weight: Tensor, log: dict[str, Any]
    ) -> Tensor:
        """Label-smoothed cross-entropy (Szegedy et al., 2016) of ``logits`` [S, U, V] against ``target`` [S, U]."""
        log_probs = F.log_softmax(logits.float(), dim=-1)
        mask = target != PAD
        nll = -log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1) * mask
        uniform = -log_probs.mean(-1) * mask
        smoothed = (1 - self.label_smoothing) * nll + self.label_smoothing * uniform
        log["_mt_nll"] = nll.detach().sum()
        log["_mt_tokens"] = int(lengths.sum())
        log["_mt_correct"] = ((logits.argmax(-1) == target) & mask).sum()
        return (smoothed.sum(1) * weight / lengths).sum()

    def _unit_loss(
        self,
        logits: Tensor,
        lengths: Tensor,
        target: Tensor,
        target_lengths: Tensor,
        weight: Tensor,
        log: dict[str, Any],
    ) -> Tensor:
        if self.unit_loss == "ctc":
            return self._ctc("unit", logits, lengths, target, target_lengths, weight, log)
        # Frame-aligned: position p of n is to be unit floor(p * U / n), so that every unit gets an even share.
        places = torch.arange(logits.shape[1], device=logits.device)
        index = places * target_lengths[:, None] // lengths.clamp(min=1)[:, None]
        aligned = target.gather(1, index.clamp(max=target.shape[1] - 1))
        mask = places < lengths[:, None]
        nll = F.cross_entropy(logits.float().transpose(1, 2), aligned, reduction="none") * mask
        too_long = int((target_lengths > lengths).sum())
        log["_unit_nll"] = nll.detach().sum()
        log["_unit_tokens"] = int(lengths.sum())
        log["_unit_too_long"] = too_long
        log["_unit_targets"] = len(target)
        if self.training:
            self._watch_lengths(too_long, len(target))
        else:
            best = logits[..., NUM_SPECIALS:].argmax(-1).cpu() + NUM_SPECIALS
            log["_unit_errors"] = sum(
                Levenshtein.distance(torch.unique_consecutive(best[i, :n]).tolist(), target[i, :m].tolist())
                for i, (n, m) in enumerate(zip(lengths.tolist(), target_lengths.tolist()))
            )
            log["_unit_references"] = int(target_lengths.sum())
        return (nll.sum(1) * weight / lengths.clamp(min=1)).sum()

    def _distill(
        self,
        out: dict[str, Any],
        sample: dict[str, Any],
        row: Tensor,
        sentence: Tensor,
        known: Tensor,
        log: dict[str, Any],
    ) -> Tensor:
        """What the teacher's frames and distributions cost, weighted by ``row`` [B] and ``sentence`` [S].

        Distributions are those of the sentences whose target text is ``known`` [S].
        """
        if self._teacher is None:
            self._teacher = WhisperTeacher(self.distill_source, self.distill_target, self.task)
        teacher, row_of = self._teacher, sample["sentence_row"]
        heard = sample.get("clean", sample["net_input"]["src_tokens"])
        lesson = teacher.hear(heard, sample["net_input"]["src_lengths"])
        loss = row.new_zeros(())
        if "frames" in out:
            error, counts = frame_loss(lesson, out["frames"], out["frame_lengths"])
            loss = loss + (error * row).sum()
            log["_distill_error"], log["_distill_frames"] = (error.detach() * counts).sum(), int(counts.sum())
        if self.distill_target != "frames":
            alone = (torch.bincount(row_of, minlength=len(row))[row_of] == 1) & known
            alone = alone.nonzero()[:, 0]
            if len(alone):
                taught, known = teacher.distributions(lesson, row_of[alone], sample["target"][alone])
                divergence, counts = token_loss(taught, known, out["mt_logits"][alone], teacher.entries)
                loss = loss + (divergence * sentence[alone]).sum()
                log["_distill_kl"] = (divergence.detach() * counts).sum()
                log["_distill_tokens"] = int(counts.sum())
        return loss

    def _watch_lengths(self, too_long: int, targets: int) -> None:
        """Stop the training when too many unit targets have more units than their input has positions."""
        self._too_long.append((too_long, targets))
        seen = sum(n for _, n in self._too_long)
        while seen - self._too_long[0][1] >= LENGTH_WINDOW:
            seen -= self._too_long.popleft()[1]
        bad = sum(n for n, _ in self._too_long)
        if seen >= LENGTH_WINDOW_LEAST and bad > LENGTH_SHARE * seen:
            raise ManifestError(
                f"{bad} of the last {seen} unit targets are longer than their upsampled input ({bad / seen:.1%}, at "
                f"most {LENGTH_SHARE:.0%} may be); raise --ctc-upsample-ratio or deduplicate the units"
            )

    # --- logging

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the weighted loss and, of each part, nats per token in base 2, error rates and targets left out."""
        total: dict[str, float] = {}
        for log in logging_outputs:
            for key, value in log.items():
                total[key] = total.get(key, 0) + (value.item() if isinstance(value, Tensor) else value)
        report(total, PARTS)


def _known(sample: dict[str, Any]) -> dict[str, Tensor]:
    """Which rows [B] have targets of the CTC losses, and which sentences [S] of the MT decoder's and the units'."""
    units = sample["unit_lengths"]
    return {
        "asr": sample["src_text_lengths"] > 0,
        "st": sample["tgt_text_lengths"] > 0,
        "mt": sample["target_lengths"] > 1,  # more than the end symbol
        "unit": torch.zeros_like(sample["sentence_row"], dtype=torch.bool) if units is None else units > 0,
    }


def _of(known: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
    """The ``known`` rows of each."""
    return tensors if bool(known.all()) else [tensor[known] for tensor in tensors]
