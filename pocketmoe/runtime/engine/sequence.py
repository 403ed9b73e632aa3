"""One text in an engine: its tokens, and the states that they have left. An engine holds several.

A text that begins like another goes on from what was computed of that beginning, and is to come out bit for bit as if
all were computed anew. So a beginning that is kept ends where a prompt's chunk would end: sums over more or fewer rows
round otherwise, and what was decoded token by token is no chunk. Caches that grow keep every such beginning; of states
that do not, snapshots are kept, as many as were paid for.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.manifest import Inputs, State
from pocketmoe.errors import BadInput
from pocketmoe.runtime.engine.kv_cache import Fixed, States

Values = dict[str, ort.OrtValue]


@dataclass(frozen=True)
class Layout:
    """What all texts of an engine have in common."""

    inputs: Inputs
    states: tuple[State, ...]
    capacity: int  # tokens of text
    chunk: int  # tokens of a prompt that are computed together
    local: bool  # chunks of one text can go through the layers together
    keeps: bool  # False where an earlier token depends on later ones (longrope), so that no beginning can be kept
    snapshots: int = 1  # of states that do not grow, for beginnings to go back to
    rolls_back: bool = False  # a step that fails leaves the text as it was, for which such states are kept too
    computed_anew_beyond: int | None = None  # see the manifest


@dataclass
class _Making:
    """A snapshot that a chunk, by its `values`, leaves on its way through the segments."""

    values: Values
    length: int
    fixed: Fixed = field(default_factory=lambda: Fixed())


class Sequence:
    """A text. The engine's steps append to it; `tokens` are those that are through all layers.

    Its states have the manifest's dtypes and shapes, such as [1, heads, tokens, head size] for a cache of keys.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.states = States(layout.states, layout.capacity)
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self.states.reset()
        self.tokens: list[int] = []
        self._whole = 0  # tokens that were computed in whole chunks from the start on
        self._snapshots: dict[int, Fixed] = {}  # by the tokens after which they were taken, in that order
        self._in_flight: list[int] = []  # tokens that a step is taking through the layers
        self._making: _Making | None = None
        self._before: Fixed = {}  # the states that do not grow as they were before a step

    @property
    def length(self) -> int:
        """Tokens, those that are on their way through the layers included."""
        return len(self.tokens) + len(self._in_flight)

    def state(self, name: str) -> np.ndarray:
        """The KV cache or recurrent state whose input the manifest calls `name`, after the text so far.

        Of the manifest's shape and dtype, a cache with as many tokens as the text; valid until the text changes.
        """
        return self.states.contents(name, self.length)

    def to_feed(self, tokens: abc.Sequence[int]) -> list[int]:
        """What has to be computed to append `tokens`: they alone or, where a text beyond some length is computed
        anew, all of it, which is then forgotten.

        Raises BadInput when the text would outgrow the capacity.
        """
        wanted, limit = self.length + len(tokens), self.layout.computed_anew_beyond
        if wanted > self.layout.capacity:
            raise BadInput(f"{wanted} tokens do not fit the {self.layout.capacity} asked for")
        if limit is None or not 0 < self.length <= limit < wanted:
            return [*tokens]
        before = self.tokens
        self.reset()
        return [*before, *tokens]

    def reusable(self, tokens: abc.Sequence[int], most: int | None = None) -> int:
        """How many of a text's first tokens, at most `most`, this one has kept, so that the text can go on there."""
        shared = common_prefix(self.tokens, tokens)
        return self._kept(shared if most is None else min(shared, most))

    def truncate(self, length: int) -> int:
        """Forget what follows the text's first `length` tokens, and of those what has to be computed anew.

        Returns how many tokens are kept, 0 where none can be.
        """
        kept = self._kept(length)
        if not kept:
            self.reset()
            return 0
        self._snapshots = {at: fixed for at, fixed in self._snapshots.items() if at <= kept}
        self.states.cut(kept, self._snapshots.get(kept, {}))
        self.tokens, self._whole = self.tokens[:kept], kept
        return kept

    def fork(self, other: Sequence, length: int) -> int:
        """Become a copy of what `other` has kept of its first `length` tokens; returns how many these are."""
        kept = other._kept(length)
        self.reset()
        if kept:
            self.states.copy(other.states, kept)
            self._snapshots = {at: fixed for at, fixed in other._snapshots.items() if at <= kept}
            self.states.values |= self._snapshots.get(kept, {})
            self.tokens, self._whole = other.tokens[:kept], kept
        return kept

    def kept_lengths(self) -> list[int]:
        """Which beginnings a text can go on from, in tokens; of caches alone the longest, which holds all others."""
        if not self.layout.keeps or not self._whole:
            return []
        return [self._whole] if self.states.all_grow else [at for at in self._snapshots if at <= self._whole]

    def kept_states(self, length: int) -> dict[str, np.ndarray]:
        """The states after the first `length` tokens, one of `kept_lengths`, by their inputs' names: views in C order.

        Those that grow may be longer. Valid until the text changes.
        """
        fixed = {name: value.numpy() for name, value in self._snapshots.get(length, {}).items()}
        return {**self.states.buffers(), **fixed}

    def refill(self, length: int) -> dict[str, np.ndarray]:
        """Forget the text, for that of `length` tokens whose states will be written into what is returned, as
        `kept_states` has them; then call `refilled`.
        """
        self.reset()
        return self.states.make_room(length)

    def refilled(self, tokens: abc.Sequence[int]) -> None:
        """The states are those after `tokens`, whole chunks; without any, of no text."""
        if not tokens:
            self.reset()
            return
        if not self.states.all_grow:
            self._snapshots[len(tokens)] = self.states.fixed()
        self.tokens, self._whole = [*tokens], len(tokens)

    def begin_step(self) -> None:
        """A step begins, of which this text's chunks are a part."""
        self._before = self.states.fixed() if self.layout.rolls_back else {}

    def start_chunk(self, tokens: abc.Sequence[int], last: int | None = None) -> Values:
        """The first segment's inputs for a chunk, which is then on its way through the layers.

        `last`: the position of the last token that is being fed, where that is in a later chunk.
        """
        names, before = self.layout.inputs, self.length
        self._in_flight += tokens
        ids = np.array([tokens], np.int64)
        inputs = {names.token_ids: ids}
        if names.positions:
            inputs[names.positions] = np.arange(before, self.length, dtype=np.int64)[None]
        if names.past_length:
            inputs[names.past_length] = np.array([before], np.int64)
        if names.last_position:
            inputs[names.last_position] = np.array([self.length - 1 if last is None else last], np.int64)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        values |= self.states.with_room(self.length)
        if len(tokens) == self.layout.chunk and self._whole == before:
            self._whole = self.length
            if self.layout.keeps and not self.states.all_grow:
                self._drop_snapshot()
                self._making = _Making(values, self._whole)
        return values

    def advance(self, values: Values, outputs: abc.Collection[str]) -> None:
        """The chunk that has these values has passed a segment with these outputs."""
        self.states.advance(values, outputs)
        if self._making and values is self._making.values:
            self._making.fixed |= self.states.fixed(outputs)

    def end_step(self) -> None:
        """The chunks that have started are through."""
        self.tokens += self._in_flight
        self._in_flight, self._before = [], {}
        if self._making:
            self._snapshots[self._making.length], self._making = self._making.fixed, None

    def roll_back(self) -> None:
        """The chunks that have started are not through, and may have changed some states: back to before them."""
        before, self._before = self._before, {}
        self._in_flight, self._making = [], None
        self._whole = min(self._whole, len(self.tokens))
        if self.states.all_grow or self.layout.rolls_back:
            self.states.cut(len(self.tokens), before)
        else:
            self.truncate(len(self.tokens))

    def _kept(self, most: int) -> int:
        """The longest beginning of at most `most` tokens that this text can be taken back to."""
        whole = min(most, self._whole) // self.layout.chunk * self.layout.chunk
        if not self.layout.keeps or whole <= 0:
            return 0
        return whole if self.states.all_grow else max((at for at in self._snapshots if at <= whole), default=0)

    def _drop_snapshot(self) -> None:
        """Give up a snapshot where there are as many as may be, for the one after the chunk that starts."""
        if len(self._snapshots) >= self.layout.snapshots:
            del self._snapshots[least_useful([*self._snapshots, self._whole])]


def least_useful(lengths: abc.Sequence[int]) -> int:
    """Which beginning to give up of those of these lengths, which rise, but for the last: where the least is lost.

    A text that parts from this one somewhere goes on at the longest beginning before that. So the one goes that leaves
    the narrowest gap, and those that stay are about evenly spread.
    """
    starts = [0, *lengths]
    gaps = [after - before for before, after in zip(starts, lengths[1:], strict=False)]
    return lengths[gaps.index(min(gaps))]


def common_prefix(first: abc.Sequence[int], second: abc.Sequence[int]) -> int:
    """How many tokens two texts have in common from their start on."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:length]) != np.asarray(second[:length]))
    return int(differ[0]) if len(differ) else length
