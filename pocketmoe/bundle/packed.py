"""What lies in a bundle's packed/: one folder for each machine that packed the experts for itself (`runtime.packing`).

A bundle comes from anywhere, and so may what its packed/ holds. Files there are read and written only where no link
leads, and a folder is removed by the names of what is made in one: whatever else it holds stays, and so does it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from pocketmoe.bundle.files import is_folder
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


def is_packed_name(name: str) -> bool:
    """Whether a file of that name, relative to the bundle, is one that is made by packing."""
    return _NAME.fullmatch(name) is not None


def is_packed_folder(path: Path) -> bool:
    """Whether packed/KEY is a directory, and packed/ too, and neither a link to one."""
    return is_folder(path.parent) and is_folder(path)


def foreign_in_packed(root: Path) -> Iterator[Path]:
    """What a bundle's packed/ holds that packing does not make: links, devices, other names."""
    packed = root / PACKED
    if not is_folder(packed):
        return
    for path in sorted(packed.rglob("*")):
        mode = os.lstat(path).st_mode
        name = path.relative_to(root).as_posix()
        resumed = name.endswith((".partial/.resume", ".unfinished/.resume"))
        folder = stat.S_ISDIR(mode) and (resumed or is_packed_name(f"{name}/{PACKING}"))
        if not (folder or (stat.S_ISREG(mode) and is_packed_name(name))):
            yield path


def make_packed(root: Path) -> Path:
    """The bundle's packed/, made where there is none. Raises OSError where it is a link or no directory."""
    packed = root / PACKED
    with contextlib.suppress(FileExistsError):
        packed.mkdir(mode=0o755)
    os.close(open_folder(packed))
    return packed


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
