"""What stands in where a call is missing does what the call does, as far as it can, and says where it cannot."""

from __future__ import annotations

import errno
import os
import sys
import threading
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketmoe import process
from pocketmoe.bundle.in_place import punch_hole
from pocketmoe.bundle.partial import partial_directory
from pocketmoe.errors import BadInput, OutputError
from pocketmoe.ort import LEAST, refuse_old
from pocketmoe.runtime.memory.budget import Budget, available_bytes, machine_bytes
from pocketmoe.runtime.memory.ceiling import Allowance
from pocketmoe.system import c_library, cpus, files, limits, locks, memory

NOWHERE = Path("/nowhere/at/all")
WORLDS = {"preadv": ("preadv",), "pread": ("preadv", "pread")}


@pytest.fixture
def no_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library, "library", lambda: None)
    for module in (files, memory, cpus):
        monkeypatch.setattr(module, "c_function", c_library.c_function.__wrapped__)


@pytest.fixture
def no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATUS", "STAT", "MAPS"):
        monkeypatch.setattr(memory, name, NOWHERE)


@pytest.mark.parametrize("lacking", WORLDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), lengths=st.lists(st.integers(1, 90), max_size=5), offset=st.integers(0, 320))
def test_reads_at_a_place(tmp_path: Path, lacking: str, data: bytes, lengths: list[int], offset: int) -> None:
    """Whatever is read with, views are filled one after the other, until the file ends."""
    path = tmp_path / "data"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch, open(path, "rb") as file:
        for name in WORLDS[lacking]:
            patch.delattr(os, name)
        buffers = [bytearray(b"\xee" * length) for length in lengths]
        got = files.read_at(file.fileno(), [memoryview(buffer) for buffer in buffers], offset)
    wanted = data[offset : offset + sum(lengths)]
    assert got == len(wanted)
    assert b"".join(buffers) == wanted + b"\xee" * (sum(lengths) - got)


def test_reads_of_several_threads_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a read has to move the file's position first, no other read comes in between."""
    for name in WORLDS["pread"]:
        monkeypatch.delattr(os, name)
    path = tmp_path / "data"
    path.write_bytes(b"".join(bytes([number]) * 4096 for number in range(64)))
    wrong: list[int] = []
    with open(path, "rb") as file:

        def read(start: int) -> None:
            for number in (*range(start, 64), *range(start)):
                page = bytearray(4096)
                files.read_at(file.fileno(), [memoryview(page)], 4096 * number)
                if bytes(page) != bytes([number]) * 4096:
                    wrong.append(number)

        threads = [threading.Thread(target=read, args=(16 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_writes_at_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pwrite as with it."""
    monkeypatch.delattr(os, "pwrite")
    with open(tmp_path / "data", "w+b", buffering=0) as file:
        file.write(b"abcdef")
        assert files.write_at(file.fileno(), b"XY", 2) == 2
        file.seek(0)
        assert file.read() == b"abXYef"


def test_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has a flag of its own; where there is none, reads are said to come through the cache."""
    path = tmp_path / "data"
    path.touch()
    with open(path, "rb") as file:
        monkeypatch.delattr(os, "O_DIRECT")
        assert not files.set_direct(file.fileno(), True)
        told: list[tuple[int, int]] = []
        fake = types.SimpleNamespace(F_NOCACHE=48, fcntl=lambda _fd, command, value: told.append((command, value)))
        monkeypatch.setattr(files, "fcntl", fake)
        assert files.set_direct(file.fileno(), True)
        assert not files.set_direct(file.fileno(), False)
        assert told == [(48, 1), (48, 0)]
        monkeypatch.setattr(files, "fcntl", None)
        assert not files.set_direct(file.fileno(), True)


def test_room_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the call a file gets its length, and never loses any of it."""
    monkeypatch.delattr(os, "posix_fallocate")
    with open(tmp_path / "data", "w+b") as file:
        files.set_aside(file.fileno(), 1000)
        assert os.fstat(file.fileno()).st_size == 1000
        files.set_aside(file.fileno(), 10)
        assert os.fstat(file.fileno()).st_size == 1000


@pytest.mark.usefixtures("no_c_library")
def test_without_a_c_library(tmp_path: Path) -> None:
    """No exchange, no holes, no locked pages, no trimming: each says so, or does nothing."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert not files.exchange(tmp_path / "a", tmp_path / "b")
    store = tmp_path / "store"
    store.write_bytes(bytes(8192))
    with open(store, "r+b") as file, pytest.raises(OutputError, match="no holes"):
        punch_hole(file.fileno(), store, 0, 4096)
    assert store.read_bytes() == bytes(8192)
    assert not memory.lock_pages(0, 4096)
    assert cpus.current_cpu() is None
    memory.trim_heap()
    memory.map_blocks_from(1 << 20)


def test_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time by flock; by Windows's call, a byte that no file has, and the position stays."""
    path = tmp_path / "data"
    with open(path, "w+b", buffering=0) as first, open(path, "r+b", buffering=0) as second:
        locks.lock_now(first.fileno())
        with pytest.raises(BlockingIOError):
            locks.lock_now(second.fileno())
        locks.unlock(first.fileno())
        locks.lock_now(second.fileno())
        held: set[int] = set()

        def locking(fd: int, mode: int, nbytes: int) -> None:
            assert (os.lseek(fd, 0, os.SEEK_CUR), nbytes) == (1 << 42, 1)
            if mode == 0:
                held.discard(fd)
            elif held - {fd}:
                raise PermissionError(errno.EACCES, "Permission denied")
            else:
                held.add(fd)

        monkeypatch.setattr(locks, "fcntl", None)
        with pytest.raises(OSError, match="no locks"):
            locks.lock_now(first.fileno())
        locks.unlock(first.fileno())
        monkeypatch.setattr(locks, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, LK_UNLCK=0, locking=locking))
        first.write(b"abc")
        locks.lock_now(first.fileno())
        assert first.tell() == 3
        with pytest.raises(BlockingIOError):
            locks.lock_now(second.fileno())
        locks.unlock(first.fileno())
        locks.lock_now(second.fileno())


def test_no_locks_no_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be locked, writers take nothing of each other for a leftover."""
    monkeypatch.setattr(locks, "fcntl", None)
    with partial_directory(tmp_path / "target") as first, partial_directory(tmp_path / "target") as second:
        assert first != second
        assert first.is_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_proc")
def test_memory_by_the_resident_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc psutil and getrusage tell, slots are not counted a second time, and there is no limit to set."""
    assert memory.measured_by() == "resident set"
    assert memory.process_bytes() > 10 * 10**6
    assert memory.peak_process_bytes() >= memory.process_bytes() * 0.5
    assert memory.reserved_bytes() is None
    assert memory.locked_bytes() == 0
    assert list(memory.large_blocks(1)) == []
    assert memory.major_faults() >= 0
    budget = Budget(10**9)
    budget.map_slot(10**12)
    assert budget.observe() < 10**12
    before = limits.limit_of("DATA")
    allowance = Allowance()
    allowance.set(10**6)
    assert limits.limit_of("DATA") == before
    allowance.close()
    peak = memory.peak_process_bytes()
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts bytes where others count kilobytes
    assert memory.peak_process_bytes() * 1024 == pytest.approx(peak, rel=0.2)


@pytest.mark.usefixtures("no_proc")
def test_memory_that_nobody_can_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made up: neither what is in use nor what is free."""

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(memory, "resource", None)
    monkeypatch.setattr("psutil.Process", refuse)
    monkeypatch.setattr("psutil.virtual_memory", refuse)
    assert memory.measured_by() == "not measurable here"
    assert memory.process_bytes() == memory.peak_process_bytes() == 0
    budget = Budget(10**9)
    budget.map_slot(10**6)
    assert (budget.observe(), budget.peak_bytes) == (0, 0)
    assert memory.machine_memory() is not None, "sysconf knows the machine's"
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr("pocketmoe.runtime.memory.budget.memory_cgroups", list)
    with pytest.raises(BadInput) as refused:
        available_bytes()
    assert "--memory" in refused.value.one_line()
    assert machine_bytes() > 10**18


def test_cpus_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """All CPUs count, and nobody is placed."""
    placed = os.sched_getaffinity(0)
    monkeypatch.delattr(os, "sched_setaffinity")
    cpus.place(0, {min(placed)})
    assert os.sched_getaffinity(0) == placed
    assert not cpus.can_place()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert len(cpus.usable_cpus()) == os.cpu_count()
    monkeypatch.setattr("psutil.cpu_count", lambda logical: None)
    assert cpus.physical_cores() == os.cpu_count()
    monkeypatch.setattr(cpus, "CPUINFO", NOWHERE)
    assert cpus.cpuinfo().startswith("model name: ")


def test_limits_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without ulimit limits nothing, and is asked for nothing."""
    monkeypatch.setattr(limits, "resource", None)
    assert limits.limit_of("NOFILE") == (None, None)
    assert not limits.set_limit("DATA", 10**9)
    limits.lower_limit("AS", 1)


def test_machines_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and x86 CPUs that cannot do are told in a line, others not."""
    assert process.unsuited() == ""
    monkeypatch.setattr(process, "x86_flags", lambda: ["fpu", "sse2", "popcnt"])
    assert process.unsuited().startswith("This CPU lacks sse4_2, which numpy")
    monkeypatch.setattr(process, "x86_flags", list[str])
    assert process.unsuited() == "", "what nobody says is not held against a CPU"
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    assert "needs Python 3.11 or newer, and this is 3.10" in process.unsuited()


@pytest.mark.parametrize(
    ("version", "good"), [("1.23.2", False), ("1.30.0", False), ("1.31.0", True), ("2.0.0.dev1", True)]
)
def test_an_onnxruntime_that_gives_wrong_results(version: str, good: bool) -> None:
    """Is refused, by the version that is declared."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert f'"onnxruntime>={LEAST[0]}.{LEAST[1]}"' in project
    if good:
        refuse_old(version)
    else:
        with pytest.raises(BadInput, match=version):
            refuse_old(version)
