"""What a long command has found so far, step by step, so that one that was killed goes on where it was.

Each step's result is a file of JSON, written whole or not at all. They lie in a partial directory
(`bundle.partial_directory`), which goes when the command ends, and is taken over only by one with the same plan.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from pocketmoe.bundle.files import write_whole
from pocketmoe.bundle.partial import journal_in
from pocketmoe.bundle.store import translate_write_errors

Result = TypeVar("Result")


class Steps:
    """The steps of one command. Without a directory nothing is kept."""

    def __init__(self, partial: Path | None = None) -> None:
        """`partial`: a partial directory that has a plan. Raises OutputError."""
        self.folder = None
        if partial:
            self.folder = journal_in(partial).with_name("kept")
            with translate_write_errors(self.folder):
                self.folder.mkdir(mode=0o700, exist_ok=True)  # what a text showed reveals it

    def once(self, name: str, kind: type[Result], make: Callable[[], Result]) -> Result:
        """The result of the step of that name, of a type that msgspec knows: as it was kept, else made and kept.

        Raises OutputError, and what `make` raises.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.json"
        if path.is_file():
            return msgspec.json.decode(path.read_bytes(), type=kind)
        result = make()
        write_whole(path, msgspec.json.encode(result))
        return result


FORGETFUL = Steps()
