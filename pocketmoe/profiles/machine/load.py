"""What others take of this machine while something is measured: its processors, their quota, its disk."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

BUSY = 0.05  # of the time: above it, what is measured is not what the machine can do
BUSY_DISK_BYTES_PER_S = 20e6
_PAUSE_S = 1.0  # before something is measured again
_MADE_OF_OTHERS = ("loop", "ram", "zram", "dm-", "md")  # what they move, a disk below them moves too
_BLOCK_DEVICES = Path("/sys/block")  # partitions are below their disks

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class OthersLoad:
    """What was not there for the measuring process. `disk_bytes_per_s` None: the system does not tell."""

    others_cpu: float = 0.0  # of the processors' time, taken by other processes, or by a hypervisor's other guests
    throttled: float = 0.0  # of the time, for which a CPU quota stopped this process's cgroup
    disk_bytes_per_s: float | None = None  # read and written by others

    @property
    def is_busy(self) -> bool:
        """Whether figures taken meanwhile are lower than they could be.

        A quota is no reason: what it leaves is all that there is, another time too.
        """
        return self.others_cpu > BUSY or (self.disk_bytes_per_s or 0.0) > BUSY_DISK_BYTES_PER_S

    @property
    def is_throttled(self) -> bool:
        """Whether a quota made a difference."""
        return self.throttled > BUSY

    @property
    def rank(self) -> tuple[float, float]:
        """The less, the quieter."""
        return self.others_cpu, self.disk_bytes_per_s or 0.0

    def in_words(self) -> str:
        """`others took 63% of the processors and moved 120 MB/s on the disk`, and what a quota did; "" for nothing."""
        said: list[str] = []
        if self.others_cpu > BUSY:
            said.append(f"others took {self.others_cpu:.0%} of the processors")
        if (self.disk_bytes_per_s or 0.0) > BUSY_DISK_BYTES_PER_S:
            said.append(f"others moved {(self.disk_bytes_per_s or 0.0) / 1e6:.0f} MB/s on the disk")
        if self.is_throttled:
            said.append(f"a CPU quota stopped this process for {self.throttled:.0%} of the time")
        return " and ".join(said)


@dataclass(frozen=True)
class Reading:
    """Counters at a moment, in seconds and bytes since some beginning. None where the system does not tell."""

    at_s: float
    cpu_s: float  # of all processors, idle or not
    idle_s: float
    own_cpu_s: float
    throttled_s: float = 0.0
    disk_bytes: float | None = None
    own_disk_bytes: float | None = None


class LoadMeter:
    """Watches from when it is made."""

    def __init__(self, read: Callable[[], Reading] | None = None) -> None:
        """`read`: how to look; by default at /proc and the cgroup of this process."""
        self._read = read or read_counters
        self._before = self._read()

    def load(self) -> OthersLoad:
        """What others took since it was made."""
        return load_between(self._before, self._read())


def load_between(before: Reading, now: Reading) -> OthersLoad:
    """What others took between two readings."""
    total, wall_s = now.cpu_s - before.cpu_s, now.at_s - before.at_s
    idle, own = now.idle_s - before.idle_s, now.own_cpu_s - before.own_cpu_s
    others = _share(total - idle - own, total)
    throttled = _share(now.throttled_s - before.throttled_s, wall_s)
    disk = None
    if None not in (now.disk_bytes, before.disk_bytes, now.own_disk_bytes, before.own_disk_bytes) and wall_s > 0:
        every = (now.disk_bytes or 0.0) - (before.disk_bytes or 0.0)
        mine = (now.own_disk_bytes or 0.0) - (before.own_disk_bytes or 0.0)
        disk = max(0.0, every - mine) / wall_s
    return OthersLoad(others, throttled, disk)


def quietest(
    measure: Callable[[], _Found],
    tries: int = 1,
    meter: Callable[[], LoadMeter] = LoadMeter,
    on_busy: Callable[[OthersLoad], object] = lambda _: None,
    pause_s: float = _PAUSE_S,
) -> tuple[_Found, OthersLoad, int]:
    """What was found with the least load of at most `tries` times, that load, and how often it was measured.

    It stops when nobody else was at work. `on_busy` is told the load before it is measured again.
    """
    best: tuple[_Found, OthersLoad] | None = None
    number = 0
    for number in range(1, tries + 1):
        watch = meter()
        found = measure()
        load = watch.load()
        if best is None or load.rank < best[1].rank:
            best = found, load
        if not load.is_busy or number == tries:
            break
        on_busy(load)
        time.sleep(pause_s)
    assert best is not None, "it is measured once at least"
    return *best, number


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0


def read_counters() -> Reading:
    """As the system tells them of this process and all."""
    every, process = psutil.cpu_times(), psutil.Process()
    own = process.cpu_times()
    idle = every.idle + every.iowait
    counted = (every.user, every.nice, every.system, every.irq, every.softirq, every.steal)  # guests are in user
    return Reading(
        at_s=time.monotonic(),
        cpu_s=sum(counted) + idle,
        idle_s=idle,
        own_cpu_s=own.user + own.system,
        throttled_s=throttled_s(),
        disk_bytes=_disk_bytes(),
        own_disk_bytes=_own_disk_bytes(),
    )


def throttled_s(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """For how long CPU quotas have stopped this process's cgroup, version 1 or 2, and those above it."""
    stopped = 0.0
    for folder in _cpu_cgroups(own, mounted):
        with contextlib.suppress(OSError, ValueError):
            stat = dict(line.split(maxsplit=1) for line in (folder / "cpu.stat").read_text().splitlines())
            stopped += int(stat.get("throttled_usec", 0)) / 1e6 + int(stat.get("throttled_time", 0)) / 1e9
    return stopped


def quota_cores(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many cores' time the quotas of this process's cgroups allow it; None where there is none."""
    quotas: list[float] = []
    for folder in _cpu_cgroups(own, mounted):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cpu_cgroups(own: Path, mounted: Path) -> Iterator[Path]:
    """This process's CPU cgroup and all above it."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = mounted / controllers
            here = root / path.lstrip("/")
            yield from (folder for folder in (here, *here.parents) if folder == root or root in folder.parents)


def _disk_bytes() -> float | None:
    """Read and written by all disks; partitions, and devices that are made of others, are not counted again."""
    try:
        counters = psutil.disk_io_counters(perdisk=True)
    except (OSError, NotImplementedError):
        return None
    whole = [name for name in counters if not name.startswith(_MADE_OF_OTHERS) and (_BLOCK_DEVICES / name).is_dir()]
    return float(sum(counters[name].read_bytes + counters[name].write_bytes for name in whole)) if whole else None


def _own_disk_bytes() -> float | None:
    try:
        io = psutil.Process().io_counters()
    except (OSError, psutil.Error, AttributeError):
        return None
    return float(io.read_bytes + io.write_bytes)
