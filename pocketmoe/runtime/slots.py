"""The fast backend: a slot is a session whose packed weights are a mapped file that we rewrite.

A session made from a saved model maps its data file and computes with those bytes in place, so that writing another
expert's bytes into the file puts that expert into the session: a page-in costs the disk read and nothing else.
ONNX Runtime does not document this. `self_test` therefore swaps a real expert and compares the result, bit for bit,
with that of a session made in the ordinary way, before a slot is trusted.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import psutil

from pocketmoe.bundle import Bundle, Progress, no_progress
from pocketmoe.errors import DamagedFile
from pocketmoe.runtime.backend import BoundRow, make_session, run_single, session_options
from pocketmoe.runtime.budget import trim
from pocketmoe.runtime.packing import DATA, Experts, PackedExperts, Pages, open_packed, pack
from pocketmoe.runtime.sessions import session_from_record
from pocketmoe.store import ExpertId, StoreReader

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory is what a slot needs; folders in it are private
_SESSION_BYTES = 160 * 1024  # what a slot keeps beside its weights; 144 kB measured on onnxruntime 1.32
_MAPPED_PER_TABLE_BYTE = mmap.PAGESIZE // 8  # page tables
_SCRATCH = "pocketmoe-"
_KEEP_SIZE_PUNCH_HOLE = 3

_libc = ctypes.CDLL(None, use_errno=True)


class SlotsUnavailable(Exception):
    """Why this machine cannot use slots; the caller falls back to sessions and says so."""


class SlotBackend:
    """Slots over the packed experts of a bundle."""

    name = "slots"

    def __init__(self, packed: PackedExperts, scratch: Path) -> None:
        self._packed = packed
        self._scratch = scratch

    def kind_of(self, expert: ExpertId) -> int:
        return self._packed.store.records[expert].kind

    def slot_bytes(self, kind: int) -> int:
        live = self._packed.templates[kind].live_bytes
        return live + 2 * live // _MAPPED_PER_TABLE_BYTE + _SESSION_BYTES  # mapped by ONNX Runtime and by us

    def mapped_bytes(self, kind: int) -> int:
        return self._packed.templates[kind].live_bytes

    def room_bytes(self) -> int:
        """What /dev/shm has left, less what making one slot takes for a moment."""
        making = max(template.data_bytes for template in self._packed.templates)
        return max(0, shutil.disk_usage(SHARED_MEMORY).free - making)

    def all_bytes(self) -> int:
        """Shared memory that slots for every expert would take."""
        return sum(self.mapped_bytes(record.kind) for record in self._packed.store.records.values())

    def make_slot(self, kind: int) -> MappedSlot:
        return MappedSlot(self._packed, kind, self._scratch)

    def close(self) -> None:
        self._packed.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


class MappedSlot:
    """One session and the pages of its data file that it computes with."""

    def __init__(self, packed: PackedExperts, kind: int, scratch: Path) -> None:
        template = packed.templates[kind]
        self._packed = packed
        self._input = template.input
        folder = Path(tempfile.mkdtemp(dir=scratch))
        data = folder / DATA
        shutil.copyfile(packed.seeds[kind], data)
        options = session_options(threads=1, session__model_external_initializers_file_folder_path=str(folder))
        self._session = make_session(packed.models[kind], options)
        fd = os.open(data, os.O_RDWR)
        try:
            shutil.rmtree(folder)  # the mappings keep the file
            self._mapping = mmap.mmap(fd, template.data_bytes)
            _punch_dead_pages(fd, template.live, template.data_bytes)
        finally:
            os.close(fd)
        view = memoryview(self._mapping)
        self._views = [view[pages.offset : pages.offset + pages.nbytes] for pages in template.live]
        self._row = BoundRow(self._session)
        trim()

    def load(self, expert: ExpertId) -> int:
        return self._packed.read_into(expert, self._views)

    def run(self, x: np.ndarray) -> np.ndarray:
        return self._row.run(x) if len(x) == 1 else run_single(self._session, {self._input: x})


def _punch_dead_pages(fd: int, live: tuple[Pages, ...], data_bytes: int) -> None:
    """Give back the plain weights, which ONNX Runtime reads only while it creates the session."""
    position = 0
    for pages in (*live, Pages(data_bytes, 0)):
        if pages.offset > position:
            dead = pages.offset - position
            _libc.fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, ctypes.c_long(position), ctypes.c_long(dead))
        position = pages.offset + pages.nbytes


def make_scratch() -> Path:
    """A private folder in memory; those of processes that were killed are removed. Raises SlotsUnavailable."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        raise SlotsUnavailable(f"{SHARED_MEMORY} cannot be written")
    _sweep_stale_scratch()
    return Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-", dir=SHARED_MEMORY))


def open_slots(bundle: Bundle, store: StoreReader, wanted_bytes: int, progress: Progress = no_progress) -> SlotBackend:
    """Slots for a bundle, packed first where that has not been done, and self-tested.

    wanted_bytes: what the budget leaves for slots. Raises SlotsUnavailable, also where there is shared memory for less
    than half of them: sessions hold more then.
    """
    scratch = make_scratch()
    with contextlib.ExitStack() as on_error:
        on_error.callback(shutil.rmtree, scratch, ignore_errors=True)
        packed = open_packed(bundle) or _pack(bundle, scratch, progress)
        on_error.callback(packed.close)
        backend = SlotBackend(packed, scratch)
        try:
            self_test(Experts.of(bundle, store), packed, scratch)
        except OSError as error:
            raise SlotsUnavailable(f"{SHARED_MEMORY} has no room for a slot ({error.strerror})") from error
        except (SlotsUnavailable, DamagedFile):
            raise
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise SlotsUnavailable(f"a slot could not be made or run ({error})") from error
        room, wanted = backend.room_bytes(), min(wanted_bytes, backend.all_bytes())
        if room < wanted / 2:
            raise SlotsUnavailable(
                f"{SHARED_MEMORY} has {room / 1e6:.1f} MB free of the {wanted / 1e6:.1f} MB that slots would take"
            )
        on_error.pop_all()
    return backend


def _sweep_stale_scratch() -> None:
    """Remove what processes that were killed left in memory."""
    for folder in SHARED_MEMORY.glob(f"{_SCRATCH}*-*"):
        pid = folder.name.removeprefix(_SCRATCH).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _pack(bundle: Bundle, scratch: Path, progress: Progress) -> PackedExperts:
    try:
        return pack(bundle, scratch, progress)
    except DamagedFile:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise SlotsUnavailable(f"the experts could not be packed ({error})") from error


def self_test(experts: Experts, packed: PackedExperts, scratch: Path) -> None:
    """Swap the last expert of each kind into a slot; its results must be those of an ordinary session, bit for bit.

    Raises SlotsUnavailable.
    """
    rng = np.random.default_rng(0)
    last = {record.kind: expert for expert, record in experts.store.records.items()}
    for kind, expert in last.items():
        slot = MappedSlot(packed, kind, scratch)
        slot.load(expert)
        graph = experts.graphs[kind]
        ordinary = session_from_record(graph.path.read_bytes(), bytes(experts.store.read(expert)))
        for rows in (1, 7):
            x = rng.standard_normal((rows, experts.hidden_size), dtype=np.float32)
            if not np.array_equal(slot.run(x), run_single(ordinary, {graph.input: x})):
                raise SlotsUnavailable("swapping an expert's bytes did not give that expert's result")
