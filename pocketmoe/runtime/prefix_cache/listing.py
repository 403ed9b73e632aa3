"""What a prefix cache holds, by model; how it is cleared. Files say of themselves whose they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pocketmoe.errors import OutputError, printable
from pocketmoe.runtime.prefix_cache.entry import read_header
from pocketmoe.runtime.prefix_cache.folder import Folder, Found

_DAMAGED = "(damaged)"


@dataclass(frozen=True)
class ModelPart:
    """What is kept of one model. `longest_tokens`: of the longest beginning of a text."""

    model: str  # its bundle's directory
    files: int
    nbytes: int
    longest_tokens: int
    last_used: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Listing:
    """What a prefix cache holds."""

    directory: str
    files: int
    nbytes: int
    models: tuple[ModelPart, ...]  # those used last first
    cleared: bool = False  # and nothing of it is there any more


def look(path: Path, clear: bool = False) -> Listing:
    """What the prefix cache in a directory holds, or held before it was cleared. Raises BadInput, OutputError."""
    with Folder.open(path) as folder:
        try:
            parts = [*_parts(folder)]
            if clear:
                folder.clear()
        except OSError as error:
            remedy = "Check its permissions and its disk."
            raise OutputError(f"{path} cannot be cleared or read ({error.strerror})", remedy) from error
    files, nbytes = sum(part.files for part in parts), sum(part.nbytes for part in parts)
    return Listing(printable(str(path)), files, nbytes, tuple(parts), clear)


def _parts(folder: Folder) -> Iterator[ModelPart]:
    by_model: dict[str, list[tuple[Found, int]]] = {}
    for found in sorted(folder.files(), key=lambda found: -found.used_ns):
        model, tokens = _of(folder, found.name)
        by_model.setdefault(model, []).append((found, tokens))
    for model, files in by_model.items():
        used_s = files[0][0].used_ns / 1e9
        yield ModelPart(
            model=model,
            files=len(files),
            nbytes=sum(found.nbytes for found, _ in files),
            longest_tokens=max(tokens for _, tokens in files),
            last_used=datetime.fromtimestamp(min(used_s, 4e9), UTC).isoformat(timespec="seconds"),
        )


def _of(folder: Folder, name: str) -> tuple[str, int]:
    """Which model a file is of, and the tokens up to its end."""
    try:
        with folder.reading(name) as file:
            header = read_header(file)
    except OSError:
        header = None
    return (printable(header.model), header.tokens) if header else (_DAMAGED, 0)
