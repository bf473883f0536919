"""Reading weight files that may come from anybody: nothing in them is ever run."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from echostream.errors import CheckpointError


def read_weights(path: str | Path, what: str = "checkpoint", device: Any = "cpu") -> Any:
    """``torch.load`` with ``weights_only=True``, its many exceptions made one.

    Args:
        what: what the file should be, for the message.
        device: where its tensors go.

    Raises:
        CheckpointError: the file is missing, truncated, no checkpoint, or asks for code to be run.
    """
    import torch

    from echostream import compat

    compat.apply()
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{what} {path} does not exist")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{what} {path} is empty (0 bytes); fetch or export it again")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch tells only in prose which it was: a forbidden object, or bytes that are no pickle at all
        named = re.search(r"(?:GLOBAL|class) ([\w.]+\.[\w.]+)", str(error))
        if named:
            raise CheckpointError(
                f"{what} {path} holds an object ({named[1]}) whose loading would run code; it was refused"
            ) from None
        raise CheckpointError(f"{what} {path} is damaged or no torch checkpoint; export it again") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{what} {path} is damaged or truncated ({reason}); export it again") from None
    except zipfile.BadZipFile:
        raise CheckpointError(f"{what} {path} is damaged or truncated; export it again") from None
