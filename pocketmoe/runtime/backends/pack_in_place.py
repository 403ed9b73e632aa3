"""Moves a bundle's experts from how they were published to how this machine has them packed, and back.

They are on disk once (`bundle.in_place`): after every few experts that are written and synced, their former bytes
are given up. A killed run is gone on with by the next one; until then no other command opens the bundle.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from pocketmoe.bundle.files import changed_ns, is_folder, is_plain_file, open_folder, sync, sync_tree
from pocketmoe.bundle.in_place import (
    IN_PLACE,
    MOST_HALF_BYTES,
    UNFINISHED,
    InPlace,
    RestoringReader,
    give_up,
    in_place_folder,
    restore,
    unfinished_folder,
)
from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.packed import PACKING, make_packed, packed_keys, remove_packed
from pocketmoe.bundle.partial import RESUME, mark_complete
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, Record, StoreReader, translate_write_errors
from pocketmoe.bundle.stream import worker_pool, write_experts
from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.runtime.backends.packing import (
    Packer,
    Packing,
    StoredExperts,
    Template,
    device_key,
    open_packed,
    read_packing,
    seal,
    write_template,
)

AT_ONCE = 32  # experts that are synced, and then given up
_WORKERS = 2


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
        with translate_write_errors(unfinished), contextlib.closing(_source(bundle)) as source:
            if in_place_folder(bundle.root) is None:
                _remove_all(packed)
            unfinished.mkdir(exist_ok=True)
            _move(bundle, source, unfinished, scratch, progress)
            _remove_all(packed)
            unfinished.rename(packed / key)
            sync(packed)


def unpack_in_place(bundle: Bundle, progress: Progress = no_progress) -> None:
    """Have them as they were published again, on whatever machine. Does nothing where that is so.

    Killed, it goes on when it is called again. Raises BadInput, DamagedFile, OutputError.
    """
    with _locked(bundle) as packed:
        folder = in_place_folder(bundle.root)
        if unfinished_folder(bundle.root) is None and folder is None:
            return
        with contextlib.closing(bundle.open_store()) as source, translate_write_errors(source.path):
            assert isinstance(source, RestoringReader), "open_store has refused what is unfinished"
            assert folder is not None, "that is what it restores from"
            with open(source.path, "r+b", buffering=0) as file, open(folder / STORE, "r+b", buffering=0) as given:
                moved = _GivenUp(lambda: os.fsync(file.fileno()), given.fileno(), folder / STORE, source.packed_record)
                for number, (expert, record) in enumerate(source.records.items()):
                    progress("reading experts back", number, len(source.records))
                    if not _is_there(file.fileno(), record):
                        os.pwrite(file.fileno(), source.read(expert), record.offset)
                    moved.note(expert)
                moved.end()
        bundle.check_file(STORE)
        (folder / IN_PLACE).unlink()
        remove_packed(packed, folder.name)
        progress("reading experts back", len(source.records), len(source.records))


class _GivenUp:
    """Gives up what has been moved, a few experts at a time, when what they were moved to is on disk."""

    def __init__(
        self, sync_moved: Callable[[], None], fd: int, path: Path, former: Callable[[ExpertId], Record]
    ) -> None:
        """`fd`, `path`: the store that they are moved from; `former`: where an expert lies in it."""
        self._sync, self._fd, self._path, self._former = sync_moved, fd, path, former
        self._experts: list[ExpertId] = []

    def note(self, expert: ExpertId) -> None:
        self._experts.append(expert)
        if len(self._experts) >= AT_ONCE:
            self.end()

    def end(self) -> None:
        self._sync()
        for expert in self._experts:
            give_up(self._fd, self._path, self._former(expert))
        self._experts.clear()


def _remove_all(packed: Path) -> None:
    """What machines have packed beside the published experts, or in place before the experts were moved on."""
    for key in packed_keys(packed):
        remove_packed(packed, key)


@contextlib.contextmanager
def _locked(bundle: Bundle) -> Generator[Path]:
    """The bundle's packed/, as long as no other process moves its experts. Raises BadInput, OutputError."""
    with translate_write_errors(bundle.root), contextlib.ExitStack() as closing:
        packed = make_packed(bundle.root)
        fd = open_folder(packed)
        closing.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        raise BadInput(f"{other} was begun by another CPU or ONNX Runtime", "Finish it there.")


def _is_usable(bundle: Bundle) -> bool:
    packed = open_packed(bundle)
    if packed:
        packed.close()
    return packed is not None


def _source(bundle: Bundle) -> StoreReader:
    """What experts that are not moved yet are read from, whatever else has begun. Raises DamagedFile."""
    folder = in_place_folder(bundle.root)
    place = (bundle.path(STORE), bundle.manifest.store_index_sha256)
    return RestoringReader(*place, folder) if folder else StoreReader(*place)


def _move(bundle: Bundle, source: StoreReader, target: Path, scratch: Path, progress: Progress) -> None:
    """Pack every expert into files in `target`, all of them in the end. Raises what `pack_in_place` raises."""
    experts = StoredExperts.of(bundle, source)
    packers = [Packer(graph.path, scratch) for graph in experts.graphs]
    begun = _begin(target, experts, packers, progress)
    places = [np.memmap(target / f"kind_{kind}.places", "<u4", "r") for kind in range(len(packers))]
    kind_of = {expert: record.kind for expert, record in source.records.items()}

    def make(expert: ExpertId) -> tuple[bytes, float]:
        record = source.read(expert)
        live = packers[kind_of[expert]].pack_live(record)
        if restore(np.frombuffer(live, np.uint8), places[kind_of[expert]]) != record:
            raise _lossy(bundle, f"layer {expert.layer}, expert {expert.expert}")
        return live, 0.0

    former = source.packed_record if isinstance(source, RestoringReader) else source.records.__getitem__
    path = in_place_folder(bundle.root) or bundle.root

    def sync_moved() -> None:
        sync(target / STORE)
        sync(target / RESUME / "journal")

    with worker_pool(_WORKERS) as pool, open(path / STORE, "r+b", buffering=0) as file:
        moved = _GivenUp(sync_moved, file.fileno(), path / STORE, former)
        written = write_experts(kind_of, make, target, pool, progress, "packing experts in place", moved.note)
        moved.end()
    packing = msgspec.structs.replace(begun, index_sha256=written.index_sha256, changed_ns=changed_ns(target / STORE))
    about = InPlace(
        index_sha256=written.index_sha256,
        places_sha256=tuple(hashlib.sha256(found.data).hexdigest() for found in places),
        packed_bytes=tuple(template.live_bytes for template in packing.templates),
    )
    (target / PACKING).write_bytes(seal(packing))
    (target / IN_PLACE).write_bytes(msgspec.json.encode(about))
    sync_tree(target)
    mark_complete(target)


def _begin(target: Path, experts: StoredExperts, packers: Sequence[Packer], progress: Progress) -> Packing:
    """What an earlier run has begun in `target`, else what is needed to go on after a kill, written and synced."""
    if is_plain_file(target / PACKING):
        packing = read_packing(target)
        for number, (packer, template) in enumerate(zip(packers, packing.templates, strict=True)):
            packer.go_on((target / f"kind_{number}.onnx").read_bytes(), template.live)
        return packing
    first = {record.kind: record for record in reversed(experts.store.records.values())}
    templates: list[Template] = []
    for kind, (graph, packer) in enumerate(zip(experts.graphs, packers, strict=True)):
        progress("finding where packing puts each half byte", kind, len(packers))
        record = experts.store.read(first[kind].id)
        templates.append(write_template(target, kind, graph.input, packer, packer.pack(record)))
        places = find_places(packer, record)
        if places is None:
            raise _lossy_kind(target, kind)
        (target / f"kind_{kind}.places").write_bytes(places.tobytes())
    packing = Packing(experts.index_sha256, "", tuple(templates))
    sync_tree(target)
    (target / PACKING).write_bytes(seal(packing))
    sync_tree(target)
    sync(target.parent)
    return packing


def find_places(packer: Packer, record: memoryview) -> np.ndarray | None:
    """Where in a packed expert each half byte of its record lies, uint32 [2 * bytes], as `in_place` says; or None.

    Records whose half bytes are digits of their own numbers are packed: what then stands in a place tells which one
    came there. Places that only look right by chance fail on the record itself, or on random ones.
    """
    count = 2 * len(record)
    numbers = np.arange(count, dtype=np.uint32)
    flips = _half_bytes(packer.pack_live(memoryview(bytes(len(record)))))
    if len(flips) > MOST_HALF_BYTES:
        return None
    came = np.zeros(len(flips), np.uint32)
    for shift in range(0, max(count - 1, 1).bit_length(), 4):
        digits = (numbers >> np.uint32(shift) & np.uint32(15)).astype(np.uint8)
        arrived = _half_bytes(packer.pack_live(_from_half_bytes(digits))) ^ flips
        came |= arrived.astype(np.uint32) << np.uint32(shift)
    right = came < count
    rng = np.random.default_rng(0)
    for tried in (bytes(record), rng.bytes(len(record)), rng.bytes(len(record))):
        given, got = _half_bytes(tried), _half_bytes(packer.pack_live(memoryview(tried)))
        right &= given[np.minimum(came, count - 1)] == got ^ flips
    places, found = np.zeros(count, np.uint32), np.zeros(count, bool)
    where = np.flatnonzero(right).astype(np.uint32)
    found[came[where]] = True
    places[came[where]] = where | flips[where].astype(np.uint32) << np.uint32(28)
    return places if found.all() else None


def _half_bytes(data: bytes) -> np.ndarray:
    """uint8 [2 * bytes], the low one of each byte first."""
    found = np.frombuffer(data, np.uint8)
    return np.stack([found & 15, found >> 4], axis=1).reshape(-1)


def _from_half_bytes(halves: np.ndarray) -> memoryview:
    """The bytes whose half bytes, uint8 [2 * bytes], these are."""
    return memoryview((halves[0::2] | halves[1::2] << 4).tobytes())


def _is_there(fd: int, record: Record) -> bool:
    """Whether a store's file has this record."""
    return hashlib.sha256(os.pread(fd, record.nbytes, record.offset)).hexdigest() == record.sha256


def _lossy(bundle: Bundle, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{bundle.root}: {what} cannot be read back from how this CPU has it packed", "Use it without --in-place."
    )


def _lossy_kind(target: Path, kind: int) -> UnsupportedModel:
    return UnsupportedModel(
        f"{target.parent.parent}: experts of kind {kind} cannot be read back from how this CPU has them packed",
        "Use it without --in-place.",
    )
