"""GPTQ: rounds a matrix input by input, and lets the inputs to come make up for what each rounding lost.

Frantar et al., arXiv 2210.17323, with the inputs in the order of their energy and the grid of each block fixed
beforehand ("static groups" of the AutoGPTQ family), so that codes stay where their blocks are.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.linalg

from pocketmoe.calibration import Hessian
from pocketmoe.quantize.algorithms.formats import Floats, QuantizedMatrix, pack, unpack

_DAMPING = 0.01  # of the mean of the Hessian's diagonal; more where that is not enough to invert it
_TOGETHER = 64  # inputs whose corrections of later ones are applied at once


def gptq(weight: Floats, grid: QuantizedMatrix, hessian: Hessian) -> QuantizedMatrix:
    """New codes for W, float32 [N, K], on the grid of a quantized matrix, of less output error over the Hessian's rows.

    `grid`: W in a format of integers; `hessian`: [K, K].
    """
    form, k = grid.format, grid.k
    levels = (1 << form.bits) - 1
    scales = np.repeat(grid.scales, form.block, axis=1)[:, :k]
    if grid.zero_points is None:
        zeros = np.full((len(weight), k), 1 << (form.bits - 1), np.float32)
    else:
        by_block = unpack(grid.zero_points, form.bits)[:, : grid.scales.shape[1]].astype(np.float32)
        zeros = np.repeat(by_block, form.block, axis=1)[:, :k]
    order = np.argsort(-np.diagonal(hessian.matrix), kind="stable")
    factor = _inverse_factor(_shrunk(hessian)[np.ix_(order, order)])
    left = np.ascontiguousarray(weight[:, order].T)  # [K, N]: one input is one row
    scales, zeros = np.ascontiguousarray(scales[:, order].T), np.ascontiguousarray(zeros[:, order].T)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.empty(left.shape, np.uint8)
    lost = np.empty((_TOGETHER, len(weight)), np.float32)
    correction = np.empty_like(left)  # one for all: new pages for each would cost a tenth of the time
    for start in range(0, k, _TOGETHER):
        stop = min(start + _TOGETHER, k)
        for i in range(start, stop):
            code = np.rint(left[i] * inverse[i])
            code += zeros[i]
            np.clip(code, 0, levels, out=code)
            codes[i] = code
            code -= zeros[i]
            code *= scales[i]
            np.subtract(left[i], code, out=lost[i - start])
            lost[i - start] /= factor[i, i]
            if i + 1 < stop:
                left[i + 1 : stop] -= factor[i, i + 1 : stop, None] * lost[i - start]
        np.matmul(factor[start:stop, stop:].T, lost[: stop - start], out=correction[stop:])
        left[stop:] -= correction[stop:]
    placed = np.zeros((len(weight), grid.scales.shape[1] * form.block), np.uint8)
    placed[:, order] = codes.T
    if grid.zero_points is None:
        placed[:, k:] = 1 << (form.bits - 1)
    elif k < placed.shape[1]:
        placed[:, k:] = zeros[np.argmax(order == k - 1)][:, None]
    packed = pack(placed, form.bits).reshape(grid.codes.shape)
    return replace(grid, codes=packed)


def _shrunk(hessian: Hessian) -> Floats:
    """The Hessian, its off-diagonal entries smaller the fewer rows they are sums over (Ledoit and Wolf 2004): [K, K].

    Without that, few rows do harm: on the reference model's `down` a row per input left 1.4 times the error of plain
    rounding on new text, and now less than it (docs/LOG.md). With no rows at all it would be plain rounding.
    """
    k = len(hessian.matrix)
    matrix = hessian.matrix * np.float32(hessian.rows / (hessian.rows + k))
    np.einsum("ii->i", matrix)[:] = np.diagonal(hessian.matrix)
    return matrix


def _inverse_factor(hessian: Floats) -> Floats:
    """U, upper triangular, float32 [K, K], with U^T U the inverse of the damped Hessian; inputs that were always zero
    have no part in it."""
    matrix = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", matrix)
    dead = diagonal <= 0
    diagonal[dead] = 1
    mean = float(diagonal[~dead].mean()) if (~dead).any() else 1.0
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        damped = matrix.copy()
        np.einsum("ii->i", damped)[:] += damping * mean
        try:
            flipped = scipy.linalg.cholesky(damped[::-1, ::-1], lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            continue
        triangle = np.ascontiguousarray(flipped[::-1, ::-1])
        return scipy.linalg.solve_triangular(triangle, np.eye(len(triangle)), check_finite=False).astype(np.float32)
    return np.eye(len(matrix), dtype=np.float32)  # no correlation can be trusted: plain rounding
