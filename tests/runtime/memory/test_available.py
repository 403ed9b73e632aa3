"""How much memory there is to take, in a process that has some already."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pocketmoe.runtime.memory import budget
from tests.cgroup import run_limited

MB = 10**6


@pytest.mark.root
def test_a_real_limit_less_what_is_in_use() -> None:
    code = "data = b'x' * 10**8; from pocketmoe.runtime.memory.budget import available_bytes; print(available_bytes())"
    done = run_limited([sys.executable, "-c", code], 300 * MB)
    assert done.returncode == 0, done.stderr
    assert 120 * MB < int(done.stdout) < 200 * MB


def group(folder: Path, limit: str, used: int, *, version_1: bool = False, high: str | None = None) -> None:
    """The files of a memory cgroup, with 100 bytes of pages that could be dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version_1 else ("memory.max", "memory.current")
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file 100\ntotal_inactive_file {100 * version_1}\n")
    if high is not None:
        (folder / "memory.high").write_text(f"{high}\n")


def found(tmp_path: Path, own: str) -> list[tuple[int, int]]:
    (tmp_path / "own").write_text(own)
    return [(each.limit_bytes, each.used_bytes) for each in budget.memory_cgroups(tmp_path / "own", tmp_path / "fs")]


def test_version_2(tmp_path: Path) -> None:
    """A service's limit and those above it; file pages that could be dropped do not count; "max" is none."""
    group(tmp_path / "fs/system.slice/pocketmoe.service", "500", 300)
    group(tmp_path / "fs/system.slice", "max", 700)
    assert found(tmp_path, "0::/system.slice/pocketmoe.service\n") == [(500, 200)]
    group(tmp_path / "fs/system.slice", "900", 700)
    assert found(tmp_path, "0::/system.slice/pocketmoe.service\n") == [(500, 200), (900, 600)]


@pytest.mark.parametrize(("most", "high", "limit"), [("500", "400", 400), ("500", "max", 500), ("max", "400", 400)])
def test_a_limit_that_slows_down_is_one(tmp_path: Path, most: str, high: str, limit: int) -> None:
    """MemoryHigh of a unit, below MemoryMax or alone."""
    group(tmp_path / "fs", most, 300, high=high)
    assert found(tmp_path, "0::/\n") == [(limit, 200)]


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/kubepods/burstable/pod1/0123", "/../0123"])
def test_version_2_in_a_container(tmp_path: Path, path: str) -> None:
    """With a name space of its own, and without one: its limit is at the root of what it sees."""
    group(tmp_path / "fs", "4000", 1100)
    assert found(tmp_path, f"0::{path}\n") == [(4000, 1000)]


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/ecs/task/0123"])
def test_version_1_in_a_container(tmp_path: Path, path: str) -> None:
    """Beside other controllers and an empty version 2, as on Jetson's kernels."""
    group(tmp_path / "fs/memory", "3000", 1100, version_1=True)
    (tmp_path / "fs/unified").mkdir()
    own = f"12:cpu,cpuacct:/x\n5:memory:{path}\n1:name=systemd:/y\n0::/z\n"
    assert found(tmp_path, own) == [(3000, 1000)]


def test_never_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "memory_cgroups", lambda: [budget.MemoryCgroup(100, 150)])
    assert budget.available_bytes() == 0
