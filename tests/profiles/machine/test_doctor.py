"""What `doctor` finds, judged on machines we do not have."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import pytest

from pocketmoe.errors import OutputError
from pocketmoe.profiles.machine import bandwidth, doctor
from pocketmoe.profiles.machine.bandwidth import BLOCKS_BYTES, IN_FLIGHT, Disk, DiskRead, Ram, measure_disk, measure_ram
from pocketmoe.profiles.machine.doctor import Cpu, DoctorReport, Memory, Software, advice, examine, parse_cpuinfo
from pocketmoe.runtime.memory.limits import Limits

X86 = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: sse2 fma avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni avx512_bf16 avx_vnni amx_bf16 amx_tile amx_int8
processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: sse2 fma avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni avx512_bf16 avx_vnni amx_bf16 amx_tile amx_int8
"""
BIG_LITTLE = """\
processor\t: 0
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp
CPU part\t: 0xd05
processor\t: 1
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp sve i8mm bf16
CPU part\t: 0xd41
"""


def test_cpu_features() -> None:
    model, features = parse_cpuinfo(X86)
    assert model == "Intel(R) Xeon(R) Platinum 8488C"
    assert {*features} == {"avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}
    assert parse_cpuinfo(BIG_LITTLE) == ("", ("neon", "dotprod"))
    assert parse_cpuinfo("") == ("", ())


class Clock:
    """Time in which nothing happens but reads, of 10 ms each: every thread has its own, the caller the latest."""

    def __init__(self) -> None:
        self._latest = self._began = 0.0
        self._own = threading.local()
        self._lock = threading.Lock()

    def perf_counter(self) -> float:
        if threading.current_thread() is not threading.main_thread():
            if getattr(self._own, "asked", True):  # twice without a read between: one job has ended, here is the next
                self._own.now = self._began
            self._own.asked = True
            return self._own.now
        self._began = self._latest
        return self._latest

    def read(self, _fd: int, buffers: Sequence[bytes], offset: int) -> int:
        nbytes = sum(len(buffer) for buffer in buffers)
        assert offset % nbytes == 0
        self._own.now += 0.010
        self._own.asked = False
        with self._lock:
            self._latest = max(self._latest, self._own.now)
        return nbytes


def test_disk_speed_is_that_of_the_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of which each read takes 10 ms and which serves any number at once."""
    clock, usage = Clock(), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bandwidth.shutil, "disk_usage", lambda _: usage._replace(free=100 << 20))
    monkeypatch.setattr(bandwidth.os, "preadv", clock.read)
    monkeypatch.setattr(bandwidth, "time", clock)
    disk = measure_disk(tmp_path)
    assert [(found.block_bytes, found.in_flight) for found in disk.reads] == [
        (block, in_flight) for block in BLOCKS_BYTES for in_flight in IN_FLIGHT
    ]
    for found in disk.reads:
        assert found.bytes_per_s == pytest.approx(found.block_bytes * found.in_flight / 0.010)


def test_the_file_has_no_name_and_goes_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterdir would count itself too

    def interrupt(_fd: int, file_bytes: int, *_: int) -> NoReturn:
        assert 0 < file_bytes <= 256 << 20
        assert list(tmp_path.iterdir()) == []
        raise KeyboardInterrupt

    monkeypatch.setattr(bandwidth, "read_rate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure_disk(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == open_files  # noqa: PTH208


def test_little_room_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bandwidth.shutil, "disk_usage", lambda _: usage._replace(free=100 << 20))
    assert measure_disk(tmp_path).file_bytes <= 100 << 17
    monkeypatch.setattr(bandwidth.shutil, "disk_usage", lambda _: usage._replace(free=10 << 20))
    with pytest.raises(OutputError, match="No space left"):
        measure_disk(tmp_path)


def test_ram_speed_is_plausible() -> None:
    ram = measure_ram(2)
    assert 1e8 < ram.one_thread_bytes_per_s < 1e12
    assert 1e8 < ram.all_threads_bytes_per_s < 1e12


def test_this_machine(tmp_path: Path) -> None:
    report = examine(tmp_path, tries=1)
    assert json.loads(json.dumps(asdict(report), allow_nan=False))["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert report.slots_work
    assert report.disk is not None
    assert advice(report)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_ram", lambda threads: Ram(1e10, 1e10, threads))
    report = examine(tmp_path / "nowhere", tries=1)
    assert report.disk is None
    assert "nowhere" in report.disk_problem
    assert any("could not be measured" in line for line in advice(report))


GOOD = DoctorReport(
    cpu=Cpu("Some CPU", "x86_64", ("avx2",), 4),
    memory=Memory(
        total_bytes=16 * 10**9,
        available_bytes=12 * 10**9,
        cgroup_limit_bytes=None,
        lock_limit_bytes=None,
        shared_total_bytes=8 * 10**9,
        shared_free_bytes=8 * 10**9,
    ),
    software=Software("3.11", "1.32", "2.4", ("CPUExecutionProvider",)),
    ram=Ram(10e9, 34e9, 4),
    disk=Disk("here", True, 256 << 20, (DiskRead(4096, 1, 50e6), DiskRead(4 << 20, 2, 2.5e9))),
    disk_problem="",
    slots_work=True,
    slots_problem="",
    limits=Limits(open_files=1024, open_files_hard=4096, maps=65530, maps_used=400),
)


def test_a_good_machine_gets_its_bounds_and_nothing_else() -> None:
    disk, ram = advice(GOOD)
    assert "2.50 GB/s" in disk
    assert "15.1 tokens/s" in disk  # as worked out for 2.5 GB/s elsewhere: 15
    assert "50 tokens/s" in ram
    assert "slow" not in disk


def test_what_is_wrong_is_said() -> None:
    def first(**changes: object) -> str:
        return advice(replace(GOOD, **changes))[0]  # type: ignore[arg-type]

    memory = GOOD.memory
    slow = Disk("here", False, 8 << 20, (DiskRead(4 << 20, 2, 90e6),))
    assert "no room" in first(slots_work=False, slots_problem="no room")
    assert "64.0 MB free" in first(memory=replace(memory, shared_free_bytes=64_000_000))
    few = replace(GOOD.limits, maps=9000, maps_used=1500)
    assert "about 1750 experts" in first(limits=few)
    assert "less than that" in first(memory=replace(memory, cgroup_limit_bytes=10**9))
    assert "no avx2" in first(cpu=replace(GOOD.cpu, features=()))
    assert "no dotprod" in first(cpu=Cpu("Cortex-A72", "aarch64", ("neon",), 4))
    assert "page cache" in first(disk=slow)
    assert "Paging will be slow" in advice(replace(GOOD, disk=slow))[1]
