"""A JSON file of foreign making, read as Python's json and so transformers read it, within bounds."""

from __future__ import annotations

import codecs
import json
import stat
from pathlib import Path
from typing import Any, TypeGuard

from pocketmoe.errors import BadInput, DamagedFile

MOST_BYTES = 8 << 20  # of a configuration; the largest published have some 100 kB
_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_NESTED = 64
_UNMARKED = "Save it as UTF-8 without the mark."
_AGAIN = "Download it again, or write it anew with transformers."


class NotJson(DamagedFile):
    """A file that Python's json refuses, which transformers takes for absent where it is optional."""


def read_object(path: Path, *, most_bytes: int = MOST_BYTES, remedy: str = _AGAIN) -> dict[str, Any]:
    """The object in a file, with Infinity, NaN and the last of repeated keys, as Python's json has them.

    Raises NotJson for what json refuses, DamagedFile for what is no object, is too large or nested too deep, BadInput
    for what cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedFile(path, "is not a regular file", remedy)
        with open(path, "rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})", remedy) from error
    if len(data) > most_bytes:
        raise DamagedFile(path, f"has more than {most_bytes} bytes", remedy)
    return parse_object(data, path, remedy)


def parse_object(data: bytes, path: Path, remedy: str = _AGAIN) -> dict[str, Any]:
    """The same from the file's bytes; `path` is for the message, `remedy` "" for that of a damaged bundle."""
    if data.startswith(codecs.BOM_UTF8):
        raise NotJson(path, "begins with a byte order mark, which transformers does not read", _UNMARKED)
    if data.startswith(_POINTER):
        raise DamagedFile(
            path, "is a Git LFS pointer, not the file itself", "Fetch it by git lfs pull, or download it."
        )
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotJson(path, f"cannot be read: it is not UTF-8 (byte {error.start})", remedy) from error
    except RecursionError as error:
        raise DamagedFile(path, "cannot be read: it is nested too deep", remedy) from error
    except ValueError as error:  # what json refuses, and a number of more digits than Python converts
        raise NotJson(path, f"cannot be read as JSON ({error})", remedy) from error
    if not is_object(value):
        raise DamagedFile(path, f"cannot be read: it holds no JSON object, but {type(value).__name__}", remedy)
    if _is_nested_deeper(value, _MOST_NESTED):
        raise DamagedFile(path, f"is nested more than {_MOST_NESTED} deep", remedy)
    return value


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a value that json made is an object; the keys of such are texts."""
    return isinstance(value, dict)


def is_array(value: object) -> TypeGuard[list[Any]]:
    """Whether a value that json made is an array."""
    return isinstance(value, list)


def _is_nested_deeper(value: Any, levels: int) -> bool:
    """Level by level: a recursive check is what a hostile file would exhaust."""
    layer: list[Any] = [value]
    for _ in range(levels + 1):
        inner: list[Any] = []
        for item in layer:
            inner += item.values() if is_object(item) else item
        layer = [item for item in inner if isinstance(item, dict | list)]
        if not layer:
            return False
    return True
