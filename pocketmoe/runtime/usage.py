"""What counts of uses say: how even the routing was, and which experts to load before anything is asked for.

Counts are all that is kept of a text by default. Unlike a trace they do not say which token chose which experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pocketmoe.store import ExpertId

_HOTTEST = 0.25  # of a layer's experts


@dataclass(frozen=True)
class RoutingSummary:
    """Means over the layers. Both are about 1 and a quarter where every expert is used alike."""

    entropy: float  # of the experts' shares of uses, as a share of the highest possible
    hottest_quarter: float  # share of the uses that go to the most used quarter of the experts


def summarize(uses: np.ndarray, experts: Sequence[int]) -> RoutingSummary | None:
    """`uses`: int [layers, most experts], tokens routed to each; `experts`: how many each layer has. None if unused."""
    entropies, hottest = [], []
    for row, count in zip(uses, experts, strict=True):
        share = np.sort(row[:count] / max(1, row.sum()))[::-1]
        used = share[share > 0]
        if len(used):
            entropies.append(float(-(used * np.log(used)).sum() / np.log(count)) if count > 1 else 1.0)
            hottest.append(float(share[: max(1, round(_HOTTEST * count))].sum()))
    return RoutingSummary(float(np.mean(entropies)), float(np.mean(hottest))) if entropies else None


def shares(uses: np.ndarray, top_k: Sequence[int]) -> np.ndarray:
    """The share of a layer's tokens that chose each expert, float [layers, experts], for `ExpertCache.expect`.

    `uses`: int [layers, experts]; `top_k`: experts per token in each layer.
    """
    tokens = uses.sum(axis=1) / np.asarray(top_k)
    return uses / np.maximum(1.0, tokens)[:, None]


def to_load_first(chosen_shares: np.ndarray, pool: Iterable[ExpertId], n_slots: int) -> list[ExpertId]:
    """The experts of a pool to fill half of its slots with before the first token, in file order.

    Those that tokens choose most often, all layers together, never one that nobody chose. `chosen_shares`: float
    [layers, experts], from `shares`; tell them to `ExpertCache.expect` first. Half, since replays (docs/LOG.md) save
    most of these reads again within 64 tokens, and of those for the other half a tenth to a half.
    """
    ranked = sorted((expert for expert in pool if chosen_shares[expert] > 0), key=lambda e: (-chosen_shares[e], e))
    return sorted(ranked[: n_slots // 2])
