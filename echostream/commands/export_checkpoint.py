"""Turn fairseq checkpoints, a corpus directory and a vocoder into one checkpoint directory for streaming.

Several checkpoints are averaged, for instance the five best:
    echostream export-checkpoint --checkpoint runs/es-en/checkpoint.best_bleu_*.pt \
        --data data/es-en --vocoder runs/vocoder/vocoder.pt --output bundles/es-en

or what a training made and what it began with, the encoder alone, the rest being the first one's:
    echostream export-checkpoint --checkpoint runs/es-en/checkpoint_last.pt es-en --shares 0.7 0.3 --parts encoder ...
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from echostream.checkpoint import load_bundle, save_bundle
from echostream.checkpoint.fairseq import average_checkpoints
from echostream.checkpoint.layout import FILES
from echostream.config import EchoStreamConfig
from echostream.constants import NUM_SPECIALS
from echostream.errors import EchoStreamError
from echostream.models.decoders.vocoder_checkpoint import save_vocoder
from echostream.text import Vocabulary
from echostream.text_file import read_text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "echostream export-checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="PT", help="fairseq checkpoints to average")
    parser.add_argument("--shares", nargs="+", type=float, metavar="S", help="of each in the mean (default: the same)")
    parser.add_argument("--parts", nargs="+", default=[], help="what is averaged, such as encoder (default: all)")
    parser.add_argument("--data", required=True, type=Path, help="corpus directory (echostream prepare)")
    parser.add_argument(
        "--vocoder", type=Path,
        help="vocoder checkpoint, or a model's directory whose voice it shall have (its units must be the corpus's); "
        "without it the bundle does not speak",
    )  # fmt: skip
    parser.add_argument("--vocoder-config", type=Path, help="its configuration (default: beside the checkpoint)")
    parser.add_argument("--config", type=Path, help="model configuration (YAML), where the checkpoint holds none")
    parser.add_argument(
        "--policy",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="defaults of the policy for this model, such as lagging_k1=1 stride_n1=1 chunk_ms=320",
    )
    parser.add_argument("--card", type=Path, help="text to become MODEL_CARD.md")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    args = parser.parse_args(argv)
    try:
        export(args)
    except EchoStreamError as error:
        sys.exit(f"error: {error}")


def export(args: argparse.Namespace) -> None:
    state, config = average_checkpoints(args.checkpoint, args.shares, args.parts)
    if args.config is not None:
        config = EchoStreamConfig.from_yaml(args.config)
    if config is None:
        raise EchoStreamError(f"{args.checkpoint[0]} does not tell the model's configuration; give it with --config")
    # Sizes of vocabularies follow the dictionaries; fairseq's arguments do not hold them.
    dictionaries = ("source_dict", "target_dict", "unit_dict")
    sizes = {name: len(Vocabulary.load(args.data / FILES[name])) for name in dictionaries}
    config = dataclasses.replace(
        config,
        asr_vocab_size=sizes["source_dict"],
        st_vocab_size=sizes["target_dict"],
        mt_vocab_size=sizes["target_dict"],
        num_units=sizes["unit_dict"] - NUM_SPECIALS,
    )
    card = read_text(args.card) if args.card else ""
    with TemporaryDirectory() as folder:
        vocoder = voice_files(args, Path(folder))
        save_bundle(args.output, state, config, args.data, vocoder, dict(map(parse_setting, args.policy)), card)
    load_bundle(args.output)  # what cannot be read back must not be shipped
    for path in sorted(args.output.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
    print(f"{sum(path.stat().st_size for path in args.output.iterdir()) / 1e6:8.2f} MB  {args.output}")


def voice_files(args: argparse.Namespace, folder: Path) -> tuple[Path, Path] | None:
    """Checkpoint and configuration of the voice; those of a model's voice are written into ``folder``.

    Raises:
        EchoStreamError: the model has no voice.
    """
    if args.vocoder is None:
        return None
    if args.vocoder.is_dir():
        voice = load_bundle(args.vocoder, backend="torch").vocoder
        if voice is None:
            raise EchoStreamError(f"the model {args.vocoder} has no voice")
        files = folder / "vocoder.pt", folder / "vocoder.json"
        save_vocoder(voice, *files)
        return files
    beside = args.vocoder.with_suffix(".json")  # ours; the field calls it config.json
    beside = beside if beside.exists() else args.vocoder.with_name("config.json")
    return args.vocoder, args.vocoder_config or beside


def parse_setting(text: str) -> tuple[str, int | float | str]:
    """``key=value`` with the value as a number where it is one."""
    key, separator, value = text.partition("=")
    if not separator:
        raise EchoStreamError(f"--policy {text!r} is not of the form KEY=VALUE")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value
