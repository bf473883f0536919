"""Segmenters by their names.

| name | ends a sentence at |
|---|---|
| ``punctuation`` | the model's own full stop in the ST CTC text |
| ``ct`` | a full stop that a CT-Transformer punctuation model sets into the ST or ASR text (``ct_transformer.py``) |
| ``pause`` | a pause of the speaker, by silero's voice activity detector (``pause.py``) |
| ``none`` | the end of the recording only |

Several are joined by a plus sign (``punctuation+pause``): the first end that any of them finds counts. With any of them
a gate lets no word count where silero's detector hears nobody speak (``pause.SpeechGate``), unless it is switched off.
"""

from __future__ import annotations

from pathlib import Path

from echostream.errors import ConfigError
from echostream.streaming.segmenters.base import CombinedSegmenter, NoSegmenter, Segmenter
from echostream.streaming.segmenters.ct_transformer import CTPunctuation, CTSegmenter
from echostream.streaming.segmenters.pause import PauseSegmenter
from echostream.streaming.segmenters.punctuation import PunctuationSegmenter
from echostream.streaming.segmenters.silero import load_silero
from echostream.text import Vocabulary

SEGMENTERS = ("punctuation", "ct", "pause", "none")
CT_SIDES = ("target", "source")


def make_segmenter(
    name: str,
    source_dict: Vocabulary,
    target_dict: Vocabulary,
    punctuation_model: str | Path | None = None,
    punctuation_side: str = "target",
    vad_model: str | Path | None = None,
    min_pause_ms: int = 600,
) -> Segmenter:
    """A segmenter by its name, or several joined by plus signs.

    Args:
        source_dict, target_dict: the model's dictionaries.
        punctuation_model: directory or .onnx file of the CT-Transformer, for ``ct``.
        punctuation_side: the text it reads, ``target`` (ST CTC) or ``source`` (ASR CTC).
        vad_model: silero's .onnx file, for ``pause``; default: the network that comes with the package.
        min_pause_ms: milliseconds of silence that end a sentence, for ``pause``.

    Raises:
        ConfigError: an unknown name or side, or ``ct`` without its model.
        CheckpointError: a model is missing or of another kind. MissingExtraError: ONNX Runtime is not installed.
    """
    parts: list[Segmenter] = []
    names = name.split("+")
    for part in names:
        if part not in SEGMENTERS:
            raise ConfigError(f"unknown segmenter {part!r}; known: {', '.join(SEGMENTERS)}, and joined by '+'")
        if names.count(part) > 1 or (part == "none" and len(names) > 1):
            raise ConfigError(f"segmenter {name!r} makes no sense; join different ones, and 'none' with none")
        if part == "punctuation":
            parts.append(PunctuationSegmenter(target_dict))
        elif part == "none":
            parts.append(NoSegmenter())
        elif part == "pause":
            parts.append(PauseSegmenter(load_silero(vad_model), min_pause_ms))
        else:
            if punctuation_model is None:
                raise ConfigError("segmenter 'ct' needs a CT-Transformer's directory; give it as punctuation_model")
            if punctuation_side not in CT_SIDES:
                raise ConfigError(f"punctuation_side is {punctuation_side!r}; it must be target or source")
            vocabulary = target_dict if punctuation_side == "target" else source_dict
            parts.append(CTSegmenter(CTPunctuation.load(punctuation_model), vocabulary, punctuation_side))
    return parts[0] if len(parts) == 1 else CombinedSegmenter(tuple(parts))
