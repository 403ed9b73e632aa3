"""Rotary embeddings, however a model writes them, as one operator.

Halves or neighbours, the whole head or its first part, tables by halves, doubled or as complex numbers: each model has
slices, products and concatenations of its own, and each costs a launch in every layer of every token. Nothing is
concluded from how they are written: a part of the graph that takes one value and tables of positions is run, and what
it does to each number of a head says which rotation it is, if it is one; then it is run on many positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pocketmoe.export.cut.attention import ROTARY, Nodes
from pocketmoe.export.cut.lengths import (
    LAST_POSITION,
    PAST_LENGTH,
    POSITIONS,
    TOKEN_IDS,
    replace_value,
)
from pocketmoe.ort import Session, session_options

DOMAIN = "com.microsoft"

_ENDS = ("Concat", "Add", "Reshape", ROTARY)
_LINEAR = ("Neg", "Split", "Slice", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Gather", ROTARY)
_TOKENS = "tokens"
_WIDEST = 512  # of a head
_MOST = 40  # nodes of a rotation
_TURNED = [0, 2, 1, 3]
_FAR = 1000  # a position where no angle is 0
_PASTS, _NEW = (0, 1, 37, 4000, 100_000), (1, 2, 3, 40)
_NEAR = 2e-6  # what roundings may differ by, as a part of the largest number

Array = npt.NDArray[Any]
_Spec = tuple[ir.Value, int, int, int]  # a table: a value, how many numbers a token has in it, the first, the step


@dataclass(frozen=True)
class _Region:
    """Nodes that compute `end` from `source` and from values that follow from positions alone."""

    source: ir.Value
    end: ir.Value
    nodes: frozenset[ir.Node]
    tables: tuple[ir.Value, ...]


@dataclass(frozen=True)
class _Rotation:
    """Which numbers of a head turn by which: `first` and `second` in, at `places` out; the rest stays."""

    interleaved: bool
    width: int  # numbers of a head that turn
    order: tuple[int, ...] | None  # in which the operator's numbers then stand; None for as they are

    def pairs(self) -> tuple[Array, Array]:
        numbers = np.arange(self.width)
        return (numbers[::2], numbers[1::2]) if self.interleaved else tuple(np.split(numbers, 2))  # type: ignore[return-value]

    def of(self, x: Array, cosines: Array, sines: Array) -> Array:
        """x [..., S, D] turned by tables [S, width / 2]."""
        first, second = self.pairs()
        y = x.copy()
        y[..., first] = x[..., first] * cosines - x[..., second] * sines
        y[..., second] = x[..., first] * sines + x[..., second] * cosines
        return y if self.order is None else y[..., list(self.order)]


def fuse_rotary(model: ir.Model) -> int:
    """Parts of the graph that turn the heads of queries or keys become one RotaryEmbedding each; returns how many.

    What nothing reads any more stays for others to remove.
    """
    graph = model.graph
    known, places = _known(graph), {node: place for place, node in enumerate(graph)}
    covered: set[ir.Node] = set()
    found: list[tuple[_Region, _Part, _Rotation, list[_Spec]]] = []
    for node in reversed(list(graph)):  # the last of a rotation first
        if node in covered or node.op_type not in _ENDS or node.outputs[0] in known:
            continue
        region = _region(node.outputs[0], known, places)
        sizes = None if region is None else _sizes(region.end)
        if region is None or sizes is None or _shape(region.source) not in (sizes, _in_pairs(sizes)):
            continue
        part = _Part(model, region, sizes)
        rotation = part.rotation()
        specs = None if rotation is None else part.tables(rotation)
        if rotation is not None and specs is not None:
            covered |= region.nodes
            found.append((region, part, rotation, specs))
    tables: dict[_Spec, ir.Value] = {}
    for number, (region, part, rotation, specs) in enumerate(reversed(found)):
        _replace(graph, region, part, rotation, specs, tables, f"rotary_{number}")
    if found:
        model.opset_imports[DOMAIN] = 1
    return len(found)


def _known(graph: ir.Graph) -> set[ir.Value]:
    """Values that follow from positions and lengths, not from what the tokens are."""
    given = (POSITIONS, PAST_LENGTH, LAST_POSITION)
    found = {value for value in graph.inputs if value.name in given} | set(graph.initializers.values())
    for node in graph:
        counted = node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].name == TOKEN_IDS
        inner = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        if not inner and (counted or all(value is None or value in found for value in node.inputs)):
            found.update(node.outputs)
    return found


def _region(end: ir.Value, known: set[ir.Value], places: dict[ir.Node, int]) -> _Region | None:
    """The smallest part that ends here, begins with one value, and multiplies by tables at least twice."""
    pending, nodes = {end}, set[ir.Node]()
    tables: dict[ir.Value, None] = {}
    while len(nodes) <= _MOST:
        if len(pending) == 1 and len(tables) > 1:
            return _Region(next(iter(pending)), end, frozenset(nodes), tuple(tables))
        producers = [producer for value in pending if (producer := value.producer()) in places]
        if len(producers) < len(pending):
            return None
        node = max(producers, key=lambda n: places[n])  # type: ignore[index, arg-type]
        assert node is not None
        read = [value for value in node.inputs if value is not None]
        content = [value for value in read if value not in known]
        beside = [value for value in read if value in known and not value.is_initializer()]
        if not _is_linear(node, content):
            return None
        if node.op_type in ("Mul", ROTARY):
            tables.update(dict.fromkeys(beside))
        nodes.add(node)
        pending = (pending - set(node.outputs)) | set(content)
    return None


def _is_linear(node: ir.Node, content: Sequence[ir.Value]) -> bool:
    if node.op_type in ("Add", "Sub", "Concat"):
        return len(content) == len(node.inputs)
    return (node.op_type == "Mul" and len(content) == 1) or (node.op_type in _LINEAR and content == [node.inputs[0]])


def _shape(value: ir.Value) -> list[int | str] | None:
    """Its sizes, one name for all that are not fixed: that they are one shows when it is run."""
    if value.shape is None:
        return None
    sizes = [str(n) if isinstance(n, int) else str(n.value) for n in value.shape]
    return [int(n) if n.isdigit() else _TOKENS for n in sizes]


def _sizes(value: ir.Value) -> list[int | str] | None:
    """[1, heads, S, D], [1, S, heads, D] or [1, S, D] with the number of tokens as its symbol."""
    sizes = _shape(value)
    if sizes is None or len(sizes) not in (3, 4) or sizes[0] != 1:
        return None
    free = [axis for axis, n in enumerate(sizes) if isinstance(n, str)]
    if isinstance(sizes[-1], str) or sizes[-1] > _WIDEST:
        return None
    return sizes if free == [1] or (free == [2] and len(sizes) == 4) else None


def _in_pairs(sizes: list[int | str]) -> list[int | str]:
    """The same numbers, each two of a head apart: complex ones."""
    return [*sizes[:-1], int(sizes[-1]) // 2, 2]


class _Part:
    """A region of the graph that can be run at any positions."""

    def __init__(self, model: ir.Model, region: _Region, sizes: list[int | str]) -> None:
        self.tokens = next(axis for axis, n in enumerate(sizes) if isinstance(n, str))
        self.sizes, self.width = sizes, int(sizes[-1])
        self.heads = int(sizes[3 - self.tokens]) if len(sizes) == 4 else 1
        self._candidates = _ancestors(region.tables)
        inputs = [region.source, *(value for value in model.graph.inputs if value.name in _GIVEN)]
        wanted = [region.end, *(value for value in self._candidates if value is not region.end)]
        graph = ir.convenience.extract(model.graph, inputs, wanted)
        source = next(value for value in graph.inputs if value.name == region.source.name)
        source.type = source.type or ir.TensorType(ir.DataType.FLOAT)
        for value in graph.outputs:  # sizes by other names for the same
            value.shape, value.type = None, value.type or ir.TensorType(ir.DataType.FLOAT)
        part = ir.Model(graph, ir_version=model.ir_version)
        part.graph.opset_imports.update(model.opset_imports)
        self._source, self._given = str(region.source.name), _shape(region.source) or sizes
        self._session = Session(
            ir.to_proto(part).SerializeToString(), session_options(1), f"the part before {region.end.name}"
        )

    def run(self, x: Array, past: int, last: int) -> tuple[Array, list[Array]]:
        """x [heads, S, D] turned, and the candidates for tables, [S, any]."""
        new = x.shape[1]
        given: dict[str, Array] = {
            TOKEN_IDS: np.zeros((1, new), np.int64),
            PAST_LENGTH: np.array([past], np.int64),
            LAST_POSITION: np.array([last], np.int64),
            POSITIONS: np.arange(past, past + new, dtype=np.int64)[None],
            self._source: (x if self.tokens == 2 else x.swapaxes(0, 1)).reshape(
                [new if isinstance(n, str) else n for n in self._given]
            ),
        }
        y, *tables = self._session.run(None, {value.name: given[value.name] for value in self._session.inputs})
        y = y.reshape((self.heads, new, self.width) if self.tokens == 2 else (new, self.heads, self.width))
        return y if self.tokens == 2 else y.swapaxes(0, 1), tables

    def rotation(self) -> _Rotation | None:
        """What it does to each number of a head, if that is a rotation."""
        units = np.eye(self.width, dtype=np.float32)
        columns = [self.run(np.repeat(unit[None, None], self.heads, 0), _FAR, _FAR)[0][0, 0] for unit in units]
        matrix = np.stack(columns, 1)  # [out, in]
        for rotation in _rotations(matrix):
            return rotation
        return None

    def tables(self, rotation: _Rotation) -> list[_Spec] | None:
        """Where cosines and sines are: a value, how many numbers a token has in it, first and step; None if nowhere."""
        first, second = rotation.pairs()
        rng = np.random.default_rng(0)
        left: list[list[tuple[int, int, int, int]]] | None = None
        for past, new, beyond in ((past, new, beyond) for past in _PASTS for new in _NEW for beyond in (0, 200_000)):
            last = past + new - 1 + beyond
            unit = np.zeros((self.heads, new, self.width), np.float32)
            unit[..., first] = 1
            turned, found = self.run(unit, past, last)
            places = np.argsort(rotation.order) if rotation.order is not None else np.arange(self.width)
            wanted = [turned[0][:, places[numbers]] for numbers in (first, second)]
            rows = [array.reshape(new, -1) if array.size % new == 0 else None for array in found]
            if left is None:
                left = [list(_specs(rows, rotation.width // 2)) for _ in wanted]
            left = [
                [spec for spec in specs if _is(rows, spec, expected)]
                for specs, expected in zip(left, wanted, strict=True)
            ]
            if not all(left):
                return None
            x = rng.standard_normal((self.heads, new, self.width), np.float32)
            y, expected = self.run(x, past, last)[0], rotation.of(x, *wanted)
            if np.abs(y - expected).max() > _NEAR * np.abs(expected).max():
                return None
        assert left is not None
        return [(self._candidates[number], *rest) for number, *rest in (specs[0] for specs in left)]  # type: ignore[misc]


_GIVEN = {TOKEN_IDS, PAST_LENGTH, LAST_POSITION, POSITIONS}


def _rotations(matrix: Array) -> Iterator[_Rotation]:
    """The rotations that a matrix [out, in] of one position can be."""
    size = len(matrix)
    same = [row for row in range(size) if matrix[row, row] == 1 and np.count_nonzero(matrix[row]) == 1]
    width = size
    while width and width - 1 in same:
        width -= 1
    if width < 2 or width % 2:
        return
    evens, odds = list(range(0, width, 2)), list(range(1, width, 2))
    rest = list(range(width, size))
    for interleaved, order in ((False, None), (True, None), (True, (*evens, *odds, *rest))):
        rotation = _Rotation(interleaved, width, order)
        straight = matrix if order is None else matrix[np.argsort(order)]
        first, second = rotation.pairs()
        cosines, sines = straight[first, first], straight[second, first]
        units = np.eye(size, dtype=np.float32)
        if np.allclose(rotation.of(units, cosines, sines), matrix.T, rtol=1e-6, atol=1e-6):
            yield rotation


def _specs(rows: Sequence[Array | None], half: int) -> Iterator[tuple[int, int, int, int]]:
    """Ways to read [S, half] out of each [S, any]: whole, either half, every other number. Whole ones first."""
    for part in (1, 2):
        for number, array in enumerate(rows):
            if array is not None and array.shape[1] == half * part:
                yield from (
                    (number, half * part, first, step)
                    for first, step in ((0, 1), (half, 1), (0, 2), (1, 2))[: 4 if part == 2 else 1]
                )


def _is(rows: Sequence[Array | None], spec: tuple[int, int, int, int], expected: Array) -> bool:
    number, width, first, step = spec
    array = rows[number]
    if array is None or array.shape[1] != width:
        return False
    return bool(np.array_equal(array[:, first::step][:, : expected.shape[1]], expected))


def _ancestors(tables: Sequence[ir.Value]) -> list[ir.Value]:
    """Tables and what they are computed from, floats only, the nearest first."""
    found: dict[ir.Value, None] = {}
    todo = list(tables)
    while todo:
        value = todo.pop(0)
        producer = value.producer()
        if value in found or producer is None:
            continue
        if value.dtype in (None, ir.DataType.FLOAT):
            found[value] = None
        todo += [read for read in producer.inputs if read is not None]
    return list(found)


def _replace(
    graph: ir.Graph,
    region: _Region,
    part: _Part,
    rotation: _Rotation,
    specs: Sequence[_Spec],
    tables: dict[_Spec, ir.Value],
    prefix: str,
) -> None:
    """One operator in the place of a region, on rows of all heads where the heads were taken from such rows."""
    end, source = region.end, region.source
    producer = end.producer()
    assert producer is not None
    assert end.shape is not None
    nodes = Nodes(graph, producer, prefix)
    for spec in specs:
        if spec not in tables:
            tables[spec] = _table(nodes, spec, rotation.width // 2)
    heads, width, tokens = part.heads, part.width, end.shape[part.tokens]
    split = _split(source, part)
    rows = [1, tokens, heads * width]
    x = source if split is None else nodes.op("Reshape", [split, nodes.constant([1, -1, heads * width])], shape=rows)
    part_of_head = {} if rotation.width == width else {"rotary_embedding_dim": rotation.width}
    turn = ir.node(
        ROTARY,
        [x, nodes.constant([0]), *(tables[spec] for spec in specs)],
        attributes={"interleaved": int(rotation.interleaved), "num_heads": heads, **part_of_head},
        domain=DOMAIN,
        name=f"{prefix}_{ROTARY}",
    )
    (y,) = nodes.add(turn, [ir.DataType.FLOAT], [x.shape])
    if split is not None and len(part.sizes) == 4:
        y = nodes.op("Reshape", [y, nodes.constant([1, -1, heads, width])], shape=[1, tokens, heads, width])
    if rotation.order is not None:
        order = nodes.constant(list(rotation.order))
        y = nodes.op("Gather", [y, order], shape=y.shape, axis=len(part.sizes) - 1)
    if split is not None and part.tokens == 2:
        y = nodes.op("Transpose", [y], shape=[1, heads, tokens, width], perm=_TURNED)
    replace_value(end, y)


def _split(source: ir.Value, part: _Part) -> ir.Value | None:
    """What lies in memory as [1, S, heads * D] with the numbers of `source`; None where the heads lie apart."""
    if part.tokens == 1 or part.heads == 1:
        return source
    node = source.producer()
    turned = node is not None and node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == _TURNED
    return node.inputs[0] if node is not None and turned else None


def _table(nodes: Nodes, spec: _Spec, half: int) -> ir.Value:
    """Tables [S, half] of what a value has for each token."""
    value, width, first, step = spec
    rows = nodes.op("Reshape", [value, nodes.constant([-1, width])], shape=["table_rows", width])
    if width == half:
        return rows
    bounds = [nodes.constant([n]) for n in (first, first + half if step == 1 else width, 1, step)]
    return nodes.op("Slice", [rows, *bounds], shape=["table_rows", half])
