"""A bundle whose experts are kept once: only as this machine has packed them, no longer as they were published.

Packing moves an expert's bytes to where the CPU's kernels want them. Where each nibble of a record has gone is
written down, so that the record can be read back from what was packed, whatever machine reads it; its hash in the
store's index says whether it is right. Then the record itself is given up: its pages in experts.bin become a hole,
which takes no room on disk, but for those with something that packing folds into other numbers (zero points), which
stay. In packed/KEY/ there are, beside what packing writes,

    in_place.json    SHA-256 of the packed store's index; by kind of expert, that of its places and the packed bytes
    kind_K.places    uint32 little-endian [2 * bytes of a record]: for each nibble, the low one of a byte first, the
                     nibble of the packed record that holds it (28 bits), and what it was xored with there (4 bits);
                     all ones: none does, it is in experts.bin

While a run moves the experts, or after it was killed, packed/KEY.unfinished holds those that were moved.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from pocketmoe.bundle.files import is_folder, is_plain_file
from pocketmoe.bundle.packed import PACKED, packed_keys
from pocketmoe.bundle.store import PAGE, ExpertId, Record, StoreReader, padded
from pocketmoe.errors import BadInput, DamagedFile, OutputError
from pocketmoe.system import files

IN_PLACE = "in_place.json"
UNFINISHED = ".unfinished"
MOST_NIBBLES = (1 << 28) - 1  # that a place can tell: packed experts of up to 134 MB
NOWHERE = np.uint32(0xFFFFFFFF)
_NIBBLES_AT_ONCE = 1 << 17


class InPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What in_place.json holds."""

    index_sha256: str
    places_sha256: tuple[str, ...]
    packed_bytes: tuple[int, ...]


def in_place_folder(root: Path) -> Path | None:
    """The folder in a bundle's packed/ from which its experts are to be read, or None where experts.bin has them."""
    packed = root / PACKED
    if not is_folder(packed):
        return None
    return next((packed / key for key in sorted(packed_keys(packed)) if is_plain_file(packed / key / IN_PLACE)), None)


def unfinished_folder(root: Path) -> Path | None:
    """The folder of a run that moves experts, or was killed meanwhile."""
    packed = root / PACKED
    if not is_folder(packed):
        return None
    return next((path for path in sorted(packed.iterdir()) if path.suffix == UNFINISHED and is_folder(path)), None)


def refuse_unfinished(root: Path) -> None:
    """Raises BadInput for a bundle some of whose experts are in neither store's whole file."""
    if unfinished_folder(root) is not None:
        raise BadInput(
            f"{root} was being packed in place, which has not ended",
            f"Finish it, on the same machine: pocketmoe pack {root} --in-place.",
        )


class RestoringReader(StoreReader):
    """Reads records of experts.bin from their packed form; what has been restored already, from the file itself."""

    def __init__(self, path: Path, index_sha256: str, folder: Path) -> None:
        """Raises DamagedFile."""
        super().__init__(path, index_sha256)
        self._folder = folder
        try:
            self._about = msgspec.json.decode((folder / IN_PLACE).read_bytes(), type=InPlace)
            self._packed = StoreReader(folder / "experts.bin", self._about.index_sha256)
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            super().close()
            raise DamagedFile(folder / IN_PLACE, f"cannot be read ({error})") from error
        except DamagedFile:
            super().close()
            raise
        self._fd = os.open(path, os.O_RDONLY | files.CLOEXEC)  # for reads of any length: direct ones are of whole pages
        self._places: dict[int, np.ndarray] = {}

    def read_into(self, expert: ExpertId, views: Sequence[memoryview]) -> int:
        """As `StoreReader.read_into`; the bytes of the packed form are what is counted."""
        record = self.records[expert]
        try:
            data = self._restore(record)
        except DamagedFile as damage:
            try:
                return super().read_into(expert, views)
            except DamagedFile:
                raise damage from None
        written = 0
        for view in views:
            part = data[written : written + view.nbytes]
            view[: len(part)] = part
            view[len(part) :] = bytes(view.nbytes - len(part))
            written += view.nbytes
        return padded(record.nbytes)

    def close(self) -> None:
        self._packed.close()
        os.close(self._fd)
        super().close()

    @property
    def packed_path(self) -> Path:
        """The store of the packed forms."""
        return self._packed.path

    def packed_record(self, expert: ExpertId) -> Record | None:
        """Where in it an expert's packed form lies, if it does."""
        return self._packed.records.get(expert)

    def _restore(self, record: Record) -> memoryview:
        packed = self._packed.records.get(record.id)
        if packed is None or packed.kind != record.kind:
            raise DamagedFile(self._packed.path, f"has no expert {record.expert} of layer {record.layer}")
        left = bytearray(record.nbytes)
        files.read_at(self._fd, [memoryview(left)], record.offset)
        places = self._places_of(record)
        data = restore(np.frombuffer(self._packed.read(record.id), np.uint8), places, np.frombuffer(left, np.uint8))
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise DamagedFile(self._packed.path, f"does not give back expert {record.expert} of layer {record.layer}")
        return data

    def _places_of(self, record: Record) -> np.ndarray:
        """uint32 [2 * bytes of a record], mapped. Raises DamagedFile."""
        kind = record.kind
        if kind not in self._places:
            path = self._folder / f"kind_{kind}.places"
            known = kind < len(self._about.places_sha256)
            if not known or not is_plain_file(path) or path.stat().st_size != 8 * record.nbytes:
                raise DamagedFile(path, "is not what it should be")
            places = np.memmap(path, "<u4", "r")
            if hashlib.sha256(places.data).hexdigest() != self._about.places_sha256[kind]:
                raise DamagedFile(path, "does not match its hash")
            if not _are_possible(places, self._about.packed_bytes[kind]):
                raise DamagedFile(path, "names a place that a packed expert does not have")
            self._places[kind] = places
        if self._packed.records[record.id].nbytes != self._about.packed_bytes[kind]:
            raise DamagedFile(self._packed.path, "has an expert of another size")
        return self._places[kind]


def open_experts(root: Path, path: Path, index_sha256: str) -> StoreReader:
    """What reads the records of a bundle's experts.bin, at `path`, however they are kept. Raises DamagedFile."""
    folder = in_place_folder(root)
    return RestoringReader(path, index_sha256, folder) if folder else StoreReader(path, index_sha256)


def _are_possible(places: np.ndarray, packed_bytes: int) -> bool:
    named = places[places != NOWHERE]
    return not len(named) or int((named & np.uint32(MOST_NIBBLES)).max()) < 2 * packed_bytes


def restore(packed: np.ndarray, places: np.ndarray, left: np.ndarray) -> memoryview:
    """A record, uint8 [n], from its packed form, uint8, and `places`, uint32 [2 * n].

    `left`: uint8 [n], what experts.bin has in its place, where what is nowhere else has stayed.
    """
    found = np.empty(len(places) // 2, np.uint8)
    for start in range(0, len(places), _NIBBLES_AT_ONCE):
        part = places[start : start + _NIBBLES_AT_ONCE]
        there = part != NOWHERE
        at = np.where(there, part & np.uint32(MOST_NIBBLES), np.uint32(0))
        half = packed[at >> 1] >> ((at & 1) << 2).astype(np.uint8) & 15 ^ (part >> 28).astype(np.uint8)
        stayed = left[start // 2 : start // 2 + len(part) // 2]
        low, high = np.where(there[0::2], half[0::2], stayed & 15), np.where(there[1::2], half[1::2], stayed >> 4)
        found[start // 2 : start // 2 + len(low)] = low | high << 4
    return found.data


def kept_pages(places: np.ndarray) -> list[tuple[int, int]]:
    """Offset and length in bytes of the stretches of a record's pages that have to stay, in their order.

    `places`: uint32 [nibbles of the record], where the packed bytes have each, or `NOWHERE`.
    """
    nibbles_a_page = 2 * PAGE
    wanted = np.unique(np.flatnonzero(places == NOWHERE) // nibbles_a_page).tolist()
    stretches: list[tuple[int, int]] = []
    for page in wanted:
        if stretches and sum(stretches[-1]) == page * PAGE:
            stretches[-1] = (stretches[-1][0], stretches[-1][1] + PAGE)
        else:
            stretches.append((page * PAGE, PAGE))
    return stretches


def punched_pages(places: np.ndarray) -> list[tuple[int, int]]:
    """The other stretches of a record's pages; `places` as in `kept_pages`, [nibbles]."""
    stretches: list[tuple[int, int]] = []
    done = 0
    for offset, nbytes in [*kept_pages(places), (padded(len(places) // 2), 0)]:
        if offset > done:
            stretches.append((done, offset - done))
        done = offset + nbytes
    return stretches


def punch_hole(fd: int, path: Path, offset: int, nbytes: int) -> None:
    """Make whole pages of a store a hole. Raises OutputError, where the file system has no holes for instance."""
    try:
        files.give_up(fd, offset, nbytes)
    except OSError as error:
        raise OutputError(f"{path}: room cannot be given back ({error.strerror})") from error
