"""What a text showed of a model's experts: measured by `profiles`, used by `quantize`, in short kept in the bundle.

In memory it holds what the experts were given, token by token, which reveals the text. What a bundle keeps are sums
over tokens: how many each expert saw, and the mean squares of the channels that went into its matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from pocketmoe.store import ExpertId

SUMMARY = "calibration.json"
CHANNELS = "calibration.safetensors"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExpertSample:
    """The tokens that were routed to one expert: x, float32 [tokens, width], and their router weights [tokens]."""

    x: Floats
    weights: Floats


@dataclass(frozen=True)
class LayerSample:
    """What the experts of one layer were given; arrays may be mapped files.

    x: float32 [tokens, width]; expert_ids: int64 [tokens, top_k]; expert_weights: float32 [tokens, top_k].
    factor: what a squared error of one in a token's output of this layer adds to the KL divergence of the next token,
    in nats.
    """

    x: Floats
    expert_ids: npt.NDArray[np.int64]
    expert_weights: Floats
    factor: float

    def of(self, expert: int) -> ExpertSample:
        """The rows that chose an expert."""
        tokens, places = np.nonzero(self.expert_ids == expert)
        return ExpertSample(np.ascontiguousarray(self.x[tokens]), self.expert_weights[tokens, places])

    def spread(self, count: int) -> ExpertSample:
        """At most `count` rows, taken evenly from all, with the mean router weight: for experts that no token chose."""
        tokens = np.linspace(0, len(self.x) - 1, min(count, len(self.x))).astype(np.int64)
        weights = np.full(len(tokens), self.expert_weights.mean(), np.float32)
        return ExpertSample(np.ascontiguousarray(self.x[tokens]), weights)


@dataclass(frozen=True)
class Hessian:
    """Of a matrix's squared output error, but for a factor: X^T X, float32 [K, K], of its inputs, `rows` in number."""

    matrix: Floats
    rows: int


@dataclass(frozen=True)
class Calibration:
    """What a text of `tokens` tokens showed, by MoE layer and by dense tensor; `slices` are the names of its files."""

    layers: tuple[LayerSample, ...]
    dense: Mapping[str, Hessian]
    tokens: int
    slices: tuple[str, ...]
    text_sha256: str

    @property
    def source(self) -> str:
        """One line: 4096 tokens of text 1a2b3c4d5e6f."""
        return f"{self.tokens} tokens of text {self.text_sha256[:12]}"

    def of(self, expert: ExpertId) -> ExpertSample:
        return self.layers[expert.layer].of(expert.expert)

    def summarize(self, n_experts: Sequence[int]) -> CalibrationSummary:
        """What a bundle keeps of it. `n_experts`: of each layer."""
        layers = []
        for sample, count in zip(self.layers, n_experts, strict=True):
            ids = sample.expert_ids.ravel()
            tokens = np.bincount(ids, minlength=count)
            weight = np.bincount(ids, sample.expert_weights.ravel(), count)
            layers.append(LayerSummary(tokens=tokens.tolist(), weight=weight.tolist(), factor=sample.factor))
        return CalibrationSummary(
            tokens=self.tokens, slices=self.slices, text_sha256=self.text_sha256, layers=tuple(layers)
        )


class LayerSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By expert: tokens that chose it, and the sum of their router weights. `factor` as in `LayerSample`."""

    tokens: list[int]
    weight: list[float]
    factor: float


class CalibrationSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """calibration.json."""

    tokens: int
    slices: tuple[str, ...]
    text_sha256: str
    layers: tuple[LayerSummary, ...]

    def unreached(self, least: int = 1) -> list[ExpertId]:
        """The experts that saw fewer than `least` tokens."""
        return [
            ExpertId(index, expert)
            for index, layer in enumerate(self.layers)
            for expert, count in enumerate(layer.tokens)
            if count < least
        ]
