"""Errors meant for the person reading them: one line that names the bad value and what to do about it."""

from __future__ import annotations

import importlib
from types import ModuleType


class EchoStreamError(ValueError):
    """Base of every error EchoStream raises on purpose. ``str()`` is one line, fit to be shown as it is."""


class ConfigError(EchoStreamError):
    """A configuration value is missing, unknown or contradicts another."""


class AudioError(EchoStreamError):
    """A recording cannot be read, or its samples cannot be used (empty, NaN, wrong rate)."""


class MissingAudioError(AudioError):
    """A recording does not exist."""


class LongAudioError(AudioError):
    """A recording is longer than what may be read at once."""


class AudioWarning(UserWarning):
    """Sound that can be used but cannot be speech at full scale 1: far too loud, or as good as silent."""


class OutputError(EchoStreamError):
    """Something cannot be written: no room, no permission, the place is taken, or it is one of the inputs."""


class ManifestError(EchoStreamError):
    """A manifest or dictionary is missing, incomplete, or does not fit the model."""


class CheckpointError(EchoStreamError):
    """A checkpoint, vocoder or k-means file is truncated, of another format, or would run code when loaded."""


class UnitError(EchoStreamError):
    """A unit sequence is empty, or holds an id, duration or speaker that the vocoder does not know."""


class SessionError(EchoStreamError):
    """A streaming session was asked for something out of turn, or a saved one does not fit."""


class ServerError(EchoStreamError):
    """A server refuses a session or has lost it, or there is no connection.

    Attributes:
        status: its HTTP status, if it answered.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class MissingExtraError(EchoStreamError, ImportError):
    """A package of an optional extra is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of EchoStream brings it.

    Raises:
        MissingExtraError: the module is not installed; the message holds the pip command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module} is not installed; it comes with: pip install 'echostream[{extra}]'"
        ) from None


def check_room(wanted: int, places: int, what: str, limit: str) -> None:
    """Raises EchoStreamError: a decoder's buffers hold fewer ``what`` of a sentence than are wanted."""
    if wanted > places:
        raise EchoStreamError(
            f"a sentence of {wanted} {what} does not fit the {places} of its buffers; "
            f"end the sentence earlier or raise {limit}"
        )
