"""Directories whose files belong together: replaced as a whole, by one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from echostream.errors import EchoStreamError
from echostream.loading import Error

PARTIAL = ".partial"


@contextmanager
def locked(path: str | Path, error: Error, what: str) -> Iterator[None]:
    """Hold ``path``, a lock file; the lock goes with the process, however it ends.

    Args:
        what: is being written, for the message.

    Raises:
        EchoStreamError: (``error``) another process holds it, or it cannot be made.
    """
    path = Path(path)
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if not path.exists():  # the one before took it away between our opening and our locking it
            lock.release()
            lock.acquire()
    except Timeout:
        raise error(f"{what} is being written by another process; wait for it to end") from None
    except (OSError, NotImplementedError) as problem:
        raise error(f"{what} cannot be written: {getattr(problem, 'strerror', None) or problem}") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still locked: who waits for it sees that it has gone
        lock.release()


@contextmanager
def replaced(directory: str | Path, last: str, known: Iterable[str], error: Error) -> Iterator[Path]:
    """An empty directory to write to, whose files take the place of those in ``directory`` when the block ends.

    If the block fails or is killed, ``directory`` stays as it was, or absent. The files are moved one by one; ``last``,
    without which the directory is none of its kind, is removed first and moved last, so that old and new are never
    taken for one. What else lies in the directory stays there.

    Args:
        last: the file that makes the directory what it is.
        known: files of such a directory; those that were not written anew are removed.

    Raises:
        EchoStreamError: (``error``) another process writes there, or a file cannot be written.
    """
    directory = Path(os.path.realpath(directory))
    new = not directory.is_dir()
    scratch = directory.with_name(f".{directory.name}{PARTIAL}") if new else directory / PARTIAL
    with locked(scratch.with_name(f"{scratch.name}.lock"), error, str(directory)):
        try:
            shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
            scratch.mkdir(parents=True)
            yield scratch
            names = sorted(file.name for file in scratch.iterdir())
            for name in names:
                with open(scratch / name, "rb") as file:
                    os.fsync(file.fileno())
            if new and not directory.exists():
                scratch.rename(directory)
                return
            (directory / last).unlink(missing_ok=True)
            for name in sorted(set(known) - set(names)):
                (directory / name).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: name == last):
                (scratch / name).replace(directory / name)
        except EchoStreamError:
            raise
        except OSError as problem:
            name = problem.filename or directory
            raise error(f"{name} cannot be written: {problem.strerror or problem}") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
