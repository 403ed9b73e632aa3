"""What others take of a machine, from counters that are given: no test looks at how busy this one is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.profiles.machine import doctor
from pocketmoe.profiles.machine.bandwidth import Ram
from pocketmoe.profiles.machine.doctor import advice, examine
from pocketmoe.profiles.machine.load import (
    BUSY,
    LoadMeter,
    OthersLoad,
    Reading,
    load_between,
    quietest,
    quota_cores,
    throttled_s,
)

BEGIN = Reading(at_s=100, cpu_s=1000, idle_s=400, own_cpu_s=10, throttled_s=1, disk_bytes=1e9, own_disk_bytes=1e6)
SECONDS = st.floats(0, 100)


@given(SECONDS, SECONDS, SECONDS, st.floats(0.1, 100))
def test_what_is_neither_idle_nor_ours_is_others(own: float, others: float, idle: float, wall: float) -> None:
    """As a share of the processors' time, always between nothing and all."""
    total = own + others + idle
    later = replace(
        BEGIN,
        at_s=BEGIN.at_s + wall,
        cpu_s=BEGIN.cpu_s + total,
        idle_s=BEGIN.idle_s + idle,
        own_cpu_s=BEGIN.own_cpu_s + own,
    )
    load = load_between(BEGIN, later)
    assert 0 <= load.others_cpu <= 1
    if total > 1:
        assert load.others_cpu == pytest.approx(others / total, abs=1e-6)
    assert (load.throttled, load.disk_bytes_per_s) == (0, 0)
    assert load.is_busy == (load.others_cpu > BUSY)
    assert load.is_busy == bool(load.in_words())


def test_a_quota_and_others_reads_count_too() -> None:
    """Each is named. Others' reads make figures doubtful; a quota is what the machine has. The unknown is not said."""
    later = replace(BEGIN, at_s=102, cpu_s=1004, idle_s=404)
    stopped = load_between(BEGIN, replace(later, throttled_s=2))
    assert stopped.throttled == 0.5
    assert stopped.in_words() == "a CPU quota stopped this process for 50% of the time"
    assert stopped.is_throttled
    assert not stopped.is_busy
    reads = load_between(BEGIN, replace(later, disk_bytes=1e9 + 5e8, own_disk_bytes=1e6 + 3e8))
    assert reads.disk_bytes_per_s == 1e8
    assert reads.in_words() == "others moved 100 MB/s on the disk"
    assert reads.is_busy
    assert load_between(BEGIN, replace(later, disk_bytes=1e9 + 1e7, own_disk_bytes=1e6 + 3e7)).disk_bytes_per_s == 0
    for unknown in (replace(later, disk_bytes=None), replace(later, own_disk_bytes=None)):
        assert load_between(BEGIN, unknown).disk_bytes_per_s is None
        assert not load_between(BEGIN, unknown).is_busy


class Meters:
    """One load a measurement, in turn."""

    def __init__(self, loads: Sequence[OthersLoad]) -> None:
        self._loads: Iterator[OthersLoad] = iter(loads)

    def __call__(self) -> LoadMeter:
        load = next(self._loads)
        later = replace(
            BEGIN,
            at_s=BEGIN.at_s + 1,
            cpu_s=BEGIN.cpu_s + 1,
            idle_s=BEGIN.idle_s + 1 - load.others_cpu,
            disk_bytes=1e9 + (load.disk_bytes_per_s or 0),
        )
        readings = iter((BEGIN, later))
        return LoadMeter(lambda: next(readings))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_it_is_measured_again_until_nobody_is_at_work(shares: list[float]) -> None:
    """At most so many times; what is kept was measured beside the least."""
    numbers = iter(range(len(shares)))
    said: list[OthersLoad] = []
    found, load, tries = quietest(
        lambda: next(numbers), len(shares), Meters([OthersLoad(share) for share in shares]), said.append, pause_s=0
    )
    looked = shares[:tries]
    assert load.others_cpu == pytest.approx(min(looked), abs=1e-9)
    assert shares[found] == pytest.approx(min(looked), abs=1e-9)
    assert all(share > BUSY - 1e-9 for share in looked[:-1])
    assert tries == len(shares) or looked[-1] <= BUSY + 1e-9
    assert len(said) == tries - 1


def test_doctor_measures_again_marks_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice beside others, which is kept and said; once where it is quiet, and nothing is said."""
    monkeypatch.setattr(doctor, "measure_ram", lambda threads: Ram(1e10, 1e10, threads))
    monkeypatch.setattr("pocketmoe.profiles.machine.load.time.sleep", lambda _: None)
    said: list[str] = []

    def progress(what: str, _done: int, total: int) -> None:
        if not total:
            said.append(what)

    nowhere = tmp_path / "nowhere"  # so that no disk is measured
    busy = examine(nowhere, progress, 2, Meters([OthersLoad(0.9), OthersLoad(0.4)]))
    assert busy.load.others_cpu == pytest.approx(0.4)
    assert busy.tries == 2
    assert said == ["others took 90% of the processors: measuring again"]
    assert advice(busy)[0].startswith(
        "Others took 40% of the processors while speeds were measured, in the quietest of 2"
    )
    quiet = examine(nowhere, progress, 2, Meters([OthersLoad(0.01)]))
    assert (quiet.load.is_busy, quiet.tries, len(said)) == (False, 1, 1)
    assert not any("while speeds were measured" in line for line in advice(quiet))


@pytest.mark.parametrize("version", [1, 2])
def test_quotas_of_both_kinds_of_cgroups(tmp_path: Path, version: int) -> None:
    """The tightest of the group and those above it; time that they stopped it adds up; no files: no quota."""
    own, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    root = mounted / ("cpu,cpuacct" if version == 1 else "")
    inner = root / "outer/inner"
    inner.mkdir(parents=True)
    own.write_text("4:memory:/outer\n2:cpu,cpuacct:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    assert quota_cores(own, mounted) is None
    assert throttled_s(own, mounted) == 0
    if version == 1:
        for folder, quota in ((root, -1), (inner.parent, 150_000), (inner, 50_000)):
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")
        (inner / "cpu.stat").write_text("nr_periods 10\nnr_throttled 5\nthrottled_time 2500000000\n")
    else:
        (inner.parent / "cpu.max").write_text("150000 100000\n")
        (inner / "cpu.max").write_text("50000 100000\n")
        (root / "cpu.max").write_text("max 100000\n")
        (inner / "cpu.stat").write_text("usage_usec 12\nthrottled_usec 2500000\n")
    assert quota_cores(own, mounted) == 0.5
    assert throttled_s(own, mounted) == 2.5
    assert quota_cores(tmp_path / "nothing", mounted) is None
