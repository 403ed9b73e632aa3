"""Files as a system knows them beyond reading and writing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from pocketmoe.system.c_library import c_function

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Flags of `os.open`, 0 where the system has none of the kind.
CLOEXEC: int = getattr(os, "O_CLOEXEC", 0)
DIRECTORY: int = getattr(os, "O_DIRECTORY", 0)
NO_TERMINAL: int = getattr(os, "O_NOCTTY", 0)
NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)
NO_WAITING: int = getattr(os, "O_NONBLOCK", 0)  # for somebody at the other end of a pipe

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # of fallocate(2)
_one_position = threading.Lock()  # where a read has to move the file's position first


def set_direct(fd: int, direct: bool) -> bool:
    """Let reads bypass the page cache, or not; return whether they do, since not every file system can.

    On Linux offsets, lengths and addresses must be whole pages then (O_DIRECT). macOS keeps the pages of such a file
    out of its cache instead (F_NOCACHE).
    """
    flag: int = getattr(os, "O_DIRECT", 0)
    if fcntl is None:
        return False
    with contextlib.suppress(OSError):
        if flag:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if direct else flags & ~flag)
        elif hasattr(fcntl, "F_NOCACHE"):
            fcntl.fcntl(fd, int(getattr(fcntl, "F_NOCACHE")), int(direct))  # noqa: B009 - macOS has it, Linux does not
            return direct
    return bool(flag and fcntl.fcntl(fd, fcntl.F_GETFL) & flag)


def read_at(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """Read into writable views of bytes, one after the other; the bytes read, fewer at the file's end. Raises OSError.

    Several threads may read from one file.
    """
    if hasattr(os, "preadv"):
        return os.preadv(fd, views, offset)
    done = 0
    for view in views:
        data = _piece_at(fd, view.nbytes, offset + done)
        view[: len(data)] = data
        done += len(data)
        if len(data) < view.nbytes:
            break
    return done


def _piece_at(fd: int, nbytes: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, offset)
    with _one_position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


def write_at(fd: int, data: bytes | mmap.mmap, offset: int) -> int:
    """Write to a place in a file; the bytes written. Raises OSError."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _one_position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def sync_bytes(fd: int) -> None:
    """Make what was written to a file survive a power cut, not what else is known of it where that can be left out."""
    getattr(os, "fdatasync", os.fsync)(fd)


def forget_cached(fd: int) -> None:
    """Tell the system that a file's pages need not stay in memory, where it can be told: they fill small machines."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def set_aside(fd: int, nbytes: int) -> None:
    """Make a file so long that its bytes have room on the disk. Raises OSError where they do not.

    Where the system has no such call the file gets its length, and a full disk shows when it is written to.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
    else:
        os.ftruncate(fd, max(nbytes, os.fstat(fd).st_size))


def give_up(fd: int, offset: int, nbytes: int) -> None:
    """Make whole pages of a file a hole, which takes no room on the disk. Raises OSError where that cannot be done."""
    punch = c_function("fallocate")
    if punch is None:
        raise OSError(errno.ENOTSUP, "this system has no holes in files")
    if punch(fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(nbytes)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the file system or the C library has no such call."""
    renameat2 = c_function("renameat2")
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, survive a power cut. Raises OSError.

    Where directories cannot be opened (Windows) their names are the file system's own business.
    """
    if not DIRECTORY and path.is_dir():
        return
    writable = 0 if DIRECTORY else os.O_RDWR  # Windows syncs only what may be written
    fd = os.open(path, os.O_RDONLY | writable)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_folder(path: Path | str, dir_fd: int | None = None) -> int:
    """A descriptor of a directory. Raises OSError, also for a link to one, and where there are no such things."""
    if not DIRECTORY:
        raise OSError(errno.ENOTSUP, "this system opens no directories", str(path))
    return os.open(path, os.O_RDONLY | DIRECTORY | NO_LINK | CLOEXEC, dir_fd=dir_fd)
