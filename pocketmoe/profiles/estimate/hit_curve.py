"""How often a model would find its experts in memory, before anybody has run it.

Routing with the statistics of a real model (`routing.toml`) is replayed through the runtime's own cache; no prefetch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from pocketmoe.profiles.estimate.shapes import Shape
from pocketmoe.profiles.routing.policies import product, routing_of
from pocketmoe.profiles.routing.synthetic import RoutingStatistics, fitted_models, synthetic_routing
from pocketmoe.runtime.engine.memory_plan import possible_slots

_SHARES = (0.03, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
_PROMPT_TOKENS = 96
_ANSWER_TOKENS = 160
_MOST_LAYERS = 12  # replayed at most: layers are alike, so that fewer of them hit as often at the same share of slots
_RANGE_LAYERS = 4  # enough to tell how far traces differ
_MOST_EXPERTS, _MOST_CHOSEN = 512, 32
_FIT_ERROR = 0.03  # of the statistics' hit rates, .027 at most (routing.toml)


@dataclass(frozen=True)
class HitCurve:
    """Hit rates by share of the experts in memory. `own`: the statistics are of this very architecture."""

    statistics: str
    own: bool
    shares: tuple[float, ...]
    rates: tuple[float, ...]
    lowest: tuple[float, ...] = ()  # of the traces that were replayed, at each share
    highest: tuple[float, ...] = ()

    def at(self, share: float) -> float:
        """Between the shares that were replayed along straight lines."""
        return self._between(share, self.rates)

    def range_at(self, share: float) -> tuple[float, float]:
        """The least and the most that the traces and the error of their statistics make likely."""
        low, high = self._between(share, self.lowest or self.rates), self._between(share, self.highest or self.rates)
        if share >= self.shares[-1]:
            return low, high
        return max(0.0, low - _FIT_ERROR), min(1.0, high + _FIT_ERROR)

    def _between(self, share: float, rates: Sequence[float]) -> float:
        return float(np.interp(share, (0.0, *self.shares), (0.0, *rates)))


def hit_curve(shape: Shape, shares: Sequence[float] = _SHARES) -> HitCurve:
    """Replay some seconds' worth of synthetic routing of that shape.

    The range is that of two texts where the statistics are the architecture's own, else of all models that are as alike
    in whether they have shared experts.
    """
    name, own = closest_statistics(shape)
    rates = _replay(shape, name, shares, most_layers=_MOST_LAYERS)
    others = [] if own else [_replay(shape, other, shares) for other in _alike(shape) if other != name]
    traces = [rates, *(others or [_replay(shape, name, shares, seed=1)])]
    return HitCurve(
        name,
        own,
        tuple(shares),
        rates,
        lowest=tuple(min(trace) for trace in zip(*traces, strict=True)),
        highest=tuple(max(trace) for trace in zip(*traces, strict=True)),
    )


def _alike(shape: Shape) -> list[str]:
    return [name for name, known in fitted_models().items() if known.shared_experts == shape.has_shared_experts]


def _replay(
    shape: Shape, like: str, shares: Sequence[float], seed: int = 0, most_layers: int = _RANGE_LAYERS
) -> tuple[float, ...]:
    """Hit rates at these shares, with the statistics of one model and the shape of another."""
    layers = min(most_layers, shape.moe_layers)
    experts, top_k = _replayed(shape.experts, shape.top_k)
    return _rates(like, layers, experts, top_k, tuple(shares), seed)


@cache
def _rates(like: str, layers: int, experts: int, top_k: int, shares: tuple[float, ...], seed: int) -> tuple[float, ...]:
    statistics = replace(fitted_models()[like], experts=experts, top_k=top_k, layers=layers)
    ids = synthetic_routing(statistics, [_PROMPT_TOKENS + _ANSWER_TOKENS], seed)
    routing = routing_of(ids, [experts] * layers, [_PROMPT_TOKENS])
    total = experts * layers
    slots = [possible_slots(round(share * total), total) for share in shares]
    hits = product(routing, slots)[:, routing.n_prompt_steps :].sum(axis=1)
    wanted = _ANSWER_TOKENS * layers * top_k
    # with room for all, all are loaded before the start
    return tuple(1.0 if n == total else float(found) / wanted for n, found in zip(slots, hits, strict=True))


def _replayed(experts: int, top_k: int) -> tuple[int, int]:
    """How many experts are replayed, and chosen: fewer in proportion where a replay would take minutes."""
    fewer = max(1.0, experts / _MOST_EXPERTS, top_k / _MOST_CHOSEN)
    return round(experts / fewer), max(1, round(top_k / fewer))


def closest_statistics(shape: Shape) -> tuple[str, bool]:
    """The fitted model of that architecture and true; else the one most alike, and false.

    Shared experts go with poor locality, so they count first; then how many experts there are, and how many are chosen.
    """
    models = fitted_models()
    for name, known in models.items():
        if shape.model_type in known.model_types:
            return name, True

    def unlike(name: str) -> tuple[bool, float]:
        known: RoutingStatistics = models[name]
        size = abs(math.log(known.experts / shape.experts)) + abs(math.log(known.top_k / shape.top_k))
        return known.shared_experts != shape.has_shared_experts, size

    return min(models, key=unlike), False
