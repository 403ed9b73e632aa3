"""The fast backend: a slot is a session whose packed weights are a mapped file that we rewrite.

A session made from a saved model maps its data file and computes with those bytes in place, so that writing another
expert's bytes into the file puts that expert into the session: a page-in costs the disk read and nothing else.
ONNX Runtime does not document this. `self_test` therefore swaps a real expert and compares the result, bit for bit,
with that of a session made in the ordinary way, before a slot is trusted.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.partial import partial_directory
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreReader
from pocketmoe.errors import BadInput, DamagedFile, GraphRefused, LimitReached, OverBudget
from pocketmoe.ort import Rows, Session, session_options
from pocketmoe.runtime.backends.onnx_wire import PlainTensor, Span, external_spans, plain_tensors, with_offsets
from pocketmoe.runtime.backends.packer import DATA
from pocketmoe.runtime.backends.packing import (
    PackedExperts,
    StoredExperts,
    open_packed,
    pack,
    refuse_in_place,
)
from pocketmoe.runtime.backends.sessions import expert_from_record
from pocketmoe.runtime.memory.budget import small_blocks_too, trim
from pocketmoe.runtime.memory.limits import Limits, read_limits
from pocketmoe.runtime.memory.mlock import lock
from pocketmoe.system.files import give_up

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory is what a slot needs; folders in it are private
_SESSION_BYTES = 160 * 1024  # what a slot keeps beside its weights; 144 kB measured on onnxruntime 1.32
_MAPPED_PER_TABLE_BYTE = mmap.PAGESIZE // 8  # page tables
_SCRATCH = "pocketmoe"
_REMEDY = "Packed experts and slots need a file system in memory there; --backend sessions does without."
_TRIMMED_EVERY = 32 << 20  # bytes of slots that are made
_DIGITS = 15  # of an offset in a slot's model
# What a session can be given out of a map, by ONNX's number of the type; bfloat16 and eight-bit floats as their bits.
_NUMPY_TYPES = {1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 10: "f2", 11: "f8", 16: "u2"}


class SlotsUnavailable(BadInput):
    """Why this machine cannot use slots; the caller falls back to sessions and says so."""


class SlotBackend:
    """Slots over the packed experts of a bundle."""

    name = "slots"

    def __init__(
        self, packed: PackedExperts, scratch: Path, limits: Limits, closing: contextlib.ExitStack | None = None
    ) -> None:
        """`closing`: what is closed when the backend is, beside what it opens itself."""
        self._packed = packed
        self._limits = limits
        self._lock, self._made_bytes = threading.Lock(), 0  # since memory was last given back
        self._closing = closing or contextlib.ExitStack()
        counts = Counter(record.kind for record in packed.store.records.values())
        self._files: list[SlotFile] = []
        for kind in range(len(packed.templates)):
            self._files.append(SlotFile(packed, kind, scratch, counts[kind]))
            self._closing.callback(self._files[-1].close)
        self._maps = sum(count * self._files[kind].maps_per_slot for kind, count in counts.items())  # of all experts

    def kind_of(self, expert: ExpertId) -> int:
        return self._packed.store.records[expert].kind

    def slot_bytes(self, kind: int) -> int:
        live = self._packed.templates[kind].live_bytes
        return live + 2 * live // _MAPPED_PER_TABLE_BYTE + _SESSION_BYTES  # mapped by ONNX Runtime and by us

    def mapped_bytes(self, kind: int) -> int:
        return self._packed.templates[kind].live_bytes

    def making_bytes(self) -> int:
        return sum(template.data_bytes - template.live_bytes for template in self._packed.templates)

    def available_bytes(self) -> int:
        """What /dev/shm has left and slots have, but no more than the system allows to be mapped."""
        taken = sum(file.taken_bytes for file in self._files)
        return int(min(shared_bytes() + taken, self.mappable_share * self.all_bytes()))

    @property
    def mappable_share(self) -> float:
        """The share of the experts, at most 1, whose slots the system's limit of maps allows."""
        return min(1.0, self._limits.maps_for_slots / self._maps) if self._maps else 1.0

    @property
    def limited(self) -> str:
        """Why there cannot be a slot for every expert whatever the memory; "" where there can."""
        if self.mappable_share == 1.0:
            return ""
        most = int(self.mappable_share * len(self._packed.store.records))
        return f"vm.max_map_count, {self._limits.maps}, allows {most} of {len(self._packed.store.records)} experts"

    def all_bytes(self) -> int:
        """Shared memory that slots for every expert would take."""
        return sum(self.mapped_bytes(record.kind) for record in self._packed.store.records.values())

    def make_slot(self, kind: int) -> MappedSlot:
        """Raises LimitReached."""
        try:
            with small_blocks_too():
                slot = MappedSlot(self._files[kind])
            self._give_back(self._packed.templates[kind].data_bytes)
            return slot
        except Exception as error:  # ONNX Runtime's errors have no common class
            what = error.strerror if isinstance(error, OSError) else str(error).strip().partition("\n")[0]
            raise LimitReached(
                f"no slot could be made for one more expert ({what})",
                f"Give less --memory, or raise what is short of {SHARED_MEMORY}, vm.max_map_count and ulimit -n.",
            ) from error

    def _give_back(self, made_bytes: int) -> None:
        """What sessions have freed in smaller blocks, before it comes to more than the least budget has to spare."""
        with self._lock:
            self._made_bytes += made_bytes
            if self._made_bytes < _TRIMMED_EVERY:
                return
            self._made_bytes = 0
        trim()

    def close(self) -> None:
        self._closing.close()


class SlotFile:
    """The weights of all slots of one kind: a file in memory without a name, which goes when the process does.

    In front are the plain weights of the expert that every slot starts from, behind them each slot's live pages. ONNX
    Runtime packs the plain weights for each session that it makes, compares the result with what the file has, maps
    that, and computes with it. We map the file once as a whole, so that neither a file stays open for a slot nor
    anything is mapped but its packed weights: what is used as it is stored, a session is given out of our map.

    Linux joins what is mapped one below the other in memory and in the file. It hands out addresses downwards, so the
    first slot is the last in the file, and a slot's first stretch its last.
    """

    def __init__(self, packed: PackedExperts, kind: int, scratch: Path, n_slots: int) -> None:
        """`scratch`: a directory in memory. Raises OSError."""
        self.packed, self.template, self.graph = packed, packed.templates[kind], packed.graphs[kind]
        self.folder = Path(tempfile.mkdtemp(dir=scratch))
        self._lock, self._numbers, self._n_slots = threading.Lock(), list(range(n_slots)), n_slots
        seed = packed.seeds[kind].read_bytes()
        live = self.template.live
        self._live = b"".join(seed[pages.offset : pages.offset + pages.nbytes] for pages in live[::-1])
        self._starts = [sum(pages.nbytes for pages in live[number + 1 :]) for number in range(len(live))]
        model = packed.models[kind]
        spans = external_spans(model)
        given = {tensor.name: tensor for tensor in plain_tensors(model) if tensor.onnx_type in _NUMPY_TYPES}
        self._given = [(tensor, self._place(tensor.offset, _nbytes(tensor))) for tensor in given.values()]
        moving = [(span, place) for span in spans if (place := self._place(span.offset, span.nbytes)) is not None]
        self.maps_per_slot = sum(span.packed or span.initializer not in given for span in spans)
        marks = {span.offset: _mark(place) for span, place in moving}
        self._model = with_offsets(model, lambda offset: marks.get(offset, str(offset)))
        self._places = [place for span, place in moving if span.initializer not in given]
        self.fd = _unnamed_file(self.folder)
        position = 0
        for span in (*(span for span, _ in moving if span.packed), Span("", len(seed), 0, packed=True)):
            os.pwrite(self.fd, memoryview(seed)[position : span.offset], position)
            position = span.offset + span.nbytes
        nbytes = self.template.data_bytes + n_slots * self.template.live_bytes
        os.ftruncate(self.fd, nbytes)
        self._map = memoryview(mmap.mmap(self.fd, nbytes))

    @property
    def taken_bytes(self) -> int:
        """Of the slots that there are."""
        return (self._n_slots - len(self._numbers)) * self.template.live_bytes

    def take(self) -> TakenSlot:
        """Room for one more slot. Raises OSError, and IndexError where each expert has one."""
        number = self._numbers.pop()
        start = self._start(number)
        try:
            os.pwrite(self.fd, self._live, start)  # an error where memory is short; writing into the map: a SIGBUS
        except OSError:
            self.give_back(number)
            raise
        model = self._model
        for place in self._places:  # the marks become offsets of this slot; encoding the model anew takes longer
            model = model.replace(_mark(place).encode(), b"%0*d" % (_DIGITS, start + place))
        lock(self._map[start : start + self.template.live_bytes])
        views = [
            self._map[start + at : start + at + pages.nbytes]
            for at, pages in zip(self._starts, self.template.live, strict=True)
        ]
        return TakenSlot(number, model, views, {each.name: self._value(each, start, at) for each, at in self._given})

    def give_back(self, number: int) -> None:
        """Another slot may have the room of this one, whose pages the system has from now on. Raises OSError."""
        with self._lock:
            if self.fd >= 0:
                give_up(self.fd, self._start(number), self.template.live_bytes)
                self._numbers.append(number)

    def _start(self, number: int) -> int:
        return self.template.data_bytes + number * self.template.live_bytes

    def _place(self, offset: int, nbytes: int) -> int | None:
        """Where among a slot's live pages a stretch of the data file is; None where not all of it is in them.

        Weights that sessions never look at need not be live. The first of their bytes may be all the same, on a page
        that they share with what is used.
        """
        for start, pages in zip(self._starts, self.template.live, strict=True):
            if pages.offset <= offset and offset + nbytes <= pages.offset + pages.nbytes:
                return start + offset - pages.offset
        return None

    def _value(self, tensor: PlainTensor, start: int, place: int | None) -> ort.OrtValue:
        """A tensor over the bytes of the map: a slot's own, or those of the seed where they are not used."""
        kind = np.dtype(_NUMPY_TYPES[tensor.onnx_type])
        offset = tensor.offset if place is None else start + place
        array = np.frombuffer(self._map, kind, math.prod(tensor.shape), offset).reshape(tensor.shape)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.onnx_type)

    def close(self) -> None:
        """Make no more slots; those that there are go on."""
        with self._lock:
            os.close(self.fd)
            self.fd = -1


class TakenSlot(NamedTuple):
    """What a slot is made of: its place, its model, its stretches of the map as records are, its plain tensors."""

    number: int
    model: bytes
    views: list[memoryview]
    plain: dict[str, ort.OrtValue]


class MappedSlot:
    """One session and the pages of the slots' file that it computes with."""

    def __init__(self, file: SlotFile) -> None:
        taken = file.take()
        self._file = file
        options = session_options(threads=1, session__model_external_initializers_file_folder_path=str(file.folder))
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was saved optimized
        for name, value in taken.plain.items():
            options.add_initializer(name, value)
        self._taken: TakenSlot | None = taken
        try:
            self.run = Rows(Session(taken.model, options, file.graph)).run
        except BaseException:
            self.close()
            raise

    def load(self, expert: ExpertId) -> int:
        assert self._taken, "a slot that is closed is not used"
        return self._file.packed.read_into(expert, self._taken.views)

    def close(self) -> None:
        taken, self._taken, self.run = self._taken, None, _closed
        if taken:
            self._file.give_back(taken.number)


def _closed(x: np.ndarray) -> np.ndarray:  # noqa: ARG001 - in the place of `run`
    raise AssertionError("a slot that is closed is not used")


def _nbytes(tensor: PlainTensor) -> int:
    return math.prod(tensor.shape) * np.dtype(_NUMPY_TYPES[tensor.onnx_type]).itemsize


def _mark(place: int) -> str:
    """A placeholder for an offset in a slot's model, as long as an offset and larger than any."""
    return str(10**_DIGITS - 1 - place)


def _unnamed_file(folder: Path) -> int:
    """A new file without a name, open, which sessions find in that folder as `DATA`, a link to its descriptor.

    ONNX Runtime follows that link and checks that the name it leads to exists before it opens it. For a file that was
    unlinked the kernel gives its last name with " (deleted)" appended, so an empty file of that name is put there.
    """
    named = folder / "slots"
    fd = os.open(named, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    named.unlink()
    named.with_name(f"{named.name} (deleted)").touch()
    (folder / DATA).symlink_to(f"/proc/self/fd/{fd}")
    return fd


def shared_bytes() -> int:
    """What the file system in memory has left."""
    return shutil.disk_usage(SHARED_MEMORY).free


@contextlib.contextmanager
def memory_scratch() -> Generator[Path]:
    """A private folder in memory, removed at the end; those of processes that were killed go first.

    A lock tells them, not a process id, which means nothing in another container that shares the memory. Raises
    SlotsUnavailable.
    """
    if not os.access(SHARED_MEMORY, os.W_OK):
        raise SlotsUnavailable(f"{SHARED_MEMORY} cannot be written", _REMEDY)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(partial_directory(SHARED_MEMORY / _SCRATCH, mode=0o700))
        except OSError as error:
            raise SlotsUnavailable(f"{SHARED_MEMORY} cannot be written ({error.strerror})", _REMEDY) from error
        yield folder


def open_slots(bundle: Bundle, store: StoreReader, wanted_bytes: int, progress: Progress = no_progress) -> SlotBackend:
    """Slots for a bundle, packed first where that has not been done, and self-tested.

    wanted_bytes: what the budget leaves for slots. Raises SlotsUnavailable, also where there is shared memory for less
    than half of them: sessions hold more then.
    """
    with contextlib.ExitStack() as on_error:
        closing = on_error.enter_context(contextlib.ExitStack())
        scratch = closing.enter_context(memory_scratch())
        packed = open_packed(bundle) or _pack(bundle, scratch, progress)
        closing.callback(packed.close)
        try:
            self_test(StoredExperts.of(bundle, store), packed, scratch)
            backend = SlotBackend(packed, scratch, read_limits(), closing)
        except OSError as error:
            raise SlotsUnavailable(f"{SHARED_MEMORY} has no room for a slot ({error.strerror})") from error
        except (SlotsUnavailable, OverBudget):
            raise
        except Exception as error:
            raise _unavailable(error, "a slot could not be made or run") from error
        available, wanted = shared_bytes(), min(wanted_bytes, backend.all_bytes())
        if available < wanted / 2:
            raise SlotsUnavailable(
                f"{SHARED_MEMORY} has {available / 1e6:.1f} MB free of the {wanted / 1e6:.1f} MB that slots would take"
            )
        on_error.pop_all()
    return backend


def _pack(bundle: Bundle, scratch: Path, progress: Progress) -> PackedExperts:
    refuse_in_place(bundle)
    try:
        return pack(bundle, scratch, progress)
    except OverBudget:
        raise
    except Exception as error:
        raise _unavailable(error, "the experts could not be packed") from error


def _unavailable(error: Exception, what: str) -> Exception:
    """DamagedFile as it is; for any other failure sessions are used, which will raise if it was the bundle's fault."""
    if isinstance(error, DamagedFile) and not isinstance(error, GraphRefused):
        return error
    return SlotsUnavailable(f"{what} ({error})")


def self_test(experts: StoredExperts, packed: PackedExperts, scratch: Path) -> None:
    """Swap the last expert of each kind into a slot; its results must be those of an ordinary session, bit for bit.

    Raises SlotsUnavailable.
    """
    rng = np.random.default_rng(0)
    last = {record.kind: expert for expert, record in experts.store.records.items()}
    for kind, expert in last.items():
        with contextlib.closing(SlotFile(packed, kind, scratch, 1)) as file:
            slot = MappedSlot(file)
        slot.load(expert)
        graph = experts.graphs[kind]
        record = bytes(experts.store.read(expert))
        ordinary = expert_from_record(graph.path.read_bytes(), graph.path, record)
        for rows in (1, 7):
            x = rng.standard_normal((rows, ordinary.width), dtype=np.float32)
            if not np.array_equal(slot.run(x), ordinary.run(x)):
                raise SlotsUnavailable("swapping an expert's bytes did not give that expert's result")
