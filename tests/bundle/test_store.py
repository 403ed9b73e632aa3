"""experts.bin under attack: what was written comes back, and what was damaged is never handed out."""

# pyright: reportArgumentType=false

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.store import (
    MAX_INDEX_BYTES,
    PAGE,
    ExpertId,
    Record,
    StoreReader,
    StoreWriter,
    padded,
)
from pocketmoe.errors import DamagedFile, OutputError

MB = 1 << 20
expert_ids = st.builds(ExpertId, st.integers(0, 2**40), st.integers(0, 2**40))
lengths = st.one_of(st.integers(1, 40), st.sampled_from([PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE - 64]))


def write(path: Path, records: dict[ExpertId, bytes], kind: int = 0) -> str:
    with StoreWriter(path) as writer:
        for expert, data in records.items():
            writer.append(expert, kind, data)
        return writer.close()


def forge(path: Path, index: bytes, records_end: int = PAGE, trailer_end: bytes = bytes(8)) -> str:
    """A store of zeros under an index of the attacker's choice, every hash of it right."""
    digest = hashlib.sha256(index)
    trailer = struct.pack("<8sQQ32s8s", b"PMOESTR1", records_end, len(index), digest.digest(), trailer_end)
    path.write_bytes(bytes(records_end) + index + trailer)
    return digest.hexdigest()


def read_all(path: Path, index_sha256: str) -> dict[ExpertId, bytes]:
    with StoreReader(path, index_sha256) as reader:
        return {expert: bytes(reader.read(expert)) for expert in reader.records}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, bytes]:
    """A store of three records, the hash of its index, and its bytes."""
    path = tmp_path_factory.mktemp("store") / "experts.bin"
    sha256 = write(path, {ExpertId(0, i): os.urandom(100 + 2000 * i) for i in range(3)})
    return path, sha256, path.read_bytes()


@given(records=st.dictionaries(expert_ids, st.tuples(lengths, st.integers(0, 255)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_records_come_back_as_they_were_written(
    records: dict[ExpertId, tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any set of experts of any lengths round-trips, in file order, page-aligned."""
    path = tmp_path_factory.getbasetemp() / "any.bin"
    data = {expert: bytes([fill]) * length for expert, (length, fill) in records.items()}
    sha256 = write(path, data)
    assert read_all(path, sha256) == data
    with StoreReader(path, sha256) as reader:
        assert [*reader.records] == [*data]
        assert all(record.offset % PAGE == 0 for record in reader.records.values())


@given(position=st.integers(0), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_any_flipped_bit_is_found(
    small: tuple[Path, str, bytes], position: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One flipped bit anywhere, padding and trailer included, is found at open or at the record's first read."""
    _, sha256, whole = small
    damaged = bytearray(whole)
    damaged[position % len(whole)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.bin"
    path.write_bytes(damaged)
    with pytest.raises(DamagedFile, match=r"flipped\.bin"):
        read_all(path, sha256)


def test_every_byte_of_index_trailer_and_padding_counts(small: tuple[Path, str, bytes], tmp_path: Path) -> None:
    """Each byte outside the records, one by one, is noticed when it changes: no byte is free."""
    _, sha256, whole = small
    with StoreReader(small[0], sha256) as reader:
        end = max(record.offset + padded(record.nbytes) for record in reader.records.values())
    path = tmp_path / "experts.bin"
    for position in [100, PAGE - 1, *range(end, len(whole))]:
        damaged = bytearray(whole)
        damaged[position] ^= 0x20
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile):
            read_all(path, sha256)


@given(length=st.integers(0))
@settings(max_examples=150, deadline=None)
def test_truncation_at_any_length_is_found_at_open(
    small: tuple[Path, str, bytes], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A store that was cut anywhere does not open."""
    _, sha256, whole = small
    path = tmp_path_factory.getbasetemp() / "cut.bin"
    path.write_bytes(whole[: length % len(whole)])
    with pytest.raises(DamagedFile):
        StoreReader(path, sha256)


@pytest.mark.parametrize(
    ("records", "end"),
    [
        pytest.param([[0, 0, 0, 0, 100, ""], [0, 1, 0, 0, 100, ""]], 2 * PAGE, id="overlap"),
        pytest.param([[0, 0, 0, 0, 100, ""], [0, 1, 0, 2 * PAGE, 100, ""]], 3 * PAGE, id="gap"),
        pytest.param([[0, 0, 0, 8, 100, ""]], PAGE, id="off the page"),
        pytest.param([[0, 0, 0, 0, 2**62, ""]], PAGE, id="huge length"),
        pytest.param([[0, 0, 0, 2**63, 100, ""]], PAGE, id="huge offset"),
        pytest.param([[0, 0, 0, 0, 10**30, ""]], PAGE, id="length beyond 64 bits"),
        pytest.param([[0, 0, 0, -PAGE, 100, ""]], PAGE, id="negative offset"),
        pytest.param([[0, 0, 0, 0, -100, ""]], PAGE, id="negative length"),
        pytest.param([[0, 0, 0, 0, 0, ""], [0, 1, 0, 0, 100, ""]], PAGE, id="empty"),
        pytest.param([[-1, 0, 0, 0, 100, ""]], PAGE, id="negative layer"),
        pytest.param([[0, -1, 0, 0, 100, ""]], PAGE, id="negative expert"),
        pytest.param([[0, 0, -1, 0, 100, ""]], PAGE, id="negative kind"),
        pytest.param([[0, 0, 0, 0, 100, ""], [0, 0, 0, PAGE, 100, ""]], 2 * PAGE, id="twice"),
        pytest.param([[0, 0, 0, 0, 100, ""]], 2 * PAGE, id="unaccounted bytes"),
        pytest.param([[0, 0, 0, 0, 100.5, ""]], PAGE, id="fraction"),
        pytest.param([[0, 0, 0, 0, True, ""]], PAGE, id="boolean"),
        pytest.param([[0, 0, 0, 0, 100]], PAGE, id="field missing"),
        pytest.param([[0, 0, 0, 0, 100, "", 1]], PAGE, id="field unknown"),
        pytest.param({"0": 1}, PAGE, id="not a list"),
    ],
)
def test_an_impossible_index_is_refused_before_anything_is_read(tmp_path: Path, records: object, end: int) -> None:
    """An index with right hashes whose records overlap, leave gaps, repeat or lie outside does not open."""
    sha256 = forge(tmp_path / "experts.bin", msgspec.json.encode(records), end)
    with pytest.raises(DamagedFile):
        StoreReader(tmp_path / "experts.bin", sha256)


@pytest.mark.parametrize("index", [b"[" * 10**5, b'["\xff"]', b"", b"null"], ids=["deep", "not UTF-8", "none", "null"])
def test_an_index_that_is_no_json_is_a_damaged_file(tmp_path: Path, index: bytes) -> None:
    """Whatever bytes stand where the index should be, the error is ours and names the file."""
    sha256 = forge(tmp_path / "experts.bin", index)
    with pytest.raises(DamagedFile, match=r"experts\.bin"):
        StoreReader(tmp_path / "experts.bin", sha256)


def test_a_huge_index_is_refused_unread(tmp_path: Path) -> None:
    """A sparse file that claims an index of gigabytes costs no memory."""
    path = tmp_path / "experts.bin"
    nbytes = MAX_INDEX_BYTES + 1
    with open(path, "wb") as file:
        file.truncate(nbytes)
        file.seek(nbytes)
        file.write(struct.pack("<8sQQ32s8x", b"PMOESTR1", 0, nbytes, bytes(32)))
    with pytest.raises(DamagedFile, match="trailer"):
        StoreReader(path, "0" * 64)


def test_another_stores_index_is_refused(small: tuple[Path, str, bytes]) -> None:
    """A whole store that is not the one the manifest speaks of does not open."""
    with pytest.raises(DamagedFile, match="does not match the manifest"):
        StoreReader(small[0], "0" * 64)


def test_a_missing_or_unreadable_store_is_a_damaged_file(tmp_path: Path) -> None:
    """No file, and a directory in its place, are errors of ours too."""
    for path in (tmp_path / "nothing.bin", tmp_path):
        with pytest.raises(DamagedFile, match="cannot be read"):
            StoreReader(path, "0" * 64)


def test_an_expert_is_written_once_and_not_empty(tmp_path: Path) -> None:
    """The writer refuses what its reader would refuse."""
    with StoreWriter(tmp_path / "experts.bin") as writer:
        writer.append(ExpertId(0, 0), 0, memoryview(struct.pack("<2f", 1, 2)).cast("f"))
        for data in (b"", b"again"):
            with pytest.raises(ValueError, match="one record"):
                writer.append(ExpertId(0, len(data) == 0), 0, data)
        sha256 = writer.close()
    assert read_all(tmp_path / "experts.bin", sha256) == {ExpertId(0, 0): struct.pack("<2f", 1, 2)}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("nbytes", [10, MB], ids=["at close", "while appending"])
def test_a_full_disk_is_named_with_its_remedy(nbytes: int) -> None:
    """A disk that fills up, early or at the last flush, is one OutputError, not an OSError from the clean-up."""
    with pytest.raises(OutputError, match="No space left") as caught, StoreWriter(Path("/dev/full")) as writer:
        writer.append(ExpertId(0, 0), 0, bytes(nbytes))
    assert "Free some space" in caught.value.remedy


def short_reads(monkeypatch: pytest.MonkeyPatch, at_most: Callable[[int], int]) -> None:
    """Let preadv return no more than at_most(wanted) bytes, as the kernel may."""
    real = os.preadv

    def preadv(fd: int, views: Sequence[memoryview], offset: int) -> int:
        wanted = sum(len(view) for view in views)
        buffer = mmap.mmap(-1, padded(wanted))
        got = min(real(fd, [buffer], offset), at_most(wanted))
        data, left = buffer[:got], 0
        for view in views:
            part = data[left : left + len(view)]
            view[: len(part)] = part
            left += len(part)
        return got

    monkeypatch.setattr(os, "preadv", preadv)


def test_reads_that_return_too_little_are_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A read that stops in the middle goes on at a whole page, across views; one that makes no progress fails."""
    data = os.urandom(5 * PAGE + 77)
    sha256 = write(tmp_path / "experts.bin", {ExpertId(0, 0): data})
    short_reads(monkeypatch, lambda wanted: min(wanted, 2 * PAGE + 1000))
    with StoreReader(tmp_path / "experts.bin", sha256) as reader:
        views = [memoryview(mmap.mmap(-1, pages * PAGE)) for pages in (1, 3, 2)]
        assert reader.read_into(ExpertId(0, 0), views) == padded(len(data))
        assert b"".join(views)[: len(data)] == data
        short_reads(monkeypatch, lambda wanted: 100)
        with pytest.raises(DamagedFile, match="cut short"):
            reader.read(ExpertId(0, 0))


def test_reading_works_where_direct_reads_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a file system that refuses O_DIRECT, at the flag or at the read, records are read through the page cache."""
    data = {ExpertId(0, i): os.urandom(PAGE + i) for i in range(3)}
    sha256 = write(tmp_path / "experts.bin", data)
    real_preadv, real_fcntl = os.preadv, fcntl.fcntl

    def refuse_direct_reads(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if real_fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", refuse_direct_reads)
    with StoreReader(tmp_path / "experts.bin", sha256) as reader:
        assert {expert: bytes(reader.read(expert)) for expert in data} == data
        assert not reader.direct

    def refuse_the_flag(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_fcntl(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse_the_flag)
    assert read_all(tmp_path / "experts.bin", sha256) == data


def test_a_failing_disk_is_a_damaged_file(monkeypatch: pytest.MonkeyPatch, small: tuple[Path, str, bytes]) -> None:
    """An input/output error names the record and the file."""

    def preadv(fd: int, views: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(DamagedFile, match="layer 0, expert 1 failed"), StoreReader(small[0], small[1]) as reader:
        reader.read(ExpertId(0, 1))


def test_threads_share_a_reader(tmp_path: Path) -> None:
    """Several threads get the right bytes from one reader, and no read is missing from its count."""
    data = {ExpertId(0, i): bytes([i]) * (PAGE + 1) for i in range(16)}
    sha256 = write(tmp_path / "experts.bin", data)
    wrong: list[ExpertId] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with StoreReader(tmp_path / "experts.bin", sha256) as reader:

            def work() -> None:
                wrong.extend(expert for expert in [*data] * 8 if bytes(reader.read(expert)) != data[expert])

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong
            assert reader.bytes_read == 4 * 8 * 16 * 2 * PAGE
    finally:
        sys.setswitchinterval(interval)


def test_damage_is_found_at_every_read_until_it_is_repaired(tmp_path: Path) -> None:
    """A record that failed its check once is not trusted the second time."""
    path = tmp_path / "experts.bin"
    sha256 = write(path, {ExpertId(0, 0): b"good"})
    path.write_bytes(b"evil" + path.read_bytes()[4:])
    with StoreReader(path, sha256) as reader:
        for _ in range(2):
            with pytest.raises(DamagedFile, match="checksum"):
                reader.read(ExpertId(0, 0))
        assert reader.bytes_read == 0


def test_closing_twice_is_harmless(small: tuple[Path, str, bytes]) -> None:
    """A closed reader refuses to read, and never touches a descriptor that is not its own any more."""
    reader = StoreReader(small[0], small[1])
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read(ExpertId(0, 0))


def test_the_index_holds_what_the_format_page_says(small: tuple[Path, str, bytes]) -> None:
    """docs/FORMAT.md, byte by byte: trailer, index, records, hashes, read here without the reader."""
    _, sha256, whole = small
    magic, offset, nbytes, digest = struct.unpack("<8sQQ32s8x", whole[-64:])
    index = whole[offset : offset + nbytes]
    assert (magic, offset + nbytes + 64, digest.hex()) == (b"PMOESTR1", len(whole), sha256)
    for record in msgspec.json.decode(index, type=list[Record]):
        assert hashlib.sha256(whole[record.offset : record.offset + record.nbytes]).hexdigest() == record.sha256
