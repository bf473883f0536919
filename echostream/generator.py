"""Offline decoding under fairseq-generate: source text, both translations, units and waveforms of each utterance.

The MT decoder's beam search is fairseq's own ``SequenceGenerator``, over an adapter that steps the decoder's state.
With ``--results-path`` everything is written to ``generate-<subset>.jsonl`` there, one object an utterance:

``id``, ``audio``; ``asr``, ``st``, ``mt`` (texts) and ``units`` (numbers): the hypotheses; ``asr_ref``, ``mt_ref``,
``units_ref``: the manifest's; ``wav``: the spoken translation, relative to the results path, when a vocoder is given.
A model trained with ``--source text`` reads the true source text; its results have no ``asr`` and no ``st``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import data_utils
from fairseq.models import FairseqIncrementalDecoder
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor, nn

from echostream.constants import BOS, EOS, PAD
from echostream.errors import ConfigError
from echostream.files import add, growing, reported
from echostream.models.decoders.unit_decoder import greedy_units
from echostream.models.echostream_model import written_inputs
from echostream.text import collapse_ctc

STATE = "echostream"


class EchoStreamGenerator:
    """What ``task.build_generator`` gives to fairseq-generate.

    Args:
        task: dictionaries, texts and the manifest's references.
        search: fairseq's beam search over the MT decoders of all models.
        vocoder: speaks the units; None leaves the waveforms out.
        results: directory for ``generate-<subset>.jsonl`` and ``wav/``; None writes nothing.
        subset: the split being decoded.
    """

    def __init__(
        self, task: Any, search: SequenceGenerator, vocoder: nn.Module | None, results: Path | None, subset: str
    ):
        self.task = task
        self.search = search
        self.vocoder = vocoder
        self.results = results
        self.subset = subset
        self.eos = search.eos
        self.symbols_to_strip_from_output = search.symbols_to_strip_from_output
        if results is not None:
            self._file = growing(results / f"generate-{subset}.jsonl")

    @torch.no_grad()
    def generate(
        self,
        models: Sequence[nn.Module],
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Decode a batch of single utterances.

        ASR, ST and units come from the first model, the beam from all of them.

        Returns:
            Per utterance the beam's hypotheses in fairseq's form, best first; the best has ``asr``, ``st`` (lists of
            dictionary indices; not of a text encoder), ``units`` (list of unit numbers) and, with a vocoder,
            ``waveform`` (float32 [N]) too.
        """
        net_input = sample["net_input"]
        model = models[0]
        x, lengths = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
        texts = {}
        if not self.task.reads_text:
            texts["asr"] = _greedy_ctc(model.asr_head(x), lengths)
            texts["st"] = _greedy_ctc(model.st_decoder(x, lengths), lengths)
        hypotheses = self.search.generate(models, sample, prefix_tokens=prefix_tokens, constraints=constraints)
        best = [beams[0] for beams in hypotheses]
        units, counts = self._units(model, x, lengths, [hypothesis["tokens"] for hypothesis in best])
        waves = self._speak(units, counts)
        for i, hypothesis in enumerate(best):
            hypothesis.update({name: rows[i] for name, rows in texts.items()})
            hypothesis["units"] = units[i, : counts[i]].tolist()
            if waves is not None:
                hypothesis["waveform"] = waves[i]
        if self.results is not None:
            self._write(sample["id"].tolist(), best)
        # fairseq-generate prints this as the source text; what stood there were features.
        net_input["src_tokens"] = sample["src_text"]
        return hypotheses

    def _units(self, model: nn.Module, x: Tensor, lengths: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Greedy units [B, U] and their number [B]; for an ``mt`` unit decoder, of the beam's best hypotheses."""
        written = None
        if not model.config.units_read_text:
            inputs, input_lengths = x, lengths
        else:
            previous = data_utils.collate_tokens(tokens, PAD, EOS, move_eos_to_beginning=True).to(x.device)
            _, hidden = model.mt_decoder(previous, x, lengths)
            inputs, input_lengths, written = written_inputs(previous, hidden)
        logits = model.unit_decoder(inputs, input_lengths, x, lengths, tokens=written)
        units, counts, _ = greedy_units(logits, input_lengths * model.config.ctc_upsample_ratio)
        return units, counts

    def _speak(self, units: Tensor, counts: Tensor) -> list[np.ndarray] | None:
        if self.vocoder is None:
            return None
        if units.shape[1] == 0:
            return [np.zeros(0, dtype=np.float32) for _ in counts]
        # Rows without units get one, for the vocoder wants something to say, and are emptied again.
        waveform, wave_lengths = self.vocoder(units, counts.clamp(min=1))
        wave_lengths = wave_lengths * (counts > 0)
        return [wave[:n].float().cpu().numpy() for wave, n in zip(waveform, wave_lengths.tolist())]

    def _write(self, indices: list[int], best: list[dict[str, Any]]) -> None:
        from echostream.audio.io import write_audio

        utterances = self.task.dataset(self.subset).utterances
        for index, hypothesis in zip(indices, best):
            utterance = utterances[index]
            row = {
                "id": utterance.id,
                "audio": utterance.audio,
                **({"asr": self.task.source_text(hypothesis["asr"])} if "asr" in hypothesis else {}),
                **({"st": self.task.target_text(hypothesis["st"])} if "st" in hypothesis else {}),
                "mt": self.task.target_text(hypothesis["tokens"].tolist()),
                "units": hypothesis["units"],
                "asr_ref": utterance.src_text,
                "mt_ref": utterance.tgt_text,
                "units_ref": utterance.units.tolist(),
            }
            if "waveform" in hypothesis:
                # An id may hold a slash (it is often a path); the file must not leave the folder for it.
                row["wav"] = f"wav/{utterance.id.replace('/', '_')}.wav"
                write_audio(self.results / row["wav"], hypothesis.pop("waveform"))
            with reported(self.results):
                add(self._file, json.dumps(row, ensure_ascii=False) + "\n")


def build_generator(task: Any, models: Sequence[nn.Module], args: Any, **kwargs: Any) -> EchoStreamGenerator:
    """The generator of ``task`` with fairseq-generate's beam options.

    Raises:
        ConfigError: of a vocoder only the checkpoint or only the configuration is named, or one cannot be read.
        CheckpointError: the vocoder's weights cannot be used, or it speaks another number of units.
    """
    from fairseq.tasks import FairseqTask

    adapters = [_BeamModel(model) for model in models]
    search = FairseqTask.build_generator(task, adapters, args, **kwargs)
    results = Path(task.cfg.results_path) if task.cfg.results_path else None
    device = next(models[0].parameters()).device
    return EchoStreamGenerator(task, search, find_vocoder(task.cfg, device), results, task.cfg.gen_subset)


def find_vocoder(cfg: Any, device: torch.device | str = "cpu") -> nn.Module | None:
    """The vocoder that ``--vocoder-dir``, or ``--vocoder`` with ``--vocoder-config``, name; None if none does.

    Raises:
        ConfigError: ``--vocoder`` or ``--vocoder-config`` without the other.
    """
    checkpoint, config = cfg.vocoder, cfg.vocoder_config
    if cfg.vocoder_dir:
        folder = Path(cfg.vocoder_dir)
        checkpoint, config = checkpoint or folder / "vocoder.pt", config or folder / "vocoder.json"
    if not checkpoint and not config:
        return None
    if not checkpoint or not config:
        raise ConfigError("a vocoder needs both --vocoder and --vocoder-config, or --vocoder-dir with both files")
    from echostream.models.decoders.vocoder_checkpoint import load_vocoder

    return load_vocoder(checkpoint, config, device)


def _greedy_ctc(logits: Tensor, lengths: Tensor) -> list[list[int]]:
    best = logits.argmax(-1).tolist()
    return [collapse_ctc(row[:n]) for row, n in zip(best, lengths.tolist())]


class _BeamModel(nn.Module):
    """An EchoStream model as fairseq's beam search wants to see it: an encoder and an incremental decoder."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder = _BeamEncoder(model)
        self.decoder = _BeamDecoder(model)
        self.get_normalized_probs = model.get_normalized_probs

    def max_decoder_positions(self) -> int:
        return self.decoder.max_positions()


class _BeamEncoder(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder = model.encoder

    def forward_torchscript(self, net_input: dict[str, Tensor]) -> dict[str, Tensor]:
        x, lengths = self.encoder(net_input["src_tokens"], net_input["src_lengths"])
        return {"x": x, "lengths": lengths}

    def reorder_encoder_out(self, encoder_out: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        return {name: value.index_select(0, rows) for name, value in encoder_out.items()}


class _BeamDecoder(FairseqIncrementalDecoder):
    """Steps the MT decoder; its state, a value, lies in fairseq's dictionary of incremental states."""

    def __init__(self, model: nn.Module):
        super().__init__(None)
        self.decoder = model.mt_decoder

    def max_positions(self) -> int:
        return self.decoder.max_positions

    def forward(
        self, tokens: Tensor, encoder_out: dict[str, Tensor], incremental_state: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """Scores [N, 1, vocab] of the token after ``tokens`` [N, U], of which all but the last were seen before."""
        state = incremental_state.get(STATE)
        if state is None:
            x, lengths = encoder_out["x"], encoder_out["lengths"]
            state = self.decoder.init_state(len(x), dtype=x.dtype, max_frames=max(1, x.shape[1]))
            state = self.decoder.extend(x, lengths, state, in_place=True)
        logits, _, incremental_state[STATE] = self.decoder.step(tokens[:, -1:], None, state, in_place=True)
        logits[..., BOS] = -torch.inf  # never a target
        return logits, None

    def reorder_incremental_state_scripting(self, incremental_state: dict[str, Any], rows: Tensor) -> None:
        if STATE in incremental_state:
            incremental_state[STATE] = incremental_state[STATE].index_select(rows)
