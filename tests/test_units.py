"""Unit features, k-means, and reading other people's k-means files safely."""

from __future__ import annotations

import io
import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echostream.errors import CheckpointError, ConfigError, ManifestError
from echostream.units.dedup import deduplicate, expand
from echostream.units.features import MfccFeatures, build_features, whisper_mel_filters
from echostream.units.kmeans import KMeans, Projection, fit_kmeans, load_kmeans, nearest


def blobs(count: int = 8, each: int = 60, dim: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, dim)) * 20
    frames = (centres[:, None] + rng.normal(size=(count, each, dim))).reshape(-1, dim)
    return frames[rng.permutation(len(frames))].astype(np.float32), centres.astype(np.float32)


@given(st.lists(st.integers(0, 4), max_size=60))
@settings(max_examples=60, deadline=None)
def test_deduplicate_and_expand_are_inverse(units: list[int]) -> None:
    runs, durations = deduplicate(units)
    assert expand(runs, durations) == units
    assert all(a != b for a, b in itertools.pairwise(runs)) and all(d > 0 for d in durations)


def test_expand_refuses_unequal_lists() -> None:
    with pytest.raises(ManifestError, match="2 units with 1 durations"):
        expand([1, 2], [3])


def test_nearest_is_the_nearest() -> None:
    frames, centres = blobs()
    labels, distances = nearest(frames, centres)
    exact = ((frames[:, None] - centres[None]) ** 2).sum(-1)
    assert (labels == exact.argmin(1)).all()
    np.testing.assert_allclose(distances, exact.min(1), rtol=1e-2, atol=1e-2)


def test_kmeans_finds_the_clusters() -> None:
    frames, centres = blobs()
    found = fit_kmeans(frames, 8, steps=20, batch=200)
    assert sorted(nearest(centres, found)[0]) == list(range(8))
    assert np.sqrt(nearest(centres, found)[1]).max() < 1.5


def test_interrupted_fit_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    frames, _ = blobs(20, 40)
    whole = fit_kmeans(frames, 20, seed=3, steps=60, batch=100)

    def stop(steps: range):
        for step in steps:
            if step == 40:
                raise KeyboardInterrupt
            yield step

    state = tmp_path / "fit.npz"
    with pytest.raises(KeyboardInterrupt):
        fit_kmeans(frames, 20, seed=3, steps=60, batch=100, state=state, progress=stop)
    seen = []
    again = fit_kmeans(frames, 20, seed=3, steps=60, batch=100, state=state, progress=lambda s: seen.append(s) or s)
    assert seen[0].start == 25
    np.testing.assert_array_equal(whole, again)


def test_state_of_another_fit_is_not_taken_up(tmp_path: Path) -> None:
    frames, _ = blobs()
    state = tmp_path / "fit.npz"
    fit_kmeans(frames, 8, seed=1, steps=30, state=state)
    np.testing.assert_array_equal(
        fit_kmeans(frames, 8, seed=2, steps=30, state=state), fit_kmeans(frames, 8, seed=2, steps=30)
    )


def test_too_few_frames_for_the_units() -> None:
    with pytest.raises(ConfigError, match="10 frames are too few for 1000 units"):
        fit_kmeans(np.zeros((10, 4), np.float32), 1000)


def test_projection_takes_positions_out() -> None:
    rng = np.random.default_rng(0)
    clock = np.stack([np.sin(np.arange(100) / 9), np.cos(np.arange(100) / 9)], 1) * 5
    mix = rng.normal(size=(2, 12))
    recordings = [(rng.normal(size=(n, 12)) + clock[:n] @ mix).astype(np.float32) for n in rng.integers(60, 100, 200)]

    def position_share(projection: Projection) -> float:
        frames = np.stack([projection(r)[12:40] for r in recordings])
        return float((frames.mean(0) ** 2).mean() / (frames**2).mean())

    assert position_share(Projection.fit(recordings, 0)) > 0.5
    assert position_share(Projection.fit(recordings, 2)) < 0.02
    removed = Projection.fit(recordings, 2).remove
    np.testing.assert_allclose(removed @ removed.T, np.eye(2), atol=1e-5)


def test_save_and_load(tmp_path: Path) -> None:
    frames, _ = blobs()
    projection = Projection.fit([frames], 0)
    model = KMeans(fit_kmeans(projection(frames), 8, steps=20), projection, "mfcc")
    model.save(tmp_path / "kmeans.npz")
    loaded = load_kmeans(tmp_path / "kmeans.npz")
    assert (len(loaded), loaded.features) == (8, "mfcc")
    np.testing.assert_array_equal(loaded.units(frames), model.units(frames))
    with pytest.raises(ConfigError, match=r"\(480, 5\) do not fit centroids of width 6 \(fitted on mfcc\)"):
        loaded.units(frames[:, :5])


# --- joblib files ------------------------------------------------------------------------------------------------

CENTRES = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)


def sklearn_model():
    cluster = pytest.importorskip("sklearn.cluster")
    frames = np.repeat(CENTRES, 6, axis=0)
    return cluster.MiniBatchKMeans(10, init=CENTRES, n_init=1, random_state=np.random.RandomState(0)).fit(frames)


@pytest.mark.parametrize("compress", [0, 3], ids=["plain", "zlib"])
def test_joblib_centroids_are_read_without_scikit_learn(tmp_path: Path, compress: int) -> None:
    joblib = pytest.importorskip("joblib")
    model = sklearn_model()
    joblib.dump(model, tmp_path / "km.bin", compress=compress)
    loaded = load_kmeans(tmp_path / "km.bin")
    np.testing.assert_allclose(loaded.centroids, model.cluster_centers_, rtol=1e-6)
    np.testing.assert_array_equal(loaded.units(CENTRES), model.predict(CENTRES))


def test_plain_pickles_are_read_too(tmp_path: Path) -> None:
    model = sklearn_model()
    (tmp_path / "km.pkl").write_bytes(pickle.dumps(model))
    np.testing.assert_allclose(load_kmeans(tmp_path / "km.pkl").centroids, model.cluster_centers_, rtol=1e-6)


class Malicious:
    def __init__(self, call: tuple):
        self.call = call

    def __reduce__(self):
        return self.call


def attacks(marker: Path) -> dict[str, bytes]:
    touch = f"open({str(marker)!r}, 'w')"
    inside = {"cluster_centers_": CENTRES, "extra": Malicious((os.system, (f"touch {marker}",)))}
    return {
        "os.system": pickle.dumps(Malicious((os.system, (f"touch {marker}",)))),
        "eval": pickle.dumps(Malicious((eval, (touch,)))),
        "getattr": pickle.dumps(Malicious((getattr, (str, "format")))),
        "inside": pickle.dumps(inside),
        "old protocol": f"c__builtin__\neval\n(V{touch}\ntR.".encode(),
        "numpy's exec": f"cnumpy.testing._private.utils\nrunstring\n(V{touch}\n(dtR.".encode(),
    }


@pytest.mark.parametrize("name", list(attacks(Path("x"))))
def test_malicious_pickle_is_refused_and_never_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "km.bin").write_bytes(attacks(marker)[name])
    with pytest.raises(CheckpointError, match="km.bin is refused: it refers to") as error:
        load_kmeans(tmp_path / "km.bin")
    assert "\n" not in str(error.value) and not marker.exists()


def test_malicious_joblib_file_is_refused(tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")
    marker = tmp_path / "ran"
    joblib.dump({"a": CENTRES, "b": Malicious((os.system, (f"touch {marker}",)))}, tmp_path / "km.bin")
    with pytest.raises(CheckpointError, match="is refused"):
        load_kmeans(tmp_path / "km.bin")
    objects = np.array([Malicious((os.system, (f"touch {marker}",)))], dtype=object)
    joblib.dump(objects, tmp_path / "objects.bin")
    with pytest.raises(CheckpointError, match="refused"):
        load_kmeans(tmp_path / "objects.bin")
    assert not marker.exists()


def broken_files() -> dict[str, bytes]:
    joblib = pytest.importorskip("joblib")
    buffer = io.BytesIO()
    joblib.dump(sklearn_model(), buffer)
    whole = buffer.getvalue()
    return {
        "empty": b"",
        "text": b"not a k-means file",
        "cut": whole[: len(whole) // 2],
        "no centroids": pickle.dumps({"a": 1}),
        "zip": b"PK\x03\x04 nothing",
    }


@pytest.mark.parametrize("name", ["empty", "text", "cut", "no centroids", "zip"])
def test_broken_files_are_clear_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "km.bin"
    path.write_bytes(broken_files()[name])
    with pytest.raises(CheckpointError, match=r"k-means file .*km\.bin") as error:
        load_kmeans(path)
    assert "\n" not in str(error.value)


def test_cut_npz_is_a_clear_error(tmp_path: Path) -> None:
    KMeans(CENTRES, Projection.identity(4)).save(tmp_path / "k.npz")
    data = (tmp_path / "k.npz").read_bytes()
    (tmp_path / "k.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        load_kmeans(tmp_path / "k.npz")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_kmeans(tmp_path / "none.npz")


# --- features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [320, 401, 1600, 16000, 16319])
def test_mfcc_gives_fifty_vectors_a_second(samples: int) -> None:
    features = MfccFeatures()
    sound = np.random.default_rng(0).normal(size=samples).astype(np.float32) * 0.1
    (frames,) = features.extract([sound])
    assert frames.shape == (samples // 320, features.dim) and frames.dtype == np.float32
    assert np.isfinite(frames).all()


def test_mel_filters_are_whispers() -> None:
    extractor = pytest.importorskip("faster_whisper.feature_extractor")
    np.testing.assert_allclose(whisper_mel_filters(80), extractor.FeatureExtractor().mel_filters, atol=1e-6)


def test_unknown_features_and_missing_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'wav2vec' are not one of whisper, hubert, mfcc"):
        build_features("wav2vec")
    with pytest.raises(ConfigError, match="'hubert' need a model path"):
        build_features("hubert")


def test_directory_without_whisper(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    with pytest.raises(CheckpointError, match="holds no model.bin"):
        build_features("whisper", tmp_path)


def test_missing_hubert(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="HuBERT checkpoint .* does not exist"):
        build_features("hubert", tmp_path / "none.pt")


def tiny_hubert(path: Path) -> None:
    """A HuBERT checkpoint as fairseq writes them, two random layers of width 16."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("fairseq")
    from fairseq.data import Dictionary
    from fairseq.models.hubert import HubertConfig, HubertModel
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
    from omegaconf import OmegaConf

    model_config = HubertConfig(
        _name="hubert",
        label_rate=50,
        encoder_layers=2,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=32,
        encoder_attention_heads=2,
        final_dim=8,
        conv_pos=16,
        conv_pos_groups=4,
        conv_feature_layers="[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    )
    task_config = HubertPretrainingConfig(
        _name="hubert_pretraining", data="/nowhere", label_dir="/nowhere", labels=["km"], label_rate=50, normalize=True
    )
    labels = Dictionary()
    for unit in range(5):
        labels.add_symbol(str(unit))
    torch.manual_seed(0)
    model = HubertModel(model_config, task_config, [labels])
    config = OmegaConf.create({"model": vars(model_config), "task": vars(task_config), "common": {}})
    torch.save(
        {
            "args": None,
            "cfg": config,
            "model": model.state_dict(),
            "task_state": {"dictionaries": [labels]},
            "optimizer_history": [{"num_updates": 1, "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}],
            "extra_state": {},
        },
        path,
    )


def test_hubert_layers(tmp_path: Path) -> None:
    tiny_hubert(tmp_path / "hubert.pt")
    features = build_features("hubert", tmp_path / "hubert.pt", layer=2)
    assert (features.name, features.dim) == ("hubert-hubert-layer2", 16)
    rng = np.random.default_rng(0)
    sounds = [rng.normal(size=n).astype(np.float32) * 0.1 for n in (16000, 7777)]
    first, second = features.extract(sounds)
    assert first.shape == (50, 16) and second.shape == (24, 16) and np.isfinite(first).all()
    (other,) = build_features("hubert", tmp_path / "hubert.pt", layer=1).extract(sounds[:1])
    assert np.abs(other - first).max() > 1e-3
    with pytest.raises(ConfigError, match="layer 3 of hubert.pt: it has layers 1 to 2"):
        build_features("hubert", tmp_path / "hubert.pt", layer=3)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "hubert.pt").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut.pt cannot be loaded as HuBERT"):
        build_features("hubert", tmp_path / "cut.pt", layer=1)
