"""How this package writes. A file is written beside its place and renamed into it, or it grows and is whole at any
moment; where two processes may meet there is a lock; whatever fails is one line that names the file.

``replacing``, ``write_text``, ``write_json``   a file, all at once: readers see the old one or the new one
``replacing_directory``                         the same for a directory
``growing``                                     an output that is followed while it grows, by one process
``appending``, ``add``                          ledgers and results: whole lines, added by several processes
``keep_apart``                                  outputs that are no inputs, and not each other
``run_command``                                 the edge of a program: errors as one line, closed terminals and pipes

This holds against killed processes, not against power failures: nothing waits for the disk.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO

from echostream.errors import EchoStreamError, OutputError

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks there
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".echostream-"  # what a killed process may leave behind begins so, and can be deleted


@contextmanager
def reported(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong with the system inside becomes one line about ``path``, unless it names another file.

    Raises:
        OutputError: instead of OSError, and of text that UTF-8 cannot hold.
    """
    try:
        yield
    except (OSError, UnicodeEncodeError) as error:
        if isinstance(error, EchoStreamError) or not _concerns(path, error):
            raise
        raise OutputError(failure(path, error)) from None
    except RuntimeError as error:  # how torch.save tells that its file could not be written
        if not isinstance(error.__context__, OSError):
            raise
        raise OutputError(failure(path, error.__context__)) from None


def _concerns(path: str | Path, error: Exception) -> bool:
    """Is the file that an error names ``path``, what becomes it, or a directory above?"""
    named = getattr(error, "filename", None)
    if not isinstance(named, (str, bytes)):
        return True
    other = os.path.abspath(os.fsdecode(named))
    mine = (os.path.abspath(path), os.path.realpath(path))
    return os.sep + PARTIAL in other or any(m == other or m.startswith(other.rstrip(os.sep) + os.sep) for m in mine)


def failure(path: str | Path, error: Exception) -> str:
    """``x.wav cannot be written: No space left on device``."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    other = getattr(error, "filename", None)
    if isinstance(other, (str, bytes)) and not Path(os.fsdecode(other)).name.startswith(PARTIAL):
        other = os.fsdecode(other)
        if other != str(path):
            reason += f" ({other})"
    return f"{path} cannot be written: {reason}"


@contextmanager
def replacing(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """A file to write to, which takes its place once the block has ended well; until then what was there stays.

    Directories above it are made, links are followed, permissions kept; a pipe or device is written to as it is.

    Args:
        mode: ``w`` (UTF-8, lines end at ``\\n``) or ``wb``.

    Raises:
        OutputError: it cannot be written.
    """
    if "b" not in mode:
        options = {"encoding": "utf-8", "newline": "\n", **options}
    with reported(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            with open(target, mode, **options) as file:
                yield file
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(None, "it is write-protected")
        partial = target.with_name(f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with open(partial, mode.replace("w", "x"), **options) as file:
                yield file
            if target.exists():
                shutil.copymode(target, partial)
            os.replace(partial, target)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def check_writable(path: str | Path) -> None:
    """Try now whether ``replacing`` will be able to write; for what is written at the end of long work.

    Raises:
        OutputError: it will not.
    """
    with reported(path):
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(None, "it is write-protected")
        if not target.exists() or target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}")
            with open(partial, "xb"):
                pass
            partial.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Raises: OutputError."""
    with replacing(path, "w") as file:
        file.write(text)


def write_json(path: str | Path, value: Any, indent: int = 2, **options: Any) -> None:
    """Raises: OutputError."""
    write_text(path, json.dumps(value, indent=indent, **options) + "\n")


@contextmanager
def replacing_directory(path: str | Path, owned: Callable[[str], bool], last: str = "config.yaml") -> Iterator[Path]:
    """An empty directory to fill, which takes the place of ``path`` once the block has ended well.

    A directory that holds anything else, or is the current one, stays and gets the new files one by one: without
    ``last`` meanwhile, so that nobody takes old and new files together for whole.

    Args:
        owned: tells of a name in the old directory whether it belongs to what is replaced, and goes.
        last: the file without which the directory is not read.

    Raises:
        OutputError: it cannot be written, or ``path`` is a file.
    """
    with reported(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(None, "it is a file, not a directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        old = list(target.iterdir()) if target.exists() else []
        old = [entry for entry in old if not entry.name.startswith(PARTIAL)]
        shared = not all(owned(entry.name) for entry in old) or target == Path.cwd()
        partial = (target if shared else target.parent) / f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}"
        partial.mkdir()
        try:
            yield partial
            if shared:
                new = {entry.name for entry in partial.iterdir()}
                (target / last).unlink(missing_ok=True)
                for entry in old:
                    if owned(entry.name) and entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    elif owned(entry.name) and entry.name not in new:
                        entry.unlink(missing_ok=True)
                for name in sorted(new, key=lambda name: name == last):
                    os.replace(partial / name, target / name)
            elif not target.exists():
                os.rename(partial, target)
            else:
                shutil.copymode(target, partial)
                if not _exchange(partial, target):
                    aside = target.with_name(partial.name + ".old")
                    os.rename(target, aside)
                    os.rename(partial, target)
                    shutil.rmtree(aside)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, both_stay = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap(here, os.fsencode(one), here, os.fsencode(other), both_stay) == 0


def growing(path: str | Path) -> io.FileIO:
    """An empty file, opened in place and unbuffered, for an output that others may read while it grows.

    Raises:
        OutputError: it cannot be written, or another process is writing it.
    """
    with reported(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "w")
        try:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                _lock(file, wait=False)
                file.truncate(0)  # only now: another may have been at it
        except BaseException:
            file.close()
            raise
        return file


@contextmanager
def appending(path: str | Path, wait: bool = True) -> Iterator[io.FileIO]:
    """A file to add to by ``add`` (unbuffered, readable), locked until the block ends.

    Args:
        wait: for another process to be done with it, rather than raise.

    Raises:
        OutputError: it cannot be written, or another process is writing it.
    """
    with reported(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with io.FileIO(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666), "r+") as file:
            _lock(file, wait)
            file.seek(0, os.SEEK_END)
            yield file


def add(file: io.FileIO, text: str) -> None:
    """Add to the end of an unbuffered file all of ``text``, in UTF-8, or nothing."""
    size = file.seek(0, os.SEEK_END)
    try:
        write_all(file, text.encode("utf-8"))
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise


def write_all(file: io.RawIOBase, data: bytes) -> None:
    """Write to an unbuffered file, which may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _lock(file: io.FileIO, wait: bool) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise OSError(None, "another process is writing it") from None
    except OSError:  # a file system without locks
        pass


def keep_apart(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Refuse outputs that are an input or each other, by whatever name or link; before any is opened.

    Args:
        outputs, inputs: what each is called -> path, number of an open file, or None for none.

    Raises:
        OutputError: naming both.
    """
    seen = [(name, path, *_place(path)) for name, path in inputs.items() if path is not None]
    for name, path in outputs.items():
        if path is None:
            continue
        place, file = _place(path)
        for other, other_path, other_place, other_file in seen:
            if place == other_place or (file is not None and file == other_file):
                what = path if isinstance(path, (str, Path)) else other_path
                raise OutputError(f"{name} and {other} are the same file ({what}), which would be lost; name another")
        seen.append((name, path, place, file))


def _place(path: Any) -> tuple[Any, tuple[int, int] | None]:
    """What a path resolves to, and the identity of the regular file or directory there; devices are never the same."""
    place: Any = object()
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path) if isinstance(path, (str, Path)) else place, None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return place, None
    return place, (status.st_dev, status.st_ino)


def run_command(work: Callable[[], int | None], prefix: str = "error", interrupted: str = "") -> int:
    """Do a program's ``work`` and return its exit status; what goes wrong becomes one line on standard error.

    A reader that has gone away (``| head``) is no error. 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may be anything but text
            stream.reconfigure(errors="backslashreplace")
    with _standard_streams():
        status = _status(work, prefix, interrupted)
        return max(status, _status(lambda: None if sys.stdout is None else sys.stdout.flush(), prefix, interrupted))


def _status(work: Callable[[], int | None], prefix: str, interrupted: str) -> int:
    try:
        return work() or 0
    except EchoStreamError as error:
        return complain(f"{prefix}: {error}")
    except BrokenPipeError:
        return 0
    except OSError as error:
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return complain(f"{prefix}: {name}{error.strerror or error}")
    except KeyboardInterrupt:
        if interrupted:
            complain(f"{prefix}: {interrupted}")
        return 130


class _Stream:
    """A standard stream that says what is wrong with it."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]):
        self._stream, self._failed, self._gone = stream, failed, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, do: Callable[..., Any], *args: Any) -> None:
        try:
            if not self._gone:
                do(*args)
        except OSError as error:
            self._gone = True
            _silence(self._stream)
            self._failed(error)


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Progress and messages never end the work that they tell of; what cannot be printed does, as one line."""

    def told(error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise error
        raise OutputError(failure("standard output", error)) from None

    before = sys.stdout, sys.stderr
    sys.stdout = None if sys.stdout is None else _Stream(sys.stdout, told)
    sys.stderr = None if sys.stderr is None else _Stream(sys.stderr, lambda error: None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def complain(line: str) -> int:
    """Say it on standard error, if anybody is there; returns 1."""
    with suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)
    return 1


def _silence(stream: TextIO) -> None:
    """Let what is buffered go nowhere, or the interpreter would complain about it at its end."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
