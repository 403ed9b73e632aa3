"""A bundle: a directory with a manifest, which names every other file with its size and SHA-256.

    manifest.json   typed and sealed by its own hash (`manifest`)
    graphs/         segment_NN.onnx, router_NN.onnx, expert_K.onnx; dense.bin, the external data of segments and routers
                    (beside the graphs, since ONNX Runtime refuses external data outside a model's directory)
    experts.bin     one record per expert (`store`)
    tokenizer/      tokenizer.json, and chat_template.jinja where the model has one
    MODEL_CARD.md
    packed/         made on the device at first use, not part of the bundle's hashes (`runtime.packing`)

Bundles are published whole: written beside the target, synced, then swapped in. A bundle that was there before stays
as it was until the new one is complete. What a killed writer leaves has no name of a bundle; the next writer with the
same plan goes on with it, any other removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import msgspec

from pocketmoe.bundle.manifest import (
    GRAPHS,
    MANIFEST,
    STORE,
    FileEntry,
    Manifest,
    read_manifest,
    safe_name,
    seal,
    validate_index,
)
from pocketmoe.bundle.packed import PACKED, foreign_in_packed, is_packed_name
from pocketmoe.bundle.partial import PARTIAL, RESUME, forget_journal, is_folder, left_beside, partial_directory
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.store import StoreReader, translate_write_errors
from pocketmoe.errors import BadInput, DamagedFile, OutputError

_ASIDE = ".replaced"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Bundle:
    """A bundle opened for reading: its manifest and the paths of its files, all inside its directory."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: Path | str) -> Self:
        """Read and check the manifest, and that every file is there with its size. Raises BadInput or DamagedFile."""
        root = Path(root)
        if not os.path.isfile(root / MANIFEST):  # noqa: PTH113 - never raises
            raise BadInput(f"{root} is not a PocketMoE bundle (no {MANIFEST})", "Make one with: pocketmoe export.")
        if not _is_hub_blob(root, root / MANIFEST):
            _refuse_link(root / MANIFEST)
        while True:
            bundle = cls(root, read_manifest(root / MANIFEST))
            try:
                for name, entry in bundle.manifest.files.items():
                    bundle._check_place(name, entry)
                bundle._refuse_unlisted_graphs()
                bundle._refuse_foreign_packed()
                return bundle
            except DamagedFile:
                if read_manifest(root / MANIFEST).sha256 == bundle.manifest.sha256:
                    raise  # else another bundle was published here meanwhile: look at that one

    def path(self, name: str) -> Path:
        """The path of a file that the manifest names. Raises DamagedFile for any other name."""
        if name not in self.manifest.files:
            raise DamagedFile(self.root / MANIFEST, f"names no file {name!r}")
        return self.root / name

    def check_file(self, name: str) -> Path:
        """The path of a file whose bytes have just been checked against the manifest. Raises DamagedFile."""
        path = self.path(name)
        try:
            found = sha256_of(path)
        except OSError as error:
            raise DamagedFile(path, f"cannot be read ({error.strerror})") from error
        if found != self.manifest.files[name].sha256:
            raise DamagedFile(path, "does not match its hash in the manifest")
        return path

    def check_all_but_store(self) -> None:
        """Check every file's hash, but for the experts, whose records are checked one by one when they are paged in."""
        for name in self.manifest.files:
            if name != STORE:
                self.check_file(name)

    def open_store(self) -> StoreReader:
        """A reader whose index has every expert of the manifest, and no other. Raises DamagedFile."""
        store = StoreReader(self.path(STORE), self.manifest.store_index_sha256)
        try:
            validate_index(self.manifest, store.records, store.path)
        except DamagedFile:
            store.close()
            raise
        return store

    def verify(self, progress: Progress = no_progress) -> Iterator[str]:
        """Check every byte, experts by their own hashes too; yield one line for each thing that is damaged."""
        names = list(self.manifest.files)
        for done, name in enumerate(names):
            progress("verifying", done, len(names))
            try:
                self.check_file(name)
            except DamagedFile as damage:
                yield str(damage)
            if name == STORE:
                yield from self._damage_in_store()
        yield from (f"{path}: is not what pocketmoe packs; remove it" for path in foreign_in_packed(self.root))
        progress("verifying", len(names), len(names))

    def _damage_in_store(self) -> Iterator[str]:
        try:
            store = self.open_store()
        except DamagedFile as damage:
            yield str(damage)
            return
        with store:
            for expert in store.records:
                try:
                    store.read(expert)
                except DamagedFile as damage:
                    yield str(damage)

    def _refuse_unlisted_graphs(self) -> None:
        """A graph may take its weights from any file beside it, so each of them must be one whose hash is known."""
        for name in _files_below(self.root / GRAPHS):
            if GRAPHS + name not in self.manifest.files:
                raise DamagedFile(self.root / GRAPHS / name, "is not a file of this bundle")

    def _refuse_foreign_packed(self) -> None:
        """What a device packs is written to, and removed when it is packed anew, so it must lie in the bundle."""
        packed = self.root / PACKED
        if os.path.lexists(packed) and not is_folder(packed):
            raise DamagedFile(packed, "is not a directory of this bundle", "Remove it; it is made again.")

    def _check_place(self, name: str, entry: FileEntry) -> None:
        path = self.root / safe_name(self.root / MANIFEST, name)
        for part in path.parents:
            if part == self.root:
                break
            _refuse_link(part)
        if not _is_hub_blob(self.root, path):
            _refuse_link(path)
        if not os.path.isfile(path):  # noqa: PTH113 - never raises
            raise DamagedFile(path, "is missing")
        size = path.stat().st_size
        if size != entry.nbytes:
            raise DamagedFile(path, f"has {size} bytes, the manifest says {entry.nbytes}")


def _refuse_link(path: Path) -> None:
    if os.path.islink(path):  # noqa: PTH114 - never raises
        raise DamagedFile(path, "is a symbolic link; a bundle's files must lie inside it")


def _is_hub_blob(root: Path, path: Path) -> bool:
    """Whether a file of a bundle in the hub's cache is a link to where that cache keeps this repository's files.

    There are models--X/snapshots/REVISION/NAME, links to models--X/blobs/HASH. Nothing on the way may lead elsewhere.
    """
    if not os.path.islink(path):  # noqa: PTH114 - never raises
        return False
    resolved = Path(os.path.realpath(root))
    for revision in (resolved, *resolved.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith("models--"):
            return Path(os.path.realpath(path)).parent == repository / "blobs"
    return False


class BundleWriter:
    """Builds a bundle beside its target and swaps it in by `publish`. Leaving the context without that removes it.

    It holds a lock on the directory it writes, so that the next writer to the same target can tell one in use from
    one that a killed process left behind, and removes the latter; unless both have the same plan: then it keeps the
    experts (`streaming`) and goes on.
    """

    def __init__(self, target: Path | str, plan: str | None = None, progress: Progress = no_progress) -> None:
        """`plan`: all that the bundle's bytes depend on, as text; None: nothing of this writer is ever gone on with.

        Raises OutputError when the target is something other than a bundle, or cannot be written.
        """
        self.target = Path(os.path.abspath(target))  # noqa: PTH100 - Path.absolute keeps "..", which is no name
        self.hashes: dict[str, str] = {}  # SHA-256 of files that whoever wrote them has hashed
        refuse_to_replace(self.target)
        with translate_write_errors(self.target), contextlib.ExitStack() as on_error:
            _put_back(self.target)
            self.root = on_error.enter_context(partial_directory(self.target, plan, progress, _is_just_a_bundle))
            (self.root / "graphs").mkdir()
            self._cleanup = on_error.pop_all()

    def publish(self, manifest: Manifest, progress: Progress = no_progress) -> Bundle:
        """Hash every file, write the manifest, check that all fits together, sync, and put the bundle in its place.

        Raises DamagedFile or OutputError; what was at the target before is untouched then.
        """
        with translate_write_errors(self.target):
            files = list_files(self.root, self.hashes, progress)
            (self.root / MANIFEST).write_bytes(seal(msgspec.structs.replace(manifest, files=files)))
            Bundle.open(self.root).open_store().close()
            _sync_tree(self.root)
            forget_journal(self.root)
            refuse_to_replace(self.target)  # again: hours may have passed
            _swap_in(self.root, self.target)
        return Bundle.open(self.target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()


def list_files(root: Path, known: Mapping[str, str], progress: Progress = no_progress) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file below `root`; the hashes in `known` are taken as they are."""
    names = sorted(name for name in _files_below(root) if not name.startswith(f"{RESUME}/"))
    files = {}
    for done, name in enumerate(names):
        progress("hashing", done, len(names))
        sha256 = known[name] if name in known else sha256_of(root / name)
        files[name] = FileEntry(nbytes=(root / name).stat().st_size, sha256=sha256)
    progress("hashing", len(names), len(names))
    return files


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # hashing must not fill a small machine's memory
    return digest.hexdigest()


def _files_below(root: Path) -> Iterator[str]:
    """Names, relative to `root`, of everything below it that is not a directory."""
    return (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_symlink() or not p.is_dir())


def refuse_to_replace(target: Path) -> None:
    """Raises OutputError unless the target is free, or an empty directory, or a bundle with no files but its own."""
    remedy = "Name another output directory, or move this one away."
    if not os.path.lexists(target):
        return
    if not is_folder(target):
        raise OutputError(f"{target} exists and is not a PocketMoE bundle", remedy)
    ours: set[str] = set()
    with contextlib.suppress(DamagedFile):
        ours = {MANIFEST, *read_manifest(target / MANIFEST).files}
    for name in _files_below(target):
        if name not in ours and not (ours and is_packed_name(name)):
            raise OutputError(f"{target} exists and is not just a PocketMoE bundle: it holds {name}", remedy)


def _is_just_a_bundle(path: Path) -> bool:
    """Whether a directory is a bundle that may be removed: one that a writer replaced, or had completed."""
    try:
        refuse_to_replace(path)
    except OutputError:
        return False
    return True


def _put_back(target: Path) -> None:
    """Put a bundle back that a writer had moved aside when it was killed; where there is another, it goes."""
    for aside in left_beside(target, _ASIDE):
        if _is_just_a_bundle(aside):
            with contextlib.suppress(OSError):
                aside.rename(target if not os.path.lexists(target) else aside.with_suffix(PARTIAL))


def _sync_tree(root: Path) -> None:
    for path in (*root.rglob("*"), root):
        sync(path)


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap_in(new: Path, target: Path) -> None:
    """Put `new` at `target` in one step; what was there before goes to `new`'s place, where the writer removes it.

    Where the file system cannot exchange two directories it takes two steps, and a kill between them leaves no bundle
    at the target until the next writer puts the old one back.
    """
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        aside = new.with_suffix(_ASIDE)
        target.rename(aside)
        try:
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(new)
    sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the file system or the C library has no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, bytes(a), _AT_FDCWD, bytes(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))
