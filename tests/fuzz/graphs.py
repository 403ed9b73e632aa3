"""Graphs that load and misbehave: other names, types and ranks, ids out of range, sizes and loops without end."""

from __future__ import annotations

from random import Random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz import mutate

_TYPES = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.INT8,
    TensorProto.BOOL,
    TensorProto.STRING,
)
_IDS = (-1, -(2**63), 4, 10**9, 2**31, 2**40, 2**62)


def mutate_graph(random: Random, data: bytes) -> tuple[bytes, str]:
    """The bytes of a model with one change, and what was done."""
    if random.random() < 0.2:
        return mutate.raw(random, data)
    model = onnx.load_model_from_string(data)
    change = random.choice(_CHANGES)
    what = change(random, model)
    return model.SerializeToString(), f"{change.__name__.strip('_')}: {what}"


def _rename(random: Random, model: onnx.ModelProto) -> str:
    graph = model.graph
    node = random.choice(graph.node)
    names = [name for name in [*node.input, *node.output] if name]
    old = random.choice(names) if names else ""
    new = random.choice(
        [f"{old}_", "", "logits", "é\n", *(v.name for v in graph.input), *(v.name for v in graph.output)]
    )
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            if name == old:
                names[i] = new
    return f"{old!r} of {node.op_type} -> {new!r}"


def _declare(random: Random, model: onnx.ModelProto) -> str:
    """Another name, type or rank in the graph's own list of inputs and outputs."""
    side = random.choice(["input", "output"])
    values = getattr(model.graph, side)
    if not values:
        return f"no {side}"
    value = random.choice(values)
    tensor = value.type.tensor_type
    match random.randrange(4):
        case 0:
            old, value.name = value.name, random.choice([f"{value.name}_", "", "x" * 1000])
            return f"{side} {old} -> {value.name[:20]!r}"
        case 1:
            tensor.elem_type = random.choice(_TYPES)
            return f"{side} {value.name} has type {tensor.elem_type}"
        case 2:
            new = [random.choice([0, 1, 3, -1, 2**31, 2**62]) for _ in range(random.randrange(6))]
            tensor.shape.CopyFrom(
                onnx.TensorShapeProto(dim=[onnx.TensorShapeProto.Dimension(dim_value=n) for n in new])
            )
            return f"{side} {value.name} has shape {new}"
        case _:
            values.remove(value)
            return f"{side} {value.name} removed"


def _cast(random: Random, model: onnx.ModelProto) -> str:
    """What a graph really hands over has another type."""
    output = random.choice(model.graph.output)
    new = random.choice(_TYPES[:-1])
    _through(model, output, [helper.make_node("Cast", ["before_"], [output.name], to=new)])
    output.type.tensor_type.elem_type = new
    return f"{output.name} to {new}"


def _reshape(random: Random, model: onnx.ModelProto) -> str:
    """What a graph really hands over has another shape, and the declaration says nothing of it."""
    output = random.choice(model.graph.output)
    shape = random.choice([[-1], [1, 1, -1], [0], [1, -1, 1, 1], [-1, 1]])
    kind = random.choice(["Reshape", "Slice", "Unsqueeze", "ReduceMax"])
    constants = [_constant("shape_", shape), _constant("zero_", [0]), _constant("one_", [1])]
    node = {
        "Reshape": helper.make_node("Reshape", ["before_", "shape_"], [output.name]),
        "Slice": helper.make_node("Slice", ["before_", "zero_", "zero_", "zero_"], [output.name]),
        "Unsqueeze": helper.make_node("Unsqueeze", ["before_", "zero_"], [output.name]),
        "ReduceMax": helper.make_node("ReduceMax", ["before_", "zero_"], [output.name], keepdims=0),
    }[kind]
    _through(model, output, [*constants, node])
    output.type.tensor_type.ClearField("shape")
    return f"{output.name} by {kind} {shape}"


def _numbers(random: Random, model: onnx.ModelProto) -> str:
    """A graph hands over numbers that nobody expects: ids out of range, NaN."""
    output = random.choice(model.graph.output)
    whole = output.type.tensor_type.elem_type in {TensorProto.INT64, TensorProto.INT32}
    number = random.choice(_IDS) if whole else random.choice([float("nan"), float("inf"), -1e38, 0.0])
    dtype = helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
    try:
        constant = numpy_helper.from_array(np.asarray(number).astype(dtype), "number_")
    except (OverflowError, TypeError, ValueError):
        return "nothing"
    model.graph.initializer.append(constant)
    how = random.choice(["all", "some"])
    if how == "all":
        nodes = [
            helper.make_node("Shape", ["before_"], ["s_"]),
            helper.make_node("Expand", ["number_", "s_"], [output.name]),
        ]
    else:
        nodes = [helper.make_node("Add", ["before_", "number_"], [output.name])]
    _through(model, output, nodes)
    return f"{output.name}: {how} {number}"


def _blow_up(random: Random, model: onnx.ModelProto) -> str:
    """Memory or time without end, in the way of an output."""
    output = random.choice(model.graph.output)
    count = random.choice([10**8, 2 * 10**9, 2**40])
    kind = random.choice(["ConstantOfShape", "Expand", "Tile", "Range", "Loop", "Concat"])
    nodes = [
        _constant("count_", [count]),
        _constant("axis_", [0]),
        _scalar("n_", count),
        _scalar("z_", 0),
        _scalar("i_", 1),
    ]
    if kind == "ConstantOfShape":
        nodes += [helper.make_node(kind, ["count_"], ["big_"])]
    elif kind in {"Expand", "Tile"}:
        nodes += [
            _constant("seed_", [1]),
            helper.make_node(kind, ["seed_", "count_"], ["big0_"]),
            helper.make_node("Cast", ["big0_"], ["big_"], to=TensorProto.FLOAT),
        ]
    elif kind == "Range":
        nodes += [
            helper.make_node(kind, ["z_", "n_", "i_"], ["big0_"]),
            helper.make_node("Cast", ["big0_"], ["big_"], to=TensorProto.FLOAT),
        ]
    elif kind == "Concat":
        nodes += [helper.make_node("ConstantOfShape", ["hundred_"], ["c0_"])]
        nodes.insert(0, _constant("hundred_", [100]))
        nodes += [helper.make_node("Concat", [f"c{i}_", f"c{i}_"], [f"c{i + 1}_"], axis=0) for i in range(30)]
        nodes += [helper.make_node("Identity", ["c30_"], ["big_"])]
    else:
        nodes += _loop(count)
    nodes += [
        helper.make_node("ReduceMin", ["big_", "axis_"], ["least_"], keepdims=0),
        helper.make_node("Cast", ["least_"], ["least0_"], to=output.type.tensor_type.elem_type),
        helper.make_node("Add", ["before_", "least0_"], [output.name]),
    ]
    _through(model, output, nodes)
    return f"{output.name} waits for {kind} of {count:g}"


def _loop(count: int) -> list[onnx.NodeProto]:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c_in"], ["c_out"]), helper.make_node("Add", ["v_in", "v_in"], ["v_out"])],
        "body",
        [
            helper.make_tensor_value_info("it", TensorProto.INT64, []),
            helper.make_tensor_value_info("c_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_in", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("c_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, [1]),
        ],
    )
    true = helper.make_node("Constant", [], ["true_"], value=numpy_helper.from_array(np.array(True)))
    start = helper.make_node("Constant", [], ["v_"], value=numpy_helper.from_array(np.zeros(1, np.float32)))
    return [true, start, helper.make_node("Loop", ["n_", "true_", "v_"], ["big_"], body=body)]


def _drop(random: Random, model: onnx.ModelProto) -> str:
    node = random.choice(model.graph.node)
    model.graph.node.remove(node)
    return f"{node.op_type} {node.name}"


def _operator(random: Random, model: onnx.ModelProto) -> str:
    node = random.choice(model.graph.node)
    old = node.op_type
    node.op_type = random.choice(["Nonsense", "Identity", "Loop", "MatMulNBits", "QMoE", "TopK", "", "NonZero"])
    node.domain = random.choice([node.domain, "", "com.microsoft", "evil"])
    return f"{old} -> {node.domain}:{node.op_type}"


def _attribute(random: Random, model: onnx.ModelProto) -> str:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return "nothing"
    node = random.choice(nodes)
    attribute = random.choice(node.attribute)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = random.choice([-1, 0, 1, 7, 2**31, 2**62])
        return f"{node.op_type}.{attribute.name} = {attribute.i}"
    node.attribute.remove(attribute)
    return f"{node.op_type}.{attribute.name} removed"


def _initializer(random: Random, model: onnx.ModelProto) -> str:
    """Weights that are longer than their bytes, elsewhere, or gone."""
    tensors = [*model.graph.initializer]
    if not tensors:
        return "nothing"
    tensor = random.choice(tensors)
    match random.randrange(4):
        case 0:
            tensor.dims[:] = random.choice([[2**31], [2**62], [0], [-1], [1] * 9, []])
            return f"{tensor.name} has dims {list(tensor.dims)}"
        case 1:
            tensor.data_type = random.choice([*_TYPES, 0, 99])
            return f"{tensor.name} has type {tensor.data_type}"
        case 2 if tensor.external_data:
            entry = random.choice(tensor.external_data)
            entry.value = random.choice(
                ["../../../canary/.ssh/id", "/etc/passwd", "dense.bin\x00", "-1", "9" * 30, "x", ""]
            )
            return f"{tensor.name}: {entry.key} = {entry.value!r}"
        case _:
            model.graph.initializer.remove(tensor)
            return f"{tensor.name} removed"


def _opset(random: Random, model: onnx.ModelProto) -> str:
    entry = random.choice(model.opset_import)
    entry.version = random.choice([0, 1, 5, 99, 2**40, -1])
    model.ir_version = random.choice([model.ir_version, 1, 99])
    return f"{entry.domain or 'ai.onnx'} {entry.version}, ir {model.ir_version}"


def _through(model: onnx.ModelProto, output: onnx.ValueInfoProto, nodes: list[onnx.NodeProto]) -> None:
    """Put nodes between whatever makes an output (now called before_) and the output."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == output.name:
                    names[i] = "before_"
    model.graph.node.extend(nodes)


def _constant(name: str, values: list[int]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.int64)))


def _scalar(name: str, value: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.int64)))


_CHANGES = (
    _rename,
    _declare,
    _declare,
    _cast,
    _cast,
    _reshape,
    _reshape,
    _numbers,
    _numbers,
    _blow_up,
    _blow_up,
    _drop,
    _operator,
    _attribute,
    _initializer,
    _opset,
)
