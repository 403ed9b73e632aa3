"""The file of a batch's answers: a line of JSON each, in the order in which they were ready.

A line is there whole or not at all, and on the disk when `add` returns: whoever is killed loses what was being
answered. Each has a hash of what it answers (`key`), by which a second start knows what is left to do, and refuses a
file that answers something else.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from pocketmoe.batch.prompts import BatchPrompt
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.errors import BadInput, OutputError
from pocketmoe.system.files import CLOEXEC, NO_TERMINAL, NO_WAITING
from pocketmoe.system.locks import lock_now

_REMEDY = "Name another file for the answers, or remove this one."
_MOST_LINE_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_BEGINS = b'{"id": '  # a line; of a file with no whole line, nothing else may be taken for half of one


class _Answered(msgspec.Struct):
    """What of a line says which prompt it answers."""

    id: str | int
    key: str


def key_of(prompt: BatchPrompt, options: Mapping[str, Any], seal: str) -> str:
    """16 hex digits of a hash over all that decides an answer: the prompt, how it is answered, the bundle's seal."""
    said = json.dumps([seal, options, prompt.prompt], sort_keys=True, default=str)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Results:
    """The file, open and locked. `done`: the ids that have an answer."""

    def __init__(self, path: Path, keys: Mapping[str | int, str]) -> None:
        """Go on with the answers in a file, or begin one. `keys`: of all prompts, by their ids.

        Raises BadInput where the file is something else, answers other prompts or in another way, or is in use;
        OutputError where it cannot be written.
        """
        self.path = path
        self.done: set[str | int] = set()
        with translate_write_errors(path):
            flags = os.O_RDWR | os.O_CREAT | CLOEXEC | NO_WAITING | NO_TERMINAL
            self._fd = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise BadInput(f"{path} is not a file", _REMEDY)
            self._lock()
            with translate_write_errors(path):
                end = self._read(keys)
                os.ftruncate(self._fd, end)  # half a line, of a process that was killed
                os.lseek(self._fd, end, os.SEEK_SET)
        except BaseException:
            os.close(self._fd)
            raise

    def add(self, record: Mapping[str, Any]) -> None:
        """Write an answer: one line, in ASCII. Raises OutputError, and then the file is as it was."""
        data = json.dumps(record).encode() + b"\n"
        with translate_write_errors(self.path):
            start = os.lseek(self._fd, 0, os.SEEK_CUR)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
                os.fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, start)
                os.lseek(self._fd, start, os.SEEK_SET)
                raise
        self.done.add(record["id"])

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            lock_now(self._fd)
        except BlockingIOError as error:
            raise BadInput(f"{self.path} is being written by another process", _REMEDY) from error
        except OSError:
            pass  # no locks on this file system

    def _read(self, keys: Mapping[str | int, str]) -> int:
        """Take over the answers that there are; where the last whole line ends."""
        end, left = 0, b""
        while piece := os.read(self._fd, _PIECE_BYTES):
            *lines, left = (left + piece).split(b"\n")
            for line in lines:
                self._take(line, keys)
                end += len(line) + 1
            if len(left) > _MOST_LINE_BYTES:
                raise BadInput(f"{self.path} is no file of answers", _REMEDY)
        if not self.done and not _BEGINS.startswith(left[: len(_BEGINS)]):
            raise BadInput(f"{self.path} is no file of answers", _REMEDY)
        return end

    def _take(self, line: bytes, keys: Mapping[str | int, str]) -> None:
        number = len(self.done) + 1
        try:
            found = msgspec.json.decode(line, type=_Answered)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise BadInput(f"{self.path}, line {number}: is no answer of a batch ({error})", _REMEDY) from error
        if found.id not in keys or found.id in self.done:
            raise BadInput(f"{self.path}, line {number}: answers {found.id!r}, which is not asked", _REMEDY)
        if found.key != keys[found.id]:
            what = "answers another prompt, with another bundle or with other options"
            raise BadInput(f"{self.path}, line {number}: {what}", _REMEDY)
        self.done.add(found.id)


def in_order(path: Path, prompts: Sequence[BatchPrompt]) -> None:
    """Put a complete file's answers into the order of their prompts, in one step. Raises OutputError."""
    path = path.resolve()
    places = {prompt.id: place for place, prompt in enumerate(prompts)}
    try:
        with open(path, "rb") as file:
            starts = [(places[msgspec.json.decode(line, type=_Answered).id], len(line)) for line in file]
    except (OSError, KeyError, msgspec.DecodeError) as error:
        raise OutputError(f"{path} changed while it was written", _REMEDY) from error
    if starts == sorted(starts):
        return
    _rewrite(path, starts)


def _rewrite(path: Path, lines: Sequence[tuple[int, int]]) -> None:
    """`lines`: of each its place, and its length in bytes, in the order of the file."""
    offset = 0
    spans: list[tuple[int, int, int]] = []
    for place, nbytes in lines:
        spans.append((place, offset, nbytes))
        offset += nbytes
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with translate_write_errors(path):
        try:
            with open(path, "rb") as old, open(partial, "xb") as new:
                for _, start, nbytes in sorted(spans):
                    old.seek(start)
                    new.write(old.read(nbytes))
                new.flush()
                os.fsync(new.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
