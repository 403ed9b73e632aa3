"""Where a case runs: a working directory, an empty home, and files of "somebody else" that must stay as they are."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

SECRET = b"pocketmoe-fuzz-secret-5f1c"


@dataclass(frozen=True)
class Place:
    """The directories of one case. Relative paths of its commands start at `cwd`."""

    root: Path

    @property
    def cwd(self) -> Path:
        return self.root / "cwd"

    @property
    def canary(self) -> Path:
        """Somebody else's directory: links of hostile files point into it."""
        return self.root / "canary"

    @classmethod
    def make(cls, root: Path) -> Place:
        place = cls(root)
        for name in ("cwd", "home", "tmp", "canary/Documents/0123456789abcdef", "canary/.ssh", "canary/empty"):
            (root / name).mkdir(parents=True)
        (place.canary / "Documents/thesis.txt").write_bytes(b"years of work\n")
        (place.canary / "Documents/0123456789abcdef/packing.json").write_bytes(b"{}")
        (place.canary / ".ssh/id").write_bytes(SECRET)
        (place.canary / "secret.json").write_bytes(b'{"token": "' + SECRET + b'", "chat_template": "' + SECRET + b'"}')
        return place

    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "XDG_CACHE_HOME": str(self.root / "home/.cache"),
            "COLUMNS": "100",
        }

    def snapshot(self) -> dict[str, str]:
        """What is where: type, and hash or target; links are not followed."""
        found: dict[str, str] = {}
        for path in _walk(self.root):
            name = path.relative_to(self.root).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[name] = f"link {path.readlink()}"
            elif stat.S_ISREG(mode):
                found[name] = f"file {_digest(path)}"
            else:
                found[name] = f"type {stat.S_IFMT(mode):o}"
        return found


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _walk(root: Path) -> Iterator[Path]:
    for entry in os.scandir(root):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))


def changes(before: dict[str, str], after: dict[str, str], may_change: tuple[str, ...]) -> list[str]:
    """What a command did to files that are none of its business.

    It may write `may_change` (patterns, relative to cwd), below them, and below the packed/ of a bundle; a link there
    is not followed.
    """

    def is_its_own(name: str) -> bool:
        parts = name.split("/")
        if name.startswith("tmp/torchinductor_"):  # torch's, empty; SECURITY.md says so
            return True
        return parts[0] == "cwd" and (
            "packed" in parts[2:]
            or any(fnmatchcase(name, f"cwd/{own}") or name.startswith(f"cwd/{own}/") for own in may_change)
        )

    lost = [f"removed {name}" for name in before if name not in after and not is_its_own(name)]
    new = [f"left {name}" for name in after if name not in before and not is_its_own(name)]
    other = [f"changed {n}" for n, what in before.items() if after.get(n, what) != what and not is_its_own(n)]
    return sorted(lost + other + new)


def holds_secret(root: Path) -> list[str]:
    """The files below a directory that hold the secret."""
    if not os.path.isdir(root) or os.path.islink(root):  # noqa: PTH112, PTH114 - names of any length
        return []
    return [
        str(p.relative_to(root)) for p in _walk(root) if p.is_file() and not p.is_symlink() and SECRET in p.read_bytes()
    ]
