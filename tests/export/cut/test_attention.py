"""Attention and caches in place: what the rewritten graph computes, against the formula, on graphs made by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture.attention import install
from pocketmoe.export.cut.attention import fuse_attention, make_room
from pocketmoe.export.cut.lengths import read_past_length, read_token_count

CAPACITY = 12

ATTENTION = """
<ir_version: 10, opset_import: ["" : 20, "pocketmoe" : 1]>
attention (int64[1,s] input_ids, float[1,H,s,K] q, float[1,G,s,K] k, float[1,G,s,V] v,
           float[1,B,s,t] bias, float[H] sinks, float[1,G,p,K] input_k, float[1,G,p,V] input_v)
    => (float[1,H,s,V] y, float[1,G,t,K] output_k, float[1,G,t,V] output_v)
{
  output_k = Concat<axis=-2>(input_k, k)
  output_v = Concat<axis=2>(input_v, v)
  y = pocketmoe.Attention<scale=0.3>(q, output_k, output_v, bias SINKS)
}
"""

ROOM = """
<ir_version: 10, opset_import: ["" : 20]>
room (int64[1,s] input_ids, float[1,s,3] new, float[1,1,s,2] flat,
      float[1,p,3] input_a, float[1,1,p,2] input_b, float[1,2,p,2] input_c)
    => (float[1,t,3] output_a, float[1,1,t,2] output_b, float[1,2,t,2] output_c, float[1,1,t,1] summed, int64[1] length)
<int64[1] last = {3}, int64[4] twice = {1,2,1,1}>
{
  output_a = Concat<axis=1>(input_a, new)
  output_b = Concat<axis=2>(input_b, flat)
  both = Tile(flat, twice)
  output_c = Concat<axis=2>(input_c, both)
  size = Shape<start=1, end=2>(input_a)
  length = Identity(size)
  summed = ReduceSum(output_b, last)
}
"""


def parse(text: str, **sizes: int) -> ir.Model:
    install()
    for name, size in sizes.items():
        text = (
            text.replace(f"[{name}]", f"[{size}]").replace(f",{name}]", f",{size}]").replace(f",{name},", f",{size},")
        )
    model = ir.from_onnx_text(text)
    for value in (*model.graph.inputs, *model.graph.outputs):  # names with a dot, which the text form has none of
        if str(value.name)[-2:-1] == "_":
            value.name = str(value.name).replace("_", ".")
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    return model


def prepared(model: ir.Model) -> tuple[ort.InferenceSession, set[str]]:
    """The graph as an export leaves it, and which of its states come with room."""
    fuse_attention(model)
    axes = {2: 1, 3: 2}  # by rank less one of what a token leaves
    states = [value for value in model.graph.inputs if str(value.name).startswith("input.")]
    growing = {str(value.name): axes[len(value.shape or ()) - 1] for value in states}
    read_past_length(model, growing)
    read_token_count(model)
    roomy = make_room(model, growing)
    for value in model.graph.outputs:  # what their shapes are called does not matter here
        value.shape = None
    options = ort.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]), roomy


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
    """The formula, in float64: [1, H, S, V]."""
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    scores = np.float32(0.3) * np.einsum("bhsk,bhtk->bhst", q.astype(np.float64), k) + bias
    weights = np.exp(scores)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.astype(np.float64))[:, None, None]
    return np.einsum("bhst,bhtv->bhsv", weights / total, v)


@settings(max_examples=10, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (4, 4), (6, 1)]),
    widths=st.sampled_from([(8, 8), (16, 8), (8, 24)]),
    steps=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    with_sinks=st.booleans(),
    by_head=st.booleans(),
)
def test_fused_attention_is_the_formula(
    heads: tuple[int, int], widths: tuple[int, int], steps: list[int], with_sinks: bool, by_head: bool
) -> None:
    """With and without sinks, keys and values of unlike widths, chunks of any size, buffers longer than filled."""
    n_heads, n_groups = heads
    width = max(widths)
    text = ATTENTION.replace("SINKS", ", sinks" if with_sinks else "")
    session, _ = prepared(parse(text, H=n_heads, G=n_groups, K=widths[0], V=widths[1], B=n_heads if by_head else 1))
    rng = np.random.default_rng(sum(steps))

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    sinks = floats(n_heads)
    keys, values = floats(1, n_groups, 0, widths[0]), floats(1, n_groups, 0, widths[1])
    buffers = {name: np.full((1, n_groups, 16, width), 7, np.float32) for name in ("input.k", "input.v")}
    for new in steps:
        past = keys.shape[2]
        q, k, v = (
            floats(1, n_heads, new, widths[0]),
            floats(1, n_groups, new, widths[0]),
            floats(1, n_groups, new, widths[1]),
        )
        keys, values = np.concatenate([keys, k], 2), np.concatenate([values, v], 2)
        hidden = np.arange(past + new)[None] > past + np.arange(new)[:, None]
        bias = np.where(hidden, np.float32(-1e9), floats(1, n_heads if by_head else 1, new, past + new))
        feeds = {"input_ids": np.zeros((1, new), np.int64), "q": q, "k": k, "v": v, "bias": bias}
        feeds |= {"sinks": sinks, "past_length": np.array([past], np.int64)}
        y = run(session, feeds, {"input.k": "output.k", "input.v": "output.v"}, buffers, "y")
        expected = attend(q, keys, values, bias, sinks if with_sinks else None)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(buffers["input.k"][:, :, : past + new, : widths[0]], keys)
        np.testing.assert_array_equal(buffers["input.v"][:, :, : past + new, : widths[1]], values)


def run(
    session: ort.InferenceSession,
    feeds: dict[str, np.ndarray],
    states: dict[str, str],
    buffers: dict[str, np.ndarray],
    output: str,
) -> np.ndarray:
    """One output, of a run in which states are one buffer each for input and output."""
    binding = session.io_binding()
    wanted = {value.name for value in session.get_inputs()}
    for name, array in feeds.items():
        if name in wanted:
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for source, target in states.items():
        shared = ort.OrtValue.ortvalue_from_numpy(buffers[source])
        binding.bind_ortvalue_input(source, shared)
        binding.bind_ortvalue_output(target, shared)
    binding.bind_output(output, "cpu")
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[-1]


def test_new_tokens_are_written_into_the_room() -> None:
    """Caches of one vector a token, of two ranks; one with two heads is appended to as before."""
    session, roomy = prepared(parse(ROOM))
    assert roomy == {"input.a", "input.b"}
    rng = np.random.default_rng(0)
    long = {"input.a": np.full((1, CAPACITY, 3), 7, np.float32), "input.b": np.full((1, 1, CAPACITY, 2), 7, np.float32)}
    past, c = 0, np.zeros((1, 2, 0, 2), np.float32)
    seen = {"input.a": np.zeros((1, 0, 3)), "input.b": np.zeros((1, 1, 0, 2))}
    for new in (4, 1, 3):
        rows, flat = rng.standard_normal((1, new, 3), np.float32), rng.standard_normal((1, 1, new, 2), np.float32)
        views = {"input.a": long["input.a"][:, : past + new], "input.b": long["input.b"][:, :, : past + new]}
        feeds = {"input_ids": np.zeros((1, new), np.int64), "new": rows, "flat": flat, "input.c": c}
        feeds |= {"past_length": np.array([past], np.int64)}
        summed = run(session, feeds, {"input.a": "output.a", "input.b": "output.b"}, views, "summed")
        seen = {
            "input.a": np.concatenate([seen["input.a"], rows], 1),
            "input.b": np.concatenate([seen["input.b"], flat], 2),
        }
        past, c = past + new, np.zeros((1, 2, past + new, 2), np.float32)
        np.testing.assert_array_equal(long["input.a"][:, :past], seen["input.a"])
        np.testing.assert_array_equal(long["input.b"][:, :, :past], seen["input.b"])
        np.testing.assert_allclose(summed[..., 0], seen["input.b"].sum(-1), rtol=1e-5)
    assert (long["input.a"][:, past:] == 7).all()
    assert (long["input.b"][:, :, past:] == 7).all()


def test_keys_that_are_no_cache_are_refused() -> None:
    text = ATTENTION.replace("SINKS", ", sinks").replace("(q, output_k,", "(q, k,")
    with pytest.raises(UnsupportedModel, match="not appended to a cache"):
        fuse_attention(parse(text, H=4, G=2, K=8, V=8, B=1))
