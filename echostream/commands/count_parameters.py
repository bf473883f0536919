"""Print a model's parameters per component.

echostream count-parameters --arch echostream_small
echostream count-parameters --config configs/echostream_config.yaml --vocoder small
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from echostream.config import EchoStreamConfig
from echostream.errors import EchoStreamError

ARCHITECTURES: dict[str, Callable[[], EchoStreamConfig]] = {
    "echostream": EchoStreamConfig,
    "echostream_small": EchoStreamConfig.small,
    "echostream_tiny": EchoStreamConfig.tiny,
}

# What the design states for its default configuration, and for the encoder without the memory bank.
DESIGN = {
    "subsampler": 1_903_616,
    "Emformer layer": 855_552,
    "encoder": 15_592_448,
    "encoder, memory_size 0": 14_539_776,
    "encoder, memory_size 0, pre-norm": 14_547_968,
}


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def table(cfg: EchoStreamConfig, vocoder: str | None = None) -> list[tuple[str, int]]:
    """(component, parameters) rows; indented rows are parts of the component below which they stand."""
    from echostream.models.echostream_model import build_echostream_model

    model = build_echostream_model(cfg)
    encoder, st, mt, unit = model.encoder, model.st_decoder, model.mt_decoder, model.unit_decoder
    rows = [
        ("encoder", count(encoder)),
        ("  subsampler", count(encoder.subsampler)),
        (f"  {len(encoder.layers)} Emformer layers of {count(encoder.layers[0]):,}", count(encoder.layers)),
        ("ASR CTC head", count(model.asr_head)),
        ("ST CTC head", count(st)),
        (f"  {len(st.layers)} causal layers of {_each(st)}", count(st.layers)),
        ("  output", count(st.head)),
        ("MT decoder", count(mt)),
        ("  embedding", count(mt.embedding)),
        (f"  {len(mt.layers)} decoder layers of {_each(mt)}", count(mt.layers)),
        ("  output", count(mt.output)),
        ("unit decoder", count(unit)),
        ("  input projection", count(unit.input)),
        (f"  {len(unit.layers)} decoder layers of {_each(unit)}", count(unit.layers)),
        ("  output", count(unit.output)),
        ("model", count(model)),
    ]
    if vocoder:
        from echostream.models.decoders.vocoder import CodeHiFiGAN, VocoderConfig

        rows.append((f"vocoder ({vocoder})", count(CodeHiFiGAN(VocoderConfig.preset(vocoder, cfg.num_units)))))
    return rows


def _each(part) -> str:
    return f"{count(part.layers[0]) if len(part.layers) else 0:,}"


def check() -> list[tuple[str, int, int]]:
    """(what, counted, stated in the design) for every count the design states."""
    import dataclasses

    from echostream.models.echostream_encoder import EchoStreamEncoder

    default = EchoStreamConfig()
    encoder = EchoStreamEncoder(default)
    without_memory = EchoStreamEncoder(dataclasses.replace(default, memory_size=0))
    pre_norm = EchoStreamEncoder(dataclasses.replace(default, memory_size=0, encoder_normalize_before=True))
    counted = [encoder.subsampler, encoder.layers[0], encoder, without_memory, pre_norm]
    return [(name, count(module), stated) for (name, stated), module in zip(DESIGN.items(), counted)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "echostream count-parameters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--arch", choices=ARCHITECTURES, default="echostream", help="a registered architecture")
    which.add_argument("--config", metavar="YAML", help="a configuration file")
    parser.add_argument("--vocoder", choices=("v1", "small"), help="count a vocoder of this preset too")
    parser.add_argument("--check", action="store_true", help="compare with the design's counts; exit 1 if they differ")
    args = parser.parse_args(argv)
    try:
        cfg = EchoStreamConfig.from_yaml(args.config) if args.config else ARCHITECTURES[args.arch]()
        rows = table(cfg, args.vocoder)
    except EchoStreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.config or args.arch}: parameters per component")
    for name, number in rows:
        print(f"{name:<44}{number:>13,}")
    differing = 0
    if args.check:
        print("design's default configuration: counted, stated")
        for name, number, stated in check():
            differing += number != stated
            print(f"{name:<44}{number:>13,}{stated:>13,}  {'equal' if number == stated else 'DIFFERS'}")
    return 1 if differing else 0
