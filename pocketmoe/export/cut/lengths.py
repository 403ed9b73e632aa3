"""How long the past is, how many tokens are new and where the text ends: read from values of their own.

So the states may live in buffers longer than what is filled, a piece of the graph needs no tensor of another piece
only to ask for its shape, and a prompt that is computed in chunks has one end for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from pocketmoe.errors import UnsupportedModel

_T = TypeVar("_T")

PAST_LENGTH = "past_length"  # graph input, int64 [1]
LAST_POSITION = "last_position"  # graph input, int64 [1]
POSITIONS = "position_ids"  # graph input, int64 [1, tokens]
TOKEN_IDS = "input_ids"  # noqa: S105 ; graph input, int64 [1, tokens]
TOKEN_COUNT = "token_count"  # noqa: S105 ; int64 [1], read from the shape of the token ids
NO_STATES = (TOKEN_IDS, POSITIONS, PAST_LENGTH, LAST_POSITION)  # all graph inputs but the states


def read_past_length(model: ir.Model, growing: dict[str, int]) -> int:
    """What reads the length of a growing state from its shape reads the graph input `past_length` [1] instead.

    `growing` has the growing states' names and axes. Returns how many nodes were replaced.
    """
    graph = model.graph
    past = ir.Value(name=PAST_LENGTH, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    replaced = 0
    for source in list(graph.inputs):
        axis = growing.get(str(source.name))
        if axis is None:
            continue
        assert source.shape is not None
        for use in list(source.uses()):
            if use.node.op_type == "Shape":
                sizes = [past if a == axis else size_of(size) for a, size in enumerate(source.shape)]
                _replace_shape(graph, use.node, _selected(use.node, sizes))
                replaced += 1
    if replaced:
        graph.inputs.append(past)
    return replaced


def read_token_count(model: ir.Model) -> int:
    """What reads the number of new tokens from any tensor's shape reads `token_count` [1] instead.

    Returns how many nodes were replaced.
    """
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name == TOKEN_IDS)
    assert ids.shape is not None
    symbol = ids.shape[1]
    if isinstance(symbol, int):
        return 0
    count = ir.node("Shape", [ids], attributes={"start": 1, "end": 2}, name=f"node_{TOKEN_COUNT}")
    tokens = count.outputs[0]
    tokens.name, tokens.type, tokens.shape = TOKEN_COUNT, ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    replaced = 0
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is None or source.shape is None:
            continue
        sizes = [tokens if size == symbol else size for size in source.shape]
        wanted = _selected(node, sizes)
        if all(isinstance(size, int | ir.Value) for size in wanted):
            _replace_shape(graph, node, [size for size in wanted if not isinstance(size, ir.SymbolicDim)])
            replaced += 1
    first = next(iter(graph))
    graph.insert_before(first, count)
    return replaced


def read_last_position(model: ir.Model) -> int:
    """What reads the largest of the positions reads the graph input `last_position` [1] instead.

    Rotary tables that follow from the length of a text (longrope) are then those of the whole prompt, of which a chunk
    has only some positions. Returns how many nodes were replaced.
    """
    graph = model.graph
    last = ir.Value(name=LAST_POSITION, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    largest = [n for n in graph if n.op_type == "ReduceMax" and n.inputs[0] is not None and _is_positions(n.inputs[0])]
    for node in largest:
        output = node.outputs[0]
        if output.shape is not None and len(output.shape):
            raise UnsupportedModel(f"the graph reads the largest position as {output.shape}, not as one number")
        squeeze = ir.node("Squeeze", [last], name=f"{node.name}_of_text")
        graph.insert_before(node, squeeze)
        squeeze.outputs[0].name = f"{output.name}_of_text"
        squeeze.outputs[0].type, squeeze.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
        replace_value(output, squeeze.outputs[0])
        graph.remove(node, safe=True)
    if largest:
        graph.inputs.append(last)
    return len(largest)


def _is_positions(value: ir.Value) -> bool:
    return value.is_graph_input() and value.name == POSITIONS


def only_from_token_count(graph: ir.Graph) -> set[ir.Value]:
    """Values that nothing but the number of new tokens (and constants) determines: cheap to compute anew."""
    found: set[ir.Value] = set()
    for node in graph:
        reads = [value for value in node.inputs if value is not None]
        depends = [value for value in reads if not value.is_initializer()]
        has_graph = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        counts = any(value.name == TOKEN_COUNT for value in node.outputs)
        if counts or (depends and not has_graph and all(value in found for value in depends)):
            found.update(node.outputs)
    return found


def _selected(node: ir.Node, sizes: Sequence[_T]) -> list[_T]:
    """What a Shape node yields of a shape."""
    return list(sizes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(sizes))])


def _replace_shape(graph: ir.Graph, node: ir.Node, sizes: Sequence[int | ir.Value]) -> None:
    """Put the known sizes in the place of a Shape node; a Value among them is int64 [1]."""
    parts = [size if isinstance(size, ir.Value) else _constant(graph, [size]) for size in sizes]
    if len(parts) == 1:
        new = parts[0]
    elif all(isinstance(size, int) for size in sizes):
        new = _constant(graph, [size for size in sizes if isinstance(size, int)])
    else:
        concat = ir.node("Concat", parts, attributes={"axis": 0}, name=f"{node.name}_known")
        graph.insert_before(node, concat)
        new = concat.outputs[0]
        new.name, new.type = f"{node.outputs[0].name}_known", ir.TensorType(ir.DataType.INT64)
        new.shape = ir.Shape([len(parts)])
    replace_value(node.outputs[0], new)
    graph.remove(node, safe=True)


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Every use of `old`, graph outputs included, becomes one of `new`; an output keeps its name."""
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}_replaced"
        new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def size_of(dim: int | ir.SymbolicDim) -> int:
    """A fixed dimension; the exporter names some of them as symbols ("2")."""
    return dim if isinstance(dim, int) else int(str(dim.value))


def _constant(graph: ir.Graph, values: Iterable[int]) -> ir.Value:
    array = np.array(list(values), np.int64)
    name = "shape_" + "_".join(map(str, array))
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape(array.shape)
        graph.register_initializer(value)
    return graph.initializers[name]


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is one of the graph's own, with its numbers at hand."""
    return value is not None and value.is_initializer() and value.const_value is not None


def integers_of(value: ir.Value | None) -> list[int]:
    """A constant's numbers in a row, such as a Reshape's target; none where there is no constant."""
    tensor = None if value is None else value.const_value
    return [] if tensor is None else [int(number) for number in tensor.numpy().ravel()]
