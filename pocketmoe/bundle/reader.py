"""A bundle: a directory with a manifest, which names every other file with its size and SHA-256.

    manifest.json   typed and sealed by its own hash (`manifest`)
    graphs/         segment_NN.onnx, router_NN.onnx, expert_K.onnx; dense.bin, the external data of segments and routers
                    (beside the graphs, since ONNX Runtime refuses external data outside a model's directory)
    experts.bin     one record per expert (`store`)
    tokenizer/      tokenizer.json, and chat_template.jinja where the model has one
    MODEL_CARD.md
    packed/         made on the device at first use, not part of the bundle's hashes (`backends.packing`)

Where packed/ is the only place that has the experts (`in_place`), they are read from there.

It is there whole or not at all (`writer`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pocketmoe.bundle.files import files_below, is_folder, sha256_of
from pocketmoe.bundle.in_place import in_place_folder, open_experts, refuse_unfinished
from pocketmoe.bundle.manifest import (
    GRAPHS,
    MANIFEST,
    STORE,
    FileEntry,
    Manifest,
    read_manifest,
    safe_name,
    validate_index,
)
from pocketmoe.bundle.packed import PACKED, PackedPlace, foreign_in_packed
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.store import StoreReader
from pocketmoe.errors import BadInput, DamagedFile


class Bundle:
    """A bundle opened for reading: its manifest and the paths of its files, all inside its directory.

    `packed_place`: where what is packed of it goes, if not into its packed/.
    """

    def __init__(self, root: Path, manifest: Manifest, packed_place: PackedPlace | None = None) -> None:
        self.root = root
        self.manifest = manifest
        self.packed_place = packed_place

    @property
    def name(self) -> str:
        """What to call it: its directory's name; in the hub's cache, where that is a commit, ORGANIZATION/NAME."""
        root = self.root.resolve()
        kind, _, repository = root.parent.parent.name.partition("--")
        if kind == "models" and root.parent.name == "snapshots":
            return repository.replace("--", "/", 1)
        return root.name

    @classmethod
    def open(cls, root: Path | str, packed_place: PackedPlace | None = None) -> Self:
        """Read and check the manifest, and that every file is there with its size. Raises BadInput or DamagedFile."""
        root = Path(root)
        if not os.path.isfile(root / MANIFEST):  # noqa: PTH113 - never raises
            raise BadInput(f"{root} is not a PocketMoE bundle (no {MANIFEST})", "Make one with: pocketmoe export.")
        if not _is_hub_blob(root, root / MANIFEST):
            _refuse_link(root / MANIFEST)
        while True:
            bundle = cls(root, read_manifest(root / MANIFEST), packed_place)
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
        """A reader whose index has every expert of the manifest, and no other. Raises DamagedFile.

        BadInput for a bundle that is being packed in place.
        """
        refuse_unfinished(self.root)
        store = open_experts(self.root, self.path(STORE), self.manifest.store_index_sha256)
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
                if name != STORE or in_place_folder(self.root) is None:
                    self.check_file(name)
            except DamagedFile as damage:
                yield str(damage)
            if name == STORE:
                yield from self._damage_in_store()
        yield from (f"{path}: is not what pocketmoe packs; remove it" for path in foreign_in_packed(self.root / PACKED))
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
        for name in files_below(self.root / GRAPHS):
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
