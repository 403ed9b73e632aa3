"""What a bundle's graphs may hold, and that they take and give what the manifest says: read off the files.

A graph is a program of a stranger's. It may compute each of its nodes once, from its inputs to its outputs: the only
loop is a Scan, with none inside another. What memory it may take is the budget's business when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pocketmoe.bundle.manifest import MANIFEST, Manifest
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import DamagedFile
from pocketmoe.runtime.backends.onnx_wire import fields, integers, text

ROUTER_INPUT, ROUTER_OUTPUTS = "x", ("expert_ids", "expert_weights")
MAX_GRAPH_BYTES = 16 << 20  # weights lie outside; the largest graph of all architectures has 52 kB and 294 nodes
MAX_NODES = 20_000
_MAX_DEPTH = 6  # of graphs in graphs
_DOMAINS = {"", "ai.onnx", "com.microsoft"}
_BRANCHING, _LOOPING = "If", "Scan"

# TensorProto.DataType, by numpy's names
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"} | {
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
}

Sizes = tuple[int | None, ...]  # None: any


class Port(NamedTuple):
    """An input or output of a graph. `sizes` None: not even the rank is said."""

    dtype: str
    sizes: Sizes | None


class Graph(NamedTuple):
    """What a saved model takes and gives, by name."""

    inputs: dict[str, Port]
    outputs: dict[str, Port]


def read_graph(path: Path) -> Graph:
    """Read a saved model, and check that it holds nothing that a bundle's graphs must not. Raises DamagedFile."""
    try:
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise ValueError(f"has more than {MAX_GRAPH_BYTES} bytes")
        return _read_model(memoryview(path.read_bytes()))
    except OSError as error:
        raise DamagedFile(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DamagedFile(path, f"is no graph of a bundle: {error}") from error


def check_graphs(bundle: Bundle) -> None:
    """Every graph is one that a bundle may have, and takes and gives what the manifest and the other graphs say.

    Raises DamagedFile.
    """
    manifest = bundle.manifest
    width = expert_width(bundle)
    known = _known_values(manifest, width)
    for segment in manifest.segments:
        graph = _matched(bundle, segment.graph, _pick(known, segment.inputs), _pick(known, segment.outputs))
        known = {**{name: graph.outputs[name] for name in segment.outputs}, **known}
    for layer in manifest.moe_layers:
        if layer.router:
            chosen = Port("int64", (None, layer.top_k)), Port("float32", (None, layer.top_k))
            ports = dict(zip(ROUTER_OUTPUTS, chosen, strict=True))
            _matched(bundle, layer.router, {ROUTER_INPUT: Port("float32", (None, width))}, ports)


def expert_width(bundle: Bundle) -> int:
    """The width that all kinds of expert take and give. Raises DamagedFile."""
    width: int | None = None
    for kind in bundle.manifest.expert_kinds:
        rows = Port("float32", (None, width))
        graph = _matched(bundle, kind.graph, {kind.input: rows}, {kind.output: rows})
        for port in (*graph.inputs.values(), *graph.outputs.values()):
            found = port.sizes[1] if port.sizes else None
            if found is None or found != (width or found) or len(graph.outputs) != 1:
                raise DamagedFile(bundle.path(kind.graph), "does not turn rows of one width into others of the same")
            width = found
    if width is None:
        raise DamagedFile(bundle.root / MANIFEST, "has no kind of expert")
    return width


_Ports = Mapping[str, Port | None]  # None: of whatever type


def _matched(bundle: Bundle, name: str, inputs: _Ports, outputs: _Ports) -> Graph:
    """A graph that has these inputs and no others, and these outputs. Raises DamagedFile."""
    path = bundle.path(name)
    graph = read_graph(path)
    if inputs.keys() != graph.inputs.keys():
        odd = min(inputs.keys() ^ graph.inputs.keys())
        raise DamagedFile(path, f"and the manifest do not agree on whether it has an input {odd!r}")
    if missing := outputs.keys() - graph.outputs.keys():
        raise DamagedFile(path, f"has no output {min(missing)!r}, which the manifest names")
    for found, wanted in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, port in wanted.items():
            _compare(path, value, found[value], port)
    return graph


def _known_values(manifest: Manifest, width: int) -> dict[str, Port]:
    """What the manifest says of the values that segments hand over."""
    names, model = manifest.inputs, manifest.model
    known = {manifest.logits: Port("float32", (1, None, model.vocab_size))}
    for state in manifest.states:
        sizes = tuple(None if axis == state.growing_axis else size for axis, size in enumerate(state.shape))
        known |= dict.fromkeys((state.input, state.output), Port(state.dtype, sizes))
    for layer in manifest.moe_layers:
        known |= dict.fromkeys((layer.x, layer.output), Port("float32", (None, width)))
        known[layer.expert_ids] = Port("int64", (None, layer.top_k))
        known[layer.expert_weights] = Port("float32", (None, layer.top_k))
    known[names.token_ids] = Port("int64", (1, None))
    if names.positions:
        known[names.positions] = Port("int64", (1, None))
    if names.past_length:
        known[names.past_length] = Port("int64", (1,))
    return known


def _pick(known: Mapping[str, Port], names: tuple[str, ...]) -> _Ports:
    return {name: known.get(name) for name in names}


def _compare(path: Path, name: str, found: Port, wanted: Port | None) -> None:
    """Type, rank and the sizes that both say are the same. Raises DamagedFile."""
    if wanted is None:
        return
    same = found.dtype == wanted.dtype
    if found.sizes is not None and wanted.sizes is not None:
        same = same and len(found.sizes) == len(wanted.sizes)
        same = same and all(a is None or b is None or a == b for a, b in zip(found.sizes, wanted.sizes, strict=False))
    if not same:
        raise DamagedFile(path, f"has {name!r} as {_say(found)}, the manifest as {_say(wanted)}")


def _say(port: Port) -> str:
    sizes = "" if port.sizes is None else f" [{', '.join('?' if size is None else str(size) for size in port.sizes)}]"
    return f"{port.dtype}{sizes}"


def _read_model(model: memoryview) -> Graph:
    """ModelProto: .graph = 7, .functions = 25. Raises ValueError."""
    if next(fields(model, 25), None) is not None:  # each may call another twice, and so on
        raise ValueError("it defines functions")
    graphs = list(fields(model, 7))
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} main graphs")
    (graph,) = graphs
    _check_nodes(graph, depth=0, looping=False, count=_Count(MAX_NODES))
    return Graph(_ports(graph, 11), _ports(graph, 12))


class _Count:
    """How many nodes are left."""

    def __init__(self, left: int) -> None:
        self._left = left

    def one_more(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has more than {MAX_NODES} nodes")


def _check_nodes(graph: memoryview, depth: int, looping: bool, count: _Count) -> None:
    """GraphProto: .node = 1, .sparse_initializer = 15; NodeProto: .op_type = 4, .attribute = 5, .domain = 7.

    A field that is there twice counts twice, since which of them protobuf takes is not ours to know. Raises ValueError.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("its graphs are nested too deep")
    if next(fields(graph, 15), None) is not None:
        raise ValueError("it has sparse weights")
    for node in fields(graph, 1):
        count.one_more()
        for domain in fields(node, 7):
            if bytes(domain).decode() not in _DOMAINS:
                raise ValueError(f"it has an operator of {bytes(domain).decode()!r}")
        types = {bytes(op_type).decode() for op_type in fields(node, 4)}
        inner = [body for attribute in fields(node, 5) for body in _bodies(attribute)]
        if not inner:
            continue
        loops = types != {_BRANCHING}
        if len(types) != 1 or not types <= {_BRANCHING, _LOOPING} or (loops and looping):
            raise ValueError(f"it loops by {' '.join(sorted(types))}{', inside another loop' if looping else ''}")
        for body in inner:
            _check_nodes(body, depth + 1, looping or loops, count)


def _bodies(attribute: memoryview) -> Iterator[memoryview]:
    """AttributeProto: .g = 6, .graphs = 11."""
    yield from fields(attribute, 6)
    yield from fields(attribute, 11)


def _ports(graph: memoryview, number: int) -> dict[str, Port]:
    """ValueInfoProto: .name = 1, .type = 2; TypeProto.tensor_type = 1. Raises ValueError."""
    ports: dict[str, Port] = {}
    for value in fields(graph, number):
        name = text(value, 1)
        types = list(fields(value, 2))
        tensors = [tensor for kind in types for tensor in fields(kind, 1)]
        if len(types) != 1 or len(tensors) != 1 or name in ports:
            raise ValueError(f"what {name!r} is, is not said, or said twice")
        ports[name] = _port(name, tensors[0])
    return ports


def _port(name: str, tensor: memoryview) -> Port:
    """TypeProto.Tensor: .elem_type = 1, .shape = 2; TensorShapeProto.dim = 1; its .dim_value = 1. Raises ValueError."""
    codes = list(integers(tensor, 1))
    dtype = _DTYPES.get(codes[0]) if len(codes) == 1 else None
    if dtype is None:
        raise ValueError(f"{name!r} has a type that the runtime has no use for")
    shapes = list(fields(tensor, 2))
    if not shapes:
        return Port(dtype, None)
    return Port(dtype, tuple(_size(dim) for dim in fields(shapes[0], 1)))


def _size(dim: memoryview) -> int | None:
    return next(integers(dim, 1), None)
