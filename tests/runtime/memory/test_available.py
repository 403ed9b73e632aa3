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


def test_version_2(tmp_path: Path) -> None:
    """Its file names, and file pages that could be dropped do not count."""
    (tmp_path / "memory.max").write_text("500\n")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 120\nactive_file 80\n")
    assert budget._memory_cgroup(tmp_path, version_1=False) == (500, 180)
    (tmp_path / "memory.max").write_text("max\n")
    with pytest.raises(ValueError, match="max"):
        budget._memory_cgroup(tmp_path, version_1=False)


def test_never_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "memory_cgroups", lambda: [budget.MemoryCgroup(100, 150)])
    assert budget.available_bytes() == 0
