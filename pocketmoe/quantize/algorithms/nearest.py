"""Block-wise integer quantization of weight matrices: arrays in, arrays out.

Rounding is to nearest, within a grid per block. `plain_grid` spans the block's extremes with all levels. `best_grid`
keeps, of a few step sizes (some of which clip the extremes), the one whose least-squares scale leaves the smallest
squared error: the search of llama.cpp's `make_qx_quants` (ggml-quants.c), with a grid that also clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np

from pocketmoe.errors import BadInput
from pocketmoe.quantize.algorithms.formats import BlockFormat, Bytes, Floats, QuantizedMatrix, pack

# Blocks [n, block] of finite weights, none above 1, to a zero point and a scale for each, both [n, 1].
Grid = Callable[[Floats, BlockFormat], tuple[Floats, Floats]]

_CHUNK = 1 << 16  # weights quantized at a time: what the search touches stays in a core's cache
_SMALLEST = 3e-36  # a block whose largest weight is below this is stored as zeros: its scale would be denormal

# Steps tried per block: into how many steps the block's largest magnitude (symmetric) or its range (asymmetric) is
# cut. Above half the levels (all of them) the extremes are clipped. Denser grids gain 1% at most (docs/LOG.md).
_SYMMETRIC_STEPS = {2: (1.5, 1.8, 2.0), 4: (7.3, 7.7, 8.0, 8.4, 9.0, 10.0, 11.0, 12.5), 8: (127.0,)}
_ASYMMETRIC_STEPS = {2: (2.6, 3.0, 3.5), 4: (14.0, 15.0, 16.0, 18.0), 8: (255.0,)}


def quantize(weight: Floats, form: BlockFormat, *, name: str, grid: Grid | None = None) -> QuantizedMatrix:
    """Quantize a matrix [N, K] by rounding to the best grid per block, or to that of `grid`.

    Every weight lies within half a step of its code's value, unless it is clipped to the outermost code, which
    happens where that lowers its block's squared error.
    Raises BadInput, with `name`, for a matrix that is not float32 [N, K] or that holds NaN or infinity.
    """
    if weight.ndim != 2 or weight.dtype != np.float32:
        raise BadInput(f"{name}: expected a float32 matrix, found {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    n_blocks = form.n_blocks(k)
    codes = np.empty((n, n_blocks, form.block * form.bits // 8), np.uint8)
    scales = np.empty((n, n_blocks), np.float32)
    zeros = np.empty((n, n_blocks), np.uint8)
    rows = max(1, _CHUNK // (n_blocks * form.block))
    for start in range(0, n, rows):
        part = weight[start : start + rows]
        if not np.isfinite(part).all():
            raise BadInput(f"{name} holds NaN or infinity", "The checkpoint is damaged: get it again.")
        blocks = np.zeros((len(part), n_blocks * form.block), np.float32)
        blocks[:, :k] = part
        found, scale, zero = _quantize_blocks(blocks.reshape(-1, form.block), form, grid or best_grid)
        codes[start : start + rows] = pack(found, form.bits).reshape(len(part), n_blocks, -1)
        scales[start : start + rows] = scale.reshape(len(part), n_blocks)
        zeros[start : start + rows] = zero.reshape(len(part), n_blocks)
    return QuantizedMatrix(form, k, codes, scales, None if form.symmetric else pack(zeros, form.bits))


def _quantize_blocks(blocks: Floats, form: BlockFormat, grid: Grid) -> tuple[Bytes, Floats, Bytes]:
    """Codes [n, block], scales [n] and zero points [n] of finite blocks [n, block], which are overwritten."""
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    dead = largest < _SMALLEST
    blocks /= np.where(dead, np.float32(1), largest)  # squares of what is left neither overflow nor vanish
    blocks[dead[:, 0]] = 0
    levels = 1 << form.bits
    zero, scale = grid(blocks, form)
    # Rounding again with the scale that was found cannot raise the error, and puts each weight within half a step.
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.rint(blocks * inverse)
    codes += zero
    np.clip(codes, 0, levels - 1, out=codes)
    return codes.astype(np.uint8), (scale * largest)[:, 0], zero.astype(np.uint8)[:, 0]


def plain_grid(blocks: Floats, form: BlockFormat) -> tuple[Floats, Floats]:
    """The zero point and scale, each [n, 1], with which all levels span a block and zero: round-to-nearest proper."""
    levels = 1 << form.bits
    lowest, highest = np.minimum(blocks.min(axis=1, keepdims=True), 0), np.maximum(blocks.max(axis=1, keepdims=True), 0)
    if form.symmetric:
        # The side that has one level more goes to the larger extreme.
        largest = cast("Floats", np.where(highest > -lowest, highest, lowest))
        return np.full_like(largest, levels // 2), largest / -np.float32(levels // 2)
    scale = (highest - lowest) / np.float32(levels - 1)
    zero = np.rint(np.divide(-lowest, scale, out=np.zeros_like(lowest), where=scale != 0))
    return np.clip(zero, 0, levels - 1), scale


def best_grid(blocks: Floats, form: BlockFormat) -> tuple[Floats, Floats]:
    """Per block, the zero point and scale, each [n, 1], that leave the least squared error.

    Given steps d (codes minus zero point), the best scale is sum(w d) / sum(d d), and what it leaves of sum(w w) is
    less the larger its gain sum(w d) ** 2 / sum(d d): so only gains are compared.
    """
    levels = 1 << form.bits
    shape = (len(blocks), 1)
    best_gain, best_scale = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    best_zero = np.full(shape, levels // 2, np.float32)
    steps = np.empty_like(blocks)
    for inverse, zero in _grids(blocks, form):
        np.multiply(blocks, inverse, out=steps)
        np.rint(steps, out=steps)
        np.maximum(steps, -zero, out=steps)
        np.minimum(steps, levels - 1 - zero, out=steps)
        dot = np.einsum("ij,ij->i", blocks, steps)[:, None]
        scale = dot / np.maximum(np.einsum("ij,ij->i", steps, steps)[:, None], np.float32(1))
        gain = dot * scale
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_zero, zero, where=better)
    return best_zero, best_scale


def _grids(blocks: Floats, form: BlockFormat) -> Iterator[tuple[Floats, Floats]]:
    """The inverse steps and zero points, each [n, 1], that are tried."""
    levels = 1 << form.bits
    lowest, highest = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    if form.symmetric:
        # The side that has one level more goes to the larger extreme.
        sign = np.where(highest > -lowest, np.float32(-1), np.float32(1))
        for n_steps in _SYMMETRIC_STEPS[form.bits]:
            yield sign * np.float32(n_steps), np.full_like(sign, levels // 2)
        return
    np.minimum(lowest, 0, out=lowest)
    np.maximum(highest, 0, out=highest)
    span = highest - lowest
    np.copyto(span, np.float32(1), where=span == 0)
    for n_steps in _ASYMMETRIC_STEPS[form.bits]:
        inverse = np.float32(n_steps) / span
        zero = np.clip((levels - 1) / 2 - (highest + lowest) / 2 * inverse, 0, levels - 1).astype(np.float32)
        yield inverse, np.floor(zero)
        yield inverse, np.ceil(zero)
