"""Weights that were quantized before they came here: their codes, which an export hands to a quantizer to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from pocketmoe.bundle.store import ExpertId


@dataclass(frozen=True)
class CodeForm:
    """What the codes of a matrix are: integers of 2, 4 or 8 bits, or places among the sixteen values of NF4 or FP4.

    `group`: inputs in a row that share a scale and, where there are `zeros`, a zero point.
    """

    kind: Literal["int", "nf4", "fp4"]
    bits: int
    group: int
    zeros: bool


@dataclass(frozen=True)
class Codes:
    """A matrix in the shape in which a bundle stores it: codes, and of each weight its scale and zero point.

    codes, zeros: uint8, zeros None where there are none; scales: float32. W = (codes - zeros) * scales, or the value of
    each code times its scale.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None


class CodedSource(Protocol):
    """The same weights as an `ExpertSource` and a draft's dense.bin, as the codes that their checkpoint has of them."""

    @property
    def dense(self) -> Mapping[str, CodeForm]:
        """The dense tensors that codes can stand for, by name."""
        ...

    def read_dense(self, name: str) -> Codes: ...

    def expert(self, expert: ExpertId, tensor: str) -> CodeForm | None:
        """What stands for a tensor of an expert's record; None where it has no codes, or none of one form."""
        ...

    def read_expert(self, expert: ExpertId, tensor: str) -> Codes:
        """Called from several threads."""
        ...

    @property
    def left(self) -> tuple[str, ...]:
        """For the reader: which packed weights have codes that cannot be kept, and why."""
        ...
