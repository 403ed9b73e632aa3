"""How weights are rounded: each rounder takes a matrix and a format, and yields the quantized matrix."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pocketmoe.calibration import Hessian
from pocketmoe.errors import BadInput
from pocketmoe.quantize.gptq import gptq
from pocketmoe.quantize.schemes import BlockFormat, Floats, QuantizedMatrix, quantize

LEAST_ROWS = 16


class Rounder(Protocol):
    def __call__(
        self, weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None
    ) -> QuantizedMatrix:
        """Quantize W [N, K]. Raises BadInput, with `name`, as `schemes.quantize`."""
        ...


def search(weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:  # noqa: ARG001
    """To the grid, of a few per block, that leaves the least squared error."""
    return quantize(weight, form, name=name)


def by_gptq(weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:
    """By what the calibration's inputs make of it; by `search` where there are too few of them."""
    grid = quantize(weight, form, name=name)
    if hessian is None or hessian.rows < LEAST_ROWS or not np.isfinite(hessian.matrix).all():
        return grid
    return gptq(weight, grid, hessian)


_ROUNDERS: dict[str, Rounder] = {"search": search, "gptq": by_gptq}


def find_rounder(name: str) -> Rounder:
    """The rounder of that name. Raises BadInput."""
    if name not in _ROUNDERS:
        raise BadInput(f"rounding {name!r} is not implemented", f"Choose one of: {', '.join(_ROUNDERS)}.")
    return _ROUNDERS[name]
