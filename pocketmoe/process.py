"""The process around a command: its signals and its three streams. Light, since it comes before all other imports."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, NoReturn, TextIO

_WORDS = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated."}
if hasattr(signal, "SIGHUP"):  # Windows has no terminal that hangs up
    _WORDS[signal.SIGHUP] = "Hung up."


_LEAST_PYTHON = (3, 11)
_X86_NEEDS = ("sse4_2", "popcnt")  # of what is called x86-64-v2
_CPUINFO_BYTES = 8192


class Stopped(SystemExit):
    """A signal other than Ctrl-C's asked the process to end: the exit code is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.word = _WORDS[signal.Signals(number)]


class ReaderGone(SystemExit):
    """Nobody reads stdout any more (`| head`), which is no error."""

    def __init__(self) -> None:
        super().__init__(0)


def unsuited() -> str:
    """Why nothing of this can run here, in a line, before a library says it worse; "" where it can.

    numpy and ONNX Runtime, and so their wheels, need an x86-64 of 2009 or later: others die of an illegal instruction.
    """
    if sys.version_info < _LEAST_PYTHON:
        wanted, found = (".".join(map(str, version[:2])) for version in (_LEAST_PYTHON, sys.version_info))
        return f"PocketMoE needs Python {wanted} or newer, and this is {found}. docs/DEVICES.md says how to have one."
    missing = [flag for flag in _X86_NEEDS if flag not in x86_flags()]
    if missing and x86_flags():
        lacks = " and ".join(missing)
        return f"This CPU lacks {lacks}, which numpy and ONNX Runtime need. Use a machine of 2009 or later."
    return ""


def x86_flags() -> list[str]:
    """The features of the first CPU, as Linux says them; none on another system or another kind of CPU."""
    if not hasattr(os, "uname") or os.uname().machine != "x86_64":
        return []
    try:
        with open("/proc/cpuinfo", "rb") as file:
            text = file.read(_CPUINFO_BYTES).decode("ascii", "replace")
    except OSError:
        return []
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return lines[0].partition(":")[2].split() if lines else []


def leave_on_signals() -> None:
    """From here on a signal ends the process at once: for times at which nothing is open, such as imports."""
    _handle(_leave)


def unwind_on_signals() -> None:
    """From here on a signal raises KeyboardInterrupt or Stopped: a command takes away what it has made so far."""
    _handle(_unwind)


def settle(code: int) -> int:
    """The code to leave with. After a signal the process ends here: nobody waits for what threads still compute."""
    if code > 128:
        sys.stderr.flush()
        os._exit(code)
    return code


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in _WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell's background job: it is to go on
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    try:
        os.write(2, f"\n{_WORDS[signal.Signals(number)]}\n".encode())
    finally:
        os._exit(128 + number)


def _unwind(number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


def open_missing_streams() -> None:
    """A stream that the caller closed gets /dev/null, lest the next file that is opened takes its number.

    stdout gets one that cannot be written, so that it is said when a result would be lost.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)


def prepare_streams() -> None:
    """Streams that never raise anything but Stopped's kind: see `_Stdout` and `_Stderr`. Characters that the terminal's
    encoding lacks are escaped.
    """
    open_missing_streams()
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout = _text(sys.stdout, _Stdout(1))
    sys.stderr = _text(sys.stderr, _Stderr(2), line_buffering=True)


def _text(before: TextIO | None, raw: io.RawIOBase, **options: Any) -> io.TextIOWrapper:
    encoding = getattr(before, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="backslashreplace", **options)


class _Stream(io.RawIOBase):
    """A descriptor. After a failed write all further ones are dropped: Python flushes again when it ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._failed = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: Any) -> int:
        if self._failed:
            return len(data)
        while True:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:  # somebody else made the terminal or pipe non-blocking
                select.select([], [self._fd], [])
            except OSError as error:
                self._failed = True
                self.fail(error)
                return len(data)

    def fail(self, error: OSError) -> None:
        raise NotImplementedError


class _Stdout(_Stream):
    """Raises ReaderGone, or OutputError for results that cannot be written (a full disk)."""

    def fail(self, error: OSError) -> None:
        from pocketmoe.errors import OutputError

        if isinstance(error, BrokenPipeError):
            raise ReaderGone from None
        if error.errno == errno.EBADF:
            raise OutputError("stdout is closed", "Let it go to a file, a pipe or a terminal.") from error
        raise OutputError(f"stdout cannot be written ({error.strerror})", "Let it go elsewhere, or free some space.")


class _Stderr(_Stream):
    """Never raises: a message that nobody can read is no reason to give up hours of work."""

    def fail(self, error: OSError) -> None:
        pass
