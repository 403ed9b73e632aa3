"""Masks and guards that go, and those that must not, in graphs made by hand; and what attention does without one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.export.cut.masks import drop_guards, drop_masks
from pocketmoe.export.cut.prepare import infer_types
from pocketmoe.ort import Session, session_options

LEAST = float(np.finfo(np.float32).min)
ROOM, HEADS, WIDTH = 160, 4, 16  # of a cache; two heads of keys serve them

GRAPH = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
attention (int64[1,s] input_ids, int64[1] past_length, int64[1,s] position_ids, float[4] slopes,
           float[1,s,64] q, float[1,s,32] k, float[1,s,32] v, float[1,2,r,16] input_k, float[1,2,r,16] input_v)
    => (float[1,s,64] y, float[1,2,r,16] output_k, float[1,2,r,16] output_v)
<int64 zero = {0}, int64 one = {1}, int64 size = {SIZE}, int64[2] row = {1,-1}, int64[2] column = {-1,1},
 int64[2] front = {0,1}, int32[1] step = {1}, float least = {LEAST}, float nothing = {0}, int64[1] last = {-1},
 int64[3] heads = {4,1,1}, int64[1] far = {FAR}, float[1] few = {3}>
{
  count = Shape<start=1, end=2>(input_ids)
  total = Add(past_length, count)
  end = Squeeze(total)
  start = Squeeze(past_length)
  keys0 = Range(zero, end, one)
  keys = Reshape(keys0, row)
  queries0 = Range(start, end, one)
  queries = Reshape(queries0, column)
  seen = LessOrEqual(keys, queries)
  behind = Sub(queries, keys)
  near = Less(behind, size)
  queried = Div(queries, size)
  keyed = Div(keys, size)
  beside = Equal(queried, keyed)
  long = Greater(past_length, far)
  MASK
  bias0 = Where(mask, nothing, least)
  bias1 = Unsqueeze(bias0, front)
  distance = Cast<to=1>(behind)
  slope = Reshape(slopes, heads)
  slanted = Mul(distance, slope)
  bias = BIAS
  total32 = Cast<to=6>(total)
  place = Sub(total32, step)
  length = Squeeze(total32)
  GIVEN
  y, output_k, output_v = com.microsoft.GroupQueryAttention <num_heads=4, kv_num_heads=2>
      (q, k, v, input_k, input_v, place, length, , , , added)
}
"""
MASKS = {
    "causal": "mask = Identity(seen)",
    "window": "mask = And(seen, near)",
    "all": "mask = Or(seen, seen_not)",
    "in pieces": "mask = And(seen, beside)",
    "causal, and a window in long texts": "either = Or(near, short)\n mask = And(seen, either)",
}


def parse(
    mask: str, size: int = 5, far: int = 5000, bias: str = "Identity(bias1)", added: str = "Identity(bias)"
) -> ir.Model:
    before = {"all": "seen_not = Not(seen)\n ", "causal, and a window in long texts": "short = Not(long)\n "}
    text = GRAPH.replace("MASK", before.get(mask, "") + MASKS[mask]).replace("BIAS", bias)
    text = text.replace("GIVEN", f"added = {added}").replace("SIZE", str(size)).replace("FAR", "5000")
    return ir.from_onnx_text(text.replace("LEAST", f"{LEAST:.9g}"))


def attention(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "GroupQueryAttention")


@pytest.mark.parametrize(
    ("mask", "size", "window"),
    [
        ("causal", 5, -1),
        ("all", 5, -1),
        ("window", 1, 1),
        ("window", 5, 5),
        ("window", 400, 400),
        ("window", 4096, 4096),
    ],
)
def test_what_attention_hides_itself_needs_no_mask(mask: str, size: int, window: int) -> None:
    """Later keys, which it never sees whatever a bias says of them, and those before a window of any size."""
    model = parse(mask, size)
    assert drop_masks(model) == 1
    assert attention(model).inputs[10] is None
    assert attention(model).attributes.get_int("local_window_size", -1) == window


@pytest.mark.parametrize("size", [3, 64, 4096])
@pytest.mark.parametrize("mask", ["in pieces", "causal, and a window in long texts"])
def test_a_mask_of_another_kind_stays(mask: str, size: int) -> None:
    """Also one that is another only beyond a length that the graph names."""
    model = parse(mask, size)
    assert drop_masks(model) == 0
    assert attention(model).inputs[10] is not None


@pytest.mark.parametrize(
    "bias",
    [
        "Add(bias1, slanted)",  # an input of the graph that nobody knows beforehand
        "Add(bias1, distance)",
        "Mul(bias1, bias1)",  # infinite, and not hidden
        "Cast<to=1>(beside)",  # of another rank
    ],
)
def test_a_bias_that_is_no_mask_stays(bias: str) -> None:
    assert drop_masks(parse("window", bias=bias)) == 0


def guarded(condition: str, rows: str = "float[1,s,64] q") -> ir.Model:
    model = parse("window", added=f"Identity(bias)\n {condition}\n whole = Where(empty, few, q)\n out = Neg(whole)")
    assert rows
    return model


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("ones = Cast<to=1>(mask)\n sum = ReduceSum(ones, last)\n empty = Less(sum, few)", True),
        ("empty = Greater(past_length, far)", True),
        ("empty = Less(past_length, zero)", False),
        ("never = Less(past_length, zero)\n empty = Not(never)", True),  # always, but what it chooses is no such shape
    ],
)
def test_a_guard_goes_where_it_never_acts(condition: str, kept: bool) -> None:
    """Not where it acts in texts beyond a length that the graph names, nor where its choice has another shape."""
    model = parse("window", added=f"Identity(bias)\n {condition}\n whole = Where(empty, few, q)\n out = Neg(whole)")
    infer_types(model)
    found = sum(node.op_type == "Where" for node in model.graph)
    assert drop_guards(model) == (0 if kept else 1)
    assert sum(node.op_type == "Where" for node in model.graph) == found - (0 if kept else 1)


@settings(max_examples=12, deadline=None)
@given(
    size=st.integers(1, 40),
    chunks=st.lists(st.one_of(st.integers(1, 4), st.integers(30, 50)), min_size=1, max_size=3),
    windowed=st.booleans(),
)
def test_attention_without_its_mask_is_the_formula(size: int, chunks: list[int], windowed: bool) -> None:
    """Chunks longer and shorter than the window, a cache with more room than text; also that a key is not lost."""
    model = parse("window" if windowed else "causal", size)
    assert drop_masks(model) == 1
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    session = Session(ir.to_proto(model).SerializeToString(), session_options(2), "attention")
    rng = np.random.default_rng(size)
    keys, values = np.zeros((1, 2, ROOM, WIDTH), np.float32), np.zeros((1, 2, ROOM, WIDTH), np.float32)
    past = 0
    for new in chunks:
        q, k, v = (rng.standard_normal((1, new, heads * WIDTH), np.float32) for heads in (HEADS, 2, 2))
        feed = {
            "input_ids": np.zeros((1, new), np.int64),
            "past_length": np.array([past]),
            "slopes": np.ones(4, np.float32),
        }
        feed |= {"position_ids": np.arange(past, past + new)[None], "q": q, "k": k, "v": v}
        feed |= {"slopes": np.ones(4, np.float32), "input_k": keys, "input_v": values}
        y, keys, values = session.run(None, {i.name: feed[i.name] for i in session.inputs})
        past += new
        expected = attend(q, keys[0, :, :past], values[0, :, :past], size if windowed else past)
        np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-5)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
    """The formula, in float64: q [1, S, H * width], keys and values [2, T, width]; returns [S, H * width]."""
    rows = q.reshape(q.shape[1], HEADS, WIDTH).transpose(1, 0, 2).astype(np.float64)
    keys, values = np.repeat(keys, 2, 0), np.repeat(values, 2, 0)
    scores = rows @ keys.transpose(0, 2, 1) / np.sqrt(WIDTH)
    behind = (keys.shape[1] - len(rows[0]) + np.arange(len(rows[0])))[:, None] - np.arange(keys.shape[1])
    scores[:, (behind < 0) | (behind >= window)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ values
    return y.transpose(1, 0, 2).reshape(len(rows[0]), -1)
