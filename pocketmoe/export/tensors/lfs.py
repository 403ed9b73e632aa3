"""Git LFS pointers: what a clone without Git LFS has in the place of large files."""

from __future__ import annotations

from pathlib import Path

from pocketmoe.errors import DamagedFile

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises DamagedFile when the file at `path` is a pointer, and not the file that it stands for."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(len(_BEGINNING))
    except OSError as error:
        raise DamagedFile(path, f"cannot be read ({error.strerror})", "Check the disk, or copy it anew.") from error
    if beginning == _BEGINNING:
        raise DamagedFile(
            path,
            "is a Git LFS pointer, not the file itself",
            "Fetch the files: git lfs install, then git lfs pull, in the clone; or download the checkpoint again.",
        )
