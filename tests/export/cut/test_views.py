"""Chains of views: what they give before and after, against numpy, for random chains and sizes."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from pocketmoe.export.cut.views import merge_views
from pocketmoe.ort import Session, session_options

Dims = list[int | str]


class Chain:
    """A graph of views one after the other, in random order, some of them read by others too."""

    def __init__(self, dims: Dims) -> None:
        self.dims, self.first = dims, list(dims)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.outputs: list[str] = []
        self.value = "x"

    def add(self, op: str, dims: Dims, given: list[int] | None = None, **attributes: Any) -> None:
        name = f"v{len(self.nodes)}"
        inputs = [self.value]
        if given is not None:
            self.constants.append(helper.make_tensor(f"c_{name}", onnx.TensorProto.INT64, [len(given)], given))
            inputs.append(f"c_{name}")
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.value, self.dims = name, dims

    def show(self) -> None:
        """Something else reads the last value, which computes with it."""
        self.outputs.append(f"out{len(self.outputs)}")
        self.nodes.append(helper.make_node("Neg", [self.value], [self.outputs[-1]]))

    def model(self) -> onnx.ModelProto:
        floats = onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "chain",
            [helper.make_tensor_value_info("x", floats, self.first)],
            [helper.make_tensor_value_info(name, floats, None) for name in self.outputs],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def grow(chain: Chain, draw: st.DrawFn) -> None:
    """Add one view that fits."""
    dims = chain.dims
    kind, at = draw(st.sampled_from(["unsqueeze", "squeeze", "transpose", "identity", "expand", "merge", "split"])), 0
    if dims:
        at = draw(st.integers(0, len(dims) - 1))
    match kind:
        case "unsqueeze":
            chain.add("Unsqueeze", [*dims[:at], 1, *dims[at:]], [at])
        case "squeeze" if dims and dims[at] == 1:
            chain.add("Squeeze", [*dims[:at], *dims[at + 1 :]], [at - draw(st.sampled_from([0, len(dims)]))])
        case "transpose":
            order = draw(st.permutations(range(len(dims))))
            chain.add("Transpose", [dims[axis] for axis in order], perm=order)
        case "identity":
            chain.add("Identity", dims)
        case "expand":
            chain.add("Expand", dims, [1 if isinstance(size, str) else size for size in dims])
        case "merge" | "split":
            regroup(chain, at, draw)
        case _:
            pass


def regroup(chain: Chain, at: int, draw: st.DrawFn) -> None:
    """Make one axis of two, or two of one; all before an axis one and all after it, where no size is lost by that."""
    dims, pair = chain.dims, chain.dims[at : at + 2]
    if draw(st.booleans()) and all(isinstance(n, int) for n in dims[at:]) and len(dims[:at]) == 1:
        chain.add("Flatten", [dims[0], prod(n for n in dims[at:] if isinstance(n, int))], axis=at)
    elif draw(st.booleans()) and len(pair) == 2 and all(isinstance(n, int) for n in pair):
        reshape(chain, [*dims[:at], prod(n for n in pair if isinstance(n, int)), *dims[at + 2 :]], draw)
    elif pair and isinstance(size := pair[0], int) and size % 2 == 0:
        reshape(chain, [*dims[:at], size // 2, 2, *dims[at + 1 :]], draw)


def reshape(chain: Chain, dims: Dims, draw: st.DrawFn) -> None:
    """To these sizes, in one of the ways in which a Reshape can say so."""
    symbols = [axis for axis, size in enumerate(dims) if isinstance(size, str)]
    copied = [axis for axis, size in enumerate(dims) if axis < len(chain.dims) and chain.dims[axis] == size]
    kept = [axis for axis in symbols if axis not in copied]
    if len(kept) > 1:
        return
    target = [0 if isinstance(size, str) else size for size in dims]
    for axis in copied:
        target[axis] = 0 if isinstance(dims[axis], str) else draw(st.sampled_from([0, target[axis]]))
    if kept:
        target[kept[0]] = -1
    elif dims and draw(st.booleans()):
        target[draw(st.sampled_from(range(len(dims))))] = -1
    chain.add("Reshape", dims, target)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    chain = Chain(draw(st.permutations(["s", 1, draw(st.sampled_from(["t", 4])), draw(st.sampled_from([1, 6, 8]))])))
    for _ in range(draw(st.integers(1, 8))):
        grow(chain, draw)
        if draw(st.integers(0, 4)) == 0:
            chain.show()
    chain.show()
    return chain


@settings(max_examples=60, deadline=None)
@given(chain=chains(), sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=3))
def test_merged_views_give_the_same(chain: Chain, sizes: list[tuple[int, int]]) -> None:
    """The same numbers in the same shapes, by no more nodes."""
    before = chain.model()
    model = ir.from_proto(before)
    merge_views(model)
    after = ir.to_proto(model)
    assert len(after.graph.node) <= len(before.graph.node)
    session = Session(after.SerializeToString(), session_options(1), "the chain")
    for s, t in sizes:
        named = {"s": s, "t": t}
        shape = [size if isinstance(size, int) else named[size] for size in chain.first]
        x = np.arange(prod(shape), dtype=np.float32).reshape(shape)
        for found, expected in zip(
            session.run(None, {"x": x}), ReferenceEvaluator(before).run(None, {"x": x}), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


HEADS = """
<ir_version: 10, opset_import: ["" : 20]>
heads (float[1,s,8] q, float[s,8] x) => (float[1,s,8] y, float[s,8] z)
<int64[4] split = {1,-1,2,4}, int64[3] merge = {0,0,-1}, int64[2] flat = {-1,8}, int64[3] wide = {1,-1,8}>
{
  a = Reshape<allowzero=1>(q, split)
  b = Transpose<perm=[0,2,1,3]>(a)
  c = Transpose<perm=[0,2,1,3]>(b)
  d = Reshape(c, merge)
  y = Neg(d)
  e = Reshape(x, flat)
  f = Reshape(e, wide)
  g = Reshape(f, flat)
  z = Neg(g)
}
"""


def left(text: str) -> list[str]:
    """The operators that are left of a graph."""
    from onnx_ir.passes import common

    model = ir.from_onnx_text(text)
    merge_views(model)
    common.RemoveUnusedNodesPass()(model)
    return [node.op_type for node in model.graph]


def test_what_turns_back_is_left_out() -> None:
    """Heads split, turned, turned back and merged; rows flattened that are flat already."""
    assert left(HEADS) == ["Neg", "Neg"]


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (("perm=[0,2,1,3]>(b)", "perm=[0,1,3,2]>(b)"), ["Reshape", "Transpose", "Transpose", "Reshape", "Neg", "Neg"]),
        (("{0,0,-1}", "{1,-1,4}"), ["Reshape", "Neg", "Neg"]),
        (("float[s,8] x", "float[2,s,4] x"), ["Neg", "Reshape", "Neg"]),
    ],
)
def test_what_changes_something_stays(change: tuple[str, str], kept: list[str]) -> None:
    """Heads turned another way, merged otherwise, and rows that are not flat."""
    assert left(HEADS.replace(*change)) == kept
