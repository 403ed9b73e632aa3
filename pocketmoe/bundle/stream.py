"""Experts made on every core and written in their order, a few in memory at a time; a killed run is gone on with.

Each record that is written is noted in a journal, with what its maker has to remark. The next writer of the same plan
(`bundle.BundleWriter`) reads the records that are noted, and keeps them up to the first whose bytes are not those.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.partial import journal_in
from pocketmoe.bundle.progress import Progress
from pocketmoe.bundle.store import ExpertId, Record, StoreWriter, padded, translate_write_errors
from pocketmoe.errors import OutputError

Result = TypeVar("Result")
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Experts:
    """Where experts' records come from: the kind of each, in the order of the store, and its bytes.

    `read` is called from several threads.
    """

    kind_of: Mapping[ExpertId, int]
    read: Callable[[ExpertId], Buffer]


@dataclass(frozen=True)
class Written:
    """A store that is complete: SHA-256 of its index and of the whole file, and what was remarked of each expert."""

    index_sha256: str
    file_sha256: str
    remarks: list[float]


def write_experts(
    kind_of: Mapping[ExpertId, int],
    make: Callable[[ExpertId], tuple[Buffer, float]],
    root: Path,
    pool: ThreadPoolExecutor,
    progress: Progress,
    what: str,
) -> Written:
    """Make every expert's record and write them to the store in `root`, a partial directory, in the order of `kind_of`.

    `make` yields a record and a number to be remarked of it, and runs on the pool: in memory are as many experts as
    it has threads, and one. Raises OutputError.
    """
    with _JournaledWriter(root / STORE, journal_in(root), kind_of, progress) as store:
        todo = list(kind_of)[len(store.remarks) :]
        jobs = (lambda expert=expert: make(expert) for expert in todo)
        for expert, (record, remark) in zip(todo, in_order(pool, jobs), strict=True):
            progress(what, len(store.remarks), len(kind_of))
            if expert == todo[0]:
                _check_space(root, padded(len(record)) * len(todo))
            store.write(expert, kind_of[expert], record, remark)
        index_sha256 = store.close()
    progress(what, len(kind_of), len(kind_of))
    return Written(index_sha256, store.file_sha256, store.remarks)


def _check_space(directory: Path, nbytes: int) -> None:
    """Say now what would else be found out after hours. Raises OutputError."""
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise OutputError(
            f"{directory.parent}: the experts need {nbytes / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free",
            "Free some space and run it again, or name an output directory on another disk.",
        )


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results of jobs that run on the pool, in their order; no more are in memory than its threads, and one."""
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > pool._max_workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def worker_pool(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads, by default one per core; whatever has not begun when an error leaves the context is not done."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _JournaledWriter(StoreWriter):
    """A store writer that hashes its file on the way, notes its records, and begins with those that are noted."""

    def __init__(self, path: Path, journal: Path, kind_of: Mapping[ExpertId, int], progress: Progress) -> None:
        self._digest = hashlib.sha256()
        self.remarks: list[float] = []
        with translate_write_errors(path):
            noted = []
            for entry in _whole(path, journal, kind_of, self._digest):
                noted.append(entry)
                progress("checking the experts that are there", len(noted), len(kind_of))
            super().__init__(path, [record for record, _ in noted])
            journal.parent.mkdir(exist_ok=True)
            self._journal = open(journal, "wb")  # noqa: SIM115 - closed by `close` and `__exit__`
        for record, remark in noted:
            self._note(record, remark)

    @property
    def file_sha256(self) -> str:
        """Of the whole file, once it is closed."""
        return self._digest.hexdigest()

    def write(self, expert: ExpertId, kind: int, data: Buffer, remark: float) -> None:
        record = self.append(expert, kind, data)
        with translate_write_errors(self._path):
            self._file.flush()  # what is noted is written
        self._note(record, remark)

    def close(self) -> str:
        self._journal.close()  # stays until the bundle is published
        return super().close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._journal.close()
        super().__exit__(kind, error, tb)

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        super()._write(data)

    def _note(self, record: Record, remark: float) -> None:
        with translate_write_errors(self._path):
            self._journal.write(msgspec.json.encode([record, remark]) + b"\n")
            self._journal.flush()
        self.remarks.append(remark)


def _whole(path: Path, journal: Path, kind_of: Mapping[ExpertId, int], digest: Any) -> Iterator[tuple[Record, float]]:
    """The journal's entries from the first on, as long as they are those wanted and the store has their bytes.

    Those bytes, padding included, are added to `digest`.
    """
    if not path.is_file() or not journal.is_file():
        return
    offset = 0
    with open(path, "rb") as file:
        for line, (expert, kind) in zip(journal.read_bytes().splitlines(), kind_of.items(), strict=False):
            try:
                record, remark = msgspec.json.decode(line, type=tuple[Record, float])
            except (msgspec.DecodeError, UnicodeDecodeError):
                return  # cut off in the middle
            if (record.id, record.kind, record.offset) != (expert, kind, offset):
                return
            data = file.read(padded(record.nbytes))
            whole = len(data) == padded(record.nbytes) and not any(data[record.nbytes :])
            if not whole or hashlib.sha256(memoryview(data)[: record.nbytes]).hexdigest() != record.sha256:
                return
            digest.update(data)
            offset += len(data)
            yield record, remark
