"""The command ``echostream``: translate recordings and live speech, export checkpoints; and ``commands``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from echostream import __version__, import_whisper, vocode
from echostream.commands import PROGRAMS, run
from echostream.files import run_command

EXAMPLES = """examples:
  echostream translate talk.wav -o english.wav
  echostream translate talk.mp3 --subtitles talk.srt --segmenter punctuation+pause
  echostream translate talk.wav -o english.wav --policy alignatt --alignatt-frames 12 --timeline talk.png
  echostream export bundles/es-en -o es-en-int8 --int8
  echostream translate talk.wav -o english.wav --checkpoint-dir es-en-int8
  arecord -f S16_LE -r 16000 | echostream translate - | aplay
  arecord -t raw -f S16_LE -r 48000 | echostream translate - --input-rate 48000 -o - | aplay -t raw -f S16_LE -r 16000
"""
TRANSLATE = """Translate speech while it is heard.

The text of the sentence in the making is shown on the terminal (standard error); -o takes the speech. Nothing that
was written or said is taken back. Ctrl-C ends the source: what was heard is translated and all files are completed;
a second Ctrl-C stops at once. An output that is the input, or another output, is refused.
"""
PIPES = """standard input and output:
  Input '-' is raw PCM, signed 16-bit little-endian, at --input-rate, unless it starts as a format that says its own
  (WAV, MP3, FLAC, Ogg, AU, AIFF, sox -p ...; m4a, WebM and others by ffmpeg, where that is installed).
  Output '-' is 16-bit mono at the vocoder's rate (16000 Hz): raw PCM if the input is raw, with a WAV header otherwise;
  --output-format decides differently. With input '-' and standard output in a pipe, '-o -' need not be said.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0; 1 after an error; 130 after Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in PROGRAMS:
        return run_command(lambda: run(argv[0], argv[1:]))
    args = build_parser().parse_args(argv)
    return run_command(lambda: args.run(args))


def build_parser() -> argparse.ArgumentParser:
    from echostream.checkpoint import BACKENDS
    from echostream.serve import command as serving
    from echostream.streaming.options import add_policy_arguments, add_segmenter_arguments

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="echostream",
        description="Simultaneous speech-to-speech translation.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"echostream {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    translate = commands.add_parser(
        "translate",
        help="translate a recording, or live speech through a pipe",
        description=TRANSLATE,
        epilog=f"{PIPES}\n{EXAMPLES}",
        formatter_class=raw,
    )
    translate.set_defaults(run=run_translate)
    translate.add_argument("input", help="recording (wav, flac, ogg, mp3 ...; any rate and channels), or - for a pipe")
    out = translate.add_argument_group("output")
    out.add_argument("-o", "--output", metavar="FILE", help="translated speech: .wav, .flac, .ogg, or - for a pipe")
    out.add_argument("--subtitles", type=Path, metavar="FILE", help="translation as .srt or .vtt, timed by the source")
    out.add_argument("--timeline", type=Path, metavar="PNG", help="picture of what was said and what came out when")
    out.add_argument(
        "--timeline-seconds", type=float, default=60.0, metavar="S", help="how much of it is drawn (default: 60)"
    )
    out.add_argument(
        "--no-gaps", action="store_true", help="in a file: no silences that keep the speech on the source's clock"
    )
    out.add_argument("--output-format", choices=("raw", "wav"), help="of -o - (default: as the input came)")
    out.add_argument("-q", "--quiet", action="store_true", help="no text on the terminal, errors and warnings only")
    source = translate.add_argument_group("input")
    source.add_argument("--input-rate", type=int, default=16000, metavar="HZ", help="of raw PCM (default: 16000)")
    source.add_argument("--input-channels", type=int, default=1, metavar="N", help="of raw PCM, averaged (default: 1)")
    source.add_argument("--input-raw", action="store_true", help="it is raw PCM, whatever its first bytes look like")
    source.add_argument("--realtime", action="store_true", help="read a recording no faster than it was spoken")
    model = translate.add_argument_group("model")
    model.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="default: the model shipped with EchoStream")
    model.add_argument(
        "--backend",
        choices=BACKENDS,
        help="refuse a model of the other kind (default: torch for a checkpoint, onnx for an exported directory)",
    )
    model.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu; exported: cpu only)")
    # More threads hardly help matrices this small, and on a busy machine they wait for each other.
    model.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    add_policy_arguments(translate.add_argument_group("when to write", "Knobs belong to the policy named before them."))
    add_segmenter_arguments(translate.add_argument_group("where sentences end"))

    export = commands.add_parser(
        "export",
        help="make a directory of ONNX graphs of a checkpoint, to be run without torch",
        description="Write every streaming stage as an ONNX graph, with all that a session needs beside them. It runs "
        "where torch is not installed (pip install 'echostream[onnx]'), by the same commands. The graphs are compared "
        "with the torch model.",
    )
    export.set_defaults(run=run_export)
    export.add_argument(
        "checkpoint", type=Path, help="a checkpoint directory, which `echostream export-checkpoint` makes of a training"
    )
    export.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="directory to write")
    export.add_argument("--int8", action="store_true", help="weights of encoder and decoders as int8: faster, inexact")
    export.add_argument("--no-vocoder", action="store_true", help="text and units only")

    server = commands.add_parser(
        "serve",
        help="translate many live streams: a page with a microphone, and WebSockets",
        description=serving.DESCRIPTION,
        formatter_class=raw,
    )
    server.set_defaults(run=run_serve)
    serving.add_arguments(server)

    speak = commands.add_parser(
        "vocode", help="speak a file of units", description=vocode.DESCRIPTION, formatter_class=raw
    )
    speak.set_defaults(run=vocode.vocode)
    vocode.add_arguments(speak)

    whisper = commands.add_parser(
        "import-whisper",
        help="make a checkpoint directory from a Whisper model, to train on from",
        description=import_whisper.DESCRIPTION,
        formatter_class=raw,
    )
    whisper.set_defaults(run=run_import_whisper)
    import_whisper.add_arguments(whisper)

    info = commands.add_parser(
        "info",
        help="what is in a checkpoint",
        description="Show what is in a checkpoint: languages, components and parameters, vocabularies, look-ahead, "
        "policy defaults, sizes.",
    )
    info.set_defaults(run=run_info)
    info.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        help="a checkpoint directory, an exported one, or a .pt file of fairseq-train (default: the model shipped with "
        "EchoStream)",
    )
    info.add_argument("--json", action="store_true", help="the same as JSON")

    for name, (_, purpose) in PROGRAMS.items():  # listed here, parsed by themselves
        commands.add_parser(name, help=purpose, add_help=False)
    return parser


def run_translate(args: argparse.Namespace) -> int:
    from echostream.checkpoint.layout import checkpoint_directory
    from echostream.translate import translate

    args.checkpoint_dir = checkpoint_directory(args.checkpoint_dir)
    return translate(args)


def run_serve(args: argparse.Namespace) -> int:
    from echostream.serve.command import serve

    return serve(args)


def run_export(args: argparse.Namespace) -> int:
    from echostream.checkpoint.layout import checkpoint_directory
    from echostream.export.directory import export_directory

    path = args.checkpoint if args.checkpoint.is_file() else None
    directory, differences = export_directory(
        path or checkpoint_directory(args.checkpoint), args.output, int8=args.int8, vocoder=not args.no_vocoder
    )
    for stage, difference in differences.items():
        print(f"{stage:<14} differs from torch by {difference:.0e}{' in single precision' if args.int8 else ''}")
    sizes = {path: path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        if path.suffix in (".onnx", ".safetensors"):
            print(f"{size / 1e6:8.2f} MB  {path.relative_to(directory)}")
    print(f"{sum(sizes.values()) / 1e6:8.2f} MB  {directory}")
    return 0


def run_import_whisper(args: argparse.Namespace) -> int:
    directory = import_whisper.import_whisper(args)
    print(f"{sum(path.stat().st_size for path in directory.iterdir()) / 1e6:8.2f} MB  {directory}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    from echostream.checkpoint.layout import checkpoint_directory
    from echostream.info import describe, show

    path = args.checkpoint if args.checkpoint is not None and args.checkpoint.is_file() else None
    described = describe(path or checkpoint_directory(args.checkpoint))
    print(json.dumps(described, indent=2) if args.json else show(described), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
