"""Keeps weights in memory where the system would rather swap them out, as far as it lets us.

Under a memory limit the kernel reclaims pages, and where there is swap, those that were not used lately go first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

from pocketmoe.runtime.memory.libc import libc

_ON_FAULT = 1  # MLOCK_ONFAULT: what is not there yet is locked when it comes, not fetched now
_LARGE_BYTES = 1 << 20


def lock_large_blocks() -> None:
    """Lock the process's large blocks of memory that no file backs, largest first, as far as `ulimit -l` allows.

    Files that are mapped stay the system's to drop: an embedding is read a row at a time.
    """
    for start, nbytes in sorted(_large_blocks(), key=lambda block: -block[1]):
        if not _lock(start, nbytes):
            return


def lock(view: memoryview) -> bool:
    """Lock a mapped block, which begins with a page; False where that is not allowed."""
    return _lock(np.frombuffer(view, np.uint8).ctypes.data, view.nbytes)


def _large_blocks() -> Iterator[tuple[int, int]]:
    """Address and size of writable mappings without a file, from a megabyte up."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, access, _, _, inode, *name = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in span.split("-"))
            anonymous = inode == "0" and (not name or name[0].startswith("[heap]"))
            if anonymous and access.startswith("rw") and end - start >= _LARGE_BYTES:
                yield start, end - start


def _lock(start: int, nbytes: int) -> bool:
    try:
        return bool(libc.mlock2(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), _ON_FAULT) == 0)
    except AttributeError:  # a C library older than the call
        return False
