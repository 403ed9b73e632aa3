"""What a long evaluation has found so far, a line for each part, so that a killed one goes on where it was.

The first line names the evaluation. Each line is the first 16 hex digits of the SHA-256 of the rest, a space, and JSON;
arrays are float64 in base64, so that they come back bit for bit. A kill can tear the last line, which is dropped.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.jsonfile import is_object

_DIGITS = 16
_MAX_BYTES = 1 << 30

Part = tuple[np.ndarray, ...]  # float64 [n] each


class Journal:
    """The parts of one evaluation in their order, as a context manager; `parts` are those that the file had."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Open or begin the journal of the evaluation that `key` names, a mapping that JSON can hold.

        Raises BadInput for the journal of another evaluation or one in use, DamagedFile for a line that was changed,
        OutputError for a file that cannot be written.
        """
        self.path = path
        header = json.dumps({"pocketmoe": "eval journal", **key}, sort_keys=True)
        with translate_write_errors(path):
            self._file = open(path, "a+b", opener=_without_waiting)  # noqa: SIM115 - closed by close()
        try:
            self._lock()
            status = os.fstat(self._file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                raise BadInput(f"{path} is no journal of an evaluation", "Name another file with --resume.")
            self._file.seek(0)
            lines, good = _whole_lines(path, self._file.read(), header)
            if lines and lines[0] != header:
                raise BadInput(
                    f"{path} is the journal of another evaluation{_difference(lines[0], key)}",
                    "Name another file with --resume, or remove this one.",
                )
            self.parts = [_decode(path, line) for line in lines[1:]]
            with translate_write_errors(path):
                self._file.truncate(good)
            if not lines:
                self._write(header)
        except BaseException:
            self.close()
            raise

    def append(self, part: Part) -> None:
        """Add a part; it is on disk when this returns. Raises OutputError."""
        self._write(json.dumps([base64.b64encode(array.astype("<f8").tobytes()).decode() for array in part]))

    def close(self) -> None:
        """Let others use the file. All that was promised is on disk; what is flushed again was refused already."""
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInput(
                f"{self.path} is in use by another evaluation", "Wait for it, or name another file."
            ) from error

    def _write(self, text: str) -> None:
        with translate_write_errors(self.path):
            self._file.write(_line(text))
            self._file.flush()
            os.fsync(self._file.fileno())


def _without_waiting(path: str, flags: int) -> int:
    """A FIFO is opened at once, to be refused."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _line(text: str) -> bytes:
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    return f"{digest} {text}\n".encode()


def _whole_lines(path: Path, data: bytes, header: str) -> tuple[list[str], int]:
    """The lines without their checksums, and how many bytes they take: a last one that is torn is left out.

    Raises DamagedFile, also for a file that is no journal at all: its bytes are not to be cut off.
    """
    lines: list[str] = []
    good = 0
    pieces = data.splitlines(keepends=True)
    for number, piece in enumerate(pieces, 1):
        text = piece[_DIGITS + 1 : -1].decode(errors="replace")
        if piece != _line(text):
            torn = number == len(pieces) and (lines or _line(header).startswith(piece))
            if torn:
                break
            raise DamagedFile(path, f"line {number} is not one of an evaluation's journal", "Name another file.")
        lines.append(text)
        good += len(piece)
    return lines, good


def _decode(path: Path, line: str) -> Part:
    try:
        return tuple(np.frombuffer(base64.b64decode(text, validate=True), "<f8") for text in json.loads(line))
    except (ValueError, TypeError) as error:
        raise DamagedFile(path, "a line is not one of an evaluation's journal", "Name another file.") from error


def _difference(line: str, key: Mapping[str, Any]) -> str:
    """: what it is of, by the first thing that differs."""
    found = json.loads(line)
    for name, value in key.items():
        if is_object(found) and found.get(name) != json.loads(json.dumps(value)):
            return f" ({name} differs)"
    return ""
