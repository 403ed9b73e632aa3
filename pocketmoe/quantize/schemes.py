"""Block-wise integer quantization of weight matrices: arrays in, arrays out.

The layout is that of ONNX Runtime's `MatMulNBits` and, row for row, of its `GatherBlockQuantized`: a matrix
W [N, K] (N outputs, each a row of K inputs) is cut along K into blocks; each block has one float32 scale and, when
asymmetric, one zero point; codes are packed low bits first. W ~ (code - zero_point) * scale, where the zero point of
a symmetric block is 2 ** (bits - 1).

Rounding is to nearest, within a grid chosen per block: of a few step sizes (some of which clip the block's extremes)
the one is kept whose least-squares scale leaves the smallest squared error. That is the search of llama.cpp's
`make_qx_quants` (ggml-quants.c), with a grid that also clips; it costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from pocketmoe.errors import BadInput

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCKS = (16, 32, 64, 128)

_CHUNK = 1 << 16  # weights quantized at a time: what the search touches stays in a core's cache
_SMALLEST = 3e-36  # a block whose largest weight is below this is stored as zeros: its scale would be denormal

# Steps tried per block: into how many steps the block's largest magnitude (symmetric) or its range (asymmetric) is
# cut. Above half the levels (all of them) the extremes are clipped. Denser grids gain 1% at most (docs/LOG.md).
_SYMMETRIC_STEPS = {2: (2.0,), 4: (7.3, 7.7, 8.0, 8.4, 9.0, 10.0, 11.0, 12.5), 8: (127.0,)}
_ASYMMETRIC_STEPS = {2: (3.0,), 4: (14.0, 15.0, 16.0, 18.0), 8: (255.0,)}


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is stored: bits per weight (4 or 8), weights per block, and whether blocks have zero points."""

    bits: int
    block: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in _SYMMETRIC_STEPS or self.block not in BLOCKS:
            raise ValueError(f"no format of {self.bits} bits in blocks of {self.block}")

    @property
    def label(self) -> str:
        """The name that manifests carry, such as int4-b32 or int4-b32-asym."""
        return f"int{self.bits}-b{self.block}" + ("" if self.symmetric else "-asym")

    def n_blocks(self, k: int) -> int:
        return -(-k // self.block)

    def shapes(self, n: int, k: int) -> list[tuple[int, ...]]:
        """The shapes of a matrix [n, k]'s codes (the last block padded), scales and, when asymmetric, zero points."""
        n_blocks = self.n_blocks(k)
        shapes = [(n, n_blocks, self.block * self.bits // 8), (n, n_blocks)]
        return shapes if self.symmetric else [*shapes, (n, -(-n_blocks * self.bits // 8))]

    def nbytes(self, n: int, k: int) -> int:
        """What a matrix [n, k] takes: codes and zero points are bytes, scales four of them."""
        codes, scales, *zeros = map(prod, self.shapes(n, k))
        return codes + 4 * scales + sum(zeros)

    def fitted(self, k: int) -> BlockFormat:
        """This format with the block, not above its own, that stores a row of `k` weights in the fewest bytes."""
        blocks = [block for block in BLOCKS if block <= self.block]
        return min((replace(self, block=block) for block in reversed(blocks)), key=lambda f: f.nbytes(1, k))


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix W [N, K] in `format`.

    codes: uint8 [N, K / block, block * bits / 8]; scales: float32 [N, K / block];
    zero_points: uint8 [N, ceil(K / block * bits / 8)], None when symmetric. K / block is rounded up.
    """

    format: BlockFormat
    k: int
    codes: Bytes
    scales: Floats
    zero_points: Bytes | None = None

    @property
    def parts(self) -> tuple[npt.NDArray[np.generic], ...]:
        """Codes, scales and, where there are any, zero points: the order in which they are stored."""
        return (self.codes, self.scales) if self.zero_points is None else (self.codes, self.scales, self.zero_points)


def quantize(weight: Floats, form: BlockFormat, *, name: str) -> QuantizedMatrix:
    """Quantize a matrix [N, K] by rounding to the best grid per block.

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
        found, scale, zero = _quantize_blocks(blocks.reshape(-1, form.block), form)
        codes[start : start + rows] = pack(found, form.bits).reshape(len(part), n_blocks, -1)
        scales[start : start + rows] = scale.reshape(len(part), n_blocks)
        zeros[start : start + rows] = zero.reshape(len(part), n_blocks)
    return QuantizedMatrix(form, k, codes, scales, None if form.symmetric else pack(zeros, form.bits))


def dequantize(matrix: QuantizedMatrix) -> Floats:
    """The float32 matrix [N, K] that the codes stand for, as the kernels compute it."""
    form, (n, n_blocks) = matrix.format, matrix.scales.shape
    values = unpack(matrix.codes.reshape(n, -1), form.bits).astype(np.float32).reshape(n, n_blocks, form.block)
    if matrix.zero_points is None:
        values -= 1 << (form.bits - 1)
    else:
        values -= unpack(matrix.zero_points, form.bits)[:, :n_blocks, None]
    values *= matrix.scales[:, :, None]
    return values.reshape(n, -1)[:, : matrix.k]


def relative_error(weight: Floats, matrix: QuantizedMatrix) -> float:
    """||W - dequantize(matrix)|| / ||W|| (Frobenius); 0 for a zero matrix that comes back as zeros."""
    rows = max(1, _CHUNK // max(1, matrix.k))
    error = norm = 0.0
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].astype(np.float64)
        error += float(np.square(part - dequantize(_rows(matrix, start, start + rows))).sum())
        norm += float(np.square(part).sum())
    return float(np.sqrt(error / norm)) if norm else float(error > 0)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Codes uint8 [..., n] to uint8 [..., ceil(n * bits / 8)], low bits first."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        padding = per_byte - codes.shape[-1] % per_byte
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], padding), np.uint8)], axis=-1)
    packed = codes[..., 0::per_byte].copy()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << (place * bits)
    return packed


def unpack(packed: Bytes, bits: int) -> Bytes:
    """The inverse of `pack`: uint8 [..., n] to uint8 [..., n * 8 / bits]."""
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)


def _rows(matrix: QuantizedMatrix, start: int, stop: int) -> QuantizedMatrix:
    zeros = None if matrix.zero_points is None else matrix.zero_points[start:stop]
    return replace(matrix, codes=matrix.codes[start:stop], scales=matrix.scales[start:stop], zero_points=zeros)


def _quantize_blocks(blocks: Floats, form: BlockFormat) -> tuple[Bytes, Floats, Bytes]:
    """Codes [n, block], scales [n] and zero points [n] of finite blocks [n, block], which are overwritten."""
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    dead = largest < _SMALLEST
    blocks /= np.where(dead, np.float32(1), largest)  # squares of what is left neither overflow nor vanish
    blocks[dead[:, 0]] = 0
    levels = 1 << form.bits
    zero, scale = _best_grid(blocks, form)
    # Rounding again with the scale that was found cannot raise the error, and puts each weight within half a step.
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.rint(blocks * inverse)
    codes += zero
    np.clip(codes, 0, levels - 1, out=codes)
    return codes.astype(np.uint8), (scale * largest)[:, 0], zero.astype(np.uint8)[:, 0]


def _best_grid(blocks: Floats, form: BlockFormat) -> tuple[Floats, Floats]:
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
