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
from echostream.models.decoders.layers import TransformerDecoder
from echostream.models.decoders.transformer_decoder import MTDecoder
from echostream.models.decoders.unit_decoder import UnitDecoder


def memory_graph(decoder: TransformerDecoder, int8: bool) -> Graph:
    """``frames`` [B, N, encoder width] to ``memory`` [B, N, 2 layers * D]: keys, then values of each layer."""
    g = Graph("memory", int8)
    projections = [layer.cross_attention.kv for layer in decoder.layers]
    weight = np.concatenate([as_array(p.weight) for p in projections])
    bias = np.concatenate([as_array(p.bias) for p in projections])
    x = g.linear(g.input("frames", "B", "N", projections[0].in_features), weight, bias)
    g.output("memory", x, "B", "N", len(weight))
    return g


def mt_graph(decoder: MTDecoder, int8: bool) -> Graph:
    """``tokens`` [B, N] to ``scores`` [B, N, vocabulary] of the tokens after them, ``hidden`` [B, N, D] and, of each
    layer and head, ``attention`` [B, layers, H, N, T] over the frames. The rest: see ``_decode``."""
    g = Graph("mt", int8)
    embeddings = as_array(decoder.embedding.weight) * math.sqrt(decoder.dim)
    x = g("Gather", embeddings, g.input("tokens", "B", "N", kind="INT64"))
    hidden, weights = _decode(g, decoder, x, told=True)
    g.output("scores", g.dense(hidden, decoder.output), "B", "N", decoder.output.out_features)
    g.output("hidden", hidden, "B", "N", decoder.dim)
    looked = g("Concat", *(g("Unsqueeze", w, [1]) for w in weights), axis=1)
    g.output("attention", looked, "B", len(weights), decoder.heads, "N", "T")
    return g


def unit_graph(decoder: UnitDecoder, int8: bool) -> Graph:
    """``inputs`` [B, U, width] to ``scores`` [B, U * ratio, units + 4]. The rest: see ``_decode``; N = U * ratio.

    A decoder that reads tokens too has another input, ``tokens`` [B, U].
    """
    g = Graph("units", int8)
    x = g.input("inputs", "B", "U", decoder.input.in_features)
    x = g.dense(x, decoder.input)
    if decoder.tokens is not None:
        tokens = g.input("tokens", "B", "U", kind="INT64")
        x = g("Add", x, g("Gather", as_array(decoder.tokens.weight) * math.sqrt(decoder.dim), tokens))
    x = g("Unsqueeze", x, [2])
    x = g("Reshape", g("Tile", x, [1, 1, decoder.ratio, 1]), [0, -1, decoder.dim])
    hidden, _ = _decode(g, decoder, x, told=False)
    g.output("scores", g.dense(hidden, decoder.output), "B", "N", decoder.output.out_features)
    return g


def _decode(g: Graph, decoder: TransformerDecoder, x: str, told: bool) -> tuple[str, list[str]]:
    """The layers over x [B, N, D], and, if that is to be told, where each looked, [B, H, N, T].

    Inputs: ``positions`` [B, N]; ``mask`` [B, 1, N, P + N] for self-attention, ``memory_mask`` [B, 1, N, T]; per layer
    ``keys.i``, ``values.i`` [B, P, D], ``memory_keys.i``, ``memory_values.i`` [B, T, D].

    Output: ``kept`` [B, N, 2 layers * D], the new positions' keys and values.
    """
    dim = decoder.dim
    table = decoder.position_vectors(torch.arange(decoder.max_positions), torch.float32)
    x = g("Add", x, g("Gather", table, g.input("positions", "B", "N", kind="INT64")))
    mask, memory_mask = g.input("mask", "B", 1, "N", "P+N"), g.input("memory_mask", "B", 1, "N", "T")
    kept, weights = [], []
    for i, layer in enumerate(decoder.layers):
        own, cross = layer.self_attention, layer.cross_attention
        query, *new = g.split(g.linear(x, *scaled(own.qkv.weight, own.qkv.bias, dim, own.heads)), 3)
        kept += new
        keys, values = (
            g("Concat", g.input(f"{name}.{i}", "B", "P", dim), part, axis=1)
            for name, part in zip(("keys", "values"), new)
        )
        x = g.residual(x, g.attention(query, keys, values, mask, own.heads), own.out, layer.self_norm)
        query = g.linear(x, *scaled(cross.q.weight, cross.q.bias, dim, cross.heads))
        memory = [g.input(f"memory_{name}.{i}", "B", "T", dim) for name in ("keys", "values")]
        if told:
            context, looked = g.told_attention(query, *memory, memory_mask, cross.heads, dim)
            weights.append(looked)
        else:
            context = g.attention(query, *memory, memory_mask, cross.heads)
        x = g.residual(x, context, cross.out, layer.cross_norm)
        x = feed_forward(g, layer, x)
    g.output("kept", g("Concat", *kept, axis=2), "B", "N", len(kept) * dim)
    return x, weights
