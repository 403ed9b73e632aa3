"""The memory budget of the whole process: what is in use, and who has been promised what.

Memory in use is what the process takes (`system.memory`) and the bytes of slots, which are counted by their own size:
both ONNX Runtime and we map them, and a resident set would count them twice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from pocketmoe.errors import BadInput, BudgetTooSmall, OverBudget
from pocketmoe.system.memory import (
    MeasuredBy,
    machine_memory,
    map_blocks_from,
    measured_by,
    peak_process_bytes,
    process_bytes,
    trim_heap,
)

START_TO_START_BYTES = 4 * 10**6  # by which one bundle's least differs between starts: 100 to 102 MB were seen

_NO_LIMIT = 1 << 62
_LARGE_BYTES = 1 << 20
_SMALL_BYTES = 128 << 10  # where glibc itself begins


def return_freed_memory() -> None:
    """Make glibc map large blocks by themselves, so that what is freed goes back to the system at once.

    By default it keeps blocks of up to 32 MB once one has been freed: a prompt's values left 100 MB behind on 16 layers
    of OLMoE-1B-7B's shape, which no budget had promised.
    """
    map_blocks_from(_LARGE_BYTES)


_small_blocks = threading.Lock()
_making = 0  # threads within `small_blocks_too`


@contextlib.contextmanager
def small_blocks_too() -> Generator[None]:
    """Meanwhile map blocks by themselves from a size on that prompts would suffer from (a fifth of their speed).

    A session that is made frees what it has packed, and keeps small blocks that lie behind: of matrices below a
    megabyte the rest stayed, 0.9 MB a slot on Qwen3-30B-A3B's shape, and a budget of 6 GB came to 7.2.
    """
    global _making
    with _small_blocks:
        _making += 1
        map_blocks_from(_SMALL_BYTES)
    try:
        yield
    finally:
        with _small_blocks:
            _making -= 1
            if not _making:
                return_freed_memory()


def trim() -> None:
    """Give freed heap back to the system, which glibc otherwise keeps."""
    trim_heap()


def available_bytes() -> int:
    """What this process may still take: free memory, or what its memory cgroups leave.

    Raises BadInput where the system tells neither.
    """
    machine = machine_memory()
    available = [group.limit_bytes - group.used_bytes for group in memory_cgroups()]
    if machine is not None:
        available.append(machine.available)
    if not available:
        raise BadInput("this system does not say how much memory is free", "Say how much to take: --memory.")
    return max(0, min(available))


def machine_bytes() -> int:
    """The most that a process could have here, were it alone: all memory and swap, or what its memory cgroups allow.

    Where the system tells neither, more than anybody has.
    """
    machine = machine_memory()
    limits = [group.limit_bytes for group in memory_cgroups()]
    return min([machine.total + machine.swap if machine else _NO_LIMIT, *limits])


class MemoryCgroup(NamedTuple):
    """A cgroup's limit and what its processes take, without file pages that the system would rather drop."""

    limit_bytes: int
    used_bytes: int


def memory_cgroups(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[MemoryCgroup]:
    """This process's memory cgroup and all above it, version 1 or 2, as far as they have limits.

    In a container a version 1 path is the host's, of which only the end is mounted: at the root.
    """
    groups: list[MemoryCgroup] = []
    lines: list[str] = []
    with contextlib.suppress(OSError):  # a system without cgroups
        lines = own.read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = mounted / controllers
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                groups.append(_memory_cgroup(folder, controllers == "memory"))
            if folder == root:
                break
    return groups


def _memory_cgroup(folder: Path, version_1: bool) -> MemoryCgroup:
    """Raises OSError or ValueError for one without a limit. Beyond memory.high a process is slowed down to a crawl."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    if version_1:
        limit, used = (int((folder / f"memory.{name}_in_bytes").read_text()) for name in ("limit", "usage"))
        return MemoryCgroup(limit, used - int(stat["total_inactive_file"]))
    limits = [(folder / name).read_text().strip() for name in ("memory.max", "memory.high") if (folder / name).exists()]
    limit = min(int(found) for found in limits if found != "max")
    used = int((folder / "memory.current").read_text())
    return MemoryCgroup(limit, used - int(stat["inactive_file"]))


def refuse_over_budget(peak_bytes: int, budget_bytes: int) -> None:
    """Raise OverBudget when a process that has ended its work took more than it was given."""
    if peak_bytes > budget_bytes:
        raise OverBudget(
            f"the process took {peak_bytes / 1e6:.1f} MB at its peak, its budget is {budget_bytes / 1e6:.1f} MB",
            "If you trust the bundle this is a bug: please report it.",
        )


class Budget:
    """Everything that takes memory asks here first.

    Claims are promises: `claim` takes bytes out of what remains, whether or not they are in use yet.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._claims: dict[str, int] = {}
        self._lock = threading.Lock()
        self._mapped = 0
        self._slots_apart = measured_by() == "kernel"  # a resident set has them in it
        self._peak = 0
        self._peak_before = peak_process_bytes()  # of what the process did earlier

    @property
    def claimed_bytes(self) -> int:
        return sum(self._claims.values())

    @property
    def remaining_bytes(self) -> int:
        return self.total_bytes - self.claimed_bytes

    @property
    def claims(self) -> dict[str, int]:
        """What was promised to whom, in bytes."""
        return dict(self._claims)

    def claim(self, what: str, nbytes: int) -> None:
        """Promise `nbytes` to `what`; a second claim of the same name adds to it. Never refuses: see `require`."""
        self._claims[what] = self._claims.get(what, 0) + nbytes

    def release(self, what: str) -> None:
        """Take a promise back: its memory was needed for a time that is over."""
        del self._claims[what]

    def require(self, least_bytes: int) -> None:
        """Raise BudgetTooSmall unless the whole process can live with `least_bytes`.

        The error names a little more: how much of its libraries a process finds mapped differs from start to start,
        and the budget that one run was told must do for the next.
        """
        if self.total_bytes < least_bytes:
            raise BudgetTooSmall(self.total_bytes, least_bytes + START_TO_START_BYTES)

    def resize(self, total_bytes: int) -> None:
        """Another total holds from now on; so the peak is that of what comes."""
        self.total_bytes = total_bytes
        self._peak = 0
        self.observe()

    def map_slot(self, nbytes: int) -> None:
        """Count (or with a negative number uncount) shared memory that a slot fills."""
        with self._lock:
            self._mapped += nbytes

    def observe(self) -> int:
        """Memory in use now, in bytes, 0 where that is not measurable; remembers the peak."""
        own = process_bytes()
        used = own + self._mapped if self._slots_apart else own
        self._peak = max(self._peak, used)
        return used

    @property
    def measured_by(self) -> MeasuredBy:
        """How exactly memory in use is known here; where it is not measurable, `peak_bytes` is 0."""
        return measured_by()

    @property
    def peak_bytes(self) -> int:
        """The highest memory seen under this total: observed, and before there were slots also what was in between."""
        return self._peak

    def close_loading(self) -> None:
        """Call before the first slot is made: up to here the system's own high-water mark is exact.

        Unless the process has been larger before there was a budget: then the mark says nothing of loading.
        """
        mark = peak_process_bytes()
        if mark > self._peak_before:
            self._peak = max(self._peak, mark)
        else:
            self.observe()
