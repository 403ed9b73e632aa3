"""Runs commands under a real memory limit, where this system lets us make one."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limited:
    """How a command ended that ran under a limit."""

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int


def run_limited(command: Sequence[str], limit_bytes: int, timeout_s: float = 120) -> Limited:
    """Run a command in a memory cgroup of that size, swap excluded; going over kills it. Skips where there is none."""
    with _cgroup(limit_bytes) as group:
        done = subprocess.run(
            command,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        peak = next(group / name for name in ("memory.max_usage_in_bytes", "memory.peak") if (group / name).exists())
        return Limited(done.returncode, done.stdout, done.stderr, int(peak.read_text()))


@contextlib.contextmanager
def _cgroup(limit_bytes: int) -> Iterator[Path]:
    version_1 = (_V1 / "memory.limit_in_bytes").exists()
    group = (_V1 if version_1 else _V2) / f"pocketmoe-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"the memory cgroup takes no limit: {error}")
        with contextlib.suppress(OSError):
            (group / ("memory.memsw.limit_in_bytes" if version_1 else "memory.swap.max")).write_text(
                str(limit_bytes) if version_1 else "0"
            )
        yield group
    finally:
        with contextlib.suppress(OSError):
            (group / "memory.force_empty").write_text("0")
        group.rmdir()
