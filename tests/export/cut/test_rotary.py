"""Rotations in all the ways in which models write them, and what is none, in graphs made by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from pocketmoe.export.cut.attention import pack_projections, turn_in_attention
from pocketmoe.export.cut.prepare import infer_types
from pocketmoe.export.cut.rotary import fuse_rotary
from pocketmoe.export.cut.views import merge_views
from pocketmoe.ort import Session, session_options

HEADS, WIDTH = 2, 16

GRAPH = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
turn (int64[1,s] input_ids, int64[1] past_length, int64[1,s] position_ids, float[1,s,32] q) => (float[1,s,32] y)
<float[8] speeds = {1, 0.5, 0.25, 0.1, 0.03, 0.01, 0.003, 0.001}, float[4] few = {1, 0.3, 0.1, 0.03},
 int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[1] eight = {8},
 int64[1] axis = {3}, int64[1] last = {-1}, int64[1] end = {9223372036854775807}, float most = {5000},
 int64[4] split = {1,-1,2,16}, int64[4] heads = {1,2,-1,16}, int64[5] pairs = {1,-1,2,8,2}, int64[3] merge = {1,-1,32},
 int64[1] behind = {4}, int64[3] pair = {1,1,2}, int64[3] doubled = {1,-1,16}>
{
  token_count = Shape<start=1, end=2>(input_ids)
  places = Unsqueeze(position_ids, two)
  place = Cast<to=1>(places)
  angles = Mul(place, speeds)
  cos8 = Cos(angles)
  sin8 = Sin(angles)
  c = Unsqueeze(cos8, one)
  s = Unsqueeze(sin8, one)
  both = Concat<axis=-1>(c, c)
  either = Concat<axis=-1>(s, s)
  r = Reshape(q, split)
  x = Transpose<perm=[0,2,1,3]>(r)
  BODY
  back = Transpose<perm=[0,2,1,3]>(turned)
  y = Reshape(back, merge)
}
"""
HALVES = """
  a, b = Split<axis=3, num_outputs=2>(x)
  ac = Mul(a, c)
  bs = Mul(b, s)
  bc = Mul(b, c)
  as = Mul(a, s)
  first = Sub(ac, bs)
  second = Add(bc, as)
  turned = Concat<axis=-1>(first, second)"""
ROTATE_HALF = """
  a = Slice(x, zero, eight, axis, one)
  b = Slice(x, eight, end, axis, one)
  minus = Neg(b)
  other = Concat<axis=-1>(minus, a)
  straight = Mul(x, both)
  across = Mul(other, either)
  turned = Add(straight, across)"""
NEIGHBOURS = """
  cos_pair0 = Unsqueeze(c, behind)
  cos_pair = Concat<axis=4>(cos_pair0, cos_pair0)
  cosines = Reshape(cos_pair, doubled)
  sin_pair0 = Unsqueeze(s, behind)
  sin_pair = Concat<axis=4>(sin_pair0, sin_pair0)
  sines = Reshape(sin_pair, doubled)
  a0 = Slice(x, zero, end, axis, two)
  b0 = Slice(x, one, end, axis, two)
  minus = Neg(b0)
  a = Unsqueeze(a0, last)
  b = Unsqueeze(minus, last)
  stack = Concat<axis=-1>(b, a)
  other = Reshape(stack, heads)
  straight = Mul(x, cosines)
  across = Mul(other, sines)
  turned = Add(straight, across)"""
NEIGHBOURS_TO_HALVES = HALVES.replace(
    "a, b = Split<axis=3, num_outputs=2>(x)", "a = Slice(x, zero, end, axis, two)\n  b = Slice(x, one, end, axis, two)"
)
COMPLEX = """
  z = Reshape(q, pairs)
  c1 = Unsqueeze(cos8, two)
  c2 = Unsqueeze(c1, last)
  s1 = Unsqueeze(sin8, two)
  s2 = Unsqueeze(s1, last)
  re = Slice(z, zero, one, last)
  im = Slice(z, one, two, last)
  rc = Mul(re, c2)
  is = Mul(im, s2)
  ic = Mul(im, c2)
  rs = Mul(re, s2)
  real = Sub(rc, is)
  imaginary = Add(ic, rs)
  both_parts = Concat<axis=-1>(real, imaginary)
  whole = Reshape(both_parts, split)
  turned = Transpose<perm=[0,2,1,3]>(whole)"""
PART = (
    """
  few_angles = Mul(place, few)
  cos4 = Cos(few_angles)
  sin4 = Sin(few_angles)
  c4 = Unsqueeze(cos4, one)
  s4 = Unsqueeze(sin4, one)
  part = Slice(x, zero, eight, axis, one)
  rest = Slice(x, eight, end, axis, one)
"""
    + HALVES.replace("(x)", "(part)").replace(", c)", ", c4)").replace(", s)", ", s4)").replace("turned =", "most_of =")
    + """
  turned = Concat<axis=-1>(most_of, rest)"""
)
FORMS = {
    "halves": HALVES,
    "rotate half": ROTATE_HALF,
    "neighbours": NEIGHBOURS,
    "neighbours to halves": NEIGHBOURS_TO_HALVES,
    "complex": COMPLEX,
    "part of a head": PART,
}


def parse(body: str) -> ir.Model:
    model = ir.from_onnx_text(GRAPH.replace("BODY", body))
    infer_types(model)
    merge_views(model)
    return model


def run(model: ir.Model, q: np.ndarray, past: int, **more: Any) -> list[np.ndarray]:
    session = Session(ir.to_proto(model).SerializeToString(), session_options(1), "a rotation")
    new = q.shape[1]
    feed = {"input_ids": np.zeros((1, new), np.int64), "past_length": np.array([past]), "q": q, **more}
    feed["position_ids"] = np.arange(past, past + new)[None]
    return session.run(None, {value.name: feed[value.name] for value in session.inputs})


@pytest.mark.parametrize("form", FORMS)
def test_a_rotation_becomes_one_operator(form: str) -> None:
    """The same numbers near and far; of the heads' rows nothing is turned there and back."""
    model = parse(FORMS[form])
    before = copy.deepcopy(ir.to_proto(model))
    assert fuse_rotary(model) == 1
    common.RemoveUnusedNodesPass()(model)
    merge_views(model)
    kinds = [node.op_type for node in model.graph]
    beside = set(kinds[kinds.index("RotaryEmbedding") + 1 :]) - {"Reshape"}  # whose sizes nobody knows here
    assert beside == ({"Gather"} if form == "neighbours to halves" else set())
    rng = np.random.default_rng(0)
    for past, new in ((0, 1), (0, 5), (3, 1), (7000, 9)):
        q = rng.standard_normal((1, new, HEADS * WIDTH), np.float32)
        expected = run(ir.from_proto(before), q, past)[0]
        np.testing.assert_allclose(run(model, q, past)[0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        ("halves", "first = Sub", "first = Add"),  # no rotation
        ("halves", "bc = Mul(b, c)", "bc = Mul(b, s)"),
        ("rotate half", "minus = Neg(b)", "minus = Identity(b)"),
        ("rotate half", "across = Mul(other, either)", "across = Mul(other, both)"),
        ("rotate half", "straight = Mul(x, both)", "late = Clip(both, , most)\n straight = Mul(other, late)"),
        ("part of a head", "(most_of, rest)", "(rest, most_of)"),  # no place where the operator has it
    ],
)
def test_what_is_no_rotation_stays(form: str, old: str, new: str) -> None:
    model = parse(FORMS[form].replace(old, new))
    kinds = [node.op_type for node in model.graph]
    assert fuse_rotary(model) == (form == "part of a head")  # the part itself is one
    assert form == "part of a head" or [node.op_type for node in model.graph] == kinds


def test_a_table_that_is_another_far_away_stays() -> None:
    """Sines of another kind only beyond a position that no short text has."""
    far = "far = Greater(place, most)\n far1 = Unsqueeze(far, one)\n odd = Where(far1, c, s)\n"
    model = parse(far + HALVES.replace("as = Mul(a, s)", "as = Mul(a, odd)"))
    assert fuse_rotary(model) == 0


ATTENTION = GRAPH.replace(
    "float[1,s,32] q) => (float[1,s,32] y)",
    """float[1,s,96] q, float[1,2,r,16] input_k, float[1,2,r,16] input_v)
    => (float[1,s,32] y, float[1,2,r,16] output_k, float[1,2,r,16] output_v)""",
).replace("int64[1] behind", "int32[1] step = {1}, int64[3] sizes = {32,32,32}, int64[1] behind")


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("form", ["rotate half", "neighbours"])
def test_attention_turns_by_itself(form: str, biased: bool) -> None:
    """Queries and keys of one packed product, with biases or without: one operator, and the same bits."""
    query, key = FORMS[form], FORMS[form]
    for name in ("a", "b", "a0", "b0", "minus", "other", "straight", "across", "turned", "stack", "x"):
        key = key.replace(f"  {name} =", f"  k_{name} =")
        for inner in ("(%s)", "(%s,", " %s)"):
            key = key.replace(inner % name, inner % f"k_{name}")
    key = "\n".join(line for line in key.splitlines() if "pair" not in line and "ines =" not in line)
    names = {"q": "qb", "k": "kb", "v": "vb"} if biased else {"q": "q0", "k": "k0", "v": "v0"}
    body = ATTENTION.replace(
        "  r = Reshape(q, split)",
        f"""  q0, k0, v0 = Split<axis=-1>(q, sizes)
  {"qb = Add(q0, bias)  kb = Add(k0, bias)  vb = Add(v0, bias)" if biased else ""}
  r = Reshape({names["q"]}, split)
  k_r = Reshape({names["k"]}, split)
  k_x = Transpose<perm=[0,2,1,3]>(k_r)""",
    ).replace("BODY", query + key)
    body = body.replace(
        "  y = Reshape(back, merge)",
        f"""  rows = Reshape(back, merge)
  k_back = Transpose<perm=[0,2,1,3]>(k_turned)
  k_rows = Reshape(k_back, merge)
  total64 = Add(past_length, token_count)
  total32 = Cast<to=6>(total64)
  at = Sub(total32, step)
  length = Squeeze(total32)
  y, output_k, output_v = com.microsoft.GroupQueryAttention <num_heads=2, kv_num_heads=2>
      (rows, k_rows, {names["v"]}, input_k, input_v, at, length)""",
    )
    model = ir.from_onnx_text(
        body.replace("int32[1] step", f"float[32] bias = {{{','.join(str(n / 8) for n in range(32))}}}, int32[1] step")
    )
    infer_types(model)
    merge_views(model)
    assert fuse_rotary(model) == 2
    common.RemoveUnusedNodesPass()(model)
    merge_views(model)
    before = copy.deepcopy(ir.to_proto(model))
    assert turn_in_attention(model) == 1
    common.RemoveUnusedNodesPass()(model)
    assert pack_projections(model) == 1
    kinds = [node.op_type for node in model.graph]
    assert not {"RotaryEmbedding", "Split"} & set(kinds)
    assert kinds.count("Add") == 1 + biased
    rng = np.random.default_rng(0)
    for past, new in ((0, 5), (5, 1), (6, 4)):
        q = rng.standard_normal((1, new, 96), np.float32)
        caches = {name: rng.standard_normal((1, 2, 20, 16), np.float32) for name in ("input_k", "input_v")}
        for found, expected in zip(
            run(model, q, past, **caches), run(ir.from_proto(before), q, past, **caches), strict=True
        ):
            np.testing.assert_array_equal(found[:, :, : past + new], expected[:, :, : past + new])


def test_layers_may_share_a_bias_and_not_the_others() -> None:
    """As where one has learned none of its keys' biases and another no one's: constants that are alike are one."""
    model = ir.from_onnx_text("""
<ir_version: 10, opset_import: ["" : 20]>
two (float[1,s,6] x) => (float[1,s,6] y)
<float[2] none = {0, 0}, float[2] some = {1, 2}, float[6,6] w = {
  1,0,0,0,0,2, 0,1,0,0,3,0, 0,0,1,4,0,0, 0,0,5,1,0,0, 0,6,0,0,1,0, 7,0,0,0,0,1}>
{
  first = MatMul(x, w)
  a, b, c = Split<axis=-1, num_outputs=3>(first)
  a1 = Add(a, none)
  b1 = Add(b, none)
  c1 = Add(c, none)
  z = Concat<axis=-1>(a1, b1, c1)
  second = MatMul(z, w)
  d, e, f = Split<axis=-1, num_outputs=3>(second)
  d1 = Add(d, none)
  e1 = Add(some, e)
  f1 = Add(f, none)
  y = Concat<axis=-1>(d1, e1, f1)
}""")
    infer_types(model)
    before = ir.to_proto(model).SerializeToString()
    pack_projections(model)
    assert [node.op_type for node in model.graph].count("Add") == 2
    x = np.random.default_rng(0).standard_normal((1, 3, 6), np.float32)
    found, expected = (
        Session(graph, session_options(threads=1), "two").run(None, {"x": x})[0]
        for graph in (ir.to_proto(model).SerializeToString(), before)
    )
    np.testing.assert_array_equal(found, expected)
