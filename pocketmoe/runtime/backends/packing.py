"""Packs experts for this machine, once: ONNX Runtime's own layout of each expert's weights, one record per expert.

ONNX Runtime lays weights out for the CPU's instruction set when it creates a session, which costs 1-15 ms per expert.
With `session.save_external_prepacked_constant_initializers` it also writes that layout to a file, and a later session
maps the file and uses the bytes in place. We keep, for each kind of expert,

    kind_K.onnx    the saved model, the same for every expert of the kind
    kind_K.seed    the data file of one expert, which a slot starts from
    experts.bin    for each expert the pages of its data file that a session uses ("live" pages)
    packing.json   which pages those are, and hashes of the rest

under `packed/KEY/` in the bundle. KEY names the CPU, the ONNX Runtime version and the experts; another machine packs
anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import onnxruntime as ort

from pocketmoe.bundle.files import changed_ns, is_plain_file
from pocketmoe.bundle.in_place import in_place_folder
from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.packed import (
    PACKED,
    PACKING,
    foreign_in_packed,
    is_packed_folder,
    make_packed,
    packed_keys,
    prepare_elsewhere,
    remove_packed,
)
from pocketmoe.bundle.partial import mark_complete, partial_directory
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreReader
from pocketmoe.bundle.stream import worker_pool, write_experts
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.runtime.backends.cpu import cpu_facts
from pocketmoe.runtime.backends.packer import Packer, Pages
from pocketmoe.system.files import CLOEXEC, NO_LINK, NO_WAITING

_LARGEST_PACKING = 1 << 20  # bytes of packing.json; a kind of expert takes some hundred
_LARGEST_MODEL = 64 << 20
_WORKERS = 2  # experts packed at a time


class Template(msgspec.Struct, frozen=True):
    """How to make a slot for one kind of expert."""

    input: str
    data_bytes: int
    live: tuple[Pages, ...]
    model_sha256: str
    seed_sha256: str

    @property
    def live_bytes(self) -> int:
        return sum(pages.nbytes for pages in self.live)


class Packing(msgspec.Struct, frozen=True):
    """What packing.json holds."""

    source_index_sha256: str
    index_sha256: str
    templates: tuple[Template, ...]
    changed_ns: int = 0  # when experts.bin was last changed: what came from elsewhere was changed when it came


class ExpertGraph(NamedTuple):
    """The graph that experts of one kind share, and the name of its input."""

    path: Path
    input: str


class StoredExperts(NamedTuple):
    """What packing starts from: a bundle's experts, or those of the probe. The graphs are in the order of kinds."""

    graphs: tuple[ExpertGraph, ...]
    store: StoreReader
    index_sha256: str

    @classmethod
    def of(cls, bundle: Bundle, store: StoreReader) -> StoredExperts:
        graphs = tuple(ExpertGraph(bundle.path(kind.graph), kind.input) for kind in bundle.manifest.expert_kinds)
        return cls(graphs, store, bundle.manifest.store_index_sha256)


class PackedExperts:
    """The packed experts of a bundle, opened: templates, seeds, and a store whose records are live pages.

    `seeds`: by expert kind, the data file that a slot starts from.
    """

    def __init__(self, root: Path, packing: Packing) -> None:
        """Raises DamagedFile or OSError when a file is not what packing.json says."""
        self._root = root
        self.templates = packing.templates
        self.graphs = [root / f"kind_{k}.onnx" for k in range(len(packing.templates))]
        self.models = [
            _checked(graph, template.model_sha256, _LARGEST_MODEL)
            for graph, template in zip(self.graphs, packing.templates, strict=True)
        ]
        self.seeds = [root / f"kind_{k}.seed" for k in range(len(packing.templates))]
        for seed, template in zip(self.seeds, packing.templates, strict=True):
            _checked(seed, template.seed_sha256, template.data_bytes)
        if not is_plain_file(root / "experts.bin"):
            raise DamagedFile(root / "experts.bin", "is no file of its own")
        self.store = StoreReader(root / "experts.bin", packing.index_sha256)

    def read_into(self, expert: ExpertId, views: Sequence[memoryview]) -> int:
        """Read an expert's live pages; return the bytes read. A damaged file makes the next run pack anew."""
        try:
            return self.store.read_into(expert, views)
        except DamagedFile as damage:
            with contextlib.suppress(OSError):
                (self._root / PACKING).unlink()
            damage.remedy = "Run it again: the experts are packed anew from the bundle."
            raise

    def close(self) -> None:
        self.store.close()


def device_key(bundle: Bundle) -> str:
    """A name for what the packed bytes depend on: CPU model and features, ONNX Runtime version, machine, experts."""
    machine, *features = cpu_facts()
    facts = [machine, ort.__version__, bundle.manifest.store_index_sha256]
    with contextlib.suppress(OSError):
        facts.append(Path("/etc/machine-id").read_text())
    return hashlib.sha256("\n".join([*facts, *features]).encode()).hexdigest()[:16]


def open_packed(bundle: Bundle) -> PackedExperts | None:
    """The packed experts for this machine, or None where there are none that can be used.

    Those that came with somebody's bundle cannot: whoever makes an archive chooses every byte of it, but not when its
    files are changed on this machine, which is when they are unpacked.
    """
    root = packed_folder(bundle)
    try:
        return PackedExperts(root, _own_packing(bundle, root))
    except (OSError, msgspec.DecodeError, ValueError, DamagedFile):
        return None


def packed_home(bundle: Bundle) -> Path:
    """What holds this machine's packed experts, or would: the bundle's packed/, or its folder in another place.

    Raises BadInput where that was asked for and is not the user's own.
    """
    own, place = bundle.root / PACKED, bundle.packed_place
    if place is None or _are_usable(bundle, own / device_key(bundle)):
        return own
    if not place.always and os.access(own if os.path.lexists(own) else bundle.root, os.W_OK):
        return own
    if place.is_private():
        return place.of(bundle.manifest.sha256)
    if place.always:
        raise BadInput(
            f"{place.directory} is no directory of yours alone",
            "Packed experts are believed: name a --packed-dir that no other user owns or may write to (chmod go-w).",
        )
    return own


def packed_folder(bundle: Bundle) -> Path:
    """Where this machine's packed experts of a bundle are, or would be. Raises what `packed_home` raises."""
    return packed_home(bundle) / device_key(bundle)


def _are_usable(bundle: Bundle, root: Path) -> bool:
    try:
        return bool(_own_packing(bundle, root))
    except (OSError, msgspec.DecodeError, ValueError):
        return False


def _own_packing(bundle: Bundle, root: Path) -> Packing:
    """What the packing.json in a folder says, if this machine made it of this bundle. Raises OSError, ValueError."""
    if not is_packed_folder(root):
        raise FileNotFoundError(errno.ENOENT, "nothing is packed", str(root))
    packing = read_packing(root)
    if packing.source_index_sha256 != bundle.manifest.store_index_sha256:
        raise ValueError("other experts are packed")
    if packing.changed_ns != changed_ns(root / "experts.bin"):
        raise ValueError("it was packed elsewhere")
    return packing


def read_packing(root: Path) -> Packing:
    """What the packing.json in a folder says. Raises OSError, ValueError."""
    return _unseal(_read_plain(root / PACKING, _LARGEST_PACKING))


def damage_in_packed(bundle: Bundle) -> Iterator[str]:
    """Check every expert that this machine has packed; yield one line for each that is damaged."""
    packed = open_packed(bundle)
    if packed is None:
        return  # nothing that would be used
    with contextlib.closing(packed):
        for expert in packed.store.records:
            try:
                packed.store.read(expert)
            except DamagedFile as damage:
                yield f"{damage}; remove {packed_folder(bundle)}, it is made again"


def refuse_in_place(bundle: Bundle) -> None:
    """Raises BadInput for a bundle whose experts are packed in place, so that packing them anew would double them."""
    if in_place_folder(bundle.root) is not None:
        raise BadInput(
            f"{bundle.root} has its experts only as another CPU or ONNX Runtime has them packed, or was copied",
            f"Pack them for this one: pocketmoe pack {bundle.root} --in-place.",
        )


def pack(bundle: Bundle, scratch: Path, progress: Progress = no_progress) -> PackedExperts:
    """Pack every expert of a bundle for this machine. Needs about six times an expert's bytes of memory per worker.

    `scratch`: a directory in memory. What this machine, or another, had packed before is removed; other machines pack
    again when the bundle comes back to them. Raises OSError when the bundle's directory cannot be written or holds
    something else in its packed/, BadInput as `refuse_in_place` does, DamagedFile when a record is not what the
    manifest says, ValueError when ONNX Runtime's file is not laid out as we know it.
    """
    refuse_in_place(bundle)
    root = packed_folder(bundle)
    packed = root.parent
    if packed.parent != bundle.root:
        prepare_elsewhere(bundle.root, bundle.manifest.files[STORE].nbytes, packed, progress)
    make_packed(packed)
    for path in foreign_in_packed(packed):
        if root in (path, *path.parents):
            raise FileExistsError(errno.EEXIST, f"{path} is in the way, which packing has not made")
    with partial_directory(root, root.name, progress) as partial:
        with bundle.open_store() as store:
            packing = pack_into(partial, StoredExperts.of(bundle, store), scratch, progress)
        packing = msgspec.structs.replace(packing, changed_ns=changed_ns(partial / "experts.bin"))
        (partial / PACKING).write_bytes(seal(packing))
        mark_complete(partial)
        meanwhile = open_packed(bundle)
        if meanwhile is not None:
            return meanwhile  # another run has packed the same
        if os.path.lexists(root):
            remove_packed(packed, root.name)
        partial.rename(root)
        for key in packed_keys(packed):
            if key != root.name:
                with contextlib.suppress(OSError):
                    remove_packed(packed, key)
    return PackedExperts(root, packing)


def pack_into(root: Path, experts: StoredExperts, scratch: Path, progress: Progress = no_progress) -> Packing:
    """Pack every expert into files in `root`, all but packing.json. Raises what `pack` raises.

    Killed, it goes on where `root` is the partial directory that it was.
    """
    source = experts.store
    packers = [Packer(graph.path, scratch) for graph in experts.graphs]
    first = {record.kind: expert for expert, record in reversed(source.records.items())}
    templates = [
        write_template(root, kind, graph.input, packer, packer.pack(source.read(first[kind])))
        for kind, (graph, packer) in enumerate(zip(experts.graphs, packers, strict=True))
    ]

    def make(expert: ExpertId) -> tuple[bytes, float]:
        return packers[source.records[expert].kind].pack_live(source.read(expert)), 0.0

    kind_of = {expert: record.kind for expert, record in source.records.items()}
    with worker_pool(_WORKERS) as pool:
        written = write_experts(kind_of, make, root, pool, progress, "packing experts for this CPU")
    return Packing(experts.index_sha256, written.index_sha256, tuple(templates))


def write_template(root: Path, kind: int, input_name: str, packer: Packer, data: bytes) -> Template:
    (root / f"kind_{kind}.onnx").write_bytes(packer.model)
    (root / f"kind_{kind}.seed").write_bytes(data)
    return Template(
        input=input_name,
        data_bytes=len(data),
        live=packer.live,
        model_sha256=hashlib.sha256(packer.model).hexdigest(),
        seed_sha256=hashlib.sha256(data).hexdigest(),
    )


def seal(packing: Packing) -> bytes:
    """The SHA-256 of what follows, in hex, a line feed, and the packing as JSON."""
    text = msgspec.json.encode(packing)
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def _unseal(data: bytes) -> Packing:
    """Raises ValueError for bytes that `seal` did not write."""
    digest, _, text = data.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("packing.json is damaged")
    return msgspec.json.decode(text, type=Packing)


def _read_plain(path: Path, most_bytes: int) -> bytes:
    """A file's bytes. Raises OSError or ValueError for a link, for what is no regular file, and for a larger one."""
    fd = os.open(path, os.O_RDONLY | NO_LINK | NO_WAITING | CLOEXEC)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most_bytes:
            raise ValueError(f"{path.name} is no file of ours")
        return file.read(found.st_size)


def _checked(path: Path, sha256: str, most_bytes: int) -> bytes:
    data = _read_plain(path, most_bytes)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedFile(path, "is damaged", "Delete the folder; it is made again.")
    return data
