"""Publishing a bundle whole or not at all.

It is written beside the target, synced, then swapped in. A bundle that was there before stays as it was until the new
one is complete. What a killed writer leaves has no name of a bundle; the next writer with the same plan goes on with
it, any other removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from pocketmoe.bundle.files import files_below, is_folder, sha256_of, sync_tree
from pocketmoe.bundle.in_place import in_place_folder
from pocketmoe.bundle.manifest import MANIFEST, STORE, FileEntry, Manifest, read_manifest, seal
from pocketmoe.bundle.packed import is_packed_name
from pocketmoe.bundle.partial import PARTIAL, RESUME, left_beside, mark_complete, partial_directory
from pocketmoe.bundle.progress import OnStep, Progress, no_progress, no_step
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import padded, translate_write_errors
from pocketmoe.errors import DamagedFile, OutputError
from pocketmoe.system.files import exchange, sync

_ASIDE = ".replaced"


class BundleWriter:
    """Builds a bundle beside its target and swaps it in by `publish`. Leaving the context without that removes it.

    It holds a lock on the directory it writes, so that the next writer to the same target can tell one in use from
    one that a killed process left behind, and removes the latter; unless both have the same plan: then it keeps the
    experts (`stream`) and goes on.
    """

    def __init__(
        self,
        target: Path | str,
        plan: str | None = None,
        progress: Progress = no_progress,
        on_step: OnStep = no_step,
        keeps: Callable[[BaseException], bool] = lambda _: False,
    ) -> None:
        """`plan`: all that the bundle's bytes depend on, as text; None: nothing of this writer is ever gone on with.
        `keeps`: which errors leave what there is for the next writer with that plan.

        `on_step` is told, when each is done: locked, filled, hashed, sealed, synced, complete (nothing is left to go
        on with), moved aside (only where directories cannot be exchanged), in place.
        Raises OutputError when the target is something other than a bundle, or cannot be written.
        """
        self.target = Path(os.path.abspath(target))  # noqa: PTH100 - Path.absolute keeps "..", which is no name
        self._on_step = on_step
        self.hashes: dict[str, str] = {}  # SHA-256 of files that whoever wrote them has hashed
        refuse_to_replace(self.target)
        with translate_write_errors(self.target), contextlib.ExitStack() as on_error:
            _put_back(self.target)
            partial = partial_directory(self.target, plan, progress, _is_just_a_bundle, on_step=on_step, keeps=keeps)
            self.root = on_error.enter_context(partial)
            (self.root / "graphs").mkdir()
            self._cleanup = on_error.pop_all()

    def publish(self, manifest: Manifest, progress: Progress = no_progress) -> Bundle:
        """Hash every file, write the manifest, check that all fits together, sync, and put the bundle in its place.

        Raises DamagedFile or OutputError; what was at the target before is untouched then.
        """
        self._on_step("filled")
        with translate_write_errors(self.target):
            files = list_files(self.root, self.hashes, progress)
            self._on_step("hashed")
            (self.root / MANIFEST).write_bytes(seal(msgspec.structs.replace(manifest, files=files)))
        return self.publish_sealed()

    def publish_sealed(self) -> Bundle:
        """The same of a bundle that lies in `root` with its manifest already, as it was sealed elsewhere."""
        with translate_write_errors(self.target):
            Bundle.open(self.root).open_store().close()
            self._on_step("sealed")
            sync_tree(self.root)
            self._on_step("synced")
            mark_complete(self.root)
            self._on_step("complete")
            refuse_to_replace(self.target)  # again: hours may have passed
            _swap_in(self.root, self.target, self._on_step)
        return Bundle.open(self.target)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.__exit__(kind, error, trace)


def list_files(root: Path, known: Mapping[str, str], progress: Progress = no_progress) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file below `root`; the hashes in `known` are taken as they are."""
    names = sorted(name for name in files_below(root) if not name.startswith(f"{RESUME}/"))
    files: dict[str, FileEntry] = {}
    for done, name in enumerate(names):
        progress("hashing", done, len(names))
        sha256 = known[name] if name in known else sha256_of(root / name)
        files[name] = FileEntry(nbytes=(root / name).stat().st_size, sha256=sha256)
    progress("hashing", len(names), len(names))
    return files


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
    for name in files_below(target):
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


def _swap_in(new: Path, target: Path, on_step: OnStep) -> None:
    """Put `new` at `target` in one step; what was there before goes to `new`'s place, where the writer removes it.

    Where the file system cannot exchange two directories it takes two steps, and a kill between them leaves no bundle
    at the target until the next writer puts the old one back.
    """
    if not target.exists():
        new.rename(target)
    elif not exchange(new, target):
        aside = new.with_suffix(_ASIDE)
        target.rename(aside)
        try:
            on_step("moved aside")
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(new)
    on_step("in place")
    sync(target.parent)


def write_with_graphs(bundle: Bundle, target: Path, graphs: Mapping[str, bytes], manifest: Manifest) -> Bundle:
    """Write `bundle` with these graphs, by file name, and this manifest; what is not changed is linked to.

    Raises DamagedFile, OutputError.
    """
    with BundleWriter(target) as writer, translate_write_errors(target):
        for name, entry in bundle.manifest.files.items():
            path = writer.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in graphs:
                path.write_bytes(graphs[name])
            else:
                put(bundle, name, path)
                writer.hashes[name] = entry.sha256
        return writer.publish(manifest)


def put(bundle: Bundle, name: str, target: Path) -> None:
    """A second name for a bundle's file, none of which is going to change, or a copy on another file system.

    Experts that are only there as they were packed are read back. Raises OSError, DamagedFile.
    """
    source = bundle.path(name)
    if name == STORE and in_place_folder(bundle.root) is not None:
        write_restored(bundle, target)
        return
    try:
        os.link(source.resolve(), target)  # in the hub's cache it is a link, of which this would be another
    except OSError:
        shutil.copyfile(source, target)


def write_restored(bundle: Bundle, target: Path) -> None:
    """experts.bin as it was before its experts were packed in place. Raises OSError, DamagedFile."""
    with open(bundle.path(STORE), "rb") as given_up, open(target, "wb") as file, bundle.open_store() as store:
        end = 0
        for expert, record in store.records.items():
            file.seek(record.offset)
            file.write(store.read(expert))
            end = record.offset + padded(record.nbytes)
        given_up.seek(end)
        file.seek(end)
        file.write(given_up.read())  # the index, and the trailer
    sync(target)
