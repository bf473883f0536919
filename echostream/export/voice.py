"""The graphs of what speaks: a causal CodeHiFiGAN, first per unit (with durations), then per frame of 20 ms.

Between the two the caller repeats each unit for its frames. All layers are products of matrices over [B, time,
channel]: a transposed convolution of rate r that sees no future is a convolution with r times the channels, whose
outputs are already in order.

Letters: B streams, U units, F frames, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from echostream.errors import ConfigError
from echostream.export.graph import REST, Graph, as_array
from echostream.models.decoders.vocoder import CodeHiFiGAN
from echostream.models.decoders.vocoder_config import MAX_DURATION
from echostream.models.decoders.vocoder_layers import SLOPE, DurationClassifier


def check_voice(vocoder: CodeHiFiGAN) -> None:
    """Raises ConfigError: this vocoder cannot be exported."""
    if not vocoder.config.causal:
        raise ConfigError(
            "only causal vocoders can be exported (the preset 'small'); this one looks ahead in every layer. Export "
            "without it (--no-vocoder), or train a small one with echostream train-vocoder"
        )
    if vocoder.config.multispkr:
        raise ConfigError("vocoders of many speakers cannot be exported; export without it (--no-vocoder)")


def voice_units_graph(vocoder: CodeHiFiGAN) -> Graph:
    """What a unit sounds like, and for how long.

    Inputs: ``ids`` [B, left + U + look-ahead], ``num_embeddings`` standing for silence beyond the ends; caches.
    Outputs: ``units`` [B, U, C], ``durations`` [B, U] frames; new caches.
    """
    cfg, weights = vocoder.config, vocoder.state_dict()
    g = Graph("voice_units")
    ids = g.input("ids", "B", "ids", kind="INT64")

    def embed(name: str, kernel: int) -> str:
        """The units with what stands before and behind them within a convolution's view."""
        table = as_array(weights[name])
        x = g("Gather", g("Concat", table, np.zeros_like(table[:1]), axis=0), ids)
        unseen = cfg.past_units + cfg.lookahead_units + 1 - kernel
        return g.slice(x, 1, unseen) if unseen else x

    x = embed("dict.weight", cfg.context_kernel_size if cfg.context_layers else 1)
    for i in range(cfg.context_layers):
        kernel, right = cfg.context_kernel_size, 0 if i else cfg.lookahead_units
        left = kernel - 1 - right
        if i:
            past = kernel - 1
            x = g("Concat", g.input(f"context.{i}", "B", past, cfg.embedding_dim), x, axis=1)
            g.output(f"new.context.{i}", g.slice(x, 1, -past), "B", past, cfg.embedding_dim)
        weight = as_array(weights[f"context.{i}.conv.weight"])
        h = g.linear(
            g.windows(x, kernel), weight.transpose(0, 2, 1).reshape(len(weight), -1), weights[f"context.{i}.conv.bias"]
        )
        h = g.linear(
            _leaky(g, h), as_array(weights[f"context.{i}.proj.weight"])[:, :, 0], weights[f"context.{i}.proj.bias"]
        )
        x = g("Add", g.slice(x, 1, left, -right or REST), h)
    g.output("units", x, "B", "U", cfg.embedding_dim)
    predictor = vocoder.dur_predictor
    if isinstance(predictor, DurationClassifier):
        assert cfg.dur_predictor_params is not None
        kernel = cfg.dur_predictor_params.var_pred_kernel_size
        weight = as_array(predictor.first.weight).transpose(0, 2, 1).reshape(predictor.first.out_channels, -1)
        x = g.windows(embed("dur_predictor.dict.weight", kernel), kernel)
        x = g.norm(g("Relu", g.linear(x, weight, predictor.first.bias)), predictor.norms[0])
        for i, (conv, norm) in enumerate(zip(predictor.convs, predictor.norms[1:])):
            h = g("Relu", g.conv(x, f"duration.{i}", conv.weight, conv.bias))
            x = g("Add", x, g.norm(h, norm))
        choices = np.arange(1, predictor.proj.out_features + 1, dtype=np.float32)
        frames = g("Round", g("MatMul", g("Softmax", g.dense(x, predictor.proj), axis=-1), choices))
        g.output("durations", g("Cast", frames, to=g.onnx.TensorProto.INT64), "B", "U", kind="INT64")
    elif predictor is not None:
        for i, norm in enumerate((predictor.ln1, predictor.ln2), 1):
            name = f"dur_predictor.conv{i}.0"
            x = g.conv(x, f"duration.{i}", weights[f"{name}.weight"], weights[f"{name}.bias"])
            x = g.norm(g("Relu", x), norm)
        x = g.dense(x, predictor.proj)
        frames = g("Round", g("Sub", g("Exp", g("Min", x, 20.0)), 1.0))
        frames = g("Cast", g("Clip", frames, 1.0, float(MAX_DURATION)), to=g.onnx.TensorProto.INT64)
        g.output("durations", g("Reshape", frames, [0, -1]), "B", "U", kind="INT64")
    return g


def voice_frames_graph(vocoder: CodeHiFiGAN) -> Graph:
    """Frames to samples.

    Inputs: ``frames`` [B, F, C], units repeated; with position buckets ``since`` and ``until`` [B, F], frames since the
    unit's start and until its end (no more than there are buckets); caches.
    Outputs: ``samples`` [B, F * hop] in [-1, 1]; new caches.
    """
    cfg, weights = vocoder.config, vocoder.state_dict()
    g = Graph("voice_frames")
    x = g.input("frames", "B", "F", cfg.input_width)
    if cfg.position_buckets:
        table, half = g.constant(weights["position.weight"]), cfg.position_buckets
        for name, part in (("since", g.slice(table, 0, 0, half)), ("until", g.slice(table, 0, half))):
            x = g("Add", x, g("Gather", part, g.input(name, "B", "F", kind="INT64")))

    def conv(x: str, name: str, dilation: int = 1) -> str:
        return g.conv(x, name, weights[f"{name}.weight"], weights[f"{name}.bias"], dilation)

    x = conv(x, "conv_pre")
    for i in range(cfg.frame_layers):
        x = g("Add", x, conv(_leaky(g, x), f"frame_layers.{i}.convs.0", 2**i))
    kernels = len(cfg.resblock_kernel_sizes)
    stages = len(cfg.upsample_rates) if cfg.resblock_stages is None else cfg.resblock_stages
    for i, rate in enumerate(cfg.upsample_rates):
        x = _upsample(g, _leaky(g, x), f"ups.{i}", weights[f"ups.{i}.weight"], weights[f"ups.{i}.bias"], rate)
        if i >= stages:
            continue
        blocks = [
            _block(g, conv, x, f"resblocks.{i * kernels + j}", dilations, cfg.resblock)
            for j, dilations in enumerate(cfg.resblock_dilation_sizes)
        ]
        x = blocks[0]
        for block in blocks[1:]:
            x = g("Add", x, block)
        x = g("Mul", x, 1.0 / kernels)
    x = g("Tanh", conv(g("LeakyRelu", x, alpha=0.01), "conv_post"))
    g.output("samples", g("Reshape", x, [0, -1]), "B", "samples")
    return g


def _block(g: Graph, conv: Any, x: str, name: str, dilations: Any, kind: str) -> str:
    """A residual block of HiFi-GAN, of type 1 or 2."""
    for k, dilation in enumerate(dilations):
        if kind == "2":
            h = conv(_leaky(g, x), f"{name}.convs.{k}", dilation)
        else:
            h = conv(_leaky(g, conv(_leaky(g, x), f"{name}.convs1.{k}", dilation)), f"{name}.convs2.{k}")
        x = g("Add", x, h)
    return x


def _leaky(g: Graph, x: str) -> str:
    return g("LeakyRelu", x, alpha=SLOPE)


def _upsample(g: Graph, x: str, name: str, weight: Any, bias: Any, rate: int) -> str:
    """A causal transposed convolution with weight [C, C', k]: x [B, T, C] to [B, T * rate, C'].

    It is a convolution with rate * C' channels and ceil(k / rate) taps: output ``t * rate + r`` is the sum over j of
    input ``t - j`` times tap ``j * rate + r``. The graph lays the weight out so itself.
    """
    inputs, outputs, kernel = weight.shape
    taps = -(-kernel // rate)
    matrix = g("Pad", g.constant(weight), [0, 0, 0, 0, 0, taps * rate - kernel]) if kernel % rate else weight
    matrix = g("Reshape", matrix, [inputs, outputs, taps, rate])
    # the oldest input comes first: tap j of the transposed convolution is the j-th from the end
    matrix = g("Transpose", g.slice(matrix, 2, -1, -REST, -1), perm=[2, 0, 3, 1])
    matrix = g("Reshape", matrix, [taps * inputs, rate * outputs])
    x = g.windows(g.remember(x, name, taps - 1, inputs), taps)
    x = g("Add", g("MatMul", x, matrix), g("Tile", bias, [rate]))
    return g("Reshape", x, [0, -1, outputs])
