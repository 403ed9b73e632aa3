"""The fast backend: a slot is a session whose packed weights are a mapped file that we rewrite.

A session made from a saved model maps its data file and computes with those bytes in place, so that writing another
expert's bytes into the file puts that expert into the session: a page-in costs the disk read and nothing else.
ONNX Runtime does not document this. `self_test` therefore swaps a real expert and compares the result, bit for bit,
with that of a session made in the ordinary way, before a slot is trusted.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil

from pocketmoe.bundle.reader import Bundle, Progress, no_progress
from pocketmoe.bundle.store import ExpertId, StoreReader
from pocketmoe.errors import DamagedFile
from pocketmoe.runtime.backends.onnx_wire import Span, external_spans, with_offsets
from pocketmoe.runtime.backends.packing import DATA, Experts, PackedExperts, Template, open_packed, pack
from pocketmoe.runtime.backends.protocol import BoundRow, make_session, run_single, session_options
from pocketmoe.runtime.backends.sessions import session_from_record
from pocketmoe.runtime.memory.mlock import lock

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory is what a slot needs; folders in it are private
_SESSION_BYTES = 160 * 1024  # what a slot keeps beside its weights; 144 kB measured on onnxruntime 1.32
_MAPPED_PER_TABLE_BYTE = mmap.PAGESIZE // 8  # page tables
_SCRATCH = "pocketmoe-"
_DIGITS = 15  # of an offset in a slot's model


class SlotsUnavailable(Exception):
    """Why this machine cannot use slots; the caller falls back to sessions and says so."""


class SlotBackend:
    """Slots over the packed experts of a bundle."""

    name = "slots"

    def __init__(self, packed: PackedExperts, scratch: Path) -> None:
        self._packed = packed
        self._scratch = scratch
        self._files = [SlotFile(packed, kind, scratch) for kind in range(len(packed.templates))]

    def kind_of(self, expert: ExpertId) -> int:
        return self._packed.store.records[expert].kind

    def slot_bytes(self, kind: int) -> int:
        live = self._packed.templates[kind].live_bytes
        return live + 2 * live // _MAPPED_PER_TABLE_BYTE + _SESSION_BYTES  # mapped by ONNX Runtime and by us

    def mapped_bytes(self, kind: int) -> int:
        return self._packed.templates[kind].live_bytes

    def making_bytes(self) -> int:
        return sum(template.data_bytes - template.live_bytes for template in self._packed.templates)

    def room_bytes(self) -> int:
        """What /dev/shm has left."""
        return shutil.disk_usage(SHARED_MEMORY).free

    def all_bytes(self) -> int:
        """Shared memory that slots for every expert would take."""
        return sum(self.mapped_bytes(record.kind) for record in self._packed.store.records.values())

    def make_slot(self, kind: int) -> MappedSlot:
        return MappedSlot(self._files[kind])

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._packed.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


class SlotFile:
    """The weights of all slots of one kind: a file in memory without a name, which goes when the process does.

    In front are the plain weights of the expert that every slot starts from, behind them each slot's live pages. ONNX
    Runtime packs the plain weights for each session that it makes, compares the result with what the file has, and
    then computes with that. A slot's model is the kind's with its packed weights there, so that of the seed only they
    are copied for a slot.
    """

    def __init__(self, packed: PackedExperts, kind: int, scratch: Path) -> None:
        """`scratch`: a directory in memory."""
        self.packed, self.template = packed, packed.templates[kind]
        self.folder = Path(tempfile.mkdtemp(dir=scratch))
        self._taken = itertools.count()
        seed = packed.seeds[kind].read_bytes()
        self._live = b"".join(seed[pages.offset : pages.offset + pages.nbytes] for pages in self.template.live)
        moving = _live_spans(packed.models[kind], self.template)
        marks = {span.offset: _mark(place) for span, place in moving}
        self._model = with_offsets(packed.models[kind], lambda offset: marks.get(offset, str(offset)))
        self._places = [place for _, place in moving]
        self.fd = _unnamed_file(self.folder)
        position = 0
        for span in (*(span for span, _ in moving if span.packed), Span("", len(seed), 0, packed=True)):
            os.pwrite(self.fd, memoryview(seed)[position : span.offset], position)
            position = span.offset + span.nbytes

    def take(self) -> tuple[bytes, int]:
        """Room for one more slot: its model, and where in the file its live pages begin."""
        start = self.template.data_bytes + next(self._taken) * self.template.live_bytes
        os.pwrite(self.fd, self._live, start)
        model = self._model
        for place in self._places:  # cheaper than to write the model anew
            model = model.replace(_mark(place).encode(), b"%0*d" % (_DIGITS, start + place))
        return model, start

    def close(self) -> None:
        """Make no more slots; those that there are go on."""
        os.close(self.fd)


class MappedSlot:
    """One session and the pages of the slots' file that it computes with."""

    def __init__(self, file: SlotFile) -> None:
        model, start = file.take()
        self._packed = file.packed
        self._input = file.template.input
        options = session_options(threads=1, session__model_external_initializers_file_folder_path=str(file.folder))
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was saved optimized
        self._session = make_session(model, options)
        self._view = memoryview(mmap.mmap(file.fd, file.template.live_bytes, offset=start))
        lock(self._view)
        self._row = BoundRow(self._session)

    def load(self, expert: ExpertId) -> int:
        return self._packed.read_into(expert, [self._view])

    def run(self, x: np.ndarray) -> np.ndarray:
        return self._row.run(x) if len(x) == 1 else run_single(self._session, {self._input: x})


def _mark(place: int) -> str:
    """Stands in a model for where among its live pages a slot has something: no offset, and as long as one."""
    return str(10**_DIGITS - 1 - place)


def _live_spans(model: bytes, template: Template) -> list[tuple[Span, int]]:
    """The spans that a slot computes with, each with its place among the live pages, in bytes.

    Plain weights are among them where all of them lie in live pages; see `packing.used_spans`.
    """
    found, place = [], 0
    spans = external_spans(model)
    for pages in template.live:
        inside = (s for s in spans if pages.offset <= s.offset and s.offset + s.nbytes <= pages.offset + pages.nbytes)
        found += [(span, place + span.offset - pages.offset) for span in inside]
        place += pages.nbytes
    return found if len(found) == len(spans) else [(span, place) for span, place in found if span.packed]


def _unnamed_file(folder: Path) -> int:
    """A new file of that folder, open, which a session still finds there as `DATA`.

    ONNX Runtime opens the path that it is given, but first wants what it resolves to to exist, which for a file without
    a name is, says the kernel, its last name and " (deleted)".
    """
    named = folder / "slots"
    fd = os.open(named, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    named.unlink()
    named.with_name(f"{named.name} (deleted)").touch()
    (folder / DATA).symlink_to(f"/proc/self/fd/{fd}")
    return fd


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
        try:
            self_test(Experts.of(bundle, store), packed, scratch)
            backend = SlotBackend(packed, scratch)
        except OSError as error:
            raise SlotsUnavailable(f"{SHARED_MEMORY} has no room for a slot ({error.strerror})") from error
        except (SlotsUnavailable, DamagedFile):
            raise
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise SlotsUnavailable(f"a slot could not be made or run ({error})") from error
        on_error.callback(backend.close)
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
        with contextlib.closing(SlotFile(packed, kind, scratch)) as file:
            slot = MappedSlot(file)
        slot.load(expert)
        graph = experts.graphs[kind]
        ordinary = session_from_record(graph.path.read_bytes(), bytes(experts.store.read(expert)))
        for rows in (1, 7):
            x = rng.standard_normal((rows, experts.hidden_size), dtype=np.float32)
            if not np.array_equal(slot.run(x), run_single(ordinary, {graph.input: x})):
                raise SlotsUnavailable("swapping an expert's bytes did not give that expert's result")
