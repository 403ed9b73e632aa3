"""How hot the machine gets and whether it slows itself down for it, where it says so."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pocketmoe.errors import printable
from pocketmoe.profiles.machine.energy import SYSFS
from pocketmoe.profiles.profile import Thermal


class ThermalWatch:
    """The hottest sensor and the signs of throttling from its making to each `sample`."""

    def __init__(self, sysfs: Path = SYSFS) -> None:
        self._zones = sorted((sysfs / "class/thermal").glob("thermal_zone*"))
        self._zones += sorted((sysfs / "class/hwmon").glob("hwmon*"))
        cpus = sysfs / "devices/system/cpu"
        self._counters = sorted(cpus.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
        self._clocks = sorted(cpus.glob("cpu[0-9]*/cpufreq"))
        self._start, self._source = self._hottest()
        self._highest = self._start
        self._throttles = _sum(self._counters)
        self._capped = False

    def sample(self) -> None:
        """Look at the sensors now."""
        celsius, _ = self._hottest()
        if celsius is not None:
            self._highest = max(celsius, self._highest or celsius)
        self._capped = self._capped or any(_is_capped(clock) for clock in self._clocks)

    def report(self) -> Thermal:
        """What was seen. A clock's limit below what the hardware allows counts as throttled where nothing counts it."""
        self.sample()
        known = bool(self._counters or self._clocks)
        throttled = _sum(self._counters) > self._throttles if self._counters else self._capped
        missing = [] if self._start is not None else ["no temperature sensor was found"]
        missing += [] if known else ["nothing tells of throttling"]
        return Thermal(
            source=self._source,
            start_celsius=self._start,
            highest_celsius=self._highest,
            throttled=throttled if known else None,
            reason=" and ".join(missing),
        )

    def _hottest(self) -> tuple[float | None, str]:
        best, source = None, ""
        for zone in self._zones:
            for sensor in (zone / "temp", *zone.glob("temp*_input")):
                with contextlib.suppress(OSError, ValueError):
                    celsius = int(sensor.read_text()) / 1000
                    if best is None or celsius > best:
                        best, source = celsius, _name(zone)
        return best, source


def _name(zone: Path) -> str:
    for file in ("type", "name"):
        with contextlib.suppress(OSError):
            return printable((zone / file).read_text().strip())
    return zone.name


def _sum(counters: list[Path]) -> int:
    total = 0
    for counter in counters:
        with contextlib.suppress(OSError, ValueError):
            total += int(counter.read_text())
    return total


def _is_capped(clock: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return int((clock / "scaling_max_freq").read_text()) < int((clock / "cpuinfo_max_freq").read_text())
    return False
