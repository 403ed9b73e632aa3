"""A bundle: a directory with a manifest, which names every other file with its size and SHA-256.

    manifest.json   typed and sealed by its own hash (`manifest`)
    graphs/         segment_NN.onnx, router_NN.onnx, expert_K.onnx; dense.bin, the external data of segments and routers
                    (beside the graphs, since ONNX Runtime refuses external data outside a model's directory)
    experts.bin     one record per expert (`store`)
    tokenizer/      tokenizer.json, and chat_template.jinja where the model has one
    MODEL_CARD.md
    packed/         made on the device at first use, not part of the bundle's hashes (`runtime.packing`)

Bundles are published whole: written beside the target, synced, then swapped in. A bundle that was there before stays
as it was until the new one is complete.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import msgspec

from pocketmoe.errors import BadInput, DamagedFile, OutputError
from pocketmoe.manifest import MANIFEST, STORE, FileEntry, Manifest, read_manifest, safe_name, seal
from pocketmoe.store import StoreReader, translate_write_errors

PACKED = "packed"

Progress = Callable[[str, int, int], None]  # what is being done, done, total

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
        if not (root / MANIFEST).is_file():
            raise BadInput(f"{root} is not a PocketMoE bundle (no {MANIFEST})", "Make one with: pocketmoe export.")
        bundle = cls(root, read_manifest(root / MANIFEST))
        for name, entry in bundle.manifest.files.items():
            bundle._check_place(name, entry)
        return bundle

    def path(self, name: str) -> Path:
        """The path of a file that the manifest names. Raises DamagedFile for any other name."""
        if name not in self.manifest.files:
            raise DamagedFile(self.root / MANIFEST, f"names no file {name!r}")
        return self.root / name

    def check_file(self, name: str) -> Path:
        """The path of a file whose bytes have just been checked against the manifest. Raises DamagedFile."""
        path = self.path(name)
        if _sha256(path) != self.manifest.files[name].sha256:
            raise DamagedFile(path, "does not match its hash in the manifest")
        return path

    def check_all_but_store(self) -> None:
        """Check every file's hash, but for the experts, whose records are checked one by one when they are paged in."""
        for name in self.manifest.files:
            if name != STORE:
                self.check_file(name)

    def open_store(self) -> StoreReader:
        return StoreReader(self.path(STORE), self.manifest.store_index_sha256)

    def verify(self, progress: Progress = no_progress) -> Iterator[str]:
        """Check every byte; yield one line for each thing that is damaged."""
        names = list(self.manifest.files)
        for done, name in enumerate(names):
            progress("verifying", done, len(names))
            try:
                self.check_file(name)
            except DamagedFile as damage:
                yield str(damage)
                if name == STORE:
                    yield from self._damaged_records()
        progress("verifying", len(names), len(names))

    def _damaged_records(self) -> Iterator[str]:
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

    def _check_place(self, name: str, entry: FileEntry) -> None:
        path = self.root / safe_name(self.root / MANIFEST, name)
        for part in (path, *path.parents):
            if part == self.root:
                break
            if part.is_symlink():
                raise DamagedFile(part, "is a symbolic link; a bundle's files must lie inside it")
        if not path.is_file():
            raise DamagedFile(path, "is missing")
        size = path.stat().st_size
        if size != entry.nbytes:
            raise DamagedFile(path, f"has {size} bytes, the manifest says {entry.nbytes}")


class BundleWriter:
    """Builds a bundle beside its target and swaps it in by `publish`. Leaving the context without that removes it."""

    def __init__(self, target: Path | str) -> None:
        """Raises OutputError when the target is something other than a bundle, or cannot be written."""
        self.target = Path(target).absolute()
        if os.path.lexists(self.target) and not _replaceable(self.target):
            raise OutputError(f"{target} exists and is not a PocketMoE bundle", "Name another output directory.")
        with translate_write_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.root = Path(
                tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".partial", dir=self.target.parent)
            )
            self.root.chmod(0o755)
            (self.root / "graphs").mkdir()

    def publish(self, manifest: Manifest, progress: Progress = no_progress) -> Bundle:
        """Hash every file, write the manifest, sync, and put the bundle in its place."""
        names = sorted(str(p.relative_to(self.root).as_posix()) for p in self.root.rglob("*") if p.is_file())
        files = {}
        for done, name in enumerate(names):
            progress("hashing", done, len(names))
            files[name] = FileEntry(nbytes=(self.root / name).stat().st_size, sha256=_sha256(self.root / name))
        progress("hashing", len(names), len(names))
        manifest = msgspec.structs.replace(manifest, files=files)
        with translate_write_errors(self.target):
            (self.root / MANIFEST).write_bytes(seal(manifest))
            _sync_tree(self.root)
            _swap_in(self.root, self.target)
        return Bundle.open(self.target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # hashing must not fill a small machine's memory
    return digest.hexdigest()


def _replaceable(target: Path) -> bool:
    return target.is_dir() and not target.is_symlink() and ((target / MANIFEST).is_file() or not any(target.iterdir()))


def _sync_tree(root: Path) -> None:
    for path in (*root.rglob("*"), root):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _swap_in(new: Path, target: Path) -> None:
    """Put `new` at `target` in one step; what was there before goes to `new`'s place, where the writer removes it."""
    if target.exists():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(_AT_FDCWD, bytes(new), _AT_FDCWD, bytes(target), _RENAME_EXCHANGE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    else:
        new.rename(target)
    fd = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
