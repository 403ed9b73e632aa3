"""Cut the captured graph at its Experts nodes: segments between them, and a router per MoE layer.

A node's segment is the number of Experts nodes that it depends on; what does not depend on what the tokens are (masks,
rotary tables) goes to the first segment that needs it. Values pass from one segment to any later one by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture.custom_op import OP_TYPE
from pocketmoe.export.cut.lengths import NO_STATES, TOKEN_COUNT, TOKEN_IDS, only_from_token_count

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
    boundaries = _Boundaries(graph, place, len(experts) + 1)
    segments = tuple(
        _piece(model, f"segment_{i:02d}", list(boundaries.inputs[i]), list(boundaries.outputs[i]))
        for i in range(len(experts) + 1)
    )
    _count_rows(segments[-1].graph, str(experts[-1].outputs[0].name))
    _check_rows(model.graph, segments[-1].graph)
    _check_segments(model, segments, {str(value.name) for value in boundaries.cheap})
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
    content, users = _content(graph), _users(graph)
    place = dict(depth)
    for node in reversed(graph):
        if node not in content and depth[node] == 0:
            needed = [place[user] for value in node.outputs for user in users.get(value, ())]
            place[node] = min(needed, default=0)
    return place


def _content(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that depend on what the tokens are, not only on how many there are and where."""
    found: set[ir.Node] = set()
    for node in graph:
        for value in _reads(node):
            if value.producer() in found or (value.name == TOKEN_IDS and node.op_type != "Shape"):
                found.add(node)
    return found


def _reads(node: ir.Node) -> Iterable[ir.Value]:
    """What a node reads, by its subgraphs (If, Loop, Scan) too, but not what those make for themselves."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            subgraph = attribute.as_graph()
            for inner in subgraph:
                yield from (value for value in _reads(inner) if value.graph is not subgraph)


def _users(graph: ir.Graph) -> dict[ir.Value, list[ir.Node]]:
    """The nodes of `graph` itself that read each value, be it inside their subgraphs."""
    users: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        for value in _reads(node):
            users.setdefault(value, []).append(node)
    return users


class _Boundaries:
    """Inputs and outputs of each segment, in the order in which the graph first names them.

    The last segment computes what only depends on the number of tokens by itself, from its own rows, so that it may
    be given only some of them.
    """

    def __init__(self, graph: ir.Graph, place: dict[ir.Node, int], n_segments: int) -> None:
        self.inputs: list[dict[ir.Value, None]] = [{} for _ in range(n_segments)]
        self.outputs: list[dict[ir.Value, None]] = [{} for _ in range(n_segments)]
        self.cheap = only_from_token_count(graph)
        self._graph = graph
        self._last = n_segments - 1
        for node in graph:
            if node.op_type != OP_TYPE:
                self._add_inputs(node, place)
                for value in node.outputs:
                    if value.is_graph_output():
                        self.outputs[place[node]][value] = None
            else:  # what the runtime hands to the experts
                for value in node.inputs:
                    if value is not None:
                        self._pass_on(value, place)

    def _add_inputs(self, node: ir.Node, place: dict[ir.Node, int]) -> None:
        segment = place[node]
        for value in _reads(node):
            producer = value.producer()
            if value.is_graph_input() and not value.is_initializer():
                if not (segment == self._last and node.outputs[0] in self.cheap):
                    self.inputs[segment][value] = None
            elif producer is None or producer.graph is not self._graph:
                continue
            elif segment == self._last and value in self.cheap:
                self.inputs[segment][self._token_count()] = None
            elif producer.op_type == OP_TYPE or place[producer] != segment:
                self.inputs[segment][value] = None
                self._pass_on(value, place)

    def _pass_on(self, value: ir.Value, place: dict[ir.Node, int]) -> None:
        producer = value.producer()
        if producer is not None and producer.op_type != OP_TYPE:
            self.outputs[place[producer]][value] = None

    def _token_count(self) -> ir.Value:
        return next(value for value in self.cheap if value.name == TOKEN_COUNT)


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


def _count_rows(graph: ir.Graph, rows: str) -> None:
    """The number of tokens, if it is an input, becomes the number of rows of the input `rows` [tokens, hidden]."""
    counts = [value for value in graph.inputs if value.name == TOKEN_COUNT]
    source = next((value for value in graph.inputs if value.name == rows), None)
    for count in counts:
        assert source is not None
        count.name = f"{TOKEN_COUNT}_input"
        _insert_first(graph, ir.node("Shape", [source], attributes={"start": 0, "end": 1}), TOKEN_COUNT, count)
        graph.inputs.remove(count)


def _check_rows(whole: ir.Graph, last: ir.Graph) -> None:
    """The last segment has its tokens where the runtime takes the last one: [tokens, width] or [1, tokens, ...].

    A last segment with states of its own is run on all tokens anyway, and not checked.
    """
    states = {value.name for value in whole.inputs if value.name not in NO_STATES}
    if any(value.name in states for value in last.inputs):
        return
    tokens = next(value for value in whole.inputs if value.name == TOKEN_IDS).shape
    for value in last.inputs:
        sizes = list(value.shape or ())
        places = [axis for axis, size in enumerate(sizes) if tokens and size == tokens[1]]
        if places and places != [min(len(sizes) - 2, 1)]:
            raise UnsupportedModel(f"the tokens of {value.name!r} are at axis {places}, of {sizes}")


def _insert_first(graph: ir.Graph, node: ir.Node, name: str, replaced: ir.Value) -> None:
    """Put a node at the graph's beginning; its output, `name`, takes the place of `replaced`."""
    node.outputs[0].name, node.outputs[0].type = name, replaced.type
    graph.insert_before(next(iter(graph)), node)
    replaced.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)


def _check_segments(model: ir.Model, segments: tuple[ir.Model, ...], cheap: set[str]) -> None:
    """No segment holds an Experts node; every other node is in one of them, and but for cheap ones in one only."""
    seen: set[str] = set()
    for segment in segments:
        for node in segment.graph:
            name = str(node.outputs[0].name)
            assert node.op_type != OP_TYPE, "a segment walked back through an Experts node"
            assert name in cheap or name not in seen, f"{name} is computed twice"
            seen.add(name)
    wanted = {str(node.outputs[0].name) for node in model.graph if node.op_type != OP_TYPE} - cheap
    assert wanted <= seen, f"lost in the cut: {sorted(wanted - seen)[:5]}"


def _router(model: ir.Model, layer: int, experts: ir.Node) -> ir.Model | None:
    """The graph from the experts' x to their ids and weights; None when they depend on more than x."""
    x, ids, weights = experts.inputs
    assert x is not None
    assert ids is not None
    assert weights is not None
    counts = [v for n in model.graph for v in n.outputs if v.name == TOKEN_COUNT]
    stops = {x, *_same_rows(x), *counts}
    reached = _reached((ids, weights), stops)
    if not reached <= stops:
        return None
    piece = _piece(model, f"router_{layer:02d}", sorted(reached, key=lambda v: str(v.name)), [ids, weights])
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


def _reached(ends: Iterable[ir.Value], stops: set[ir.Value]) -> set[ir.Value]:
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


def _rename_ports(graph: ir.Graph, x: ir.Value) -> None:
    """Inputs become one `x` [rows, hidden], outputs `expert_ids` and `expert_weights`."""
    assert x.shape is not None
    hidden = x.shape[1]
    port = ir.Value(name="x", type=ir.TensorType(_FLOAT), shape=ir.Shape(["rows", hidden]))
    for value in list(graph.inputs):
        if value.name == TOKEN_COUNT:
            value.name = f"{TOKEN_COUNT}_input"
            _insert_first(graph, ir.node("Shape", [port], attributes={"start": 0, "end": 1}), TOKEN_COUNT, value)
        elif value.shape is not None and len(value.shape) == 2:
            value.replace_all_uses_with(port)
        else:
            assert isinstance(hidden, int)
            _insert_first(graph, ir.node("Reshape", [port, _shape(graph, hidden)]), "x_batched", value)
    graph.inputs.clear()
    graph.inputs.append(port)
    for value, name in zip(graph.outputs, ("expert_ids", "expert_weights"), strict=True):
        value.name = name


def _shape(graph: ir.Graph, hidden: int) -> ir.Value:
    """The constant [1, -1, hidden]."""
    shape = ir.Value(name="batched_shape", const_value=ir.tensor([1, -1, hidden], name="batched_shape"))
    shape.dtype, shape.shape = _INT64, ir.Shape([3])
    graph.register_initializer(shape)
    return shape
