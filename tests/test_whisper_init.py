"""Models that start from Whisper: the same numbers as Whisper's, by the package, the command line and fairseq-train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from echostream.checkpoint import load_bundle  # noqa: E402
from echostream.cli import main  # noqa: E402
from echostream.constants import EOS, PAD, WHISPER_SILENCE  # noqa: E402
from echostream.errors import CheckpointError, ConfigError  # noqa: E402
from echostream.models.decoders.transformer_decoder import MTDecoder  # noqa: E402
from echostream.models.echostream_encoder import EchoStreamEncoder  # noqa: E402
from echostream.models.whisper_init import chosen_layers, decoder_weights, encoder_weights, whisper_config  # noqa: E402
from echostream.whisper.reference import WhisperReference  # noqa: E402
from echostream.whisper.subwords import TokenOrigins  # noqa: E402
from echostream.whisper.tokens import TIMESTAMPS  # noqa: E402
from echostream.whisper.weights import WhisperWeights  # noqa: E402
from tests.whisper_models import DIMS, ctranslate2_variables, random_parameters, write_ctranslate2  # noqa: E402

SIZES = replace(DIMS, n_vocab=TIMESTAMPS + 300, n_audio_ctx=100)
SMALL = dict(max_target_tokens=8, asr_vocab_size=10, st_vocab_size=12, mt_vocab_size=12, st_decoder_embed_dim=8,
             st_decoder_heads=2, unit_decoder_embed_dim=8, unit_decoder_heads=2, num_units=9)  # fmt: skip


def whisper(**parameters: np.ndarray) -> WhisperWeights:
    values = {name: 0.3 * value for name, value in random_parameters(SIZES).items()}
    place, width = np.arange(SIZES.n_audio_ctx)[:, None], SIZES.n_audio_state // 2
    angles = place * np.exp(-np.log(10_000) / (width - 1) * np.arange(width))
    values["encoder.positional_embedding"] = np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
    return WhisperWeights(SIZES, {**values, **parameters}, None, Path("tiny"))


def test_the_encoder_with_full_context_is_whispers() -> None:
    source = whisper()
    cfg = whisper_config(SIZES, full_context=True, **SMALL)
    encoder = EchoStreamEncoder(cfg).eval()
    encoder.load_state_dict({**encoder.state_dict(), **encoder_weights(source, cfg)})
    x = torch.randn(1, 79, SIZES.n_mels)
    mel = torch.cat([torch.full((1, 1, SIZES.n_mels), WHISPER_SILENCE), x], dim=1)
    expected = WhisperReference.from_weights(source).encode(mel.transpose(1, 2))
    with torch.no_grad():
        got, lengths = encoder(x, torch.tensor([79]))
    assert lengths.tolist() == [20]
    torch.testing.assert_close(got, expected.unflatten(1, (20, 2)).mean(2), rtol=0, atol=1e-4)


PROMPT = (101, 102, 103, SIZES.n_vocab - TIMESTAMPS - 1)


def test_the_decoder_is_whispers_behind_its_prompt() -> None:
    """Exactly so while silence is heard, whose keys and values stand for the prompt's."""
    source = whisper()
    cfg = whisper_config(SIZES, **SMALL)
    origins = TokenOrigins(((), (), (99,), (), *((i,) for i in range(3, 10)), (20, 30)))
    decoder = MTDecoder(cfg).eval()
    decoder.load_state_dict(decoder_weights(source, cfg, origins, PROMPT))
    tokens = torch.tensor([[EOS, 5, 9, 4, 10]])
    theirs = torch.tensor([[*PROMPT, *(origins.tokens[i][0] for i in tokens[0, 1:])]])
    reference = WhisperReference.from_weights(source)
    encoded = reference.encode(torch.full((1, SIZES.n_mels, 2 * SIZES.n_audio_ctx), WHISPER_SILENCE))
    with torch.no_grad():
        got, _ = decoder(tokens, encoded, torch.tensor([encoded.shape[1]]))
        expected = reference.decode(theirs, encoded)[:, len(PROMPT) - 1 :]
        state = decoder.extend(encoded, torch.tensor([encoded.shape[1]]), decoder.init_state(1))
        streamed = []
        for part in (tokens[:, :1], tokens[:, 1:4], tokens[:, 4:]):
            scores, _, state = decoder.step(part, None, state)
            streamed.append(scores)
    torch.testing.assert_close(torch.cat(streamed, dim=1), got, rtol=1e-4, atol=1e-4)
    assert got.shape == (1, 5, 12)
    entries = [EOS, *range(4, 11)]
    torch.testing.assert_close(
        got[..., entries], expected[..., [origins.tokens[i][0] for i in entries]], rtol=1e-4, atol=1e-4
    )
    table = source.parameters["decoder.token_embedding.weight"]
    np.testing.assert_allclose(decoder.embedding.weight[11].detach(), (table[20] + table[30]) / 2, rtol=1e-6)
    assert bool((decoder.embedding.weight[PAD] == 0).all())


def test_a_shallower_decoder_takes_evenly_spaced_layers() -> None:
    assert [chosen_layers(6, n) for n in (1, 2, 3, 4, 6)] == [[5], [2, 5], [1, 3, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    source, origins = whisper(), TokenOrigins(((),) * 2 + ((99,),) + ((),) + ((1,),) * 8)
    weights = decoder_weights(source, whisper_config(SIZES, mt_decoder_layers=2, **SMALL), origins, PROMPT)
    expected = source.parameters["decoder.blocks.2.mlp.0.weight"]
    np.testing.assert_array_equal(weights["layers.1.ffn.inner.weight"], expected)
    with pytest.raises(CheckpointError, match="mt_decoder_layers is 4; tiny has 3"):
        decoder_weights(source, whisper_config(SIZES, mt_decoder_layers=4, **SMALL), origins, PROMPT)


def test_what_does_not_fit_is_refused() -> None:
    source = whisper()
    with pytest.raises(ConfigError, match="encoder_stem is 'conv2d'"):
        encoder_weights(source, replace(whisper_config(SIZES, **SMALL), encoder_stem="conv2d"))
    with pytest.raises(CheckpointError, match="encoder_layers is 3, but tiny has 2"):
        encoder_weights(source, whisper_config(SIZES, encoder_layers=3, **SMALL))
    with pytest.raises(ConfigError, match="mt_decoder_form is 'vaswani'"):
        cfg = whisper_config(SIZES, mt_decoder_form="vaswani", **SMALL)
        decoder_weights(source, cfg, TokenOrigins(((1,),)), PROMPT)
    with pytest.raises(ConfigError, match="mt_decoder_prompt is 2; Whisper's is 3 long, or 0"):
        decoder_weights(source, whisper_config(SIZES, mt_decoder_prompt=2, **SMALL), TokenOrigins(((),) * 12), PROMPT)
    with pytest.raises(CheckpointError, match="mt_vocab_size is 12, the dictionary has 5 entries"):
        decoder_weights(source, whisper_config(SIZES, **SMALL), TokenOrigins(((), (), (99,), (), (1,))), PROMPT)


def tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes, as Whisper's begins."""
    from echostream.whisper.tokens import _byte_alphabet

    vocabulary = {letter: i for i, letter in enumerate(_byte_alphabet())}
    values = {"model": {"vocab": vocabulary, "merges": []}, "added_tokens": [{"content": "<|endoftext|>", "id": 256}]}
    (directory / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


def write_tiny_whisper(directory: Path) -> Path:
    """A CTranslate2 directory with a tokenizer, that hears 80 mel bands."""
    dims = replace(SIZES, n_mels=80, n_text_ctx=300)
    write_ctranslate2(directory, ctranslate2_variables(random_parameters(dims), dims), kind="float16")
    tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper"))


def test_import_whisper_makes_a_checkpoint_that_streams(
    model_directory: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "imported"
    arguments = ["import-whisper", str(model_directory), "-o", str(output), "--data", str(tiny_data)]
    assert main([*arguments, "--decoder-layers", "2", "--right-context-length", "2"]) == 0
    assert str(output) in capsys.readouterr().out
    bundle = load_bundle(output)
    assert bundle.config.features == "whisper" and bundle.config.mt_decoder_layers == 2
    assert bundle.config.right_context_length == 2
    assert np.allclose(bundle.cmvn.mean, -4) and np.allclose(bundle.cmvn.std, 4)
    from echostream.streaming import SentenceEnd, StreamingSession

    session = StreamingSession(bundle, policy="sentence", segmenter="none", speech_gate=False)
    noise = np.random.default_rng(1).standard_normal(16_000).astype(np.float32) * 0.1
    events = [*session.push(noise), *session.finish()]
    assert [type(event) for event in events].count(SentenceEnd) == 1


def test_import_whisper_tells_what_is_wrong(model_directory: Path, tiny_data: Path, tmp_path: Path, capsys) -> None:
    output = ["-o", str(tmp_path / "out"), "--data", str(tiny_data)]
    assert main(["import-whisper", str(tmp_path / "none"), *output]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["import-whisper", str(model_directory), *output, "--decoder-layers", "9"]) == 1
    assert "mt_decoder_layers is 9" in capsys.readouterr().err


def test_a_corpus_for_whisper_has_its_tokens_and_features(model_directory: Path, tmp_path: Path) -> None:
    from echostream.data.config import DataConfig
    from echostream.data.manifest import read_manifest
    from tests.test_corpus import ready_corpus

    output = ready_corpus(tmp_path, "--whisper", str(model_directory), "--source-vocab-size", "40")
    config = DataConfig.load(output)
    assert config.features == "whisper" and np.allclose(config.cmvn.mean, -4)
    text = read_manifest(output / "train.tsv")[0].tgt_text
    ids = config.target.encode(text)
    assert config.target.decode(ids) == text
    assert len(ids) == len(text) + 1  # this Whisper has bytes alone: a piece a letter and a space
