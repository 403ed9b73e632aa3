"""Files and directories: put in place whole or not at all, read where they are what they should be, synced."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.errors import BadInput
from pocketmoe.system.files import CLOEXEC, NO_TERMINAL, NO_WAITING, forget_cached, sync

MOST_TEXT_BYTES = 256 << 20  # 60 million tokens or more, which would take weeks to evaluate
_LEAST_READ = 1 << 20  # of files that have no size before they are read, as in /proc


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Put a file in place in one step; what was there stays until then. Makes its directory. Raises OutputError.

    `mode`: who may read and write it, as far as the umask allows.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with translate_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | CLOEXEC, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_whole(path: Path, most_bytes: int, remedy: str) -> bytes:
    """The bytes of a regular file, or of one that a link leads to.

    A FIFO, which would block for ever, a device, which might never end, and a file of more than `most_bytes` are
    refused before anything of them is read. Raises BadInput, which names the file and `remedy`.
    """
    data = None
    try:
        fd = os.open(path, os.O_RDONLY | NO_WAITING | CLOEXEC | NO_TERMINAL)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise BadInput(f"{path} cannot be read (it is {_kind(status.st_mode)}, not a file)", remedy)
            if status.st_size <= most_bytes:  # `read` allocates all that it is asked for, however short the file
                most_bytes = min(most_bytes, max(status.st_size, _LEAST_READ))
                data = file.read(most_bytes + 1)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:  # a NUL in its name
        raise BadInput(f"{path} cannot be read ({error})", remedy) from error
    if data is None or len(data) > most_bytes:
        raise BadInput(f"{path} has more than {most_bytes} bytes", remedy)
    return data


def read_text(path: Path, remedy: str, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """The text of such a file, line ends as they are. Raises BadInput, also where it is not UTF-8."""
    try:
        return read_whole(path, most_bytes, remedy).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})", "Convert it to UTF-8.") from error


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def is_folder(path: Path | str, dir_fd: int | None = None) -> bool:
    """Whether there is a directory of that name, and no link to one."""
    try:
        return stat.S_ISDIR(os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode)
    except OSError:
        return False


def is_plain_file(path: Path) -> bool:
    """Whether there is a regular file of that name, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def changed_ns(path: Path) -> int:
    """When the file's bytes or attributes last changed, by the system's clock. Raises OSError."""
    return path.lstat().st_ctime_ns


def files_below(root: Path) -> Iterator[str]:
    """Names, relative to `root`, of everything below it that is not a directory."""
    return (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_symlink() or not p.is_dir())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        forget_cached(file.fileno())  # hashing must not fill a small machine's memory
    return digest.hexdigest()


def sync_tree(root: Path) -> None:
    """Sync a directory and everything in it."""
    for path in (*root.rglob("*"), root):
        sync(path)
