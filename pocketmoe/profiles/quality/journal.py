"""What a long evaluation has found so far, a line for each part, so that a killed one goes on where it was.

The first line names the evaluation. Each line is the first 16 hex digits of the SHA-256 of the rest, a space, and JSON;
arrays are float64 in base64, so that they come back bit for bit. A kill can tear the last line, which is dropped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from pocketmoe.bundle.resume import Log
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
        header = json.dumps({"pocketmoe": "eval journal", **key}, sort_keys=True)
        self._log = Log(path, durable=True)
        try:
            if not self._log.try_lock():
                raise BadInput(f"{path} is in use by another evaluation", "Wait for it, or name another file.")
            if not self._log.is_plain(_MAX_BYTES):
                raise BadInput(f"{path} is no journal of an evaluation", "Name another file with --resume.")
            lines, good_bytes = _whole_lines(path, self._log.read(), header)
            if lines and lines[0] != header:
                raise BadInput(
                    f"{path} is the journal of another evaluation{_difference(lines[0], key)}",
                    "Name another file with --resume, or remove this one.",
                )
            self.parts = [_decode(path, line) for line in lines[1:]]
            self._log.truncate(good_bytes)
            if not lines:
                self._log.append(_line(header))
        except BaseException:
            self._log.close()
            raise

    def append(self, part: Part) -> None:
        """Add a part; it is on disk when this returns. Raises OutputError."""
        text = json.dumps([base64.b64encode(array.astype("<f8").tobytes()).decode() for array in part])
        self._log.append(_line(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()


def _line(text: str) -> bytes:
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    return f"{digest} {text}\n".encode()


def _whole_lines(path: Path, pieces: Sequence[bytes], header: str) -> tuple[list[str], int]:
    """The lines without their checksums, and how many bytes they take: a last one that is torn is left out.

    Raises DamagedFile, also for a file that is no journal at all: its bytes are not to be cut off.
    """
    lines: list[str] = []
    good = 0
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
