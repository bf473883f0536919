"""SentencePiece models and dictionaries in fairseq's format."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from echostream.errors import ManifestError, require
from echostream.files import replacing, write_text


def train_subwords(
    texts: Sequence[str], model: Path, dictionary: Path, vocab_size: int, seed: int = 1, coverage: float = 0.9999
) -> int:
    """Train a unigram model on ``texts`` and write it with its dictionary; returns the number of pieces.

    The text is taken as it is (``normalize_text`` has been over it), case and punctuation included.

    Raises:
        ManifestError: the text is too small for the vocabulary; the message says how many pieces it allows.
    """
    sentencepiece = require("sentencepiece", "all")
    sentencepiece.set_random_generator_seed(seed)
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=buffer,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=coverage,
            normalization_rule_name="identity",
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        limit = re.search(r"value <= (\d+)", str(error))
        raise ManifestError(
            f"{len(texts)} sentences do not give {vocab_size} SentencePiece pieces; "
            + (f"at most {limit[1]} (--vocab-size)" if limit else str(error).splitlines()[0])
        ) from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    counts = Counter(piece for text in texts for piece in processor.encode(text, out_type=str))
    with replacing(model) as file:
        file.write(buffer.getvalue())
    # Pieces keep the model's order, so that the file says the same whatever the counts are.
    lines = [
        f"{piece} {counts[piece]}\n"
        for i, piece in enumerate(pieces)
        if not (processor.is_unknown(i) or processor.is_control(i))
    ]
    write_text(dictionary, "".join(lines))
    return len(lines)


def write_unit_dictionary(path: Path, num_units: int) -> None:
    write_text(path, "".join(f"{unit} 1\n" for unit in range(num_units)))
