"""A checkpoint's directory: which of its files may be read.

Bundles are published, and an export copies parts of the checkpoint into them. So a link is followed only to a regular
file within the directory, or to a blob of the same hub cache (models--ORG--NAME/snapshots/COMMIT/FILE -> ../../blobs):
a link to somebody's token or key is refused, as are devices and pipes, whose reading would not end.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from pocketmoe.errors import BadInput, DamagedFile

TEXT_BYTES = 256 << 20  # no configuration, tokenizer or template is as large
_TEXTS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "README.md")  # what an export or transformers reads
_TEMPLATES = "additional_chat_templates"


class Directory:
    """The files of a checkpoint, each checked before it is read."""

    def __init__(self, root: Path) -> None:
        """Raises BadInput when `root` is no directory."""
        if not root.is_dir():
            raise BadInput(f"{root} is not a directory", "Name a directory with config.json and *.safetensors.")
        self.root = root
        self._real = root.resolve()
        self._blobs = self._real.parent.parent / "blobs" if self._real.parent.name == "snapshots" else None

    def file(self, name: str) -> Path | None:
        """The path of a file that may be read; None where there is no file of that name.

        Raises BadInput for links that lead out of the checkpoint and for what is no regular file, DamagedFile for links
        that lead nowhere.
        """
        path = self.root / name
        if not os.path.lexists(path):
            return None
        try:
            real = path.resolve(strict=True)
            mode = real.stat().st_mode
        except (OSError, RuntimeError) as error:
            raise DamagedFile(path, "is a link that leads nowhere", "Download the checkpoint again.") from error
        if not real.is_relative_to(self._real) and real.parent != self._blobs:
            raise BadInput(
                f"{path} is a link to {real}, outside of the checkpoint; such links are not followed",
                "Put the file itself there, or name the directory that it lies in.",
            )
        if not stat.S_ISREG(mode):
            raise BadInput(f"{path} is not a regular file", "Put the file itself there, or remove it.")
        return path

    def check(self, patterns: Sequence[str] = ()) -> None:
        """Check all files that transformers may read by itself, of at most TEXT_BYTES, and what matches `patterns`."""
        names = sorted(entry.name for entry in self._entries(self.root))
        folder = self.root / _TEMPLATES
        if os.path.lexists(folder):
            if not folder.resolve().is_relative_to(self._real):
                raise BadInput(f"{folder} is a link to outside of the checkpoint", "Remove it.")
            names += [f"{_TEMPLATES}/{entry.name}" for entry in self._entries(folder)] if folder.is_dir() else []
        for name in names:
            if any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in (*_TEXTS, *patterns)):
                path = self.file(name)
                if path is not None and path.stat().st_size > TEXT_BYTES:
                    raise BadInput(
                        f"{path} has {path.stat().st_size} bytes, more than any file of its kind",
                        "Download the checkpoint again.",
                    )

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except OSError as error:
            raise BadInput(f"{folder} cannot be read ({error.strerror})", "Check its permissions.") from error

    def read(self, name: str) -> bytes | None:
        """A file's content, None where there is none. Raises BadInput, DamagedFile."""
        path = self.file(name)
        if path is None:
            return None
        try:
            return path.read_bytes()
        except OSError as error:
            raise DamagedFile(path, f"cannot be read ({error.strerror})", "Check the disk, or copy it anew.") from error
