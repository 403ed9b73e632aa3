"""The quantization algorithms by name: each takes W, float32 [N, K], and a format, and yields the quantized matrix.

    nearest   all levels span a block's extremes: what is called round-to-nearest elsewhere
    search    the grid, of a few per block, that leaves the least squared error (`nearest.best_grid`); `nearest` at two
              bits, where the grid of least error shrinks the outputs, which costs more KL
    k-quant   llama.cpp's search of scale and minimum, with large weights counting more (ONNX Runtime's code)
    hqq       the zero point that a sparse error prefers (Badri and Shaji 2023; ONNX Runtime's code)
    gptq      by what a calibration text brings to the matrix (`gptq`); `nearest` where it brought too little

Four-bit floats know one algorithm only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pocketmoe.calibration import Hessian
from pocketmoe.errors import BadInput, UnknownName
from pocketmoe.quantize.algorithms.float4 import quantize_float4
from pocketmoe.quantize.algorithms.formats import BlockFormat, FloatFormat, Floats, Format, QuantizedMatrix
from pocketmoe.quantize.algorithms.gptq import gptq
from pocketmoe.quantize.algorithms.nearest import plain_grid, quantize

LEAST_ROWS = 16  # with fewer, gptq would fit noise


class Algorithm(Protocol):
    @property
    def goes_by_inputs(self) -> bool:
        """Whether a Hessian changes anything."""
        ...

    def __call__(self, weight: Floats, form: Format, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:
        """Quantize W [N, K]. Raises BadInput, with `name`, for what is no finite float32 matrix."""
        ...


def nearest(weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:  # noqa: ARG001
    """Round W, float32 [N, K], to the grid that spans each block's extremes."""
    return quantize(weight, form, name=name, grid=plain_grid)


def search(weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:  # noqa: ARG001
    """Round W, float32 [N, K], to the searched grid of least squared error; at two bits to the plain one."""
    return quantize(weight, form, name=name, grid=plain_grid if form.bits == 2 else None)


def k_quant(weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:  # noqa: ARG001
    """Round W, float32 [N, K], to the grid of llama.cpp's search; a symmetric block has no minimum to search for."""
    if form.symmetric:
        return search(weight, form, name=name)
    return quantize(weight, form, name=name, grid=_k_quant_grid)


def hqq(weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:  # noqa: ARG001
    """Round W, float32 [N, K], to the zero points of HQQ; a symmetric block has none to search for."""
    if form.symmetric:
        return search(weight, form, name=name)
    return quantize(weight, form, name=name, grid=_hqq_grid)


def by_gptq(weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:
    """Round W, float32 [N, K], by GPTQ with the Hessian of its inputs, [K, K]; with too few rows of them to nearest."""
    grid = nearest(weight, form, name=name)
    if hessian is None or hessian.rows < LEAST_ROWS:
        return grid
    if not np.isfinite(hessian.matrix).all():
        raise BadInput(f"{name}: calibration brought it numbers that are not finite", "Export the model again.")
    return gptq(weight, grid, hessian)


@dataclass(frozen=True)
class _Algorithm:
    """For all formats what `blocks` is for blocks; no function in a function, so that it can be sent to processes."""

    blocks: Callable[..., QuantizedMatrix]
    goes_by_inputs: bool = False

    def __call__(self, weight: Floats, form: Format, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:
        if isinstance(form, FloatFormat):
            return quantize_float4(weight, form, name=name)
        return self.blocks(weight, form, name=name, hessian=hessian)


_ALGORITHMS: dict[str, Algorithm] = {
    "nearest": _Algorithm(nearest),
    "search": _Algorithm(search),
    "k-quant": _Algorithm(k_quant),
    "hqq": _Algorithm(hqq),
    "gptq": _Algorithm(by_gptq, goes_by_inputs=True),
}
ALGORITHMS = tuple(_ALGORITHMS)


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name. Raises UnknownName."""
    if name not in _ALGORITHMS:
        raise UnknownName("rounding", name, _ALGORITHMS)
    return _ALGORITHMS[name]


def _k_quant_grid(blocks: Floats, form: BlockFormat) -> tuple[Floats, Floats]:
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    with np.errstate(divide="ignore", invalid="ignore"):
        _, scale, zero = quant_tensor_k_quant_cpu(blocks, form.bits, form.block)
    return _sound(blocks, form, zero.astype(np.float32), scale.astype(np.float32))


def _hqq_grid(blocks: Floats, form: BlockFormat) -> tuple[Floats, Floats]:
    import torch
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantizer

    levels = (1 << form.bits) - 1
    zero, scale = plain_grid(blocks, form)
    scale[scale == 0] = 1
    inverse = torch.from_numpy(1 / scale)
    _, found = HQQWeightOnlyQuantizer.optimize_weights(
        torch.from_numpy(blocks), inverse, torch.from_numpy(zero), [0, levels], axis=1
    )
    return _sound(blocks, form, np.rint(found.numpy()), scale)  # MatMulNBits' zero points are whole numbers


def _sound(blocks: Floats, form: BlockFormat, zero: Floats, scale: Floats) -> tuple[Floats, Floats]:
    """A grid as it was found; the plain one where that cannot be used: blocks of one value divide by zero there."""
    plain_zero, plain_scale = plain_grid(blocks, form)
    levels = (1 << form.bits) - 1
    usable = np.isfinite(scale) & (scale != 0) & (zero >= 0) & (zero <= levels)
    return np.where(usable, zero, plain_zero), np.where(usable, scale, plain_scale)
