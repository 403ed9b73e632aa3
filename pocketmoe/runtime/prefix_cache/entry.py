"""A file of the cache: a header of one page, then the bytes of states, nothing else.

    {"format": 1, "name": ..., "model": ..., "tokens": ..., "sha256": ...}    JSON, padded with spaces to 4096 bytes
    states                                                                    in the manifest's order, C order each

The SHA-256 is over the states and the header without it. What has to be in a file, and how long it is, follows from
the manifest: nothing that stands in it decides how much is read or allocated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from io import BufferedReader, BufferedWriter, FileIO
from typing import Annotated

import msgspec
import numpy as np

HEADER_BYTES = 4096
_FORMAT = 1
_Text = Annotated[str, msgspec.Meta(max_length=512)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file says of itself."""

    format: int = _FORMAT
    name: _Text  # of the file
    model: _Text  # the bundle's directory, for people
    tokens: _Count  # of the text up to the end of these states
    sha256: _Text = ""


def write_entry(file: BufferedWriter[FileIO], header: Header, pieces: Iterable[memoryview]) -> None:
    """Write states, and the header that seals them. Raises OSError."""
    digest = hashlib.sha256()
    file.seek(HEADER_BYTES)
    for piece in pieces:
        file.write(piece)
        digest.update(piece)
    digest.update(msgspec.json.encode(header))
    file.seek(0)
    file.write(msgspec.json.encode(msgspec.structs.replace(header, sha256=digest.hexdigest())).ljust(HEADER_BYTES))


def read_header(file: BufferedReader[FileIO]) -> Header | None:
    """What a file says of itself; None for what is no header. Raises OSError."""
    try:
        header = msgspec.json.decode(file.read(HEADER_BYTES), type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return header if header.format == _FORMAT else None


def read_entry(file: BufferedReader[FileIO], name: str, pieces: Iterable[memoryview]) -> bool:
    """Fill `pieces` with a file's states. False, whatever they hold by then, where it is not what its name says.

    Raises OSError.
    """
    header = read_header(file)
    if header is None or header.name != name:
        return False
    digest = hashlib.sha256()
    for piece in pieces:
        if file.readinto(piece) != len(piece):
            return False
        digest.update(piece)
    digest.update(msgspec.json.encode(msgspec.structs.replace(header, sha256="")))
    return digest.hexdigest() == header.sha256 and not file.read(1)


def pieces_of(array: np.ndarray, axis: int | None = None, start: int = 0, stop: int = 0) -> Iterator[memoryview]:
    """The bytes of an array [...] in C order, or of its part [start, stop) along an axis, as views of its own memory.

    Whatever is written to them is in the array. Raises ValueError for one whose memory is not in C order.
    """
    if not array.flags.c_contiguous:
        raise ValueError("a state must lie in C order")
    if axis is None:
        yield array.reshape(-1).view(np.uint8).data
        return
    for index in np.ndindex(array.shape[:axis]):
        yield array[index][start:stop].reshape(-1).view(np.uint8).data
