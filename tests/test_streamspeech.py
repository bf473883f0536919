"""A data directory in StreamSpeech's layout, with the paths of another machine, imported and trained on."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from echostream.audio.cmvn import GlobalCMVN
from echostream.audio.fbank import fbank
from echostream.audio.io import load_audio
from echostream.data.config import DataConfig
from echostream.data.corpus import streamspeech
from echostream.data.corpus.cli import main
from echostream.data.manifest import read_manifest
from echostream.data.source import load_features
from tests.training_data import NUM_UNITS, TINY_MODEL, make_corpus

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = "/data/somebody/cvss-c/fr-en"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return write_streamspeech(tmp_path)


def write_streamspeech(folder: Path) -> Path:
    """``fr-en`` in StreamSpeech's layout; returns its ``fbank2unit``.

    The target texts of ``dev`` are in the multitask table alone, cut into pieces; units are repeated; one row has no
    source text.
    """
    ours = make_corpus(folder / "ours")
    base = folder / "fr-en"
    data = base / "fbank2unit"
    data.mkdir(parents=True)
    archive = zipfile.ZipFile(base / "fbank80.zip", "w", zipfile.ZIP_STORED)
    header = "id\tsrc_audio\tsrc_n_frames\tsrc_text\ttgt_text\ttgt_audio\ttgt_n_frames"
    tables = {}
    with archive:
        for split in ("train", "dev"):
            tables[split] = []
            for row in read_manifest(ours / f"{split}.tsv"):
                array = io.BytesIO()
                np.save(array, fbank(load_audio(ours / row.audio)))
                info = zipfile.ZipInfo(f"{row.id}.npy")
                archive.writestr(info, array.getvalue())
                offset = info.header_offset + 30 + len(info.filename)
                tables[split].append((row, f"{ELSEWHERE}/fbank80.zip:{offset}:{len(array.getvalue())}"))
    sides = {"src": base / "src_unigram40", "tgt": base / "tgt_unigram40"}
    for side, folder in sides.items():
        folder.mkdir()
        shutil.copy(ours / f"spm.{side}.model", folder / "spm_unigram_fr.model")
        shutil.copy(ours / f"dict.{side}.txt", folder / "spm_unigram_fr.txt")
    target = DataConfig.load(ours).target.processor
    for split, rows in tables.items():
        lines = [header]
        for i, (row, audio) in enumerate(rows):
            units = np.repeat(row.units, 2)
            source = "" if i == 0 and split == "train" else row.src_text
            text = row.tgt_text if split == "train" else ""
            cells = [row.id, audio, row.n_frames, source, text, " ".join(map(str, units)), len(units)]
            lines.append("\t".join(map(str, cells)))
        (data / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        pieces = [f"{row.id}\t{' '.join(target.EncodeAsPieces(row.tgt_text))}" for row, _ in rows]
        (sides["tgt"] / f"{split}.tsv").write_text("\n".join(["id\ttgt_text", *pieces]) + "\n", encoding="utf-8")
    shutil.copy(ours / "gcmvn.npz", data / "gcmvn.npz")
    settings = {
        "global_cmvn": {"stats_npz_path": "/data/somebody/StreamSpeech/configs/fr-en/gcmvn.npz"}, "input_channels": 1,
        "input_feat_per_channel": 80, "transforms": {"*": ["global_cmvn"], "_train": ["global_cmvn", "specaugment"]},
        "specaugment": {"freq_mask_F": 27, "freq_mask_N": 1, "time_mask_N": 1, "time_mask_T": 100, "time_mask_p": 1.0,
                        "time_wrap_W": 5},
        "vocoder": {"checkpoint": "/data/somebody/g_00500000", "config": "/data/somebody/config.json"},
    }  # fmt: skip
    (data / "config_gcmvn.yaml").write_text(yaml.safe_dump(settings))
    sizes = {"decoder_layers": 1, "decoder_embed_dim": 32, "decoder_ffn_embed_dim": 64, "decoder_attention_heads": 2}

    def task(kind: str, side: str, weight: float) -> dict:
        folder = f"{ELSEWHERE}/{sides[side].name}"
        return {"decoder_type": kind, "dict": f"{folder}/spm_unigram_fr.txt", "data": folder, "loss_weight": weight,
                "rdrop_alpha": 0.0, "decoder_args": dict(sizes), "label_smoothing": 0.1}  # fmt: skip

    tasks = {"target_unigram": task("transformer", "tgt", 8.0), "source_unigram": task("ctc", "src", 4.0),
             "ctc_target_unigram": task("ctc", "tgt", 4.0)}  # fmt: skip
    (data / "config_mtl_asr_st_ctcst.yaml").write_text(yaml.safe_dump(tasks))
    return data


def test_import_and_two_updates(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "data"
    assert main(["import-streamspeech", str(theirs), "-o", str(out), "--num-units", str(NUM_UNITS)]) == 0
    printed = capsys.readouterr().out
    assert "train: 11 utterances; left out: 1 with no src_text" in printed and "dev: 4 utterances\n" in printed
    assert "not used: specaugment.time_wrap_W 5" in printed and "not used: vocoder" in printed
    config = DataConfig.load(out)
    assert (config.source_lang, config.target_lang, config.num_units) == ("fr", "en", NUM_UNITS)
    np.testing.assert_allclose(config.cmvn.mean, GlobalCMVN.load(tmp_path / "ours" / "gcmvn.npz").mean)
    for split in ("train", "dev"):
        before = {row.id: row for row in read_manifest(tmp_path / "ours" / f"{split}.tsv")}
        for row in read_manifest(out / f"{split}.tsv"):
            own = before[row.id]
            assert (row.src_text, row.tgt_text, row.n_frames) == (own.src_text, own.tgt_text, own.n_frames)
            assert row.units.tolist() == own.units.tolist()
            expected = fbank(load_audio(tmp_path / "ours" / own.audio))
            np.testing.assert_array_equal(load_features(config.root, row.audio), expected)
    flags = yaml.safe_load((out / "train.yaml").read_text())
    assert flags["mt-decoder-embed-dim"] == 32 and flags["label-smoothing"] == 0.1
    assert [flags[f"{name}-weight"] for name in ("asr", "st", "mt", "unit")] == [0.2353, 0.2353, 0.4706, 0.0588]
    assert flags["spec-augment"].startswith("freq_masks=1,freq_width=27,time_masks=1,time_width=100")

    pytest.importorskip("fairseq")
    model = [word for name, value in TINY_MODEL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "scripts/train.py", "--config", out / "train.yaml", "--save-dir", tmp_path / "run",
               "--arch", "echostream", "--optimizer", "adam", "--lr", "0.003", "--max-tokens", "400",
               "--max-update", "2", "--cpu", "--num-workers", "0", "--log-format", "simple", *model]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "run" / "checkpoint_last.pt").is_file(), done.stderr


def test_what_is_missing_is_named(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refusal(*options: str) -> str:
        assert main(["import-streamspeech", str(theirs), "-o", str(tmp_path / "out"), *options]) == 1
        return capsys.readouterr().err

    assert "where there are 5; say --num-units" in refusal("--num-units", "5")
    archive = theirs.parent / "fbank80.zip"
    archive.rename(tmp_path / "fbank80.zip")
    message = refusal()
    assert "fbank80.zip does not exist" in message and "--look-in" in message
    assert main(["import-streamspeech", str(theirs), "-o", str(tmp_path / "out"), "--look-in", str(tmp_path)]) == 0
    (theirs / "config_mtl_asr_st_ctcst.yaml").unlink()
    assert "config_mtl_asr_st_ctcst.yaml (with the key target_unigram) is in none of" in refusal()


def test_their_flags_are_explained() -> None:
    command = [
        "data", "--user-dir", "echostream", "--task", "speech_to_speech_ctc", "--target-is-code", "--arch=streamspeech",
        "--criterion", "speech_to_unit_2pass_ctc_asr_st", "--ctc-upsample-rate", "25", "--attn-type", "espnet",
        "--lr", "0.001",
    ]  # fmt: skip
    lines = streamspeech.refuse_flags(command).splitlines()
    assert "import-streamspeech" in lines[0] and "  --ctc-upsample-rate: --ctc-upsample-ratio" in lines
    assert any(line.startswith("  --attn-type: not here") for line in lines)
    assert not any("--lr" in line for line in lines)
    assert streamspeech.refuse_flags(["data", "--task", "echostream_s2st", "--arch", "echostream_small"]) is None
    page = (ROOT / "docs" / "from-streamspeech.md").read_text()
    for flag, text in (streamspeech.OURS | streamspeech.FLAGS).items():
        assert f"| `{flag}` | {text} |" in page
