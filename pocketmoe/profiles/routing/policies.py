"""Cache policies over a routing trace: which wanted experts each would have found in memory.

All of them see what the pager sees: step by step and layer by layer the set of experts that the router chose. A hit is
an expert that was resident when its layer began. Whatever is missing is then read, and the policy says who stays; where
a policy declines to keep what was read, its bytes pass through memory that is not counted. So Belady's optimum below,
which may decline too, bounds every policy, the product's own among them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pocketmoe.bundle.store import ExpertId
from pocketmoe.runtime.paging.cache import ExpertCache

PRODUCT, BELADY, PINNED, LRU = "pocketmoe", "belady", "pinned", "lru"
_NEVER = 1 << 60


class Visit(NamedTuple):
    """One layer of one step. `wanted`: layer * width + expert, distinct and ascending, which is file order."""

    step: int
    layer: int
    chosen: np.ndarray  # int [tokens, top_k], as the router gave them
    wanted: np.ndarray  # int [n], those of the pool at hand


@dataclass(frozen=True)
class Routing:
    """A trace cut to the experts of one pool. A step is a walk of the prompt, or one token of the answer."""

    visits: tuple[Visit, ...]
    experts: Mapping[int, int]  # how many experts of the pool each layer has
    width: int  # the most experts that a layer has, of all pools
    n_steps: int
    n_prompt_steps: int

    @property
    def size(self) -> int:
        """How many numbers `layer * width + expert` there are."""
        return (max(self.experts, default=-1) + 1) * self.width

    def tally(self, per_visit: np.ndarray) -> np.ndarray:
        """[..., visits] summed to [..., steps]; each step visits the same layers."""
        return per_visit.reshape(*per_visit.shape[:-1], self.n_steps, len(self.experts)).sum(axis=-1)

    def uses(self, steps: range) -> np.ndarray:
        """How many visits of these steps wanted each expert, int [size]."""
        wanted = [visit.wanted for visit in self.visits if visit.step in steps]
        return np.bincount(np.concatenate(wanted) if wanted else np.zeros(0, int), minlength=self.size)


Policy = Callable[[Routing, Sequence[int]], np.ndarray]
"""From a routing and numbers of slots, [budgets], to the hits of each step, int [budgets, steps]."""


def belady(routing: Routing, slots: Sequence[int]) -> np.ndarray:
    """The most hits that any policy can have, int [budgets, steps]: keep what is wanted again soonest (Belady 1966).

    What is wanted next in the prompt is worth nothing, since only the answer's hits are counted. Taking every span from
    one use to the next as an interval, this is the earliest-end-first choice of unit intervals on `slots` machines.
    """
    next_use = _next_uses(routing)
    return np.stack([_belady(routing, next_use, n) for n in slots])


def _next_uses(routing: Routing) -> list[np.ndarray]:
    """For each visit, the visit that next wants each of its experts; `_NEVER` where none of the answer's does."""
    upcoming = np.full(routing.size, _NEVER)
    found: list[np.ndarray] = []
    for number in range(len(routing.visits) - 1, -1, -1):
        visit = routing.visits[number]
        found.append(upcoming[visit.wanted])
        upcoming[visit.wanted] = number if visit.step >= routing.n_prompt_steps else _NEVER
    return found[::-1]


def _belady(routing: Routing, next_use: list[np.ndarray], n_slots: int) -> np.ndarray:
    kept: dict[int, int] = {}  # expert: its next use
    furthest: list[tuple[int, int]] = []  # a heap of (-next use, expert), with entries that no longer hold
    hits = np.zeros(len(routing.visits), np.int64)
    for number, (visit, upcoming) in enumerate(zip(routing.visits, next_use, strict=True)):
        wanted = visit.wanted.tolist()
        hits[number] = sum(kept.pop(expert, None) is not None for expert in wanted)
        for expert, use in zip(wanted, upcoming.tolist(), strict=True):
            if use < _NEVER:
                kept[expert] = use
                heapq.heappush(furthest, (-use, expert))
        while len(kept) > n_slots:
            use, expert = heapq.heappop(furthest)
            if kept.get(expert) == -use:
                del kept[expert]
    return routing.tally(hits)


def product(routing: Routing, slots: Sequence[int]) -> np.ndarray:
    """The runtime's own cache, driven as the pager drives it: int [budgets, steps]."""
    return np.stack([drive(ExpertCache(n, routing.experts, routing.width), routing) for n in slots])


def drive(cache: ExpertCache, routing: Routing) -> np.ndarray:
    """Hits of each step, int [steps]."""
    return routing.tally(visit_hits(cache, routing))


def visit_hits(cache: ExpertCache, routing: Routing) -> np.ndarray:
    """Hits of each visit, int [visits]. Where no slot is to be had, what was resident is taken to run first."""
    hits = np.zeros(len(routing.visits), np.int64)
    for number, visit in enumerate(routing.visits):
        wanted = [ExpertId(visit.layer, e) for e in (visit.wanted - visit.layer * routing.width).tolist()]
        cache.count(visit.layer, visit.chosen)
        missing = deque(expert for expert in wanted if cache.slot_of(expert) is None)
        hits[number] = len(wanted) - len(missing)
        running = deque(expert for expert in wanted if cache.slot_of(expert) is not None)
        keep = set(wanted)
        while missing:
            if cache.place(missing[0], keep) is not None:
                running.append(missing.popleft())
            else:
                keep.discard(running.popleft())
    return hits


def lru(routing: Routing, slots: Sequence[int]) -> np.ndarray:
    """One least-recently-used list over all layers; what the layer at hand wants is not thrown out for its own.

    Returns int [budgets, steps]. By stack distances (Mattson 1970): one walk through the trace for all budgets.
    """
    limits = np.asarray(slots)[:, None]
    return _recency(routing, lambda _layer: limits, slice(None))


def lru_by_layer(routing: Routing, slots: Sequence[int]) -> np.ndarray:
    """A least-recently-used list in each layer, with equal shares of the slots: int [budgets, steps]."""
    limits = _shares(routing, slots)
    return _recency(routing, lambda layer: limits[layer][:, None], None)


def _recency(routing: Routing, limits: Callable[[int], np.ndarray], rivals: slice | None) -> np.ndarray:
    """`rivals`: the experts that share a list; None where they are the layer's own."""
    used = np.full(routing.size, -1)
    hits = np.zeros((len(limits(routing.visits[0].layer)), len(routing.visits)), np.int64)
    for number, visit in enumerate(routing.visits):
        among = used[rivals or _row(routing, visit.layer)]
        before = used[visit.wanted]
        distance = (among[None, :] > before[:, None]).sum(axis=1)
        distance[before < 0] = _NEVER
        hits[:, number] = (distance < limits(visit.layer)).sum(axis=1)
        used[visit.wanted] = number * routing.width + np.arange(len(visit.wanted))
    return routing.tally(hits)


def decayed_by_layer(half_life: float) -> Policy:
    """In each layer stay those used most, where a use counts half after `half_life` tokens, evicted or not.

    Those of the moment come first. An infinite half-life makes it least frequently used.
    """

    def policy(routing: Routing, slots: Sequence[int]) -> np.ndarray:
        limits = _shares(routing, slots)
        resident = {layer: np.zeros((len(slots), routing.width), bool) for layer in routing.experts}
        score = np.zeros(routing.size)
        hits = np.zeros((len(slots), len(routing.visits)), np.int64)
        for number, visit in enumerate(routing.visits):
            row, held = _row(routing, visit.layer), resident[visit.layer]
            score[row] *= 0.5 ** (len(visit.chosen) / half_life)
            score[visit.wanted] += 1
            chosen = visit.wanted - row.start
            hits[:, number] = held[:, chosen].sum(axis=1)
            held[:, chosen] = True
            ranked = score[row].copy()
            ranked[chosen] += ranked.max()
            order = np.argsort(-ranked, kind="stable")
            rank = held[:, order].cumsum(axis=1)
            held[:, order] &= rank <= limits[visit.layer][:, None]
        return routing.tally(hits)

    return policy


def pinned(routing: Routing, slots: Sequence[int]) -> np.ndarray:
    """Always those experts that were used most up to the middle of the answer: int [budgets, steps].

    Only the hits of the second half mean anything, since the choice has seen the first.
    """
    middle = (routing.n_prompt_steps + routing.n_steps) // 2
    order = np.argsort(-routing.uses(range(middle)), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    limits = np.asarray(slots)[:, None]
    hits = [(rank[visit.wanted] < limits).sum(axis=1) for visit in routing.visits]
    return routing.tally(np.stack(hits, axis=1))


class _Ranking(Protocol):
    """Scores of all experts, float [size], when a layer has chosen; `admits` what is read only by a higher score."""

    admits: bool

    def see(self, visit: Visit) -> np.ndarray: ...


class NextUse:
    """When each expert is likely to be wanted next, from how often it was, and how often twice running (colibri).

    p = P(chosen), r = P(chosen | chosen at the last visit), both over about 16 tokens; the next use is as many layers
    away as its layer's turn, and as many rounds as a geometric law with the first of them at q = r or p says.
    Scores: float [size].
    """

    admits = True

    def __init__(self, routing: Routing) -> None:
        self._n_layers = max(routing.experts) + 1
        self._width = routing.width
        mean = np.mean([visit.chosen.shape[1] for visit in routing.visits]) / routing.width
        self._chosen, self._again = np.full(routing.size, mean), np.full(routing.size, mean)
        self._last = np.zeros(routing.size, bool)
        self._layer = np.arange(routing.size) // routing.width

    def see(self, visit: Visit) -> np.ndarray:
        row = slice(visit.layer * self._width, (visit.layer + 1) * self._width)
        pace = 1 - 2 ** (-len(visit.chosen) / 16)
        now = np.zeros(self._width, bool)
        now[visit.wanted - row.start] = True
        last = self._last[row]
        self._again[row][last] += pace * (now[last] - self._again[row][last])
        self._chosen[row] += pace * (now - self._chosen[row])
        self._last[row] = now
        rate = np.maximum(self._chosen, 1e-6)
        first = np.where(self._last, self._again, rate)
        turns = (self._layer - visit.layer - 1) % self._n_layers
        return -(turns + self._n_layers * (1 - first) / rate)


class LeastStale:
    """First go those not used in this walk through the layers, lowest layer first (arXiv 2602.03921); float [size]."""

    admits = False

    def __init__(self, routing: Routing) -> None:
        self._step = np.full(routing.size, -1)
        self._layer = np.arange(routing.size) // routing.width

    def see(self, visit: Visit) -> np.ndarray:
        self._step[visit.wanted] = visit.step
        return self._layer + np.where(self._step == visit.step, len(self._layer), 0)


def _pooled(ranking: Callable[[Routing], _Ranking]) -> Policy:
    """One pool for all layers; those with the lowest score go first, of equals the last."""

    def policy(routing: Routing, slots: Sequence[int]) -> np.ndarray:
        resident = np.zeros((len(slots), routing.size), bool)
        hits = np.zeros((len(slots), len(routing.visits)), np.int64)
        ranks = ranking(routing)
        ties = 1e-9 * np.arange(routing.size)
        for number, visit in enumerate(routing.visits):
            score = ranks.see(visit) - ties
            for held, limit, row in zip(resident, slots, hits, strict=True):
                row[number] = held[visit.wanted].sum()
                if row[number] < len(visit.wanted):
                    held[visit.wanted] = True
                    _drop_least(held, score if ranks.admits else _first(visit.wanted, score), limit)
        return routing.tally(hits)

    return policy


def _drop_least(held: np.ndarray, score: np.ndarray, limit: int) -> None:
    residents = np.flatnonzero(held)
    excess = len(residents) - limit
    if excess > 0:
        held[residents[np.argpartition(score[residents], excess - 1)[:excess]]] = False


def _first(wanted: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The same order, but what is wanted comes first."""
    raised = score.copy()
    raised[wanted] += score.max() - score.min() + 1
    return raised


def _row(routing: Routing, layer: int) -> slice:
    return slice(layer * routing.width, (layer + 1) * routing.width)


def _shares(routing: Routing, slots: Sequence[int]) -> dict[int, np.ndarray]:
    """Each layer's part of the slots, [budgets], as equal as whole numbers can be."""
    n_layers, total = len(routing.experts), np.asarray(slots)
    return {
        layer: total * (place + 1) // n_layers - total * place // n_layers
        for place, layer in enumerate(sorted(routing.experts))
    }


POLICIES: Mapping[str, Policy] = {
    PRODUCT: product,
    LRU: lru,
    "lru-by-layer": lru_by_layer,
    "lfu": decayed_by_layer(np.inf),
    **{f"decayed-{half_life}": decayed_by_layer(half_life) for half_life in (8, 16, 24, 32, 64)},
    "next-use": _pooled(NextUse),
    "least-stale": _pooled(LeastStale),
    PINNED: pinned,
    BELADY: belady,
}


def routing_of(
    ids: np.ndarray, experts: Sequence[int], prompt_walks: Sequence[int] = (), pool: Sequence[np.ndarray] | None = None
) -> Routing:
    """Cut a trace into visits. ids: int [tokens, layers, top_k], -1 for none; `experts`: how many each layer has.

    `pool`: bool [experts] for each layer, who belongs; None: all do.
    """
    members = pool if pool is not None else [np.ones(count, bool) for count in experts]
    width = max(experts)
    visits: list[Visit] = []
    steps = list(_steps(len(ids), prompt_walks))
    for number, tokens in enumerate(steps):
        for layer, belongs in enumerate(members):
            chosen = ids[tokens, layer]
            chosen = chosen[:, chosen[0] >= 0].astype(np.int64)
            distinct = np.unique(chosen)
            visits.append(Visit(number, layer, chosen, layer * width + distinct[belongs[distinct]]))
    counts = {layer: int(belongs.sum()) for layer, belongs in enumerate(members) if belongs.any()}
    return Routing(
        visits=tuple(visit for visit in visits if visit.layer in counts),
        experts=counts,
        width=width,
        n_steps=len(steps),
        n_prompt_steps=len(prompt_walks),
    )


def _steps(n_tokens: int, prompt_walks: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in (*prompt_walks, *[1] * (n_tokens - sum(prompt_walks))):
        yield slice(start, start + length)
        start += length
