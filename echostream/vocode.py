"""``echostream vocode``: speak unit files, with the shipped voice or any CodeHiFiGAN."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from echostream.errors import CheckpointError, UnitError, require
from echostream.files import keep_apart
from echostream.text_file import read_text

DESCRIPTION = """Speak units: one sequence of unit ids a line, separated by spaces.

Several sequences become one recording with pauses between them. If the output is a directory (it exists, or its name
ends with a slash), each sequence becomes a recording of its own there: 0001.wav, 0002.wav ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("units", help="unit file, or - for standard input")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=".wav, .flac, .ogg ..., or a directory")
    parser.add_argument("--pause", type=float, default=0.3, metavar="S", help="between sequences (default: 0.3)")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--durations", metavar="FILE", help="frames of 20 ms of each unit, line by line as the units")
    lengths.add_argument(
        "--repeated", action="store_true", help="units are not deduplicated: each lasts one frame of 20 ms"
    )
    parser.add_argument("--speaker", type=int, metavar="N", help="of a multi-speaker vocoder")
    add_vocoder_arguments(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="errors only")


def add_vocoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Which vocoder, and where it computes."""
    parser.add_argument(
        "--vocoder",
        type=Path,
        metavar="PATH",
        help="checkpoint, or directory with vocoder.pt and vocoder.json (default: the voice shipped with EchoStream)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="JSON", help="of the checkpoint (default: .json of its name, or config.json)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")


def vocode(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UnitError: a line is empty, holds no numbers or a unit that the vocoder does not know; durations do not fit.
        ConfigError, CheckpointError: the vocoder cannot be loaded, or its rate is not 16 kHz.
        AudioError: the output cannot be written.
        OutputError: it is one of the inputs.
    """
    torch = require("torch", "simuleval")
    from echostream.output.speech import SpeechFile
    from echostream.streaming.events import Waveform

    torch.set_num_threads(args.threads)
    inputs = {"the units": None if args.units == "-" else args.units, "--durations": args.durations}
    inputs |= {"--vocoder": args.vocoder, "--config": args.config}
    keep_apart({"-o": args.output}, inputs)
    if args.pause < 0:
        raise UnitError(f"--pause is {args.pause:g}; it must be 0 s or more")
    units = read_sequences(args.units)
    durations: list[list[int] | None] = [None] * len(units)
    if args.durations is not None:
        durations = [*read_sequences(args.durations)]
        if len(durations) != len(units):
            raise UnitError(f"{args.durations} has {len(durations)} lines, {args.units} has {len(units)}")
    elif args.repeated:
        durations = [[1] * len(row) for row in units]
    model = load(args.vocoder, args.config, args.device)
    rate = model.config.sampling_rate

    def spoken() -> Iterator[np.ndarray]:
        speaker = None if args.speaker is None else torch.tensor([args.speaker], device=args.device)
        for number, (row, lasts) in enumerate(tqdm(list(zip(units, durations)), "speaking", disable=args.quiet), 1):
            try:
                if lasts is not None and len(lasts) != len(row):
                    raise UnitError(f"{len(row)} units with {len(lasts)} durations")
                frames = None if lasts is None else torch.tensor([lasts], device=args.device)
                with torch.inference_mode():
                    waveform, _ = model(torch.tensor([row], device=args.device), durations=frames, speakers=speaker)
            except UnitError as error:
                raise UnitError(f"{args.units}, line {number}: {error}") from None
            yield waveform[0].float().cpu().numpy()

    apart = args.output.endswith("/") or Path(args.output).is_dir()
    file, seconds = None, 0.0
    try:
        for number, samples in enumerate(spoken()):
            if file is None or apart:
                if file is not None:
                    file.close()
                path = Path(args.output, f"{number + 1:04d}.wav") if apart else args.output
                file = SpeechFile(path, rate, gaps=False)
            elif args.pause:
                samples = np.concatenate([np.zeros(round(args.pause * rate), np.float32), samples])
            file.take(Waveform(sentence=number, source_time_s=0.0, samples=samples, sample_rate=rate))
            seconds += len(samples) / rate
    finally:
        if file is not None:
            file.close()
    if not args.quiet:
        print(f"{len(units)} sequences, {seconds:.1f} s: {args.output}", file=sys.stderr)
    return 0


def read_sequences(path: str) -> list[list[int]]:
    """Whole numbers, a sequence a line; empty lines at the end do not count.

    Raises:
        UnitError: the file cannot be read or is empty, or a line holds nothing, or something else.
    """
    if path != "-" and not Path(path).is_file():
        raise UnitError(f"{path} cannot be read: there is no such file")
    text = sys.stdin.read().removeprefix("\ufeff") if path == "-" else read_text(path, UnitError)
    if not text.strip():
        raise UnitError(f"{path} is empty; it must hold unit ids separated by spaces")
    rows = []
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        if not line.strip():
            raise UnitError(f"{path}, line {number} is empty; there is nothing to speak")
        for word in line.split():
            if not word.isdecimal():
                raise UnitError(f"{path}, line {number}: {word!r} is no unit id; ids are whole numbers from 0 up")
        rows.append([int(word) for word in line.split()])
    return rows


def load(vocoder: Path | None, config: Path | None, device: str = "cpu"):
    """The vocoder of a directory or checkpoint file, by default the shipped one.

    Raises:
        ConfigError, CheckpointError: it cannot be loaded, or no configuration lies beside it.
    """
    from echostream.checkpoint import DEFAULT_BUNDLE, load_bundle
    from echostream.checkpoint.layout import EXPORTED_CONFIG, FILES
    from echostream.models.decoders.vocoder_checkpoint import load_vocoder

    vocoder = DEFAULT_BUNDLE if vocoder is None else vocoder
    if (vocoder / EXPORTED_CONFIG).is_file() and config is None:  # its weights lie with those of the model
        voice = load_bundle(vocoder, device, backend="torch").vocoder
        if voice is None:
            raise CheckpointError(f"the model {vocoder} has no voice")
        return voice
    if vocoder.is_dir():
        checkpoint, beside = vocoder / FILES["vocoder"], [vocoder / FILES["vocoder_config"]]
    else:
        checkpoint, beside = vocoder, [vocoder.with_suffix(".json"), vocoder.parent / "config.json"]
    if config is None:
        config = next((path for path in beside if path.is_file()), None)
        if config is None:
            names = " nor ".join(path.name for path in beside)
            raise CheckpointError(f"{checkpoint.parent} has no {names}; name the vocoder's configuration with --config")
    return load_vocoder(checkpoint, config, device)
