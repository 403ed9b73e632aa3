"""Operators that give what they read another shape, and change no number: chains of them become one, or none.

Each costs a launch in every layer of every token. What shape a chain ends in is followed through it with the sizes that
are not fixed as symbols, so that what is left out is equal at every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from pocketmoe.export.cut.lengths import TOKEN_COUNT, TOKEN_IDS, integers_of, is_constant, replace_value

# A size: a factor and the symbols that it is multiplied by, sorted.
Size = tuple[int, tuple[str, ...]]
Sizes = tuple[Size, ...]

_ONE: Size = (1, ())
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Identity", "Expand")
_MADE_UP = "unk__"  # how shape inference calls a size that it does not know: not one size under one name
_ATTENTION = "GroupQueryAttention"
_NORM = "SimplifiedLayerNormalization"
_ALIKE = (
    _NORM,
    "RotaryEmbedding",
)  # what they give is shaped as what they are given, and shape inference knows neither


def merge_views(model: ir.Model) -> int:
    """Leave out what views as its input is already, or was before; make chains of views one Reshape.

    Returns how many nodes were left out or replaced. What nothing reads any more stays for others to remove.
    """
    _turn_after_norms(model.graph)
    views = _Views(model.graph)
    return sum(views.simplify(node) for node in list(model.graph))


def _turn_after_norms(graph: ir.Graph) -> None:
    """A norm of the last axis comes before what turns the others, so that this may meet what turns them back."""
    for norm in list(graph):
        turn = norm.inputs[0].producer() if norm.op_type == _NORM and norm.inputs[0] is not None else None
        if turn is None or turn.op_type != "Transpose" or norm.outputs[0].is_graph_output() or len(norm.outputs) > 1:
            continue
        order = turn.attributes.get_ints("perm", ())
        if not order or order[-1] != len(order) - 1 or norm.attributes.get_int("axis", -1) not in (-1, len(order) - 1):
            continue
        output = norm.outputs[0]
        turned = ir.node("Transpose", [output], attributes={"perm": list(order)}, name=f"{norm.name}_turned")
        turned.metadata_props.update(turn.metadata_props)
        turned.outputs[0].name, turned.outputs[0].type = f"{output.name}_turned", output.type
        turned.outputs[0].shape = turn.outputs[0].shape
        for use in list(output.uses()):
            if use.node is not turned:
                use.node.replace_input_with(use.idx, turned.outputs[0])
        norm.replace_input_with(0, turn.inputs[0])
        output.shape = None if turn.inputs[0] is None else turn.inputs[0].shape
        graph.insert_after(norm, turned)


class _Views:
    """The shapes of a graph's values, and for each view where it comes from."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._sizes: dict[ir.Value, Sizes | None] = {}
        self._source: dict[ir.Value, ir.Value] = {}  # of a view: what it views
        self._made: dict[tuple[ir.Value, Sizes], ir.Value] = {}  # views by what is first in their chain
        ids = next((value for value in graph.inputs if value.name == TOKEN_IDS), None)
        self._tokens = _ONE if ids is None or ids.shape is None else _size(ids.shape[1], ids, 1)

    def simplify(self, node: ir.Node) -> bool:
        """Replace a view by an equal value, or by a Reshape of what its chain begins with."""
        source = node.inputs[0] if node.op_type in _VIEWS and node.domain == "" and node.inputs else None
        output = node.outputs[0]
        if source is None or source.is_initializer() or output.is_graph_output():
            return False
        sizes = self._after(node, source)
        if sizes is None:
            return self._turned_back(node, source)
        self._sizes[output], self._source[output] = sizes, source
        output.type = output.type or source.type
        if all(not symbols or (factor == 1 and len(symbols) == 1) for factor, symbols in sizes):
            output.shape = ir.Shape([symbols[0] if symbols else factor for factor, symbols in sizes])
        chain = self._chain(output)
        equal = next((value for value in chain[1:] if self.sizes(value) == sizes), None)
        made = self._made.get((chain[-1], sizes))
        if equal is None and made is not None and made.graph is self._graph:
            equal = made
        equal = equal or self._one_reshape(node, chain, sizes)
        self._made[chain[-1], sizes] = equal or output
        if equal is None:
            return False
        replace_value(output, equal)
        self._remove(node)
        return True

    def _turned_back(self, node: ir.Node, source: ir.Value) -> bool:
        """Replace a Transpose that undoes the one before it."""
        before = source.producer()
        if node.op_type != "Transpose" or before is None or before.op_type != "Transpose" or before.inputs[0] is None:
            return False
        first, second = (n.attributes.get_ints("perm", ()) for n in (before, node))
        if not first or not second or [first[axis] for axis in second] != list(range(len(first))):
            return False
        replace_value(node.outputs[0], before.inputs[0])
        self._remove(node)
        return True

    def _remove(self, node: ir.Node | None) -> None:
        """Remove a view that nothing reads any more, and those before it that then nothing reads."""
        while node is not None:
            source = node.inputs[0]
            self._graph.remove(node, safe=True)
            unread = source is not None and not source.uses() and not source.is_graph_output()
            producer = source.producer() if source is not None and unread else None
            node = producer if producer is not None and producer.op_type in _VIEWS else None

    def sizes(self, value: ir.Value) -> Sizes | None:
        """The shape of a value, as far as it is known."""
        if value not in self._sizes:
            node, shape = value.producer(), value.shape
            if node is not None and node.op_type == _ATTENTION and value is node.outputs[0]:
                self._sizes[value] = self._attended(node)
            elif node is not None and node.op_type in _ALIKE and node.inputs[0] is not None:
                self._sizes[value] = self.sizes(node.inputs[0])
            else:
                self._sizes[value] = (
                    None if shape is None else tuple(_size(dim, value, axis) for axis, dim in enumerate(shape))
                )
        return self._sizes[value]

    def _attended(self, node: ir.Node) -> Sizes | None:
        """GroupQueryAttention's output: as many rows as the queries have, each head as wide as the keys."""
        queries, keys = (None if value is None else self.sizes(value) for value in (node.inputs[0], node.inputs[3]))
        if queries is None or keys is None or len(queries) != 3 or len(keys) != 4:
            return None
        width, symbols = keys[3]
        return (*queries[:2], (width * node.attributes.get_int("num_heads", 0), symbols))

    def _chain(self, value: ir.Value) -> list[ir.Value]:
        """A view, what it views, and so on to what is no view."""
        chain = [value]
        while chain[-1] in self._source:
            chain.append(self._source[chain[-1]])
        return chain

    def _one_reshape(self, node: ir.Node, chain: Sequence[ir.Value], sizes: Sizes) -> ir.Value | None:
        """A Reshape of the chain's beginning that can take the place of `node`, if that leaves any node without use."""
        first = chain[-1]
        for value in chain[1:-1]:  # what others read too is computed anyway
            if len(value.uses()) > 1 or value.is_graph_output():
                first = value
                break
        computed = node.op_type == "Reshape" and not is_constant(node.inputs[1])
        free = [axis for axis, (_, symbols) in enumerate(sizes) if symbols]
        if (first is node.inputs[0] and not computed) or len(free) > 1 or any(size[0] == 0 for size in sizes):
            return None
        target = [-1 if symbols else factor for factor, symbols in sizes]
        old = node.outputs[0]
        new = ir.node("Reshape", [first, self._constant(target)], name=f"node_{old.name}_view")
        new.metadata_props.update(node.metadata_props)
        self._graph.insert_before(node, new)
        output = new.outputs[0]
        output.name, output.type, output.shape = f"{old.name}_view", old.type, old.shape
        self._sizes[output], self._source[output] = sizes, first
        return output

    def _constant(self, target: Sequence[int]) -> ir.Value:
        name = "view_" + "x".join(map(str, target))
        if name not in self._graph.initializers:
            made = ir.Value(name=name, const_value=ir.Tensor(np.array(target, np.int64), name=name))
            made.dtype, made.shape = ir.DataType.INT64, ir.Shape([len(target)])
            self._graph.register_initializer(made)
        return self._graph.initializers[name]

    def _after(self, node: ir.Node, source: ir.Value) -> Sizes | None:
        """The shape of a view; None where it is not known, or where it is no view at these sizes."""
        sizes = self.sizes(source)
        if sizes is None:
            return None
        match node.op_type:
            case "Identity":
                return sizes
            case "Reshape" | "Expand":
                target = self._target(node.inputs[1])
                if target is None:
                    return None
                return _expanded(sizes, target) if node.op_type == "Expand" else _reshaped(node, sizes, target)
            case "Transpose":
                return _transposed(node, sizes)
            case "Flatten":
                axis = node.attributes.get_int("axis", 1) % (len(sizes) + 1)
                return _product(sizes[:axis]), _product(sizes[axis:])
            case _:
                return _squeezed(node, sizes)

    def _target(self, value: ir.Value | None) -> Sizes | None:
        """What a Reshape is asked for: constants, and the number of tokens where that is computed."""
        node = None if value is None else value.producer()
        if node is not None and node.op_type == "Concat":
            parts = [self._target(part) for part in node.inputs]
            return None if None in parts else tuple(size for part in parts if part is not None for size in part)
        if node is not None and value is not None and value.name == TOKEN_COUNT:
            return (self._tokens,)
        return tuple((number, ()) for number in integers_of(value)) if is_constant(value) else None


def _size(dim: int | ir.SymbolicDim, value: ir.Value, axis: int) -> Size:
    if isinstance(dim, int):
        return dim, ()
    name = str(dim.value)
    if name.isdigit():  # the exporter names some fixed sizes
        return int(name), ()
    alone = dim.value is None or name.startswith(_MADE_UP)
    return 1, (f"{value.name} {axis}" if alone else name,)


def _product(sizes: Sequence[Size]) -> Size:
    return prod(size[0] for size in sizes), tuple(sorted(symbol for size in sizes for symbol in size[1]))


def _quotient(total: Size, known: Size) -> Size | None:
    """How often one goes into the other, whatever the symbols stand for."""
    symbols = list(total[1])
    for symbol in known[1]:
        if symbol not in symbols:
            return None
        symbols.remove(symbol)
    return (total[0] // known[0], tuple(symbols)) if known[0] and total[0] % known[0] == 0 else None


def _reshaped(node: ir.Node, sizes: Sizes, target: Sizes) -> Sizes | None:
    literal = node.attributes.get_int("allowzero", 0) == 1
    found: list[Size | None] = []
    for axis, (factor, symbols) in enumerate(target):
        if factor == 0 and (literal or axis >= len(sizes)):
            return None
        found.append(None if factor == -1 else sizes[axis] if factor == 0 else (factor, symbols))
    known = _product([size for size in found if size is not None])
    rest = _quotient(_product(sizes), known)
    if rest is None or (None not in found and rest != _ONE):
        return None
    return tuple(rest if size is None else size for size in found)


def _expanded(sizes: Sizes, target: Sizes) -> Sizes | None:
    """The same shape, or None: an Expand that does something is no view."""
    if len(target) > len(sizes):
        return None
    fitting = all(size in (_ONE, own) for own, size in zip(sizes[len(sizes) - len(target) :], target, strict=True))
    return sizes if fitting else None


def _transposed(node: ir.Node, sizes: Sizes) -> Sizes | None:
    """With nothing but axes of one moved."""
    order = list(node.attributes.get_ints("perm", list(range(len(sizes)))[::-1]))
    moved = [axis for axis in order if sizes[axis] != _ONE]
    return tuple(sizes[axis] for axis in order) if moved == sorted(moved) else None


def _squeezed(node: ir.Node, sizes: Sizes) -> Sizes | None:
    """After Squeeze or Unsqueeze."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None:  # a Squeeze of all that is one, where nothing else may turn out to be
        fixed = node.op_type == "Squeeze" and not any(symbols for _, symbols in sizes)
        return tuple(size for size in sizes if size != _ONE) if fixed else None
    if not is_constant(given):
        return None
    axes = integers_of(given)
    if node.op_type == "Squeeze":
        gone = {axis % len(sizes) for axis in axes}
        return tuple(size for axis, size in enumerate(sizes) if axis not in gone)
    rank = len(sizes) + len(axes)
    new, rest = {axis % rank for axis in axes}, iter(sizes)
    return tuple(_ONE if axis in new else next(rest) for axis in range(rank))
