"""The states of a text's beginning, kept on disk block by block and put back, bit for bit.

A block is what a whole chunk of tokens has added to the caches that grow, so that texts which begin alike share blocks.
States that overwrite are kept as a snapshot after a chunk: with such states, a text can be gone on with only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from pocketmoe.bundle.manifest import Manifest, State
from pocketmoe.errors import printable
from pocketmoe.runtime.prefix_cache.entry import HEADER_BYTES, Header, pieces_of, read_entry, write_entry
from pocketmoe.runtime.prefix_cache.folder import Folder, NoRoom
from pocketmoe.runtime.prefix_cache.identity import block_names, identity

Arrays = Mapping[str, np.ndarray]  # a state's array under its input's name, of the manifest's dtype, in C order
# Arrays to be filled with the states of so many tokens: of the manifest's shapes, those that grow at least so long.
Prepare = Callable[[int], Arrays]

MEMORY_BYTES = 8 << 20  # what it takes at most: a buffer, and a look at the directory


class PrefixCache:
    """One model's part of a directory that many may share."""

    def __init__(self, folder: Folder, states: Sequence[State], root: bytes, chunk: int, model: str) -> None:
        """`root`: what decides the bits beside the tokens (`identity`). `model`: a name for people."""
        self._folder, self._root, self._chunk, self._model = folder, root, chunk, printable(model)[:100]
        self._growing = [state for state in states if state.growing_axis is not None]
        self._overwritten = [state for state in states if state.growing_axis is None]
        self._block_bytes = HEADER_BYTES + sum(state.nbytes(chunk) for state in self._growing)
        self._state_bytes = HEADER_BYTES + sum(state.nbytes(1) for state in self._overwritten)

    @classmethod
    def of(cls, folder: Folder, manifest: Manifest, chunk: int, model: str) -> Self:
        """Of a bundle whose prompts are computed in chunks of so many tokens."""
        return cls(folder, manifest.states, identity(manifest, chunk), chunk, model)

    @property
    def path(self) -> Path:
        return self._folder.path

    def longest(self, tokens: Sequence[int]) -> int:
        """How many of a text's first tokens seem to be kept: whole chunks. They are checked when they are restored."""
        found = 0
        for index, name in enumerate(self._names(tokens), 1):
            if self._growing and not self._folder.has(f"{name}.block", self._block_bytes):
                break
            if not self._overwritten or self._folder.has(f"{name}.state", self._state_bytes):
                found = index * self._chunk
        return found

    def restore(self, tokens: Sequence[int], prepare: Prepare) -> int:
        """Fill arrays with the longest beginning that is kept, and is undamaged; how many tokens that is.

        `prepare` is asked for arrays for so many tokens, anew for fewer where a file was damaged, which is removed.
        What arrays hold beyond the tokens that are returned means nothing.
        """
        while length := self.longest(tokens):
            names = [*self._names(tokens[:length])]
            perhaps = self._read(names, prepare(length))
            if perhaps == length:
                self._note_use(names)
                return length
            tokens = tokens[:perhaps]
        return 0

    def keep(self, tokens: Sequence[int], arrays: Arrays) -> str:
        """Keep the states after `tokens`, whole chunks, as far as they are not kept; a remark where that fails, or "".

        `arrays`: those that grow as long as the tokens, or longer.
        """
        names = [*self._names(tokens)]
        spared = {f"{name}.{kind}" for name in names for kind in ("block", "state")}
        kept = 0
        try:
            for index, name in enumerate(names):
                if self._growing and not self._folder.has(f"{name}.block", self._block_bytes):
                    self._write(f"{name}.block", self._block_bytes, index, self._block(arrays, index), spared)
                kept = index + 1
            if names and self._overwritten and not self._folder.has(f"{names[-1]}.state", self._state_bytes):
                self._write(f"{names[-1]}.state", self._state_bytes, len(names) - 1, self._snapshot(arrays), spared)
        except NoRoom:
            return self._remark(kept, names, "it may not be larger")
        except OSError as error:
            return self._remark(kept, names, error.strerror or str(error))
        finally:
            self._note_use(names[:kept])
        return ""

    def close(self) -> None:
        self._folder.close()

    def _names(self, tokens: Sequence[int]) -> Iterator[str]:
        return block_names(self._root, tokens, self._chunk)

    def _block(self, arrays: Arrays, index: int) -> Iterator[memoryview]:
        start = index * self._chunk
        for state in self._growing:
            yield from pieces_of(arrays[state.input], state.growing_axis, start, start + self._chunk)

    def _snapshot(self, arrays: Arrays) -> Iterator[memoryview]:
        for state in self._overwritten:
            yield from pieces_of(arrays[state.input])

    def _read(self, names: Sequence[str], arrays: Arrays) -> int:
        """How many tokens' states may be intact: all, or those before the damage."""
        if self._overwritten and not self._fill(f"{names[-1]}.state", self._snapshot(arrays)):
            return (len(names) - 1) * self._chunk
        for index, name in enumerate(names if self._growing else ()):
            if not self._fill(f"{name}.block", self._block(arrays, index)):
                return index * self._chunk
        return len(names) * self._chunk

    def _fill(self, name: str, pieces: Iterator[memoryview]) -> bool:
        try:
            with self._folder.reading(name) as file:
                intact = read_entry(file, name, pieces)
        except OSError:
            intact = False
        if not intact:
            self._folder.remove(name)
        return intact

    def _write(self, name: str, nbytes: int, index: int, pieces: Iterator[memoryview], spared: set[str]) -> None:
        """Raises OSError, NoRoom."""
        header = Header(name=name, model=self._model, tokens=(index + 1) * self._chunk)
        with self._folder.writing(name, nbytes, spared) as file:
            write_entry(file, header, pieces)

    def _note_use(self, names: Sequence[str]) -> None:
        """The first blocks stay longest: without them the others are of no use."""
        self._folder.used([*(f"{name}.block" for name in names), *(f"{name}.state" for name in names[-1:])])

    def _remark(self, kept: int, names: Sequence[str], why: str) -> str:
        kept_tokens, tokens = kept * self._chunk, len(names) * self._chunk
        return f"the prefix cache {self.path} keeps {kept_tokens} of {tokens} tokens ({why})"
