"""Roundings against ONNX Runtime's own, and against what they are for: the error of products."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime.quantization.neural_compressor.weight_only import gptq as library_gptq

from pocketmoe.calibration import Hessian
from pocketmoe.errors import BadInput
from pocketmoe.quantize.algorithms.choice import ALGORITHMS, find_algorithm
from pocketmoe.quantize.algorithms.formats import BlockFormat, FloatFormat, Format, dequantize, unpack

N, K, ROWS = 48, 192, 600
FORMS = [BlockFormat(2, 32, False), BlockFormat(4, 64, False), BlockFormat(4, 64), BlockFormat(8, 64)]


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_t(6, (N, K)).astype(np.float32)


def activations(seed: int, rows: int = ROWS) -> np.ndarray:
    """Rows whose channels depend on each other and differ in size, as those of trained models do."""
    mixing = np.random.default_rng(99).standard_normal((40, K)) * np.geomspace(3, 0.1, K)
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, 40)) @ mixing + 0.1 * rng.standard_normal((rows, K))).astype(np.float32)


def hessian_of(x: np.ndarray) -> Hessian:
    return Hessian(x.T @ x, len(x))


def product_error(weight: np.ndarray, restored: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(x @ (weight - restored).T) / np.linalg.norm(x @ weight.T))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.label)
def test_gptq_helps_on_rows_that_it_has_not_seen(weight: np.ndarray, form: BlockFormat) -> None:
    hessian, new = hessian_of(activations(1)), activations(2)
    plain = dequantize(find_algorithm("nearest")(weight, form, name="w"))
    found = dequantize(find_algorithm("gptq")(weight, form, name="w", hessian=hessian))
    assert product_error(weight, found, new) < 0.75 * product_error(weight, plain, new)


def test_gptq_is_no_worse_than_the_library(weight: np.ndarray) -> None:
    """ONNX Runtime carries Intel's implementation; both get the same Hessian, format and damping."""
    x = activations(1)
    form = BlockFormat(4, 64, False)
    ours = dequantize(find_algorithm("gptq")(weight, form, name="w", hessian=hessian_of(x)))
    theirs = library_gptq(weight.T.copy(), x.T @ x, num_bits=4, group_size=64, scheme="asym", actorder=False)
    assert product_error(weight, ours, activations(2)) < 1.02 * product_error(
        weight, np.asarray(theirs).T, activations(2)
    )


def test_gptq_keeps_the_grid_and_its_codes_in_their_blocks(weight: np.ndarray) -> None:
    """Scales and zero points are those of plain rounding, and every weight is a code times them."""
    form = BlockFormat(4, 128, False)  # the last block is padded
    plain = find_algorithm("nearest")(weight, form, name="w")
    found = find_algorithm("gptq")(weight, form, name="w", hessian=hessian_of(activations(1)))
    np.testing.assert_array_equal(found.scales, plain.scales)
    assert found.zero_points is not None
    assert plain.zero_points is not None
    np.testing.assert_array_equal(found.zero_points, plain.zero_points)
    codes = unpack(found.codes.reshape(N, -1), 4)
    zeros = np.repeat(unpack(found.zero_points, 4)[:, :2], 128, axis=1)
    assert (codes[:, K:] == zeros[:, K:]).all(), "padding must come to zero"


def test_gptq_with_dead_or_equal_channels(weight: np.ndarray) -> None:
    """A Hessian that cannot be inverted: channels that are always zero, and channels that are copies of others."""
    x = activations(1)
    x[:, :30] = 0
    x[:, 60:90] = x[:, 90:120]
    found = dequantize(find_algorithm("gptq")(weight, BlockFormat(4, 64, False), name="w", hessian=hessian_of(x)))
    assert np.isfinite(found).all()
    assert product_error(weight, found, x) < 0.1
    silent = Hessian(np.zeros((K, K), np.float32), 100)
    assert np.isfinite(dequantize(find_algorithm("gptq")(weight, BlockFormat(4, 64), name="w", hessian=silent))).all()


def test_gptq_without_enough_rows_is_plain_rounding(weight: np.ndarray) -> None:
    form = BlockFormat(4, 64, False)
    plain = find_algorithm("nearest")(weight, form, name="w")
    for hessian in (None, hessian_of(activations(1, rows=3))):
        np.testing.assert_array_equal(
            find_algorithm("gptq")(weight, form, name="w", hessian=hessian).codes, plain.codes
        )


def test_calibration_that_brought_nan_is_refused(weight: np.ndarray) -> None:
    """llm-compressor 2826: NaN scales, without a word."""
    x = activations(1)
    x[3, 5] = np.nan
    with pytest.raises(BadInput, match="layer 3: calibration brought it numbers that are not finite"):
        find_algorithm("gptq")(weight, BlockFormat(4, 64), name="layer 3", hessian=hessian_of(x))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("form", [*FORMS, FloatFormat("nf4", 64)], ids=lambda f: f.label)
def test_every_rounding_stores_every_format(weight: np.ndarray, name: str, form: Format) -> None:
    """In as many bytes as the format says, and near the weights, dead blocks and blocks of one value included."""
    weight = weight.copy()
    weight[0] = 0
    weight[1] = 0.25
    matrix = find_algorithm(name)(weight, form, name="w", hessian=hessian_of(activations(1)))
    assert sum(part.nbytes for part in matrix.parts) == form.nbytes(N, K)
    limit = {2: 0.7, 4: 0.2, 8: 0.02}[form.bits] * (2 if name == "gptq" else 1)  # it spends weights to save products
    assert np.linalg.norm(dequantize(matrix) - weight) < limit * np.linalg.norm(weight)
    np.testing.assert_allclose(dequantize(matrix)[0], 0)


def test_unknown_rounding_names_those_that_exist() -> None:
    with pytest.raises(BadInput, match="no rounding is named") as caught:
        find_algorithm("awq")
    assert "gptq" in caught.value.remedy
