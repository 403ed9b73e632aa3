"""Cutting small graphs written by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture.custom_op import install
from pocketmoe.export.cut.lengths import read_token_count
from pocketmoe.export.cut.segments import cut

# Two MoE layers; the residual `r1` skips the first, `mask` is needed by the second segment only, and the shape that the
# last Reshape uses comes from a tensor of the first segment.
TWO_LAYERS = """
<ir_version: 10, opset_import: ["" : 20, "pocketmoe" : 1]>
two (int64[1,s] input_ids, int64[1,s] position_ids) => (float[1,s,4] logits)
<float[9,4] table = {TABLE}, float[4,3] gate = {GATE},
 int64[2] flat = {-1,4}, int64[1] one = {1}, int64[1] four = {4}, int64[1] k = {2},
 int64[2] col = {-1,1}, int64[3] wide = {1,-1,4}>
{
  mask = Cast<to=1>(position_ids)
  r1 = Gather<axis=0>(table, input_ids)
  x0 = Reshape(r1, flat)
  g0 = MatMul(x0, gate)
  w0, i0 = TopK<axis=-1>(g0, k)
  y0 = pocketmoe.Experts<layer=0>(x0, i0, w0)
  y0w = Reshape(y0, wide)
  r2 = Add(r1, y0w)
  x1 = Reshape(r2, flat)
  flatmask = Reshape(mask, col)
  x1m = Mul(x1, flatmask)
  g1 = MatMul(x1m, gate)
  w1, i1 = TopK<axis=-1>(g1, k)
  y1 = pocketmoe.Experts<layer=1>(x1m, i1, w1)
  n = Shape<start=1, end=2>(r1)
  back = Concat<axis=0>(one, n, four)
  y1w = Reshape(y1, back)
  logits = Add(r2, y1w)
}
"""


def parse(text: str) -> ir.Model:
    rng = np.random.default_rng(0)
    for name, count in (("TABLE", 36), ("GATE", 12)):
        text = text.replace(name, ",".join(f"{n:.4f}" for n in rng.standard_normal(count)))
    model = ir.from_onnx_text(text)
    shapes = {name: [1, "s", 4] for name in ("r1", "r2", "y0w", "y1w")}
    shapes |= {name: ["s", 4] for name in ("x0", "x1", "x1m", "y0", "y1")} | {
        n: ["s", 2] for n in ("w0", "i0", "w1", "i1")
    }
    shapes |= {"mask": [1, "s"], "flatmask": ["s", 1], "g0": ["s", 3], "g1": ["s", 3], "n": [1], "back": [3]}
    for node in model.graph:
        for value in node.outputs:
            if value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])
                integer = value.name in {"i0", "i1", "n", "back"}
                value.type = ir.TensorType(ir.DataType.INT64 if integer else ir.DataType.FLOAT)
    return model


@pytest.fixture
def model() -> ir.Model:
    install()
    model = parse(TWO_LAYERS)
    read_token_count(model)
    return model


def nodes(piece: ir.Model) -> set[str]:
    return {str(node.outputs[0].name) for node in piece.graph}


def test_segments_are_what_lies_between_the_experts(model: ir.Model) -> None:
    pieces = cut(model)
    assert pieces.layers == (("x0", "i0", "w0", "y0"), ("x1m", "i1", "w1", "y1"))
    first, second, last = pieces.segments
    assert {"r1", "x0", "g0", "w0"} <= nodes(first)
    assert "mask" not in nodes(first), "what only depends on positions waits until it is needed"
    assert {"mask", "flatmask", "y0w", "r2", "x1m", "g1", "w1"} <= nodes(second)
    assert {value.name for value in second.graph.inputs} == {"y0", "r1", "position_ids"}
    assert {value.name for value in last.graph.inputs} == {"y1", "r2"}


def test_the_last_segment_counts_the_rows_that_it_is_given(model: ir.Model) -> None:
    last = cut(model).segments[-1]
    session = ort.InferenceSession(ir.to_proto(last).SerializeToString(), providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    whole = np.asarray(session.run(["logits"], {"y1": rows, "r2": rows[None] * 2})[0])
    only = np.asarray(session.run(["logits"], {"y1": rows[-1:], "r2": rows[None, -1:] * 2})[0])
    np.testing.assert_array_equal(only[0], whole[0, -1:])


def test_routers_take_the_experts_x(model: ir.Model) -> None:
    for router in cut(model).routers:
        assert router is not None
        assert [value.name for value in router.graph.inputs] == ["x"]
        assert [value.name for value in router.graph.outputs] == ["expert_ids", "expert_weights"]
        onnx.checker.check_model(ir.to_proto(router))


def test_a_router_that_needs_more_than_x_is_left_out() -> None:
    install()
    model = parse(TWO_LAYERS.replace("g1 = MatMul(x1m, gate)", "g1p = MatMul(x1m, gate)\n  g1 = Add(g1p, g0)"))
    first, second = cut(model).routers
    assert first is not None
    assert second is None


def test_experts_side_by_side_are_refused() -> None:
    install()
    model = parse(
        TWO_LAYERS.replace("pocketmoe.Experts<layer=1>(x1m, i1, w1)", "pocketmoe.Experts<layer=1>(x0, i0, w0)")
    )
    with pytest.raises(UnsupportedModel, match="follow one another"):
        cut(model)
