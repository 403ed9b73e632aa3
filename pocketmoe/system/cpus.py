"""Which CPUs this process may use, which threads it has, and what runs where."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from pocketmoe.system.c_library import c_function

_CPUS, _TASKS, CPUINFO = Path("/sys/devices/system/cpu"), Path("/proc/self/task"), Path("/proc/cpuinfo")


def usable_cpus() -> set[int]:
    """The CPUs that this process may run on, by the system's numbers; all of them where it cannot be kept off any."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """How many cores this process may use, the two threads of one counted once; at least 1."""
    import psutil

    usable, cores = len(usable_cpus()), None
    with contextlib.suppress(OSError, psutil.Error, NotImplementedError):
        cores = psutil.cpu_count(logical=False)
    return max(1, min(cores or usable, usable))


def thread_ids() -> set[int]:
    """The threads of this process, by the system's numbers; none where the system does not tell."""
    with contextlib.suppress(OSError):
        return {int(task.name) for task in _TASKS.iterdir()}
    return set()


def place(thread: int, cpus: Iterable[int]) -> None:
    """Let a thread, 0 for the calling one, run on these CPUs alone; without effect where there is no such call."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # the thread has ended, or its CPUs were taken from the process
            os.sched_setaffinity(thread, cpus)


def can_place() -> bool:
    """Whether threads can be given CPUs here."""
    return hasattr(os, "sched_setaffinity")


def current_cpu() -> int | None:
    """The CPU that the calling thread is on, where the system tells."""
    found = c_function("sched_getcpu")
    return None if found is None else found()


def cpu_speed(cpu: int) -> int:
    """How fast the system says that a CPU is, in a unit of its own; 0 where it does not say."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        with contextlib.suppress(OSError, ValueError):
            return int((_CPUS / f"cpu{cpu}" / name).read_text())
    return 0


def cpuinfo() -> str:
    """What Linux says of the CPUs, a `name: value` a line; elsewhere the one line of which Python knows as much."""
    with contextlib.suppress(OSError):
        return CPUINFO.read_text(errors="replace")
    return f"model name: {platform.processor() or platform.machine()}\n"
