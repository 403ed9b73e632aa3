"""The graph rewrite: products with a constant become MatMulNBits, Gather from one becomes GatherBlockQuantized.

A graph's weights are external initializers. The rewrite never reads them: it says how each is used, and points new
initializers at the places that the caller has laid out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from pocketmoe.errors import DamagedFile
from pocketmoe.quantize.algorithms.formats import FloatFormat, Format

MIN_SIDE = 16  # a matrix with a shorter side is left alone: padding its rows to a block would eat what it saves
ALIGNMENT = 64  # of every tensor in dense.bin and in records, in bytes

_MICROSOFT = "com.microsoft"
Level = int | Mapping[int, int]  # accuracy_level of MatMulNBits: of all, or by bits


@dataclass(frozen=True)
class Use:
    """How a graph uses a weight: multiplied by it, or gathering its rows. `by_rows`: stored [N, K], not [K, N].

    `heads`: as many matrices [K, N], one for each of an input's [1, heads, S, K]; 0 where it is one matrix for all.
    """

    kind: Literal["matmul", "gather"]
    by_rows: bool
    heads: int = 0


MATMUL, MATMUL_BY_ROWS, GATHER = Use("matmul", False), Use("matmul", True), Use("gather", True)


@dataclass(frozen=True)
class Part:
    """A tensor and where its bytes go: name, numpy's dtype name, shape, offset in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        """The first offset after it at which another may begin."""
        return -(-(self.offset + self.nbytes) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Packed:
    """A quantized weight W [n, k]: its format, how it is used, and its codes, scales and (asymmetric) zero points.

    The rows of several heads' matrices follow one another.
    """

    form: Format
    use: Use
    n: int
    k: int
    parts: tuple[Part, ...]


def load(path: Path) -> ir.Model:
    """The graph at `path`, its external data not looked at. Raises DamagedFile."""
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise whatever the damage leads to
        raise DamagedFile(path, f"is no ONNX graph ({type(error).__name__})") from error


def externals(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    """The external initializers of the graph by name."""
    found: dict[str, ir.ExternalTensor] = {}
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            found[name] = value.const_value
    return found


def find_uses(model: ir.Model) -> dict[str, Use]:
    """Each matrix that could be quantized: those all of whose uses are of one kind.

    Uses in subgraphs and as graph outputs cannot be rewritten.
    """
    found: dict[str, Use] = {}
    for name, tensor in externals(model).items():
        value = model.graph.initializers[name]
        uses = {_use_of(use.node, use.idx, model.graph) for use in value.uses()}
        use = uses.pop() if len(uses) == 1 else None
        if (
            use is not None
            and is_matrix(tensor.shape.numpy(), tensor.dtype.numpy().name)
            and not value.is_graph_output()
        ):
            found[name] = use
    return found


def is_matrix(shape: Sequence[int], dtype: str) -> bool:
    """Large enough, of the right rank and type to be quantized; also as many of them as there are heads."""
    return dtype == "float32" and len(shape) in (2, 3) and min(shape[-2:]) >= MIN_SIDE


def pack_parts(name: str, form: Format, use: Use, n: int, k: int, offset: int) -> Packed:
    """Lay out a weight W [n, k] in `form` from `offset` on; `fitted` to its rows."""
    form = form.fitted(k)
    codes, scales, *zeros = form.shapes(n, k)
    if use.kind == "gather":
        codes = (n, -(-k * form.bits // 8))  # unlike MatMulNBits, rows are not padded to whole blocks
    parts = [Part(f"{name}.codes", "uint8", codes, offset)]
    parts.append(Part(f"{name}.scales", "float32", scales, parts[-1].end))
    parts += [Part(f"{name}.zero_points", "uint8", shape, parts[-1].end) for shape in zeros]
    return Packed(form, use, n, k, tuple(parts))


def rewrite(model: ir.Model, packed: Mapping[str, Packed], kept: Mapping[str, int], location: str, level: Level) -> int:
    """Replace the nodes that use a weight in `packed`, and move the weights in `kept`; return how many were replaced.

    Both map names of external initializers, which together are all of them: to their quantized form, or to their
    offset in the file `location`. `level` becomes the accuracy_level of MatMulNBits.
    """
    graph = model.graph
    found = externals(model)
    assert set(packed) | set(kept) == set(found), "every external initializer must get a place"
    for name, offset in kept.items():
        old = found[name]
        graph.initializers[name].const_value = ir.ExternalTensor(
            location, offset, old.length, old.dtype, shape=old.shape, name=name
        )
    replaced = 0
    for name, weight in packed.items():
        value = graph.initializers[name]
        by_head = _by_head(weight)
        inputs = [[_register(graph, part, location) for part in matrix.parts] for matrix in by_head]
        for node in [use.node for use in value.uses()]:
            nodes = _split_heads(graph, node, len(by_head)) if weight.use.heads else [node]
            for product, matrix, parts in zip(nodes, by_head, inputs, strict=True):
                _replace_node(graph, product, matrix, parts, level)
            replaced += 1
        del graph.initializers[name]
    if replaced:
        model.opset_imports[_MICROSOFT] = 1
    return replaced


def _use_of(node: ir.Node, index: int, graph: ir.Graph) -> Use | None:
    """How a node uses its input number `index`; None when that cannot be rewritten."""
    attributes = node.attributes
    if node.graph is not graph:
        return None
    match node.domain, node.op_type, index:
        case "", "MatMul", 1:
            return _use_by_heads(node)
        case "", "Gather", 0 if attributes.get_int("axis", 0) == 0:
            return GATHER
        case ("", "Gemm", 1) | ("com.microsoft", "FusedMatMul", 1) if _is_product(node):
            return MATMUL_BY_ROWS if attributes.get_int("transB", 0) else MATMUL
        case _:
            return None


def _use_by_heads(node: ir.Node) -> Use | None:
    """How a MatMul uses its weight: [K, N], or [heads, K, N] on an input [1, heads, S, K]."""
    x, weight = (None if value is None else value.shape for value in node.inputs[:2])
    rank = 0 if weight is None else len(weight)
    if rank == 2:
        return MATMUL
    heads = weight[0] if weight is not None and rank == 3 else None
    if not isinstance(heads, int) or x is None or len(x) != 4 or x[1] != heads:
        return None
    return Use("matmul", False, heads)


def _is_product(node: ir.Node) -> bool:
    """A Gemm or FusedMatMul that is x W or x W^T, and perhaps a bias of one row; without one, also a multiple of it."""
    attributes = node.attributes
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    one_row = bias is None or (bias.shape is not None and len(bias.shape) == 1)
    moved = [attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")]
    scales = [attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return one_row and not any(moved) and (bias is None or scales == [1.0, 1.0])


def _replace_node(graph: ir.Graph, node: ir.Node, weight: Packed, parts: list[ir.Value], level: Level) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    attributes = {"block_size": weight.form.block}
    if isinstance(weight.form, FloatFormat):
        inputs = [node.inputs[0], *parts]
        op_type = "MatMulBnb4"
        attributes |= {"K": weight.k, "N": weight.n, "quant_type": weight.form.quant_type}
    elif weight.use.kind == "gather":
        inputs = [parts[0], node.inputs[1], *parts[1:]]
        op_type = "GatherBlockQuantized"
        attributes |= {"bits": weight.form.bits, "gather_axis": 0, "quantize_axis": 1}
    else:
        inputs = [node.inputs[0], *parts]
        op_type = "MatMulNBits"
        attributes |= {"bits": weight.form.bits, "K": weight.k, "N": weight.n}
        attributes["accuracy_level"] = level if isinstance(level, int) else level[weight.form.bits]
        if bias is not None:  # inputs: A, B, scales, zero_points, g_idx, bias
            inputs += [None] * (5 - len(inputs)) + [bias]
    old = node.outputs[0]
    new = ir.Value(name=old.name, type=old.type, shape=old.shape)
    quantized = ir.Node(
        _MICROSOFT,
        op_type,
        inputs,
        [ir.AttrInt64(key, number) for key, number in attributes.items()],
        outputs=[new],
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    graph.insert_before(node, quantized)
    factor = node.attributes.get_float("alpha", 1.0)
    if op_type == "MatMulBnb4" and bias is not None:  # it has no input for one
        new = _insert_after(graph, node, quantized, "Add", bias)
    elif factor != 1.0:  # logits that are scaled, which the exporter's fusion has drawn into the product
        new = _insert_after(graph, node, quantized, "Mul", _constant(graph, f"{node.name}.factor", factor))
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _by_head(weight: Packed) -> list[Packed]:
    """The matrix of each head, whose bytes lie one after the other; the weight itself where it is one for all."""
    heads = weight.use.heads
    if not heads:
        return [weight]
    found: list[Packed] = []
    for head in range(heads):
        parts = tuple(
            Part(
                f"{p.name}.{head}", p.dtype, (p.shape[0] // heads, *p.shape[1:]), p.offset + head * (p.nbytes // heads)
            )
            for p in weight.parts
        )
        found.append(Packed(weight.form, MATMUL, weight.n // heads, weight.k, parts))
    return found


def _split_heads(graph: ir.Graph, node: ir.Node, heads: int) -> list[ir.Node]:
    """Let a product for each head take the place of a MatMul of [1, heads, S, K] with [heads, K, N]."""
    x, weight = node.inputs
    old = node.outputs[0]
    split = ir.node(
        "Split", [x], attributes={"axis": 1, "num_outputs": heads}, num_outputs=heads, name=f"{node.name}.split"
    )
    products = [
        ir.node("MatMul", [part, weight], name=f"{node.name}.{head}") for head, part in enumerate(split.outputs)
    ]
    for head, (part, product) in enumerate(zip(split.outputs, products, strict=True)):
        part.name, product.outputs[0].name = f"{old.name}.input.{head}", f"{old.name}.{head}"
    concat = ir.node(
        "Concat", [product.outputs[0] for product in products], attributes={"axis": 1}, name=f"{node.name}.joined"
    )
    new = concat.outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, [split, *products, concat])
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    name = old.name
    graph.remove(node, safe=True)
    new.name = name
    return products


def _insert_after(graph: ir.Graph, node: ir.Node, quantized: ir.Node, op_type: str, other: ir.Value) -> ir.Value:
    """Let `op_type` make of the quantized product and `other` what `node` made."""
    old = node.outputs[0]
    last = ir.Node("", op_type, [quantized.outputs[0], other], name=f"{node.name}.{op_type.lower()}")
    new = last.outputs[0]
    quantized.outputs[0].name, new.name = f"{old.name}.product", old.name
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, last)
    return new


def _constant(graph: ir.Graph, name: str, number: float) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.float32(number), name=name))
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(())
    graph.register_initializer(value)
    return value


def _register(graph: ir.Graph, part: Part, location: str) -> ir.Value:
    dtype = ir.DataType.from_numpy(np.dtype(part.dtype))
    shape = ir.Shape(part.shape)
    tensor = ir.ExternalTensor(location, part.offset, part.nbytes, dtype, shape=shape, name=part.name)
    value = ir.Value(name=part.name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value
