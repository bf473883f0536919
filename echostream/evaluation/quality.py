"""Quality metrics: thin calls of sacrebleu and jiwer, with the normalisation that each figure is read after."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from echostream.errors import EchoStreamError, require

TOKENIZER = "13a"  # sacrebleu's default
_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}  # as sacrebleu chooses by the language pair
# Scripts without spaces between words, whose letters are counted in place of them: Thai to Tibetan, Khmer, kana, Han.
_UNSPACED = re.compile(r"([\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")


def tokenizer_for(language: str) -> str:
    """sacrebleu's tokenizer for a target language, with or without its region: ``zh`` → ``zh``, ``en-GB`` → ``13a``."""
    return _TOKENIZERS.get(re.split("[-_]", language)[0].lower(), TOKENIZER)


def bleu(hypotheses: Sequence[str], references: Sequence[str], tokenizer: str = TOKENIZER) -> float:
    """Corpus BLEU (sacrebleu, case and punctuation count), 0 to 100.

    Args:
        tokenizer: of sacrebleu: ``13a``, ``zh``, ``ja-mecab``, ``char``, ...

    Raises:
        EchoStreamError: sacrebleu has no such tokenizer, or lacks what it needs.
    """
    return float(corpus_bleu(hypotheses, references, tokenizer).score)


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str], tokenizer: str, extra: str = "simuleval") -> Any:
    """The same with its counts, as sacrebleu's BLEUScore; ``extra`` is what brings sacrebleu along."""
    _check(hypotheses, references)
    score = require("sacrebleu", extra).corpus_bleu
    try:
        return score(list(hypotheses), [list(references)], tokenize=tokenizer)
    except (RuntimeError, ImportError, KeyError, AssertionError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EchoStreamError(f"sacrebleu's tokenizer {tokenizer!r} cannot be used: {reason}") from None


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 (Popović, 2015; sacrebleu), 0 to 100."""
    _check(hypotheses, references)
    return float(require("sacrebleu", "simuleval").corpus_chrf(list(hypotheses), [list(references)]).score)


def asr_bleu(
    transcripts: Sequence[str], references: Sequence[str], tokenizer: str = TOKENIZER, numbers: bool = True
) -> float:
    """BLEU of what an ASR heard, both sides in ``spoken_form``: case and marks of a transcript are the ASR's."""
    heard, true = ([spoken_form(text, numbers) for text in texts] for texts in (transcripts, references))
    return bleu(heard, true, tokenizer)


def word_error_rate(hypotheses: Sequence[str], references: Sequence[str], numbers: bool = True) -> float:
    """Word errors in percent of the references' words, both sides through ``spoken_words``; may exceed 100."""
    return _error_rate([spoken_words(h, numbers) for h in hypotheses], [spoken_words(r, numbers) for r in references])


def unit_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Unit errors in percent of the references' units; both are lists of unit numbers joined by spaces."""
    return _error_rate(hypotheses, references)


def spoken_form(text: str, numbers: bool = True) -> str:
    """What is left of a sentence when it is heard: lower case, no punctuation but the apostrophe, one space a gap.

    Args:
        numbers: write digits as English words, as recognisers are free to choose either.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    if numbers:
        text = re.sub(r"\d+(?:st|nd|rd|th)?\b", lambda match: f" {_engine().number_to_words(match[0])} ", text)
    letters = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join("".join(letters).split())


def spoken_words(text: str, numbers: bool = True) -> str:
    """``spoken_form`` with a space between two words, and around every letter of a script that writes none."""
    return " ".join(_UNSPACED.sub(r" \1 ", spoken_form(text, numbers)).split())


@functools.cache
def _engine():
    return require("inflect", "simuleval").engine()


def _error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    _check(hypotheses, references)
    jiwer = require("jiwer", "simuleval")
    kept = [(h, r) for h, r in zip(hypotheses, references, strict=True) if r.strip()]  # jiwer refuses empty references
    inserted = sum(len(h.split()) for h, r in zip(hypotheses, references, strict=True) if not r.strip())
    if not kept:
        raise EchoStreamError("an error rate needs at least one reference that is not empty")
    result = jiwer.process_words([r for _, r in kept], [h for h, _ in kept])
    errors = result.substitutions + result.deletions + result.insertions + inserted
    return 100.0 * errors / (result.substitutions + result.deletions + result.hits)


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise EchoStreamError(f"{len(hypotheses)} outputs cannot be scored against {len(references)} references")
