"""The full-context Whisper in torch against CTranslate2's and faster-whisper's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

from echostream.audio.io import load_audio  # noqa: E402
from echostream.constants import WHISPER_SILENCE  # noqa: E402
from echostream.errors import EchoStreamError, MissingExtraError  # noqa: E402
from echostream.whisper.reference import WINDOW, WhisperReference, log_mel  # noqa: E402
from echostream.whisper.weights import WhisperWeights, read_whisper  # noqa: E402
from tests.whisper_models import DIMS, ctranslate2_variables, random_parameters, write_ctranslate2  # noqa: E402

DEMO = Path(__file__).resolve().parents[1] / "echostream" / "assets" / "demo" / "01.ogg"


@pytest.fixture(scope="module")
def tiny() -> WhisperReference:
    parameters = {name: 0.2 * value for name, value in random_parameters().items()}
    return WhisperReference.from_weights(WhisperWeights(DIMS, parameters, None, Path("tiny")))


@pytest.fixture(scope="module")
def base() -> Path:
    pytest.importorskip("ctranslate2")
    from echostream.units.features import packaged_whisper

    try:
        return packaged_whisper()
    except MissingExtraError as error:
        pytest.skip(str(error))


def speech() -> np.ndarray:
    return load_audio(DEMO)


def test_nothing_is_trained_and_nothing_copied() -> None:
    parameters = random_parameters()
    model = WhisperReference.from_weights(WhisperWeights(DIMS, parameters, None, Path("tiny")))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(parameters)
    name = "encoder.blocks.0.attn.query.weight"
    assert model.state_dict()[name].data_ptr() == parameters[name].ctypes.data


def test_decoder_is_causal_and_reads_what_the_mask_shows(tiny: WhisperReference) -> None:
    torch.manual_seed(0)
    mel, tokens = torch.randn(2, DIMS.n_mels, 31), torch.randint(0, DIMS.n_vocab, (2, 7))
    encoded = tiny.encode(mel)
    assert encoded.shape == (2, 16, DIMS.n_audio_state)
    whole = tiny.decode(tokens, encoded)
    assert whole.shape == (2, 7, DIMS.n_vocab)
    torch.testing.assert_close(tiny.decode(tokens[:, :4], encoded), whole[:, :4], rtol=1e-4, atol=1e-5)
    mask = torch.arange(16) < torch.tensor([[16], [9]])
    masked = tiny.decode(tokens, encoded, mask)
    torch.testing.assert_close(masked[:1], whole[:1], rtol=1e-4, atol=1e-5)
    alone = tiny.decode(tokens[1:], encoded[1:, :9])
    torch.testing.assert_close(masked[1:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masked[1:], whole[1:])


def test_rows_of_a_padded_batch_are_their_own(tiny: WhisperReference) -> None:
    torch.manual_seed(0)
    mel, lengths = torch.randn(3, DIMS.n_mels, 31), torch.tensor([31, 12, 5])
    frames, mask = tiny.encode_padded(mel, lengths, 0)
    assert frames.shape == (3, 16, DIMS.n_audio_state) and mask.isneginf().sum(1).tolist() == [0, 10, 13]
    for row, x, length in zip(frames, mel, lengths.tolist()):
        alone = tiny.encode(x[None, :, :length])[0]
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 3])
def test_silence_that_fills_the_window(tiny: WhisperReference, stride: int) -> None:
    """With a stride of 1 nothing is left out; with another, what stands for many weighs as much as many of its kind."""
    torch.manual_seed(0)
    size, context = 2 * DIMS.n_audio_ctx, DIMS.n_audio_ctx
    mel, lengths = torch.randn(2, DIMS.n_mels, 20), torch.tensor([20, 9])
    for row, length in zip(mel, lengths.tolist()):
        row[:, length - 4 : length] = WHISPER_SILENCE  # the first that is left out has heard nothing else
    frames, mask = tiny.encode_padded(mel, lengths, stride)
    for b, length in enumerate(lengths.tolist()):
        dense = -(-length // 2)
        whole = torch.full((1, DIMS.n_mels, size + 8), WHISPER_SILENCE)  # no convolution meets the window's end
        whole[0, :, :length] = mel[b, :, :length]
        encoder = tiny.encoder
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(whole)))).transpose(1, 2)[:, :context]
        places = list(range(dense))
        for first in range(dense, context, stride):
            width = min(stride, context - first)
            places += [first + width // 2] * width
        x = x + encoder.positional_embedding[places]
        for block in encoder.blocks:
            x = block(x)
        expected = encoder.ln_post(x)[0]
        torch.testing.assert_close(frames[b, :dense], expected[:dense], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(mask[b].exp().sum().item(), float(context), atol=1e-3, rtol=0)
        tokens = torch.randint(0, DIMS.n_vocab, (1, 5))
        ours, theirs = tiny.decode(tokens, frames[b : b + 1], mask[b : b + 1]), tiny.decode(tokens, expected[None])
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_what_does_not_fit_is_refused(tiny: WhisperReference) -> None:
    for shape in ((1, DIMS.n_mels + 1, 10), (1, DIMS.n_mels, 2 * DIMS.n_audio_ctx + 1), (DIMS.n_mels, 10)):
        with pytest.raises(EchoStreamError, match="this Whisper reads"):
            tiny.encode(torch.zeros(shape))
    with pytest.raises(EchoStreamError, match="13 tokens; this Whisper takes 1 to 12"):
        tiny.decode(torch.zeros(1, 13, dtype=torch.long), torch.zeros(1, 3, DIMS.n_audio_state))


@pytest.mark.parametrize("kind, tolerance", [("float32", 1e-4), ("float16", 1e-4), ("int8", 1e-4)])
def test_tiny_encoder_is_ctranslate2s(kind: str, tolerance: float, tmp_path: Path) -> None:
    """What the reader made of every form is what CTranslate2 computes with: scales, aliases and parts included."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    dims = replace(DIMS, n_audio_state=128, n_text_state=128)  # CTranslate2 wants its heads 64 wide
    parameters = {name: 0.1 * value for name, value in random_parameters(dims).items()}
    directory = write_ctranslate2(tmp_path, ctranslate2_variables(parameters, dims), kind)
    (directory / "vocabulary.json").write_text(json.dumps([*"abcdefghijklmnopqrstuvwxyz0123"]))
    oracle = ctranslate2.models.Whisper(str(directory), compute_type="float32", intra_threads=1)
    mel = np.random.default_rng(0).normal(size=(2, dims.n_mels, 40)).astype(np.float32)
    theirs = np.asarray(oracle.encode(ctranslate2.StorageView.from_array(mel), to_cpu=True))
    ours = WhisperReference.load(directory).encode(torch.from_numpy(mel)).numpy()
    np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=1e-3)


def test_log_mel_is_whispers() -> None:
    feature_extractor = pytest.importorskip("faster_whisper.feature_extractor")
    samples = speech()
    theirs = feature_extractor.FeatureExtractor()(samples, padding=WINDOW)[:, :3000]
    ours = log_mel(samples)
    assert ours.shape == (80, 3000) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert log_mel(samples, 128, 16000).shape == (128, 100)


def test_base_model_is_ctranslate2s(base: Path) -> None:
    """Encoder and decoder, along CTranslate2's own greedy translation of a spoken sentence."""
    import ctranslate2

    model = WhisperReference.load(base)
    oracle = ctranslate2.models.Whisper(str(base), compute_type="float32", intra_threads=1)
    mel = np.ascontiguousarray(log_mel(speech())[None])
    encoded = oracle.encode(ctranslate2.StorageView.from_array(mel), to_cpu=True)
    ours = model.encode(torch.from_numpy(mel))
    np.testing.assert_allclose(ours.numpy(), np.asarray(encoded), atol=1e-3, rtol=1e-4)  # its loudest are at 24

    prompt = [50258, 50262, 50358, 50363]  # start, Spanish, translate, no timestamps
    found = oracle.generate(
        encoded, [prompt], beam_size=1, return_logits_vocab=True, suppress_blank=False, suppress_tokens=[]
    )[0]
    written = found.sequences_ids[0]
    assert len(written) > 3
    tokens = torch.tensor([prompt + list(written)])
    logits = model.decode(tokens, ours)[0, len(prompt) - 1 :]
    theirs = torch.from_numpy(np.stack([np.asarray(step).reshape(-1) for step in found.logits[0]]))
    for step, (mine, other) in enumerate(zip(logits, theirs)):
        usual = torch.isfinite(other) & (other > -1e4)  # what CTranslate2 never writes is masked
        assert usual.sum() > 50000, step
        shift = (mine - other)[usual].mean()  # logits, or log probabilities
        torch.testing.assert_close(mine[usual], other[usual] + shift, atol=5e-3, rtol=1e-3)
    assert logits[: len(written)].argmax(dim=-1).tolist() == list(written)


def test_read_weights_are_those_of_the_model(base: Path) -> None:
    weights = read_whisper(base)
    model = WhisperReference.from_weights(weights)
    assert torch.equal(
        model.decoder.token_embedding.weight, torch.from_numpy(weights.parameters["decoder.token_embedding.weight"])
    )
