"""A running session as a file: plain arrays in a npz archive, with a version and the model's digest; no pickles."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import numpy as np

from echostream.audio.features import FeatureState
from echostream.audio.resample import Resampler, ResampleState, check_rate
from echostream.constants import FRAME_LENGTH, NUM_MEL_BINS, NUM_SPECIALS, SAMPLE_RATE
from echostream.errors import SessionError
from echostream.files import replacing
from echostream.loading import DAMAGE, Rule, check, check_array, parse_json, read_npz, reason, shown
from echostream.streaming.clock import ClockState
from echostream.streaming.engine import Engine, Stream
from echostream.streaming.policy import Draft, Progress
from echostream.streaming.segmenters.base import CTCToken
from echostream.streaming.sentence import Sentence
from echostream.streaming.stream import StreamState

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

FORMAT = "echostream-session/2"
_SENTENCE_LISTS = {"tokens": "i8", "frames": "i8", "times": "f8", "units": "i8"}
_SENTENCE_NUMBERS = (
    "index", "start", "extended", "begun", "source_given", "inputs_read", "last_symbol", "first_audio_s",
)
MOST_HEARD = 1 << 16  # samples or numbers that a segmenter keeps in one array
MOST_STATE = 1e6  # of a state's numbers; larger ones overflow further on
SPARE_BYTES = 64 << 20  # of its arrays, unpacked, beyond twice what the model's own may take
_COUNT, _FRAME = Rule(int, 0, 1 << 48), Rule(int, -1, 1 << 48)
_WHOLE, _SECONDS = Rule(list, 3, 3, of=_COUNT), Rule(float, 0)
# What the header holds, and its section ``sentence``; in range for any model, the model's own limits follow.
_HEADER = {
    "clock": _WHOLE, "waiting": _WHOLE, "stream": _WHOLE, "finished": Rule(bool, needed=True),
    "seconds": Rule(dict, of=_SECONDS, needed=True), "elapsed_s": Rule(float, 0, needed=True),
    "sentence": Rule(dict), "memory": Rule(list, 0, 1 << 16, of=_COUNT),
}  # fmt: skip
_SENTENCE = {
    "index": _COUNT, "start": _COUNT, "extended": _FRAME, "begun": Rule(bool), "source_given": _COUNT,
    "inputs_read": _COUNT, "last_symbol": _COUNT,
}  # fmt: skip


def identity(engine: Engine, bundle: Bundle) -> dict[str, Any]:
    """What a saved session and the one that takes it up must have in common."""
    return {
        "format": FORMAT,
        "model": bundle.digest,
        "policy": repr(engine.policy),
        "segmenter": engine.segmenter.name,
        "settings": asdict(engine.settings),
    }


def write(path: str | Path, engine: Engine, bundle: Bundle, track: StreamState, model: dict[str, np.ndarray]) -> None:
    """Write a track and the model's arrays for it.

    Raises:
        OutputError: the file cannot be written.
    """
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
    with replacing(path) as file:
        np.savez(file, header=np.frombuffer(header.encode(), dtype=np.uint8), **arrays)


def read(path: str | Path, engine: Engine, bundle: Bundle) -> tuple[StreamState, dict[str, np.ndarray]]:
    """The track and the model's arrays of a file.

    Raises:
        SessionError: it is missing, damaged, or of another version, model, policy or setting.
    """
    what = f"saved session {path}"
    most = 2 * engine.config.stream_bytes + SPARE_BYTES
    arrays = read_npz(path, "saved session", SessionError, most, ("header",))
    header = check_array(arrays.pop("header"), f"{what}: header", SessionError, "u", (None,))
    values = parse_json(header.astype(np.uint8).tobytes(), f"{what}: header", SessionError)
    for name, expected in identity(engine, bundle).items():
        if values.get(name) != expected:
            raise SessionError(f"{what} was made with {name} {shown(values.get(name))}, not {expected!r}")
    track = fit(path, lambda: _track(values, arrays, engine, what))
    model = {name.removeprefix("model."): a for name, a in arrays.items() if name.startswith("model.")}
    for name, array in model.items():
        if array.dtype.kind == "f" and not (np.abs(array) <= MOST_STATE).all():
            raise SessionError(f"{what}: model.{name} holds NaN, or numbers that no state holds")
    return track, model


def _track(values: dict[str, Any], arrays: dict[str, np.ndarray], engine: Engine, what: str) -> StreamState:
    """What the header and the arrays say, all of it checked against the engine.

    Raises:
        SessionError: a number is out of range, or an array of another shape.
    """

    def array(name: str, kind: str, *shape: int | None, **options: Any) -> np.ndarray:
        if name not in arrays:
            raise SessionError(f"{what} lacks the array {name!r}")
        if kind == "f" and name != "sentence.times":
            options = {"least": -MOST_STATE, "most": MOST_STATE, **options}
        return check_array(arrays[name], f"{what}: {name}", SessionError, kind, shape, **options)

    check(values, {**_HEADER, **dict.fromkeys(("clock", "waiting", "stream"), replace(_WHOLE, needed=True))}, what,
          SessionError)  # fmt: skip
    clock, stream = _clock(values, array, engine, what), _stream(values, array, engine, what)
    if set(values["seconds"]) != set(StreamState(0, clock).seconds):
        raise SessionError(f"{what}: seconds has the stages {', '.join(map(shown, values['seconds']))}")
    if stream.sentence is not None:
        found = {name.removeprefix("audio."): a for name, a in arrays.items() if name.startswith("audio.")}
        fresh = engine.segmenter.init_audio()
        if set(found) != set(fresh):
            raise SessionError(f"{what}: audio has the arrays {', '.join(found)}, the segmenter {', '.join(fresh)}")
        for name, like in fresh.items():
            shape = [None] if like.ndim == 1 else like.shape  # what waits has any length
            if array(f"audio.{name}", like.dtype.kind, *shape).size > MOST_HEARD + like.size:
                raise SessionError(f"{what}: audio.{name} holds more than a segmenter remembers")
        stream = replace(stream, audio=found)
        _try_on(engine, stream)
    return StreamState(0, clock, stream, values["finished"], values["seconds"], values["elapsed_s"])


def _try_on(engine: Engine, stream: Stream) -> None:
    """Ask segmenter and policy once, as the next decision will; what they remember may be anything but theirs."""
    sentence = stream.sentence
    assert sentence is not None and stream.audio is not None
    memory = engine.segmenter.hear(np.zeros(0, np.float32), stream.audio) if engine.segmenter.listens else stream.audio
    engine.segmenter.find(sentence.source, sentence.target, stream.frames, memory)
    engine.segmenter.voiced(stream.frames, memory)
    if len(sentence.memory) != len(engine.policy.initial()) and not sentence.begun:
        raise ValueError("the policy remembers something of a sentence that has not begun")
    progress = Progress(sentence.visible, 0, 0, (), len(sentence.tokens), True)
    _, kept = engine.policy.text(progress, sentence.memory)
    engine.policy.settle(progress, Draft(tuple(sentence.tokens), (), 0), kept)


def _clock(values: dict[str, Any], array: Callable[..., np.ndarray], engine: Engine, what: str) -> ClockState:
    rate, due, decisions = values["clock"]
    count, phase, waiting = values["waiting"]
    chunk_ms, up, taps = engine.settings.chunk_ms, 1, 1
    if rate:
        check_rate(rate)
        resampler = Resampler(rate, SAMPLE_RATE)
        up, taps = resampler.up, resampler.taps
    # A chunk in the making is shorter than a chunk; the resampler and the features keep less than a window.
    if not (due <= chunk_ms * rate and count < max(taps, 1) and phase < up and waiting <= FRAME_LENGTH):
        raise SessionError(f"{what}: clock {values['clock']} and waiting {values['waiting']} contradict each other")
    longest = chunk_ms * max(rate, SAMPLE_RATE) // 1000 + SAMPLE_RATE
    state = ClockState(
        rate,
        due,
        decisions,
        array("clock.samples", "f", None),
        ResampleState(array("clock.resample", "f", taps - 1), count, phase),
        FeatureState(array("clock.fbank", "f", FRAME_LENGTH), waiting),
        array("clock.features", "f", None, NUM_MEL_BINS),
        array("clock.heard", "f", None),
    )
    if max(len(state.samples), len(state.heard)) > longest or len(state.features) > longest // 100:
        raise SessionError(f"{what}: more sound waits in it than a chunk of {chunk_ms} ms holds")
    return state


def _stream(values: dict[str, Any], array: Callable[..., np.ndarray], engine: Engine, what: str) -> Stream:
    config, sources, targets = engine.config, len(engine.source_dict), len(engine.target_dict)
    frames, source_symbol, target_symbol = values["stream"]
    if source_symbol >= sources or target_symbol >= targets:
        raise SessionError(f"{what}: stream {values['stream']} has symbols that the dictionaries have not")
    if values.get("sentence") is None:
        return Stream(frames, None, source_symbol, target_symbol)
    numbers = values["sentence"]
    check(numbers, {name: replace(rule, needed=True) for name, rule in _SENTENCE.items()}, f"{what}: sentence",
          SessionError)  # fmt: skip
    width = config.mt_decoder_embed_dim if config.units_read_text else config.encoder_embed_dim
    recent = array("stream.recent", "f", None, config.encoder_embed_dim)
    samples = array("sentence.samples", "f", None)
    begin, end, symbols = numbers["start"], numbers["extended"], config.num_units + NUM_SPECIALS
    spoken = {
        name: tuple(CTCToken(*pair) for pair in _pairs(array(f"sentence.{name}", "i", None, 2), size, frames, what))
        for name, size in (("source", sources), ("target", targets))
    }
    lists = {
        "tokens": array("sentence.tokens", "i", None, least=0, most=targets - 1),
        "frames": array("sentence.frames", "i", None, least=0, most=frames),
        "times": array("sentence.times", "f", None),
        "units": array("sentence.units", "i", None, least=0, most=config.num_units - 1),
    }
    inputs = array("sentence.inputs", "f", None, width)
    first = numbers.get("first_audio_s")
    consistent = (
        begin <= end <= frames and end - begin <= config.max_sentence_frames and len(recent) <= frames
        and frames - end <= len(recent) and numbers["last_symbol"] < symbols
        and numbers["source_given"] <= len(spoken["source"]) and isinstance(first, (int, float))
        and len(lists["tokens"]) == len(lists["frames"]) == len(lists["times"]) <= config.max_target_tokens
        and len(inputs) + numbers["inputs_read"] <= max(config.max_target_tokens, config.max_sentence_frames) + 1
    )  # fmt: skip
    if not consistent:
        raise SessionError(f"{what}: its sentence contradicts itself or the model: {shown(numbers)}")
    sentence = Sentence(
        memory=tuple(values.get("memory") or ()),
        inputs=inputs,
        samples=[samples] if len(samples) else [],
        **{name: numbers[name] for name in _SENTENCE_NUMBERS},
        **{name: found.tolist() for name, found in lists.items()},
        **spoken,
    )
    return Stream(frames, recent, source_symbol, target_symbol, sentence)


def _pairs(array: np.ndarray, symbols: int, frames: int, what: str) -> list[list[int]]:
    """Tokens and their frames [n, 2], in the order of the frames."""
    tokens, at = array[:, 0], array[:, 1]
    if len(array) and (tokens.min() < 0 or tokens.max() >= symbols or at.min() < 0 or at.max() >= max(frames, 1)):
        raise SessionError(f"{what}: tokens or frames of its sentence are out of range")
    return array.tolist()


def fit(path: str | Path, work: Callable[[], Any]) -> Any:
    """Do ``work`` on a file's contents; whatever goes wrong is the file's fault.

    Raises:
        SessionError: naming the file and the first thing that did not fit.
    """
    try:
        return work()
    except SessionError:
        raise
    except DAMAGE as error:
        raise SessionError(
            f"saved session {path} is damaged or of another model ({reason(error)}); start a new one"
        ) from None
