"""Experts made on every core and written in their order, a few in memory at a time; a killed run is gone on with.

Each record that is written is added to a log, with how far it is from what it was made of. The next writer of the same
plan (`writer`) reads the records that are in the log, and keeps them up to the first whose bytes are not those.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.partial import RESUME
from pocketmoe.bundle.progress import Progress
from pocketmoe.bundle.resume import Log
from pocketmoe.bundle.store import ExpertId, Record, StoreWriter, padded, translate_write_errors
from pocketmoe.errors import OutputError

Result = TypeVar("Result")
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ExpertSource:
    """Where experts' records come from: the kind of each, in the order of the store, and its bytes.

    `read` is called from several threads.
    """

    kind_of: Mapping[ExpertId, int]
    read: Callable[[ExpertId], Buffer]


@dataclass(frozen=True)
class Written:
    """A store that is complete: SHA-256 of its index and of the whole file, and each expert's error."""

    index_sha256: str
    file_sha256: str
    errors: list[float]


class WorkerPool(ThreadPoolExecutor):
    """Threads, with how many there are (`workers`): as many jobs may be under way at a time."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.workers = workers


def write_experts(
    kind_of: Mapping[ExpertId, int],
    make: Callable[[ExpertId], tuple[Buffer, float]],
    root: Path,
    pool: WorkerPool,
    progress: Progress,
    what: str,
    moved: Callable[[ExpertId], None] | None = None,
) -> Written:
    """Make every expert's record and write them to the store in `root`, a partial directory, in the order of `kind_of`.

    `make` yields a record and its error, 0 for a copy, and runs on the pool: in memory are as many experts as it has
    threads, and one. `moved`: told of each expert that is written and logged, to give up what it was made of; then
    there need not be room for all. Raises OutputError.
    """
    with _ResumedWriter(root / STORE, root / RESUME / "journal", kind_of, progress) as store:
        todo = list(kind_of)[len(store.errors) :]
        jobs = (lambda expert=expert: make(expert) for expert in todo)
        for expert, (record, error) in zip(todo, in_order(pool, jobs), strict=True):
            progress(what, len(store.errors), len(kind_of))
            if expert == todo[0] and moved is None:
                _check_space(root, padded(len(record)) * len(todo))
            store.write(expert, kind_of[expert], record, error)
            if moved is not None:
                moved(expert)
        index_sha256 = store.close()
    progress(what, len(kind_of), len(kind_of))
    return Written(index_sha256, store.file_sha256, store.errors)


def close_written(kind_of: Mapping[ExpertId, int], root: Path, progress: Progress) -> str:
    """Give the store of a killed `write_experts` an index of the experts that it has; SHA-256 of the index.

    That does not keep `write_experts` from going on. Raises OutputError.
    """
    with _ResumedWriter(root / STORE, root / RESUME / "journal", kind_of, progress) as store:
        return store.close()


def _check_space(directory: Path, nbytes: int) -> None:
    """Say now what would else be found out after hours. Raises OutputError."""
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise OutputError(
            f"{directory.parent}: the experts need {nbytes / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free",
            "Free some space and run it again, or name an output directory on another disk.",
        )


def in_order(pool: WorkerPool, jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results of jobs that run on the pool, in their order; no more are in memory than its threads, and one."""
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > pool.workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def worker_pool(workers: int | None = None) -> Generator[WorkerPool]:
    """Threads, by default one per core; whatever has not begun when an error leaves the context is not done."""
    with WorkerPool(workers or os.cpu_count() or 1) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _ResumedWriter(StoreWriter):
    """A store writer that hashes its file on the way, logs its records, and begins with those that are in the log."""

    def __init__(self, path: Path, log: Path, kind_of: Mapping[ExpertId, int], progress: Progress) -> None:
        self._digest = hashlib.sha256()
        self.errors: list[float] = []
        with translate_write_errors(path), contextlib.ExitStack() as on_error:
            log.parent.mkdir(exist_ok=True)
            self._log = on_error.enter_context(Log(log))
            records: list[Record] = []
            logged_bytes = 0
            for line, record, error in _whole(path, self._log.read(), kind_of, self._digest):
                records.append(record)
                self.errors.append(error)
                logged_bytes += len(line)
                progress("checking the experts that are there", len(records), len(kind_of))
            super().__init__(path, records)
            self._log.truncate(logged_bytes)
            on_error.pop_all()

    @property
    def file_sha256(self) -> str:
        """Of the whole file, once it is closed."""
        return self._digest.hexdigest()

    def write(self, expert: ExpertId, kind: int, data: Buffer, error: float) -> None:
        record = self.append(expert, kind, data)
        with translate_write_errors(self._path):
            self._file.flush()  # what is in the log is written
        self._log.append(msgspec.json.encode([record, error]) + b"\n")
        self.errors.append(error)

    def close(self) -> str:
        self._log.close()  # stays until the bundle is published
        return super().close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._log.close()
        super().__exit__(kind, error, tb)

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        super()._write(data)


def _whole(
    path: Path, lines: Sequence[bytes], kind_of: Mapping[ExpertId, int], digest: Any
) -> Iterator[tuple[bytes, Record, float]]:
    """The log's lines from the first on, as long as their records are those wanted and the store has their bytes.

    Those bytes, padding included, are added to `digest`.
    """
    if not path.is_file():
        return
    offset = 0
    with open(path, "rb") as file:
        for line, (expert, kind) in zip(lines, kind_of.items(), strict=False):
            try:
                record, error = msgspec.json.decode(line, type=tuple[Record, float])
            except (msgspec.DecodeError, UnicodeDecodeError):
                return  # the store ends within this record
            if (record.id, record.kind, record.offset) != (expert, kind, offset) or not line.endswith(b"\n"):
                return
            data = file.read(padded(record.nbytes))
            whole = len(data) == padded(record.nbytes) and not any(data[record.nbytes :])
            if not whole or hashlib.sha256(memoryview(data)[: record.nbytes]).hexdigest() != record.sha256:
                return
            digest.update(data)
            offset += len(data)
            yield line, record, error
