"""A lock on an open file or directory: one process at a time. It goes when the file is closed or the process ends."""

from __future__ import annotations

import contextlib
import errno
import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

_FAR = 1 << 42  # of the byte that Windows locks, beyond any that our files have: others may still read those


def lock_now(fd: int) -> None:
    """Lock, or raise BlockingIOError where another process has it, another OSError where there are no locks here."""
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        _windows("LK_NBLCK", fd)
    else:
        raise OSError(errno.ENOTSUP, "this system has no locks")


def unlock(fd: int) -> None:
    """Let others lock it; it may be unlocked already."""
    with contextlib.suppress(OSError):
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_UN)
        elif msvcrt is not None:
            _windows("LK_UNLCK", fd)


def _windows(mode: str, fd: int) -> None:
    """Raises BlockingIOError where another process has it."""
    here = os.lseek(fd, 0, os.SEEK_CUR)
    os.lseek(fd, _FAR, os.SEEK_SET)
    try:
        getattr(msvcrt, "locking")(fd, getattr(msvcrt, mode), 1)  # noqa: B009 - neither name is there on other systems
    except PermissionError as error:
        raise BlockingIOError(errno.EAGAIN, error.strerror) from error
    finally:
        os.lseek(fd, here, os.SEEK_SET)
