"""Energy and heat from a made-up /sys: counters that wrap, rails, batteries, and machines that do not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocketmoe.profiles.machine.energy import EnergyMeter, counted
from pocketmoe.profiles.machine.thermal import ThermalWatch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(root: Path, **files: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (root / name).write_text(f"{value}\n")


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    return tmp_path / "sys"


def test_a_counter_may_start_again() -> None:
    """From the largest value the next is 0."""
    assert counted(5, 9, 10) == 4
    assert counted(10, 0, 10) == 1
    assert counted(9, 2, 10) == 4


def test_rapl_counts_packages_once_and_survives_wraps(sysfs: Path) -> None:
    """Two packages, and memory that is no part of them; cores are part of a package. It wraps twice meanwhile."""
    rapl = sysfs / "class/powercap"
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:1": "package-1",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
    }
    for folder, name in zones.items():
        write(rapl / folder, name=name, energy_uj=9_000_000, max_energy_range_uj=9_999_999)
    clock = Clock()
    meter = EnergyMeter(sysfs, clock)
    for joules in (3, 6, 9, 2):  # 9 -> 3 wraps: 4 J; 3 and 3 more; 9 -> 2 wraps: 3 J
        clock.now += 1
        for folder in zones:
            write(rapl / folder, energy_uj=joules * 1_000_000)
        meter.sample()
    found = meter.report(tokens=10)
    assert (found.label, found.joules_per_token) == ("measured", pytest.approx(3 * (4 + 3 + 3 + 3) / 10))
    assert found.watts == pytest.approx(3 * 13 / 4)
    assert "package-0+" in found.source
    assert "core" not in found.source


def test_a_jetson_and_a_battery_are_integrated(sysfs: Path) -> None:
    """Volts times amperes of the rail that feeds the module, over time; a battery is only an estimate."""
    hwmon = sysfs / "class/hwmon/hwmon3"
    write(hwmon, in1_label="VDD_CPU", in1_input=5000, curr1_input=9000)
    write(hwmon, in2_label="VDD_IN", in2_input=5000, curr2_input=2000)  # 10 W
    clock = Clock()
    meter = EnergyMeter(sysfs, clock)
    clock.now = 2.0
    write(hwmon, curr2_input=4000)  # 20 W: 15 W in the mean
    found = meter.report(tokens=3)
    assert (found.label, found.joules_per_token) == ("measured", pytest.approx(10.0))
    (hwmon / "in2_label").unlink()
    battery = sysfs / "class/power_supply/BAT0"
    write(battery, type="Battery", status="Discharging", voltage_now=12_000_000, current_now=500_000)  # 6 W
    meter = EnergyMeter(sysfs, clock)
    clock.now = 4.0
    found = meter.report(tokens=4)
    assert (found.label, found.joules_per_token) == ("estimated", pytest.approx(3.0))
    (battery / "voltage_now").unlink()
    gone = meter.report(tokens=4)
    assert gone.label == "unavailable"
    assert gone.joules_per_token is None
    assert "stopped answering" in gone.reason


def test_a_machine_that_does_not_tell_says_why(sysfs: Path) -> None:
    """Nothing there, or on mains; heat likewise."""
    write(sysfs / "class/power_supply/BAT0", type="Battery", status="Charging", power_now=1)
    found = EnergyMeter(sysfs).report(tokens=1)
    assert found.label == "unavailable"
    assert "no RAPL" in found.reason
    heat = ThermalWatch(sysfs).report()
    assert heat.highest_celsius is None
    assert heat.throttled is None
    assert "no temperature sensor" in heat.reason
    assert "throttling" in heat.reason


def test_heat_is_the_hottest_seen_and_throttling_is_counted(sysfs: Path) -> None:
    zone = sysfs / "class/thermal/thermal_zone0"
    counter = sysfs / "devices/system/cpu/cpu0/thermal_throttle"
    write(zone, type="x86_pkg_temp", temp=41_000)
    write(counter, core_throttle_count=7)
    watch = ThermalWatch(sysfs)
    write(zone, temp=93_500)
    watch.sample()
    write(zone, temp=60_000)
    calm = watch.report()
    assert (calm.source, calm.start_celsius, calm.highest_celsius, calm.throttled) == (
        "x86_pkg_temp",
        41.0,
        93.5,
        False,
    )
    write(counter, core_throttle_count=8)
    assert watch.report().throttled
