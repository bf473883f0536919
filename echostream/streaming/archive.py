"""A running session as a file: plain arrays in a npz archive, with a version and the model's digest; no pickles."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import numpy as np

from echostream.audio.features import FeatureState
from echostream.audio.resample import ResampleState
from echostream.errors import SessionError
from echostream.streaming.clock import ClockState
from echostream.streaming.engine import Engine, Stream
from echostream.streaming.segmenter import Spoken
from echostream.streaming.sentence import Sentence
from echostream.streaming.track import Track

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

FORMAT = "echostream-session/2"
_SENTENCE_LISTS = {"tokens": "i8", "frames": "i8", "times": "f8", "unit_frames": "i8", "units": "i8"}
_SENTENCE_NUMBERS = (
    "index", "start", "extended", "begun", "source_told", "inputs_read", "last_symbol", "first_audio_s",
)
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, zipfile.BadZipFile)


def identity(engine: Engine, bundle: Bundle) -> dict[str, Any]:
    """What a saved session and the one that takes it up must have in common."""
    return {
        "format": FORMAT,
        "model": bundle.digest,
        "policy": repr(engine.policy),
        "segmenter": engine.segmenter.name,
        "settings": asdict(engine.settings),
    }


def write(path: str | Path, engine: Engine, bundle: Bundle, track: Track, model: dict[str, np.ndarray]) -> None:
    """Write a track and the model's arrays for it."""
    clock, stream, sentence = track.clock, track.stream, track.stream.sentence
    values: dict[str, Any] = {
        "clock": [clock.rate, clock.due, clock.decisions],
        "waiting": [clock.resample.count, clock.resample.phase, clock.fbank.count],
        "stream": [stream.frames, stream.source_symbol, stream.target_symbol],
        "finished": track.finished,
        "seconds": track.seconds,
        "elapsed_s": track.elapsed_s,
    }
    arrays = {
        "clock.samples": clock.samples,
        "clock.features": clock.features,
        "clock.resample": clock.resample.samples,
        "clock.fbank": clock.fbank.samples,
        "clock.heard": clock.heard,
        **{f"audio.{name}": array for name, array in (stream.audio or {}).items()},
    }
    if sentence is not None:
        values["sentence"] = {name: getattr(sentence, name) for name in _SENTENCE_NUMBERS}
        values["memory"] = list(sentence.memory)
        arrays["stream.recent"] = stream.recent
        arrays["sentence.inputs"] = sentence.inputs
        arrays["sentence.samples"] = np.concatenate([np.zeros(0, np.float32), *sentence.samples])
        for name in ("source", "target"):
            spoken = [(s.token, s.frame) for s in getattr(sentence, name)]
            arrays[f"sentence.{name}"] = np.array(spoken, dtype=np.int64).reshape(-1, 2)
        for name, kind in _SENTENCE_LISTS.items():
            arrays[f"sentence.{name}"] = np.array(getattr(sentence, name), dtype=kind)
    arrays.update({f"model.{name}": array for name, array in model.items()})
    header = json.dumps({**identity(engine, bundle), **values})
    with open(path, "wb") as file:
        np.savez(file, header=np.frombuffer(header.encode(), dtype=np.uint8), **arrays)


def read(path: str | Path, engine: Engine, bundle: Bundle) -> tuple[Track, dict[str, np.ndarray]]:
    """The track and the model's arrays of a file.

    Raises:
        SessionError: it is missing, damaged, or of another version, model, policy or setting.
    """
    arrays = fit(path, lambda: _load(path))
    values = fit(path, lambda: json.loads(arrays.pop("header").tobytes()))
    for name, expected in identity(engine, bundle).items():
        if not isinstance(values, dict) or values.get(name) != expected:
            found = values.get(name) if isinstance(values, dict) else None
            raise SessionError(f"saved session {path} was made with {name} {found!r}, not {expected!r}")
    track = fit(path, lambda: _track(values, arrays))
    return track, {name.removeprefix("model."): a for name, a in arrays.items() if name.startswith("model.")}


def _load(path: str | Path) -> dict[str, np.ndarray]:
    if not Path(path).is_file():
        raise SessionError(f"saved session {path} does not exist")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _track(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> Track:
    resample_count, phase, fbank_count = values["waiting"]
    clock = ClockState(
        *values["clock"],
        arrays["clock.samples"],
        ResampleState(arrays["clock.resample"], resample_count, phase),
        FeatureState(arrays["clock.fbank"], fbank_count),
        arrays["clock.features"],
        arrays["clock.heard"],
    )
    frames, source_symbol, target_symbol = values["stream"]
    stream = Stream(frames, None, source_symbol, target_symbol)
    if "sentence" in values:
        samples = arrays["sentence.samples"]
        lists = {name: arrays[f"sentence.{name}"].tolist() for name in _SENTENCE_LISTS}
        spoken = {
            name: tuple(Spoken(*pair) for pair in arrays[f"sentence.{name}"].tolist()) for name in ("source", "target")
        }
        audio = {name.removeprefix("audio."): array for name, array in arrays.items() if name.startswith("audio.")}
        stream = replace(
            stream,
            audio=audio,
            recent=arrays["stream.recent"],
            sentence=Sentence(
                memory=tuple(values["memory"]),
                inputs=arrays["sentence.inputs"],
                samples=[samples] if len(samples) else [],
                **{name: values["sentence"][name] for name in _SENTENCE_NUMBERS},
                **lists,
                **spoken,
            ),
        )
    return Track(0, clock, stream, values["finished"], values["seconds"], values["elapsed_s"])


def fit(path: str | Path, work: Callable[[], Any]) -> Any:
    """Do ``work`` on a file's contents; whatever goes wrong is the file's fault.

    Raises:
        SessionError: naming the file and the first thing that did not fit.
    """
    try:
        return work()
    except SessionError:
        raise
    except _DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise SessionError(f"saved session {path} is damaged or of another model ({reason}); start a new one") from None
