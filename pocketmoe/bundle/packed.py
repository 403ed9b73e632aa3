"""What lies in a bundle's packed/: one folder for each machine that packed the experts for itself (`runtime.packing`).

A bundle that cannot be written has its folders elsewhere, where they are the user's alone: a `PackedPlace` has a folder
for each bundle, called by the bundle's seal, with what its packed/ would hold and the file `bundle`, which says whose
it is.

A bundle comes from anywhere, and so may what its packed/ holds. Files there are read and written only where no link
leads, and a folder is removed by the names of what is made in one: whatever else it holds stays, and so does it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pocketmoe.bundle.files import is_folder, read_whole, write_whole
from pocketmoe.bundle.progress import Progress
from pocketmoe.errors import OutputError, PocketMoEError, printable
from pocketmoe.sizes import in_words
from pocketmoe.system.files import open_folder

PACKED = "packed"
PACKING = "packing.json"
EXPERT_COUNTS = "uses.f64"
REHEARSED = "tokenizer"
_KEY = r"[0-9a-f]{16}"
_FILE = re.compile(
    r"packing\.json|in_place\.json|experts\.bin|uses\.f64|tokenizer|uses\.[0-9a-f]+(\.partial)?"
    r"|kind_\d+\.(onnx|seed|places)"
)
_UNFINISHED = rf"({_KEY}\.unfinished|\.{_KEY}\.[0-9a-z_]{{8}}\.partial)/(\.resume/)?[^/]+"
_NAME = re.compile(rf"{PACKED}/({_KEY}/({_FILE.pattern})|{_UNFINISHED})")

_BUNDLE = "bundle"  # a bundle's directory, in a line
_SEAL = re.compile(r"[0-9a-f]{64}")
_GROWTH = 1.25  # of the published experts, at most: scales get sums of their blocks beside them
_MOST_NAME = 4096


@dataclass(frozen=True)
class PackedPlace:
    """A directory for packed experts outside of bundles: of those that cannot be written, `always`: of all."""

    directory: Path
    always: bool = False

    def of(self, seal: str) -> Path:
        """What stands for the packed/ of the bundle with that seal."""
        return self.directory / seal

    def is_private(self) -> bool:
        """Whether nobody else can have put anything there: no link, the user's own, or nothing yet."""
        if not os.path.lexists(self.directory):
            return True
        try:
            fd = open_folder(self.directory)
        except OSError:
            return False
        try:
            found = os.fstat(fd)
            return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class PackedPart:
    """What is packed of one bundle. `bundle`: the directory that it was packed from."""

    bundle: str
    seal: str
    is_there: bool  # the bundle still is
    nbytes: int


@dataclass(frozen=True)
class PackedListing:
    """What a place for packed experts holds."""

    directory: str
    nbytes: int
    free_bytes: int
    bundles: tuple[PackedPart, ...]
    cleared: bool = False  # and it holds nothing of it any more


def is_packed_name(name: str) -> bool:
    """Whether a file of that name, relative to the bundle, is one that is made by packing."""
    return _NAME.fullmatch(name) is not None


def is_packed_folder(path: Path) -> bool:
    """Whether packed/KEY is a directory, and packed/ too, and neither a link to one."""
    return is_folder(path.parent) and is_folder(path)


def foreign_in_packed(packed: Path) -> Iterator[Path]:
    """What a bundle's packed/ holds that packing does not make: links, devices, other names."""
    if not is_folder(packed):
        return
    for path in sorted(packed.rglob("*")):
        mode = os.lstat(path).st_mode
        name = f"{PACKED}/{path.relative_to(packed).as_posix()}"
        resumed = name.endswith((".partial/.resume", ".unfinished/.resume"))
        folder = stat.S_ISDIR(mode) and (resumed or is_packed_name(f"{name}/{PACKING}"))
        if not (folder or (stat.S_ISREG(mode) and is_packed_name(name))):
            yield path


def make_packed(packed: Path) -> None:
    """Make a bundle's packed/ where there is none. Raises OSError where it is a link or no directory."""
    with contextlib.suppress(FileExistsError):
        packed.mkdir(mode=0o755)
    os.close(open_folder(packed))


def packed_keys(packed: Path) -> list[str]:
    """The names of the folders in packed/ that look as if a machine had packed there."""
    return [path.name for path in packed.iterdir() if re.fullmatch(_KEY, path.name) and is_folder(path)]


def remove_packed(packed: Path, key: str) -> None:
    """Remove one machine's folder: the files that packing makes, then the folder, which stays if it has others.

    Nothing is reached through a link. Raises OSError.
    """
    parent = open_folder(packed)
    try:
        folder = open_folder(key, dir_fd=parent)
        try:
            for name in os.listdir(folder):  # noqa: PTH208 - a descriptor
                if _FILE.fullmatch(name):
                    os.unlink(name, dir_fd=folder)
        finally:
            os.close(folder)
        os.rmdir(key, dir_fd=parent)
    finally:
        os.close(parent)


def prepare_elsewhere(root: Path, store_bytes: int, home: Path, progress: Progress) -> None:
    """Make a bundle's folder in a place for packed experts; `progress` is told where, and how much is free.

    `root`: the bundle; `store_bytes`: of its published experts; `home`: `PackedPlace.of` its seal. Raises OSError where
    the place cannot be made, or more than half of what is free there would be taken.
    """
    home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    needed, free = int(_GROWTH * store_bytes), shutil.disk_usage(home.parent).free
    sizes = f"about {in_words(needed)} of the {in_words(free)} free there"
    if needed > free / 2:
        raise OSError(errno.ENOSPC, f"experts packed into {home.parent} would take {sizes}, more than half")
    progress(f"the experts are packed into {home.parent}, {sizes}; `pocketmoe packed` lists and removes them", 0, 0)
    home.mkdir(mode=0o700, exist_ok=True)
    try:
        write_whole(home / _BUNDLE, os.fsencode(root.absolute()) + b"\n", 0o600)
    except OutputError as error:
        raise OSError(errno.EIO, str(error)) from error


def look(directory: Path, clear: bool = False) -> PackedListing:
    """What a place for packed experts holds, or held before it was cleared. Raises OutputError."""
    try:
        parts = tuple(_parts(directory))
        if clear:
            for part in parts:
                _remove(directory / part.seal)
        there = next(folder for folder in (directory.absolute(), *directory.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(there).free  # also where it is still to be made
    except OSError as error:
        remedy = "Check its permissions, and what else is there."
        raise OutputError(f"{directory} cannot be cleared or read ({error.strerror})", remedy) from error
    return PackedListing(printable(str(directory)), sum(part.nbytes for part in parts), free, parts, clear)


def _parts(directory: Path) -> Iterator[PackedPart]:
    for home in sorted(directory.iterdir()) if is_folder(directory) else ():
        if _SEAL.fullmatch(home.name) and is_folder(home):
            name = _name_of(home)
            nbytes = sum(path.lstat().st_size for path in home.rglob("*") if not path.is_dir())
            yield PackedPart(printable(name) or "(unknown)", home.name, bool(name) and os.path.exists(name), nbytes)  # noqa: PTH110 - never raises


def _name_of(home: Path) -> str:
    with contextlib.suppress(PocketMoEError):
        return os.fsdecode(read_whole(home / _BUNDLE, _MOST_NAME, "")).rstrip("\n")
    return ""


def _remove(home: Path) -> None:
    """Remove what packing makes, and the folder, which stays if it has others. Raises OSError."""
    for path in list(home.iterdir()):
        if is_folder(path) and path.name.endswith(".partial"):
            shutil.rmtree(path)
    for key in packed_keys(home):
        remove_packed(home, key)
    (home / _BUNDLE).unlink(missing_ok=True)
    home.rmdir()
