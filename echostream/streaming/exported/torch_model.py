"""The steps of a model run by torch, in place of the exported graphs: any device, any floating-point type."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from echostream.models.graphs import model_graphs
from echostream.models.state import State
from echostream.streaming.exported.model import Graphs, VoiceStates
from echostream.streaming.exported.stages import ExportedStages

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle
    from echostream.models.decoders.vocoder import CodeHiFiGAN
    from echostream.models.echostream_model import EchoStreamModel


class TorchModel:
    """What ``ExportedModel`` is to a directory of graphs, for a torch model; without a vocoder.

    It shares the model's weights as they are now; some are laid out anew.
    """

    def __init__(self, model: EchoStreamModel):
        weight = model.asr_head.weight
        self.device, self._type = weight.device, weight.dtype
        self.dtype = np.dtype(np.float64 if weight.dtype == torch.float64 else np.float32)
        with torch.no_grad():
            self.graphs = model_graphs(model)

    def check(self, names: tuple[str, ...]) -> None:
        assert all(name in self.graphs for name in names)

    @torch.inference_mode()
    def run(self, name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs of a graph."""
        out = self.graphs[name]({name: self._tensor(array) for name, array in feeds.items()})
        return {name: _array(value) for name, value in out.items()}

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        array = array if array.flags.writeable else array.copy()
        tensor = torch.from_numpy(array)
        return tensor.to(self.device, self._type if tensor.is_floating_point() else None)


class TorchVoice:
    """What ``ExportedVoice`` is to the graphs of a vocoder, for the module."""

    def __init__(self, vocoder: CodeHiFiGAN):
        self.vocoder = vocoder

    def streams(self, model: Graphs, rows: int) -> TorchVocoder:
        """See ``Voice``."""
        return TorchVocoder(self.vocoder, rows)


class TorchVocoder(VoiceStates):
    """A vocoder, causal or not, for ``rows`` streams."""

    def __init__(self, vocoder: CodeHiFiGAN, rows: int):
        self.vocoder = vocoder
        with torch.inference_mode():
            self.states = [vocoder.init_state(1) for _ in range(rows)]
        fresh = self.snapshot(0)
        held = {name: fresh[f"{name}s"].shape[1] for name in ("unit", "frame") if f"{name}s" in fresh}
        self.most = {f"{name}_{what}": places for name, places in held.items() for what in ("count", "done")}
        self.most |= {"seen": vocoder.config.lookahead_units}
        self.most |= dict.fromkeys((f"{name}s" for name in held), vocoder.config.num_embeddings - 1)

    def vocode(self, row: int, units: np.ndarray, finished: bool) -> np.ndarray:
        """See ``VoiceStates``."""
        return self.vocode_together([row], [units], [finished])[0]

    @torch.inference_mode()
    def vocode_together(self, rows: list[int], units: list[np.ndarray], finished: list[bool]) -> list[np.ndarray]:
        """See ``VoiceStates``; as one batch, which takes half of the time of turns on a CPU."""
        device, lengths = self.vocoder.dict.weight.device, torch.tensor([len(part) for part in units])
        padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for place, part in zip(padded, units):
            place[: len(part)] = torch.from_numpy(np.array(part, dtype=np.int64))
        state = self.states[rows[0]] if len(rows) == 1 else State.stack([self.states[row] for row in rows])
        waveform, counts, state = self.vocoder.step(
            padded.to(device), lengths.to(device), state, torch.tensor(finished, device=device)
        )
        for row, one in zip(rows, [state] if len(rows) == 1 else state.unstack()):
            self.states[row] = one
        samples = waveform.float().cpu().numpy()
        return [samples[i, :count].copy() for i, count in enumerate(counts.tolist())]

    @torch.inference_mode()
    def reset(self, row: int) -> None:
        self.states[row] = self.vocoder.init_state(1)

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self.states[row].arrays().items()}

    @torch.inference_mode()
    def restore(self, row: int, arrays: dict[str, np.ndarray]) -> None:
        fresh = self.vocoder.init_state(1)
        for name, own in fresh.arrays().items():
            self._fits(name, arrays[name], own)
        self.states[row] = fresh.from_arrays(arrays)

    @property
    def names(self) -> list[str]:
        return list(self.states[0].arrays())

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)


class TorchStages(ExportedStages):
    """``ExportedStages`` of a bundle of torch modules, on whatever device and in whatever type they are.

    Raises:
        ConfigError: the encoder attends whole utterances.
    """

    def __init__(self, bundle: Bundle, rows: int = 1, speech: bool = True):
        model, vocoder = cast("EchoStreamModel", bundle.model), cast("CodeHiFiGAN | None", bundle.vocoder)
        model.encoder.init_state(1)  # says so if it cannot stream
        voice = None if vocoder is None else TorchVoice(vocoder)
        stepping: Any = SimpleNamespace(config=bundle.config, model=TorchModel(model), vocoder=voice)
        super().__init__(stepping, rows, speech)


def _array(value: torch.Tensor) -> np.ndarray:
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    return value.cpu().numpy()
