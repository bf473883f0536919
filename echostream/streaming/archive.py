"""A running session as a file: plain arrays in a npz archive, with a version and the model's digest; no pickles.

What is saved are the fields of ``StreamState`` and of the states in it, as their types say (``_FORMS``): numbers stand
in the header, a JSON text, all else in arrays with dotted names (``stream.sentence.tokens``). A field that belongs to
the process and not to the stream says ``metadata=UNSAVED``. A file may come from anybody: ``_limits`` tells what each
array may hold, and ``_check`` what the numbers must have to do with each other.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_type_hints

import numpy as np

from echostream.audio.resample import Resampler, check_rate
from echostream.constants import FRAME_LENGTH, NUM_MEL_BINS, NUM_SPECIALS, SAMPLE_RATE
from echostream.errors import SessionError
from echostream.files import replacing
from echostream.loading import DAMAGE, check_array, parse_json, read_npz, reason, shown
from echostream.rules import Rule, check
from echostream.streaming.clock import ClockState
from echostream.streaming.engine import Engine, EngineState
from echostream.streaming.policies.base import Draft, Memory, Progress
from echostream.streaming.segmenters.base import AudioMemory, CTCToken
from echostream.streaming.stream import StreamState

if TYPE_CHECKING:
    from echostream.checkpoint import Bundle

FORMAT = "echostream-session/3"
MOST_HEARD = 1 << 16  # samples or numbers that a segmenter keeps in one array
MOST_STATE = 1e6  # of a state's numbers; larger ones overflow further on
SPARE_BYTES = 64 << 20  # of its arrays, unpacked, beyond twice what the model's own may take


class Form(NamedTuple):
    """How values of a type are saved: as one array of numpy's ``kind``, made by ``pack`` and taken by ``unpack``."""

    kind: str
    pack: Callable[[Any], np.ndarray]
    unpack: Callable[[np.ndarray], Any]


_FORMS: dict[Any, Form] = {
    np.ndarray: Form("f", lambda array: array, lambda array: array),
    list[int]: Form("i", lambda numbers: np.array(numbers, dtype=np.int64), lambda array: array.tolist()),
    list[float]: Form("f", lambda numbers: np.array(numbers, dtype=np.float64), lambda array: array.tolist()),
    list[np.ndarray]: Form(
        "f", lambda parts: np.concatenate([np.zeros(0, np.float32), *parts]), lambda array: [array] * bool(len(array))
    ),
    tuple[CTCToken, ...]: Form(
        "i",
        lambda tokens: np.array([(t.token, t.frame) for t in tokens], dtype=np.int64).reshape(-1, 2),
        lambda array: tuple(CTCToken(*pair) for pair in array.tolist()),
    ),
}
_COUNT = Rule(int, 0, 1 << 48, needed=True)
_RULES: dict[Any, Rule] = {  # of what stands in the header
    int: _COUNT, bool: Rule(bool, needed=True), float: Rule(float, 0, needed=True),
    dict[str, float]: Rule(dict, of=Rule(float, 0), needed=True),
    Memory: Rule(list, 0, 1 << 16, of=_COUNT, needed=True),
}  # fmt: skip
_UNRULED = ("first_audio_s",)  # it may be NaN


@functools.cache
def _saved(state: Any) -> dict[str, tuple[Any, bool]]:
    """The fields of a state that are saved: their types, and whether they may be None."""
    hints = get_type_hints(state)
    found = {}
    for field in fields(state):
        if field.metadata.get("saved", True):
            parts = [part for part in get_args(hints[field.name]) if part is not NoneType]
            optional = NoneType in get_args(hints[field.name])
            found[field.name] = (parts[0] if optional else hints[field.name], optional)
    return found


def _pack(state: Any, arrays: dict[str, np.ndarray], where: str = "") -> dict[str, Any]:
    """A state's numbers; its arrays are put into ``arrays``. What is None is left out."""
    values: dict[str, Any] = {}
    of: Any = type(state)
    for name, (kind, _) in _saved(of).items():
        value, path = getattr(state, name), f"{where}{name}"
        if value is None:
            continue
        if is_dataclass(kind):
            values[name] = _pack(value, arrays, f"{path}.")
        elif kind == AudioMemory:
            values[name] = sorted(value)
            arrays.update({f"{path}.{key}": array for key, array in value.items()})
        elif kind in _FORMS:
            arrays[path] = _FORMS[kind].pack(value)
        else:
            values[name] = value
    return values


def _unpack(
    state: Any, values: dict[str, Any], take: Callable[[str, str], np.ndarray | None], what: str, where: str = "",
    **unsaved: Any,
) -> Any:  # fmt: skip
    """The state that ``_pack`` took apart; ``take`` gives an array by its name and kind, None if there is none.

    Raises:
        SessionError: a value or an array is missing or out of range.
    """
    saved = _saved(state)
    rules = {name: _RULES[kind] for name, (kind, _) in saved.items() if kind in _RULES and name not in _UNRULED}
    at = f"{what}: {where.rstrip('.')}" if where else what
    check(values, rules, at, SessionError)
    given: dict[str, Any] = dict(unsaved)
    for name, (kind, optional) in saved.items():
        path = f"{where}{name}"
        if kind in _FORMS:
            array = take(path, _FORMS[kind].kind)
            given[name] = None if array is None else _FORMS[kind].unpack(array)
        elif values.get(name) is None:
            given[name] = None
        elif is_dataclass(kind):
            check(values, {name: Rule(dict)}, at, SessionError)
            given[name] = _unpack(kind, values[name], take, what, f"{path}.")
        elif kind == AudioMemory:
            check(values, {name: Rule(list, of=Rule(str))}, at, SessionError)
            given[name] = {key: take(f"{path}.{key}", "bif") for key in values[name]}
        else:
            given[name] = tuple(values[name]) if kind == Memory else values[name]
        if given[name] is None and not optional:
            raise SessionError(f"{what} lacks {path!r}")
    return state(**given)


def identity(engine: Engine, bundle: Bundle) -> dict[str, Any]:
    """What a saved session and the one that takes it up must have in common."""
    return {
        "format": FORMAT,
        "model": bundle.digest,
        "policy": repr(engine.policy),
        "segmenter": engine.segmenter.name,
        "settings": asdict(engine.settings),
    }


def write(path: str | Path, bundle: Bundle, state: StreamState, model: dict[str, np.ndarray]) -> None:
    """Write a stream and the model's arrays for it.

    Raises:
        OutputError: the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    header = json.dumps({**identity(state.engine, bundle), **_pack(state, arrays)})
    arrays.update({f"model.{name}": array for name, array in model.items()})
    members: dict[str, Any] = {"header": np.frombuffer(header.encode(), dtype=np.uint8), **arrays}
    with replacing(path) as file:
        np.savez(file, **members)


def read(path: str | Path, bundle: Bundle, row: int, engine: Engine) -> tuple[StreamState, dict[str, np.ndarray]]:
    """The stream of a file, to go on in ``row`` by ``engine``, and the model's arrays for it.

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
    state: StreamState = fit(path, lambda: _state(values, arrays, row, engine, what))
    model = {name.removeprefix("model."): a for name, a in arrays.items() if name.startswith("model.")}
    for name, array in model.items():
        if array.dtype.kind == "f" and not (np.abs(array) <= MOST_STATE).all():
            raise SessionError(f"{what}: model.{name} holds NaN, or numbers that no state holds")
    return state, model


def _state(values: dict[str, Any], arrays: dict[str, np.ndarray], row: int, engine: Engine, what: str) -> StreamState:
    """What the header and the arrays say, all of it checked against the engine.

    Raises:
        SessionError: a number is out of range, or an array of another shape.
    """
    limits = _limits(engine)

    def take(name: str, kind: str) -> np.ndarray | None:
        if name not in arrays:
            return None
        array, (shape, least, most) = arrays[name], limits.get(name, ((None,), None, None))
        if array.dtype.kind == "f" and name != "stream.sentence.times":
            least, most = -MOST_STATE, MOST_STATE
        return check_array(array, f"{what}: {name}", SessionError, kind, shape, least, most)

    state: StreamState = _unpack(StreamState, values, take, what, row=row, engine=engine)
    _check_clock(state.clock, engine, what)
    _check_stream(state.stream, engine, what)
    if set(state.seconds) != set(StreamState(row, engine, state.clock).seconds):
        raise SessionError(f"{what}: seconds has the stages {', '.join(map(shown, state.seconds))}")
    if state.stream.sentence is not None:
        _try_on(engine, state.stream)
    return state


def _limits(engine: Engine) -> dict[str, tuple[tuple[int | None, ...], float | None, float | None]]:
    """By an array's name: its shape (default: any length), least and most of its numbers (default: of a state's)."""
    config = engine.config
    width = config.mt_decoder_embed_dim if config.units_read_text else config.encoder_embed_dim
    heard = {name: array.shape for name, array in engine.segmenter.init_audio().items()}
    return {
        "clock.fbank.samples": ((FRAME_LENGTH,), None, None),
        "clock.features": ((None, NUM_MEL_BINS), None, None),
        "stream.recent": ((None, config.encoder_embed_dim), None, None),
        "stream.sentence.inputs": ((None, width), None, None),
        "stream.sentence.source": ((None, 2), 0, 1 << 48),
        "stream.sentence.target": ((None, 2), 0, 1 << 48),
        "stream.sentence.tokens": ((None,), 0, len(engine.target_dict) - 1),
        "stream.sentence.frames": ((None,), 0, 1 << 48),
        "stream.sentence.units": ((None,), 0, config.num_units - 1),
        # what waits has any length
        **{f"stream.audio.{n}": ((None,) if len(shape) == 1 else shape, None, None) for n, shape in heard.items()},
    }


def _check_clock(clock: ClockState, engine: Engine, what: str) -> None:
    rate, chunk_ms, up, taps = clock.rate, engine.settings.chunk_ms, 1, 1
    if rate:
        check_rate(rate)
        resampler = Resampler(rate, SAMPLE_RATE)
        up, taps = resampler.up, resampler.taps
    resample, waiting = clock.resample, clock.fbank.count
    # A chunk in the making is shorter than a chunk; the resampler and the features keep less than a window.
    if not (
        clock.due <= chunk_ms * rate and resample.count < max(taps, 1) and resample.phase < up
        and len(resample.samples) == taps - 1 and waiting <= FRAME_LENGTH
    ):  # fmt: skip
        raise SessionError(f"{what}: the numbers of its clock, resampler and features contradict each other")
    longest = chunk_ms * max(rate, SAMPLE_RATE) // 1000 + SAMPLE_RATE
    if max(len(clock.samples), len(clock.heard)) > longest or len(clock.features) > longest // 100:
        raise SessionError(f"{what}: more sound waits in it than a chunk of {chunk_ms} ms holds")


def _check_stream(stream: EngineState, engine: Engine, what: str) -> None:
    config, frames, sentence = engine.config, stream.frames, stream.sentence
    sizes = {"source": len(engine.source_dict), "target": len(engine.target_dict)}
    if stream.source_symbol >= sizes["source"] or stream.target_symbol >= sizes["target"]:
        raise SessionError(f"{what}: the stream's last symbols are none of the dictionaries'")
    if sentence is None:
        return
    fresh = engine.segmenter.init_audio()
    if stream.recent is None or stream.audio is None or set(stream.audio) != set(fresh):
        raise SessionError(f"{what}: audio has the arrays {', '.join(stream.audio or ())}, not {', '.join(fresh)}")
    for name, like in fresh.items():
        found = stream.audio[name]
        if found.dtype.kind != like.dtype.kind or found.size > MOST_HEARD + like.size:
            raise SessionError(f"{what}: stream.audio.{name} is not what a segmenter remembers")
    for name, size in sizes.items():
        if not all(token.token < size and token.frame < max(frames, 1) for token in getattr(sentence, name)):
            raise SessionError(f"{what}: tokens or frames of its sentence are out of range")
    begin, end = sentence.start, sentence.extended
    consistent = (
        begin <= end <= frames and end - begin <= config.max_sentence_frames and len(stream.recent) <= frames
        and frames - end <= len(stream.recent) and sentence.last_symbol < config.num_units + NUM_SPECIALS
        and sentence.source_given <= len(sentence.source) and max(sentence.frames, default=0) <= frames
        and isinstance(sentence.first_audio_s, (int, float))
        and len(sentence.tokens) == len(sentence.frames) == len(sentence.times) <= config.max_target_tokens
        and len(sentence.inputs) + sentence.inputs_read
        <= max(config.max_target_tokens, config.max_sentence_frames) + 1
    )  # fmt: skip
    if not consistent:
        raise SessionError(f"{what}: its sentence contradicts itself or the model")


def _try_on(engine: Engine, stream: EngineState) -> None:
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
