"""One MoE layer inside one graph, its experts computed only when a token is routed to them.

    QMoeExperts   one QMoE node for the layer, where its experts are what that operator computes (`qmoe`)
    IfExperts     an If for each expert around the expert's own graph, in any other case

Both say where in the data file the weights go, one expert at a time, and add their nodes to a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pocketmoe.bundle.manifest import ExpertKind, MoeLayer
from pocketmoe.bundle.store import padded
from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.portable.qmoe import Product, SwiGlu

_FLOAT, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
_MICROSOFT = "com.microsoft"
_ONE = ir.tensor(np.ones(1, np.float32))


class LayerExperts(Protocol):
    """The experts of one MoE layer in a portable model. `end`: where their weights end in the data file, in bytes."""

    op_type: str
    end: int

    def pieces(self, expert: int, record: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Where an expert's bytes go: offset in the data file, bytes."""
        ...

    def build(self, build: Builder, x: ir.Value, ids: ir.Value, weights: ir.Value) -> ir.Value:
        """Add the layer's nodes; y, float32 [tokens, hidden]. x: float32 [tokens, hidden]; ids: int64 and weights:
        float32, [tokens, top_k]."""
        ...


class Builder:
    """Adds nodes to a graph, at its end or before a node; names are unique by their prefix.

    `data_file`: the name of the external data.
    """

    def __init__(self, graph: ir.Graph, prefix: str, data_file: str, *, before: ir.Node | None = None) -> None:
        self.graph, self.prefix, self.data_file, self._before = graph, prefix, data_file, before

    def add(self, node: ir.Node) -> None:
        if self._before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self._before, node)

    def op(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType = _FLOAT,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node with one output."""
        return self.ops([name], op_type, inputs, dtype, domain=domain, **attributes)[0]

    def ops(
        self,
        names: Sequence[str],
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *dtypes: ir.DataType,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """The outputs of a new node; the last of `dtypes` holds for the rest."""
        kinds = [*dtypes, *[dtypes[-1]] * (len(names) - len(dtypes))]
        outputs = [
            ir.Value(name=f"{self.prefix}{name}", type=ir.TensorType(kind))
            for name, kind in zip(names, kinds, strict=True)
        ]
        node = ir.node(
            op_type,
            inputs,
            attributes,
            domain=domain,
            outputs=outputs,
            name=f"{self.prefix}{names[0]}_node",
        )
        self.add(node)
        return outputs

    def constant(self, name: str, value: object, dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """An initializer with a small array."""
        tensor = ir.tensor(np.array(value, dtype), name=f"{self.prefix}{name}")
        return self._register(ir.Value(name=tensor.name, const_value=tensor), tensor)

    def weight(self, name: str, dtype: str, shape: Sequence[int], offset: int) -> ir.Value:
        """An initializer in the data file, at `offset`."""
        kind = ir.DataType.from_numpy(np.dtype(dtype))
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        tensor = ir.ExternalTensor(
            self.data_file, offset, nbytes, kind, shape=ir.Shape(shape), name=f"{self.prefix}{name}"
        )
        return self._register(ir.Value(name=tensor.name, const_value=tensor), tensor)

    def _register(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        self.graph.register_initializer(value)
        return value


@dataclass(frozen=True)
class _Stacked:
    """One tensor of every expert of a layer, one after the other from `offset`; `rows`: the order of its rows."""

    source: str  # in the record
    name: str
    dtype: str
    shape: tuple[int, ...]  # of one expert
    offset: int
    rows: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class QMoeExperts:
    """A layer as one `QMoE` node, which runs the kernels of `MatMulNBits` for the experts with tokens, and no other.

    Selection and mixture go in apart, since `QMoE` would normalize the weights of the chosen: ones choose (input
    `router_probs`), and the routing weights mix (input `router_weights`). A route of weight 1e-8 or less is skipped.
    """

    op_type = "QMoE"

    def __init__(self, layer: MoeLayer, kind: ExpertKind, form: SwiGlu, offset: int) -> None:
        self._layer, self._form = layer, form
        self._places = {t.name: t for t in kind.tensors}
        self._stacks: dict[str, _Stacked] = {}
        self.end = offset
        for prefix, product, rows in (("fc1", form.up, form.rows), ("fc2", form.down, None)):
            self._stack(prefix, product, rows)

    def _stack(self, prefix: str, p: Product, rows: np.ndarray | None) -> None:
        per_byte, blocks = 8 // p.bits, p.k // p.block
        parts = [
            ("weights", p.codes, "uint8", (p.n, p.k // per_byte)),
            ("scales", p.scales, "float32", (p.n, blocks)),
            ("zero_points", p.zero_points, "uint8", (p.n, -(-blocks // per_byte))),
            ("bias", p.bias, "float32", (p.n,)),
        ]
        for name, source, dtype, shape in parts:
            if source is not None:
                stacked = _Stacked(source, f"{prefix}_{name}", dtype, shape, self.end, rows)
                assert stacked.nbytes == self._places[source].nbytes, f"{source} has another size than QMoE's {name}"
                self._stacks[stacked.name] = stacked
                self.end += padded(stacked.nbytes * self._layer.n_experts)

    def pieces(self, expert: int, record: memoryview) -> Iterator[tuple[int, memoryview]]:
        for stacked in self._stacks.values():
            start = self._places[stacked.source].offset
            data = record[start : start + stacked.nbytes]
            if stacked.rows is not None:
                array = np.frombuffer(data, stacked.dtype).reshape(stacked.shape)
                data = np.ascontiguousarray(array[stacked.rows]).data.cast("B")
            yield stacked.offset + expert * stacked.nbytes, data

    def build(self, build: Builder, x: ir.Value, ids: ir.Value, weights: ir.Value) -> ir.Value:
        form, n_experts = self._form, self._layer.n_experts
        tokens = build.op("tokens", "Shape", [ids], _INT64, start=0, end=1)
        shape = build.op("table", "Concat", [tokens, build.constant("n_experts", [n_experts])], _INT64, axis=0)
        zeros = build.op("zeros", "ConstantOfShape", [shape])
        ones = build.op("ones", "ConstantOfShape", [build.op("routes", "Shape", [ids], _INT64)], value=_ONE)
        chosen = build.op("chosen", "ScatterElements", [zeros, ids, ones], axis=1)
        mixture = build.op("mixture", "ScatterElements", [zeros, ids, weights], axis=1)
        stacks = {
            name: build.weight(name, s.dtype, (n_experts, *s.shape), s.offset) for name, s in self._stacks.items()
        }
        names = ["weights", "scales", "bias"]
        inputs = [stacks.get(f"{fc}_{name}") for fc in ("fc1", "fc2") for name in names]
        zero_points = [stacks.get("fc1_zero_points"), stacks.get("fc2_zero_points")]
        limit: dict[str, Any] = {} if np.isinf(form.limit) else {"swiglu_limit": form.limit}
        return build.op(
            "y",
            "QMoE",
            [x, chosen, *inputs, None, None, None, *zero_points, None, mixture],
            domain=_MICROSOFT,
            k=self._layer.top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=form.alpha,
            activation_beta=form.beta,
            expert_weight_bits=form.up.bits,
            block_size=form.up.block,
            accuracy_level=form.up.accuracy_level,
            normalize_routing_weights=0,
            **limit,
        )


class IfExperts:
    """A layer as an `If` for each expert: where no token wants it, its branch is not entered.

    The expert's nodes and weights are those of the bundle, on the same rows, and the sum is taken in the router's
    order, as the runtime does it: the same bits.
    """

    op_type = "If"

    def __init__(self, layer: MoeLayer, kinds: Sequence[tuple[ExpertKind, ir.Model]], offset: int) -> None:
        """`kinds`: each expert's kind and graph, which turns rows of one width into others of the same."""
        self._layer, self._kinds = layer, kinds
        shape = kinds[0][1].graph.outputs[0].shape
        width = None if shape is None else shape[1]
        assert isinstance(width, int)
        self._width = width  # of the experts, which may be narrower than the hidden states
        self._offsets: list[int] = []
        self.end = offset
        for kind, _ in kinds:
            self._offsets.append(self.end)
            self.end += padded(kind.nbytes)

    def pieces(self, expert: int, record: memoryview) -> Iterator[tuple[int, memoryview]]:
        yield self._offsets[expert], record

    def build(self, build: Builder, x: ir.Value, ids: ir.Value, weights: ir.Value) -> ir.Value:
        n_experts, top_k = self._layer.n_experts, self._layer.top_k
        flat = build.op("route_experts", "Reshape", [ids, build.constant("flat", [-1])], _INT64)  # [tokens * top_k]
        order, counts = self._sort(build, flat)
        tokens = build.op("tokens", "Div", [order, build.constant("top_k", top_k)], _INT64)
        sorted_x = build.op("sorted_x", "Gather", [x, tokens], axis=0)
        wanted = build.op("wanted", "Greater", [counts, build.constant("zero", 0)], _BOOL)
        each = range(n_experts)
        conditions = build.ops([f"wanted_{e}" for e in each], "Split", [wanted], _BOOL, axis=0, num_outputs=n_experts)
        rows = build.ops([f"rows_{e}" for e in each], "Split", [sorted_x, counts], _FLOAT, axis=0)
        parts = [self._branch(build, e, conditions[e], rows[e]) for e in each]
        sorted_y = build.op("sorted_y", "Concat", parts, axis=0)
        index = build.op("index", "Unsqueeze", [order, build.constant("last", [1])], _INT64)
        by_route = build.op("by_route", "ScatterND", [sorted_y, index, sorted_y])  # every row is overwritten
        by_token = build.op("by_token", "Reshape", [by_route, build.constant("routes", [-1, top_k, self._width])])
        factors = build.op("factors", "Unsqueeze", [weights, build.constant("column", [2])])
        weighted = build.op("weighted", "Mul", [by_token, factors])
        terms = build.ops([f"term_{i}" for i in range(top_k)], "Split", [weighted], _FLOAT, axis=1, num_outputs=top_k)
        total = terms[0]
        for i, term in enumerate(terms[1:], 1):
            total = build.op(f"sum_{i}", "Add", [total, term])
        return build.op("y", "Reshape", [total, build.constant("rows", [-1, self._width])])

    def _sort(self, build: Builder, flat: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The routes by expert, and among an expert's as they come, int64 [routes]; how many each has, [n_experts]."""
        n_routes = build.op("n_routes", "Shape", [flat], _INT64)
        ones = build.op("ones", "ConstantOfShape", [n_routes], _INT64, value=ir.tensor(np.ones(1, np.int64)))
        none = build.constant("none", [0] * self._layer.n_experts)
        counts = build.op("counts", "ScatterElements", [none, flat, ones], _INT64, axis=0, reduction="add")
        numbers = build.op("numbers", "CumSum", [ones, build.constant("axis", 0)], _INT64, exclusive=1)
        first = build.op("first", "Mul", [flat, n_routes], _INT64)
        keys = build.op("keys", "Add", [first, numbers], _INT64)  # distinct: a sort need not be stable
        _, order = build.ops(["sorted_keys", "order"], "TopK", [keys, n_routes], _INT64, axis=0, largest=0, sorted=1)
        return order, counts

    def _branch(self, outer: Builder, expert: int, condition: ir.Value, x: ir.Value) -> ir.Value:
        """What the expert makes of its rows x, float32 [n, width]; where n is 0, nothing is computed."""
        taken, idle = _empty_graph(f"expert_{expert}"), _empty_graph(f"no_expert_{expert}")
        taken.outputs.append(copy_expert(taken, outer, f"{expert}.", self._kinds[expert], x, self._offsets[expert]))
        build = Builder(idle, f"{outer.prefix}{expert}.", outer.data_file)
        nothing = ir.tensor(np.empty((0, self._width), np.float32))  # a constant costs half of what an Identity does
        idle.outputs.append(build.op("nothing", "Constant", [], value=nothing))
        return outer.op(f"part_{expert}", "If", [condition], then_branch=taken, else_branch=idle)


def _empty_graph(name: str) -> ir.Graph:
    return ir.Graph([], [], nodes=[], name=name)


def copy_expert(
    branch: ir.Graph, outer: Builder, prefix: str, expert: tuple[ExpertKind, ir.Model], x: ir.Value, offset: int
) -> ir.Value:
    """Add the nodes of an expert's graph to a branch; what it makes of x, float32 [n, hidden].

    Its weights, in the record at `offset`, become initializers of the graph around the branch: ONNX Runtime gives back
    what it has packed of those, but keeps both copies of a branch's own.
    Raises UnsupportedModel for an expert whose graph has graphs within.
    """
    kind, model = expert
    build = Builder(branch, f"{outer.prefix}{prefix}", outer.data_file)
    values: dict[ir.Value | None, ir.Value | None] = {None: None, model.graph.inputs[0]: x}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            shape, start = tensor.shape.numpy(), offset + (tensor.offset or 0)
            values[value] = outer.weight(f"{prefix}{name}", tensor.dtype.numpy().name, shape, start)
        else:
            values[value] = build.constant(name, tensor.numpy(), tensor.dtype.numpy())
    for node in model.graph:
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise UnsupportedModel(f"{kind.graph} branches ({node.op_type}), which a portable model cannot hold")
        outputs = [ir.Value(name=f"{build.prefix}{v.name}", type=v.type, shape=v.shape) for v in node.outputs]
        values.update(zip(node.outputs, outputs, strict=True))
        inputs = [values[value] for value in node.inputs]
        attributes = list(node.attributes.values())
        name = f"{build.prefix}{node.name}"
        build.add(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=name))
    y = values[model.graph.outputs[0]]
    assert y is not None
    return y
