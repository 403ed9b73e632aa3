"""GPTQ against the recursion of its paper, one input at a time in float64, and against what makes it optimal."""

from __future__ import annotations

import numpy as np
import pytest

from pocketmoe.calibration import Hessian
from pocketmoe.quantize.algorithms.formats import BlockFormat, QuantizedMatrix, dequantize, unpack
from pocketmoe.quantize.algorithms.gptq import gptq
from pocketmoe.quantize.algorithms.nearest import quantize

FORMS = [BlockFormat(4, 32), BlockFormat(4, 64, False), BlockFormat(2, 16, False), BlockFormat(8, 128)]
MANY = 10**9  # rows that let what a Hessian says of pairs count in full


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (n, k)).astype(np.float32)


def hessian(k: int, rows: int = 400, seed: int = 1) -> Hessian:
    """Of inputs that depend on each other and differ in size, the largest not in front."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((k, k)) * rng.permutation(np.geomspace(2, 0.2, k))
    x = rng.standard_normal((rows, k)) @ mixing / np.sqrt(k)
    return Hessian((x.T @ x).astype(np.float32), rows)


def damped(h: Hessian, share: float = 0.01) -> np.ndarray:
    """What is inverted, float64 [K, K]: pairs shrunk by the rows there are, the diagonal a share of its mean higher."""
    matrix = h.matrix.astype(np.float64) * (h.rows / (h.rows + len(h.matrix)))
    energy = np.diagonal(h.matrix).astype(np.float64)
    alive = energy > 0
    np.fill_diagonal(matrix, np.where(alive, energy, 1) + share * (energy[alive].mean() if alive.any() else 1))
    return matrix


def grid_of(grid: QuantizedMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each weight, float64 [N, K]."""
    form = grid.format
    if grid.zero_points is None:
        zeros = np.full(grid.scales.shape, 1 << (form.bits - 1))
    else:
        zeros = unpack(grid.zero_points, form.bits)[:, : grid.scales.shape[1]]
    scale, zero = (np.repeat(part, form.block, axis=1)[:, : grid.k] for part in (grid.scales, zeros))
    return scale.astype(np.float64), zero.astype(np.float64)


def codes_of(matrix: QuantizedMatrix) -> np.ndarray:
    """uint8 [N, K]."""
    return unpack(matrix.codes.reshape(len(matrix.scales), -1), matrix.format.bits)[:, : matrix.k]


def recursion(weight: np.ndarray, grid: QuantizedMatrix, h: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Codes, int [N, K], by equations 2 and 3 of arXiv 2210.17323: no Cholesky, no batches, no lazy corrections."""
    scale, zero = grid_of(grid)
    left, inverse = weight.astype(np.float64), np.linalg.inv(h)
    codes = np.zeros(weight.shape, int)
    for q in order:
        steps = np.divide(left[:, q], scale[:, q], out=np.zeros(len(left)), where=scale[:, q] != 0)
        codes[:, q] = np.clip(np.rint(steps) + zero[:, q], 0, (1 << grid.format.bits) - 1)
        error = left[:, q] - (codes[:, q] - zero[:, q]) * scale[:, q]
        left -= np.outer(error / inverse[q, q], inverse[q])
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


def by_energy(h: Hessian) -> np.ndarray:
    return np.argsort(-np.diagonal(h.matrix), kind="stable")


def loss(weight: np.ndarray, matrix: QuantizedMatrix, h: np.ndarray) -> np.ndarray:
    """What a row's outputs lose, float64 [N]: the quadratic form of its weights' errors."""
    error = weight.astype(np.float64) - dequantize(matrix)
    return np.einsum("ni,ij,nj->n", error, h, error)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.label)
@pytest.mark.parametrize("k", [1, 40, 64, 65, 150])
def test_codes_are_those_of_the_papers_recursion(form: BlockFormat, k: int) -> None:
    """All but one in a thousand, which float32 may round the other way, and no more output error than it."""
    weight, h = weights(24, k), hessian(k)
    grid = quantize(weight, form, name="w")
    found = gptq(weight, grid, h)
    wanted = recursion(weight, grid, damped(h), by_energy(h))
    assert (codes_of(found) != wanted).sum() <= wanted.size // 1000 + 1
    scale, zero = grid_of(grid)
    error = weight - (wanted - zero) * scale
    truth = np.einsum("ni,ij,nj->n", error, damped(h), error).sum()
    assert loss(weight, found, damped(h)).sum() <= 1.01 * truth + 1e-9
    if k > 1:
        assert loss(weight, found, damped(h)).sum() < 0.95 * loss(weight, grid, damped(h)).sum()


@pytest.mark.parametrize("k", [65, 90])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.label)
def test_scales_zero_points_and_padding_stay(form: BlockFormat, k: int) -> None:
    """Only codes are new; what pads the last block stands for zero, and is not taken for an input."""
    weight = weights(8, k)
    weight[:, 64:] += 3  # of a zero point of its own, where there is one
    grid = quantize(weight, form, name="w")
    found = gptq(weight, grid, hessian(k))
    assert (found.format, found.k) == (form, k)
    np.testing.assert_array_equal(found.scales, grid.scales)
    assert (found.zero_points is None) == (grid.zero_points is None)
    if found.zero_points is not None and grid.zero_points is not None:
        np.testing.assert_array_equal(found.zero_points, grid.zero_points)
    assert found.codes.dtype == np.uint8
    assert found.codes.shape == grid.codes.shape
    whole = QuantizedMatrix(form, grid.scales.shape[1] * form.block, found.codes, found.scales, found.zero_points)
    assert (dequantize(whole)[:, k:] == 0).all()


def test_inputs_of_equal_energy_keep_their_order() -> None:
    """A model whose activations are normed would else be rounded otherwise by another sort."""
    weight, h = weights(24, 100), hessian(100)
    energy = np.sqrt(np.diagonal(h.matrix))
    h.matrix[:] = h.matrix / energy / energy[:, None]
    np.fill_diagonal(h.matrix, 1)
    grid = quantize(weight, BlockFormat(4, 32), name="w")
    wanted = recursion(weight, grid, damped(h), np.arange(100))
    assert (codes_of(gptq(weight, grid, h)) != wanted).sum() <= 3


def test_the_arguments_are_left_as_they_were() -> None:
    weight, h = weights(5, 70), hessian(70)
    grid = quantize(weight, BlockFormat(4, 64, False), name="w")
    before = (weight.copy(), h.matrix.copy(), grid.codes.copy(), grid.scales.copy())
    gptq(weight, grid, h)
    for array, copy in zip((weight, h.matrix, grid.codes, grid.scales), before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.label)
def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest(form: BlockFormat) -> None:
    """A diagonal Hessian, in whatever order, and one that no rows were seen for."""
    weight = weights(16, 100)
    grid = quantize(weight, form, name="w")
    apart = Hessian(np.diag(np.random.default_rng(0).uniform(1, 9, 100)).astype(np.float32), 50)
    unseen = Hessian(hessian(100).matrix, 0)
    for h in (apart, unseen):
        np.testing.assert_array_equal(codes_of(gptq(weight, grid, h)), codes_of(grid))


def test_the_last_input_makes_the_best_of_the_others() -> None:
    """No other code of the input with the least energy loses less, given those of all others: a proven optimum."""
    weight, h = weights(12, 48), hessian(48)
    form = BlockFormat(4, 16)
    grid = quantize(weight, form, name="w")
    found = gptq(weight, grid, h)
    last = int(by_energy(h)[-1])
    scale, zero = grid_of(grid)
    codes = codes_of(found).astype(int)
    losses = []
    for code in range(16):
        codes[:, last] = code
        error = weight - (codes - zero) * scale
        losses.append(np.einsum("ni,ij,nj->n", error, damped(h), error))
    mine = np.take_along_axis(np.array(losses), codes_of(found)[None, :, last].astype(int), 0)[0]
    assert (mine <= np.min(losses, axis=0) * (1 + 1e-5)).all()


@pytest.mark.parametrize(("correlation", "share"), [(1.005, 0.01), (1.05, 0.1), (1.5, 1.0), (3.0, None)])
def test_a_hessian_that_cannot_be_inverted_is_damped_more(correlation: float, share: float | None) -> None:
    """Ten times, a hundred times; where that does not do either, rounding is plain."""
    weight = weights(200, 2)
    grid = quantize(weight, BlockFormat(2, 16, False), name="w")
    h = Hessian(np.array([[1, correlation], [correlation, 1.0]], np.float32), MANY)
    found = codes_of(gptq(weight, grid, h))
    if share is None:
        np.testing.assert_array_equal(found, codes_of(grid))
    else:
        np.testing.assert_array_equal(found, recursion(weight, grid, damped(h, share), np.arange(2)))
        assert (found != codes_of(grid)).any()


def test_inputs_that_were_always_zero_change_nothing_for_the_others() -> None:
    """They are rounded to nearest, and the others as if there were none; so are all where none was other than zero."""
    weight, h = weights(30, 60), hessian(60)
    dead = np.arange(60) % 4 == 1
    h.matrix[dead] = 0
    h.matrix[:, dead] = 0
    grid = quantize(weight, BlockFormat(4, 16), name="w")
    found = codes_of(gptq(weight, grid, h))
    np.testing.assert_array_equal(found[:, dead], codes_of(grid)[:, dead])
    wanted = recursion(weight, grid, damped(h), by_energy(h))
    assert (found != wanted).sum() <= 2
    silent = Hessian(np.zeros((60, 60), np.float32), 5)
    np.testing.assert_array_equal(codes_of(gptq(weight, grid, silent)), codes_of(grid))


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_only_ratios_in_a_hessian_matter(factor: float) -> None:
    """Inputs of another unit give the same codes: none is taken for dead because its numbers are small."""
    weight, h = weights(24, 65), hessian(65)
    grid = quantize(weight, BlockFormat(4, 32), name="w")
    scaled = Hessian(h.matrix * np.float32(factor), h.rows)
    np.testing.assert_array_equal(codes_of(gptq(weight, grid, scaled)), codes_of(gptq(weight, grid, h)))


def test_a_dead_block_stays_zeros() -> None:
    """A scale of zero is not divided by."""
    weight = weights(6, 64)
    weight[:, 16:32] = 0
    weight[2] = 0
    grid = quantize(weight, BlockFormat(4, 16, False), name="w")
    found = dequantize(gptq(weight, grid, hessian(64)))
    assert (found[:, 16:32] == 0).all()
    assert (found[2] == 0).all()
