"""dense.bin: every weight that is not an expert's, once, whichever segments and routers use it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from pocketmoe.bundle.manifest import DENSE, DenseTensor, Role
from pocketmoe.bundle.progress import Progress
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.export.capture.custom_op import OP_TYPE
from pocketmoe.export.cut.prepare import CAPTURED_INPUTS

LARGER_THAN = 64  # elements; smaller constants stay inside their graph
_PAGE, _LINE = 4096, 64
_AT_ONCE = 16 << 20  # bytes
_NORMS = ("LayerNormalization", "RMSNormalization")
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
_SCOPES = "pkg.torch.onnx.name_scopes"


def write_dense(
    pieces: Sequence[ir.Model], roles: dict[str, Role], root: Path, progress: Progress
) -> tuple[DenseTensor, ...]:
    """Move the pieces' large initializers to dense.bin; the pieces then refer to it as external data.

    Raises OutputError.
    """
    path = root / DENSE
    written: dict[str, DenseTensor] = {}
    for piece in pieces:
        order_weights(piece.graph)
    values = [v for piece in pieces for v in piece.graph.initializers.values() if _is_large(v)]
    with translate_write_errors(path), open(path, "wb") as file:
        for done, value in enumerate(values):
            progress("writing dense weights", done, len(values))
            name, tensor = str(value.name), value.const_value
            assert tensor is not None
            if name not in written:
                align = _PAGE if tensor.nbytes >= _PAGE else _LINE
                file.write(b"\0" * (-file.tell() % align))
                written[name] = DenseTensor(
                    name=name,
                    role=roles.get(name, "other"),
                    dtype=tensor.dtype.numpy().name,
                    shape=tuple(tensor.numpy().shape),
                    offset=file.tell(),
                    nbytes=tensor.nbytes,
                )
                _write_rows(file, tensor.numpy())
            entry = written[name]
            value.const_value = ir.ExternalTensor(
                path.name, entry.offset, entry.nbytes, tensor.dtype, shape=ir.Shape(entry.shape), name=name
            )
            value.metadata_props.clear()
    progress("writing dense weights", len(values), len(values))
    return tuple(written.values())


def order_weights(graph: ir.Graph) -> None:
    """Initializers in the order of their first use: cutting leaves them in one that differs from run to run."""
    used = [value for node in graph.all_nodes() for value in node.inputs if value is not None]
    first = {value: place for place, value in reversed(list(enumerate(used)))}
    values = sorted(graph.initializers.values(), key=lambda value: (first.get(value, len(used)), str(value.name)))
    graph.initializers.clear()
    for value in values:
        graph.initializers.add(value)


def _write_rows(file: BinaryIO, array: np.ndarray) -> None:
    """Some rows at a time: an embedding, or a transposed view, must not be copied whole."""
    step = max(1, _AT_ONCE * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), step):
        file.write(np.ascontiguousarray(array[start : start + step]).tobytes())


def _is_large(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size > LARGER_THAN


def find_roles(model: ir.Model, logits: str) -> dict[str, Role]:
    """What each large weight of the captured graph is for."""
    graph = model.graph
    routers = _router_nodes(graph)
    heads = _last_products(next(v for v in graph.outputs if v.name == logits))
    return {str(value.name): _role(value, routers, heads) for value in graph.initializers.values() if _is_large(value)}


def _role(value: ir.Value, routers: set[ir.Node], heads: set[ir.Node]) -> Role:
    users = [use.node for use in value.uses()]
    if any(node.op_type == "Gather" and _is_token_ids(node.inputs[1]) for node in users):
        return "embedding"
    if any(node in routers for node in users):
        return "router"
    if "norm" in str(value.name) or any(node.op_type.endswith(_NORMS) for node in users):
        return "norm"
    if any(node in heads for node in users):
        return "head"
    scope = f"{value.name} {' '.join(_nearest_scope(node) for node in users)}"
    if "shared" in scope:
        return "shared_expert"
    if "attn" in scope or "attention" in scope:
        return "attention"
    return "other"


def _is_token_ids(value: ir.Value | None) -> bool:
    while value is not None and (node := value.producer()) is not None:
        value = node.inputs[0]
    return value is not None and value.name == CAPTURED_INPUTS[0]


def _router_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes between the experts' x and their ids and weights."""
    found: set[ir.Node] = set()
    for experts in graph:
        if experts.op_type != OP_TYPE:
            continue
        x, *routing = experts.inputs
        stops = set(_ancestors([x] if x is not None else [], set()))
        found |= _ancestors([value for value in routing if value is not None], stops)
    return found


def _ancestors(values: Iterable[ir.Value], stops: set[ir.Node]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    todo = list(values)
    while todo:
        node = todo.pop().producer()
        if node is None or node in found or node in stops or node.op_type == OP_TYPE:
            continue
        found.add(node)
        todo += [value for value in node.inputs if value is not None]
    return found


def _last_products(logits: ir.Value) -> set[ir.Node]:
    """The matrix products that the logits come from, with nothing but element-wise work in between."""
    found: set[ir.Node] = set()
    todo = [logits]
    while todo:
        node = todo.pop().producer()
        if node is None or node.op_type == OP_TYPE:
            continue
        if node.op_type in _PRODUCTS:
            found.add(node)
        else:
            todo += [value for value in node.inputs if value is not None]
    return found


def _nearest_scope(node: ir.Node, reach: int = 6) -> str:
    """The name of the module that a node belongs to; fused nodes have lost it, the nodes after them have not."""
    layer = [node]
    for _ in range(reach):
        for candidate in layer:
            scopes = candidate.metadata_props.get(_SCOPES)
            if scopes is not None:
                return ".".join(ast.literal_eval(scopes)[-2:-1])
        layer = [use.node for n in layer for value in n.outputs for use in value.uses()]
    return ""
