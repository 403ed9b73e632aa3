"""Formats against the descriptions of ONNX Runtime's operators, code by code, without any of its kernels."""

# pyright: reportArgumentType=false

from __future__ import annotations

import itertools

import bitsandbytes.functional  # noqa: F401 # pyright: ignore[reportUnusedImport] - takes seconds, which each mutant would pay (docs/MUTATION.md)
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.errors import UnsupportedModel
from pocketmoe.quantize.algorithms.formats import (
    BITS,
    BLOCKS,
    FLOAT_BLOCKS,
    BlockFormat,
    FloatFormat,
    QuantizedMatrix,
    all_formats,
    dequantize,
    float_values,
    pack,
    parse_format,
    relative_error,
    unpack,
)

INTEGERS = [BlockFormat(bits, block, symmetric) for bits in BITS for block in BLOCKS for symmetric in (True, False)]
# arXiv 2305.14314, appendix E, and bitsandbytes' table of its FP4 (csrc/kernels.cu), by code.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FP4 = [0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]


def bits_of(data: np.ndarray) -> list[int]:
    """The bits of bytes, each byte's lowest first."""
    return [byte >> place & 1 for byte in data.tolist() for place in range(8)]


def number(bits: list[int]) -> int:
    return sum(bit << place for place, bit in enumerate(bits))


@given(st.sampled_from(BITS), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_codes_lie_in_bytes_low_bits_first(bits: int, values: list[int]) -> None:
    """Each code's bits follow those of the code before; what is left of the last byte is zeros."""
    codes = np.array(values, np.uint8) >> (8 - bits)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-len(values) * bits // 8),)
    stream = bits_of(packed)
    assert [number(stream[i * bits : (i + 1) * bits]) for i in range(len(codes))] == codes.tolist()
    assert not any(stream[len(codes) * bits :])
    again = unpack(packed, bits)
    assert again.dtype == np.uint8
    assert again.shape == (len(packed) * 8 // bits,)
    assert again[: len(codes)].tolist() == codes.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_packed_each_by_itself(bits: int) -> None:
    """Of any number of axes the last is packed."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 2, 13)).astype(np.uint8)
    packed = pack(codes, bits)
    for row, column in itertools.product(range(3), range(2)):
        np.testing.assert_array_equal(packed[row, column], pack(codes[row, column], bits))
    assert unpack(packed, bits).shape == (3, 2, packed.shape[-1] * 8 // bits)
    np.testing.assert_array_equal(unpack(packed, bits)[..., :13], codes)


def made_up(form: BlockFormat, n: int, k: int) -> QuantizedMatrix:
    """A matrix of random bytes, in the shapes that MatMulNBits documents."""
    rng = np.random.default_rng(form.block + form.bits)
    n_blocks = -(-k // form.block)
    codes = rng.integers(0, 256, (n, n_blocks, form.block * form.bits // 8)).astype(np.uint8)
    scales = rng.standard_normal((n, n_blocks)).astype(np.float32)
    zeros = rng.integers(0, 256, (n, -(-n_blocks * form.bits // 8))).astype(np.uint8)
    return QuantizedMatrix(form, k, codes, scales, None if form.symmetric else zeros)


@pytest.mark.parametrize("form", INTEGERS, ids=lambda f: f.label)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 100), (2, 128), (2, 400)])
def test_an_integer_matrix_is_what_its_bits_say(form: BlockFormat, n: int, k: int) -> None:
    """(code - zero point) * scale, whatever the bytes; shapes and bytes are those that the format says."""
    matrix = made_up(form, n, k)
    assert [part.shape for part in matrix.parts] == form.shapes(n, k)
    assert sum(part.nbytes for part in matrix.parts) == form.nbytes(n, k)
    assert matrix.parts[:2] == (matrix.codes, matrix.scales)
    found = dequantize(matrix)
    assert found.dtype == np.float32
    assert found.shape == (n, k)
    for row in range(n):
        zeros = None if matrix.zero_points is None else bits_of(matrix.zero_points[row])
        for block in range(form.n_blocks(k)):
            zero = 2 ** (form.bits - 1)
            if zeros is not None:
                zero = number(zeros[block * form.bits : (block + 1) * form.bits])
            stream = bits_of(matrix.codes[row, block])
            for place in range(min(form.block, k - block * form.block)):
                code = number(stream[place * form.bits : (place + 1) * form.bits])
                value = np.float32(code - zero) * matrix.scales[row, block]
                assert found[row, block * form.block + place] == value


@pytest.mark.parametrize("block", FLOAT_BLOCKS)
@pytest.mark.parametrize("values", ["nf4", "fp4"])
def test_a_float_matrix_is_what_its_bytes_say(values: str, block: int) -> None:
    """One of sixteen published values times the block's largest magnitude, the high half of a byte first."""
    form = FloatFormat(values, block)  # type: ignore[arg-type]
    table = NF4 if values == "nf4" else [*FP4, *(-value for value in FP4)]
    np.testing.assert_allclose(float_values(values), table, atol=1e-6)
    rng = np.random.default_rng(block)
    n, k = 3, 2 * block
    matrix = QuantizedMatrix(
        form, k, rng.integers(0, 256, (n, k // 2)).astype(np.uint8), rng.random((n, 2)).astype(np.float32)
    )
    assert [part.size for part in matrix.parts] == [size for (size,) in form.shapes(n, k)]
    assert sum(part.nbytes for part in matrix.parts) == form.nbytes(n, k)
    found = dequantize(matrix)
    assert found.shape == (n, k)
    for row, column in itertools.product(range(n), range(k)):
        code = int(matrix.codes[row, column // 2]) >> (0 if column % 2 else 4) & 15
        assert found[row, column] == pytest.approx(table[code] * matrix.scales[row, column // block], abs=1e-6)
    assert (form.quant_type, form.bits) == ({"fp4": 0, "nf4": 1}[values], 4)


def test_labels_are_these() -> None:
    """They stand in manifests, so that none may change; there are no others."""
    labels = [form.label for form in all_formats()]
    integers = [
        f"int{bits}-b{block}{kind}" for bits in (2, 4, 8) for block in (16, 32, 64, 128) for kind in ("", "-asym")
    ]
    assert labels == [*integers, "nf4-b32", "nf4-b64", "nf4-b128", "fp4-b32", "fp4-b64", "fp4-b128"]
    assert [parse_format(label) for label in labels] == all_formats()
    assert BlockFormat(4, 32).symmetric
    for text in ("int3-b64", "int4", "INT4-B64", "nf4-b16", "nf4-b64-asym", ""):
        with pytest.raises(ValueError, match=f"^'{text}' is no format; write int4-b64, int4-b64-asym, .*, nf4-b64$"):
            parse_format(text)


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (1, 32), (4, 8), (4, 256), (16, 32), (4, 0)])
def test_an_integer_format_that_no_kernel_takes_cannot_be_made(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"^no format of {bits} bits in blocks of {block}$"):
        BlockFormat(bits, block)


@pytest.mark.parametrize(("values", "block"), [("nf4", 16), ("fp4", 256), ("nf3", 64)])
def test_a_float_format_that_no_kernel_takes_cannot_be_made(values: str, block: int) -> None:
    with pytest.raises(ValueError, match=f"^no format of {values} in blocks of {block}$"):
        FloatFormat(values, block)  # type: ignore[arg-type]


@given(st.sampled_from(INTEGERS), st.integers(1, 5000))
def test_the_fitted_block_is_the_largest_that_stores_a_row_in_the_fewest_bytes(form: BlockFormat, k: int) -> None:
    """Counted here: codes of whole blocks, four bytes a scale, zero points rounded up to a byte."""

    def row_bytes(block: int) -> int:
        n_blocks = -(-k // block)
        return (
            n_blocks * block * form.bits // 8 + 4 * n_blocks + (0 if form.symmetric else -(-n_blocks * form.bits // 8))
        )

    assert form.nbytes(3, k) == 3 * row_bytes(form.block)
    fitted = form.fitted(k)
    least = min(row_bytes(block) for block in BLOCKS if block <= form.block)
    assert fitted.block == max(block for block in BLOCKS if block <= form.block and row_bytes(block) == least)
    assert (fitted.bits, fitted.symmetric) == (form.bits, form.symmetric)


@given(st.sampled_from(["nf4", "fp4"]), st.sampled_from(FLOAT_BLOCKS), st.integers(1, 1000))
def test_the_fitted_float_block_is_the_largest_that_divides_a_row(values: str, block: int, k: int) -> None:
    form = FloatFormat(values, block)  # type: ignore[arg-type]
    dividing = [b for b in (32, 64, 128) if b <= block and k % b == 0]
    if dividing:
        assert form.fitted(k) == FloatFormat(values, max(dividing))  # type: ignore[arg-type]
        return
    with pytest.raises(UnsupportedModel) as refused:
        form.fitted(k)
    assert str(refused.value) == f"rows of {k} weights are not made of blocks of {values}"
    assert refused.value.remedy == "Choose int4."


@pytest.mark.parametrize(
    "form", [BlockFormat(4, 32), BlockFormat(2, 16, False), BlockFormat(8, 64, False)], ids=lambda f: f.label
)
@pytest.mark.parametrize(("n", "k"), [(3, 50), (700, 300), (2, 70_000)])
def test_the_relative_error_is_that_of_the_whole(form: BlockFormat, n: int, k: int) -> None:
    """Looked at in parts or at once: a norm over a norm, of numbers whose squares float32 cannot hold too."""
    matrix = made_up(form, n, k)
    weight = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    restored = dequantize(matrix).astype(np.float64)
    expected = np.sqrt(np.square(weight - restored).sum() / np.square(weight.astype(np.float64)).sum())
    assert relative_error(weight, matrix) == pytest.approx(expected, rel=1e-9)
    huge = QuantizedMatrix(form, k, matrix.codes, matrix.scales * np.float32(1e25), matrix.zero_points)
    assert np.isfinite(relative_error(weight * np.float32(1e25), huge))


def test_the_relative_error_of_zeros() -> None:
    """Nothing where they come back as zeros, everything where they do not; an empty matrix has none."""
    form = BlockFormat(4, 16)
    scales = np.ones((2, 1), np.float32)
    back = QuantizedMatrix(form, 10, np.full((2, 1, 8), 0x88, np.uint8), scales)
    assert relative_error(np.zeros((2, 10), np.float32), back) == 0
    not_back = QuantizedMatrix(form, 10, np.full((2, 1, 8), 0x89, np.uint8), scales / 1000)
    assert relative_error(np.zeros((2, 10), np.float32), not_back) == 1
    empty = QuantizedMatrix(form, 0, np.zeros((2, 0, 8), np.uint8), np.zeros((2, 0), np.float32))
    assert relative_error(np.zeros((2, 0), np.float32), empty) == 0
