"""How much of a text's beginning its states can be taken back to: another text with that beginning goes on there.

What follows is to come out bit for bit as if all were computed anew. So a prefix ends where a prompt's chunk would end:
sums over more or fewer rows round otherwise, and what was decoded token by token is no chunk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from pocketmoe.runtime.engine.kv_cache import States


class Prefix:
    """The tokens that the states hold, and which of them were computed in whole chunks from the start."""

    def __init__(self, states: States, chunk: int, keeps: bool) -> None:
        """`keeps`: False where an earlier token depends on later ones (longrope), so that no prefix can be kept."""
        self._states, self._chunk, self._keeps = states, chunk, keeps
        self.reset()

    def reset(self) -> None:
        """The text is empty."""
        self.tokens: list[int] = []
        self._whole = 0  # tokens computed in whole chunks
        self._kept = 0  # tokens after which the states that do not grow were kept
        self._keep_after: Any = None  # the values of the chunk after whose segments they are being kept

    def starts(self, tokens: Sequence[int] | np.ndarray, position: int, values: Any) -> None:
        """A chunk begins its way through the segments, with `values` of its own."""
        if position == len(self.tokens):
            self._keep_after = None  # also that of a chunk that failed
        if self._keeps and not self._states.all_grow and self._is_whole(len(tokens)):
            self._keep_after, self._kept = values, 0  # until it is through, some kept states are of before it

    def passes(self, values: Any, outputs: Collection[str]) -> None:
        """A chunk has passed a segment with these outputs."""
        if values is self._keep_after:
            self._states.keep(outputs)

    def add(self, chunks: Sequence[np.ndarray]) -> None:
        """These chunks are through."""
        for tokens in chunks:
            if self._is_whole(len(tokens)):
                self._whole += self._chunk
            self.tokens += tokens.tolist()
        if self._keep_after is not None:
            self._keep_after, self._kept = None, self._whole

    def cut(self, length: int) -> int:
        """Take the states back to at most `length` tokens; returns how many are left, 0 where none can be kept."""
        kept = min(length, self._whole) // self._chunk * self._chunk
        if not self._states.all_grow and kept:
            kept = self._kept if self._kept <= kept else 0
        if not kept or not self._keeps:
            self._states.reset()
            self.reset()
            return 0
        self._states.cut(kept)
        self.tokens, self._whole = self.tokens[:kept], kept
        return kept

    def _is_whole(self, tokens: int) -> bool:
        """Whether a chunk that follows the text, and whole chunks at most, makes the whole chunks one more."""
        return tokens == self._chunk and self._whole == len(self.tokens)
