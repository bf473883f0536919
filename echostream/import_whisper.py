"""``echostream import-whisper``: a checkpoint directory whose encoder and text decoder are a Whisper model's."""

from __future__ import annotations

import argparse
from pathlib import Path

from echostream.checkpoint import load_bundle, save_bundle
from echostream.checkpoint.layout import FILES
from echostream.constants import NUM_SPECIALS
from echostream.data.config import DataConfig
from echostream.errors import require
from echostream.text import Vocabulary

DESCRIPTION = """Make a checkpoint directory from a Whisper model of any size.

SOURCE is base (multilingual Whisper base, from the packages of the extra corpus), a directory with CTranslate2's
model.bin or Hugging Face's model.safetensors, or OpenAI's .pt file; its tokenizer lies beside it. The encoder becomes
an Emformer of the same weights that hears segments instead of 30 s; the text decoder is cut to the target vocabulary of
a corpus directory. CTC heads and unit decoder are new, and the encoder has not learnt to do without the future yet:
train on from it (--encoder-init, --decoder-init; configs/whisper).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="Whisper model: base, a directory, or OpenAI's .pt file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="corpus directory (echostream prepare), whose vocabularies the model reads and writes",
    )
    parser.add_argument("--decoder-layers", type=int, metavar="N", help="take so many decoder layers (default: all)")
    parser.add_argument(
        "--segment-length", type=int, default=8, metavar="N", help="frames of 40 ms in a segment (default: 8)"
    )
    parser.add_argument(
        "--right-context-length", type=int, default=8, metavar="N", help="frames of 40 ms of look-ahead (default: 8)"
    )


def import_whisper(args: argparse.Namespace) -> Path:
    """Run the command; returns the directory.

    Raises:
        CheckpointError: SOURCE is no Whisper model. ManifestError: the corpus directory lacks something. ConfigError: a
            length is out of range. MissingExtraError: torch is not installed.
    """
    torch = require("torch", "train")
    from echostream.models.echostream_model import build_echostream_model
    from echostream.models.whisper_init import decoder_weights, encoder_weights, whisper_config
    from echostream.whisper.source import whisper_source
    from echostream.whisper.subwords import piece_origins
    from echostream.whisper.tokens import WhisperBPE, prompt
    from echostream.whisper.weights import read_whisper

    path = whisper_source(args.source)
    whisper = read_whisper(path)
    source, target, units = (
        Vocabulary.load(args.data / FILES[name]) for name in ("source_dict", "target_dict", "unit_dict")
    )
    config = whisper_config(
        whisper.dims,
        asr_vocab_size=len(source),
        st_vocab_size=len(target),
        mt_vocab_size=len(target),
        num_units=len(units) - NUM_SPECIALS,
        mt_decoder_layers=args.decoder_layers or whisper.dims.n_text_layer,
        segment_length=args.segment_length,
        right_context_length=args.right_context_length,
    )
    torch.manual_seed(1)  # of what is new
    model = build_echostream_model(config)
    bpe = WhisperBPE.load(path)
    origins = piece_origins(bpe, target)
    asked = prompt(whisper.dims.n_vocab, bpe.end_of_text, DataConfig.load(args.data).source_lang)
    for part, weights in (
        (model.encoder, encoder_weights(whisper, config)),
        (model.mt_decoder, decoder_weights(whisper, config, origins, asked)),
    ):
        part.load_state_dict({**part.state_dict(), **weights})
    save_bundle(args.output, model.state_dict(), config, args.data)
    load_bundle(args.output)
    return args.output
