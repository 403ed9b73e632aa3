"""Quantized matrices against their definition and against ONNX Runtime's own kernels."""

# pyright: reportArgumentType=false

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.quantize.algorithms.float4 import quantize_float4
from pocketmoe.quantize.algorithms.formats import (
    BITS,
    BLOCKS,
    FLOAT_BLOCKS,
    BlockFormat,
    FloatFormat,
    Format,
    QuantizedMatrix,
    all_formats,
    dequantize,
    pack,
    parse_format,
    relative_error,
    unpack,
)
from pocketmoe.quantize.algorithms.nearest import quantize

formats = st.builds(BlockFormat, st.sampled_from(BITS), st.sampled_from(BLOCKS), st.booleans())
ALL = [BlockFormat(bits, block, symmetric) for bits in BITS for block in BLOCKS for symmetric in (True, False)]


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Random matrices of odd sizes and any magnitude, some of whose values are repeated, zero, or outliers."""
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["gauss", "heavy", "constant", "zero", "sparse", "positive"]))
    weight = {
        "gauss": lambda: rng.standard_normal((n, k)),
        "heavy": lambda: rng.standard_t(2, (n, k)),
        "constant": lambda: np.full((n, k), rng.standard_normal()),
        "zero": lambda: np.zeros((n, k)),
        "sparse": lambda: rng.standard_normal((n, k)) * (rng.random((n, k)) < 0.05),
        "positive": lambda: rng.random((n, k)) + 1,
    }[kind]()
    return (weight * 10.0 ** draw(st.integers(-30, 30))).astype(np.float32)


def naive(matrix: QuantizedMatrix) -> np.ndarray:
    """The float64 matrix by the definition of MatMulNBits, one weight at a time."""
    form, (n, n_blocks) = matrix.format, matrix.scales.shape

    def code(data: np.ndarray, index: int) -> int:
        per_byte = 8 // form.bits
        return int(data[index // per_byte]) >> (index % per_byte * form.bits) & ((1 << form.bits) - 1)

    out = np.empty((n, matrix.k))
    for row in range(n):
        for column in range(matrix.k):
            block = column // form.block
            zero = 1 << (form.bits - 1) if matrix.zero_points is None else code(matrix.zero_points[row], block)
            value = code(matrix.codes[row, block], column % form.block) - zero
            out[row, column] = value * np.float64(matrix.scales[row, block])
    assert n_blocks == -(-matrix.k // form.block)
    return out


def block_errors(weight: np.ndarray, restored: np.ndarray, block: int) -> np.ndarray:
    """Sum of squared errors per block, float64 [N, K / block]."""
    n, k = weight.shape
    padded = np.zeros((n, -(-k // block) * block))
    padded[:, :k] = np.square(weight.astype(np.float64) - restored)
    return padded.reshape(n, -1, block).sum(axis=2)


def plain_rounding(weight: np.ndarray, form: BlockFormat) -> np.ndarray:
    """Textbook round-to-nearest, float64: the largest magnitude (or the range with zero) spans all the codes."""
    n, k = weight.shape
    padded = np.zeros((n, -(-k // form.block) * form.block))
    padded[:, :k] = weight
    blocks = padded.reshape(n, -1, form.block)
    levels = 1 << form.bits
    if form.symmetric:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(2)[..., None], 2)
        scale, zero = largest / -(levels / 2), levels / 2
    else:
        low, high = np.minimum(blocks.min(2, keepdims=True), 0), np.maximum(blocks.max(2, keepdims=True), 0)
        scale = (high - low) / (levels - 1)
        zero = np.rint(np.divide(-low, scale, out=np.zeros_like(low), where=scale != 0))
    steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)
    return ((np.clip(np.rint(steps) + zero, 0, levels - 1) - zero) * scale).reshape(n, -1)[:, :k]


@given(matrices(), formats)
@settings(max_examples=60, deadline=None)
def test_dequantize_is_the_operators_definition(weight: np.ndarray, form: BlockFormat) -> None:
    matrix = quantize(weight, form, name="w")
    np.testing.assert_allclose(dequantize(matrix), naive(matrix), rtol=1e-6, atol=1e-44)
    assert sum(part.nbytes for part in matrix.parts) == form.nbytes(*weight.shape)


@given(matrices(), formats)
@settings(max_examples=150, deadline=None)
def test_every_weight_is_within_half_a_step_or_clipped(weight: np.ndarray, form: BlockFormat) -> None:
    matrix = quantize(weight, form, name="w")
    off = np.abs(weight - dequantize(matrix).astype(np.float64))
    step = np.abs(np.repeat(matrix.scales, form.block, axis=1)[:, : matrix.k]).astype(np.float64)
    codes = unpack(matrix.codes.reshape(len(weight), -1), form.bits)[:, : matrix.k]
    clipped = (codes == 0) | (codes == (1 << form.bits) - 1)
    assert (off <= step * (0.5 + 1e-4) + 1e-35)[~clipped].all()
    if form.bits == 8:
        assert (off <= step + 1e-35).all()


@given(matrices(), formats)
@settings(max_examples=150, deadline=None)
def test_no_worse_than_plain_rounding(weight: np.ndarray, form: BlockFormat) -> None:
    """The search contains plain rounding's grid, so that no block loses by it."""
    if form.bits == 8 and form.symmetric:
        return  # 127 steps each way, for the half-step bound, instead of 128 one way
    found = block_errors(weight, dequantize(quantize(weight, form, name="w")).astype(np.float64), form.block)
    plain = block_errors(weight, plain_rounding(weight, form), form.block)
    energy = block_errors(weight, np.zeros_like(weight), form.block)
    assert (found <= plain * 1.001 + energy * 1e-6 + 1e-70).all()


@pytest.mark.parametrize("form", [f for f in ALL if f.bits == 4], ids=lambda f: f.label)
def test_search_lowers_the_error_of_gaussian_weights(form: BlockFormat) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    error = relative_error(weight, quantize(weight, form, name="w"))
    plain = np.linalg.norm(weight - plain_rounding(weight, form)) / np.linalg.norm(weight)
    assert error < 0.965 * plain


@pytest.mark.parametrize("form", ALL, ids=lambda f: f.label)
@pytest.mark.parametrize("level", [0, 4])
def test_kernel_computes_what_dequantize_says(form: BlockFormat, level: int) -> None:
    """Against a float64 product; at level 4 within what rounding activations to int8 per block may cost."""
    rng = np.random.default_rng(form.block + form.bits)
    for n, k, rows in ((7, 100, 3), (16, 256, 1), (33, 64, 17), (1, 17, 2)):
        weight = rng.standard_normal((n, k)).astype(np.float32)
        weight[0, : min(k, form.block)] = 0  # a dead block
        matrix = quantize(weight, form, name="w")
        x = rng.standard_normal((rows, k)).astype(np.float32)
        if rows == 17:  # the largest codes and activations there are: int16 sums would saturate without VNNI
            weight[1:4], x[3:5] = 1, 1
            matrix = quantize(weight, form, name="w")
        truth = x.astype(np.float64) @ dequantize(matrix).astype(np.float64).T
        y = run_kernel(matrix, x, level)
        magnitudes = np.abs(x).astype(np.float64) @ np.abs(dequantize(matrix)).astype(np.float64).T
        bound = 1e-5 * magnitudes + 1e-5
        if level == 4:
            padded = np.zeros((rows, -(-k // form.block) * form.block))
            padded[:, :k] = np.abs(x)
            half_step = np.repeat(padded.reshape(rows, -1, form.block).max(2) / 127 / 2, form.block, axis=1)[:, :k]
            bound += 1.05 * half_step @ np.abs(dequantize(matrix)).astype(np.float64).T
        assert (np.abs(y - truth) <= bound).all()


def run_kernel(matrix: QuantizedMatrix, x: np.ndarray, level: int) -> np.ndarray:
    names = ["codes", "scales", "zeros"][: len(matrix.parts)]
    form = matrix.format
    attributes = {"K": matrix.k, "N": len(matrix.scales), "block_size": form.block}
    if isinstance(form, FloatFormat):
        op_type = "MatMulBnb4"
        attributes |= {"quant_type": form.quant_type}
    else:
        op_type = "MatMulNBits"
        attributes |= {"bits": form.bits, "accuracy_level": level}
    node = helper.make_node(op_type, ["x", *names], ["y"], domain="com.microsoft", **attributes)
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    shaped = [p.reshape(-1) if isinstance(form, FloatFormat) else p for p in matrix.parts]
    initializers = [numpy_helper.from_array(part, name) for part, name in zip(shaped, names, strict=True)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", io[:1], io[1:], initializers), opset_imports=opsets, ir_version=10
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [BlockFormat(4, 32), BlockFormat(8, 16, False)], ids=lambda f: f.label)
def test_not_finite_is_refused_by_name(value: float, form: BlockFormat) -> None:
    weight = np.zeros((300, 700), np.float32)
    weight[299, 699] = value
    with pytest.raises(BadInput, match=r"layer 3, expert 7, down holds NaN or infinity"):
        quantize(weight, form, name="layer 3, expert 7, down")


def test_other_arrays_are_refused() -> None:
    for wrong in (np.zeros((2, 2)), np.zeros(4, np.float32), np.zeros((1, 2, 3), np.float32)):
        with pytest.raises(BadInput, match="w: expected a float32 matrix"):
            quantize(wrong, BlockFormat(4, 32), name="w")


@given(st.binary(min_size=1, max_size=40), st.sampled_from(BITS))
def test_unpack_inverts_pack(data: bytes, bits: int) -> None:
    codes = np.frombuffer(data, np.uint8) >> (8 - bits)
    assert (unpack(pack(codes, bits), bits)[: len(codes)] == codes).all()


def test_the_fitted_block_stores_least() -> None:
    """A row narrower than the block must not be padded to it (down_proj of small experts)."""
    assert BlockFormat(4, 128).fitted(64).block == 64
    assert BlockFormat(4, 128).fitted(2048).block == 128
    assert BlockFormat(4, 32).fitted(64).block == 32
    assert BlockFormat(4, 128).fitted(1000).block == 128
    assert BlockFormat(4, 128).fitted(8).block == 16


def test_relative_error_matches_its_definition() -> None:
    weight = np.random.default_rng(0).standard_normal((130, 1500)).astype(np.float32)
    matrix = quantize(weight, BlockFormat(4, 64), name="w")
    expected = np.linalg.norm(weight - dequantize(matrix)) / np.linalg.norm(weight)
    assert relative_error(weight, matrix) == pytest.approx(expected, rel=1e-5)
    zero = quantize(np.zeros((3, 40), np.float32), BlockFormat(8, 32), name="w")
    assert relative_error(np.zeros((3, 40), np.float32), zero) == 0


@pytest.mark.parametrize(
    "form", [FloatFormat(v, b) for v in ("nf4", "fp4") for b in FLOAT_BLOCKS], ids=lambda f: f.label
)
def test_float_kernel_computes_what_bitsandbytes_and_dequantize_say(form: FloatFormat) -> None:
    rng = np.random.default_rng(0)
    for n, k, rows in ((16, 256, 1), (33, 128, 17)):
        weight = rng.standard_t(4, (n, k)).astype(np.float32)
        weight[0, : form.block] = 0
        matrix = quantize_float4(weight, form, name="w")
        assert sum(part.nbytes for part in matrix.parts) == form.nbytes(n, k)
        restored = dequantize(matrix)
        codes, state = quantize_4bit(torch.from_numpy(weight), blocksize=form.block, quant_type=form.values)
        np.testing.assert_allclose(restored, dequantize_4bit(codes, state).numpy(), rtol=1e-6)
        x = rng.standard_normal((rows, k)).astype(np.float32)
        np.testing.assert_allclose(run_kernel(matrix, x, 0), x @ restored.T, rtol=1e-4, atol=1e-4)


def test_float_blocks_do_not_straddle_rows() -> None:
    """Where they do, MatMulBnb4 computes garbage without a word."""
    assert FloatFormat("nf4", 128).fitted(192).block == 64
    with pytest.raises(UnsupportedModel, match="rows of 100 weights"):
        FloatFormat("nf4", 128).fitted(100)


@given(st.sampled_from(all_formats()))
def test_a_label_names_its_format(form: Format) -> None:
    assert parse_format(form.label) == form


def test_what_is_no_label_is_refused() -> None:
    for text in ("int3-b64", "int4", "int4-b512", "nf4-b16", ""):
        with pytest.raises(ValueError, match="is no format"):
            parse_format(text)


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (4, 20), (4, 256), (4, 512), (2, 256), (16, 32)])
def test_unknown_formats_cannot_be_made(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match="no format"):
        BlockFormat(bits, block)
