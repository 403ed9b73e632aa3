"""The directory of a prefix cache: one of this user's own, readable to nobody else, shared by any number of processes.

Files appear in it whole, under names that only this module gives, and go the least recently used first. Nothing else in
it is touched, and no link is followed. A file's time of change says when it was last used. What killed processes leave
has a name of its own and no lock, by which the next one that writes finds and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from io import BufferedReader, BufferedWriter, FileIO
from pathlib import Path
from typing import NamedTuple, Self

from pocketmoe.bundle.progress import OnStep, no_step
from pocketmoe.errors import BadInput, OutputError
from pocketmoe.system.files import CLOEXEC, NO_LINK, NO_WAITING, forget_cached, open_folder, set_aside
from pocketmoe.system.locks import lock_now, unlock

TAG = "CACHEDIR.TAG"  # by which backups know what to leave out (https://bford.info/cachedir/)
_TAG_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n# A prefix cache of pocketmoe. It is made of private texts.\n"
)
_ENTRY = re.compile(r"[0-9a-f]{64}\.(?:block|state)")
_PARTIAL = re.compile(rf"\.{_ENTRY.pattern}\.[0-9a-f]{{8}}\.partial")
_MOST_FILES = 10_000  # what a look at all of them takes of memory is 3 MB
_BUFFER_BYTES = 1 << 20
_LOCK_TRIES, _LOCK_WAIT_S = 200, 0.01  # a lock is held for some milliseconds, unless its process was stopped
_FLAGS = NO_LINK | NO_WAITING | CLOEXEC  # no link, and no pipe that nobody writes to
_REMEDY = "Name a directory of its own for the prefix cache; it is made where there is none."


class NoRoom(Exception):
    """Within the size allowed there is no room for another file."""


class Found(NamedTuple):
    """A file of the cache."""

    name: str
    nbytes: int
    used_ns: int  # by the system's clock


class Folder:
    """The directory, open. Close it after use."""

    def __init__(self, path: Path, fd: int, most_bytes: int, on_step: OnStep = no_step) -> None:
        """`fd`: of the directory, which is closed with this. `most_bytes`: of all files together.

        `on_step` is told `room`, `begun`, `written`, `published` for each file.
        """
        self.path, self.most_bytes = path, most_bytes
        self._fd, self._on_step = fd, on_step

    @classmethod
    def make(cls, path: Path, most_bytes: int, on_step: OnStep = no_step) -> Self:
        """Open it, made where there is none. Raises BadInput for what is something else, OutputError."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            pass  # opening says what it is
        except OSError as error:
            raise OutputError(f"{path} cannot be made ({error.strerror})", _REMEDY) from error
        folder = cls(path, _open_own(path, taken=True), most_bytes, on_step)
        with contextlib.suppress(OSError, NoRoom), folder._locked():
            folder._make_room(0, ())  # where less is allowed than before
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open one that there is, to look at it or to clear it. Raises BadInput."""
        return cls(path, _open_own(path, taken=False), 0)

    def has(self, name: str, nbytes: int) -> bool:
        """Whether there is a file of that name and size."""
        try:
            found = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == nbytes

    @contextlib.contextmanager
    def reading(self, name: str) -> Generator[BufferedReader[FileIO]]:
        """A file of the cache. Raises OSError, also where that name is no regular file."""
        fd = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=self._fd)
        with BufferedReader(FileIO(fd), _BUFFER_BYTES) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no file", name)
            yield file
            forget_cached(fd)  # it must not fill a small machine's memory

    @contextlib.contextmanager
    def writing(self, name: str, nbytes: int, spared: Collection[str] = ()) -> Generator[BufferedWriter[FileIO]]:
        """A new file of `nbytes`, which takes its name when the block ends well; others go where it needs room.

        `spared`: names of those that stay. Raises OSError, NoRoom.
        """
        partial = f".{name}.{secrets.token_hex(4)}.partial"
        with contextlib.ExitStack() as cleanup:
            with self._locked():
                self._make_room(nbytes, spared)
                self._on_step("room")
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
                fd = os.open(partial, flags, 0o600, dir_fd=self._fd)
                cleanup.callback(self._forget, partial)
                file = cleanup.enter_context(BufferedWriter(FileIO(fd, "w"), _BUFFER_BYTES))
                with contextlib.suppress(OSError):  # no locks here: then nobody removes leftovers either
                    lock_now(fd)
                set_aside(fd, nbytes)  # a full disk is noticed before anything is computed for it
            self._on_step("begun")
            yield file
            file.flush()
            self._on_step("written")
            os.rename(partial, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            self._on_step("published")

    def used(self, names: Sequence[str]) -> None:
        """Note that these were used now; the first of them are to stay longest."""
        now = time.time_ns()
        for index, name in enumerate(names):
            with contextlib.suppress(OSError):
                os.utime(name, ns=(now - index, now - index), dir_fd=self._fd, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Remove a file, if it is one of the cache's and there."""
        if _ENTRY.fullmatch(name):
            self._forget(name)

    def files(self) -> list[Found]:
        """What the cache holds, in no order; at most 10,000 files. Raises OSError."""
        return [*itertools.islice(self._found(_ENTRY.fullmatch), _MOST_FILES)]

    def clear(self) -> list[Found]:
        """Remove all that the cache holds, and the directory if nothing else is in it. Returns what was removed.

        Raises OSError.
        """
        gone: list[Found] = []
        while batch := self.files():
            for found in batch:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(found.name, dir_fd=self._fd)
            gone += batch
        with contextlib.suppress(OSError), self._locked():
            self._remove_left()
        if os.listdir(self._fd) == [TAG]:  # noqa: PTH208 - a descriptor
            self._forget(TAG)
            with contextlib.suppress(OSError):
                self.path.rmdir()
        return gone

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _found(self, is_wanted: Callable[[str], object]) -> Iterator[Found]:
        with os.scandir(self._fd) as entries:
            for entry in entries:
                if is_wanted(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(found.st_mode):
                            yield Found(entry.name, found.st_size, found.st_mtime_ns)

    def _make_room(self, nbytes: int, spared: Collection[str]) -> None:
        """Remove what was not used for longest, until `nbytes` more are allowed. Raises NoRoom, and removes nothing."""
        being_written = self._remove_left()
        files = self.files()
        over = sum(found.nbytes for found in files) + being_written + nbytes - self.most_bytes
        over_files = len(files) + 1 - _MOST_FILES
        free = [found for found in files if found.name not in spared]
        if over > sum(found.nbytes for found in free):
            raise NoRoom
        now = time.time_ns()
        # First what cannot be of this cache, by its size or its time.
        free.sort(key=lambda found: found.used_ns if found.nbytes <= self.most_bytes and found.used_ns <= now else 0)
        for found in free:
            if over <= 0 and over_files <= 0:
                return
            self._forget(found.name)
            over, over_files = over - found.nbytes, over_files - 1

    def _remove_left(self) -> int:
        """Remove what killed processes left half-written; the bytes of what others are writing now."""
        writing = 0
        for found in itertools.islice(self._found(_PARTIAL.fullmatch), _MOST_FILES):
            with contextlib.suppress(OSError):
                fd = os.open(found.name, os.O_RDONLY | _FLAGS, dir_fd=self._fd)
                try:
                    lock_now(fd)
                    self._forget(found.name)
                except OSError:
                    writing += found.nbytes
                finally:
                    os.close(fd)
        return writing

    def _forget(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._fd)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """Alone among the processes that make room. Raises OSError where another one does not let go."""
        for left in reversed(range(_LOCK_TRIES)):
            try:
                lock_now(self._fd)
                break
            except BlockingIOError:
                if not left:
                    raise OSError(errno.EBUSY, "another process holds its lock") from None
                time.sleep(_LOCK_WAIT_S)
            except OSError:
                break  # no locks on this file system
        try:
            yield
        finally:
            unlock(self._fd)


def _open_own(path: Path, taken: bool) -> int:
    """A descriptor of a cache's directory, or of an empty one, which becomes one where it is `taken`.

    Raises BadInput, OutputError.
    """
    try:
        fd = open_folder(path)
    except OSError as error:
        what = "is no directory, or a link to one" if error.errno in (errno.ENOTDIR, errno.ELOOP) else error.strerror
        raise BadInput(f"the prefix cache {path} cannot be opened ({what})", _REMEDY) from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise BadInput(f"the prefix cache {path} belongs to another user", _REMEDY)
        if not _is_tagged(fd):
            names = os.listdir(fd)  # noqa: PTH208 - a descriptor
            if any(name != TAG and not _ENTRY.fullmatch(name) and not _PARTIAL.fullmatch(name) for name in names):
                raise BadInput(f"{path} is no prefix cache: it holds other files", _REMEDY)
            if taken:
                _tag(fd)
        if taken and stat.S_IMODE(found.st_mode) != 0o700:
            os.fchmod(fd, 0o700)
    except OSError as error:
        os.close(fd)
        raise OutputError(f"the prefix cache {path} cannot be used ({error.strerror})", _REMEDY) from error
    except BadInput:
        os.close(fd)
        raise
    return fd


def _is_tagged(folder: int) -> bool:
    try:
        fd = os.open(TAG, os.O_RDONLY | _FLAGS, dir_fd=folder)
    except OSError:
        return False
    try:
        return os.read(fd, len(_TAG_TEXT) + 1) == _TAG_TEXT
    except OSError:
        return False
    finally:
        os.close(fd)


def _tag(folder: int) -> None:
    """Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(TAG, dir_fd=folder)  # of a process that was killed while it wrote it
    with contextlib.suppress(FileExistsError):  # another process was first
        fd = os.open(TAG, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600, dir_fd=folder)
        try:
            os.write(fd, _TAG_TEXT)
        finally:
            os.close(fd)
