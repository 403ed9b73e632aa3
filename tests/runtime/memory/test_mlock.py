"""Weights that the system may not swap out: what the kernel says of them, and who may lock nothing."""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.memory.mlock import lock, lock_large_blocks
from tests.hang import HANG_S

SIZE = 64 << 20
IN_LITTLE = f"""
import mmap, os, resource
from pocketmoe.system.memory import locked_bytes
from pocketmoe.runtime.memory.mlock import lock, lock_large_blocks
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
os.setuid(65534)
block = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
lock_large_blocks()
assert not lock(memoryview(block))
assert locked_bytes() <= 1 << 16
mmap.mmap(-1, {SIZE})[:] = bytes({SIZE})  # there is still memory to be had
print("lives")
"""


def locked_kb(wanted: Callable[[int, int, str], bool]) -> int:
    """What there is in memory of locked mappings that are wanted, by their first and last address and name."""
    total, here, resident = 0, False, 0
    with open("/proc/self/smaps") as maps:
        for line in maps:
            first, *_ = words = line.split()
            if not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                here = wanted(start, end, words[5] if len(words) > 5 else "")
            elif here and first == "Rss:":
                resident = int(words[1])
            elif here and first == "VmFlags:":
                total += resident * ("lo" in words)
    return total


@pytest.mark.skipif(os.geteuid() != 0, reason="a user's limit on locked memory is often below a megabyte")
def test_what_is_touched_of_a_large_block_is_locked() -> None:
    """Pages are locked as they come, not fetched: half a block that is written to is half a block locked."""
    block = np.empty(SIZE, np.uint8)
    middle = int(block.ctypes.data) + SIZE // 2
    lock_large_blocks()
    before = locked_kb(lambda start, end, _: start <= middle < end)  # the kernel joins neighbours to one mapping
    block[: SIZE // 2] = 1
    locked = (locked_kb(lambda start, end, _: start <= middle < end) - before) * 1024
    assert SIZE * 3 // 8 < locked < SIZE * 5 // 8  # pages may be of 2 MB, and others of the process come and go


@pytest.mark.skipif(os.geteuid() != 0, reason="a user's limit on locked memory is often below a megabyte")
def test_an_engine_locks_slots_and_dense_weights(tiny_bundle: Callable[[str], Bundle]) -> None:
    """Each slot that is made adds its weights to what is locked."""
    bundle = tiny_bundle("olmoe")
    with Engine(bundle, EngineOptions(MemoryRequest(expert_share=1.0), 64, backend="slots")) as engine:
        engine.feed([1, 2, 3])
        in_slots = locked_kb(lambda _start, _end, name: name.startswith("/dev/shm/.pocketmoe.")) * 1024
        made = engine.stats.misses
        assert in_slots >= made * min(kind.nbytes for kind in bundle.manifest.expert_kinds) > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may lock nothing")
def test_who_may_lock_nothing_runs_on() -> None:
    """A limit of 64 kB is kept to in silence, and memory is still to be had."""
    result = subprocess.run(
        [sys.executable, "-c", IN_LITTLE], capture_output=True, text=True, check=False, timeout=HANG_S
    )
    assert result.stdout == "lives\n", result.stderr
    assert lock(memoryview(mmap.mmap(-1, mmap.PAGESIZE)))
