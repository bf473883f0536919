"""What the model computes in one step of a stream, without any state: arrays by name in, arrays by name out.

Each class here is a graph of an exported directory, written by ``torch.onnx.export`` (``export.graphs``), and what
``streaming.exported.torch_model`` runs in place of it. The mathematics is that of the modules; a graph says what goes
in and out. All that depends on a stream's age (masks, positions, rings of keys and values) is the caller's business
(``streaming.exported``).

The vocoder's graphs are written by hand (``export.voice``).

Letters: B streams, N new items, G segments, S frames of the layers in a segment, R of right context, W = S + R,
L of left context, M summaries, Q = G W queries, D width, H heads, d = D / H, P earlier positions, T encoder frames and
one more, U inputs of the unit decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.models.decoders.ctc_decoder import ASRHead, STDecoder
from echostream.models.decoders.decoder_base import TransformerDecoder
from echostream.models.decoders.transformer_decoder import MTDecoder
from echostream.models.decoders.unit_decoder import UnitDecoder
from echostream.models.echostream_encoder import EchoStreamEncoder
from echostream.models.subsampler import Subsampler

if TYPE_CHECKING:
    from echostream.models.echostream_model import EchoStreamModel

Arrays = dict[str, Tensor]
Shape = tuple[int | str, ...]  # a letter stands for a size that varies
WHOLE = {"patches", "places", "distance", "positions", "tokens"}  # inputs that are int64


class StepGraph(nn.Module):
    """Base of the graphs: ``forward`` takes and gives a dictionary.

    Attributes:
        inputs: the shape of each input.
        examples: for each letter in them a size to trace with, no two alike.
    """

    inputs: dict[str, Shape]
    examples: dict[str, int]

    def forward(self, given: Arrays) -> Arrays:
        raise NotImplementedError

    def example(self) -> Arrays:
        """Zeros of the example's sizes for all inputs."""
        shapes = {
            name: [size if isinstance(size, int) else self.examples[size] for size in shape]
            for name, shape in self.inputs.items()
        }
        return {
            name: torch.zeros(shape, dtype=torch.long if name in WHOLE else torch.float32)
            for name, shape in shapes.items()
        }


class EncoderGraph(StepGraph):
    """G segments of each stream: stem, Emformer layers, and what follows them.

    Inputs: of the Conv2d stem ``windows`` and ``patches``, what its convolutions see
    (``streaming.exported.subsampling``), of Whisper's ``features`` [B, 3 + 4 n, F] and ``inside`` [B, 1 + 4 n] (see
    ``WhisperStem.convolve``); with positions ``positions`` [B, N], each below the period; ``places`` [G, W], which of
    the stem's frames stands where; ``mask`` [B, 1, Q, M + L + Q + G] (without M and G where there is no bank); with a
    relative bias ``distance`` [B, Q, M + L + Q + G]; per layer ``keys.i`` and ``values.i`` [B, H, M + L, d], and with
    convolutions ``conv.i`` [B, K' - 1, D].

    Outputs: ``frames``, the encoder frames of all segments; ``kept`` [B, Q + G, 2 layers * D], what to put into the
    rings: keys, then values of each layer, of all frames and then of the summaries; ``new.conv.i``.
    """

    def __init__(self, encoder: EchoStreamEncoder):
        super().__init__()
        self.encoder, stem = encoder, encoder.subsampler
        first, dim = encoder.layers[0], encoder.embed_dim
        width = encoder.segment_length + encoder.right_context_length
        frames = 5 * encoder.segment_length + encoder.right_context_length
        self.inputs, self.examples = {}, {"B": 2, "G": 5, "Q": 5 * width, "N": frames}
        if isinstance(stem, Subsampler):
            channels = stem.conv1.out_channels
            conv1 = torch.cat([stem.conv1.weight.flatten(1), stem.conv1.bias[:, None]], dim=1)
            self.register_buffer("conv1", conv1.detach().T.contiguous(), persistent=False)
            conv2 = stem.conv2.weight.detach().permute(0, 2, 3, 1).reshape(channels, -1)
            self.register_buffer("conv2", conv2.contiguous(), persistent=False)
            bins = stem.proj.in_features // channels
            self.inputs |= {"windows": ("B", "places", len(self.conv1)), "patches": ("N", bins, 9)}
            self.examples["places"] = (1 + 2 * frames) * (2 * bins + 1)
        else:
            self.inputs |= {"features": ("B", "heard", stem.num_bins), "inside": ("B", "inside")}
            self.examples |= {"heard": 3 + 4 * frames // stem.factor, "inside": 1 + 4 * frames // stem.factor}
        if encoder.position_period:
            self.inputs["positions"] = "B", "N"
        past = encoder.memory_size + encoder.left_context_length
        self.examples["K"] = past + 5 * width + (5 if encoder.memory_size else 0)
        self.inputs |= {"places": ("G", width), "mask": ("B", 1, "Q", "K")}
        if first.relative_bias is not None:
            self.inputs["distance"] = "B", "Q", "K"
        for i, layer in enumerate(encoder.layers):
            ring = "B", layer.num_heads, past, dim // layer.num_heads
            self.inputs |= {f"keys.{i}": ring, f"values.{i}": ring}
            if layer.convolution is not None:
                self.inputs[f"conv.{i}"] = "B", layer.convolution.kernel - 1, dim

    def forward(self, given: Arrays) -> Arrays:
        encoder, places = self.encoder, given["places"]
        if "windows" in given:
            x = self._subsample(given["windows"], given["patches"])
        else:
            x = encoder.subsampler.convolve(given["features"], given["inside"])
        if "positions" in given:
            x = x + encoder.position_vectors(given["positions"]).to(x.dtype)
        x = x.index_select(1, places.flatten()).unflatten(1, places.shape)
        kept, out = [], {}
        for i, layer in enumerate(encoder.layers):
            past = given[f"keys.{i}"], given[f"values.{i}"], given.get(f"conv.{i}")
            x, new, heard = layer.attend_past(x, given["mask"], *past, given.get("distance"))
            kept.append(new)
            if heard is not None:
                size = layer.convolution.kernel - 1
                out[f"new.conv.{i}"] = heard[:, -size:] if size else past[2]
        frames = encoder.leave(x[:, :, : encoder.segment_length].flatten(1, 2))
        return {"frames": frames, "kept": torch.cat(kept, dim=2), **out}

    def _subsample(self, windows: Tensor, patches: Tensor) -> Tensor:
        """Both convolutions as products of matrices, the second so that int8 serves it. The caller gathers for the
        first one, in which nine numbers become a hundred and more; for the second the graph does."""
        stem = self.encoder.subsampler
        x = F.relu(windows @ self.conv1)
        x = x.index_select(1, patches.flatten()).unflatten(1, patches.shape).flatten(3)  # [B, N, bins, 9 C]
        x = F.relu(F.linear(x, self.conv2, stem.conv2.bias))
        return stem.proj(x.flatten(2))


class HeadsGraph(StepGraph):
    """Both CTC heads over N new encoder frames.

    Inputs: ``frames`` [B, N, encoder width]; with layers ``mask`` [B, 1, N, window - 1 + N] and per layer, those of the
    ASR head first, ``keys.i``, ``values.i`` [B, H, window - 1, d], rings like the encoder's.

    Outputs: ``source`` and ``target`` [B, N, vocabulary], the scores; with layers ``kept`` [B, N, 2 layers * D].
    """

    def __init__(self, asr: ASRHead, st: STDecoder, width: int):
        super().__init__()
        self.asr, self.st = asr, st
        layers = [*asr.layers, *st.layers]
        self.inputs = {"frames": ("B", "N", width)}
        self.examples = {"B": 2, "N": 3, "K": st.window + 2}
        if layers:
            self.inputs["mask"] = "B", 1, "N", "K"
        for i, layer in enumerate(layers):
            heads, dim = layer.self_attention.heads, layer.self_norm.normalized_shape[0]
            self.inputs |= {f"{name}.{i}": ("B", heads, st.window - 1, dim // heads) for name in ("keys", "values")}

    def forward(self, given: Arrays) -> Arrays:
        out: Arrays = {}
        kept: list[Tensor] = []
        for name, part in (("source", self.asr), ("target", self.st)):
            x = part.enter(given["frames"])
            for place, layer in enumerate(part.layers):
                i = len(kept) // 2
                x, *new = layer.attend_past(x, given["mask"], given[f"keys.{i}"], given[f"values.{i}"])
                x = part.between(place, x)
                kept += new
            out[name] = part.classify(x)
        return {**out, "kept": torch.cat(kept, dim=2)} if kept else out


class MemoryGraph(StepGraph):
    """``frames`` [B, N, encoder width] to ``memory`` [B, N, 2 layers * D]: keys, then values of each layer."""

    def __init__(self, decoder: TransformerDecoder):
        super().__init__()
        self.projections = nn.ModuleList(layer.cross_attention.kv for layer in decoder.layers)
        self.inputs, self.examples = {"frames": ("B", "N", self.projections[0].in_features)}, {"B": 2, "N": 3}

    def forward(self, given: Arrays) -> Arrays:
        return {"memory": torch.cat([project(given["frames"]) for project in self.projections], dim=-1)}


class DecoderGraph(StepGraph):
    """N new positions of a decoder; base of the two.

    Inputs, besides what the positions read: ``positions`` [B, N]; ``mask`` [B, 1, N, N + P] for self-attention (the new
    positions first), ``memory_mask`` [B, 1, N, T]; per layer ``keys.i``, ``values.i`` [B, H, P, d], ``memory_keys.i``,
    ``memory_values.i`` [B, H, T, d]. The first place of the encoder frames' buffers holds zeros: a position that sees
    no frame attends that one, which gives exactly nothing.

    Outputs: ``scores`` [B, N, symbols]; ``kept`` [B, N, 2 layers * D], the new positions' keys and values.
    """

    def __init__(self, decoder: TransformerDecoder):
        super().__init__()
        self.decoder = decoder
        self.inputs = {"positions": ("B", "N"), "mask": ("B", 1, "N", "N+P"), "memory_mask": ("B", 1, "N", "T")}
        self.examples = {"B": 2, "N": 3, "P": 5, "N+P": 8, "T": 7}
        heads, width = decoder.heads, decoder.dim // decoder.heads
        for i in range(len(decoder.layers)):
            self.inputs |= {f"{name}.{i}": ("B", heads, "P", width) for name in ("keys", "values")}
            self.inputs |= {f"{name}.{i}": ("B", heads, "T", width) for name in ("memory_keys", "memory_values")}

    def decode(self, x: Tensor, given: Arrays, weights: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The layers over x [B, N, D] without positions -> ([B, N, D], ``kept``); ``weights`` gets where each layer
        looked, [B, H, N, T]."""
        x = x + self.decoder.position_vectors(given["positions"], x.dtype)
        kept, probe = [], None if weights is None else weights.append
        for i, layer in enumerate(self.decoder.layers):
            own = given[f"keys.{i}"], given[f"values.{i}"]
            memory = given[f"memory_keys.{i}"], given[f"memory_values.{i}"]
            x, *new = layer.attend_past(x, given["mask"], own, memory, given["memory_mask"], probe)
            kept += new
        if self.decoder.final_norm is not None:
            x = self.decoder.final_norm(x)
        return x, torch.cat(kept, dim=2)


class MTGraph(DecoderGraph):
    """``tokens`` [B, N] to ``scores`` of the tokens after them, ``hidden`` [B, N, D] and, of each layer and head,
    ``attention`` [B, layers, H, N, T] over the frames. The rest: see ``DecoderGraph``."""

    def __init__(self, decoder: MTDecoder):
        super().__init__(decoder)
        self.inputs = {"tokens": ("B", "N"), **self.inputs}

    def forward(self, given: Arrays) -> Arrays:
        weights: list[Tensor] = []
        x, kept = self.decode(self.decoder.embed(given["tokens"]), given, weights)
        scores = self.decoder.scores(x)
        return {"scores": scores, "hidden": x, "attention": torch.stack(weights, dim=1), "kept": kept}


class UnitGraph(DecoderGraph):
    """``inputs`` [B, U, width] (and ``tokens`` [B, U], where the decoder reads them) to ``scores`` of N = U * ratio
    positions. The rest: see ``DecoderGraph``."""

    def __init__(self, decoder: UnitDecoder):
        super().__init__(decoder)
        inputs: dict[str, Shape] = {"inputs": ("B", "U", decoder.input.in_features)}
        if decoder.tokens is not None:
            inputs["tokens"] = "B", "U"
        self.inputs = inputs | self.inputs
        self.examples |= {"U": 3, "N": 3 * decoder.ratio, "N+P": 5 + 3 * decoder.ratio}

    def forward(self, given: Arrays) -> Arrays:
        x, kept = self.decode(self.decoder.upsample(given["inputs"], given.get("tokens")), given)
        return {"scores": self.decoder.output(x), "kept": kept}


def model_graphs(model: EchoStreamModel) -> dict[str, StepGraph]:
    """All graphs of an ``EchoStreamModel``, by name."""
    return {
        "encoder": EncoderGraph(model.encoder),
        "heads": HeadsGraph(model.asr_head, model.st_decoder, model.config.encoder_embed_dim),
        "mt_memory": MemoryGraph(model.mt_decoder),
        "mt": MTGraph(model.mt_decoder),
        "unit_memory": MemoryGraph(model.unit_decoder),
        "units": UnitGraph(model.unit_decoder),
    }
