"""The fairseq task ``echostream_s2st``: dictionaries, data, validation BLEU and generation for EchoStream."""

# No postponed annotations here: fairseq reads the types of the dataclass's fields.

import contextlib
import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.data import Dictionary
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING
from torch import Tensor, nn

from echostream import memory
from echostream.constants import EOS, NUM_SPECIALS
from echostream.data.augment import SpecAugment, parse_speeds
from echostream.data.augmentation import SpeechAugment
from echostream.data.config import DataConfig
from echostream.data.dataset import Augmentation, SpeechToSpeechDataset
from echostream.data.joining import JoinPolicy
from echostream.data.text_pairs import TextPairDataset
from echostream.errors import ConfigError, ManifestError
from echostream.evaluation.quality import corpus_bleu, tokenizer_for
from echostream.models.echostream_model import SentenceWindows
from echostream.text import SPECIALS, collapse_ctc

logger = logging.getLogger(__name__)

BLEU_ORDER = 4
# What BLEU needs, and how many numbers of each; lengths are those of the translations and of the references.
_BLEU_SUMS = {"counts": BLEU_ORDER, "totals": BLEU_ORDER, "lengths": 2}


@dataclass
class EchoStreamTaskConfig(FairseqDataclass):
    """Options of ``echostream_s2st``."""

    data: str = field(default=MISSING, metadata={"help": "data directory made by echostream prepare"})
    config_yaml: str = field(default="config.yaml", metadata={"help": "the data directory's configuration file"})
    features: Optional[str] = field(
        default=None, metadata={"help": "log-mel features, kaldi or whisper (default: what the data directory says)"}
    )
    source: ChoiceEnum(["speech", "text"]) = field(
        default="speech",
        metadata={
            "help": "text: read only the texts and units of the manifests, and train the MT and unit decoders behind a "
            "text encoder, for --decoder-init (with --asr-weight 0 --st-weight 0)"
        },
    )
    max_source_positions: int = field(default=3000, metadata={"help": "longest item, joined ones too, in 10 ms frames"})
    max_target_positions: int = field(default=256, metadata={"help": "longest target sentence, in subwords"})
    join_probability: float = field(
        default=0.5, metadata={"help": "share of the training items that join several utterances with pauses"}
    )
    join_smallest: int = field(default=2, metadata={"help": "fewest utterances in a joined item"})
    join_largest: int = field(default=6, metadata={"help": "most utterances in a joined item"})
    join_max_frames: int = field(
        default=0,
        metadata={"help": "longest joined item in 10 ms frames (0: --max-tokens or --max-source-positions)"},
    )
    pause_shortest: float = field(default=0.1, metadata={"help": "shortest pause between joined utterances, seconds"})
    pause_longest: float = field(default=1.0, metadata={"help": "longest pause between joined utterances, seconds"})
    speed_perturb: str = field(default="", metadata={"help": "speed factors of training speech, such as 0.9,1.0,1.1"})
    spec_augment: str = field(
        default="none", metadata={"help": "SpecAugment policy none, lb, ld or sm, or field=value,... over ld"}
    )
    gain_db: float = field(default=0.0, metadata={"help": "change training speech's level by up to so many dB"})
    noise_db: Optional[float] = field(
        default=None, metadata={"help": "add white noise to training speech, down from this level (dBFS, such as -40)"}
    )
    augment_speech: str = field(
        default="none",
        metadata={
            "help": "make training speech resemble people's recordings: people, or "
            "NAME=PROBABILITY:LOW..HIGH:KIND+KIND,... of formant, reverb, noise, hum, band, codec, clip and gain "
            "(echostream/data/augmentation/speech.py)"
        },
    )
    distill_clean: bool = field(
        default=False, metadata={"help": "let --distill-teacher hear training speech before augmentation disguises it"}
    )
    keep_frozen: float = field(
        default=0.0,
        metadata={
            "help": "gigabytes of memory for what frozen parts give: with --freeze encoder every batch is computed "
            "once, and every epoch has the first one's items and disguises"
        },
    )
    autocast: ChoiceEnum(["none", "bfloat16", "float16"]) = field(
        default="none", metadata={"help": "mixed precision in training that works without a GPU too (bfloat16)"}
    )
    eval_bleu: bool = field(default=False, metadata={"help": "validate by BLEU of greedy translations, logged as bleu"})
    eval_bleu_print_samples: bool = field(default=False, metadata={"help": "log one translation per validation batch"})
    vocoder_dir: Optional[str] = field(
        default=None, metadata={"help": "fairseq-generate: directory with vocoder.pt and vocoder.json, to speak"}
    )
    vocoder: Optional[str] = field(default=None, metadata={"help": "fairseq-generate: a vocoder's checkpoint"})
    vocoder_config: Optional[str] = field(default=None, metadata={"help": "fairseq-generate: its configuration (JSON)"})
    seed: int = II("common.seed")
    cpu: bool = II("common.cpu")
    max_tokens: Optional[int] = II("dataset.max_tokens")
    results_path: Optional[str] = II("common_eval.results_path")
    gen_subset: str = II("dataset.gen_subset")


@register_task("echostream_s2st", dataclass=EchoStreamTaskConfig)
class EchoStreamTask(FairseqTask):
    """Speech-to-speech translation with source text, target text and units as targets.

    Raises:
        ManifestError: a dictionary or another file of the data directory is missing, or two do not fit.
        ConfigError: a bad option.
    """

    def __init__(self, cfg: EchoStreamTaskConfig, config: DataConfig):
        super().__init__(cfg)
        self.config = config
        self.speech_alone = False  # may training have rows without text? Not before a criterion has a use for them
        self._source = _dictionary(config.path("dict_src"))
        self._target = _dictionary(config.path("dict_tgt"))
        config.check_units()
        self._units = _dictionary(config.path("dict_unit"))
        # Both read here, so that a bad option or file stops the run before anything else does.
        self.augmentation = Augmentation(
            join=self._join_policy(),
            speeds=parse_speeds(cfg.speed_perturb),
            spec_augment=SpecAugment.parse(cfg.spec_augment),
            gain_db=cfg.gain_db,
            noise_db=cfg.noise_db,
            speech=SpeechAugment.parse(cfg.augment_speech),
            clean=cfg.distill_clean,
        )
        if cfg.eval_bleu:
            corpus_bleu(["a"], ["a"], tokenizer_for(config.target_lang), "train")

    @classmethod
    def setup_task(cls, cfg: EchoStreamTaskConfig, **kwargs: Any) -> "EchoStreamTask":
        config = DataConfig.load(cfg.data, cfg.config_yaml)
        if cfg.features:
            config = dataclasses.replace(config, features=cfg.features)
        _ = config.extractor  # an unknown name stops the run here
        task = cls(cfg, config)
        if cfg.cpu:
            memory.keep_freed_memory()
        logger.info(
            "dictionaries: %d source and %d target symbols, %d units",
            len(task.source_dictionary),
            len(task.target_dictionary),
            config.num_units,
        )
        return task

    def _join_policy(self) -> JoinPolicy | None:
        cfg = self.cfg
        if cfg.join_probability == 0:
            return None
        limits = [cfg.join_max_frames, cfg.max_tokens, cfg.max_source_positions]
        return JoinPolicy(
            probability=cfg.join_probability,
            smallest=cfg.join_smallest,
            largest=cfg.join_largest,
            shortest_pause=cfg.pause_shortest,
            longest_pause=cfg.pause_longest,
            max_frames=min(int(limit) for limit in limits if limit),
        )

    @property
    def reads_text(self) -> bool:
        """Is the source text (``--source text``), not speech?"""
        return str(getattr(self.cfg.source, "value", self.cfg.source)) == "text"

    # --- dictionaries and data

    @property
    def source_dictionary(self) -> Dictionary:
        return self._source

    @property
    def target_dictionary(self) -> Dictionary:
        return self._target

    @property
    def unit_dictionary(self) -> Dictionary:
        return self._units

    def max_positions(self) -> tuple[int, int]:
        """(feature frames of an item, MT target tokens of a sentence)."""
        return self.cfg.max_source_positions, self.cfg.max_target_positions

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> FairseqCriterion:
        criterion = super().build_criterion(cfg, from_checkpoint)
        self.speech_alone = getattr(criterion, "teaches_frames", False)
        return criterion

    def load_dataset(self, split: str, combine: bool = False, task_cfg: Any = None, **kwargs: Any) -> None:
        """Load ``DATA/<split>.tsv``, or several manifests: ``train,train_own``. Splits that start with ``train`` are
        augmented while training, and may say how often an epoch has a manifest: ``train:0.5,train_recordings:3``.

        fairseq-generate and fairseq-validate pass the checkpoint's ``task_cfg``: then every split is read as it is.

        Raises:
            ManifestError: the manifest is missing or a row cannot be used. ConfigError: a bad number behind a name.
        """
        if self.reads_text:
            self.datasets[split] = TextPairDataset(Path(self.cfg.data) / f"{split}.tsv", self.config)
            with_units = int(self.datasets[split].has_units.sum())
            logger.info("%s: %d sentence pairs, %d with units", split, len(self.datasets[split]), with_units)
            return
        training = split.startswith("train") and task_cfg is None
        names, repeats = parse_subsets(split)
        if not training and ":" in split:
            raise ConfigError(f"subset {split!r}: only what is trained on is repeated; leave the number out")
        dataset = SpeechToSpeechDataset(
            [Path(self.cfg.data) / f"{name}.tsv" for name in names],
            self.config,
            self.augmentation if training else None,
            self.cfg.seed,
            repeats,
            training and self.speech_alone,
            training and self.cfg.keep_frozen > 0,
        )
        self.datasets[split] = dataset
        hours = dataset.frames / 360_000
        logger.info(
            "%s: %d utterances, %.2f h%s",
            split,
            len(dataset.utterances),
            hours.sum(),
            f", augmented, {(hours * dataset.repeats).sum():.2f} h an epoch" if training else "",
        )

    # --- training and validation

    def train_step(
        self,
        sample: dict,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> tuple[Tensor, float, dict]:
        with self._autocast(sample):
            model.train()
            model.set_num_updates(update_num)
            loss, sample_size, log = criterion(model, sample)
        if ignore_grad:
            loss = loss * 0
        optimizer.backward(loss)
        return loss, sample_size, log

    def _autocast(self, sample: dict) -> contextlib.AbstractContextManager:
        dtype = str(getattr(self.cfg.autocast, "value", self.cfg.autocast))
        if dtype == "none":
            return contextlib.nullcontext()
        device = sample["net_input"]["src_tokens"].device.type if "net_input" in sample else "cpu"
        return torch.autocast(device, dtype=getattr(torch, dtype))

    def valid_step(self, sample: dict, model: nn.Module, criterion: nn.Module) -> tuple[Tensor, float, dict]:
        loss, sample_size, log = super().valid_step(sample, model, criterion)
        if self.cfg.eval_bleu:
            log.update(self._bleu_statistics(sample, model))
        return loss, sample_size, log

    @torch.no_grad()
    def _bleu_statistics(self, sample: dict, model: nn.Module) -> dict[str, int]:
        """Counts behind the BLEU of the greedy MT and ST CTC outputs, which add up over batches and workers."""
        net_input = sample["net_input"]
        x, lengths = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
        sentences, counts = x, lengths
        if sample["windows"] is not None:
            sentences, counts = SentenceWindows(**sample["windows"]).gather(x, lengths)
        # 12 subwords a second are more than anyone speaks; an untrained model would babble on to the very limit.
        limit = min(self.cfg.max_target_positions, 10 + sentences.shape[1] // 2)
        tokens, _, _ = model.mt_decoder.greedy(sentences, counts, limit)
        translations = [self.target_text(row) for row in tokens.tolist()]
        references = [self.target_text(row) for row in sample["target"].tolist()]
        if self.cfg.eval_bleu_print_samples:
            logger.info("translation: %s", translations[0])
            logger.info("reference:   %s", references[0])
        tokenizer = tokenizer_for(self.config.target_lang)
        log = _counts("_bleu", translations, references, tokenizer)
        if self.reads_text:
            return log
        best = model.st_decoder(x, lengths).argmax(-1).tolist()
        previews = [self.target_text(collapse_ctc(row[:n])) for row, n in zip(best, lengths.tolist())]
        whole = [self.target_text(row) for row in sample["tgt_text"].tolist()]
        log.update(_counts("_st_bleu", previews, whole, tokenizer))
        return log

    def target_text(self, ids: list[int]) -> str:
        """Target dictionary indices, up to the first end symbol, as text."""
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        return self.config.target.decode(ids)

    def source_text(self, ids: list[int]) -> str:
        """Source dictionary indices as text."""
        return self.config.source.decode(ids)

    def reduce_metrics(self, logging_outputs: list[dict], criterion: nn.Module) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        if not self.cfg.eval_bleu:
            return
        for name in ("bleu", "st_bleu"):
            keys = [f"_{name}_{key}_{i}" for key, n in _BLEU_SUMS.items() for i in range(n)]
            sums = {key: sum(_number(log.get(key, 0)) for log in logging_outputs) for key in keys}
            if sums[f"_{name}_lengths_1"] == 0:
                continue
            for key, value in sums.items():
                metrics.log_scalar_sum(key, value)
            metrics.log_derived(name, lambda meters, name=name: _bleu(meters, name))

    # --- generation

    def build_generator(self, models: list, args: Any, **kwargs: Any) -> Any:
        """The generator of fairseq-generate: see ``echostream.generator``."""
        from echostream.generator import build_generator

        return build_generator(self, models, args, **kwargs)

    def inference_step(
        self,
        generator: Any,
        models: list,
        sample: dict,
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
    ) -> list[list[dict[str, Tensor]]]:
        with torch.no_grad():
            return generator.generate(models, sample, prefix_tokens=prefix_tokens, constraints=constraints)


def parse_subsets(split: str) -> tuple[list[str], list[float]]:
    """Names of a split's manifests and how often each is repeated: ``train,own:3`` gives 1 and 3.

    Raises:
        ConfigError: a number is none, or not above 0.
    """
    names, repeats = [], []
    for entry in split.split(","):
        name, colon, number = entry.partition(":")
        try:
            repeat = float(number) if colon else 1.0
        except ValueError:
            repeat = 0.0
        if not 0 < repeat < float("inf"):
            raise ConfigError(f"subset {entry!r}: {number!r} is not how often to repeat {name}; a number above 0 is")
        names.append(name)
        repeats.append(repeat)
    return names, repeats


def _dictionary(path: Path) -> Dictionary:
    """A dictionary in fairseq's form.

    Raises:
        ManifestError: the file is missing or no dictionary, or its special symbols stand elsewhere.
    """
    if not path.is_file():
        raise ManifestError(f"dictionary {path} does not exist; echostream prepare writes it")
    try:
        dictionary = Dictionary.load(str(path))
    except (ValueError, RuntimeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ManifestError(f"{path} is not a dictionary of 'symbol count' lines: {reason}") from None
    if [dictionary[i] for i in range(NUM_SPECIALS)] != list(SPECIALS):
        raise ManifestError(f"dictionary {path} does not start with {' '.join(SPECIALS)}")
    return dictionary


def _number(value: Any) -> int:
    return int(value.item()) if isinstance(value, Tensor) else int(value)


def _counts(name: str, translations: list[str], references: list[str], tokenizer: str) -> dict[str, int]:
    score = corpus_bleu(translations, references, tokenizer, "train")
    log = {f"{name}_lengths_0": score.sys_len, f"{name}_lengths_1": score.ref_len}
    for i in range(BLEU_ORDER):
        log[f"{name}_counts_{i}"] = score.counts[i]
        log[f"{name}_totals_{i}"] = score.totals[i]
    return log


def _bleu(meters: Any, name: str) -> float:
    from sacrebleu.metrics import BLEU

    counts, totals, lengths = (
        [int(meters[f"_{name}_{key}_{i}"].sum) for i in range(n)] for key, n in _BLEU_SUMS.items()
    )
    score = BLEU.compute_bleu(counts, totals, lengths[0], lengths[1], smooth_method="exp")
    return round(float(score.score), 2)
