"""What each format would cost each matrix of each expert, measured: the expert's own output with only that changed.

    loss = factor of the layer x smoothed share of tokens x mean of (router weight x change of the output) ** 2

in nats of KL divergence, as far as errors stay small and add up. Frequency alone is known to be a poor guide (MoPEQ,
arXiv 2509.02512; AlphaQ, 2606.04980), as is error alone (MC-MoE, 2410.06270).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pocketmoe.bundle.resume import Work
from pocketmoe.bundle.store import ExpertId
from pocketmoe.bundle.stream import ExpertSource, WorkerPool, in_order
from pocketmoe.calibration import Calibration, ExpertSample, LayerSample
from pocketmoe.quantize.algorithms.choice import Algorithm
from pocketmoe.quantize.algorithms.formats import Format, dequantize
from pocketmoe.quantize.calibrated import LEAST_TOKENS
from pocketmoe.quantize.experts import hessian_of, matrices_of
from pocketmoe.quantize.float_expert import FloatExpert

_ROWS = 512  # of an expert's tokens are measured by, taken evenly
_HELD_OUT = 4  # every fourth token measures the error, the others decide the rounding
_SMOOTHING = 0.3  # weight of uniform routing in the shares, since other text is routed otherwise
_EVENING = 0.8  # how far errors move to their layer's mean; chosen, like _SMOOTHING, on halves of texts (docs/LOG.md)


@dataclass(frozen=True)
class Sensitivity:
    """Of one expert.

    factor: of its layer; share: of tokens that choose it, smoothed; reached: whether calibration brought it enough;
    errors: mean of (router weight x change of the output) ** 2 for each candidate format, [matrix][candidate].
    """

    factor: float
    share: float
    reached: bool
    errors: tuple[tuple[float, ...], ...]

    def loss(self, matrix: int, candidate: int) -> float:
        """What that format would add to the KL divergence of the next token, in nats."""
        return self.factor * self.share * self.errors[matrix][candidate]


def measure(
    experts: ExpertSource,
    floats: Sequence[FloatExpert],
    calibration: Calibration,
    candidates: Sequence[Format],
    algorithm: Algorithm,
    n_experts: Sequence[int],
    pool: WorkerPool,
    work: Work,
) -> dict[ExpertId, Sensitivity]:
    """Of every expert, a layer a step. `floats`: by kind. `n_experts`: of each layer. Raises what rounding raises."""

    def job(expert: ExpertId) -> Callable[[], Sensitivity]:
        layer = calibration.layers[expert.layer]
        return lambda: _measure_one(
            floats[experts.kind_of[expert]],
            memoryview(experts.read(expert)),
            layer,
            expert,
            n_experts[expert.layer],
            candidates,
            algorithm,
        )

    found: dict[ExpertId, Sensitivity] = {}

    def measured(of_layer: Sequence[ExpertId]) -> list[Sensitivity]:
        sensitivities: list[Sensitivity] = []
        for sensitivity in in_order(pool, map(job, of_layer)):
            work.progress("measuring what formats cost", len(found) + len(sensitivities), len(experts.kind_of))
            sensitivities.append(sensitivity)
        return sensitivities

    for layer, members in itertools.groupby(experts.kind_of, lambda expert: expert.layer):
        of_layer = list(members)
        step = work.once(f"layer-{layer}", list[Sensitivity], lambda of_layer=of_layer: measured(of_layer))
        found.update(zip(of_layer, step, strict=True))
    work.progress("measuring what formats cost", len(found), len(found))
    return _evened(found)


def _evened(found: Mapping[ExpertId, Sensitivity]) -> dict[ExpertId, Sensitivity]:
    """Errors drawn to the mean of their layer.

    A plan takes the least of thousands of noisy measurements, so it prefers those that are too low by chance, and those
    nearer to their layer's mean are less noisy. Without this, plans with bytes to spare were 10% behind a uniform
    format of the same size on new text (docs/LOG.md).
    """
    of_layer: dict[int, list[np.ndarray]] = {}
    for expert, sensitivity in found.items():
        of_layer.setdefault(expert.layer, []).append(np.array(sensitivity.errors))
    means = {layer: np.mean(errors, axis=0) for layer, errors in of_layer.items()}

    def evened(errors: np.ndarray, layer: int) -> np.ndarray:
        return (1 - _EVENING) * errors + _EVENING * means[layer]

    def rows(errors: np.ndarray) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(map(float, row)) for row in errors)

    return {expert: replace(s, errors=rows(evened(np.array(s.errors), expert.layer))) for expert, s in found.items()}


def smoothed_share(layer: LayerSample, expert: int, n_experts: int) -> float:
    """The share of tokens that choose an expert, somewhat evened out."""
    tokens, top_k = layer.expert_ids.shape
    seen = float((layer.expert_ids == expert).sum()) / tokens
    return (1 - _SMOOTHING) * seen + _SMOOTHING * top_k / n_experts


def _measure_one(
    kind: FloatExpert,
    record: memoryview,
    layer: LayerSample,
    expert: ExpertId,
    n_experts: int,
    candidates: Sequence[Format],
    algorithm: Algorithm,
) -> Sensitivity:
    seen = layer.of(expert.expert)
    reached = len(seen.x) >= LEAST_TOKENS
    fitted, probe = _split(seen) if reached else (seen, layer.spread(_ROWS))
    weights = kind.weights(record)
    share = smoothed_share(layer, expert.expert, n_experts)
    truth = kind.run(weights, probe.x)
    errors: list[tuple[float, ...]] = []
    for tensor in matrices_of(kind.kind):
        by_inputs = reached and algorithm.goes_by_inputs
        hessian = hessian_of(kind, weights, tensor.name, fitted) if by_inputs else None
        by_rows = kind.uses[tensor.name].by_rows
        weight = weights[tensor.name] if by_rows else weights[tensor.name].T
        row: list[float] = []
        for form in candidates:
            what = f"layer {expert.layer}, expert {expert.expert}, {tensor.name}"
            rounded = dequantize(algorithm(weight, form.fitted(weight.shape[1]), name=what, hessian=hessian))
            changed = {**weights, tensor.name: rounded if by_rows else np.ascontiguousarray(rounded.T)}
            off = (kind.run(changed, probe.x) - truth) * probe.weights[:, None]
            row.append(float(np.square(off, dtype=np.float64).sum()) / len(probe.x))
        errors.append(tuple(row))
    return Sensitivity(layer.factor, share, reached, tuple(errors))


def _split(sample: ExpertSample) -> tuple[ExpertSample, ExpertSample]:
    """Rows to round by, and others to measure by: judged by the rows that it went by, rounding looks twice as good."""
    held = np.arange(len(sample.x)) % _HELD_OUT == 0
    probes = np.flatnonzero(held)[:: max(1, -(-int(held.sum()) // _ROWS))]
    return ExpertSample(sample.x[~held], sample.weights[~held]), ExpertSample(sample.x[probes], sample.weights[probes])
