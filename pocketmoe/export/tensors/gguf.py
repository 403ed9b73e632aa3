"""The header of a GGUF file, read within limits: every count, length and place is held against the file's size first.

Layout (llama.cpp, docs/gguf.md): magic, version, counts of tensors and settings; settings by name, each with a type;
tensors by name, with sizes (innermost first), type and place; then their data, aligned.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketmoe.errors import DamagedFile, UnsupportedModel, printable

MAGIC = b"GGUF"
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_NAME = 256
_AGAIN = "Download the file again."


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape, outermost first, the type's name in llama.cpp's words, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """`settings`: numbers and texts by name; arrays are left out. `tensors`: in the order of their places."""

    settings: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


def is_gguf(path: Path) -> bool:
    """Whether this is a file that begins as GGUF files do."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> GgufHeader:
    """Raises DamagedFile for what is no whole GGUF file, UnsupportedModel for types and versions that are not known."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(path, data))
    except OSError as error:
        raise DamagedFile(path, f"cannot be read ({error.strerror})", "Check the disk, or copy it anew.") from error


def _read(reader: _Reader) -> GgufHeader:
    path, version = reader.path, reader.header()
    if version not in (2, 3):
        raise UnsupportedModel(f"{path} is GGUF of version {version}", "Convert it anew with llama.cpp.")
    n_tensors, n_settings = reader.number("Q"), reader.number("Q")
    reader.expect(n_settings, 13)
    settings: dict[str, Any] = {}
    for _ in range(n_settings):
        name, kind = reader.text(), reader.number("I")
        value = reader.value(kind)
        if value is not None:
            settings[name] = value
    reader.expect(n_tensors, 28)
    found = [_read_tensor(reader) for _ in range(n_tensors)]
    align = settings.get("general.alignment", 32)
    if not isinstance(align, int) or not 0 < align <= 1 << 20 or align & (align - 1):
        raise reader.damage(f"is aligned to {str(align)[:20]} bytes")
    start = -(-reader.place // align) * align
    return GgufHeader(settings, _placed(path, found, start, reader.size, align))


def _placed(path: Path, found: list[GgufTensor], start: int, size: int, align: int) -> tuple[GgufTensor, ...]:
    """The tensors by place, which begins at `start`: within the file, aligned, one after the other, each name once."""
    end = start
    tensors = sorted(found, key=lambda tensor: tensor.offset)
    for tensor in tensors:
        first = start + tensor.offset
        if tensor.offset % align or first < end or first + tensor.nbytes > size:
            raise DamagedFile(path, f"has no room for tensor {printable(tensor.name)!r}, or is cut short", _AGAIN)
        end = first + tensor.nbytes
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise DamagedFile(path, "has two tensors of one name", _AGAIN)
    return tuple(GgufTensor(t.name, t.shape, t.type, start + t.offset, t.nbytes) for t in tensors)


def _read_tensor(reader: _Reader) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, n_axes = reader.text(_MOST_NAME), reader.number("I")
    if n_axes > 4:
        raise reader.damage(f"says that tensor {printable(name)!r} has {n_axes} axes")
    shape = tuple(reader.number("Q") for _ in range(n_axes))[::-1]
    number, offset = reader.number("I"), reader.number("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        said = f"{reader.path}: tensor {printable(name)!r} has type {number}, which is not known"
        raise UnsupportedModel(said, "Update the gguf package, or convert the model anew.") from error
    block, nbytes = GGML_QUANT_SIZES[kind]
    count = math.prod(shape)
    if not 0 < count < 1 << 62 or offset >= 1 << 62 or (shape[-1] if shape else 1) % block:
        raise reader.damage(f"says that tensor {printable(name)!r} has shape {list(shape)} of {kind.name}")
    return GgufTensor(name, shape, kind.name, offset, count // block * nbytes)


class _Reader:
    """The bytes of a header, read from the beginning; `place` is the next."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self._data, self.size, self.place = path, data, len(data), 0

    def damage(self, what: str) -> DamagedFile:
        return DamagedFile(self.path, what, _AGAIN)

    def expect(self, count: int, width: int) -> None:
        """Raises DamagedFile unless so many things of at least that width can follow."""
        if count * width > self.size - self.place:
            raise self.damage(f"says that {count} things follow, and ends before")

    def header(self) -> int:
        if self._data[:4] != MAGIC:
            raise self.damage("is no GGUF file")
        self.place = 4
        return self.number("I")

    def number(self, code: str) -> Any:
        width = struct.calcsize(f"<{code}")
        self.expect(1, width)
        (value,) = struct.unpack_from(f"<{code}", self._data, self.place)
        self.place += width
        return value

    def text(self, most: int = 1 << 24) -> str:
        length = self.number("Q")
        if length > most:
            raise self.damage(f"holds a text of {length} bytes")
        self.expect(length, 1)
        self.place += length
        return self._data[self.place - length : self.place].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A number or a text; None for an array, which is passed over."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            if kind not in _CODES:
                raise self.damage(f"has a setting of type {kind}")
            return self.number(_CODES[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _TEXT:
            self.expect(count, 8)
            for _ in range(count):
                self.text()
        elif inner in _WIDTHS:
            self.expect(count, _WIDTHS[inner])
            self.place += count * _WIDTHS[inner]
        else:
            raise self.damage(f"has an array of type {inner}")
        return None
