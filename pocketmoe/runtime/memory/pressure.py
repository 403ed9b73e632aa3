"""Whether the system is short of memory, and what an elastic budget becomes then."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pocketmoe.runtime.memory.budget import available_bytes, machine_bytes

_SHORT_STALLED, _CALM_STALLED = 0.1, 0.01  # shares of the time
_SHORT_SPARE, _CALM_SPARE = 0.05, 0.15  # of the machine's memory
_STEP = 0.25  # of the budget that goes at once; what is given back at once, of what is available
_AVERAGE = re.compile(r"some avg10=(\d+\.\d+)")


class Pressure(NamedTuple):
    """`stalled`: the share of the last ten seconds in which some task waited for memory (Linux's PSI), 0 where the
    system does not tell. `available_bytes`: what this process may still take, of `machine_bytes` in all.
    """

    stalled: float
    available_bytes: int
    machine_bytes: int

    @property
    def is_short(self) -> bool:
        return self.stalled >= _SHORT_STALLED or self.available_bytes < _SHORT_SPARE * self.machine_bytes

    @property
    def is_calm(self) -> bool:
        return self.stalled < _CALM_STALLED and self.available_bytes > _CALM_SPARE * self.machine_bytes


def read_pressure() -> Pressure:
    """As it is now, of the whole system and of this process's cgroups (version 2)."""
    stalled = [0.0]
    for path in _files():
        with contextlib.suppress(OSError):  # a kernel without it, or another version of cgroups
            stalled += [float(found) / 100 for found in _AVERAGE.findall(path.read_text())]
    return Pressure(max(stalled), available_bytes(), machine_bytes())


def next_budget(now_bytes: int, full_bytes: int, least_bytes: int, pressure: Pressure) -> int:
    """What a budget becomes, between the least and the full one: less where memory is short, more where it is calm."""
    wanted = now_bytes
    if pressure.is_short:
        wanted = int((1 - _STEP) * now_bytes)
    elif pressure.is_calm:
        wanted = now_bytes + int(_STEP * pressure.available_bytes)
    return max(min(least_bytes, full_bytes), min(full_bytes, wanted))


def _files() -> Iterator[Path]:
    yield Path("/proc/pressure/memory")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                yield Path("/sys/fs/cgroup", line[3:].lstrip("/"), "memory.pressure")
