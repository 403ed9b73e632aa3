"""How fast this machine reads its disk and its memory: pure measuring, seconds in all, nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.system.files import forget_cached, read_at, set_direct, sync_bytes, write_at
from pocketmoe.system.memory import machine_memory

BLOCKS_BYTES = (4 << 10, 128 << 10, 1 << 20, 4 << 20)
IN_FLIGHT = (1, 2)

_PIECE = max(BLOCKS_BYTES)
_LARGE_BYTES = 1 << 20  # read twice
_MOST_FILE_BYTES = 256 << 20
_WRITING_S = 0.8
_READING_S = 0.15  # for each block size and number in flight
_MOST_RAM_BYTES = 256 << 20  # beyond the caches of the machines we are for
_LEAST_RAM_BYTES = 16 << 20
_PASSES = 3


@dataclass(frozen=True)
class DiskRead:
    """Random reads of one size."""

    block_bytes: int
    in_flight: int
    bytes_per_s: float


@dataclass(frozen=True)
class Disk:
    """Reads of a file that was just written, at random aligned places."""

    directory: str
    direct: bool  # False: the file system takes no direct reads, and the figures are partly those of the page cache
    file_bytes: int
    reads: tuple[DiskRead, ...]
    spread: float = 1.0  # large reads, seconds later, at most so many times as fast or slow: disks change by the minute

    @property
    def best_bytes_per_s(self) -> float:
        return max(read.bytes_per_s for read in self.reads)


@dataclass(frozen=True)
class Ram:
    """Reading of memory beyond the caches, by numpy."""

    one_thread_bytes_per_s: float
    all_threads_bytes_per_s: float
    threads: int


def measure_disk(
    directory: Path, progress: Progress = no_progress, between: Callable[[], object] = lambda: None
) -> Disk:
    """Read bandwidth of the disk under `directory`, in some 3 s, by a file of at most 256 MB and an eighth of the room.

    As the runtime reads experts: past the page cache, two at once. Large reads are taken again after `between`, and
    count by the mean.

    The file never has a name, so that not even a killed process leaves it behind. Raises OutputError when the
    directory cannot be written or has no room.
    """
    with translate_write_errors(directory):
        most = min(_MOST_FILE_BYTES, shutil.disk_usage(directory).free // 8)
        if most < 2 * _PIECE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            direct = _read_directly(file.fileno())
            file_bytes = _fill(file.fileno(), most)
            if not direct:
                forget_cached(file.fileno())
            plan = [(block, in_flight) for block in BLOCKS_BYTES for in_flight in IN_FLIGHT]
            reads: list[DiskRead] = []
            for done, (block, in_flight) in enumerate(plan):
                progress("reading the disk", done, len(plan))
                reads.append(DiskRead(block, in_flight, read_rate(file.fileno(), file_bytes, block, in_flight)))
            progress("reading the disk", len(plan), len(plan))
            between()
            again = [
                read_rate(file.fileno(), file_bytes, read.block_bytes, read.in_flight)
                if read.block_bytes >= _LARGE_BYTES
                else read.bytes_per_s
                for read in reads
            ]
    pairs = [(read.bytes_per_s, rate) for read, rate in zip(reads, again, strict=True)]
    spread = max((max(pair) / min(pair) for pair in pairs if min(pair) > 0), default=1.0)
    means = tuple(replace(read, bytes_per_s=sum(pair) / 2) for read, pair in zip(reads, pairs, strict=True))
    return Disk(str(directory.resolve()), direct, file_bytes, means, spread)


def measure_ram(threads: int) -> Ram:
    """Read bandwidth of memory with one thread and with `threads`, in some 0.5 s."""
    memory = machine_memory()
    nbytes = max(_LEAST_RAM_BYTES, min(_MOST_RAM_BYTES, memory.available // 8 if memory else 0))
    data = np.ones(nbytes // 8, np.uint64)
    one = _fastest(lambda: np.bitwise_or.reduce(data))
    parts = np.array_split(data, threads)
    with ThreadPoolExecutor(threads) as pool:
        every = _fastest(lambda: list(pool.map(np.bitwise_or.reduce, parts)))
    return Ram(data.nbytes / one, data.nbytes / every, threads)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    run()
    times: list[float] = []
    for _ in range(_PASSES):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _read_directly(fd: int) -> bool:
    """Let reads and writes bypass the page cache; False where the file system refuses."""
    if not set_direct(fd, True):
        return False
    with contextlib.suppress(OSError), mmap.mmap(-1, mmap.PAGESIZE) as page:
        write_at(fd, page, 0)  # some file systems accept the flag and refuse the calls
        return True
    return set_direct(fd, False)


def _fill(fd: int, most_bytes: int) -> int:
    """Write random bytes for a while; return how many. Each piece differs, or the disk could store one for all."""
    piece = mmap.mmap(-1, _PIECE)  # page-aligned, as direct writes want it
    data = np.frombuffer(piece, np.uint64)
    data[:] = np.random.default_rng(0).integers(0, 1 << 63, len(data), np.uint64)
    written, deadline = 0, time.perf_counter() + _WRITING_S
    while written + _PIECE <= most_bytes and (written < 2 * _PIECE or time.perf_counter() < deadline):
        data += np.uint64(0x9E3779B97F4A7C15)
        if write_at(fd, piece, written) != _PIECE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync_bytes(fd)  # else the time is that of filling memory
        written += _PIECE
    return written


def read_rate(fd: int, file_bytes: int, block_bytes: int, in_flight: int) -> float:
    """Bytes per second of random reads by `in_flight` threads."""
    began = time.perf_counter()
    deadline = began + _READING_S

    def read_on(seed: int) -> int:
        places = np.random.default_rng(seed).integers(0, file_bytes // block_bytes, 1 << 12) * block_bytes
        done = 0
        with mmap.mmap(-1, block_bytes) as buffer:
            while time.perf_counter() < deadline:
                done += read_at(fd, [memoryview(buffer)], int(places[done // block_bytes % len(places)]))
        return done

    with ThreadPoolExecutor(in_flight) as pool:
        total = sum(pool.map(read_on, range(in_flight)))
    return total / (time.perf_counter() - began)
