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
import select
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from pocketmoe.system.limits import lower_limit
from pocketmoe.system.memory import mapped_bytes

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
    if not hasattr(os, "fork"):
        return _without_a_child(work)
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


def _without_a_child(work: Callable[[], bytes]) -> bytes:
    try:
        return work()
    except Exception as error:
        raise IsolatedFailure(_words(error)) from error


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:_LONGEST_REASON]


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
        answer = _FAILED + _words(error).encode("utf-8", "replace")
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
    lower_limit("CORE", 0)
    lower_limit("CPU", limits.cpu_s)
    mapped = mapped_bytes()
    if mapped is not None:
        lower_limit("AS", mapped + limits.memory_bytes)
