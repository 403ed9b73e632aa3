"""How much energy the machine says it took, where it says so at all.

Three sources, best first: RAPL counters (Intel and AMD; joules, of the CPU package), the INA3221 rails of a Jetson and
the discharging battery (both watts, integrated over time). What none of them tells is said to be unavailable.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pocketmoe.profiles.profile import Energy

SYSFS = Path("/sys")
_MICRO = 1e-6
_JETSON_TOTALS = ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN")  # the rail that feeds the whole module, by generation


def counted(before: int, after: int, wraps_at: int) -> int:
    """What a counter counted from `before` to `after`, when it starts again at 0 beyond `wraps_at`, at most once."""
    return after - before if after >= before else after + wraps_at + 1 - before


class _Source(Protocol):
    name: str
    label: str

    def joules(self, now_s: float) -> float:
        """Energy since it was opened."""
        ...


@dataclass
class _Rapl:
    """Counters of microjoules that wrap: after minutes to hours, so `joules` is to be called now and then."""

    zones: Sequence[Path]
    name: str = "RAPL"
    label: str = "measured"
    _last: dict[Path, int] = field(default_factory=dict[Path, int])
    _total: float = 0.0

    def joules(self, now_s: float) -> float:  # noqa: ARG002 - it counts by itself
        for zone in self.zones:
            count = int((zone / "energy_uj").read_text())
            wraps_at = int((zone / "max_energy_range_uj").read_text())
            self._total += counted(self._last.get(zone, count), count, wraps_at) * _MICRO
            self._last[zone] = count
        return self._total


@dataclass
class _Power:
    """Watts, integrated by trapezoids between calls."""

    watts: Callable[[], float]
    name: str
    label: str
    _last: tuple[float, float] | None = None
    _total: float = 0.0

    def joules(self, now_s: float) -> float:
        watts = self.watts()
        if self._last is not None:
            then_s, before = self._last
            self._total += (now_s - then_s) * (watts + before) / 2
        self._last = (now_s, watts)
        return self._total


class EnergyMeter:
    """Energy from its making to each `sample`; call that now and then, since counters wrap and watts change."""

    def __init__(self, sysfs: Path = SYSFS, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._source, self._reason = _open(sysfs)
        self._joules = 0.0
        self.sample()

    def sample(self) -> None:
        """Look at the machine's sensors now."""
        if self._source is None:
            return
        try:
            self._joules = self._source.joules(self._clock())
        except (OSError, ValueError) as error:
            self._source, self._reason = None, f"the sensor stopped answering ({error})"

    def report(self, tokens: int) -> Energy:
        """What it took, spread over so many tokens."""
        self.sample()
        if self._source is None:
            return Energy(reason=self._reason)
        seconds = max(1e-9, self._clock() - self._began)
        return Energy(
            label="measured" if self._source.label == "measured" else "estimated",
            source=self._source.name,
            joules_per_token=self._joules / tokens,
            watts=self._joules / seconds,
        )


def _open(sysfs: Path) -> tuple[_Source | None, str]:
    """The best source there is, or why there is none."""
    zones = _rapl_zones(sysfs)
    readable = [zone for zone in zones if _number(zone / "energy_uj") is not None]
    if readable:
        names = "+".join((zone / "name").read_text().strip() for zone in readable)
        return _Rapl(readable, name=f"RAPL {names}: the processor, not disk, screen or losses"), ""
    source = _jetson(sysfs) or _battery(sysfs)
    if source is not None:
        return source, ""
    if zones:
        return None, "RAPL counters are there, and only root may read them"
    return None, "no RAPL counters, no Jetson power rails and no discharging battery were found"


def _rapl_zones(sysfs: Path) -> list[Path]:
    """Top-level zones, and the memory's where it is not part of one: packages hold their cores."""
    folder = sysfs / "class/powercap"
    zones = [*folder.glob("intel-rapl:?"), *folder.glob("intel-rapl:??"), *folder.glob("intel-rapl:*:*")]
    kept: list[Path] = []
    for zone in sorted(zones):
        with contextlib.suppress(OSError):
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                kept.append(zone)
    return kept


def _jetson(sysfs: Path) -> _Power | None:
    """The rail that feeds the module; volts times amperes, both in thousandths."""
    for folder in sorted((sysfs / "class/hwmon").glob("hwmon*")):
        for label in sorted(folder.glob("in*_label")):
            with contextlib.suppress(OSError):
                rail, number = label.read_text().strip(), label.name[2:].removesuffix("_label")
                volts, amperes = folder / f"in{number}_input", folder / f"curr{number}_input"
                if rail in _JETSON_TOTALS and _number(volts) is not None and _number(amperes) is not None:
                    return _Power(
                        lambda v=volts, a=amperes: int(v.read_text()) * int(a.read_text()) * _MICRO,
                        name=f"Jetson rail {rail}, sampled{_power_mode()}",
                        label="measured",
                    )
    return None


def _power_mode() -> str:
    """The power mode of a Jetson, which decides what its figures mean."""
    with contextlib.suppress(OSError):
        return f", nvpmodel {Path('/var/lib/nvpmodel/status').read_text().strip()}"
    return ""


def _battery(sysfs: Path) -> _Power | None:
    """The battery's own idea of its power, where it is discharging: the whole machine, screen included."""
    for folder in sorted((sysfs / "class/power_supply").glob("*")):
        with contextlib.suppress(OSError):
            if (folder / "type").read_text().strip() != "Battery":
                continue
            if (folder / "status").read_text().strip() != "Discharging":
                continue
            name = f"battery {folder.name}, sampled: the whole machine"
            if _number(folder / "power_now") is not None:
                return _Power(lambda f=folder: int((f / "power_now").read_text()) * _MICRO, name, "estimated")
            if _number(folder / "current_now") is not None and _number(folder / "voltage_now") is not None:
                return _Power(lambda f=folder: _volt_amperes(f), name, "estimated")
    return None


def _volt_amperes(folder: Path) -> float:
    microvolts, microamperes = (int((folder / name).read_text()) for name in ("voltage_now", "current_now"))
    return abs(microvolts * microamperes) * _MICRO * _MICRO


def _number(path: Path) -> int | None:
    """What a sensor says, None where it does not."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
