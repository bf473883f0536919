"""StreamSpeech's data directories as ours, and its training flags in our terms (github.com/ictnlp/StreamSpeech).

Its layout, as its preprocessing leaves it, every path in it being absolute and of the machine that made it:

    fr-en/fbank2unit/{train,dev,test}.tsv, config_gcmvn.yaml, config_mtl_asr_st_ctcst.yaml, gcmvn.npz
    fr-en/{src,tgt}_unigram6000/spm_unigram_fr.{model,txt}
    fr-en/fbank80.zip                                            slices of it: fbank80.zip:offset:length

The YAML files, ``gcmvn.npz`` and the vocabularies also lie in its repository, ``configs/fr-en``. Files are looked for
where the paths say, then by the ends of the paths in the directories at hand. Features and recordings stay there.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from echostream.audio.cmvn import GlobalCMVN
from echostream.constants import NUM_MEL_BINS
from echostream.data.config import Subwords
from echostream.data.corpus.subwords import write_unit_dictionary
from echostream.data.manifest import Utterance, parse_units, table_rows, write_manifest
from echostream.errors import ConfigError, ManifestError
from echostream.files import replacing, write_text
from echostream.loading import read_mapping
from echostream.text import WORD_START
from echostream.units.dedup import deduplicate

COLUMNS = ("id", "src_audio", "src_n_frames", "tgt_audio")
# The tasks of the multitask file: our side of the vocabulary, and our flag for the loss.
TASKS = {
    "source_unigram": ("src", "asr-weight"),
    "ctc_target_unigram": ("tgt", "st-weight"),
    "target_unigram": ("tgt", "mt-weight"),
}
MT_ARGUMENTS = {
    "decoder_layers": "mt-decoder-layers", "decoder_embed_dim": "mt-decoder-embed-dim",
    "decoder_ffn_embed_dim": "mt-decoder-ffn-dim", "decoder_attention_heads": "mt-decoder-heads",
}  # fmt: skip
SPEC_AUGMENT = {
    "freq_mask_N": "freq_masks", "freq_mask_F": "freq_width", "time_mask_N": "time_masks", "time_mask_T": "time_width",
    "time_mask_p": "time_share",
}  # fmt: skip

OURS = {"--task": "--task echostream_s2st", "--arch": "--arch echostream_small, or another of ours",
        "--criterion": "--criterion echostream_multitask", "--user-dir": "--user-dir echostream"}  # fmt: skip
# What of StreamSpeech's fairseq-train command is otherwise here; flags that are not named are fairseq's own, and stay.
FLAGS = {
    "--config-yaml": "leave it out: config.yaml, which the import writes, is read by itself",
    "--multitask-config-yaml": "the import puts its weights and sizes into train.yaml",
    "--target-is-code": "leave it out: targets are always units",
    "--target-code-size": "num_units in config.yaml (import: --num-units)",
    "--vocoder": "leave it out: voices belong to a checkpoint directory (echostream export-checkpoint --vocoder)",
    "--rdrop-alpha": "not here: no R-Drop",
    "--share-decoder-input-output-embed": "leave it out: shared in --mt-decoder-form whisper alone",
    "--encoder-layers": "the same, of Emformer layers", "--encoder-embed-dim": "the same",
    "--encoder-ffn-embed-dim": "the same", "--encoder-attention-heads": "the same",
    "--translation-decoder-layers": "--mt-decoder-layers",
    "--synthesizer-encoder-layers": "not here: the unit decoder reads the MT decoder's states as they are",
    "--decoder-layers": "--unit-decoder-layers", "--decoder-embed-dim": "--unit-decoder-embed-dim",
    "--decoder-ffn-embed-dim": "--unit-decoder-ffn-dim", "--decoder-attention-heads": "--unit-decoder-heads",
    "--k1": "--lagging-k1 when translating (policy ctc)", "--k2": "--lagging-k2 when translating",
    "--n1": "--stride-n1 when translating (policy ctc)", "--n2": "--stride-n2 when translating",
    "--chunk-size": "--segment-length: the Emformer's chunk is part of the model, one for training and translating",
    "--ctc-upsample-rate": "--ctc-upsample-ratio",
    "--relu-dropout": "--activation-dropout",
    "--attn-type": "not here: Emformer attention", "--pos-enc-type": "not here: see --encoder-position-period",
    "--conv-type": "not here", "--uni-encoder": "leave it out: the encoder always streams",
    "--fp16": "the same on a GPU, or --autocast bfloat16",
}  # fmt: skip
MARKS = {"--task": "speech_to_speech_ctc", "--arch": "streamspeech", "--criterion": "speech_to_unit_2pass_ctc_asr_st"}


@dataclass
class Imported:
    """What came of a directory: rows and what was left out, by manifest; flags for train.yaml; what has no place."""

    rows: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, Counter] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


class Places:
    """Finds the files that paths of another machine mean."""

    def __init__(self, directories: Iterable[Path]):
        self.directories = list(dict.fromkeys(path.resolve() for path in directories))
        self.known: dict[str, Path] = {}  # of folders, once a file was found in them

    def find(self, name: str, what: str) -> Path:
        """Raises: ManifestError, naming the path and where it was looked for."""
        path = PurePosixPath(name)
        folder = self.known.get(str(path.parent))
        if folder is not None and (folder / path.name).is_file():
            return folder / path.name
        tails = [PurePosixPath(*path.parts[i:]) for i in range(path.is_absolute(), len(path.parts))]
        places = [Path(name)] if path.is_absolute() else []
        for found in (*places, *(directory / tail for tail in tails for directory in self.directories)):
            if ".." not in path.parts and found.is_file():
                self.known[str(path.parent)] = found.parent
                return found
        raise ManifestError(
            f"{what} {name} does not exist, nor does a file by an end of that path in "
            f"{', '.join(map(str, self.directories))}; name its folder with --look-in"
        )


def import_directory(
    source: Path, output: Path, look_in: Sequence[Path] = (), pair: tuple[str, str] = ("", ""), num_units: int = 1000
) -> Imported:
    """Write a data directory of ours from StreamSpeech's ``source``, and ``train.yaml`` for ``echostream train``.

    Args:
        look_in: further directories where files may lie: its ``configs/fr-en``, the features' folder.
        pair: source and target language; empty: from a folder's name as ``fr-en``.

    Raises:
        ManifestError, ConfigError: something is missing or cannot be used.
    """
    directories = [source, *look_in, source.resolve().parent]
    places, found = Places(directories), Imported()
    settings = read_mapping(_yaml(directories, "config_gcmvn.yaml", "config*.yaml", "transforms"))
    tasks_path = _yaml(directories, "config_mtl_asr_st_ctcst.yaml", "config*.yaml", "target_unigram")
    tasks = read_mapping(tasks_path)
    names = [re.fullmatch(r"([a-z]{2,3})-([a-z]{2,3})", path.resolve().name) for path in directories]
    match = next(filter(None, names), None)
    languages = [said or (match[i] if match else "") for i, said in enumerate(pair, 1)]
    if not all(languages):
        raise ConfigError(f"{source} does not tell its languages; say --source-lang and --target-lang")

    output.mkdir(parents=True, exist_ok=True)
    _features(settings, places, output, found)
    texts = {side: _vocabulary(side, tasks, str(tasks_path), places, output) for side in ("src", "tgt")}
    write_unit_dictionary(output / "dict.unit.txt", num_units)
    manifests = sorted(path for path in source.glob("*.tsv") if path.is_file())
    if not manifests:
        raise ManifestError(f"{source} has no manifests (train.tsv, dev.tsv ...)")
    read = {path.stem: _rows(path, texts, places, num_units, found) for path in manifests}
    folders = {str(audio.parent) for rows in read.values() for _, audio, _ in rows}
    root = Path(os.path.commonpath(folders))
    for name, rows in read.items():
        relative = ((row, audio.relative_to(root).as_posix() + part) for row, audio, part in rows)
        write_manifest(output / f"{name}.tsv", [Utterance(**{**row, "audio": audio}) for row, audio in relative])
    config = {"source_lang": languages[0], "target_lang": languages[1], "num_units": num_units, "features": "kaldi",
              "audio_root": str(root)}  # fmt: skip
    write_text(output / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    _losses(tasks, found)
    subsets = {"train-subset": "train", "valid-subset": "dev" if "dev" in read else None}
    flags = {"data": str(output), "arch": "echostream_small", **found.flags, **subsets}
    write_text(output / "train.yaml", RECIPE + yaml.safe_dump(flags, sort_keys=False, allow_unicode=True))
    return found


RECIPE = """# From StreamSpeech's configuration; keys are fairseq-train's flags (echostream train --config THIS FILE).
# What it does not say (--optimizer, --lr, --max-tokens, --save-dir ...) comes from the command line, as ever.
"""


def _yaml(directories: Iterable[Path], usual: str, pattern: str, key: str) -> Path:
    """The configuration file of its usual name, or one that has this key."""
    for directory in directories:
        for path in (directory / usual, *sorted(directory.glob(pattern))):
            if path.is_file() and key in read_mapping(path):
                return path
    raise ConfigError(f"{usual} (with the key {key}) is in none of {', '.join(map(str, directories))}; name its folder "
                      "with --look-in")  # fmt: skip


def _features(settings: dict[str, Any], places: Places, output: Path, found: Imported) -> None:
    """CMVN and SpecAugment."""
    bins = settings.get("input_feat_per_channel", NUM_MEL_BINS)
    transforms = settings.get("transforms") or {}
    if bins != NUM_MEL_BINS or "global_cmvn" not in (transforms.get("*") or ()):
        raise ConfigError(f"features of {bins} bins with the transforms {transforms} are not ours: {NUM_MEL_BINS} bins "
                          "and global_cmvn")  # fmt: skip
    statistics = (settings.get("global_cmvn") or {}).get("stats_npz_path", "gcmvn.npz")
    GlobalCMVN.load(places.find(str(statistics), "CMVN file")).save(output / "gcmvn.npz")
    masks = settings.get("specaugment") or {}
    if masks:
        chosen = {ours: masks[theirs] for theirs, ours in SPEC_AUGMENT.items() if theirs in masks}
        found.flags["spec-augment"] = ",".join(f"{name}={value}" for name, value in chosen.items())
    if masks.get("time_wrap_W"):
        found.unused.append(f"specaugment.time_wrap_W {masks['time_wrap_W']}: no time warp here")
    if settings.get("vocoder"):
        found.unused.append("vocoder: give its checkpoint and config to echostream export-checkpoint --vocoder")
    known = {"global_cmvn", "input_channels", "input_feat_per_channel", "specaugment", "transforms", "vocoder"}
    found.unused += [f"{key}: not known here" for key in settings if key not in known]


def _vocabulary(side: str, tasks: dict[str, Any], where: str, places: Places, output: Path) -> dict[str, Path]:
    """Copy a side's SentencePiece model and dictionary; returns its tables of texts by manifest, if there are any."""
    name = next((name for name in TASKS if TASKS[name][0] == side and name in tasks), None)
    if name is None or not isinstance(tasks[name], dict) or "dict" not in tasks[name]:
        raise ConfigError(f"{where} has no task with a dictionary for the {side} text ({', '.join(TASKS)})")
    dictionary = places.find(str(tasks[name]["dict"]), "dictionary")
    model = dictionary.with_suffix(".model")
    for path, target in ((model, f"spm.{side}.model"), (dictionary, f"dict.{side}.txt")):
        if not path.is_file():
            raise ManifestError(f"{path} does not exist; it belongs beside {dictionary}")
        with replacing(output / target) as file:
            file.write(path.read_bytes())
    Subwords(output / f"spm.{side}.model", output / f"dict.{side}.txt")
    return {path.stem: path for path in dictionary.parent.glob("*.tsv")}


def _rows(
    path: Path, texts: dict[str, dict[str, Path]], places: Places, num_units: int, found: Imported
) -> list[tuple[dict[str, Any], Path, str]]:
    """A manifest's utterances with the file of each, and which slice of it."""
    further = {side: _texts(tables.get(path.stem)) for side, tables in texts.items()}
    rows: list[Any] = []
    skipped: Counter[str] = Counter()
    for row, where in table_rows(path, COLUMNS):
        text = {side: _plain(row.get(f"{side}_text") or further[side].get(row["id"], "")) for side in texts}
        empty = [side for side in text if not text[side]]
        if empty or not row["tgt_audio"].strip():
            skipped[f"no {empty[0]}_text" if empty else "no units"] += 1
            continue
        units = np.array(deduplicate(parse_units(row["tgt_audio"], where))[0], dtype=np.int16)
        if units.max() >= num_units:
            raise ManifestError(f"{where}: unit {units.max()} where there are {num_units}; say --num-units")
        if not row["src_n_frames"].isdecimal():
            raise ManifestError(f"{where}: src_n_frames is {row['src_n_frames'][:40]!r}; it must be a whole number")
        name, zipped, part = row["src_audio"].partition(".zip:")
        audio = places.find(name + zipped.removesuffix(":"), f"{where}: src_audio")
        fields = {"id": row["id"], "n_frames": int(row["src_n_frames"]), "units": units, "src_text": text["src"],
                  "tgt_text": text["tgt"]}  # fmt: skip
        rows.append((fields, audio, f":{part}" if zipped else ""))
    if not rows:
        raise ManifestError(f"manifest {path} has no row that can be used: {dict(skipped)}")
    found.rows[path.stem], found.skipped[path.stem] = len(rows), skipped
    return rows


def _texts(table: Path | None) -> dict[str, str]:
    """A multitask table's texts by id (columns ``id`` and ``tgt_text``, whichever side it is)."""
    return {row["id"]: row["tgt_text"] for row, _ in table_rows(table, ("id", "tgt_text"))} if table else {}


def _plain(text: str) -> str:
    """A text without SentencePiece's marks, where it was cut into pieces already."""
    return (text.replace(" ", "").replace(WORD_START, " ") if WORD_START in text else text).strip()


def _losses(tasks: dict[str, Any], found: Imported) -> None:
    """The weights of the losses, as shares of their sum, the units' being 1; and the MT decoder's size."""
    weights = {"unit-weight": 1.0}
    for name, task in tasks.items():
        if name not in TASKS:
            found.unused.append(f"task {name}: no such head here ({', '.join(TASKS)})")
            continue
        weights[TASKS[name][1]] = float(task.get("loss_weight", 1.0))
        arguments = task.get("decoder_args") or {}
        if name == "target_unigram":
            found.flags |= {MT_ARGUMENTS[key]: value for key, value in arguments.items() if key in MT_ARGUMENTS}
            found.flags["label-smoothing"] = task.get("label_smoothing", 0.0)
        if task.get("rdrop_alpha"):
            found.unused.append(f"{name}.rdrop_alpha {task['rdrop_alpha']}: no R-Drop here")
    total = sum(weights.values())
    found.flags |= {name: round(weights.get(name, 0.0) / total, 4)
                    for name in ("asr-weight", "st-weight", "mt-weight", "unit-weight")}  # fmt: skip


def refuse_flags(arguments: Sequence[str]) -> str | None:
    """What to change in StreamSpeech's fairseq-train command, line by line; None if this is not one."""
    words = [word.split("=")[0] for word in arguments]
    values = {word: after for word, after in itertools.pairwise(arguments)}
    values |= dict(word.split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    if not any(str(values.get(flag, "")).startswith(mark) for flag, mark in MARKS.items()):
        return None
    lines = [f"  {flag}: {(OURS | FLAGS)[flag]}" for flag in dict.fromkeys(words) if flag in OURS | FLAGS]
    return (
        "this is StreamSpeech's command; its data directory becomes ours by echostream prepare "
        "import-streamspeech, which also writes train.yaml. Of its flags (docs/from-streamspeech.md):\n"
        + "\n".join(lines)
    )
