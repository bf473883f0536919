"""What the graphs of an exported directory are fed and what they give, by configuration.

A graph of another model, or in another's place, is refused by this before it is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from echostream.streaming.exported.voice import PER_UNIT, caches

if TYPE_CHECKING:
    from echostream.config import EchoStreamConfig
    from echostream.models.decoders.vocoder_config import VocoderConfig


class Names(NamedTuple):
    inputs: frozenset[str]
    outputs: frozenset[str]


def graph_names(config: EchoStreamConfig, voice: VocoderConfig | None = None) -> dict[str, Names]:
    """Names of inputs and outputs by the graph's name."""

    def of(inputs: str, outputs: str, layers: int = 0, *per_layer: str) -> Names:
        more = (f"{name}.{i}" for i in range(layers) for name in per_layer)
        return Names(frozenset([*inputs.split(), *more]), frozenset(outputs.split()))

    own, both = ("keys", "values"), ("keys", "values", "memory_keys", "memory_values")
    ctc = config.ctc_layers
    conv = config.encoder_layers if config.encoder_conv_kernel else 0
    stem = "features inside" if config.encoder_stem == "whisper" else "windows patches"
    options = {"positions": config.encoder_position_period, "distance": config.encoder_relative_bias}
    encoder = of(
        " ".join([stem, "places mask", *(name for name, there in options.items() if there)]), "frames kept",
        config.encoder_layers, *own,
    )  # fmt: skip
    tokens = " tokens" if config.unit_decoder_input == "mt-tokens" else ""
    step = "positions mask memory_mask"
    found = {
        "encoder": Names(
            encoder.inputs.union(f"conv.{i}" for i in range(conv)),
            encoder.outputs.union(f"new.conv.{i}" for i in range(conv)),
        ),
        "heads": of("frames mask" if ctc else "frames", "source target kept" if ctc else "source target", ctc, *own),
        "mt_memory": of("frames", "memory"),
        "mt": of(f"tokens {step}", "scores hidden attention kept", config.mt_decoder_layers, *both),
        "unit_memory": of("frames", "memory"),
        "units": of(f"inputs{tokens} {step}", "scores kept", config.unit_decoder_layers, *both),
    }  # fmt: skip
    if voice is not None:
        for name, inputs, outputs in (
            ("voice_units", "ids", "units" + (" durations" if voice.dur_predictor_params is not None else "")),
            ("voice_frames", "frames" + (" since until" if voice.position_buckets else ""), "samples"),
        ):
            kept = [cache for cache in caches(voice) if cache.startswith(PER_UNIT) == (name == "voice_units")]
            found[name] = Names(
                frozenset([*inputs.split(), *kept]),
                frozenset([*outputs.split(), *(f"new.{cache}" for cache in kept)]),
            )
    return found
