"""A tiny corpus made on the fly: tones for words, so that a model can learn it, and everything training reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import sentencepiece
import yaml

from echostream.audio.cmvn import GlobalCMVN
from echostream.audio.fbank import fbank
from echostream.audio.io import write_audio
from echostream.data.manifest import Utterance, write_manifest

WORDS = {"uno": "one", "dos": "two", "tres": "three", "cuatro": "four", "cinco": "five", "seis": "six"}
NUM_UNITS = 20


def sentence(rng: np.random.Generator) -> tuple[str, str, np.ndarray, np.ndarray]:
    """Source text, target text, units, samples."""
    numbers = rng.integers(0, len(WORDS), int(rng.integers(2, 5)))
    words = [list(WORDS)[n] for n in numbers]
    time = np.arange(3200) / 16000
    tones = [0.3 * np.sin(2 * np.pi * (300 + 400 * n) * time) for n in numbers]
    samples = np.concatenate([*tones, np.zeros(800)]) + 0.001 * rng.standard_normal(3200 * len(words) + 800)
    units = [u for n in numbers for u in (3 * n, 3 * n + 1)]
    units = np.array([u for i, u in enumerate(units) if i == 0 or u != units[i - 1]], dtype=np.int16)
    source = " ".join(words).capitalize() + "."
    target = " ".join(WORDS[w] for w in words).capitalize() + "."
    return source, target, units, samples.astype(np.float32)


def make_corpus(directory: Path, train: int = 12, dev: int = 4, seed: int = 0) -> Path:
    """Write a data directory and return it."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    features, texts = [], {"src": [], "tgt": []}
    for split, count in (("train", train), ("dev", dev)):
        rows = []
        for i in range(count):
            source, target, units, samples = sentence(rng)
            write_audio(directory / "audio" / f"{split}{i}.wav", samples)
            features.append(fbank(samples))
            texts["src"].append(source)
            texts["tgt"].append(target)
            rows.append(Utterance(f"{split}{i}", f"audio/{split}{i}.wav", len(features[-1]), source, target, units))
        write_manifest(directory / f"{split}.tsv", rows)
    GlobalCMVN.estimate(features).save(directory / "gcmvn.npz")
    for side, lines in texts.items():
        words = sorted({word.strip(".").lower() for line in lines for word in line.split()})
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines + words * 5 + [w.capitalize() + "." for w in words]),
            model_writer=model,
            vocab_size=40,
            model_type="unigram",
            character_coverage=1.0,
            hard_vocab_limit=False,
            minloglevel=2,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
        )
        (directory / f"spm.{side}.model").write_bytes(model.getvalue())
        sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces = [sp.IdToPiece(i) for i in range(4, sp.GetPieceSize())]
        (directory / f"dict.{side}.txt").write_text("".join(f"{p} 1\n" for p in pieces), encoding="utf-8")
    (directory / "dict.unit.txt").write_text("".join(f"{i} 1\n" for i in range(NUM_UNITS)))
    (directory / "config.yaml").write_text(yaml.safe_dump({"num_units": NUM_UNITS, "source_lang": "es"}))
    return directory


TINY_MODEL = dict(
    conv_channels=8,
    encoder_embed_dim=32,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_embed_dim=64,
    st_decoder_layers=1,
    st_decoder_heads=2,
    mt_decoder_layers=1,
    mt_decoder_heads=2,
    mt_decoder_embed_dim=32,
    mt_decoder_ffn_dim=64,
    unit_decoder_layers=1,
    unit_decoder_heads=2,
    unit_decoder_embed_dim=32,
    unit_decoder_ffn_dim=64,
    ctc_upsample_ratio=8,
    unit_decoder_input="mt-tokens",
)


def tiny_flags(data: Path, save_dir: Path | None, **changes: object) -> list[str]:
    """fairseq-train's arguments for a tiny model on ``data``; ``changes`` as in ``max_update=3`` or ``cpu=True``."""
    flags: dict[str, object] = dict(
        arch="echostream",
        task="echostream_s2st",
        criterion="echostream_multitask",
        optimizer="adam",
        lr=0.003,
        max_tokens=400,
        max_update=3,
        save_dir=save_dir,
        cpu=True,
        num_workers=0,
        valid_subset="dev",
        eval_bleu=True,
        log_format="simple",
        log_interval=1,
        no_progress_bar=True,
        clip_norm=5.0,
        no_epoch_checkpoints=True,
        seed=1,
        **TINY_MODEL,
    )
    flags.update(changes)
    arguments = [str(data), "--user-dir", str(Path(__file__).resolve().parents[1] / "echostream")]
    for name, value in flags.items():
        if value is not None and value is not False:
            arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return arguments
