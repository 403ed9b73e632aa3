"""experts.bin: one page-aligned record per expert, so that a cache miss is one direct read.

    record 0 | padding to a page | record 1 | padding | ... | index | trailer

The index is JSON, a list of [layer, expert, kind, offset, nbytes, sha256]. The trailer is the file's last 64 bytes:
magic, index offset, index length (little-endian 64-bit), SHA-256 of the index, eight zero bytes. Padding is zeros.
What a record holds is the business of the expert kind in the manifest (`manifest.ExpertKind`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import msgspec

from pocketmoe.errors import DamagedFile, OutputError
from pocketmoe.system.files import read_at, set_direct

PAGE = 4096
MAX_INDEX_BYTES = 64 << 20  # room for half a million experts; a larger one would be an attack on memory
_MAGIC = b"PMOESTR1"
_TRAILER = struct.Struct("<8sQQ32s8s")
_ZEROS = bytes(PAGE)


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


class ExpertId(NamedTuple):
    """One expert of one MoE layer; both count from 0."""

    layer: int
    expert: int


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where one expert's bytes lie in the store: offset and length in bytes, SHA-256 of those bytes in hex."""

    layer: int
    expert: int
    kind: int
    offset: int
    nbytes: int
    sha256: str

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)


class StoreWriter:
    """Appends records; the index and the trailer are written by `close`. Use it as a context manager."""

    def __init__(self, path: Path, kept: Sequence[Record] = ()) -> None:
        """`kept`: records that are in the file already, from its beginning; whatever comes after them is cut off."""
        self._path = path
        self._records = {record.id: record for record in kept}
        self._offset = sum(padded(record.nbytes) for record in kept)
        with translate_write_errors(path):
            self._file = open(path, "r+b" if kept else "wb")  # noqa: SIM115 - closed by `close` and `__exit__`
            if kept:
                self._file.truncate(self._offset)
                self._file.seek(self._offset)

    def append(self, expert: ExpertId, kind: int, data: bytes | bytearray | memoryview) -> Record:
        """Write one expert's record and return where it lies."""
        data = memoryview(data).cast("B")
        if not data or expert in self._records:
            raise ValueError(f"{expert} must have one record, of at least one byte")
        record = Record(expert.layer, expert.expert, kind, self._offset, len(data), hashlib.sha256(data).hexdigest())
        with translate_write_errors(self._path):
            self._write(data)
            self._write(_ZEROS[: padded(len(data)) - len(data)])
        self._offset += padded(len(data))
        self._records[expert] = record
        return record

    def close(self) -> str:
        """Write index and trailer, fsync; return the SHA-256 of the index in hex (it goes into the manifest)."""
        index = msgspec.json.encode(list(self._records.values()))
        digest = hashlib.sha256(index)
        with translate_write_errors(self._path), self._file:
            self._write(index)
            self._write(_TRAILER.pack(_MAGIC, self._offset, len(index), digest.digest(), bytes(8)))
            self._file.flush()
            os.fsync(self._file.fileno())
        return digest.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
                self._file.close()
        elif not self._file.closed:
            self.close()


class StoreReader:
    """Reads records with one direct read each, and checks a record's hash the first time it is read."""

    def __init__(self, path: Path, index_sha256: str) -> None:
        """Open and validate; `index_sha256` comes from the manifest. Raises DamagedFile."""
        self.path = path
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._checked: set[ExpertId] = set()
        with contextlib.ExitStack() as on_error:
            try:
                self._file = on_error.enter_context(open(path, "rb"))
                records = _read_index(path, self._file, index_sha256)
            except OSError as error:
                raise DamagedFile(path, f"cannot be read ({error.strerror})") from error
            self.records = {record.id: record for record in records}
            on_error.pop_all()
        self.direct = set_direct(self._file.fileno(), True)  # False: reads go through the page cache

    def read_into(self, expert: ExpertId, views: Sequence[memoryview]) -> int:
        """Read one record into page-aligned writable views of bytes that add up to its padded size; return that size.

        Raises DamagedFile when the bytes are not those that were written. Safe to call from several threads.
        """
        record = self.records[expert]
        got, wanted = 0, padded(record.nbytes)
        assert sum(view.nbytes for view in views) == wanted, "views must add up to the record's padded size"
        while got < wanted:
            try:
                more = self._read_at(record.offset + got, _skip(views, got))
            except OSError as error:
                raise DamagedFile(self.path, f"reading {_name(record)} failed ({error.strerror})") from error
            got = (got + more) // PAGE * PAGE  # a direct read must begin at a page
            if more < PAGE:
                raise DamagedFile(self.path, f"{_name(record)} is cut short: {got} of {wanted} bytes")
        if expert not in self._checked:
            self._check(record, views)
        with self._lock:
            self._checked.add(expert)
            self.bytes_read += wanted
        return wanted

    def _read_at(self, offset: int, views: Sequence[memoryview]) -> int:
        fd = self._file.fileno()
        try:
            return read_at(fd, views, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = set_direct(fd, False)  # some file systems accept the flag and refuse the reads
            return read_at(fd, views, offset)

    def read(self, expert: ExpertId) -> memoryview:
        """One record's bytes, in fresh page-aligned memory of exactly its length."""
        nbytes = self.records[expert].nbytes
        view = memoryview(mmap.mmap(-1, padded(nbytes)))
        self.read_into(expert, [view])
        return view[:nbytes]

    def _check(self, record: Record, views: Sequence[memoryview]) -> None:
        """The bytes match the record's hash, and the padding is zeros. Raises DamagedFile."""
        digest, left = hashlib.sha256(), record.nbytes
        for view in views:
            data, padding = view[:left], view[left:]
            digest.update(data)
            left -= len(data)
            if padding != memoryview(_ZEROS)[: len(padding)]:
                raise DamagedFile(self.path, f"{_name(record)} has damaged padding")
        if digest.hexdigest() != record.sha256:
            raise DamagedFile(self.path, f"{_name(record)} does not match its checksum")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class translate_write_errors:
    """Context manager: an OSError while writing becomes an OutputError that names the path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, OSError):
            remedy = "Free some space and run it again." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise OutputError(f"{self._path}: cannot be written ({error.strerror or error})", remedy) from error


def _skip(views: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of `views` after their first `nbytes`."""
    left: list[memoryview] = []
    for view in views:
        if nbytes < len(view):
            left.append(view[nbytes:])
        nbytes = max(0, nbytes - len(view))
    return left


def _read_index(path: Path, file: BinaryIO, index_sha256: str) -> list[Record]:
    size = os.fstat(file.fileno()).st_size
    if size < _TRAILER.size:
        raise DamagedFile(path, "is too short to be an expert store")
    file.seek(size - _TRAILER.size)
    magic, offset, nbytes, digest, zeros = _TRAILER.unpack(file.read(_TRAILER.size))
    if magic != _MAGIC or zeros != bytes(8) or offset + nbytes + _TRAILER.size != size or nbytes > MAX_INDEX_BYTES:
        raise DamagedFile(path, "has no valid trailer (cut short, or not an expert store)")
    file.seek(offset)
    index = file.read(nbytes)
    if hashlib.sha256(index).digest() != digest or digest.hex() != index_sha256:
        raise DamagedFile(path, "its index does not match the manifest")
    try:
        records = msgspec.json.decode(index, type=list[Record])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedFile(path, f"its index cannot be read ({error})") from error
    validate(path, records, offset)
    return records


def validate(path: Path, records: Sequence[Record], end: int) -> None:
    """Records lie one after the other from 0 to `end`, page-aligned, without gap, overlap or repetition.

    Raises DamagedFile before a byte of them is read.
    """
    expected = 0
    for record in records:
        if record.nbytes <= 0 or record.offset != expected or record.layer < 0 or record.expert < 0 or record.kind < 0:
            raise DamagedFile(path, f"{_name(record)} has an impossible place")
        expected += padded(record.nbytes)
    if expected != end:
        raise DamagedFile(path, f"records end at {expected}, the index begins at {end}")
    if len({record.id for record in records}) != len(records):
        raise DamagedFile(path, "an expert has two records")


def _name(record: Record) -> str:
    return f"the record of layer {record.layer}, expert {record.expert}"
