"""How long work goes on where a killed run stopped, told once.

What has been done is on disk before more is begun, under a plan: all that the result depends on. The next run with the
same plan goes on after it, a run with another does not touch it or starts over, and one run at a time may hold it.

    partial.py    a directory beside the output: locked, with its plan, removed when the work is published or fails
    Work.once     in such a directory, the result of one step, as a file that is written whole or not at all
    Log           results added to a file, a line each, of which a kill can tear only the last

Experts that are being written are a Log of records, each believed by its hash (`stream`); what quantize measures are
steps of Work (`pipeline`, `calibration`). The log of `eval --resume` lies where the user said, and stays, so that it
has its plan as its first line, and a checksum in each (`profiles.quality.journal`). A profile needs none of this: each
measured run is a whole result, and profile.json, written anew after each, is the output itself (`profiles.measure`).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from pocketmoe.bundle.files import write_whole
from pocketmoe.bundle.partial import RESUME, partial_directory
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.system.files import CLOEXEC, NO_WAITING
from pocketmoe.system.locks import lock_now

Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """What a long command works with.

    scratch: a directory for what is needed only meanwhile; kept: one for the results of its steps, None to keep none.
    workers: threads, by default one per core, or where Ray is (`quantize.workers`); progress: who is told.
    """

    scratch: Path
    kept: Path | None = None
    workers: int | str | None = None
    progress: Progress = no_progress

    def once(self, name: str, kind: type[Result], make: Callable[[], Result]) -> Result:
        """The result of the step of that name, of a type that msgspec knows: as it was kept, else made and kept.

        Raises OutputError, and what `make` raises.
        """
        if self.kept is None:
            return make()
        path = self.kept / f"{name}.json"
        if path.is_file():
            return msgspec.json.decode(path.read_bytes(), type=kind)
        result = make()
        write_whole(path, msgspec.json.encode(result))
        return result


@contextlib.contextmanager
def resumable_work(
    beside: Path, plan: str, workers: int | str | None = None, progress: Progress = no_progress
) -> Generator[Work]:
    """Work in a partial directory beside the path `beside`, which is removed when the context is left.

    A kill leaves it: the next work beside that path with the same plan takes its results over. Raises OutputError.
    """
    with contextlib.ExitStack() as stack:
        with translate_write_errors(beside):
            scratch = stack.enter_context(partial_directory(beside, plan, progress))
            kept = scratch / RESUME / "kept"
            kept.mkdir(mode=0o700, exist_ok=True)  # what a text showed reveals it
        yield Work(scratch, kept, workers, progress)


class Log:
    """A file of lines that is added to, as a context manager. Raises OutputError."""

    def __init__(self, path: Path, durable: bool = False) -> None:
        """Open or begin it. `durable`: a line is on disk when it was added, so that it outlives a power cut too."""
        self._path, self._durable = path, durable
        with translate_write_errors(path):
            self._file = open(path, "a+b", opener=_without_waiting)  # noqa: SIM115 - closed by close()

    def try_lock(self) -> bool:
        """Whether no other process has it locked. The lock is held until the file is closed, or the process ends."""
        try:
            lock_now(self._file.fileno())
        except OSError:
            return False
        return True

    def is_plain(self, most_bytes: int) -> bool:
        """Whether it is a regular file of no more bytes than that."""
        status = os.fstat(self._file.fileno())
        return stat.S_ISREG(status.st_mode) and status.st_size <= most_bytes

    def read(self) -> list[bytes]:
        """The lines that are there, each with its end; a last one without was torn by a kill."""
        self._file.seek(0)
        return self._file.read().splitlines(keepends=True)

    def truncate(self, nbytes: int) -> None:
        """Cut off what comes after so many bytes."""
        with translate_write_errors(self._path):
            self._file.truncate(nbytes)

    def append(self, line: bytes) -> None:
        """Add a line, with its end. A kill of this process does not lose it any more."""
        with translate_write_errors(self._path):
            self._file.write(line)
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others use the file. An error while it is closed is one that `append` has raised before."""
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _without_waiting(path: str, flags: int) -> int:
    """Open a file without waiting for anybody at the other end of a FIFO, which is refused afterwards."""
    return os.open(path, flags | NO_WAITING | CLOEXEC, 0o666)
