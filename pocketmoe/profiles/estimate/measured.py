"""What a decode step costs on a machine whose computing was measured (`profiles/machine/computing.py`), else by class.

Weights take what weights of their format took on as many threads as the runtime gives them, between what they take from
the caches and from memory: by how many bytes are moved until they are wanted again, which are a token's. The rest of a
layer takes what the small bundle's did, between near and far by how many bytes a layer moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from pocketmoe.profiles.estimate.classes import Machine, Moved, class_costs
from pocketmoe.profiles.estimate.roofline import scheme_bits
from pocketmoe.profiles.estimate.step import WAIT_SCALE_S, Compute, Costs, Slowing
from pocketmoe.profiles.profile import LONG_READ_S, LayerCosts, Products
from pocketmoe.runtime.paging.workers import worthwhile_threads

_NEAR_BYTES, _FAR_BYTES = 4e6, 64e6  # what lies in the caches beside, and what displaces them: as it was measured
_EXPERT_WEIGHTS = 3 * 2048 * 1024  # of those that were measured, whose time has a call in it
_FLOAT32 = 16  # bits from which on weights are not quantized


class _At(NamedTuple):
    """How far from the caches, 0 to 1, and the pace."""

    far: float
    pace: float

    def between(self, near_s: float, far_s: float) -> float:
        """Seconds, of those near and those far, which have no pace, but are no fewer than the former."""
        near_s *= self.pace
        return near_s + self.far * (max(near_s, far_s) - near_s)


class _Rate(NamedTuple):
    """Seconds of a byte, and the processors that are busy meanwhile."""

    byte_s: float
    busy_cpus: float


def step_costs(machine: Machine, moved: Moved, pace: float = 1.0) -> Costs:
    """Costs of a step, as this machine was measured or by its class; nothing is prefetched.

    `pace`: what does not wait for memory takes so many times as long as while it was measured.
    """
    by_class = class_costs(machine, moved)
    found = machine.computing
    if found is None or moved.expert_bits > _FLOAT32:
        return by_class
    layers, chosen = moved.layers, moved.layers * moved.top_k
    token_bytes = moved.dense_bytes + moved.active_expert_bytes
    at = _At(_far(token_bytes), pace)
    layer = _Layer(found.layer, _At(_far(token_bytes / layers), pace))
    dense_threads = worthwhile_threads(machine.threads, int(moved.dense_bytes / (layers + 1)))
    expert_threads = worthwhile_threads(machine.threads, int(moved.top_k * moved.expert_bytes))
    dense = _rate(found.products, "dense", dense_threads, moved.dense_bits, at)
    together = _rate(found.products, "experts", expert_threads, moved.expert_bits, at, moved.float4)
    alone = _rate(found.products, "experts", 1, moved.expert_bits, at, moved.float4)
    segments_s = (layers + 1) * layer.segment_s + moved.dense_bytes * dense.byte_s
    segments_s += moved.kv_bytes * _rate(found.products, "caches", dense_threads, 32, at).byte_s
    python_s = layers * layer.python_s
    calls_s = _calls_s(moved, layer.expert_s)
    steady = Compute(segments_s, chosen * (moved.expert_bytes * together.byte_s + calls_s / expert_threads), python_s)
    read_one_s, read_more_s = machine.reads_s(moved.read_bytes)
    wait_s = max(0.0, pace * (found.layer.near_segment_s + found.layer.long_wait_s) - layer.segment_s)
    missing = Compute(
        segments_s + layers * wait_s,
        chosen * (moved.expert_bytes * alone.byte_s + calls_s),
        python_s + chosen * _miss_s(layer, moved.top_k, read_more_s),
    )
    busy_s = dense.busy_cpus * segments_s + together.busy_cpus * steady.experts_s + python_s
    return replace(
        by_class,
        steady=steady,
        after_waits=missing,
        most=Slowing(1.0, 1.0),
        read_one_s=read_one_s,
        read_more_s=read_more_s,
        after_wait_s=wait_s,
        least_s=busy_s / machine.cores,
    )


class _Layer:
    """What a layer takes beside its weights, so far from what the caches hold."""

    def __init__(self, found: LayerCosts, at: _At) -> None:
        self.found, self.pace = found, at.pace
        self.segment_s = at.between(found.near_segment_s, found.far_segment_s)
        self.expert_s = at.between(found.near_expert_s, found.far_expert_s)
        self.python_s = at.between(found.near_python_s, found.far_python_s)


def _miss_s(layer: _Layer, top_k: int, read_s: float) -> float:
    """What an expert takes more that was not in memory: after a wait, whatever it takes far from the caches anyway."""
    found = layer.found
    long = min(1.0, (1 - math.exp(-read_s / WAIT_SCALE_S)) / (1 - math.exp(-LONG_READ_S / WAIT_SCALE_S)))
    near_s = found.near_expert_s + found.near_python_s / top_k
    after_wait_s = layer.pace * (near_s + found.miss_s + long * found.long_miss_s)
    return max(0.0, after_wait_s - layer.expert_s - layer.python_s / top_k)


def _calls_s(moved: Moved, call_s: float) -> float:
    """Of an expert's call what its bytes do not bring: the experts that were measured had one call each."""
    weights = 8 * moved.expert_bytes / moved.expert_bits
    return max(0.0, 1 - weights / _EXPERT_WEIGHTS) * call_s


def _rate(
    products: Sequence[Products],
    what: Literal["experts", "dense", "caches"],
    threads: int,
    bits: float,
    at: _At,
    float4: bool = False,
) -> _Rate:
    """Of the format that is most alike, on as many threads or the next fewer that were measured."""
    kinds = [p for p in products if p.what == what and p.threads <= threads]
    kinds = [p for p in kinds if p.scheme.startswith(("nf4", "fp4")) == float4] or kinds
    like = min(kinds, key=lambda p: abs(math.log(scheme_bits(p.scheme) / bits))).scheme
    known = max((p for p in kinds if p.scheme == like), key=lambda p: p.threads)
    fewer_bits = max(1.0, scheme_bits(like) / bits)  # a weight takes as long to compute with then
    return _Rate(fewer_bits * at.between(1 / known.near_bytes_per_s, 1 / known.far_bytes_per_s), known.busy_cpus)


def _far(nbytes: float) -> float:
    """How far from the caches what is wanted again after so many bytes is: 0 to 1, by their logarithm."""
    return min(1.0, max(0.0, math.log(max(nbytes, 1.0) / _NEAR_BYTES) / math.log(_FAR_BYTES / _NEAR_BYTES)))
