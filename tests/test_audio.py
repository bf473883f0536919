"""Audio: files of every kind, the resampler, log-mel features, and their streaming twins."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from echostream.audio.cmvn import GlobalCMVN
from echostream.audio.fbank import fbank, num_frames
from echostream.audio.features import FEATURES, FeatureState
from echostream.audio.io import load_audio, write_audio
from echostream.audio.resample import Resampler
from echostream.constants import WHISPER_SILENCE
from echostream.errors import AudioError, EchoStreamError, ManifestError


def speechlike(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Harmonics under a slow envelope, with noise and a stretch of digital silence."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * 140 * k * t + k) / k for k in range(1, 12))
    wave = 0.2 * wave * (0.5 + 0.5 * np.sin(2 * np.pi * 2.3 * t)) + 0.003 * rng.standard_normal(len(t))
    wave[len(t) // 2 : len(t) // 2 + rate // 10] = 0.0
    return wave.astype(np.float32)


def random_splits(samples: np.ndarray, rng: np.random.Generator, largest: int) -> list[np.ndarray]:
    pieces, begin = [], 0
    while begin < len(samples):
        size = int(rng.integers(0, largest + 1))
        pieces.append(samples[begin : begin + size])
        begin += size
    return pieces


# ---------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["loud", "quiet"])
def test_fbank_equals_torchaudio(scale):
    torch = pytest.importorskip("torch")
    compat = pytest.importorskip("echostream.compat")
    compat.import_torchaudio()
    from torchaudio.compliance import kaldi

    samples = scale * speechlike(3.0) + scale * 0.01 * np.random.default_rng(1).standard_normal(48000).astype("f4")
    reference = kaldi.fbank(torch.from_numpy(samples * 2**15)[None], num_mel_bins=80, dither=0.0).numpy()
    assert fbank(samples).shape == reference.shape
    np.testing.assert_allclose(fbank(samples), reference, atol=1e-3)


def test_fbank_equals_kaldi_native_fbank():
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    online = knf.OnlineFbank(options)
    samples = speechlike(2.0) + 0.01 * np.random.default_rng(1).standard_normal(32000).astype("f4")
    online.accept_waveform(16000, (samples * 2**15).tolist())
    reference = np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])
    # Its mel filters have low_freq 20 and high_freq 0 = Nyquist as ours; its FFT and window are its own code.
    np.testing.assert_allclose(fbank(samples), reference, atol=2e-3)


@pytest.mark.parametrize("length", [0, 1, 399, 400, 559, 560, 16000])
def test_fbank_frame_count(length):
    expected = 0 if length < 400 else 1 + (length - 400) // 160
    assert fbank(np.zeros(length, dtype=np.float32)).shape == (expected, 80)
    assert num_frames(length) == expected


@pytest.mark.parametrize("largest", [3, 700, 9000])
def test_fbank_stream_is_bit_identical(largest):
    samples = speechlike(0.4 if largest == 3 else 3.0)
    state, parts = FEATURES["kaldi"].init_state(), []
    for piece in random_splits(samples, np.random.default_rng(largest), largest):
        features, state = FEATURES["kaldi"].step(piece, state)
        parts.append(features)
    assert np.array_equal(np.concatenate(parts), fbank(samples))


def test_fbank_step_leaves_its_state_alone():
    _, state = FEATURES["kaldi"].step(speechlike(0.1), FEATURES["kaldi"].init_state())
    before = FeatureState(state.samples.copy(), state.count)
    FEATURES["kaldi"].step(speechlike(0.1, seed=2), state)
    assert np.array_equal(before.samples, state.samples) and before.count == state.count


@pytest.mark.parametrize("level", [0.0, 0.5, -1.0], ids=["silence", "dc", "full negative dc"])
def test_constant_input_gives_the_floor_not_noise(level):
    features = fbank(np.full(4000, level, dtype=np.float32))
    np.testing.assert_allclose(features, np.log(np.finfo(np.float32).eps), rtol=1e-6)


def test_clipped_input_stays_finite():
    assert np.isfinite(fbank(np.clip(50 * speechlike(1.0), -1, 1))).all()


# -------------------------------------------------------------------------------------------------- resampling

RATES = [8000, 11025, 22050, 24000, 44100, 44101, 48000]


@pytest.mark.parametrize("rate", RATES)
def test_resampler_stream_is_bit_identical(rate):
    samples = speechlike(0.7, rate)
    resampler = Resampler(rate, 16000)
    whole = resampler.resample(samples)
    assert len(whole) == -(-len(samples) * 16000 // rate)
    for largest in (1, 5000):
        clip = samples[:1500] if largest == 1 else samples
        state, parts = resampler.init_state(), []
        for piece in random_splits(clip, np.random.default_rng(rate), largest):
            out, state = resampler.step(piece, state)
            parts.append(out)
        parts.append(resampler.step(clip[:0], state, finished=True)[0])
        assert np.array_equal(np.concatenate(parts), resampler.resample(clip))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("hertz", [60, 1000, 3200])
def test_resampler_keeps_tones(rate, hertz):
    tone = np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)
    out = Resampler(rate, 16000).resample(tone)
    ideal = np.sin(2 * np.pi * hertz * np.arange(len(out)) / 16000)
    assert np.abs(out - ideal)[200:-200].max() < 1e-4


@pytest.mark.parametrize("rate", [24000, 44100, 48000])
def test_resampler_removes_what_would_alias(rate):
    tone = np.sin(2 * np.pi * 9500 * np.arange(rate) / rate).astype(np.float32)
    out = Resampler(rate, 16000).resample(tone)
    assert 20 * np.log10(np.sqrt(np.mean(out[500:-500] ** 2)) / np.sqrt(0.5)) < -80


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_resampler_agrees_with_soxr_on_a_chirp(rate):
    soxr = pytest.importorskip("soxr")
    t = np.arange(2 * rate) / rate
    highest = 0.8 * min(rate / 2, 8000)  # Hz, reached after two seconds
    chirp = (0.5 * np.sin(2 * np.pi * (50 * t + (highest - 50) / 4 * t**2))).astype(np.float32)
    ours, theirs = Resampler(rate, 16000).resample(chirp), soxr.resample(chirp, rate, 16000, quality="VHQ")
    size = min(len(ours), len(theirs))
    assert np.abs(ours[:size] - theirs[:size])[400:-400].max() < 1e-3


def test_resampler_reaches_the_mel_scale_unharmed():
    """48 kHz and 16 kHz recordings of one sound give the same features where there is sound."""
    high = speechlike(1.0, 48000) + 0.01 * np.random.default_rng(3).standard_normal(48000).astype("f4")
    soxr = pytest.importorskip("soxr")
    low = soxr.resample(high, 48000, 16000, quality="VHQ")
    ours = Resampler(48000, 16000).resample(high)
    assert np.abs(fbank(ours)[2:-2, :70] - fbank(low)[2:-2, :70]).max() < 0.05


@pytest.mark.parametrize("rate", [0, -8000, 999, 10**7, 16000.5, float("nan")])
def test_resampler_refuses_impossible_rates(rate):
    with pytest.raises(AudioError, match="sample rate"):
        Resampler(rate, 16000)


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_load_audio_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, speechlike(0.5, 16000), 16000)
    samples = load_audio(path)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - 8000) <= 2400  # mp3 pads


def test_load_audio_averages_channels_and_resamples(tmp_path):
    left, right = speechlike(0.5, 44100), speechlike(0.5, 44100, seed=1)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], 1), 44100, subtype="FLOAT")
    expected = Resampler(44100, 16000).resample((left + right) / 2)
    np.testing.assert_allclose(load_audio(tmp_path / "s.wav"), expected, atol=1e-6)


def test_write_audio_clips(tmp_path):
    write_audio(tmp_path / "deep" / "o.wav", np.array([0.0, 2.0, -2.0]))
    assert np.abs(load_audio(tmp_path / "deep" / "o.wav")).max() <= 1.0


def _nan(path):
    wave = speechlike(0.2)
    wave[100] = np.nan
    soundfile.write(path, wave, 16000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text("Hola, esto no es sonido.\n" * 50), "cannot be read as audio"),
        (lambda p: p.mkdir(), "directory"),
        (lambda p: soundfile.write(p, np.zeros(0, "f4"), 16000), "no samples"),
        (_nan, "NaN or infinite samples, the first at position 100"),
    ],
    ids=["missing", "empty", "text", "directory", "no samples", "nan"],
)
def test_load_audio_errors_are_one_line(tmp_path, make, message):
    path = tmp_path / "bad.wav"
    make(path)
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(path)
    assert "\n" not in str(caught.value) and isinstance(caught.value, EchoStreamError)


# -------------------------------------------------------------------------------------------------------- CMVN


def test_cmvn_round_trip(tmp_path):
    features = fbank(speechlike(2.0))
    cmvn = GlobalCMVN.estimate([features[:50], features[50:]])
    normal = cmvn.apply(features)
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(normal.std(0), 1, atol=1e-3)
    cmvn.save(tmp_path / "gcmvn.npz")
    assert np.array_equal(GlobalCMVN.load(tmp_path / "gcmvn.npz").apply(features), normal)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "does not exist"),
        ("text", "not a npz archive"),
        ({"mean": np.zeros(80)}, "lacks"),
        ({"mean": np.zeros(40), "std": np.ones(40)}, "not 80"),
        ({"mean": np.full(80, np.nan), "std": np.ones(80)}, "NaN"),
        ({"mean": np.array([{"run": "me"}]), "std": np.ones(80)}, "holds object, no numbers"),
    ],
    ids=["missing", "text", "key", "width", "nan", "pickle"],
)
def test_cmvn_errors(tmp_path, arrays, message):
    path = tmp_path / "gcmvn.npz"
    if arrays == "text":
        path.write_text("mean std")
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(ManifestError, match=message) as caught:
        GlobalCMVN.load(path)
    assert "\n" not in str(caught.value)


def test_whisper_features_are_whispers_own_behind_20_ms_of_silence():
    extractor = pytest.importorskip("faster_whisper.feature_extractor").FeatureExtractor()
    samples = speechlike(2.0)
    samples *= np.float32(10**0.5 / np.abs(samples).max())  # so loud that Whisper's floor lies above ours
    theirs = extractor(np.concatenate([np.zeros(320, np.float32), samples]), padding=0)
    theirs = theirs[:80].T[1:]
    ours = FEATURES["whisper"].cmvn.apply(FEATURES["whisper"].extract(samples))
    floor = theirs.min()
    count = len(ours)
    assert count == (len(samples) - 40) // 160 + 1
    assert np.abs(np.maximum(ours, floor) - theirs[:count]).max() < 1e-3
    silence = FEATURES["whisper"].cmvn.apply(FEATURES["whisper"].extract(np.zeros(4000)))
    assert np.allclose(silence, WHISPER_SILENCE, atol=1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_features_do_not_see_the_future(name):
    samples = speechlike(1.0)
    extractor = FEATURES[name]
    whole = extractor.extract(samples)
    for cut in (399, 1000, 7777):
        part = extractor.extract(samples[:cut])
        assert len(part) == extractor.num_frames(cut)
        assert np.array_equal(part, whole[: len(part)])
        louder = np.concatenate([samples[:cut], 10 * samples[cut:]])
        assert np.array_equal(extractor.extract(louder)[: len(part)], part)
