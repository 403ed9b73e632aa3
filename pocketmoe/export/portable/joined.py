"""The segments of a bundle as one graph again, the experts between them.

What a stock checker does not know is written in ONNX's own operators where ONNX Runtime gives the same bits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pocketmoe import __version__
from pocketmoe.bundle.manifest import DENSE, Manifest, State
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import DamagedFile
from pocketmoe.export.portable.conditional import Builder, LayerExperts

PRODUCER = "pocketmoe"


def load(path: Path) -> ir.Model:
    """The graph at `path`, its external data not looked at. Raises DamagedFile."""
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise whatever the damage leads to
        raise DamagedFile(path, f"is no ONNX graph ({type(error).__name__})") from error


def join(bundle: Bundle, layers: Sequence[LayerExperts], data_file: str) -> ir.Model:
    """One model of the bundle's segments with `layers` between them, all weights in `data_file`.

    Raises DamagedFile when the segments do not fit together.
    """
    manifest = bundle.manifest
    model = load(bundle.path(manifest.segments[0].graph))
    joined = ir.Graph([], [], nodes=[], name=manifest.model.model_type)
    joined.inputs.extend(_inputs(manifest))
    values = {str(value.name): value for value in joined.inputs}
    opsets = {"com.microsoft": 1}
    _end_of_text(joined, values, manifest, data_file)
    _room(joined, values, manifest, data_file)
    for index, segment in enumerate(manifest.segments):
        piece = load(bundle.path(segment.graph))
        if any(opsets.setdefault(domain, version) != version for domain, version in piece.opset_imports.items()):
            raise DamagedFile(bundle.path(segment.graph), "is of another opset than the segments before it")
        _append(joined, values, piece.graph, data_file, bundle.path(segment.graph))
        if index < len(layers):
            layer = manifest.moe_layers[index]
            names = (layer.x, layer.expert_ids, layer.expert_weights)
            x, ids, weights = (_find(values, name, bundle.path(segment.graph)) for name in names)
            y = layers[index].build(Builder(joined, f"experts.{index}.", data_file), x, ids, weights)
            y.name, y.shape = layer.output, x.shape
            values[layer.output] = y
    for name, shape in _output_shapes(manifest).items():
        output = _find(values, name, bundle.path(manifest.segments[-1].graph))
        output.shape = ir.Shape(shape)
        joined.outputs.append(output)
    standard_norms(joined)
    joined.opset_imports.update(opsets)
    return ir.Model(joined, ir_version=model.ir_version, producer_name=PRODUCER, producer_version=__version__)


def _inputs(manifest: Manifest) -> list[ir.Value]:
    """The graph's inputs: token ids, positions and past length where they are read, states."""
    names = manifest.inputs
    shapes = {names.token_ids: [1, "tokens"], names.positions: [1, "tokens"], names.past_length: [1]}
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(shape))
        for name, shape in shapes.items()
        if name is not None
    ]
    return values + [_state(state) for state in manifest.states]


def _end_of_text(joined: ir.Graph, values: dict[str, ir.Value], manifest: Manifest, data_file: str) -> None:
    """The last position is that of the tokens at hand, since whoever runs the model gives it a prompt as a whole."""
    names = manifest.inputs
    if names.last_position is not None and names.positions is not None:
        build = Builder(joined, "text.", data_file)
        last = build.op(
            "end", "ReduceMax", [values[names.positions], build.constant("axes", [1])], ir.DataType.INT64, keepdims=0
        )
        last.shape = ir.Shape([1])
        values[names.last_position] = last


def _room(joined: ir.Graph, values: dict[str, ir.Value], manifest: Manifest, data_file: str) -> None:
    """States get the room for new tokens that segments want: whoever runs the model gives them as they came out."""
    states = [state for state in manifest.states if state.with_room]
    if not states:
        return
    build = Builder(joined, "room.", data_file)
    tokens = build.op("tokens", "Shape", [values[manifest.inputs.token_ids]], ir.DataType.INT64, start=1, end=2)
    for number, state in enumerate(states):
        axis, kind = state.growing_axis or 0, ir.DataType.from_numpy(np.dtype(state.dtype))
        before, after = state.shape[:axis], state.shape[axis + 1 :]
        parts = [build.constant(f"{number}.before", before), tokens, build.constant(f"{number}.after", after)]
        shape = build.op(f"{number}.shape", "Concat", parts, ir.DataType.INT64, axis=0)
        zero = ir.tensor(np.zeros(1, state.dtype))
        room = build.op(f"{number}.room", "ConstantOfShape", [shape], kind, value=zero)
        values[state.input] = build.op(f"{number}.state", "Concat", [values[state.input], room], kind, axis=axis)


def _state(state: State) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(state.dtype)))
    return ir.Value(name=state.input, type=kind, shape=ir.Shape(_shape(state, "past_tokens")))


def _shape(state: State, length: str) -> list[int | str]:
    return [length if axis == state.growing_axis else size for axis, size in enumerate(state.shape)]


def _output_shapes(manifest: Manifest) -> dict[str, list[int | str]]:
    """The graph's outputs in order: logits, then the states."""
    logits: list[int | str] = [1, "tokens", manifest.model.vocab_size]
    return {manifest.logits: logits} | {state.output: _shape(state, "all_tokens") for state in manifest.states}


def _find(values: dict[str, ir.Value], name: str, path: Path) -> ir.Value:
    if name not in values:
        raise DamagedFile(path, f"{name!r} is made neither here nor before")
    return values[name]


def _append(joined: ir.Graph, values: dict[str, ir.Value], piece: ir.Graph, data_file: str, path: Path) -> None:
    """Move a segment's nodes and weights into `joined`.

    A segment may compute anew what depends on nothing but the number of tokens; the first computation serves for all.
    """
    for value in list(piece.inputs):
        value.replace_all_uses_with(_find(values, str(value.name), path))
    piece.inputs.clear()
    piece.outputs.clear()
    for name, value in list(piece.initializers.items()):
        _move_weight(joined, piece, name, value, data_file, path)
    for node in list(piece):
        known = [values.get(str(value.name)) for value in node.outputs]
        if any(value is not None for value in known):
            for value, same in zip(node.outputs, known, strict=True):
                if same is not None:
                    value.replace_all_uses_with(same)
            piece.remove(node)
        else:
            piece.remove(node)
            joined.append(node)
            values.update({str(value.name): value for value in node.outputs if value.name})


def _move_weight(joined: ir.Graph, piece: ir.Graph, name: str, value: ir.Value, data_file: str, path: Path) -> None:
    tensor = value.const_value
    if tensor is None:
        raise DamagedFile(path, f"has no bytes for {name!r}")
    if isinstance(tensor, ir.ExternalTensor):
        if tensor.location != Path(DENSE).name:
            raise DamagedFile(path, f"keeps {name!r} in another file than {DENSE}")
        tensor = ir.ExternalTensor(
            data_file, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(tensor.shape), name=name
        )
    known = joined.initializers.get(name)
    if known is not None and _is_same(known.const_value, tensor):
        value.replace_all_uses_with(known)
        return
    del piece.initializers[name]
    if known is not None:  # a tied embedding, say, whose bytes the head reads in another shape
        value.name = f"{piece.name}.{name}"
        tensor.name = value.name
    value.const_value = tensor
    joined.register_initializer(value)


def _is_same(a: ir.TensorProtocol | None, b: ir.TensorProtocol) -> bool:
    if a is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor):
        return (a.offset, a.length) == (b.offset, b.length)
    external = isinstance(a, ir.ExternalTensor) or isinstance(b, ir.ExternalTensor)
    return not external and a.tobytes() == b.tobytes()


def standard_norms(graph: ir.Graph) -> int:
    """SimplifiedLayerNormalization, which ONNX Runtime puts into ONNX's domain but ONNX does not have, in ONNX's terms.

    ONNX Runtime fuses them back when it loads the model, so that nothing is lost. Returns how many were replaced.
    """
    nodes = [node for node in graph if node.op_type == "SimplifiedLayerNormalization"]
    for node in nodes:
        x, scale = node.inputs[:2]
        old = node.outputs[0]
        build = Builder(graph, f"{old.name}.", "", before=node)
        square = build.op("square", "Pow", [x, build.constant("two", 2, np.float32)])
        axes = build.constant("axes", [node.attributes.get_int("axis", -1)])
        mean = build.op("mean", "ReduceMean", [square, axes], keepdims=1)
        epsilon = build.constant("epsilon", node.attributes.get_float("epsilon", 1e-5), np.float32)
        root = build.op("root", "Sqrt", [build.op("sum", "Add", [mean, epsilon])])
        new = build.op("y", "Mul", [build.op("quotient", "Div", [x, root]), scale])
        name, new.shape = old.name, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        new.name = name
    return len(nodes)
