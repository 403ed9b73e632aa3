"""Cut the captured graph at its Experts nodes: segments between them, and a router per MoE layer.

A node's segment is the number of Experts nodes that it depends on; what depends on none (masks, rotary tables) goes
to the first segment that needs it. Values pass from one segment to any later one by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.seam import OP_TYPE

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True)
class Cut:
    """The pieces, in order; names in `layers` are x, ids, weights and output of each Experts node."""

    segments: tuple[ir.Model, ...]
    routers: tuple[ir.Model | None, ...]
    layers: tuple[tuple[str, str, str, str], ...]


def cut(model: ir.Model) -> Cut:
    """Cut `model`, which stays as it is. Raises UnsupportedModel when its Experts nodes are not one after the other."""
    graph = model.graph
    experts = sorted((n for n in graph if n.op_type == OP_TYPE), key=lambda n: n.attributes["layer"].as_int())
    for node in experts:
        _check_experts(node)
    place = segments_of(graph, experts)
    produced = {node: place[node] for node in graph if node.op_type != OP_TYPE}
    boundaries = _boundaries(graph, produced, len(experts) + 1)
    segments = tuple(
        _piece(model, f"segment_{i:02d}", inputs, outputs) for i, (inputs, outputs) in enumerate(boundaries)
    )
    _check_segments(model, segments, len(experts))
    routers = tuple(_router(model, layer, node) for layer, node in enumerate(experts))
    layers = tuple(
        (*(str(v.name) for v in node.inputs if v is not None), str(node.outputs[0].name)) for node in experts
    )
    return Cut(segments, routers, layers)  # type: ignore[arg-type]  # four names each, by the operator's schema


def _check_experts(node: ir.Node) -> None:
    """x float32 [tokens, hidden], ids int64 and weights float32 [tokens, k]."""
    x, ids, weights = node.inputs
    assert x is not None
    assert ids is not None
    assert weights is not None
    found = [(value.dtype, None if value.shape is None else len(value.shape)) for value in (x, ids, weights)]
    if found != [(_FLOAT, 2), (_INT64, 2), (_FLOAT, 2)]:
        raise UnsupportedModel(f"the experts of layer {node.attributes['layer'].as_int()} are called with {found}")


def segments_of(graph: ir.Graph, experts: list[ir.Node]) -> dict[ir.Node, int]:
    """Each node's segment; an Experts node counts as the end of the segment before it."""
    depth: dict[ir.Node, int] = {}
    for node in graph:  # in topological order
        producers = [p for value in _reads(node) if (p := value.producer()) is not None and p.graph is graph]
        depth[node] = max((depth[p] + (p.op_type == OP_TYPE) for p in producers), default=0)
    if [depth[node] for node in experts] != list(range(len(experts))):
        raise UnsupportedModel("the MoE layers do not follow one another")
    place = dict(depth)
    for node in reversed(graph):
        if depth[node] == 0 and node.op_type != OP_TYPE:
            users = [place[use] for value in node.outputs for use in _users(value, graph)]
            place[node] = min(users, default=0)
    return place


def _reads(node: ir.Node) -> Iterable[ir.Value]:
    """What a node reads, inside its subgraphs (If, Loop) too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _reads(inner)


def _users(value: ir.Value, graph: ir.Graph) -> Iterable[ir.Node]:
    """The nodes of `graph` itself that read `value`, the owners of subgraphs included."""
    for use in value.uses():
        node: ir.Node | None = use.node
        while node is not None and node.graph is not graph:
            node = node.graph.parent_node if isinstance(node.graph, ir.Graph) else None
        if node is not None:
            yield node


def _boundaries(
    graph: ir.Graph, place: dict[ir.Node, int], n_segments: int
) -> list[tuple[list[ir.Value], list[ir.Value]]]:
    """Inputs and outputs of each segment, in the order in which the graph first names them."""
    inputs: list[dict[ir.Value, None]] = [{} for _ in range(n_segments)]
    outputs: list[dict[ir.Value, None]] = [{} for _ in range(n_segments)]
    for node, segment in place.items():
        for value in _reads(node):
            producer = value.producer()
            if value.is_initializer() or (producer is not None and producer.graph is not graph):
                continue
            if producer is None and not value.is_graph_input():
                continue
            if producer is None or place.get(producer) != segment:
                inputs[segment][value] = None
        for value in node.outputs:
            if value.is_graph_output() or any(place.get(user) != segment for user in _users(value, graph)):
                outputs[segment][value] = None
    return [(list(i), list(o)) for i, o in zip(inputs, outputs, strict=True)]


def _piece(model: ir.Model, name: str, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    if not outputs:
        raise UnsupportedModel(f"{name} would be empty")
    for value in (*inputs, *outputs):
        if value.dtype is None:
            raise UnsupportedModel(f"the type of {value.name!r}, which {name} passes on, is not known")
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    graph.name = name
    graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.metadata_props.clear()
        node.doc_string = None
    opsets = {node.domain for node in ir.traversal.RecursiveGraphIterator(graph)} | {""}
    graph.opset_imports.clear()
    graph.opset_imports.update({d: v for d, v in model.opset_imports.items() if d in opsets})
    return ir.Model(graph, ir_version=model.ir_version, producer_name="pocketmoe")


def _check_segments(model: ir.Model, segments: tuple[ir.Model, ...], n_layers: int) -> None:
    """One more than MoE layers, none with an Experts node, every other node in one of them, and in one only."""
    assert len(segments) == n_layers + 1
    seen: set[str] = set()
    for segment in segments:
        for node in segment.graph:
            assert node.op_type != OP_TYPE, "a segment walked back through an Experts node"
            assert node.outputs[0].name not in seen, f"{node.outputs[0].name} is computed twice"
            seen.add(str(node.outputs[0].name))
    wanted = {str(node.outputs[0].name) for node in model.graph if node.op_type != OP_TYPE}
    assert seen == wanted, f"lost in the cut: {sorted(wanted - seen)[:5]}"


def _router(model: ir.Model, layer: int, experts: ir.Node) -> ir.Model | None:
    """The graph from the experts' x to their ids and weights; None when they depend on more than x."""
    x, ids, weights = experts.inputs
    assert x is not None
    assert ids is not None
    assert weights is not None
    hidden = _same_rows(x)
    if not _depends_only_on(model.graph, (ids, weights), {x, *hidden}):
        return None
    wanted = [v for v in (x, *hidden) if v in _reached(model.graph, (ids, weights), {x, *hidden})]
    piece = _piece(model, f"router_{layer:02d}", wanted, [ids, weights])
    _rename_ports(piece.graph, x)
    return piece


def _same_rows(x: ir.Value) -> list[ir.Value]:
    """Values that hold what x holds in another shape: those x was reshaped from."""
    found: list[ir.Value] = []
    node = x.producer()
    while node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        found.append(node.inputs[0])
        node = node.inputs[0].producer()
    return found


def _reached(graph: ir.Graph, ends: Iterable[ir.Value], stops: set[ir.Value]) -> set[ir.Value]:
    """The stops, graph inputs and Experts outputs that `ends` depend on, not looking past them."""
    reached: set[ir.Value] = set()
    todo, seen = list(ends), set(ends)
    while todo:
        value = todo.pop()
        producer = value.producer()
        if value in stops or value.is_graph_input() or (producer is not None and producer.op_type == OP_TYPE):
            reached.add(value)
            continue
        if producer is None:
            continue
        for read in _reads(producer):
            if read not in seen:
                seen.add(read)
                todo.append(read)
    return reached


def _depends_only_on(graph: ir.Graph, ends: Iterable[ir.Value], stops: set[ir.Value]) -> bool:
    return _reached(graph, ends, stops) <= stops


def _rename_ports(graph: ir.Graph, x: ir.Value) -> None:
    """Inputs become one `x` [rows, hidden], outputs `expert_ids` and `expert_weights`."""
    assert x.shape is not None
    hidden = x.shape[1]
    port = ir.Value(name="x", type=ir.TensorType(_FLOAT), shape=ir.Shape(["rows", hidden]))
    for value in list(graph.inputs):
        new = port
        if value.shape is None or len(value.shape) != 2:
            assert isinstance(hidden, int)
            new = _batched(graph, port, hidden)
        value.replace_all_uses_with(new)
    graph.inputs.clear()
    graph.inputs.append(port)
    for value, name in zip(graph.outputs, ("expert_ids", "expert_weights"), strict=True):
        value.name = name


def _batched(graph: ir.Graph, port: ir.Value, hidden: int) -> ir.Value:
    shape = ir.Value(name="batched_shape", const_value=ir.tensor([1, -1, hidden], name="batched_shape"))
    shape.dtype, shape.shape = _INT64, ir.Shape([3])
    graph.register_initializer(shape)
    reshape = ir.node("Reshape", [port, shape])
    first = next(iter(graph))
    graph.insert_before(first, reshape)
    reshape.outputs[0].name = "x_batched"
    return reshape.outputs[0]
