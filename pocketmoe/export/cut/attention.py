"""Attention and caches that grow in place.

ONNX Runtime's GroupQueryAttention appends to its caches itself, in a buffer that may be longer than what is filled.
Caches of one vector a token, which other operators read, come with room for the new tokens instead: the graph writes
them there, and as the vectors lie one after the other, the runtime can hand over the first of a longer buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture.attention import OP_TYPE
from pocketmoe.export.cut.lengths import PAST_LENGTH, TOKEN_COUNT, integers_of, is_constant, replace_value, size_of

_FLOAT, _INT32, _INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
_Sizes = Sequence[int | str | ir.SymbolicDim]
ROTARY = "RotaryEmbedding"
_FUSED, _INTERLEAVED = "GroupQueryAttention", "rotary_interleaved"
_TEXT = "text_tokens"  # how long a cache is that has room for the new tokens


class Nodes:
    """Adds nodes to a graph before one of its own."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str) -> None:
        self._graph, self._before, self._prefix = graph, before, prefix
        self._count = 0

    def op(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        dtype: ir.DataType = _FLOAT,
        shape: _Sizes | ir.Shape | None = None,
        **attributes: float | list[int],
    ) -> ir.Value:
        """A node of ONNX's own domain; its output."""
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{self._prefix}_{op_type}_{self._count}")
        self._count += 1
        return self.add(node, [dtype], [shape])[0]

    def add(
        self, node: ir.Node, dtypes: list[ir.DataType], shapes: Sequence[_Sizes | ir.Shape | None]
    ) -> list[ir.Value]:
        """Put a node in; its outputs get names, types and shapes."""
        for number, (value, dtype, shape) in enumerate(zip(node.outputs, dtypes, shapes, strict=True)):
            value.name, value.type = f"{node.name}.{number}", ir.TensorType(dtype)
            value.shape = shape if shape is None or isinstance(shape, ir.Shape) else ir.Shape(shape)
        self._graph.insert_before(self._before, node)
        return list(node.outputs)

    def constant(self, value: Sequence[int] | float, dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """A constant of the graph."""
        array: npt.NDArray[Any] = np.array(value, dtype)
        name = f"{self._prefix}_constant_{self._count}"
        self._count += 1
        made = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        made.dtype, made.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self._graph.register_initializer(made)
        return made


def fuse_attention(model: ir.Model) -> int:
    """Each Attention node with its cache's two Concat becomes a GroupQueryAttention; returns how many.

    Raises UnsupportedModel for one whose keys and values are not a cache and what is appended to it.
    """
    graph = model.graph
    found = [node for node in graph if node.op_type == OP_TYPE and node.domain == "pocketmoe"]
    lengths: tuple[ir.Value, ir.Value] | None = None
    for number, node in enumerate(found):
        nodes = Nodes(graph, node, f"attention_{number}")
        lengths = lengths or _lengths(nodes, node)
        _fuse(nodes, graph, node, lengths)
    if found:
        model.opset_imports["com.microsoft"] = 1
    return len(found)


def _fuse(nodes: Nodes, graph: ir.Graph, node: ir.Node, lengths: tuple[ir.Value, ir.Value]) -> None:
    query, key, value, bias = node.inputs[:4]
    appended = [_appended(present, node) for present in (key, value)]
    heads, kv_heads = size_of(_shape(query)[1]), size_of(_shape(key)[1])
    widths = [size_of(_shape(present)[3]) for present in (key, value)]
    width = max(widths)  # one for keys and values: the narrower are filled up with zeros, which change no product
    tokens = _shape(query)[2]
    rows = [
        _merged(nodes, states, size_of(_shape(states)[3]), width, tokens)
        for states in (query, *(new for _, new in appended))
    ]
    for past, _ in appended:
        past.shape = ir.Shape([*list(_shape(past))[:3], width])
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": node.attributes["scale"].as_float()}
    caches = [past for past, _ in appended]
    sinks = node.inputs[4] if len(node.inputs) > 4 else None
    inputs = [*rows, *caches, *lengths, None, None, None, bias, *([sinks] if sinks is not None else [])]
    fused = ir.node(
        "GroupQueryAttention",
        inputs,
        attributes=attributes,
        domain="com.microsoft",
        num_outputs=3,
        name=f"{node.name}_fused",
    )
    cached = [ir.Shape([*list(_shape(present))[:3], width]) for present in (key, value)]
    y, *presents = nodes.add(fused, [_FLOAT] * 3, [[1, tokens, heads * width], *cached])
    for old, new in zip((key, value), presents, strict=True):
        assert old is not None
        concat = old.producer()
        assert concat is not None
        replace_value(old, new)
        node.replace_input_with(1 if old is key else 2, None)
        graph.remove(concat, safe=True)
    y = nodes.op("Reshape", [y, nodes.constant([1, -1, heads, width])], shape=[1, tokens, heads, width])
    if widths[1] != width:
        bounds = [nodes.constant([n]) for n in (0, widths[1], 3)]
        y = nodes.op("Slice", [y, *bounds], shape=[1, tokens, heads, widths[1]])
    y = nodes.op("Transpose", [y], shape=[1, heads, tokens, widths[1]], perm=[0, 2, 1, 3])
    replace_value(node.outputs[0], y)
    graph.remove(node, safe=True)


def _shape(value: ir.Value | None) -> ir.Shape:
    if value is None or value.shape is None:
        raise UnsupportedModel(f"the shape of {value} is not known")
    return value.shape


def _appended(present: ir.Value | None, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The cache, a graph input, and the new states that a Concat appends to it for nothing but this attention."""
    concat = None if present is None else present.producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
        raise UnsupportedModel(f"the attention {node.name!r} reads keys and values that are not appended to a cache")
    past, new = concat.inputs
    assert past is not None
    assert new is not None
    assert present is not None
    alone = len(past.uses()) - sum(use.node.op_type == "Shape" for use in past.uses()) == 1
    if not past.is_graph_input() or not alone or any(use.node is not node for use in present.uses()):
        raise UnsupportedModel(f"the cache of the attention {node.name!r} is read by others too")
    return past, new


def _merged(nodes: Nodes, states: ir.Value | None, own: int, width: int, tokens: int | ir.SymbolicDim) -> ir.Value:
    """States [1, heads, S, own] as [1, S, heads * width], the rest of each head zeros."""
    heads = size_of(_shape(states)[1])
    if own != width:
        pads = nodes.constant([0, 0, 0, 0, 0, 0, 0, width - own])
        states = nodes.op("Pad", [states, pads], shape=[1, heads, tokens, width])
    turned = nodes.op("Transpose", [states], shape=[1, tokens, heads, width], perm=[0, 2, 1, 3])
    return nodes.op("Reshape", [turned, nodes.constant([1, -1, heads * width])], shape=[1, tokens, heads * width])


def _lengths(nodes: Nodes, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The place of the last key, int32 [1], and how many keys there are, int32 []."""
    past, _ = _appended(node.inputs[1], node)
    before = nodes.op("Shape", [past], _INT64, [1], start=2, end=3)
    new = nodes.op("Shape", [node.inputs[0]], _INT64, [1], start=2, end=3)
    total = nodes.op("Cast", [nodes.op("Add", [before, new], _INT64, [1])], _INT32, [1], to=_INT32.value)
    return nodes.op("Sub", [total, nodes.constant([1], np.int32)], _INT32, [1]), nodes.op(
        "Squeeze", [total], _INT32, []
    )


def turn_in_attention(model: ir.Model) -> int:
    """Attention turns the queries and keys itself that one table turns before it; returns how many do."""
    graph = model.graph
    padded: dict[tuple[ir.Value, ir.Value], list[ir.Value]] = {}
    changed = 0
    for node in list(graph):
        turns = [None if value is None else value.producer() for value in node.inputs[:2]]
        query, key = turns if node.op_type == _FUSED else (None, None)
        if query is None or key is None or not _alike(query, key) or node.attributes.get_int("do_rotary", 0):
            continue
        cosines, sines = query.inputs[2:4]
        assert cosines is not None
        assert sines is not None
        width = size_of(_shape(node.inputs[3])[3])
        half = size_of(_shape(cosines)[1])
        if width % 16 or half % 8 or _is_wider(query, width, half):
            continue
        pair = cosines, sines
        if pair not in padded:
            padded[pair] = _padded(graph, node, pair, f"tables_{len(padded)}")
        inputs = [*node.inputs, *[None] * (10 - len(node.inputs))]
        inputs[:2], inputs[7:10] = [query.inputs[0], key.inputs[0]], padded[pair]
        attributes = {name: value for name, value in node.attributes.items() if name not in ("do_rotary", _INTERLEAVED)}
        turned = ir.Node(
            "com.microsoft",
            node.op_type,
            inputs,
            attributes=[
                *attributes.values(),
                ir.AttrInt64("do_rotary", 1),
                ir.AttrInt64(_INTERLEAVED, query.attributes.get_int("interleaved", 0)),
            ],
            num_outputs=len(node.outputs),
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        graph.insert_before(node, turned)
        for old, new in zip(node.outputs, turned.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            replace_value(old, new)
        graph.remove(node, safe=True)
        changed += 1
    return changed


def _alike(query: ir.Node, key: ir.Node) -> bool:
    """Whether both turn rows [1, S, heads * width] by the same tables in the same way, and for nothing else."""
    return (
        {query.op_type, key.op_type} == {ROTARY}
        and query.inputs[2:4] == key.inputs[2:4]
        and all(integers_of(node.inputs[1]) == [0] and len(node.outputs[0].uses()) == 1 for node in (query, key))
        and all(node.inputs[0] is not None and len(_shape(node.inputs[0])) == 3 for node in (query, key))
        and all(
            query.attributes.get_int(name, 0) == key.attributes.get_int(name, 0)
            for name in ("interleaved", "rotary_embedding_dim")
        )
    )


def _is_wider(query: ir.Node, width: int, half: int) -> bool:
    """Whether heads are filled up after they were turned, so that attention's are wider than what the tables turn."""
    return query.attributes.get_int("rotary_embedding_dim", 0) == 0 and 2 * half != width


def _padded(graph: ir.Graph, before: ir.Node, tables: tuple[ir.Value, ...], prefix: str) -> list[ir.Value]:
    """Tables [S, half] with as many rows as the text has, which attention asks for, and the rows to read [1, S]."""
    nodes = Nodes(graph, before, prefix)
    values = {str(v.name): v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    past, count = values[PAST_LENGTH], values[TOKEN_COUNT]
    integers = ir.DataType.INT64
    rest = nodes.op("Pad", [past, nodes.constant([2, 1])], integers, [4])
    found = [nodes.op("Pad", [table, rest], shape=["text_tokens", _shape(table)[1]]) for table in tables]
    end = nodes.op("Squeeze", [count], integers, [])
    places = nodes.op("Range", [nodes.constant(0), end, nodes.constant(1)], integers, ["new"])
    return [*found, nodes.op("Reshape", [places, nodes.constant([1, -1])], integers, [1, "new"])]


def pack_projections(model: ir.Model) -> int:
    """Queries, keys and values that are split off one product go into attention as they are; returns how many.

    Where each has a bias of its own, one is added before they are split.
    """
    graph = model.graph
    changed = 0
    for node in list(graph):
        if node.op_type == "Split":
            _add_before(graph, node)
    for node in list(graph):
        rows = node.inputs[:3]
        if node.op_type != "GroupQueryAttention" or any(value is None or len(value.uses()) != 1 for value in rows):
            continue
        split = rows[0].producer() if rows[0] is not None else None
        if split is None or split.op_type != "Split" or list(split.outputs) != list(rows):
            continue
        for number, value in enumerate((split.inputs[0], None, None)):
            node.replace_input_with(number, value)
        graph.remove(split, safe=True)
        changed += 1
    return changed


def _add_before(graph: ir.Graph, split: ir.Node) -> None:
    """Each part of a product plus its own constant becomes the product plus one constant, split."""
    adds = [uses[0].node if len(uses := list(part.uses())) == 1 else None for part in split.outputs]
    biases: list[ir.Value] = []
    for add, part in zip(adds, split.outputs, strict=True):
        other = None if add is None or add.op_type != "Add" else add.inputs[1 - list(add.inputs).index(part)]
        shape = None if other is None or not is_constant(other) else other.shape
        whole = part.shape is not None and shape is not None and list(shape) == [part.shape[-1]]
        if other is None or not whole or split.attributes.get_int("axis", 0) not in (-1, len(part.shape or ()) - 1):
            return
        biases.append(other)
    source = split.inputs[0]
    assert source is not None
    name = f"{biases[0].name}.{source.name}"  # layers whose biases are alike may share them: all zeros, for instance
    packed = np.concatenate([bias.const_value.numpy() for bias in biases if bias.const_value is not None])
    bias = ir.Value(name=name, const_value=ir.Tensor(packed, name=name))
    bias.dtype, bias.shape = ir.DataType.from_numpy(packed.dtype), ir.Shape(packed.shape)
    graph.register_initializer(bias)
    add = ir.node(
        "Add",
        [source, bias],
        name=f"{source.name}_biased",
        metadata_props=dict(adds[0].metadata_props if adds[0] else {}),
    )
    add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = f"{source.name}_biased", source.type, source.shape
    graph.insert_before(split, add)
    split.replace_input_with(0, add.outputs[0])
    for old, part in zip(adds, split.outputs, strict=True):
        assert old is not None
        replace_value(old.outputs[0], part)
        graph.remove(old, safe=True)


def make_room(model: ir.Model, growing: dict[str, int]) -> set[str]:
    """Caches whose entries lie one after the other come with room for the new tokens, which are written there.

    `growing` has the growing states' names and axes. Returns the names of those inputs that then have room: as long as
    the text is after the step, one buffer with the output.
    """
    graph = model.graph
    values = {str(v.name): v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    past, count = values.get(PAST_LENGTH), values.get(TOKEN_COUNT)
    rows: dict[int, ir.Value] = {}
    done: set[str] = set()
    for source in list(graph.inputs):
        axis = growing.get(str(source.name))
        uses = list(source.uses())
        if axis is None or len(uses) != 1 or uses[0].node.op_type != "Concat":
            continue
        sizes = list(_shape(source))
        if past is None or count is None or any(size != 1 for size in sizes[:axis]):
            continue
        concat = uses[0].node
        nodes = Nodes(graph, concat, f"{source.name}_room")
        if axis not in rows:
            rows[axis] = _rows(Nodes(graph, concat, f"rows_{axis}"), past, count, axis)
        flat = [-1, *(size_of(size) for size in sizes[axis + 1 :])]
        new = nodes.op("Reshape", [concat.inputs[1], nodes.constant(flat)], shape=["new", *flat[1:]])
        source.shape = ir.Shape([*sizes[:axis], _TEXT, *sizes[axis + 1 :]])
        written = nodes.op("ScatterND", [source, rows[axis], new], shape=source.shape)
        replace_value(concat.outputs[0], written)
        graph.remove(concat, safe=True)
        done.add(str(source.name))
    return done


def _rows(nodes: Nodes, past: ir.Value, count: ir.Value, axis: int) -> ir.Value:
    """Where the new tokens go, int64 [S, axis + 1]: zeros, and the token's position in the text."""
    first, end = nodes.op("Squeeze", [past], _INT64, []), nodes.op("Add", [past, count], _INT64, [1])
    places = nodes.op("Range", [first, nodes.op("Squeeze", [end], _INT64, []), nodes.constant(1)], _INT64, ["new"])
    column = nodes.op("Reshape", [places, nodes.constant([-1, 1])], _INT64, ["new", 1])
    return nodes.op("Pad", [column, nodes.constant([0, axis, 0, 0])], _INT64, ["new", axis + 1])
