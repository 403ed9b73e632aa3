"""experts.bin: one page-aligned record per expert, so that a cache miss is one direct read.

    record 0 | padding to a page | record 1 | padding | ... | index | trailer

The index is JSON, a list of [layer, expert, kind, offset, nbytes, sha256]. The trailer is the file's last 64 bytes:
magic, index offset, index length (little-endian 64-bit), SHA-256 of the index, eight zero bytes.
What a record holds is the business of the expert kind in the manifest (`bundle.ExpertKind`).
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from pocketmoe.errors import DamagedFile, OutputError

PAGE = 4096
_MAGIC = b"PMOESTR1"
_TRAILER = struct.Struct("<8sQQ32s8x")


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


class ExpertId(NamedTuple):
    """One expert of one MoE layer; both count from 0."""

    layer: int
    expert: int


class Record(msgspec.Struct, frozen=True, array_like=True):
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

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: list[Record] = []
        self._offset = 0
        with translate_write_errors(path):
            self._file = open(path, "wb")  # noqa: SIM115 - closed by `close` and `__exit__`

    def append(self, expert: ExpertId, kind: int, data: bytes | bytearray | memoryview) -> Record:
        """Write one expert's record and return where it lies."""
        record = Record(expert.layer, expert.expert, kind, self._offset, len(data), hashlib.sha256(data).hexdigest())
        with translate_write_errors(self._path):
            self._file.write(data)
            self._file.write(b"\0" * (padded(len(data)) - len(data)))
        self._offset += padded(len(data))
        self._records.append(record)
        return record

    def close(self) -> str:
        """Write index and trailer, fsync; return the SHA-256 of the index in hex (it goes into the manifest)."""
        index = msgspec.json.encode(self._records)
        digest = hashlib.sha256(index)
        with translate_write_errors(self._path):
            self._file.write(index)
            self._file.write(_TRAILER.pack(_MAGIC, self._offset, len(index), digest.digest()))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._file.closed:
            self._file.close() if error else self.close()


class StoreReader:
    """Reads records with one direct read each, and checks a record's hash the first time it is read."""

    def __init__(self, path: Path, index_sha256: str) -> None:
        """Open and validate; `index_sha256` comes from the manifest. Raises DamagedFile."""
        self.path = path
        self.bytes_read = 0
        try:
            self._fd = _open_direct(path)
        except OSError as error:
            raise DamagedFile(path, f"cannot be opened ({error.strerror})") from error
        try:
            self.records = {record.id: record for record in _read_index(path, index_sha256)}
        except BaseException:
            os.close(self._fd)
            raise
        self._checked: set[ExpertId] = set()

    def read_into(self, expert: ExpertId, views: Sequence[memoryview]) -> int:
        """Read one record into page-aligned writable views that add up to its padded size; return the bytes read.

        Raises DamagedFile when the bytes are not those that were written. Safe to call from several threads.
        """
        record = self.records[expert]
        wanted = padded(record.nbytes)
        try:
            got = os.preadv(self._fd, views, record.offset)
        except OSError as error:
            raise DamagedFile(self.path, f"reading {_name(record)} failed ({error.strerror})") from error
        if got != wanted:
            raise DamagedFile(self.path, f"{_name(record)} is cut short: {got} of {wanted} bytes")
        if expert not in self._checked:
            self._check(record, views)
            self._checked.add(expert)
        self.bytes_read += got
        return got

    def read(self, expert: ExpertId) -> memoryview:
        """One record's bytes, in fresh page-aligned memory of exactly its length."""
        nbytes = self.records[expert].nbytes
        view = memoryview(mmap.mmap(-1, padded(nbytes)))
        self.read_into(expert, [view])
        return view[:nbytes]

    def _check(self, record: Record, views: Sequence[memoryview]) -> None:
        digest, left = hashlib.sha256(), record.nbytes
        for view in views:
            digest.update(view[:left])
            left -= min(left, len(view))
        if digest.hexdigest() != record.sha256:
            raise DamagedFile(self.path, f"{_name(record)} does not match its checksum")

    def close(self) -> None:
        os.close(self._fd)

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
            raise OutputError(f"{self._path}: cannot be written ({error.strerror})", remedy) from error


def _open_direct(path: Path) -> int:
    """Open past the page cache where the file system allows it, else normally."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read_index(path: Path, index_sha256: str) -> list[Record]:
    size = path.stat().st_size
    if size < _TRAILER.size:
        raise DamagedFile(path, "is too short to be an expert store")
    with open(path, "rb") as file:
        file.seek(size - _TRAILER.size)
        magic, offset, nbytes, digest = _TRAILER.unpack(file.read(_TRAILER.size))
        if magic != _MAGIC or offset + nbytes + _TRAILER.size != size:
            raise DamagedFile(path, "has no valid trailer (cut short, or not an expert store)")
        file.seek(offset)
        index = file.read(nbytes)
    if hashlib.sha256(index).digest() != digest or digest.hex() != index_sha256:
        raise DamagedFile(path, "its index does not match the manifest")
    try:
        records = msgspec.json.decode(index, type=list[Record])
    except msgspec.DecodeError as error:
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


def iter_records(reader: StoreReader) -> Iterator[tuple[Record, memoryview]]:
    """Every record in file order with its checked bytes."""
    for record in reader.records.values():
        yield record, reader.read(record.id)
