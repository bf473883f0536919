"""A checkpoint directory from a training run's weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from echostream.audio.cmvn import GlobalCMVN
from echostream.audio.features import feature_extractor
from echostream.checkpoint.layout import (
    CARD,
    CONFIG,
    COPIED,
    FILES,
    FORMAT,
    LANGUAGE,
    check_subwords,
    check_vocabulary,
    sha256,
)
from echostream.config import EchoStreamConfig
from echostream.constants import NUM_SPECIALS, SAMPLE_RATE
from echostream.errors import CheckpointError, ManifestError
from echostream.files import replacing_directory, write_text
from echostream.loading import read_yaml
from echostream.rules import check
from echostream.text import Vocabulary

if TYPE_CHECKING:
    import torch


def save_bundle(
    directory: str | Path,
    state: Mapping[str, torch.Tensor],
    config: EchoStreamConfig,
    data: str | Path,
    vocoder: tuple[str | Path, str | Path] | None = None,
    policy: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write a checkpoint directory that ``load_bundle`` reads.

    Args:
        state: the model's weights; those of an attached vocoder (``vocoder.*``) are left out. Stored as fp16.
        data: corpus directory with dictionaries, SentencePiece models, ``gcmvn.npz`` and ``config.yaml``; its
            k-means goes along.
        vocoder: checkpoint and ``config.json`` of a CodeHiFiGAN; only the generator is kept, as fp16.
        policy: the policy's defaults for this model.
        card: text of ``MODEL_CARD.md``.

    Raises:
        CheckpointError, ManifestError: a file is missing, or a dictionary does not fit the model.
        OutputError: the directory cannot be written; what was there is as before.
    """
    import torch

    directory, data = Path(directory), Path(data)
    corpus = read_yaml(data / CONFIG, "configuration", CheckpointError) if (data / CONFIG).exists() else {}
    check(corpus, {"source_lang": LANGUAGE, "target_lang": LANGUAGE}, str(data / CONFIG), CheckpointError)
    source_dict, target_dict, unit_dict = (
        Vocabulary.load(data / FILES[name]) for name in ("source_dict", "target_dict", "unit_dict")
    )
    check_vocabulary(data / FILES["source_dict"], source_dict, config.asr_vocab_size, "asr_vocab_size")
    check_vocabulary(data / FILES["target_dict"], target_dict, config.mt_vocab_size, "mt_vocab_size")
    check_vocabulary(data / FILES["unit_dict"], unit_dict, config.num_units + NUM_SPECIALS, "num_units")
    cmvn = feature_extractor(config.features).cmvn or GlobalCMVN.load(data / FILES["cmvn"])
    for name, vocabulary in (("source", source_dict), ("target", target_dict)):
        model, dictionary = data / FILES[f"{name}_spm"], data / FILES[f"{name}_dict"]
        if not model.exists():
            raise ManifestError(f"{model} does not exist; make it with echostream prepare")
        check_subwords(model, dictionary, vocabulary)

    voice = None
    if vocoder is not None:
        from echostream.models.decoders.vocoder_checkpoint import load_vocoder, save_vocoder

        voice = load_vocoder(*vocoder)
    weights = {name: _half(tensor) for name, tensor in state.items() if not name.startswith("vocoder.")}
    with replacing_directory(directory, lambda name: name in (CONFIG, CARD, *FILES.values())) as new:
        for name in COPIED:
            if name != "cmvn":
                shutil.copyfile(data / FILES[name], new / FILES[name])
        cmvn.save(new / FILES["cmvn"])
        torch.save({"format": FORMAT, "model": weights}, new / FILES["model"])
        if (data / "units" / FILES["kmeans"]).is_file():
            shutil.copyfile(data / "units" / FILES["kmeans"], new / FILES["kmeans"])
        if voice is not None:
            save_vocoder(voice, new / FILES["vocoder"], new / FILES["vocoder_config"], half=True)
        values = {
            "format": FORMAT,
            "source_lang": corpus.get("source_lang") or "",
            "target_lang": corpus.get("target_lang") or "",
            "sample_rate": SAMPLE_RATE,
            "policy": dict(policy or {}),
            "files": FILES,
            "digests": {file.name: sha256(file) for file in sorted(new.iterdir())},
            "model": config.to_dict(),
        }
        write_text(new / CONFIG, yaml.safe_dump(values, sort_keys=False))
        if card:
            write_text(new / CARD, card)
    return directory


def _half(tensor: torch.Tensor) -> torch.Tensor:
    # clone: a view would drag its whole storage into the file
    return (tensor.half() if tensor.is_floating_point() else tensor).clone().contiguous()
