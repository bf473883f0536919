"""Disguises of training speech: what each of them does to the samples, the option that chooses them, their price."""

import time

import numpy as np
import pytest
import scipy.signal

from echostream.audio.io import load_audio
from echostream.data.augmentation import SpeechAugment, channel, noise, room, voice
from echostream.data.augmentation.speech import DEFAULTS, LIMITS, PRESETS
from echostream.data.config import DataConfig
from echostream.data.dataset import Augmentation, SpeechToSpeechDataset
from echostream.data.joining import JoinPolicy
from echostream.errors import ConfigError
from tests.training_data import make_corpus

RATE = 16_000
SINGLE = [
    "formant",
    "reverb",
    "noise=white",
    "noise=pink",
    "noise=brown",
    "noise=babble",
    "hum",
    "band=lowpass",
    "band=highpass",
    "band=rate",
    "band=telephone",
    "codec=mulaw",
    "codec=alaw",
    "codec=pcm8",
    "clip",
    "gain",
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def speech(seconds: float = 3.0, f0: float = 120.0, formant: float = 800.0) -> np.ndarray:
    """A buzz of ``f0`` with one formant, in syllables of a quarter of a second: float32 [N], peak 0.5."""
    count = int(seconds * RATE)
    source = np.zeros(count)
    source[np.unique((np.arange(0, seconds, 1 / f0) * RATE).astype(int))] = 1.0
    radius = np.exp(-np.pi * 150 / RATE)
    out = scipy.signal.lfilter([1.0], [1, -2 * radius * np.cos(2 * np.pi * formant / RATE), radius**2], source)
    out *= 0.55 + 0.45 * np.sin(2 * np.pi * 4 * np.arange(count) / RATE)
    return (0.5 * out / np.abs(out).max()).astype(np.float32)


def white(seconds: float = 3.0) -> np.ndarray:
    return 0.1 * rng(9).standard_normal(int(seconds * RATE), dtype=np.float32)


def voices() -> list[np.ndarray]:
    return [speech(2.0, f0, formant) for f0, formant in ((100, 600), (150, 900), (210, 1100), (90, 700))]


def run(augment: SpeechAugment, samples: np.ndarray, seed: int = 0) -> np.ndarray:
    generator = rng(seed)
    return augment.record(augment.change_voice(samples, generator), generator, voices)


def option(name: str) -> str:
    """An option that always applies ``name``."""
    return name if "=" in name else f"{name}=1"


def power_db(samples: np.ndarray, low: float, high: float) -> float:
    """Power between two frequencies."""
    hertz, density = scipy.signal.welch(samples, RATE, nperseg=1024)
    return 10 * np.log10(density[(hertz >= low) & (hertz <= high)].mean() + 1e-20)


def pitch(samples: np.ndarray) -> float:
    """Fundamental frequency by autocorrelation, between 70 and 300 Hz."""
    likeness = scipy.signal.fftconvolve(samples, samples[::-1])[len(samples) - 1 :]
    lags = np.arange(RATE // 300, RATE // 70)
    return RATE / lags[likeness[lags].argmax()]


def peak_hertz(samples: np.ndarray) -> float:
    """Where the spectrum, smoothed over 300 Hz, has its maximum."""
    hertz, density = scipy.signal.welch(samples, RATE, nperseg=2048)
    smooth = np.convolve(density, np.hanning(39), mode="same")
    return float(hertz[smooth.argmax()])


# --- the option


def test_off_changes_nothing_and_draws_nothing():
    assert all(SpeechAugment.parse(text) is None for text in ("", "none", "people,none", "noise=0,reverb=0"))
    samples, generator = speech(), rng()
    augment = SpeechAugment()
    assert augment.record(augment.change_voice(samples, generator), generator) is samples
    assert generator.random() == rng().random()


def test_option_is_read():
    augment = SpeechAugment.parse("Noise=0.5:5..30:pink+babble, gain=-20..-3,band=telephone")
    assert (augment.noise.probability, augment.noise.low, augment.noise.high) == (0.5, 5.0, 30.0)
    assert augment.noise.kinds == ("pink", "babble") and augment.reverb is None
    assert (augment.gain.probability, augment.gain.low, augment.gain.high) == (1.0, -20.0, -3.0)
    assert augment.band.kinds == ("telephone",)
    people = SpeechAugment.parse("people")
    assert all(getattr(people, name) is not None for name in DEFAULTS)
    changed = SpeechAugment.parse("people,noise=0,codec=1:alaw")
    assert changed.noise is None and changed.codec.kinds == ("alaw",) and changed.reverb == people.reverb
    assert SpeechAugment.parse("reverb=1").reverb == DEFAULTS["reverb"]
    assert set(LIMITS) <= set(DEFAULTS) and "people" in PRESETS


@pytest.mark.parametrize(
    "text, message",
    [
        ("echo=1", "augment-speech 'echo=1' is neither one of none, people nor name=value with a name of formant"),
        ("noise", "augment-speech 'noise' is neither"),
        ("noise=2", "noise has the probability 2; it must lie in"),
        ("noise=nan", "noise is 'nan'; it must be a probability, a range LOW..HIGH, kinds of white, pink"),
        ("noise=0.5:green", "noise is 'green'"),
        ("clip=hard", "clip is 'hard'; it must be a probability, a range LOW..HIGH$"),
        ("noise=30..5", r"noise has the range 30\.\.5; it must be LOW\.\.HIGH, dB"),
        ("reverb=0.3:0..9", r"seconds of RT60, within 0\.05\.\.3"),
        ("gain=-35..x", "gain has the range -35..x"),
        ("band=0.5:300..3400", "band has no range, but 300..3400 was given"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        SpeechAugment.parse(text)
    assert "\n" not in str(error.value)


# --- all of them


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("count", [1, 399, 5_001, 48_000])
def test_length_kind_and_range_of_values_stay(name, count):
    samples = speech()[:count]
    before = samples.copy()
    out = run(SpeechAugment.parse(option(name)), samples)
    assert len(out) == count and out.dtype == np.float32 and np.isfinite(out).all()
    assert (samples == before).all()
    assert np.abs(out).max() < 8


@pytest.mark.parametrize("name", SINGLE)
def test_silence_stays_silent(name):
    out = run(SpeechAugment.parse(option(name)), np.zeros(20_000, dtype=np.float32))
    assert len(out) == 20_000 and (out == 0).all()


@pytest.mark.parametrize("name", [*SINGLE, "people"])
def test_generator_alone_decides(name):
    augment = SpeechAugment.parse("people" if name == "people" else option(name))
    results = [run(augment, speech(), seed) for seed in (3, 3, 4, 5)]
    assert (results[0] == results[1]).all()
    if name != "band=telephone":  # there is but one of these
        assert any((results[0] != other).any() for other in results[2:])


def test_probability_is_the_share_of_items():
    augment = SpeechAugment.parse("gain=0.3:-40..-39")
    samples = speech(0.1)
    changed = sum(bool((run(augment, samples, seed) != samples).any()) for seed in range(400))
    assert 0.22 < changed / 400 < 0.38


def test_preset_moves_nothing_in_time():
    samples = np.zeros(32_000, dtype=np.float32)
    samples[16_000:24_000] = speech(0.5)
    augment = SpeechAugment.parse("people,noise=0,hum=0,gain=0")
    for seed in range(20):
        out = run(augment, samples, seed)
        loud = np.flatnonzero(np.abs(out) > 0.1 * np.abs(out).max())
        assert abs(int(loud[0]) - int(np.flatnonzero(np.abs(samples) > 0.05)[0])) < 320  # 20 ms


# --- voice


@pytest.mark.parametrize("factor", [0.85, 0.93, 1.1, 1.2])
def test_formant_shift_moves_formants_and_pitch_but_not_time(factor):
    samples = speech(3.0, f0=120.0, formant=1000.0)
    out = voice.shift_formants(samples, factor)
    assert len(out) == len(samples)
    assert pitch(out) == pytest.approx(120 * factor, rel=0.03)
    assert peak_hertz(out) == pytest.approx(peak_hertz(samples) * factor, rel=0.12)
    assert np.sign(peak_hertz(out) - peak_hertz(samples)) == np.sign(factor - 1)
    # the syllables stand where they stood
    envelopes = [np.sqrt(np.convolve(x**2, np.ones(800) / 800, mode="same")) for x in (samples, out)]
    assert np.corrcoef(*envelopes)[0, 1] > 0.95


@pytest.mark.parametrize("pace", [0.8, 1.25])
def test_stretch_keeps_a_tone_whole(pace):
    samples = np.sin(2 * np.pi * 220 * np.arange(RATE) / RATE).astype(np.float32)
    out = voice.stretch(samples, round(RATE / pace))[1_000:-1_000]
    hertz, density = scipy.signal.periodogram(out, RATE, window="hann")
    near = (hertz > 205) & (hertz < 235)
    assert density[near].sum() / density.sum() > 0.99


# --- room


@pytest.mark.parametrize("rt60", [0.15, 0.4, 0.7])
def test_room_decays_as_asked(rt60):
    found = []
    for seed in range(8):
        tail = room.room_tail(rt60, rng(seed)).astype(np.float64)
        assert tail[0] == 0 and np.sum(tail**2) == pytest.approx(1, rel=1e-3)
        left = 10 * np.log10(np.cumsum(tail[::-1] ** 2)[::-1])  # Schroeder's integral
        times = np.flatnonzero((left < -8) & (left > -28)) / RATE
        slope = np.polyfit(times, left[(left < -8) & (left > -28)], 1)[0]
        found.append(-60 / slope)
    assert np.mean(found) == pytest.approx(rt60, rel=0.15)


def test_reverb_rings_on_behind_the_direct_sound():
    click = np.zeros(RATE, dtype=np.float32)
    click[4_000] = 0.5
    out = room.add_reverb(click, room.room_tail(0.4, rng()), direct_db=6.0)
    assert np.abs(out[:4_000]).max() < 1e-5 and np.abs(out).argmax() == 4_000
    direct, rest = out[4_000] ** 2, np.sum(out[4_001:] ** 2)
    assert 10 * np.log10(direct / rest) == pytest.approx(6.0, abs=0.1)
    assert np.sum(out**2) == pytest.approx(np.sum(click**2), rel=1e-3)


def test_pool_of_rooms_is_made_once_and_spans_the_range():
    pool = room.rooms(0.1, 0.7)
    assert pool is room.rooms(0.1, 0.7) and len(pool) == room.POOL
    assert [len(pool[0]), len(pool[-1])] == [1_600, 11_200]


# --- noise


@pytest.mark.parametrize("kind", ["white", "pink", "brown", "babble"])
@pytest.mark.parametrize("snr", [-5.0, 10.0, 25.0])
def test_noise_has_the_ratio_asked_for(kind, snr):
    samples = white()
    out = run(SpeechAugment.parse(f"noise=1:{snr}..{snr}:{kind}"), samples)
    found = 10 * np.log10(np.mean(samples**2) / np.mean((out - samples) ** 2))
    assert found == pytest.approx(snr, abs=0.5)


def test_ratio_counts_no_pauses():
    samples = white(1.0)
    paused = np.concatenate([samples, np.zeros(3 * RATE, dtype=np.float32)])
    assert noise.speech_power(paused) == pytest.approx(noise.speech_power(samples))
    assert noise.speech_power(samples) == pytest.approx(np.mean(samples**2), rel=1e-3)


@pytest.mark.parametrize("colour, slope", [("white", 0.0), ("pink", -3.0), ("brown", -6.0)])
def test_noise_falls_by_octave(colour, slope):
    out = noise.coloured_noise(20 * RATE, colour, rng())
    octaves = [power_db(out, low, 2 * low) for low in (250, 500, 1000, 2000)]
    np.testing.assert_allclose(np.diff(octaves), slope, atol=0.7)


def test_babble_is_made_of_the_voices():
    others = voices()
    out = noise.babble(5 * RATE, others, rng())
    assert power_db(out, 300, 1500) - power_db(out, 4000, 7000) > 10  # as speech, and unlike white noise
    one = noise.babble(RATE, [others[0], np.zeros(0, np.float32), np.zeros(100, np.float32)], rng(1))
    assert np.isfinite(one).all()
    lonely = SpeechAugment.parse("noise=babble")
    with pytest.raises(ConfigError, match="babble alone needs recordings"):
        lonely.record(speech(), rng())
    either = SpeechAugment.parse("noise=babble+white")
    assert all((either.record(speech(), rng(seed)) != speech()).any() for seed in range(4))


@pytest.mark.parametrize("mains", [50.0, 60.0])
def test_hum_is_the_mains_and_its_harmonics(mains):
    hum = noise.mains_hum(8 * RATE, mains, rng())
    hertz, power = scipy.signal.periodogram(hum, RATE, window="hann")
    lines = np.abs(hertz - mains * np.maximum(np.round(hertz / mains), 1)) < 2
    assert power[lines].sum() / power.sum() > 0.99
    assert hertz[power > 1e-3 * power.max()].max() > 3 * mains


def test_hum_has_the_ratio_asked_for():
    samples = white()
    out = run(SpeechAugment.parse("hum=1:20..20"), samples)
    assert 10 * np.log10(np.mean(samples**2) / np.mean((out - samples) ** 2)) == pytest.approx(20, abs=0.5)


# --- line


def test_telephone_band():
    samples = white()
    out = channel.random_band(samples, "telephone", rng())
    assert power_db(out, 500, 3000) == pytest.approx(power_db(samples, 500, 3000), abs=0.5)
    assert power_db(out, 20, 150) < power_db(samples, 20, 150) - 20
    assert power_db(out, 4500, 8000) < power_db(samples, 4500, 8000) - 15


@pytest.mark.parametrize("kind", ["lowpass", "highpass", "rate"])
def test_energy_falls_beyond_the_edge(kind):
    samples = white()
    for seed in range(6):
        out = channel.random_band(samples, kind, rng(seed))
        assert power_db(out, 1000, 2000) == pytest.approx(power_db(samples, 1000, 2000), abs=0.7)
        beyond = (5, 25) if kind == "highpass" else (7600, 8000)
        assert power_db(out, *beyond) < power_db(samples, *beyond) - 3


def test_low_rate_keeps_time_and_cuts_at_half_of_it():
    samples = white()
    out = channel.from_rate(channel.at_rate(samples, 11_025), 11_025, len(samples))
    assert power_db(out, 5800, 8000) < power_db(samples, 5800, 8000) - 40
    assert power_db(out, 100, 4500) == pytest.approx(power_db(samples, 100, 4500), abs=0.3)
    below = scipy.signal.sosfiltfilt(scipy.signal.butter(8, 4000, fs=RATE, output="sos"), np.stack([samples, out]))
    np.testing.assert_allclose(below[0, 500:-500], below[1, 500:-500], atol=0.01)  # not shifted by a sample


@pytest.mark.parametrize("codec", channel.CODECS)
def test_codecs_keep_256_values(codec):
    samples = np.linspace(-1.2, 1.2, 300_000, dtype=np.float32)
    out = channel.quantise(samples, codec)
    assert len(np.unique(out)) == 256 and np.abs(out).max() <= 1
    inside = np.abs(samples) < 0.99
    error = np.abs(out - samples)[inside]
    assert error.max() < (0.004 if codec == "pcm8" else 0.025)
    quiet = np.abs(samples) < 0.01
    # The laws spend their values on quiet samples, where linear steps are as big as the samples.
    assert (np.abs(out - samples)[quiet].max() < 0.001) == (codec != "pcm8")


def test_laws_are_those_of_g711():
    # Decoded amplitudes of G.711 for a half-scale and a faint sample, within a step of its segments.
    for codec in ("mulaw", "alaw"):
        assert channel.quantise(np.array([0.5], np.float32), codec)[0] == pytest.approx(0.5, rel=0.03)
        assert channel.quantise(np.array([-0.5], np.float32), codec)[0] == pytest.approx(-0.5, rel=0.03)
        assert abs(channel.quantise(np.array([1e-4], np.float32), codec)[0]) < 1e-3


@pytest.mark.parametrize("codec", ["mulaw", "alaw"])
def test_telephone_codecs_cut_at_four_kilohertz(codec):
    samples = white()
    out = channel.random_codec(samples, codec, rng())
    assert power_db(out, 4500, 8000) < power_db(samples, 4500, 8000) - 30
    assert power_db(out, 300, 3000) == pytest.approx(power_db(samples, 300, 3000), abs=0.5)
    assert np.corrcoef(out, samples)[0, 1] > 0.6


def test_eight_bits_leave_their_noise_at_any_level():
    samples = 0.001 * speech()  # -66 dBFS: the codec is driven to a level of its own
    for seed in range(4):
        out = channel.random_codec(samples, "pcm8", rng(seed))
        error = 10 * np.log10(np.mean(samples**2) / np.mean((out - samples) ** 2))
        assert 3 < error < 45 and np.abs(out).max() == pytest.approx(np.abs(samples).max(), rel=0.1)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2])
def test_clipping_cuts_its_share(share):
    samples = white()
    out = channel.clip_share(samples, share)
    limit = np.abs(out).max()
    assert np.mean(np.abs(out) == limit) == pytest.approx(share, rel=0.01)
    kept = np.abs(samples) < limit
    assert (out[kept] == samples[kept]).all()


@pytest.mark.parametrize("level", [-35.0, -20.0, 0.0])
def test_gain_sets_the_peak(level):
    for scale in (0.001, 1.0, 3.0):
        out = run(SpeechAugment.parse(f"gain={level}..{level}"), speech() * np.float32(scale))
        assert 20 * np.log10(np.abs(out).max()) == pytest.approx(level, abs=0.01)


def test_levels_are_spread_evenly():
    augment = SpeechAugment.parse("people")
    levels = [20 * np.log10(np.abs(run(augment, speech(0.3), seed)).max()) for seed in range(150)]
    assert -35 <= min(levels) < -32 and -3 < max(levels) <= 0.01
    assert -21 < np.mean(levels) < -14


# --- in the dataset


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def dataset(corpus, seed=1, **augmentation) -> SpeechToSpeechDataset:
    return SpeechToSpeechDataset(corpus / "train.tsv", DataConfig.load(corpus), Augmentation(**augmentation), seed)


@pytest.mark.parametrize("join", [None, JoinPolicy(max_frames=600)], ids=["single", "joined"])
def test_items_keep_their_planned_lengths_and_depend_on_seed_epoch_and_index(corpus, join):
    options = dict(join=join, speeds=(0.9, 1.1), speech=SpeechAugment.parse("people,noise=1"))
    first, again = dataset(corpus, **options), dataset(corpus, **options)
    _ = [first[i] for i in range(len(first))]
    first.set_epoch(2)
    again.set_epoch(2)
    for i in reversed(range(len(first))):
        source = again[i]["source"]
        assert len(source) == again.num_tokens(i) and np.isfinite(source).all()
    for i in range(len(first)):
        assert (first[i]["source"] == again[i]["source"]).all()
    other = dataset(corpus, seed=2, **options)
    other.set_epoch(2)
    assert first.items != other.items or any((first[i]["source"] != other[i]["source"]).any() for i in range(3))


def test_off_gives_the_same_features(corpus):
    plain = dataset(corpus)
    for off in (SpeechAugment.parse("none"), SpeechAugment()):
        items = dataset(corpus, speech=off)
        assert all((items[i]["source"] == plain[i]["source"]).all() for i in range(len(items)))


def test_babble_is_of_the_epoch(corpus):
    items = dataset(corpus, speech=SpeechAugment.parse("noise=babble"))
    first = items._babble_voices()
    assert first is items._babble_voices() and len(first) == len(items.utterances)
    recordings = [load_audio(corpus / u.audio) for u in items.utterances]
    assert all(any(len(a) == len(b) and (a == b).all() for b in recordings) for a in first)
    items.set_epoch(2)
    assert items._babble_voices() is not first


# --- what it costs


def test_preset_is_cheap():
    """At least 200 seconds of speech per second of one core's time: a guard with room for a busy machine; the preset
    is made for 600 (printed with ``pytest -s``)."""
    augment = SpeechAugment.parse("people")
    samples, others = speech(6.0), voices()
    for seed in range(30):  # filters, rooms and tables are made
        run(augment, samples, seed)
    begin = time.process_time()
    for seed in range(150):
        generator = rng(seed)
        augment.record(augment.change_voice(samples, generator), generator, lambda: others)
    rate = 150 * 6.0 / (time.process_time() - begin)
    print(f"\naugment-speech people: {rate:.0f} seconds of speech per second of one core")
    assert rate > 200
