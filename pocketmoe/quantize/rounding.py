"""How weights are rounded: each rounder takes a matrix and a format, and yields the quantized matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pocketmoe.errors import BadInput
from pocketmoe.quantize.schemes import BlockFormat, Floats, QuantizedMatrix, quantize


@dataclass(frozen=True)
class Hessian:
    """Of a matrix's squared output error: X^T X, float32 [K, K], and how many rows X has."""

    matrix: Floats
    rows: int


class Rounder(Protocol):
    def __call__(
        self, weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None
    ) -> QuantizedMatrix:
        """Quantize W [N, K]. Raises BadInput, with `name`, as `schemes.quantize`."""
        ...


def search(weight: Floats, form: BlockFormat, *, name: str, hessian: Hessian | None = None) -> QuantizedMatrix:  # noqa: ARG001
    """To the grid, of a few per block, that leaves the least squared error."""
    return quantize(weight, form, name=name)


_ROUNDERS: dict[str, Rounder] = {"search": search}


def find_rounder(name: str) -> Rounder:
    """The rounder of that name. Raises BadInput."""
    if name not in _ROUNDERS:
        raise BadInput(f"rounding {name!r} is not implemented", f"Choose one of: {', '.join(_ROUNDERS)}.")
    return _ROUNDERS[name]
