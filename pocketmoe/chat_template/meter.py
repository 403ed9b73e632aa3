"""What a chat template may use: steps and bytes are counted, so that a hostile one ends soon and in little memory.

Time is not measured: the same template and conversation use the same steps everywhere. Bytes are counted when they
are made. Only large texts that nothing refers to any more are given back, as of a template that appends message after
message to one text; so the limit of bytes is one of memory too.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (a template computes with values of any kind: isinstance tells a container's class, never what is in it)

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any, NamedTuple

STEPS = 500_000  # operations, each on at most about a kilobyte; together about a second
STEPS_PER_BYTE = 4  # of the conversation
BYTES = 16 << 20
BYTES_PER_BYTE = 64  # of the conversation
MAX_DEPTH = 200  # of lists in lists: hashing, comparing and printing them recurse
MAX_INTEGER_BITS = 1 << 14  # 4,932 digits, about where Python refuses to print one
_LARGE_BYTES = 64 << 10  # of a text that is worth giving back
_ITEM_BYTES = 32  # an object, and the reference to it

_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView, range)


class LimitExceeded(Exception):
    """A template used more than it may."""


class Size(NamedTuple):
    """How large a value is when it is written out: what occurs twice counts twice."""

    nbytes: int
    nodes: int = 1
    depth: int = 0


class Meter:
    """Counts what one rendering uses. Raises LimitExceeded when that is more than the limits allow.

    The limits grow with the conversation, which is the user's own: templates copy it several times.
    """

    def __init__(self, *given: Any) -> None:
        self.steps_left, self.bytes_left = 1 << 62, 1 << 62
        self._known: dict[int, tuple[Any, Size]] = {}  # containers by id; held, so that no id is used again
        self._large: dict[int, Any] = {}  # texts by id
        size = self.total(given)
        self.max_steps = self.steps_left = STEPS + STEPS_PER_BYTE * size.nbytes
        self.max_bytes = self.bytes_left = BYTES + BYTES_PER_BYTE * size.nbytes

    @property
    def steps(self) -> int:
        """Steps used so far."""
        return self.max_steps - self.steps_left

    @property
    def nbytes(self) -> int:
        """Bytes made so far."""
        return self.max_bytes - self.bytes_left

    def work(self, steps: int) -> None:
        """Count steps, before they are done."""
        self.steps_left -= steps
        if self.steps_left < 0:
            raise LimitExceeded(f"it takes more than {self.max_steps:,} steps")

    def allow(self, nbytes: int) -> None:
        """Refuse what may take so many bytes, when that is more than is left."""
        if nbytes > self.bytes_left:
            self._give_back()
        if nbytes > self.bytes_left:
            raise LimitExceeded(f"it makes more than {self.max_bytes:,} bytes")

    def produce(self, nbytes: int) -> None:
        """Count bytes that were made, or are about to be."""
        self.allow(nbytes)
        self.bytes_left -= nbytes

    def size(self, value: Any) -> Size:
        """The size of a value; what a list or mapping holds is looked at once."""
        if isinstance(value, str):
            return Size(len(value) if value.isascii() else 4 * len(value))
        if isinstance(value, bytes | bytearray):
            return Size(len(value))
        if isinstance(value, int):
            return Size(_ITEM_BYTES + value.bit_length() // 3)
        if isinstance(value, _CONTAINERS):
            return self._container(value)
        return Size(2 * _ITEM_BYTES)

    def total(self, values: Iterable[Any]) -> Size:
        """The size of several values together."""
        nbytes = nodes = depth = 0
        for value in values:
            size = self.size(value)
            nbytes, nodes, depth = nbytes + size.nbytes, nodes + size.nodes, max(depth, size.depth)
        return Size(nbytes, nodes, depth)

    def keep(self, value: Any) -> Any:
        """Count what an operation made. What an iterator yields is counted as it is pulled."""
        if isinstance(value, str | bytes | bytearray):
            nbytes = self.size(value).nbytes
            self.produce(2 * _ITEM_BYTES + nbytes)
            if nbytes >= _LARGE_BYTES:
                self._large[id(value)] = value
        elif isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise LimitExceeded(f"it computes a number of more than {MAX_INTEGER_BITS:,} bits")
        elif isinstance(value, _CONTAINERS):
            if id(value) not in self._known:
                self._count_new(value)
        elif isinstance(value, Iterator):
            return self._pulled(value)
        return value

    def _give_back(self) -> None:
        """Uncount the large texts that only the meter refers to, and let go of them."""
        texts = [*self._large.values()]
        self._large.clear()
        self.work(len(texts))
        for text, references in zip(texts, _references(texts), strict=True):
            if references > _ONE_REFERENCE:
                self._large[id(text)] = text
            else:
                self.bytes_left += self.size(text).nbytes

    def _count_new(self, value: Any) -> None:
        """Count a new container and what is new in it. Its items existed before, or come from splitting one text."""
        self.produce(2 * _ITEM_BYTES)
        if isinstance(value, range):
            return
        for item in _items(value):
            self.work(1)
            self.produce(_ITEM_BYTES)
            if not isinstance(item, int):
                self.keep(item)
        self._container(value)

    def _container(self, value: Any) -> Size:
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, range):
            return Size(_ITEM_BYTES * len(value), max(1, len(value)), 1)
        nbytes, nodes, depth = 2 * _ITEM_BYTES, 1, 0
        for item in _items(value):
            self.work(1)
            size = self.size(item)
            nbytes, nodes, depth = nbytes + size.nbytes + _ITEM_BYTES, nodes + size.nodes, max(depth, size.depth)
        if depth >= MAX_DEPTH:
            raise LimitExceeded(f"it nests lists more than {MAX_DEPTH} deep")
        self.allow(nbytes)
        size = Size(nbytes, nodes, depth + 1)
        self._known[id(value)] = value, size
        return size

    def _pulled(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.work(1)
            yield self.keep(value)


def _items(container: Any) -> Iterator[Any]:
    if isinstance(container, Mapping):
        for key, value in container.items():
            yield key
            yield value
    else:
        yield from container


def _references(values: list[Any]) -> list[int]:
    return [sys.getrefcount(value) for value in values]


_ONE_REFERENCE = _references([" ".join(["one", "reference"])])[
    0
]  # what getrefcount says of a value that only a list refers to

CURRENT: ContextVar[Meter] = ContextVar("meter")
