"""Keeps weights in memory where the system would rather swap them out, as far as it lets us.

Under a memory limit the kernel reclaims pages, and where there is swap, those that were not used lately go first.
"""

from __future__ import annotations

import numpy as np

from pocketmoe.system.memory import large_blocks, lock_pages

_LARGE_BYTES = 1 << 20


def lock_large_blocks() -> None:
    """Lock the process's large blocks of memory that no file backs, largest first, as far as `ulimit -l` allows.

    Files that are mapped stay the system's to drop: an embedding is read a row at a time.
    """
    for start, nbytes in sorted(large_blocks(_LARGE_BYTES), key=lambda block: -block[1]):
        if not lock_pages(start, nbytes):
            return


def lock(view: memoryview) -> bool:
    """Lock a mapped block, which begins with a page; False where that is not allowed."""
    return lock_pages(np.frombuffer(view, np.uint8).ctypes.data, view.nbytes)
