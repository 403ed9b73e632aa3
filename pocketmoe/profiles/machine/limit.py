"""Runs a command under a real memory limit: a cgroup of its own, where going over is death."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketmoe.system.files import open_folder
from pocketmoe.system.locks import lock_now

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_NAME = "pocketmoe-"


class LimitUnavailable(Exception):
    """Why no memory cgroup can be made here: most often, the user is not root."""


@dataclass(frozen=True)
class Limited:
    """How a command ended; `peak_bytes` as the cgroup counted it, page cache included. Killed by a signal: negative.

    `peak_bytes` is None where there was no cgroup.
    """

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int | None


def run_limited(
    command: Sequence[str],
    limit_bytes: int | None,
    timeout_s: float | None = 120,
    on_line: Callable[[str], None] | None = None,
) -> Limited:
    """Run a command in a memory cgroup of that size, swap excluded; None only counts. Raises LimitUnavailable.

    `on_line` is given each line of its stderr at once, by another thread. Raises TimeoutError.
    """
    with _cgroup(limit_bytes) as group:
        inside = ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command]
        ended = run_plain(inside, timeout_s, on_line)
        peak = next(path for name in ("memory.max_usage_in_bytes", "memory.peak") if (path := group / name).exists())
        return Limited(ended.returncode, ended.stdout, ended.stderr, int(peak.read_text()))


def run_plain(
    command: Sequence[str], timeout_s: float | None = 120, on_line: Callable[[str], None] | None = None
) -> Limited:
    """`run_limited` without a limit or a cgroup."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603 - the caller's
    late = threading.Event()
    lines: list[str] = []

    def listen() -> None:
        for line in child.stderr or ():
            lines.append(line)
            if on_line:
                on_line(line)

    def stop() -> None:
        late.set()
        child.kill()

    listener = threading.Thread(target=listen, daemon=True)
    watch = threading.Timer(timeout_s or threading.TIMEOUT_MAX, stop)
    try:
        listener.start()
        watch.start()
        assert child.stdout is not None
        stdout = child.stdout.read()
        listener.join()
        child.wait()
    finally:
        watch.cancel()
        child.kill()
        child.wait()
        for pipe in (child.stdout, child.stderr):
            if pipe:
                pipe.close()
    if late.is_set():
        raise TimeoutError(f"{command[0]} took longer than {timeout_s} s")
    return Limited(child.returncode, stdout, "".join(lines), None)


@contextlib.contextmanager
def _cgroup(limit_bytes: int | None) -> Generator[Path]:
    version_1 = (_V1 / "memory.limit_in_bytes").exists()
    parent = _V1 if version_1 else _V2
    _remove_left_behind(parent)
    with contextlib.ExitStack() as stack:
        group = _make_locked(parent, stack)
        if limit_bytes is not None:
            _set_limit(group, version_1, limit_bytes)
        yield group


def _make_locked(parent: Path, stack: contextlib.ExitStack) -> Path:
    """A new cgroup with a lock on it, until the stack is left. Raises LimitUnavailable."""
    try:
        while True:
            group = parent / f"{_NAME}{secrets.token_hex(4)}"
            group.mkdir()
            with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another run took it for one left behind
                stack.callback(os.close, _lock(group))
                if group.exists():
                    stack.callback(_remove, group)
                    return group
    except OSError as error:
        raise LimitUnavailable(f"no memory cgroup can be made here ({error.strerror})") from error


def _lock(group: Path) -> int:
    """Lock a cgroup until the returned descriptor is closed, also by death. Raises OSError, also for a link."""
    fd = open_folder(group)
    try:
        lock_now(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove(group: Path) -> None:
    with contextlib.suppress(OSError):
        (group / "memory.force_empty").write_text("0")
    group.rmdir()


def _remove_left_behind(parent: Path) -> None:
    """Remove the cgroups of runs that were killed: those that nobody has locked, and in which nothing runs."""
    for group in parent.glob(f"{_NAME}*"):
        with contextlib.suppress(OSError):
            fd = _lock(group)
            try:
                _remove(group)
            finally:
                os.close(fd)


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
