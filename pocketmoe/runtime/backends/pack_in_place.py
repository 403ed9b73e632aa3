"""Moves a bundle's experts from how they were published to how this machine has them packed, and back.

They are on disk once (`bundle.in_place`): after every few experts that are written and synced, their former bytes
are given up. A killed run is gone on with by the next one; until then no other command opens the bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from pocketmoe.bundle.files import (
    changed_ns,
    is_folder,
    is_plain_file,
    sha256_of,
    sync,
    sync_tree,
    write_whole,
)
from pocketmoe.bundle.in_place import (
    IN_PLACE,
    MOST_NIBBLES,
    NOWHERE,
    UNFINISHED,
    InPlace,
    RestoringReader,
    in_place_folder,
    kept_pages,
    open_experts,
    punch_hole,
    punched_pages,
    restore,
    unfinished_folder,
)
from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.packed import PACKED, PACKING, make_packed, packed_keys, remove_packed
from pocketmoe.bundle.partial import RESUME, mark_complete
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, Record, StoreReader, padded, translate_write_errors
from pocketmoe.bundle.stream import close_written, worker_pool, write_experts
from pocketmoe.errors import BadInput, DamagedFile, UnsupportedModel
from pocketmoe.runtime.backends.packer import Packer
from pocketmoe.runtime.backends.packing import (
    Packing,
    StoredExperts,
    Template,
    device_key,
    open_packed,
    read_packing,
    seal,
    write_template,
)
from pocketmoe.system.files import open_folder
from pocketmoe.system.locks import lock_now

AT_ONCE = 32  # experts that are synced, and then given up
_WORKERS = 2
_TRIES = 10  # random records; a nibble computed from others is right in all by chance once in 16 ** 10


def pack_in_place(bundle: Bundle, scratch: Path, progress: Progress = no_progress) -> None:
    """Have a bundle's experts only as this machine has them packed. Does nothing where that is so.

    `scratch`: a directory in memory. Raises BadInput where the experts' file is not this bundle's alone, or another
    machine has begun; UnsupportedModel where packing loses something; DamagedFile; OutputError.
    """
    with _locked(bundle) as packed:
        key = device_key(bundle)
        unfinished = packed / (key + UNFINISHED)
        _refuse_foreign(bundle, unfinished)
        if not is_folder(unfinished) and in_place_folder(bundle.root) == packed / key and _is_usable(bundle):
            return
        with translate_write_errors(unfinished), _open_experts(bundle) as source:
            if in_place_folder(bundle.root) is None:
                _remove_all(packed)
            unfinished.mkdir(exist_ok=True)
            _move(bundle, source, unfinished, scratch, progress)
            _remove_all(packed)
            unfinished.rename(packed / key)
            sync(packed)


def unpack_in_place(bundle: Bundle, progress: Progress = no_progress) -> None:
    """Have them as they were published again, on whatever machine, also what a killed run has moved so far.

    Does nothing where that is so. Killed, it goes on when it is called again. Raises DamagedFile, OutputError.
    """
    with _locked(bundle) as packed, translate_write_errors(bundle.root):
        unfinished, folder = unfinished_folder(bundle.root), in_place_folder(bundle.root)
        if unfinished is not None and is_plain_file(unfinished / PACKING):
            _close_unfinished(bundle, unfinished, progress)
        folders = [found for found in (unfinished, folder) if found is not None and is_plain_file(found / IN_PLACE)]
        if folders:
            _restore_from(bundle, folders, progress)
        if unfinished is not None:
            shutil.rmtree(unfinished)
        for found in folders:
            if found != unfinished:
                (found / IN_PLACE).unlink()
                remove_packed(packed, found.name)


def _close_unfinished(bundle: Bundle, unfinished: Path, progress: Progress) -> None:
    """Make what a killed run has moved readable."""
    with contextlib.closing(StoreReader(bundle.path(STORE), bundle.manifest.store_index_sha256)) as source:
        kind_of = {expert: record.kind for expert, record in source.records.items()}
    packing = read_packing(unfinished)
    index_sha256 = close_written(kind_of, unfinished, progress)
    write_whole(unfinished / IN_PLACE, msgspec.json.encode(_about(unfinished, packing, index_sha256)))


def _restore_from(bundle: Bundle, folders: Sequence[Path], progress: Progress) -> None:
    """Write every record to where it was, out of these folders. Raises DamagedFile, OutputError."""
    path = bundle.path(STORE)
    with contextlib.ExitStack() as closing:
        readers = [RestoringReader(path, bundle.manifest.store_index_sha256, folder) for folder in folders]
        for reader in readers:
            closing.callback(reader.close)
        file = closing.enter_context(open(path, "r+b", buffering=0))
        records = readers[0].records
        for number, (expert, record) in enumerate(records.items()):
            progress("reading experts back", number, len(records))
            if not _is_there(file.fileno(), record):
                os.pwrite(file.fileno(), _first_whole(readers, expert), record.offset)
            if number % AT_ONCE == AT_ONCE - 1 or number == len(records) - 1:
                os.fsync(file.fileno())
                _punch_packed(readers, list(records)[number - number % AT_ONCE : number + 1])
        progress("reading experts back", len(records), len(records))
    bundle.check_file(STORE)


def _first_whole(readers: Sequence[RestoringReader], expert: ExpertId) -> memoryview:
    for reader in readers[:-1]:
        with contextlib.suppress(DamagedFile):
            return reader.read(expert)
    return readers[-1].read(expert)


def _punch_packed(readers: Sequence[RestoringReader], experts: Sequence[ExpertId]) -> None:
    for reader in readers:
        with open(reader.packed_path, "r+b", buffering=0) as file:
            for expert in experts:
                record = reader.packed_record(expert)
                if record is not None:
                    punch_hole(file.fileno(), reader.packed_path, record.offset, padded(record.nbytes))


def _about(folder: Path, packing: Packing, index_sha256: str) -> InPlace:
    places = [sha256_of(folder / f"kind_{kind}.places") for kind in range(len(packing.templates))]
    return InPlace(index_sha256, tuple(places), tuple(template.live_bytes for template in packing.templates))


def _remove_all(packed: Path) -> None:
    """What machines have packed beside the published experts, or in place before the experts were moved on."""
    for key in packed_keys(packed):
        remove_packed(packed, key)


@contextlib.contextmanager
def _locked(bundle: Bundle) -> Generator[Path]:
    """The bundle's packed/, as long as no other process moves its experts. Raises BadInput, OutputError."""
    with translate_write_errors(bundle.root), contextlib.ExitStack() as closing:
        packed = bundle.root / PACKED
        make_packed(packed)
        fd = open_folder(packed)
        closing.callback(os.close, fd)
        try:
            lock_now(fd)
        except BlockingIOError as error:
            raise BadInput(f"{bundle.root} is being packed by another process", "Wait for it.") from error
        yield packed


def _refuse_foreign(bundle: Bundle, unfinished: Path) -> None:
    store = bundle.path(STORE)
    if store.is_symlink() or store.stat().st_nlink > 1:
        raise BadInput(
            f"{store} belongs to others too (a link, or a hub's cache)", "Copy the bundle, and pack the copy."
        )
    other = unfinished_folder(bundle.root)
    if other not in (None, unfinished):
        raise BadInput(
            f"{other} was begun by another CPU or ONNX Runtime",
            f"Finish it there, or take it back: pocketmoe pack {bundle.root} --undo.",
        )


def _is_usable(bundle: Bundle) -> bool:
    packed = open_packed(bundle)
    if packed:
        packed.close()
    return packed is not None


def _open_experts(bundle: Bundle) -> StoreReader:
    """What experts that are not moved yet are read from, also where another machine has begun. Raises DamagedFile."""
    return open_experts(bundle.root, bundle.path(STORE), bundle.manifest.store_index_sha256)


def _move(bundle: Bundle, source: StoreReader, target: Path, scratch: Path, progress: Progress) -> None:
    """Pack every expert into files in `target`, all of them in the end. Raises what `pack_in_place` raises."""
    experts = StoredExperts.of(bundle, source)
    packers = [Packer(graph.path, scratch) for graph in experts.graphs]
    begun = _begin(target, experts, packers, progress)
    places = [np.memmap(target / f"kind_{kind}.places", "<u4", "r") for kind in range(len(packers))]
    staying = [kept_pages(found) for found in places]  # by kind: looking through the places of one takes a while
    kind_of = {expert: record.kind for expert, record in source.records.items()}

    def make(expert: ExpertId) -> tuple[bytes, float]:
        record = source.read(expert)
        live = packers[kind_of[expert]].pack_live(record)
        left = np.frombuffer(_kept(record, staying[kind_of[expert]]), np.uint8)
        if restore(np.frombuffer(live, np.uint8), places[kind_of[expert]], left) != record:
            raise _lossy(bundle.root, f"layer {expert.layer}, expert {expert.expert}")
        return live, 0.0

    with worker_pool(_WORKERS) as pool, _Former(bundle, source, places, target) as former:
        written = write_experts(kind_of, make, target, pool, progress, "packing experts in place", former.moved)
        former.punch()
    packing = msgspec.structs.replace(begun, index_sha256=written.index_sha256, changed_ns=changed_ns(target / STORE))
    (target / PACKING).write_bytes(seal(packing))
    (target / IN_PLACE).write_bytes(msgspec.json.encode(_about(target, packing, written.index_sha256)))
    sync_tree(target)
    mark_complete(target)


def _kept(record: memoryview, staying: Sequence[tuple[int, int]]) -> bytes:
    """A record with zeros in all its pages but those that have to stay."""
    left = bytearray(len(record))
    for offset, nbytes in staying:
        left[offset : offset + nbytes] = record[offset : offset + nbytes]
    return bytes(left)


class _Former:
    """The store that experts are moved from: gives them up, a few at a time, when what they were moved to is on disk.

    A context manager. `target`: where they are moved to.
    """

    def __init__(self, bundle: Bundle, source: StoreReader, places: Sequence[np.ndarray], target: Path) -> None:
        self._source, self._target = source, target
        self._staying = [kept_pages(found) for found in places]
        self._punched = [punched_pages(found) for found in places]
        self._published = bundle.path(STORE)
        self._experts: list[ExpertId] = []
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._raw = self._files.enter_context(open(self._published, "r+b", buffering=0))
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def moved(self, expert: ExpertId) -> None:
        """This one is written."""
        self._experts.append(expert)
        if len(self._experts) >= AT_ONCE:
            self.punch()

    def punch(self) -> None:
        """Give up all those that were written."""
        sync(self._target / STORE)
        sync(self._target / RESUME / "journal")
        if isinstance(self._source, RestoringReader):
            for expert in self._experts:
                self._put_back_what_stays(self._source, expert)
            os.fsync(self._raw.fileno())
            _punch_packed([self._source], self._experts)
        for expert in self._experts:
            record = self._source.records[expert]
            for offset, nbytes in self._punched[record.kind]:
                punch_hole(self._raw.fileno(), self._published, record.offset + offset, nbytes)
        self._experts.clear()

    def _put_back_what_stays(self, source: RestoringReader, expert: ExpertId) -> None:
        """What another machine had packed in a way that could be read back may be what this one folds."""
        record = source.records[expert]
        kept = self._staying[record.kind]
        data = source.read(expert) if kept else memoryview(b"")
        for offset, nbytes in kept:
            os.pwrite(self._raw.fileno(), data[offset : offset + nbytes], record.offset + offset)


def _begin(target: Path, experts: StoredExperts, packers: Sequence[Packer], progress: Progress) -> Packing:
    """What an earlier run has begun in `target`, else what is needed to go on after a kill, written and synced."""
    if is_plain_file(target / PACKING):
        packing = read_packing(target)
        for number, (packer, template) in enumerate(zip(packers, packing.templates, strict=True)):
            packer.go_on((target / f"kind_{number}.onnx").read_bytes(), template.live)
        return packing
    with contextlib.ExitStack() as on_error:
        on_error.callback(shutil.rmtree, target, ignore_errors=True)  # nothing has been moved yet
        packing = _write_beginning(target, experts, packers, progress)
        on_error.pop_all()
    return packing


def _write_beginning(target: Path, experts: StoredExperts, packers: Sequence[Packer], progress: Progress) -> Packing:
    first = {record.kind: record for record in reversed(experts.store.records.values())}
    templates: list[Template] = []
    for kind, (graph, packer) in enumerate(zip(experts.graphs, packers, strict=True)):
        progress("finding where packing puts each nibble", kind, len(packers))
        record = experts.store.read(first[kind].id)
        templates.append(write_template(target, kind, graph.input, packer, packer.pack(record)))
        places = find_places(packer, record)
        if sum(nbytes for _, nbytes in kept_pages(places)) > len(record) // 4:
            raise _lossy(target.parent.parent, f"most of experts of kind {kind}")
        (target / f"kind_{kind}.places").write_bytes(places.tobytes())
    packing = Packing(experts.index_sha256, "", tuple(templates))
    sync_tree(target)
    (target / PACKING).write_bytes(seal(packing))
    sync_tree(target)
    sync(target.parent)
    return packing


def find_places(packer: Packer, record: memoryview) -> np.ndarray:
    """Where in a packed expert each nibble of its record lies, uint32 [2 * bytes], as `in_place` says.

    Records whose nibbles are digits of their own numbers are packed: what then stands in a place tells which one
    came there. Places that only look right by chance fail on the record itself, or on random ones.
    """
    count = 2 * len(record)
    numbers = np.arange(count, dtype=np.uint32)
    flips = _nibbles(packer.pack_live(memoryview(bytes(len(record)))))
    if len(flips) > MOST_NIBBLES:
        return np.full(count, NOWHERE)
    came = np.zeros(len(flips), np.uint32)
    for shift in range(0, max(count - 1, 1).bit_length(), 4):
        digits = (numbers >> np.uint32(shift) & np.uint32(15)).astype(np.uint8)
        arrived = _nibbles(packer.pack_live(_from_nibbles(digits))) ^ flips
        came |= arrived.astype(np.uint32) << np.uint32(shift)
    right = came < count
    rng = np.random.default_rng(0)
    for tried in (bytes(record), *(rng.bytes(len(record)) for _ in range(_TRIES))):
        given, got = _nibbles(tried), _nibbles(packer.pack_live(memoryview(tried)))
        right &= given[np.minimum(came, count - 1)] == got ^ flips
    places = np.full(count, NOWHERE)
    where = np.flatnonzero(right).astype(np.uint32)
    places[came[where]] = where | flips[where].astype(np.uint32) << np.uint32(28)
    return places


def _nibbles(data: bytes) -> np.ndarray:
    """uint8 [2 * bytes], the low one of each byte first."""
    found = np.frombuffer(data, np.uint8)
    return np.stack([found & 15, found >> 4], axis=1).reshape(-1)


def _from_nibbles(nibbles: np.ndarray) -> memoryview:
    """The bytes whose nibbles, uint8 [2 * bytes], these are."""
    return memoryview((nibbles[0::2] | nibbles[1::2] << 4).tobytes())


def _is_there(fd: int, record: Record) -> bool:
    """Whether a store's file has this record."""
    return hashlib.sha256(os.pread(fd, record.nbytes, record.offset)).hexdigest() == record.sha256


def _lossy(root: Path, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{root}: {what} cannot be read back from how this CPU has it packed",
        f"Use it without --in-place; what was moved comes back with: pocketmoe pack {root} --undo.",
    )
