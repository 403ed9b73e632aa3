"""Codes on a grid: what all formats come down to, and the arithmetic of their own libraries.

A weight W [N, K] (N outputs, each a row of K inputs) is cut along K into groups, each with one scale and, of integers,
one zero point: W = (code - zero) * scale, or W = level[code] * scale of four-bit floats. A library computes that in the
type of its scales, or in one that it has noted down: the products are rounded to it, here as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pocketmoe.errors import BadInput

if TYPE_CHECKING:
    import torch

Read = Callable[[str], "torch.Tensor"]  # a tensor of the checkpoint by its name, as it is stored
Kind = Literal["int", "nf4", "fp4", "e2m1"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of NVFP4 and MXFP4; the code's high bit is the sign
_AT_ONCE = 1 << 24  # weights
_REMEDY = "Use the settings that belong to these weights, or download the checkpoint again."


@dataclass(frozen=True)
class Form:
    """What a weight's codes are. `group`: inputs in a row that share a scale; `zeros`: it has zero points."""

    kind: Kind
    bits: int
    group: int
    zeros: bool = False


@dataclass(frozen=True)
class Grid:
    """codes: uint8 [N, K]; scales: floats [N, groups]; zeros: int16 [N, groups], None: the middle of the codes.

    group_of: int64 [K], the group of each input, None: in a row. levels: float32 [16], of four-bit floats. What comes
    of them is multiplied by `factor`, a step of its own, and rounded to `dtype` (torch's name).
    """

    form: Form
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    group_of: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    factor: float = 1.0
    dtype: str = "float32"

    def dequantize(self) -> torch.Tensor:
        """W, float32 [N, K], some rows at a time."""
        import torch

        n, k = self.codes.shape
        result = torch.empty(n, k)
        rows = max(1, _AT_ONCE // max(1, k))
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            values = self.numbers(part) * self.spread(self.scales[part].float())
            if self.factor != 1:
                values *= self.factor
            result[part] = values.to(getattr(torch, self.dtype))
        return result

    def planes(self) -> dict[str, torch.Tensor]:
        """Codes, scales and zero points of each weight, float32 [N, K]; E2M1 as integers of eight bits, doubled."""
        scales = self.spread(self.scales.float() * self.factor)
        if self.form.kind == "e2m1":
            return {"codes": self.numbers(slice(None)) * 2 + 128, "scales": scales / 2}
        planes = {"codes": self.codes.float(), "scales": scales}
        if self.form.kind == "int":
            middle = float(1 << (self.form.bits - 1))
            planes["zeros"] = (
                scales.new_full(scales.shape, middle) if self.zeros is None else self.spread(self.zeros).float()
            )
        return planes

    def numbers(self, rows: slice) -> torch.Tensor:
        """What the codes of some rows stand for before they are scaled, float32 [rows, K]."""
        if self.levels is not None:
            return self.levels[self.codes[rows].long()]
        zeros = 1 << (self.form.bits - 1) if self.zeros is None else self.spread(self.zeros[rows])
        return (self.codes[rows].short() - zeros).float()

    def spread(self, of_groups: torch.Tensor) -> torch.Tensor:
        """[N, groups] as [N, K]: each input has that of its group."""
        k = self.codes.shape[1]
        if self.group_of is not None:
            return of_groups[:, self.group_of]
        if of_groups.shape[1] == 1:
            return of_groups.expand(-1, k)
        return of_groups.repeat_interleave(self.form.group, 1)[:, :k]


@dataclass(frozen=True)
class Packed:
    """A weight that several tensors of a checkpoint stand for.

    `name`: what it is called; `shape`: [N, K]; `parts`: the tensors that make it up; `format`: for the reader: GPTQ 4
    bits, group 128. `make` reads the parts; `keepable` what it takes to say whether its codes lie as bundles have them:
    a group's inputs in a row, values that the operators know.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    format: str
    form: Form
    make: Callable[[Read], Grid]
    keepable: Callable[[Read], bool] = lambda _: True


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [rows, count] from int32 [rows, words]: codes of 2 to 8 bits in a row, low bits first, across words."""
    import torch

    rows = words.shape[0]
    if 32 % bits == 0 and bits != 8:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        octets = words.contiguous().view(torch.uint8).reshape(rows, -1, 1)
        return ((octets >> shifts) & ((1 << bits) - 1)).reshape(rows, -1)[:, :count]
    octets = words.contiguous().view(torch.uint8).reshape(rows, -1)
    if bits == 8:
        return octets[:, :count]
    starts = torch.arange(count) * bits
    first, shift = starts // 8, (starts % 8).int()
    octets = torch.nn.functional.pad(octets, (0, 1)).int()
    both = octets[:, first] | (octets[:, first + 1] << 8)
    return ((both >> shift) & ((1 << bits) - 1)).byte()


def e2m1_levels() -> torch.Tensor:
    """float32 [16]: the values of the four-bit floats of NVFP4 and MXFP4 by code."""
    import torch

    return torch.tensor([*E2M1, *(-level for level in E2M1)])


def nibbles(octets: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] from uint8 [N, K / 2], low half first."""
    import torch

    return torch.stack([octets & 15, octets >> 4], -1).reshape(octets.shape[0], -1)


def misfit(where: str, why: str) -> BadInput:
    """The error for tensors that do not make up a weight. `where`: file and name of one of them."""
    return BadInput(f"{where} {why}", _REMEDY)
