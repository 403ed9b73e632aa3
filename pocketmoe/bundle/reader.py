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
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from pocketmoe.bundle.store import StoreReader, translate_write_errors
from pocketmoe.errors import BadInput, DamagedFile, OutputError

PACKED = "packed"

Progress = Callable[[str, int, int], None]  # what is being done, done, total; a total of 0: a remark, said once

_PARTIAL, _ASIDE = ".partial", ".replaced"
_RESUME = ".resume"  # in a partial directory: the plan, the journal of the experts that are written, what `steps` keeps
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def no_progress(_what: str, _done: int, _total: int) -> None:
    """The default progress callback: says nothing."""


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
        while True:
            bundle = cls(root, read_manifest(root / MANIFEST))
            try:
                for name, entry in bundle.manifest.files.items():
                    bundle._check_place(name, entry)
                bundle._refuse_unlisted_graphs()
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
        """Check every byte; yield one line for each thing that is damaged."""
        names = list(self.manifest.files)
        for done, name in enumerate(names):
            progress("verifying", done, len(names))
            whole = True
            try:
                self.check_file(name)
            except DamagedFile as damage:
                whole = False
                yield str(damage)
            if name == STORE:
                yield from self._damage_in_store(look_at_records=not whole)
        progress("verifying", len(names), len(names))

    def _damage_in_store(self, look_at_records: bool) -> Iterator[str]:
        try:
            store = self.open_store()
        except DamagedFile as damage:
            yield str(damage)
            return
        with store:
            for expert in store.records if look_at_records else ():
                try:
                    store.read(expert)
                except DamagedFile as damage:
                    yield str(damage)

    def _refuse_unlisted_graphs(self) -> None:
        """A graph may take its weights from any file beside it, so each of them must be one whose hash is known."""
        for name in _files_below(self.root / GRAPHS):
            if GRAPHS + name not in self.manifest.files:
                raise DamagedFile(self.root / GRAPHS / name, "is not a file of this bundle")

    def _check_place(self, name: str, entry: FileEntry) -> None:
        path = self.root / safe_name(self.root / MANIFEST, name)
        for part in (path, *path.parents):
            if part == self.root:
                break
            if os.path.islink(part):  # noqa: PTH114 - never raises
                raise DamagedFile(part, "is a symbolic link; a bundle's files must lie inside it")
        if not os.path.isfile(path):  # noqa: PTH113 - never raises
            raise DamagedFile(path, "is missing")
        size = path.stat().st_size
        if size != entry.nbytes:
            raise DamagedFile(path, f"has {size} bytes, the manifest says {entry.nbytes}")


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
            self.root = on_error.enter_context(partial_directory(self.target, plan, progress))
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
    names = sorted(name for name in _files_below(root) if not name.startswith(f"{_RESUME}/"))
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
    if target.is_symlink() or not target.is_dir():
        raise OutputError(f"{target} exists and is not a PocketMoE bundle", remedy)
    ours: set[str] = set()
    with contextlib.suppress(DamagedFile):
        ours = {MANIFEST, *read_manifest(target / MANIFEST).files}
    for name in _files_below(target):
        if name not in ours and not (ours and name.startswith(f"{PACKED}/")):
            raise OutputError(f"{target} exists and is not just a PocketMoE bundle: it holds {name}", remedy)


@contextlib.contextmanager
def partial_directory(target: Path, plan: str | None = None, progress: Progress = no_progress) -> Iterator[Path]:
    """A directory beside the target to write in, which is removed at the end; those of killed writers go first.

    Where one of them had the same plan, it is that one, with the experts it had written (`streaming`). It is locked, so
    that the next writer to the same target can tell one in use from one left behind. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup:
        left = _clean_up_after_the_killed(target, plan, cleanup, progress)
        root = left or _make_locked(target, cleanup)
        root.chmod(0o755)
        if plan is not None and left is None:
            journal_in(root).parent.mkdir()
            (root / _RESUME / "plan").write_text(plan, encoding="utf-8")
        yield root


def journal_in(partial: Path) -> Path:
    """Where a partial directory notes which experts it has."""
    return partial / _RESUME / "journal"


def forget_journal(partial: Path) -> None:
    """The directory is complete."""
    shutil.rmtree(partial / _RESUME, ignore_errors=True)


def _make_locked(target: Path, cleanup: contextlib.ExitStack) -> Path:
    """A new locked directory beside the target, which `cleanup` removes and unlocks."""
    while True:
        root = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
        try:
            fd = _lock(root)
        except (BlockingIOError, FileNotFoundError):
            continue  # another writer takes it for a leftover, and removes it
        except OSError:
            fd = os.open(root, os.O_RDONLY)  # no locks here: then nobody removes leftovers either
        cleanup.callback(os.close, fd)
        cleanup.callback(shutil.rmtree, root, ignore_errors=True)
        if root.exists():
            return root


def _lock(directory: Path) -> int:
    """Lock a directory until the returned descriptor is closed or the process ends. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _clean_up_after_the_killed(
    target: Path, plan: str | None, cleanup: contextlib.ExitStack, progress: Progress
) -> Path | None:
    """Remove what writers to this target left when they were killed, and put back what they had moved aside.

    A partial directory with the same plan is locked, emptied of all but its experts, and returned.
    """
    pattern = f".{glob.escape(target.name)}.{'?' * 8}"
    for aside in target.parent.glob(pattern + _ASIDE):
        with contextlib.suppress(OSError):
            aside.rename(target if not os.path.lexists(target) else aside.with_suffix(_PARTIAL))
    taken: Path | None = None
    for partial in target.parent.glob(pattern + _PARTIAL):
        with contextlib.suppress(OSError):
            fd = _lock(partial)
            found = _plan_of(partial)
            if taken is None and plan is not None and found == plan:
                cleanup.callback(os.close, fd)
                cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
                _keep_experts_only(partial)
                taken = partial
                progress("going on where an earlier run was killed", 0, 0)
                continue
            if found and plan is not None and taken is None:
                progress("starting over: the source or the options changed since an earlier run was killed", 0, 0)
            shutil.rmtree(partial, ignore_errors=True)
            os.close(fd)
    return taken


def _plan_of(partial: Path) -> str | None:
    path = partial / _RESUME / "plan"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _keep_experts_only(partial: Path) -> None:
    for path in partial.iterdir():
        if path.name in (STORE, _RESUME):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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
