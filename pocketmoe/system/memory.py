"""What this process takes of memory and what the machine has, from the best source that this system offers.

Linux says which pages are whose, in /proc/self/status: slots, which are mapped twice, can be counted once. Elsewhere,
or without /proc, there is the resident set, as psutil or getrusage has it. Where there is nothing, nothing is made up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pocketmoe.system.c_library import c_function

try:
    import resource
except ImportError:  # Windows
    resource = None

MeasuredBy = Literal["kernel", "resident set", "not measurable here"]

STATUS, STAT, MAPS = Path("/proc/self/status"), Path("/proc/self/stat"), Path("/proc/self/maps")
_MMAP_THRESHOLD = -3  # of mallopt
_ON_FAULT = 1  # MLOCK_ONFAULT: what is not there yet is locked when it comes, not fetched now


def measured_by() -> MeasuredBy:
    """How exactly this process's memory can be known here."""
    if _status("RssAnon"):
        return "kernel"
    return "not measurable here" if _resident_set() is None and _peak_resident_set() is None else "resident set"


def process_bytes() -> int:
    """Resident memory and page tables without shared memory, in bytes; 0 where that cannot be known.

    Where only the resident set is known, or only its peak, that.
    """
    found = _status("RssAnon", "RssFile", "VmPTE")
    return sum(found.values()) if found else _resident_set() or _peak_resident_set() or 0


def peak_process_bytes() -> int:
    """The highest resident memory so far, shared memory included, in bytes; 0 where that cannot be known."""
    found = _status("VmHWM", "VmPTE")
    return sum(found.values()) if found else _peak_resident_set() or 0


def reserved_bytes() -> int | None:
    """Private writable memory of this process, in use or only reserved, in bytes; what RLIMIT_DATA limits on Linux."""
    found = _status("VmData")
    return sum(found.values()) if found else None


def locked_bytes() -> int:
    """Address space of this process that the system may not swap out, in bytes; 0 where it does not say."""
    return sum(_status("VmLck").values())


def mapped_bytes() -> int | None:
    """The address space of this process, in bytes; None where the system does not say."""
    found = _status("VmSize")
    return sum(found.values()) if found else None


def major_faults() -> int:
    """Page faults of this process that went to disk; 0 where the system does not count them."""
    with contextlib.suppress(OSError):
        return int(STAT.read_text().rsplit(")", 1)[1].split()[9])
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class MachineMemory(NamedTuple):
    """Of the whole machine, in bytes."""

    total: int
    available: int
    swap: int


def machine_memory() -> MachineMemory | None:
    """What the machine has, and what a process may still take of it; None where that cannot be known."""
    import psutil

    with contextlib.suppress(OSError, psutil.Error, NotImplementedError):
        found = psutil.virtual_memory()
        return MachineMemory(found.total, found.available, psutil.swap_memory().total)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # where /proc is missing; caches count as in use
        page = os.sysconf("SC_PAGE_SIZE")
        return MachineMemory(page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES"), 0)
    return None


def trim_heap() -> None:
    """Give freed heap back to the system, where the C library keeps it and can be told (glibc)."""
    trim = c_function("malloc_trim")
    if trim is not None:
        trim(0)


def map_blocks_from(nbytes: int) -> None:
    """Let blocks of memory from that size on be mapped by themselves, where the C library can be told (glibc)."""
    mallopt = c_function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, nbytes)


def lock_pages(start: int, nbytes: int) -> bool:
    """Keep what is or comes into these pages from being swapped out; False where that is not allowed, or not to be had.

    `start`: an address at which a page begins.
    """
    lock = c_function("mlock2")
    return lock is not None and lock(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), _ON_FAULT) == 0


def large_blocks(least_bytes: int) -> Iterator[tuple[int, int]]:
    """Address and size of writable mappings without a file, from a size up; none where the system does not tell."""
    with contextlib.suppress(OSError), open(MAPS) as maps:
        for line in maps:
            span, access, _, _, inode, *name = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in span.split("-"))
            anonymous = inode == "0" and (not name or name[0].startswith("[heap]"))
            if anonymous and access.startswith("rw") and end - start >= least_bytes:
                yield start, end - start


def _status(*names: str) -> dict[str, int]:
    """Bytes by name; empty where the system has no such file."""
    fields: dict[str, int] = {}
    with contextlib.suppress(OSError), open(STATUS) as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in names:
                fields[name] = int(value.split()[0]) * 1024
    return fields


def _resident_set() -> int | None:
    import psutil

    with contextlib.suppress(OSError, psutil.Error, NotImplementedError):
        return int(psutil.Process().memory_info().rss)
    return None


def _peak_resident_set() -> int | None:
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kilobytes
    import psutil

    with contextlib.suppress(OSError, psutil.Error, NotImplementedError, AttributeError):
        return int(psutil.Process().memory_info().peak_wset)  # pyright: ignore
    return None
