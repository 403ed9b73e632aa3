"""Work on files of strangers in a child process with limits, so that a crash, a hang or a bomb ends the child alone.

For parsers that are native code: a panic prints, an allocation that fails aborts, a pattern may backtrack for hours.
The child is a fork: it has what its parent had loaded, costs about 2 ms, and reports bytes through a pipe. It starts
no threads and writes nothing but what `work` writes. With more threads in the parent the child must not need a lock
that one of them may hold just then; tokenizers' own are only tried, never waited for, and a child that hangs all the
same is ended by its limits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

_PIECE = 1 << 16
_LONGEST_REASON = 400
_DONE, _FAILED = b"\0", b"\1"


@dataclass(frozen=True)
class Limits:
    """What the child may use: memory beyond what its parent has, processor time, time by the clock."""

    memory_bytes: int
    cpu_s: int
    wall_s: int


class IsolatedFailure(Exception):
    """What became of work in a child that did not get done, in a few words."""


def isolated(work: Callable[[], bytes], limits: Limits) -> bytes:
    """What `work()` returns, computed in a child process. Raises IsolatedFailure, whatever goes wrong there.

    What the child prints is dropped: native code writes of its panics to stderr.
    """
    reader, writer = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads, see above
            child = os.fork()
    except OSError as error:
        os.close(reader)
        os.close(writer)
        raise IsolatedFailure(f"no child process can be made: {error.strerror}") from error
    if child == 0:
        os.close(reader)
        _work_and_exit(work, writer, limits)
    os.close(writer)
    status = None
    try:
        answer = _read(reader, limits)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(reader)
        if status is None:  # too late, or interrupted
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if answer[:1] == _DONE:
        return answer[1:]
    if answer[:1] == _FAILED:
        raise IsolatedFailure(answer[1:].decode("utf-8", "replace"))
    assert status is not None
    raise IsolatedFailure(_how_it_died(status, limits))


def _read(reader: int, limits: Limits) -> bytes:
    """All that the child writes until it closes its end. Raises IsolatedFailure when that takes too long."""
    deadline = time.monotonic() + limits.wall_s
    pieces: list[bytes] = []
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            raise IsolatedFailure(f"it takes longer than {limits.wall_s} s")
        piece = os.read(reader, _PIECE)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def _how_it_died(status: int, limits: Limits) -> str:
    if not os.WIFSIGNALED(status):
        return f"it ends with exit code {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return f"it takes more than {limits.cpu_s} s of processor time, or is killed"
    with contextlib.suppress(ValueError):
        return f"it crashes, or needs more than {limits.memory_bytes >> 20} MiB ({signal.Signals(number).name})"
    return f"it crashes (signal {number})"


def _work_and_exit(work: Callable[[], bytes], writer: int, limits: Limits) -> NoReturn:
    """The child's whole life: nothing of its parent's clean-up runs in it."""
    code = 1
    try:
        _limit(limits)
        answer = _DONE + work()
    except BaseException as error:  # noqa: BLE001 - a panic of native code is none of Exception's
        text = " ".join(str(error).split()) or type(error).__name__
        answer = _FAILED + text[:_LONGEST_REASON].encode("utf-8", "replace")
    try:
        view = memoryview(answer)
        while view:
            view = view[os.write(writer, view) :]
        code = 0
    finally:
        os._exit(code)


def _limit(limits: Limits) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_CPU, limits.cpu_s)
    with open("/proc/self/statm", "rb") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _lower(resource.RLIMIT_AS, mapped + limits.memory_bytes)


def _lower(which: int, value: int) -> None:
    """Set a limit that is not above the one that is set already."""
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
