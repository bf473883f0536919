"""The graphs of what hears: subsampler and Emformer layers, and the two CTC heads.

The state lives with the caller, in rings: a layer's newest keys and values overwrite the oldest ones, for attention
does not mind their order. So a graph is given whole caches and hands back only what is new, and which place may be seen
by whom is said by the masks (``streaming.exported``).

Letters: B streams, G segments, S frames in a segment, R frames of right context, W = S + R, L frames of left context,
M summaries, D width, H heads, d = D / H.
"""

from __future__ import annotations

import numpy as np

from echostream.export.graph import Graph, as_array
from echostream.models.decoders.ctc_decoder import CTCHead, STDecoder
from echostream.models.echostream_encoder import EchoStreamEncoder
from echostream.models.emformer_layer import EmformerLayer
from echostream.models.subsampler import Subsampler


def encoder_graph(encoder: EchoStreamEncoder, int8: bool) -> Graph:
    """G segments of each stream.

    Inputs: ``windows`` [B, places, 9 channels + 1] and ``patches`` [(G S + R) bins, 9], what the two convolutions see
    (``streaming.exported.subsampling``);
    ``mask`` [B, 1, G W, M + L + G W + G] (without M and G where there is no memory bank); with right context
    ``places`` [G W], which subsampled frame stands where; and per layer ``keys.i`` and ``values.i`` [B, H, M + L, d].

    Outputs: ``frames`` [B, G S, D]; ``kept`` [B, G W + G, 2 layers * D], what to put into the rings: keys, then values
    of each layer, of all frames and then of the summaries.
    """
    g = Graph("encoder", int8)
    dim, right = encoder.embed_dim, encoder.right_context_length
    width = encoder.segment_length + right
    x = subsample(g, encoder.subsampler)
    mask = g.input("mask", "B", 1, "Q", "K")
    if right:
        x = g("Gather", x, g.input("places", "Q", kind="INT64"), axis=1)
    kept: list[str] = []
    for i, layer in enumerate(encoder.layers):
        x = emformer_layer(g, layer, i, x, mask, kept)
    if right:
        x = g.slice(g("Reshape", x, [0, -1, width, dim]), 2, 0, encoder.segment_length)
        x = g("Reshape", x, [0, -1, dim])
    g.output("frames", x, "B", "N", dim)
    g.output("kept", g("Concat", *kept, axis=2), "B", "new", len(kept) * dim)
    return g


def subsample(g: Graph, subsampler: Subsampler) -> str:
    """What the first convolution sees to encoder frames [B, N, D].

    Both convolutions are products of matrices, the second so that int8 serves it. The caller gathers for the first one,
    in which nine numbers become a hundred and more; for the second the graph does, by ``patches``.
    """
    channels, bias = subsampler.conv1.out_channels, as_array(subsampler.conv1.bias)[:, None]
    conv1 = np.concatenate([as_array(subsampler.conv1.weight).reshape(channels, -1), bias], axis=1)
    x = g.input("windows", "B", "places", conv1.shape[1])
    x = g("Relu", g("MatMul", x, np.ascontiguousarray(conv1.T)))
    x = g("Gather", x, g.input("patches", "bins", 9, kind="INT64"), axis=1)  # [B, N * bins, 9, C]
    x = g("Reshape", x, [0, 0, 9 * channels])
    weight = as_array(subsampler.conv2.weight).transpose(0, 2, 3, 1).reshape(channels, -1)
    x = g("Relu", g.linear(x, weight, subsampler.conv2.bias))
    return g.dense(g("Reshape", x, [0, -1, subsampler.proj.in_features]), subsampler.proj)


def emformer_layer(g: Graph, layer: EmformerLayer, i: int, x: str, mask: str, kept: list[str]) -> str:
    """One layer, x [B, G W, D] to the same shape; ``kept`` gets its new keys and values [B, G W + G, D]."""
    dim, heads = layer.qkv_proj.in_features, layer.num_heads
    segment, width = layer.segment_length, layer.segment_length + layer.right_context_length
    places = layer.left_context_length + layer.memory_size
    weight, bias = scaled(layer.qkv_proj.weight, layer.qkv_proj.bias, dim, heads)
    h = g.norm(x, layer.attention_norm) if layer.normalize_before else x
    if layer.summary_proj is not None:
        frames = g("Reshape", x, [0, -1, width, dim])
        if width > segment:
            frames = g.slice(frames, 2, 0, segment)
        summaries = g.dense(g("ReduceMean", frames, [2], keepdims=0), layer.summary_proj)
        # One product for frames and summaries, whose queries nobody needs: less time than a product of their own.
        h = g("Concat", h, summaries, axis=1)
    query, *new = g.split(g.linear(h, weight, bias), 3)
    if layer.summary_proj is not None:
        query = g("Slice", query, [0], g("Shape", mask, start=2, end=3), [1])
    kept += new
    rings = [g.input(f"{name}.{i}", "B", heads, places, dim // heads) for name in ("keys", "values")]
    context = g.attention(query, *new, mask, heads, *rings)
    if layer.normalize_before:
        x = g("Add", x, g.dense(context, layer.out_proj))
        h = g("Relu", g.dense(g.norm(x, layer.ffn_norm), layer.fc1))
        return g.residual(x, h, layer.fc2, layer.output_norm)
    x = g.residual(x, context, layer.out_proj, layer.attention_norm)
    return g.residual(x, g("Relu", g.dense(x, layer.fc1)), layer.fc2, layer.ffn_norm)


def heads_graph(asr: CTCHead, st: STDecoder, int8: bool) -> Graph:
    """Both CTC heads over N new encoder frames.

    Inputs: ``frames`` [B, N, D]; ``mask`` [B, 1, N, window - 1 + N]; per ST layer ``keys.i``, ``values.i``
    [B, H, window - 1, d], rings like the encoder's.

    Outputs: ``source`` and ``target`` [B, N, vocabulary], the scores; ``kept`` [B, N, 2 layers * D] (none without
    layers).
    """
    g = Graph("heads", int8)
    dim = asr.output.in_features
    x = g.input("frames", "B", "N", dim)
    g.output("source", g.dense(x, asr.output), "B", "N", asr.output.out_features)
    kept: list[str] = []
    if st.layers:
        mask = g.input("mask", "B", 1, "N", "K")
    for i, layer in enumerate(st.layers):
        attention, heads = layer.self_attention, layer.self_attention.heads
        query, *new = g.split(g.linear(x, *scaled(attention.qkv.weight, attention.qkv.bias, dim, heads)), 3)
        kept += new
        rings = [g.input(f"{name}.{i}", "B", heads, st.window - 1, dim // heads) for name in ("keys", "values")]
        x = g.residual(x, g.attention(query, *new, mask, heads, *rings), attention.out, layer.self_norm)
        x = feed_forward(g, layer, x)
    g.output("target", g.dense(x, st.head.output), "B", "N", st.head.output.out_features)
    if kept:
        g.output("kept", g("Concat", *kept, axis=2), "B", "N", len(kept) * dim)
    return g


def feed_forward(g: Graph, layer: object, x: str) -> str:
    """The feed-forward network of a post-norm layer with its residual and norm."""
    return g.residual(x, g("Relu", g.dense(x, layer.ffn.inner)), layer.ffn.outer, layer.ffn_norm)


def scaled(weight: object, bias: object, dim: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """A projection whose first ``dim`` outputs are queries, with these scaled for attention (float64)."""
    weight, bias = as_array(weight).astype(np.float64), as_array(bias).astype(np.float64)
    weight[:dim] *= (dim // heads) ** -0.5
    bias[:dim] *= (dim // heads) ** -0.5
    return weight, bias
