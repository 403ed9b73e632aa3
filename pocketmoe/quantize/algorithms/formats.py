"""How matrices are stored: formats, and what comes of a matrix in one.

Integers have the layout of ONNX Runtime's `MatMulNBits` and, row for row, of its `GatherBlockQuantized`: a matrix
W [N, K] (N outputs, each a row of K inputs) is cut along K into blocks; each block has one float32 scale and, when
asymmetric, one zero point; codes are packed low bits first. W ~ (code - zero_point) * scale, where the zero point of
a symmetric block is 2 ** (bits - 1).

Four-bit floats have that of `MatMulBnb4`: one float32 scale a block, its largest magnitude; a code is the place of the
nearest of sixteen values, two to a byte, high bits first. Blocks do not straddle rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt

from pocketmoe.errors import UnsupportedModel

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BITS = (2, 4, 8)  # ONNX Runtime 1.32 takes no 3
BLOCKS = (16, 32, 64, 128)  # 2 bits in blocks of 256 are 150 times slower, 512 gave zeros (onnxruntime 28551)
FLOAT_BLOCKS = (32, 64, 128)  # bitsandbytes has no shorter ones for the CPU

_CHUNK = 1 << 16  # weights compared at a time


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is stored: bits per weight (2, 4 or 8), weights per block, and whether blocks have zero points."""

    bits: int
    block: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.block not in BLOCKS:
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
class FloatFormat:
    """Four-bit floats (Dettmers et al., arXiv 2305.14314): which sixteen values, and weights per block."""

    values: Literal["nf4", "fp4"]
    block: int

    bits = 4

    def __post_init__(self) -> None:
        if self.values not in ("nf4", "fp4") or self.block not in FLOAT_BLOCKS:
            raise ValueError(f"no format of {self.values} in blocks of {self.block}")

    @property
    def label(self) -> str:
        """The name that manifests carry, such as nf4-b64."""
        return f"{self.values}-b{self.block}"

    @property
    def quant_type(self) -> int:
        """MatMulBnb4's number for the values."""
        return {"fp4": 0, "nf4": 1}[self.values]

    def shapes(self, n: int, k: int) -> list[tuple[int, ...]]:
        """The shapes of a matrix [n, k]'s codes and scales, as the operator wants them."""
        return [(n * k // 2,), (n * k // self.block,)]

    def nbytes(self, n: int, k: int) -> int:
        """What a matrix [n, k] takes."""
        return n * k // 2 + 4 * n * k // self.block

    def fitted(self, k: int) -> FloatFormat:
        """This format with the largest block, not above its own, of which rows of `k` weights are made.

        Raises UnsupportedModel where there is none.
        """
        blocks = [block for block in FLOAT_BLOCKS if block <= self.block and k % block == 0]
        if not blocks:
            raise UnsupportedModel(f"rows of {k} weights are not made of blocks of {self.values}", "Choose int4.")
        return replace(self, block=max(blocks))


Format = BlockFormat | FloatFormat


def parse_format(label: str) -> Format:
    """The format of a label, such as int4-b32-asym or nf4-b64. Raises ValueError."""
    by_label = {form.label: form for form in all_formats()}
    if label not in by_label:
        raise ValueError(f"{label!r} is no format; write int4-b64, int4-b64-asym, int2-b32-asym, int8-b128, nf4-b64")
    return by_label[label]


def all_formats() -> list[Format]:
    """Every format there is."""
    integers = [BlockFormat(bits, block, symmetric) for bits in BITS for block in BLOCKS for symmetric in (True, False)]
    return [*integers, *(FloatFormat(values, block) for values in ("nf4", "fp4") for block in FLOAT_BLOCKS)]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix W [N, K] in `format`; K / block is rounded up.

    codes: uint8 [N, K / block, block * bits / 8]; scales: float32 [N, K / block];
    zero_points: uint8 [N, ceil(K / block * bits / 8)], None when symmetric.
    Of four-bit floats: codes uint8 [N, K / 2], scales float32 [N, K / block].
    """

    format: Format
    k: int
    codes: Bytes
    scales: Floats
    zero_points: Bytes | None = None

    @property
    def parts(self) -> tuple[npt.NDArray[np.generic], ...]:
        """Codes, scales and, where there are any, zero points: the order in which they are stored."""
        return (self.codes, self.scales) if self.zero_points is None else (self.codes, self.scales, self.zero_points)


def dequantize(matrix: QuantizedMatrix) -> Floats:
    """The float32 matrix [N, K] that the codes stand for, as the kernels compute it."""
    form, (n, n_blocks) = matrix.format, matrix.scales.shape
    if isinstance(form, FloatFormat):
        codes = np.stack([matrix.codes >> 4, matrix.codes & 15], axis=-1).reshape(n, n_blocks, form.block)
        return (float_values(form.values)[codes] * matrix.scales[:, :, None]).reshape(n, -1)
    values = unpack(matrix.codes.reshape(n, -1), form.bits).astype(np.float32).reshape(n, n_blocks, form.block)
    if matrix.zero_points is None:
        values -= 1 << (form.bits - 1)
    else:
        values -= unpack(matrix.zero_points, form.bits)[:, :n_blocks, None]
    values *= matrix.scales[:, :, None]
    return values.reshape(n, -1)[:, : matrix.k]


def relative_error(weight: Floats, matrix: QuantizedMatrix) -> float:
    """||W - dequantize(matrix)|| / ||W|| (Frobenius), W float32 [N, K]; 0 for zeros that come back as zeros."""
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


def float_values(name: str) -> Floats:
    """The values of NF4 or FP4 by code, float32 [16]."""
    from bitsandbytes.functional import get_4bit_type  # pyright: ignore[reportUnknownVariableType]

    return get_4bit_type(name, device="cpu").numpy()
