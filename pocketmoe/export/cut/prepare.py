"""Rewrites of the captured graph before it is cut: what the runtime and the quantizer may then take for granted.

Each function takes the model, changes it in place and returns how often it did.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.cut.attention import fuse_attention, make_room, pack_projections, turn_in_attention
from pocketmoe.export.cut.lengths import (
    NO_STATES,
    POSITIONS,
    TOKEN_IDS,
    integers_of,
    is_constant,
    read_last_position,
    read_past_length,
    read_token_count,
    replace_value,
    size_of,
)
from pocketmoe.export.cut.masks import drop_guards, drop_masks
from pocketmoe.export.cut.rotary import fuse_rotary
from pocketmoe.export.cut.views import merge_views

CAPTURED_INPUTS = (TOKEN_IDS, POSITIONS)
_STATE_IN, _STATE_OUT = "input.", "output."


@dataclass(frozen=True)
class CapturedState:
    """A state's graph input and output, its shape with -1 at `growing_axis`, and whether both may be one buffer.

    `with_room`: the input is as long as the text after the step, and both are one buffer.
    """

    input: ir.Value
    output: ir.Value
    shape: tuple[int, ...]
    growing_axis: int | None
    in_place: bool
    with_room: bool


def prepare(model: ir.Model) -> tuple[CapturedState, ...]:
    """All rewrites in order; the model's states."""
    _check_inputs(model.graph)
    _plain_constants(model)
    drop_constant_states(model)
    plain_matmuls(model)
    name_weights(model)
    fuse_attention(model)
    growing = find_growing(model.graph)
    read_past_length(model, growing)
    read_last_position(model)
    read_token_count(model)
    merge_views(model)
    drop_masks(model)
    if drop_guards(model):
        merge_views(model)
    fuse_rotary(model)
    _remove_unused(model)
    merge_views(model)
    turn_in_attention(model)
    _remove_unused(model)
    pack_projections(model)
    _compute_once(model)
    roomy = make_room(model, growing)
    _remove_unused(model)
    infer_types(model)
    return _states(model.graph, growing, roomy)


def _check_inputs(graph: ir.Graph) -> None:
    for value in graph.inputs:
        if value.name not in CAPTURED_INPUTS and not str(value.name).startswith(_STATE_IN):
            raise UnsupportedModel(f"the captured graph has an input {value.name!r} that the runtime does not know")


def state_pairs(graph: ir.Graph) -> list[tuple[ir.Value, ir.Value]]:
    """The graph's states: inputs `input.NAME` with the outputs `output.NAME`."""
    outputs = {str(value.name): value for value in graph.outputs}
    pairs: list[tuple[ir.Value, ir.Value]] = []
    for value in graph.inputs:
        if value.name in NO_STATES:
            continue
        name = _STATE_OUT + str(value.name).removeprefix(_STATE_IN)
        if name not in outputs:
            raise UnsupportedModel(f"the captured graph does not return its state {value.name!r}")
        pairs.append((value, outputs[name]))
    return pairs


def drop_constant_states(model: ir.Model) -> int:
    """Remove states that pass through unchanged and that nothing reads (a sliding window's size)."""
    graph, dropped = model.graph, 0
    for source, target in state_pairs(graph):
        uses = list(source.uses())
        node = target.producer()
        if node is None or node.op_type != "Identity" or len(uses) != 1 or uses[0].node is not node:
            continue
        graph.outputs.remove(target)
        graph.remove(node, safe=True)
        graph.inputs.remove(source)
        dropped += 1
    return dropped


def plain_matmuls(model: ir.Model) -> int:
    """Gemm, and MatMul of a transposed or reshaped weight, become MatMul with a constant [K, N] (and an Add)."""
    graph, changed = model.graph, 0
    for node in list(graph):
        if node.op_type == "Reshape" and all(map(is_constant, node.inputs)) and 0 not in integers_of(node.inputs[1]):
            replace_value(node.outputs[0], _reshaped(graph, node))
            graph.remove(node, safe=True)
            changed += 1
    for node in list(graph):
        if node.op_type == "Transpose" and is_constant(node.inputs[0]):
            value = node.inputs[0]
            assert value is not None
            axes = node.attributes.get_ints("perm", list(range(len(value.shape or ())))[::-1])
            replace_value(node.outputs[0], _transposed(graph, value, tuple(axes)))
            graph.remove(node, safe=True)
            changed += 1
    for node in list(graph):
        if node.op_type == "Gemm" and _is_plain_gemm(node):
            _gemm_to_matmul(graph, node)
            changed += 1
    return changed


def _is_plain_gemm(node: ir.Node) -> bool:
    attributes = node.attributes
    return (
        is_constant(node.inputs[1])
        and attributes.get_int("transA", 0) == 0
        and attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
    )


def _gemm_to_matmul(graph: ir.Graph, node: ir.Node) -> None:
    a, b = node.inputs[0], node.inputs[1]
    assert b is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.attributes.get_int("transB", 0):
        b = _transposed(graph, b, (1, 0))
    out = node.outputs[0]
    matmul = ir.node("MatMul", [a, b], name=f"{node.name}_matmul", metadata_props=dict(node.metadata_props))
    product = matmul.outputs[0]
    product.name, product.type, product.shape = f"{out.name}_product", out.type, out.shape
    new = [matmul]
    if bias is not None:
        add = ir.node("Add", [product, bias], name=f"{node.name}_bias", metadata_props=dict(node.metadata_props))
        add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = f"{out.name}_sum", out.type, out.shape
        product = add.outputs[0]
        new.append(add)
    graph.insert_before(node, new)
    replace_value(out, product)
    graph.remove(node, safe=True)


def _reshaped(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """An initializer that is a weight in the shape that a Reshape gives it; the same one when asked twice."""
    value = None if node.inputs[0] is None else node.inputs[0].const_value
    assert value is not None
    array = value.numpy().reshape(integers_of(node.inputs[1]))
    name = f"{value.name}.{'x'.join(map(str, array.shape))}"
    if name not in graph.initializers:
        result = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        result.dtype, result.shape = value.dtype, ir.Shape(array.shape)
        graph.register_initializer(result)
    return graph.initializers[name]


def _transposed(graph: ir.Graph, value: ir.Value, axes: tuple[int, ...]) -> ir.Value:
    """An initializer that is `value` with its axes permuted; the same one when asked twice."""
    name = f"{value.name}.T" if axes == (1, 0) else f"{value.name}.T{''.join(map(str, axes))}"
    if name in graph.initializers:
        return graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().transpose(axes)  # a view: no copy until it is written
    result = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    result.dtype, result.shape = value.const_value.dtype, ir.Shape(array.shape)
    graph.register_initializer(result)
    return result


def name_weights(model: ir.Model) -> int:
    """Weights whose name the exporter lost get that of the module that uses them: model.layers.0.self_attn.o_proj."""
    import ast

    graph, renamed = model.graph, 0
    for node in list(graph):
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if node.op_type != "MatMul" or scopes is None or not is_constant(node.inputs[1]):
            continue
        value = node.inputs[1]
        assert value is not None
        parts = ast.literal_eval(scopes)
        name = f"{parts[-2]}.weight.T" if len(parts) > 1 else ""
        if not str(value.name).startswith("val_") or not parts[-2] or name in graph.initializers:
            continue
        graph.initializers.pop(str(value.name))
        value.name = name
        assert value.const_value is not None
        value.const_value.name = name
        graph.register_initializer(value)
        renamed += 1
    return renamed


def find_growing(graph: ir.Graph) -> dict[str, int]:
    """Per state input that gets longer by the new tokens: the axis. Others keep their size, or change it otherwise."""
    growing: dict[str, int] = {}
    for source, target in state_pairs(graph):
        axis = _symbolic_axis(source)
        node = target.producer()
        if axis is None or node is None:
            continue
        appended = node.op_type == "Concat" and node.inputs[0] is source and _axis_of(node, source) == axis
        attended = node.op_type == "GroupQueryAttention" and source in (node.inputs[3], node.inputs[4]) and axis == 2
        if not (appended or attended):
            raise UnsupportedModel(f"the state {source.name!r} is neither appended to nor of one size ({node.op_type})")
        growing[str(source.name)] = axis
    return growing


def _axis_of(node: ir.Node, value: ir.Value) -> int:
    axis = node.attributes.get_int("axis", 0)
    return axis if axis >= 0 else axis + len(value.shape or ())


def _symbolic_axis(value: ir.Value) -> int | None:
    """The one axis whose size is not fixed."""
    assert value.shape is not None
    free = [
        axis for axis, size in enumerate(value.shape) if not isinstance(size, int) and not str(size.value).isdigit()
    ]
    if len(free) > 1:
        raise UnsupportedModel(f"the state {value.name!r} has more than one dynamic axis")
    return free[0] if free else None


def _plain_constants(model: ir.Model) -> None:
    """Constants that the exporter made nodes become initializers."""
    from onnx_ir.passes import common

    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _compute_once(model: ir.Model) -> None:
    """What two nodes compute alike, lengths and tables mostly, one computes."""
    from onnx_ir.passes import common

    common.CommonSubexpressionEliminationPass()(model)


def _remove_unused(model: ir.Model) -> None:
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)


def infer_types(model: ir.Model) -> None:
    """Types (and shapes) of values that the exporter left without."""
    from onnx_ir.passes import common

    from pocketmoe.export.capture.custom_op import install

    install()  # the operator's schema
    common.ShapeInferencePass(strict_mode=False, data_prop=False)(model)


def _states(graph: ir.Graph, growing: dict[str, int], roomy: set[str]) -> tuple[CapturedState, ...]:
    states: list[CapturedState] = []
    for source, target in state_pairs(graph):
        assert source.shape is not None
        axis = growing.get(str(source.name))
        shape = tuple(-1 if a == axis else size_of(size) for a, size in enumerate(source.shape))
        room = source.name in roomy
        states.append(CapturedState(source, target, shape, axis, _may_share(source, target), room))
    return tuple(states)


def _may_share(source: ir.Value, target: ir.Value) -> bool:
    """Past and present go through one GroupQueryAttention and nothing else looks at them."""
    node = target.producer()
    if node is None or node.op_type != "GroupQueryAttention" or list(target.uses()):
        return False
    return all(use.node is node and use.idx in (3, 4) for use in source.uses())
