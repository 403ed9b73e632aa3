"""What a text showed of a model's experts: measured by `profiles`, used by `quantize`, in short kept in the bundle.

In memory it holds what the experts were given, token by token, which reveals the text. What a bundle keeps are sums
over tokens: how many each expert saw, and the mean squares of the channels that went into its matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from pocketmoe.bundle.resume import Work
from pocketmoe.bundle.store import ExpertId, translate_write_errors
from pocketmoe.system.files import sync

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
    """Half the Hessian of a matrix's squared output error: X^T X, float32 [K, K], of its inputs X, [rows, K]."""

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
        layers: list[LayerSummary] = []
        for sample, count in zip(self.layers, n_experts, strict=True):
            ids = sample.expert_ids.ravel()
            tokens = np.bincount(ids, minlength=count)
            weight = np.bincount(ids, sample.expert_weights.ravel(), count)
            layers.append(LayerSummary(tokens=tokens.tolist(), weight=weight.tolist(), factor=sample.factor))
        return CalibrationSummary(
            tokens=self.tokens, slices=self.slices, text_sha256=self.text_sha256, layers=tuple(layers)
        )


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """All of a calibration but arrays. `dense`: by tensor, the number of the file with its sums, and their rows."""

    tokens: int
    slices: tuple[str, ...]
    text_sha256: str
    factors: tuple[float, ...]
    dense: dict[str, tuple[int, int]]


def calibrate_once(work: Work, make: Callable[[], Calibration]) -> Calibration:
    """A calibration as an earlier, killed command kept it, else made and kept; its rows stay files.

    Raises OutputError, and what `make` raises.
    """
    folder = work.kept
    if folder is None:
        return make()
    kept = work.once("calibration", _Kept, lambda: _save(make(), folder))

    def rows(layer: int, part: str) -> np.ndarray:
        return np.load(folder / f"layer_{layer:02d}_{part}.npy", mmap_mode="r")

    layers = tuple(
        LayerSample(rows(layer, "x"), rows(layer, "ids"), rows(layer, "weights"), factor)
        for layer, factor in enumerate(kept.factors)
    )
    sums = [np.load(folder / f"dense_{file}.npy") for file in range(len({file for file, _ in kept.dense.values()}))]
    dense = {name: Hessian(sums[file], rows) for name, (file, rows) in kept.dense.items()}
    return Calibration(layers, dense, kept.tokens, kept.slices, kept.text_sha256)


def _save(calibration: Calibration, folder: Path) -> _Kept:
    """Write the arrays; those that tensors share, once."""
    files: dict[int, int] = {}
    with translate_write_errors(folder):
        for index, layer in enumerate(calibration.layers):
            for part, array in (("x", layer.x), ("ids", layer.expert_ids), ("weights", layer.expert_weights)):
                _save_array(folder / f"layer_{index:02d}_{part}.npy", array)
        for hessian in calibration.dense.values():
            if id(hessian.matrix) not in files:
                files[id(hessian.matrix)] = len(files)
                _save_array(folder / f"dense_{files[id(hessian.matrix)]}.npy", hessian.matrix)
    return _Kept(
        tokens=calibration.tokens,
        slices=calibration.slices,
        text_sha256=calibration.text_sha256,
        factors=tuple(layer.factor for layer in calibration.layers),
        dense={name: (files[id(found.matrix)], found.rows) for name, found in calibration.dense.items()},
    )


def _save_array(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=False)
    sync(path)


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
