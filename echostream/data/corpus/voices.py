"""Who speaks a language: an engine with voices of that language, or an error that says what there is."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from echostream.data.corpus import tts
from echostream.data.corpus.languages import base
from echostream.errors import EchoStreamError, ManifestError

SOURCE_ENGINES = ("kokoro", "pico", "espeak")
TARGET_ENGINES = ("hibari", *SOURCE_ENGINES)
# Kokoro names its voices by the language's letter; its phonemes are espeak-ng's. Japanese (j) and Mandarin (z) want
# other phonemes, which are not here.
KOKORO_LANGUAGES = {
    "en": ("a", "en-us"), "en-us": ("a", "en-us"), "en-gb": ("b", "en-gb"), "es": ("e", "es"), "fr": ("f", "fr-fr"),
    "hi": ("h", "hi"), "it": ("i", "it"), "pt": ("p", "pt-br"),
}  # fmt: skip
_VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")  # of espeak-ng, for any language


class OneVoice:
    """An engine that always speaks in one way: the target side has one speaker."""

    def __init__(self, engine: tts.Engine, voice: tts.Voice):
        self.engine, self.voice = engine, voice
        self.voices, self.version = (voice.name,), f"{engine.version}, voice {voice}"

    def plan(self, row: str, seed: int) -> tts.Voice:
        return self.voice

    def speak(self, text: str, voice: tts.Voice) -> np.ndarray:
        return self.engine.speak(text, voice)


def check(engine: str, language: str, side: str) -> None:
    """Does the engine speak the language at all? For a corpus that would otherwise find out after hours.

    Raises:
        ManifestError: it does not, or the language is not known.
    """
    if engine == "none":
        return
    if not language:
        raise ManifestError(f"the corpus does not tell its {side} language; run the step 'text' with --{side}-lang")
    if engine == "hibari" and base(language) != "en":
        raise ManifestError(f"hibari speaks English only, not {language!r}; take --target-engine {_others(language)}")
    if engine == "kokoro":
        kokoro_language(language)
    elif engine == "pico" and base(language) not in map(base, tts.PICO_VOICES):
        spoken = " ".join(dict.fromkeys(map(base, tts.PICO_VOICES)))
        others = f"--{'target-' * (side == 'target')}engine {_others(language)}"
        raise ManifestError(f"Pico does not speak {language!r}, only {spoken}; take {others}")
    elif engine == "espeak":
        espeak_accents(language)


def source_engine(
    engine: str, language: str, voices: Sequence[str] | None, split: str, kokoro_voices: Path | None
) -> tts.Engine | None:
    """The engine of the source side; None for ``none``.

    Args:
        engine: ``kokoro``, ``pico``, ``espeak`` or ``none``.
        voices: names; by default all that fit the language and the split.
        split: voices kept for tests speak ``test`` alone.
        kokoro_voices: Kokoro's style files.

    Raises:
        ManifestError: the engine, or one of the voices, does not speak the language.
    """
    check(engine, language, "source")
    if engine == "kokoro":
        return _kokoro(language, voices, split, kokoro_voices)
    if engine == "pico":
        return tts.Pico(language, voices or ())
    if engine == "espeak":
        return tts.Espeak(_espeak_voices(language, voices))
    return None


def target_engine(engine: str, language: str, voice: str | None, kokoro_voices: Path | None) -> tts.Engine | None:
    """The one voice of the target side; None for ``none``. Raises as ``source_engine``."""
    check(engine, language, "target")
    if engine == "hibari":
        if voice is not None:
            raise ManifestError(f"hibari has one voice; --target-voice {voice} is for {' or '.join(SOURCE_ENGINES)}")
        return tts.Hibari()
    if engine == "none":
        return None
    if engine == "espeak":
        name = _espeak_voices(language, [voice] if voice else None)[0] if voice else espeak_accents(language)[0]
        return OneVoice(tts.Espeak([name]), tts.Voice(name, speed=160, pitch=50))
    if engine == "pico":
        pico = tts.Pico(language, [voice] if voice else ())
        return OneVoice(pico, tts.Voice(pico.voices[0], pitch=1.0))
    kokoro = _kokoro(language, [voice] if voice else None, "train", kokoro_voices)
    return OneVoice(kokoro, tts.Voice(kokoro.voices[0]))


def kokoro_language(language: str) -> tuple[str, str]:
    """Kokoro's letter and espeak-ng's name of a language.

    Raises:
        ManifestError: Kokoro does not speak it here.
    """
    tag = language.lower().replace("_", "-")
    found = KOKORO_LANGUAGES.get(tag) or KOKORO_LANGUAGES.get(base(tag))
    if found is None:
        spoken = " ".join(name for name in KOKORO_LANGUAGES if "-" not in name)
        raise ManifestError(f"Kokoro speaks {spoken} here, not {language!r}; espeak-ng may: --engine espeak")
    return found


def espeak_accents(language: str) -> list[str]:
    """espeak-ng's own voices of a language, such as ``fr-fr``, ``fr-be``, ``fr-ch``.

    Raises:
        ManifestError: it has none.
        MissingExtraError: espeak-ng is not installed.
    """
    tag = language.lower().replace("_", "-")
    lines = tts._espeak([f"--voices={tag}"], "").decode("utf-8", "replace").split("\n")[1:]
    cells = [line.split() for line in lines if line.strip()]
    names = [c[1].lower() for c in cells if not c[4].startswith(("mb/", "!v/")) and "latn" not in c[1].lower()]
    own = [name for name in names if name == tag or name.startswith(f"{tag}-")]
    # Chinese is called cmn; Cantonese, which stands there too, is another language.
    own = own or [name for name in names if base(name) == base(names[0])]
    if not own:
        raise ManifestError(f"espeak-ng has no voice for {language!r}; espeak-ng --voices lists the languages it has")
    return list(dict.fromkeys(own))


def _espeak_voices(language: str, voices: Sequence[str] | None) -> tuple[str, ...]:
    accents = espeak_accents(language)
    for voice in voices or ():
        if voice.split("+")[0].lower() not in (*accents, base(language)):
            raise ManifestError(f"voice {voice} does not speak {language!r}; espeak-ng has: {', '.join(accents)}")
    return tuple(voices or (f"{accent}+{variant}" for accent in accents for variant in _VARIANTS))


def _kokoro(language: str, voices: Sequence[str] | None, split: str, source: Path | None) -> tts.Kokoro:
    if source is None:
        raise ManifestError("--engine kokoro needs --kokoro-voices: kokoro-js-1.2.1.tgz (npm pack kokoro-js@1.2.1)")
    letter, phonemes = kokoro_language(language)
    for voice in voices or ():
        if not heaviest(voice).startswith(letter):
            raise ManifestError(
                f"Kokoro's voice {voice} does not speak {language!r}; such voices begin with {letter!r}: "
                + (", ".join(kokoro_names(source, letter)) or "none there")
            )
    if not voices and letter == "e":
        voices = tts.KOKORO_TEST_VOICES if split == "test" else tts.KOKORO_TRAIN_VOICES
    voices = voices or kokoro_names(source, letter)
    if not voices:
        raise ManifestError(f"{source} has no Kokoro voice for {language!r}; their names begin with {letter!r}")
    return tts.Kokoro(source, voices, phonemes)


def heaviest(voice: str) -> str:
    """The voice that has the most weight in a blend: ``ef_dora:.6,if_sara:.4`` → ``ef_dora``."""
    parts = [part.partition(":") for part in voice.split(",")]
    return max(parts, key=lambda part: float(part[2] or 1.0))[0]


def kokoro_names(source: Path, letter: str) -> list[str]:
    """The voices of a directory, or of the npm package, whose names begin with a language's letter."""
    if source.is_dir():
        files = [path.name for path in source.iterdir()]
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            files = [Path(name).name for name in tar.getnames()]
    else:
        raise EchoStreamError(f"{source} is neither a directory of Kokoro's voices nor the npm package kokoro-js")
    stems = sorted({name.removesuffix(".bin") for name in files if name.endswith(".bin")})
    return [name for name in stems if name[:1] == letter and name[1:3] in ("f_", "m_")]


def _others(language: str) -> str:
    able = ["espeak"]
    if base(language) in {base(voice) for voice in tts.PICO_VOICES}:
        able.insert(0, "pico")
    if base(language) in KOKORO_LANGUAGES:
        able.insert(0, "kokoro")
    return " or ".join(able)
