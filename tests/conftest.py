"""Fixtures that several test files share: a tiny corpus directory and a tiny checkpoint directory of real modules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echostream.config import EchoStreamConfig

SENTENCES = {
    "src": ["Hola, amigo.", "¿Qué hora es?", "La casa es grande.", "No tengo tiempo hoy.", "¡Vamos a comer pan!"],
    "tgt": ["Hello, my friend.", "What time is it?", "The house is big.", "I have no time today.", "Let's eat bread!"],
}
NUM_UNITS = 20
PIECES = 38


def tiny_voice():
    """The configuration of a vocoder of the preset ``small``, narrow enough for tests."""
    from echostream.models.decoders.vocoder import VocoderConfig

    return VocoderConfig.preset(
        "small",
        num_embeddings=NUM_UNITS,
        upsample_initial_channel=16,
        upsample_channels=[16, 8, 8, 4],
        embedding_dim=16,
        dur_predictor_params=dict(
            encoder_embed_dim=16, var_pred_hidden_dim=16, var_pred_kernel_size=3, var_pred_dropout=0.2
        ),
    )


def tiny_config(**changes: object) -> EchoStreamConfig:
    """A model of the real structure with about 0.1M parameters."""
    values = dict(
        conv_channels=8,
        encoder_embed_dim=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_embed_dim=48,
        left_context_length=6,
        memory_size=2,
        asr_vocab_size=PIECES + 1,
        st_decoder_layers=1,
        st_decoder_heads=2,
        st_vocab_size=PIECES + 1,
        st_left_context=16,
        mt_decoder_layers=2,
        mt_decoder_heads=2,
        mt_decoder_embed_dim=32,
        mt_decoder_ffn_dim=48,
        mt_vocab_size=PIECES + 1,
        unit_decoder_input="mt",
        ctc_upsample_ratio=4,
        unit_decoder_layers=2,
        unit_decoder_heads=2,
        unit_decoder_embed_dim=32,
        unit_decoder_ffn_dim=48,
        num_units=NUM_UNITS,
        max_sentence_frames=256,
        max_target_tokens=32,
    )
    return EchoStreamConfig(**{**values, **changes})


def make_tiny_data(folder: Path) -> Path:
    """Write a corpus directory without recordings: SentencePiece models, dictionaries, CMVN, config.yaml."""
    import sentencepiece

    for side, sentences in SENTENCES.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences * 4),
            model_prefix=str(folder / f"spm.{side}"),
            vocab_size=PIECES,
            model_type="unigram",
            character_coverage=1.0,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            hard_vocab_limit=True,
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"spm.{side}.model"))
        pieces = [model.id_to_piece(i) for i in range(4, model.get_piece_size())]
        lines = [f"{piece} 1" for piece in pieces] + ["madeupword0000 0"]
        (folder / f"dict.{side}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "dict.unit.txt").write_text("".join(f"{unit} 1\n" for unit in range(NUM_UNITS)), encoding="utf-8")
    np.savez(folder / "gcmvn.npz", mean=np.full(80, 10.0, np.float32), std=np.full(80, 3.0, np.float32))
    (folder / "config.yaml").write_text("source_lang: es\ntarget_lang: en\nsample_rate: 16000\n", encoding="utf-8")
    return folder


def make_tiny_bundle(data: Path, folder: Path) -> Path:
    """Write a checkpoint directory with an untrained model and an untrained voice; ``load_bundle`` reads it."""
    import torch

    from echostream.checkpoint import save_bundle
    from echostream.models.decoders.vocoder import CodeHiFiGAN
    from echostream.models.decoders.vocoder_checkpoint import save_vocoder
    from echostream.models.echostream_model import build_echostream_model

    torch.manual_seed(1)
    voice = tiny_voice()
    save_vocoder(CodeHiFiGAN(voice), folder / "voice.pt", folder / "voice.json")
    config = tiny_config()
    return save_bundle(
        folder / "es-en",
        build_echostream_model(config).state_dict(),
        config,
        data,
        vocoder=(folder / "voice.pt", folder / "voice.json"),
        policy={"chunk_ms": 320, "speech_gate": False},  # nobody speaks in what the tests make
        card="An untrained model for tests.\n",
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus directory without recordings: SentencePiece models, dictionaries, CMVN, config.yaml."""
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """Tracing a graph takes seconds: of all tests that ask for this, one traces a step with the same weights."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("torch")
    from echostream.export import directory

    make_graph, known = directory.make_graph, {}

    def remembered(step: Any) -> Any:
        digest = hashlib.sha256(f"{type(step).__name__} {step.inputs}".encode())
        for name, value in [*step.named_parameters(), *step.named_buffers()]:
            digest.update(name.encode() + value.detach().numpy().tobytes())
        key = digest.hexdigest()
        if key not in known:
            known[key] = make_graph(step).SerializeToString()
        return onnx.ModelProto.FromString(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "make_graph", remembered)
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with an untrained model and an untrained voice; ``load_bundle`` reads it."""
    pytest.importorskip("torch")
    return make_tiny_bundle(tiny_data, tmp_path_factory.mktemp("bundle"))
