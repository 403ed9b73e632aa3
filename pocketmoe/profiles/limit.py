"""Runs a command under a real memory limit: a cgroup of its own, where going over is death."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


class LimitUnavailable(Exception):
    """Why no memory cgroup can be made here: most often, the user is not root."""


@dataclass(frozen=True)
class Limited:
    """How a command ended; `peak_bytes` as the cgroup counted it, page cache included. Killed by a signal: negative."""

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int


def run_limited(command: Sequence[str], limit_bytes: int | None, timeout_s: float = 120) -> Limited:
    """Run a command in a memory cgroup of that size, swap excluded; None only counts. Raises LimitUnavailable."""
    with _cgroup(limit_bytes) as group:
        child = subprocess.Popen(  # noqa: S603 - the caller's own command
            ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            stdout, stderr = child.communicate(timeout=timeout_s)
        finally:
            child.kill()
            child.wait()
        peak = next(path for name in ("memory.max_usage_in_bytes", "memory.peak") if (path := group / name).exists())
        return Limited(child.returncode, stdout, stderr, int(peak.read_text()))


@contextlib.contextmanager
def _cgroup(limit_bytes: int | None) -> Iterator[Path]:
    version_1 = (_V1 / "memory.limit_in_bytes").exists()
    group = (_V1 if version_1 else _V2) / f"pocketmoe-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise LimitUnavailable(f"no memory cgroup can be made here ({error.strerror})") from error
    try:
        if limit_bytes is not None:
            _set_limit(group, version_1, limit_bytes)
        yield group
    finally:
        with contextlib.suppress(OSError):
            (group / "memory.force_empty").write_text("0")
        group.rmdir()


def _set_limit(group: Path, version_1: bool, limit_bytes: int) -> None:
    try:
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit_bytes))
    except OSError as error:
        raise LimitUnavailable(f"the memory cgroup takes no limit ({error.strerror})") from error
    with contextlib.suppress(OSError):  # where swap is not accounted for there is none to exclude
        if version_1:
            (group / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
        else:
            (group / "memory.swap.max").write_text("0")
