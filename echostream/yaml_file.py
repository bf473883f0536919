"""YAML files of ``key: value`` lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from echostream.errors import ConfigError, EchoStreamError


def read_mapping(path: str | Path, error: type[EchoStreamError] = ConfigError, missing: str = "") -> dict[str, Any]:
    """The pairs of a YAML file; an empty file has none.

    Args:
        error: what to raise.
        missing: what to say after "does not exist".

    Raises:
        EchoStreamError: (of the type ``error``) the file is missing, is not YAML, or holds something else than pairs.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise error(f"{path} does not exist{missing}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as reason:
        raise error(f"{path} is not YAML: {str(reason).splitlines()[0]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise error(f"{path} holds {type(values).__name__}, not key: value lines")
    return values
