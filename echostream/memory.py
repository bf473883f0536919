"""How this process keeps its memory: nothing computed changes.

* ``keep_freed_memory``: large tensors on a CPU without a page fault for each of their pages.
* ``return_freed_memory``: a process that runs for days is no larger than what it uses.
* ``huge_pages``: weights that are read from end to end at every step, without a look into the page table every 4 KB.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator, Mapping

HUGE_PAGE = 1 << 21
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt, malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep what torch frees for the next tensor, instead of giving it back to the system. For training.

    For glibc's malloc (seen with 2.36): an allocation of more than 32 MB is a mapping of its own, unmapped when freed;
    a training step maps, faults in and zeroes its large activations anew every time. Four utterances of 120 s through
    the Emformer's layers: 1 s of page faults on 3.3 s of computing, none with this. The process then stays as large as
    its largest step.

    Can go when torch's CPU allocator keeps freed blocks itself, as its CUDA allocator does.

    Returns:
        whether there is a glibc to tell.
    """
    return _mallopt({MMAP_MAX: 0, TRIM_THRESHOLD: -1})


def return_freed_memory() -> bool:
    """Let malloc give blocks of 1 MB and more back to the system when they are freed. For servers.

    For glibc's malloc (seen with 2.36): every such block that is freed raises the size from which blocks are mappings
    of their own, up to 32 MB, so that what a long sentence needed stays as holes between what lives on. Five streams
    of speech for four minutes: 443 MB after the first half minute and at the end 469, without this 492 and 555.

    Returns:
        whether there is a glibc to tell.
    """
    return _mallopt({MMAP_THRESHOLD: 1 << 20, TRIM_THRESHOLD: 16 << 20})


def _mallopt(options: Mapping[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(option, value) for option, value in options.items()])


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Put the memory that this process allocates meanwhile into pages of 2 MB, as far as it comes in such pieces.

    For ONNX Runtime (seen with 1.32) on Linux, where transparent huge pages are to be asked for (``madvise``): it
    allocates weights as it comes. A step of the encoder reads all 62 MB of them, 12 % faster this way. Older kernels
    than 6.1 do it later by themselves or not at all; elsewhere this does nothing.

    Can go when ONNX Runtime asks for such pages itself.
    """
    before = _whole_pages()
    yield
    new = _whole_pages() - before
    if not new:
        return
    starts = sorted(page for page in new if page - 1 not in new)
    ends = sorted(page + 1 for page in new if page + 1 not in new)
    huge_page, collapse = 14, 25  # linux/mman.h
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in zip(starts, ends, strict=True):
        for advice in (huge_page, collapse):
            madvise(start * HUGE_PAGE, (end - start) * HUGE_PAGE, advice)


def _whole_pages() -> set[int]:
    """Numbers of the pages of 2 MB that lie wholly in this process's own writable memory; none outside of Linux."""
    pages: set[int] = set()
    try:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
            for line in maps:
                span, access, _, _, inode, *name = line.split()
                if access.startswith("rw") and inode == "0" and (not name or name[0] == "[heap]"):
                    start, end = (int(address, 16) for address in span.split("-"))
                    pages.update(range(-(-start // HUGE_PAGE), end // HUGE_PAGE))
    except OSError:
        pass
    return pages
