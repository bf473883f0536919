"""The graphs of what writes: the MT and the unit decoder, each a step and the projection of new encoder frames.

The caller keeps a sentence's keys and values in buffers of fixed size and gives the graphs as much of them as is in
use. The first place of the encoder frames' buffers holds zeros: a position that sees no frame attends that one, which
gives exactly nothing.

Letters: B streams, N new positions, P earlier ones, T encoder frames and one more, D width, U inputs of the unit
decoder.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from echostream.export.encoder import feed_forward, scaled
from echostream.export.graph import Graph, as_array
from echostream.models.decoders.layers import TransformerDecoder, sinusoidal_positions
from echostream.models.decoders.transformer_decoder import MTDecoder
from echostream.models.decoders.unit_decoder import UnitDecoder


def memory_graph(decoder: TransformerDecoder, int8: bool) -> Graph:
    """``frames`` [B, N, encoder width] to ``memory`` [2 layers, B, N, D]: keys, then values of each layer."""
    g = Graph("memory", int8)
    projections = [layer.cross_attention.kv for layer in decoder.layers]
    weight = np.concatenate([as_array(p.weight) for p in projections])
    bias = np.concatenate([as_array(p.bias) for p in projections])
    count = 2 * len(projections)
    x = g.linear(g.input("frames", "B", "N", projections[0].in_features), weight, bias)
    x = g("Transpose", g("Reshape", x, [0, 0, count, decoder.dim]), perm=[2, 0, 1, 3])
    g.output("memory", x, count, "B", "N", decoder.dim)
    return g


def mt_graph(decoder: MTDecoder, int8: bool) -> Graph:
    """``tokens`` [B, N] to ``scores`` [B, N, vocabulary] of the tokens after them, ``hidden`` [B, N, D] and, of each
    layer, ``attention`` [B, layers, N, T] over the frames, the mean of the heads. The rest: see ``_decode``."""
    g = Graph("mt", int8)
    embeddings = as_array(decoder.embedding.weight) * math.sqrt(decoder.dim)
    x = g("Gather", embeddings, g.input("tokens", "B", "N", kind="INT64"))
    hidden, weights = _decode(g, decoder, x)
    g.output("scores", g.dense(hidden, decoder.output), "B", "N", decoder.output.out_features)
    g.output("hidden", hidden, "B", "N", decoder.dim)
    means = [g("ReduceMean", w, [1], keepdims=1) for w in weights]
    g.output("attention", g("Concat", *means, axis=1), "B", len(means), "N", "T")
    return g


def unit_graph(decoder: UnitDecoder, int8: bool) -> Graph:
    """``inputs`` [B, U, width] to ``scores`` [B, U * ratio, units + 4]. The rest: see ``_decode``; N = U * ratio."""
    g = Graph("units", int8)
    x = g.input("inputs", "B", "U", decoder.input.in_features)
    x = g("Unsqueeze", g.dense(x, decoder.input), [2])
    x = g("Reshape", g("Tile", x, [1, 1, decoder.ratio, 1]), [0, -1, decoder.dim])
    hidden, _ = _decode(g, decoder, x)
    g.output("scores", g.dense(hidden, decoder.output), "B", "N", decoder.output.out_features)
    return g


def _decode(g: Graph, decoder: TransformerDecoder, x: str) -> tuple[str, list[str]]:
    """The layers over x [B, N, D], and where each looked, [B, H, N, T].

    Inputs: ``positions`` [B, N]; ``mask`` [B, 1, N, P + N] for self-attention, ``memory_mask`` [B, 1, 1, T]; per layer
    ``keys.i``, ``values.i`` [B, P, D], ``memory_keys.i``, ``memory_values.i`` [B, T, D].

    Output: ``kept`` [2 layers, B, N, D], the new positions' keys and values.
    """
    dim = decoder.dim
    table = sinusoidal_positions(torch.arange(decoder.max_positions), dim, torch.float32)
    x = g("Add", x, g("Gather", table, g.input("positions", "B", "N", kind="INT64")))
    mask, memory_mask = g.input("mask", "B", 1, "N", "P+N"), g.input("memory_mask", "B", 1, 1, "T")
    kept, weights = [], []
    for i, layer in enumerate(decoder.layers):
        heads = layer.self_attention.heads
        qkv = scaled(layer.self_attention.qkv.weight, layer.self_attention.qkv.bias, dim, heads)
        query, *own = g("Split", g.linear(x, *qkv), axis=2, num_outputs=3, outputs=3)
        kept += own
        keys, values = (
            g.heads(g("Concat", g.input(f"{name}.{i}", "B", "P", dim), new, axis=1), heads, dim)
            for name, new in zip(("keys", "values"), own)
        )
        context, _ = g.attention(g.heads(query, heads, dim), keys, values, mask, dim)
        out = layer.self_attention.out
        x = g.norm(g("Add", x, g.dense(context, out)), layer.self_norm)
        cross = layer.cross_attention
        query = g.heads(g.linear(x, *scaled(cross.q.weight, cross.q.bias, dim, heads)), heads, dim)
        keys, values = (
            g.heads(g.input(f"memory_{name}.{i}", "B", "T", dim), heads, dim) for name in ("keys", "values")
        )
        context, looked = g.attention(query, keys, values, memory_mask, dim)
        weights.append(looked)
        x = g.norm(g("Add", x, g.dense(context, cross.out)), layer.cross_norm)
        x = feed_forward(g, layer, x)
    g.output("kept", g.stack(kept), len(kept), "B", "N", dim)
    return x, weights
