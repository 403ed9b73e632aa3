"""What an engine's texts leave on disk, and find there: one cache for all of them, used by one thread at a time."""

from __future__ import annotations

import threading
from collections import abc
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pocketmoe.bundle.progress import Progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.runtime.engine.memory_plan import CHUNK
from pocketmoe.runtime.engine.sequence import Sequence
from pocketmoe.runtime.prefix_cache.cache import PrefixCache
from pocketmoe.runtime.prefix_cache.folder import Folder

DEFAULT_BYTES = 2 * 10**9


@dataclass(frozen=True)
class PrefixCacheRequest:
    """Where prefixes are kept, and how many bytes they may take there, those of all models together."""

    path: Path
    most_bytes: int = DEFAULT_BYTES


class KeptPrefixes:
    """The cache of one bundle's texts. Close it after use."""

    def __init__(self, cache: PrefixCache, progress: Progress) -> None:
        """`progress` gets a remark, once, where something cannot be kept."""
        self._cache, self._progress = cache, progress
        self._alone = threading.Lock()
        self._said: set[str] = set()

    @classmethod
    def open(cls, request: PrefixCacheRequest | None, bundle: Bundle, exact: bool, progress: Progress) -> Self | None:
        """None where none is asked for. `exact`: whether every token gets its router's own experts.

        Raises BadInput, OutputError.
        """
        if request is None:
            return None
        if not exact:
            raise BadInput(
                "with --drop-cold or --prefer-cached, what a prompt computes depends on the memory: it is not kept",
                "Leave out these, or --prefix-cache.",
            )
        folder = Folder.make(request.path, request.most_bytes)
        return cls(PrefixCache.of(folder, bundle.manifest, CHUNK, bundle.root.name), progress)

    def restore(self, sequence: Sequence, tokens: abc.Sequence[int], most: int, in_memory: int) -> int:
        """Have a text begin with the first of `tokens`, at most `most`, of which more is kept on disk than in memory.

        Returns how many these are; 0 where there are none: the text is then as it was or, where a file was damaged,
        empty.
        """
        tokens = tokens[:most]
        if not sequence.layout.keeps:
            return 0
        with self._alone:
            if self._cache.longest(tokens) <= in_memory:
                return 0
            length = self._cache.restore(tokens, sequence.refill)
        sequence.refilled(tokens[:length])
        return length

    def keep(self, sequence: Sequence) -> None:
        """Write what a text has computed in whole chunks, as far as that is not kept."""
        remark = ""
        with self._alone:
            for length in sequence.kept_lengths():
                remark = self._cache.keep(sequence.tokens[:length], sequence.kept_states(length)) or remark
        if remark and remark not in self._said:
            self._said.add(remark)
            self._progress(remark, 0, 0)

    def close(self) -> None:
        with self._alone:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
