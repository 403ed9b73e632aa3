"""The rows of a batch as texts of an engine, and what transformers takes for their cache.

transformers hands a cache from one call of a model to the next. Ours holds no states: it says which texts the rows are,
and how they came to be. The engine has room for some texts; as long as a row's is among them, a call computes its new
tokens alone. Where another has taken the place, the text is computed again in the same steps, and so to the same bits:
a cache may be copied, cropped, kept for later and handed over twice.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from pocketmoe.errors import BadInput, OverBudget
from pocketmoe.runtime import model
from pocketmoe.runtime.engine import sequence as text
from pocketmoe.runtime.engine.engine import Feed, feeds_of
from pocketmoe.runtime.engine.segments import Rows

_DECODED_TOGETHER = 16  # tokens of a text that is computed again, each by itself


@dataclass(eq=False)
class Row:
    """A text: `pieces`, token ids in the steps in which they came, after `padding` that is none of it."""

    padding: int
    pieces: list[list[int]] = field(default_factory=list[list[int]])
    place: text.Sequence | None = None  # of the engine's, where it was last

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __deepcopy__(self, _: Any) -> Self:
        """The same text; who goes on with it first has the place."""
        return replace(self, pieces=[*self.pieces])

    def crop(self, length: int) -> None:
        """Forget what follows the first `length` tokens."""
        left, kept = length, list[list[int]]()
        for piece in self.pieces:
            if left > 0:
                kept.append(piece[:left])
            left -= len(piece)
        self.pieces, self.place = kept, None


class TextsCache:
    """What transformers takes for `past_key_values`: the texts of a batch's rows so far. Lengths include padding."""

    is_compileable = False
    is_croppable = True

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        """Tokens of each row, its padding among them."""
        return len(self.rows[0]) + self.rows[0].padding if self.rows else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        """No limit but the context."""
        return -1

    def crop(self, max_length: int) -> None:
        """Forget all but the first `max_length` tokens; below 0: so many from the end."""
        length = self.get_seq_length()
        wanted = max_length if max_length >= 0 else max(0, length + max_length)
        for row in self.rows if wanted < length else []:
            row.crop(wanted - row.padding)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Have the rows of these numbers, in this order; some may come twice."""
        self.rows = [replace(self.rows[int(index)]) for index in beam_idx]
        for row in self.rows:
            row.pieces = [*row.pieces]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row `repeats` times."""
        self.reorder_cache([index for index in range(len(self.rows)) for _ in range(repeats)])

    def reset(self) -> None:
        """Have no texts."""
        self.rows = []

    def __len__(self) -> int:
        return len(self.rows)


class Texts:
    """The texts of a loaded model, for one caller after the other who says what follows each."""

    def __init__(self, loaded: model.Model) -> None:
        """`loaded` is used by nobody else."""
        self._engine, self._prefixes = loaded.engine, loaded.prefixes
        self.alone = threading.RLock()  # whoever computes holds it
        self._places = self._engine.sequences[: self._engine.at_once]  # what was of use last stands last
        self._owners: dict[int, Row] = {}  # by the place's number: whose text it holds

    @property
    def most(self) -> int:
        """How many rows there may be."""
        return len(self._places)

    def append(self, rows: Sequence[Row], tokens: Sequence[list[int]], wanted: Rows) -> list[np.ndarray]:
        """Compute what follows each row; the logits of its last token, or of all of them, float32 [tokens, vocab].

        Raises BadInput for more rows than there are places, ContextFull or what the engine raises.
        """
        if len(rows) > self.most:
            raise BadInput(
                f"a batch of {len(rows)} texts needs as many places as texts, there are {self.most}",
                f"Load the model with sequences={len(rows)}.",
            )
        with self.alone:
            computed = [
                self._come_back(row, following, rows, wanted) for row, following in zip(rows, tokens, strict=True)
            ]
            todo = [
                self._feeds(row, following[skipped:], wanted)
                for row, following, skipped in zip(rows, tokens, computed, strict=True)
            ]
            try:
                logits = self._take(todo)
            except BaseException:
                for row in rows:
                    self._leave(row)
                raise
            for row, following in zip(rows, tokens, strict=True):
                row.pieces.append(following)
            return [found[-len(following) :] for found, following in zip(logits, tokens, strict=True)]

    def keep(self) -> None:
        """Write what the texts' prompts have computed to disk, where that is wanted."""
        if self._prefixes:
            with self.alone:
                for place in self._places:
                    self._prefixes.keep(place)

    def _come_back(self, row: Row, following: list[int], others: Sequence[Row], wanted: Rows) -> int:
        """See to it that a row has its text in a place; of a new text, how many of its tokens are there already."""
        if row.place is not None and self._owners.get(id(row.place)) is row:
            self._used(row.place)
            return 0
        if not row.pieces:
            return self._find_place(row, following, 0 if wanted == "all" else len(following) - 1, others)
        kept = self._find_place(row, row.tokens, len(row), others)
        anew = self._places[0].layout.computed_anew_beyond is not None  # which is a matter of single steps
        for piece in row.pieces if anew else _merged(row.pieces):
            rest = type(piece)(piece[kept:])
            kept = max(0, kept - len(piece))
            if rest:
                self._take([self._feeds(row, rest, "none")])
        return 0

    def _find_place(self, row: Row, tokens: list[int], most: int, others: Sequence[Row]) -> int:
        """Give a row the place that has most of its text's beginning, or a copy of that; how many tokens are kept."""
        taken = {id(other.place) for other in others if other is not row and self._owns(other)}
        free = [place for place in self._places if id(place) not in taken]
        kept = {id(place): place.reusable(tokens, most) for place in self._places}
        best = max(self._places, key=lambda place: (kept[id(place)], id(place) not in taken))
        empty = [place for place in free if not place.tokens]
        place = best if kept[id(best)] and id(best) not in taken else (empty or free)[0]
        self._owners[id(place)], row.place = row, place
        self._used(place)
        try:
            if self._prefixes and (restored := self._prefixes.restore(place, tokens, most, kept[id(best)])):
                return restored
            return place.truncate(kept[id(best)]) if place is best else place.fork(best, kept[id(best)])
        except MemoryError as error:
            raise OverBudget("a text's beginning needs more memory than there is for it") from error

    def _owns(self, row: Row) -> bool:
        return row.place is not None and self._owners.get(id(row.place)) is row

    def _used(self, place: text.Sequence) -> None:
        self._places.remove(place)
        self._places.append(place)

    def _leave(self, row: Row) -> None:
        """Its place holds its text no longer, or more than that."""
        if row.place is not None:
            self._owners.pop(id(row.place), None)
            row.place = None

    def _feeds(self, row: Row, tokens: list[int], wanted: Rows) -> list[Feed]:
        assert row.place is not None, "a text that is computed has its place"
        todo = row.place.to_feed(tokens)
        single = (isinstance(tokens, _Decoded) or len(tokens) == 1) and len(todo) == len(tokens)
        return feeds_of(row.place, todo, wanted, decoding=single, apart=single)

    def _take(self, todo: list[list[Feed]]) -> list[np.ndarray]:
        """Take each row's chunks through the layers, as many together as there is room for; logits by row."""
        found: list[list[np.ndarray]] = [[] for _ in todo]
        left = {number: feeds for number, feeds in enumerate(todo) if feeds}
        while left:
            decoding = all(feed.decoding for feeds in left.values() for feed in feeds)
            room = _DECODED_TOGETHER if decoding else self._engine.chunks_together
            numbers = list(left) if decoding else [*left][:room]
            each = max(1, room // len(numbers)) if left[numbers[0]][0].sequence.layout.local else 1
            batch = [(number, feed) for number in numbers for feed in left[number][:each]]
            for (number, _), logits in zip(batch, self._engine.step([feed for _, feed in batch]), strict=True):
                found[number].append(logits)
            left = {number: feeds for number in left if (feeds := left[number][each if number in numbers else 0 :])}
        return [rows[0] if len(rows) == 1 else np.concatenate(rows) for rows in found]


class _Decoded(list[int]):
    """Tokens each of which came by itself."""


def _merged(pieces: Sequence[list[int]]) -> list[list[int]]:
    """Pieces with those of one token, one after the other, put together."""
    merged: list[list[int]] = []
    for piece in pieces:
        if len(piece) == 1 and merged and isinstance(merged[-1], _Decoded):
            merged[-1] += piece
        else:
            merged.append(_Decoded(piece) if len(piece) == 1 else piece)
    return merged
