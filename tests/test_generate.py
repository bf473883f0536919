"""fairseq-generate: what it writes, and that beam search and greedy decoding agree where they must."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq")

from echostream import plugin
from echostream.constants import BLANK
from echostream.data.manifest import read_manifest
from echostream.errors import CheckpointError, ConfigError
from echostream.models.decoders.unit_decoder import greedy_units
from tests.training_data import NUM_UNITS, make_corpus, tiny_flags

plugin.register_with_fairseq()


def fairseq(tool: str, arguments: list[str]) -> None:
    """fairseq-train or fairseq-generate in this process."""
    import importlib

    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.logging import metrics

    metrics.reset()
    parser = options.get_training_parser() if tool == "train" else options.get_generation_parser()
    args = options.parse_args_and_arch(parser, arguments)
    importlib.import_module(f"fairseq_cli.{tool}").main(convert_namespace_to_omegaconf(args))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """(data directory, checkpoint) of a model that has learned its few training sentences' beginnings."""
    folder = tmp_path_factory.mktemp("generate")
    data = make_corpus(folder / "data", train=6, dev=5)
    options = dict(max_update=30, disable_validation=True, join_probability=0.0, dropout=0.0, unit_weight=1.0)
    fairseq("train", tiny_flags(data, folder / "run", **options))
    checkpoint = folder / "run/checkpoint_last.pt"
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["unit_decoder.output.bias"][BLANK] -= 8  # so little training leaves it silent
    torch.nn.init.normal_(content["model"]["unit_decoder.tokens.weight"])
    torch.save(content, checkpoint)
    return data, checkpoint


def generate(trained: tuple[Path, Path], results: Path, *flags: str, data: Path | None = None, subset: str = "dev"):
    known, checkpoint = trained
    fairseq("generate", [
        str(data or known), "--task", "echostream_s2st", "--path", str(checkpoint), "--gen-subset", subset, "--cpu",
        "--results-path", str(results), "--max-len-b", "12", "--post-process", "sentencepiece", "--num-workers", "0",
        *flags,
    ])  # fmt: skip
    return [json.loads(line) for line in (results / f"generate-{subset}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("subset", ["dev", "train"])
def test_outputs(trained, tmp_path, subset):
    rows = generate(trained, tmp_path, "--beam", "3", "--batch-size", "2", subset=subset)
    manifest = {u.id: u for u in read_manifest(trained[0] / f"{subset}.tsv")}
    assert sorted(row["id"] for row in rows) == sorted(manifest)  # every utterance once, a last short batch included
    for row in rows:
        utterance = manifest[row["id"]]
        assert (row["asr_ref"], row["mt_ref"]) == (utterance.src_text, utterance.tgt_text)
        assert row["units_ref"] == utterance.units.tolist() and row["audio"] == utterance.audio
        assert all(isinstance(row[name], str) for name in ("asr", "st", "mt"))
        assert all(0 <= unit < NUM_UNITS for unit in row["units"]) and "wav" not in row
    text = (tmp_path / f"generate-{subset}.txt").read_text("utf-8")
    for mark in ("S-0\t", "T-0\t", "H-0\t", "D-0\t", f"Generate {subset} with beam=3"):
        assert mark in text
    assert f"S-0\t{next(iter(manifest.values())).src_text}" in text


def test_beam_of_one_is_greedy_and_batches_do_not_matter(trained, tmp_path):
    from fairseq import checkpoint_utils

    alone = generate(trained, tmp_path / "alone", "--beam", "1", "--batch-size", "1")
    together = generate(trained, tmp_path / "together", "--beam", "1")
    texts = {row["id"]: row["mt"] for row in alone}
    assert texts == {row["id"]: row["mt"] for row in together}
    overrides = {"data": str(trained[0])}
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(trained[1])], overrides)
    task.load_dataset("dev", task_cfg=task.cfg)
    data = task.dataset("dev")
    sample = data.collater([data[i] for i in range(len(data))])
    model.eval()
    with torch.no_grad():
        x, lengths = model.encoder(sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"])
        tokens, hidden, counts = model.mt_decoder.greedy(x, lengths, 12)
        scores = model.unit_decoder(hidden, counts, x, lengths, tokens=tokens)
        units, sizes, _ = greedy_units(scores, counts * model.config.ctc_upsample_ratio)
    # With --max-len-b 12 a hypothesis has 12 tokens at most, cut or not, as the greedy one has.
    ids = [utterance.id for utterance in data.utterances]
    assert texts == {name: task.target_text(row) for name, row in zip(ids, tokens.tolist())}
    said = {name: row[:size].tolist() for name, row, size in zip(ids, units, sizes.tolist())}
    assert said == {row["id"]: row["units"] for row in together} and any(said.values())


def test_the_text_decoder_on_true_transcripts(trained, tmp_path):
    """--source text: what it reads are the manifest's texts; beam 1 is the greedy search over exactly these."""
    from fairseq import checkpoint_utils

    data = trained[0]
    text = dict(source="text", asr_weight=0.0, st_weight=0.0, mt_weight=0.5, unit_weight=0.5, dropout=0.0, lr=0.01)
    fairseq("train", tiny_flags(data, tmp_path / "run", max_update=40, disable_validation=True, **text))
    checkpoint = tmp_path / "run/checkpoint_last.pt"
    rows = generate((data, checkpoint), tmp_path / "out", "--source", "text", "--beam", "1")
    manifest = {u.id: u for u in read_manifest(data / "dev.tsv")}
    assert sorted(row["id"] for row in rows) == sorted(manifest)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], {"data": str(data)})
    model.eval()
    for row in rows:
        utterance = manifest[row["id"]]
        assert row["audio"] == utterance.audio and not {"asr", "st"} & set(row)
        assert (row["asr_ref"], row["mt_ref"]) == (utterance.src_text, utterance.tgt_text)
        source = torch.tensor([task.config.source.encode(utterance.src_text)])
        with torch.no_grad():
            tokens, _, _ = model.mt_decoder.greedy(*model.encoder(source, torch.tensor([source.shape[1]])), 12)
        assert row["mt"] == task.target_text(tokens[0].tolist())


def test_prefix_is_kept(trained, tmp_path):
    rows = generate(trained, tmp_path, "--beam", "2", "--prefix-size", "2")
    for row in rows:
        assert row["mt"][:2] == row["mt_ref"][:2]


def test_vocoder_speaks(trained, tmp_path):
    from echostream.audio.io import load_audio
    from echostream.models.decoders.vocoder import CodeHiFiGAN, VocoderConfig
    from echostream.models.decoders.vocoder_checkpoint import save_vocoder

    torch.manual_seed(0)
    voice = VocoderConfig.preset(
        "small", num_embeddings=NUM_UNITS, upsample_initial_channel=16, upsample_channels=[16, 8, 8, 4],
        embedding_dim=16, dur_predictor_params=dict(
            encoder_embed_dim=16, var_pred_hidden_dim=16, var_pred_kernel_size=3, var_pred_dropout=0.2
        ),
    )  # fmt: skip
    save_vocoder(CodeHiFiGAN(voice), tmp_path / "vocoder.pt", tmp_path / "vocoder.json")
    rows = generate(trained, tmp_path / "out", "--beam", "1", "--vocoder-dir", str(tmp_path))
    assert len(rows) == 5
    for row in rows:
        assert row["wav"] == f"wav/{row['id']}.wav" and (tmp_path / "out" / row["wav"]).is_file()
        if row["units"]:
            assert len(load_audio(tmp_path / "out" / row["wav"])) >= 320
    with pytest.raises(ConfigError, match="a vocoder needs both"):
        generate(trained, tmp_path / "out2", "--vocoder", str(tmp_path / "vocoder.pt"))


def test_other_vocabulary_and_broken_checkpoint(trained, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(trained[0], other)
    with (other / "dict.tgt.txt").open("a", encoding="utf-8") as file:
        file.write("further 1\n")
    with pytest.raises(CheckpointError, match="was trained with .* symbols, the target dictionary has"):
        generate(trained, tmp_path / "out", data=other)
