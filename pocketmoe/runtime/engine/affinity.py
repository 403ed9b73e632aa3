"""A CPU for the thread that feeds an engine, which its helpers stay off while it feeds.

When the first operator after a wait wakes ONNX Runtime's worker, Linux likes to put it on the CPU of the thread that
wakes it, which then waits for it in a loop: each stands in the other's way until the scheduler moves one, a millisecond
later. Segments of 16 layers of OLMoE-1B-7B's shape took 35 ms a token so where a layer misses one expert, and 13 ms
with helpers elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

_libc = ctypes.CDLL(None)
_CPUS = Path("/sys/devices/system/cpu")


def thread_ids() -> set[int]:
    """The threads of this process, by the system's numbers; none where the system does not tell."""
    with contextlib.suppress(OSError):
        return {int(task.name) for task in Path("/proc/self/task").iterdir()}
    return set()


class OwnCpu:
    """A context in which the calling thread has one CPU, and `helpers` all others that it may use.

    Outside of it the thread goes where it went before. Without effect where there is one CPU only, or no such call.
    """

    def __init__(self, helpers: Iterable[int]) -> None:
        """`helpers`: ids of threads, which from now on stay off that CPU."""
        self._own: set[int] = set()
        self._before: set[int] = set()
        allowed: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        if len(allowed) < 2:
            return
        self._own = {_choose(allowed)}
        for helper in helpers:
            _place(helper, allowed - self._own)

    def __enter__(self) -> None:
        if self._own:
            self._before = os.sched_getaffinity(0)
            _place(0, self._own)

    def __exit__(self, *_: object) -> None:
        if self._own:
            _place(0, self._before)


def _choose(allowed: set[int]) -> int:
    """The CPU that the thread is on, or one that can go faster, where not all are alike."""
    speeds = {cpu: _speed(cpu) for cpu in allowed}
    fastest = {cpu for cpu, speed in speeds.items() if speed == max(speeds.values())}
    here = int(_libc.sched_getcpu())
    return here if here in fastest else min(fastest)


def _speed(cpu: int) -> int:
    """How fast the system says that it is, in a unit of its own; 0 where it does not say."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        with contextlib.suppress(OSError, ValueError):
            return int((_CPUS / f"cpu{cpu}" / name).read_text())
    return 0


def _place(thread: int, cpus: set[int]) -> None:
    with contextlib.suppress(OSError):  # the thread has ended, or its CPUs were taken from the process
        os.sched_setaffinity(thread, cpus)
