"""The plan of mixed precision, as quantization.json keeps it, and the budgets that a user may ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

import msgspec

from pocketmoe.bundle.reader import Bundle
from pocketmoe.sizes import parse_share, parse_size

PLAN = "quantization.json"

_BITS = re.compile(r"\s*(\d{1,2}(?:\.\d{1,9})?)\s*bits\s*", re.ASCII)


class PlannedExpert(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One expert: a format for each of its matrices, and what they are expected to add to the KL, in nats."""

    layer: int
    expert: int
    formats: tuple[str, ...]
    loss: float


class PlannedClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A class of dense tensors: its format, and the KL in nats that the model has with only this class quantized."""

    format: str
    nbytes: int
    loss: float


class QuantizationPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """quantization.json: how mixed precision was decided. Sizes in bytes, losses in nats."""

    size_budget_bytes: int | None
    fetch_budget_bytes: float | None
    expected_bytes: int  # of the whole bundle
    expected_fetched_bytes_per_token: float  # of experts, with nothing in memory, by the calibration's routing
    expected_kl: float
    mean_expert_bits: float  # scales and zero points included
    mean_bits: float  # of all quantized weights
    matrices: tuple[str, ...]
    dense: dict[str, PlannedClass]
    experts: tuple[PlannedExpert, ...]


@dataclass(frozen=True)
class SizeBudget:
    """What a user asked for: bytes, a share of the source's bytes, or mean bits a weight."""

    total_bytes: int | None = None
    share: float | None = None
    bits: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`9.5MB`, `4GiB`, `40%` of the source's bytes, or `3.5bits` a weight on average. Raises ValueError."""
        bits, share = _BITS.fullmatch(text), parse_share(text)
        if bits and float(bits[1]):
            return cls(bits=float(bits[1]))
        if share:
            return cls(share=share)
        if text.strip()[-1:].isdigit() or share == 0:  # a mere number might mean bits
            raise ValueError(f"{text[:64]!r} is no size; write 900MB, 1.5GiB, 40% or 3.5bits")
        return cls(total_bytes=parse_size(text))

    def resolve(self, bundle: Bundle, overhead_bytes: int, n_weights: int) -> int:
        """Bytes for the whole bundle. `overhead_bytes`: what is not quantized; `n_weights`: what is."""
        if self.bits is not None:
            return overhead_bytes + int(self.bits * n_weights / 8)
        if self.share is not None:
            return int(self.share * sum(entry.nbytes for entry in bundle.manifest.files.values()))
        assert self.total_bytes is not None
        return self.total_bytes
