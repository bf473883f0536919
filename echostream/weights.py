"""Reading weight files that may come from anybody: nothing in them is ever run."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from echostream.errors import CheckpointError
from echostream.loading import DAMAGE, reason, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

M = TypeVar("M", bound="torch.nn.Module")


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
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{what} {path} is empty (0 bytes); fetch or export it again")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > size:  # torch stores, it never compresses
                raise CheckpointError(f"{what} {path} has {size} bytes, but would unpack to {unpacked}; it was refused")
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"{what} {path} is damaged or truncated ({reason(error)}); export it again") from None
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
    except DAMAGE as error:
        raise CheckpointError(f"{what} {path} is damaged or truncated ({reason(error)}); export it again") from None


def check_tensors(state: Any, where: str, ignored: str = "") -> dict[str, Tensor]:
    """A mapping of names to plain tensors that hold what they say, finite numbers all of them.

    Args:
        where: the file, for the message.
        ignored: names that begin so are left out.

    Raises:
        CheckpointError: naming the first weight that is something else.
    """
    import torch

    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{where} holds {type(state).__name__} where weights by name should be")
    found = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{where}: {shown(name)} is no name of a weight")
        if ignored and name.startswith(ignored):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{where}: {name} is {type(tensor).__name__}, not a tensor")
        plain = tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_quantized
        if not plain or tensor.is_complex():
            raise CheckpointError(f"{where}: {name} is a tensor of a kind that is not read ({tensor.dtype})")
        # A view can repeat a few numbers to any size; weights have memory of their own.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{where}: {name} has shape {list(tensor.shape)}, but not so many numbers")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: {name} holds NaN or infinity")
        found[name] = tensor
    return found


def with_weights(make: Callable[[], M], state: Mapping[str, Tensor], check: Callable[[M], None]) -> M:
    """A module that ``make`` makes, with these weights; ``check`` is shown it before it takes memory, so that a
    configuration of another size than the weights stops there."""
    with uninitialised(shapes_only=True):
        check(make())
    with uninitialised():
        model = make()
    model.load_state_dict(dict(state))
    return model


@contextmanager
def uninitialised(shapes_only: bool = False) -> Iterator[None]:
    """Modules made here draw no random weights: all of them are loaded next. With ``shapes_only`` they take no memory,
    so that a configuration can be compared with weights before it costs anything."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Undrawn(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in ("uniform_", "normal_"):
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    with torch.device("meta") if shapes_only else nullcontext(), Undrawn():
        yield
