"""The policies against plain models of themselves, an exhaustive search, and hit rates that others published."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.profiles.routing.policies import BELADY, PINNED, POLICIES, LeastStale, NextUse, Routing, routing_of
from pocketmoe.profiles.routing.synthetic import fitted_models, synthetic_routing
from pocketmoe.runtime.trace import read_trace


@st.composite
def routings(draw: st.DrawFn, most_experts: int = 7, most_tokens: int = 14) -> Routing:
    """A small random trace, now and then with a prompt, a second pool, or repetitive."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, most_experts))
    top_k, tokens = draw(st.integers(1, min(experts, 3))), draw(st.integers(2, most_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    favour = rng.standard_normal((layers, experts)) * draw(st.sampled_from([0.0, 2.0]))
    ids = np.argsort(favour + rng.standard_normal((tokens, layers, experts)), axis=2)[:, :, :top_k]
    prompt = draw(st.integers(0, tokens - 1))
    pool = None
    if draw(st.booleans()):
        pool = [rng.random(experts) < 0.6 for _ in range(layers)]
        pool[0][0] = True
    return routing_of(ids, [experts] * layers, [prompt] if prompt else [], pool)


def answer_hits(routing: Routing, policy: str, slots: int) -> int:
    return int(POLICIES[policy](routing, [slots])[0, routing.n_prompt_steps :].sum())


@settings(max_examples=150, deadline=None)
@given(routings(), st.integers(1, 20))
def test_nothing_beats_belady(routing: Routing, slots: int) -> None:
    """On any trace, at any number of slots, no policy has more hits in the answer; pinned ones did not start empty."""
    best = answer_hits(routing, BELADY, slots)
    for name in POLICIES:
        if name != PINNED:
            assert answer_hits(routing, name, slots) <= best, name


@settings(max_examples=60, deadline=None)
@given(routings(most_experts=4, most_tokens=6), st.integers(1, 4))
def test_belady_is_the_best_of_all_choices(routing: Routing, slots: int) -> None:
    """It has exactly the hits of a search through everything that could be kept after each layer."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for visit in routing.visits:
        wanted, counts = set(visit.wanted.tolist()), visit.step >= routing.n_prompt_steps
        after: dict[frozenset[int], int] = {}
        for kept, hits in best.items():
            total, seen = hits + counts * len(kept & wanted), kept | wanted
            for size in range(min(slots, len(seen)) + 1):
                for choice in combinations(sorted(seen), size):
                    after[frozenset(choice)] = max(total, after.get(frozenset(choice), 0))
        best = after
    assert answer_hits(routing, BELADY, slots) == max(best.values())


def plain(routing: Routing, slots: int, keep: Callable[[set[int], set[int], object], set[int]]) -> np.ndarray:
    """Hits of each step where `keep` says what stays of residents and wanted; never more than there are slots."""
    resident: set[int] = set()
    hits = np.zeros(routing.n_steps, int)
    for visit in routing.visits:
        wanted = set(visit.wanted.tolist())
        hits[visit.step] += len(resident & wanted)
        resident = keep(resident, wanted, visit)
        assert len(resident) <= slots
    return hits


@settings(max_examples=60, deadline=None)
@given(routings(), st.integers(1, 20))
def test_recency_is_that_of_a_plain_list(routing: Routing, slots: int) -> None:
    """`lru` has step by step the hits of one list to whose end everything wanted moves."""
    order: list[int] = []

    def keep(_resident: set[int], wanted: set[int], _visit: object) -> set[int]:
        order[:] = [e for e in order if e not in wanted] + sorted(wanted)
        return set(order[-slots:])

    assert np.array_equal(POLICIES["lru"](routing, [slots])[0], plain(routing, slots, keep))


@settings(max_examples=60, deadline=None)
@given(routings(), st.integers(1, 20), st.sampled_from([8, 24]))
def test_decayed_counts_are_those_of_a_plain_sum(routing: Routing, slots: int, half_life: int) -> None:
    """Each layer keeps what is wanted and then what has the highest sum of 0.5 ** (age / half-life)."""
    uses: list[tuple[int, int, int]] = []  # layer, tokens before, expert
    tokens = dict.fromkeys(routing.experts, 0)
    ranks = {layer: place for place, layer in enumerate(sorted(routing.experts))}
    kept: dict[int, set[int]] = {layer: set() for layer in routing.experts}

    def keep(_resident: set[int], wanted: set[int], visit: object) -> set[int]:
        layer = visit.layer  # type: ignore[attr-defined]
        tokens[layer] += len(visit.chosen)  # type: ignore[attr-defined]
        uses.extend((layer, tokens[layer], expert) for expert in wanted)

        def worth(expert: int) -> float:
            return sum(0.5 ** ((tokens[layer] - when) / half_life) for _, when, e in uses if e == expert)

        n = len(ranks)
        share = slots * (ranks[layer] + 1) // n - slots * ranks[layer] // n
        ranked = sorted(kept[layer] | wanted, key=lambda e: (e not in wanted, -round(worth(e), 9), e))
        kept[layer] = set(ranked[:share])
        return set().union(*kept.values())

    assert np.array_equal(POLICIES[f"decayed-{half_life}"](routing, [slots])[0], plain(routing, slots, keep))


@settings(max_examples=60, deadline=None)
@given(routings(), st.integers(1, 20), st.sampled_from([("next-use", NextUse), ("least-stale", LeastStale)]))
def test_pools_keep_those_of_the_highest_score(routing: Routing, slots: int, policy: tuple[str, type]) -> None:
    """Residents and wanted of the highest score stay; `least-stale` keeps what is wanted first."""
    name, ranking = policy
    ranks = ranking(routing)

    def keep(resident: set[int], wanted: set[int], visit: object) -> set[int]:
        worth = ranks.see(visit)
        if wanted <= resident:
            return resident
        first = set() if ranks.admits else wanted
        return set(sorted(resident | wanted, key=lambda e: (e not in first, -round(worth[e], 7), e))[:slots])

    assert np.array_equal(POLICIES[name](routing, [slots])[0], plain(routing, slots, keep))


def test_a_list_over_all_layers_falls_off_a_cliff() -> None:
    """One layer's slots less than all layers want, of the same experts again and again: no hit at all.

    The product's own policy, a list in each layer, decayed counts and expected next use keep hitting there.
    """
    ids = np.tile(np.arange(4), (30, 8, 1))
    routing = routing_of(ids, [16] * 8)
    hits = {name: int(policy(routing, [28])[0].sum()) for name, policy in POLICIES.items()}
    assert hits["lru"] == 0
    assert hits["pocketmoe"] > 0.9 * hits[BELADY]
    assert hits[BELADY] == 29 * 28
    assert min(hits["lru-by-layer"], hits["decayed-24"], hits["next-use"]) > 0.7 * hits[BELADY]


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("olmoe", (0.43, 0.61, 0.74, 0.83)),
        ("deepseek-v2-lite", (0.28, 0.42, 0.53, 0.62)),
        ("mixtral", (0.36, 0.63, 0.83, 1.0)),
    ],
)
def test_synthetic_routing_hits_as_often_as_the_model(model: str, published: tuple[float, ...]) -> None:
    """LRU caches of 1 to 4 times top-k experts per layer, on 512 tokens: within 4 points of moe-lrc (2505.16056)."""
    statistics = fitted_models()[model]
    ids = synthetic_routing(statistics, [512], seed=3)[:, :12]
    routing = routing_of(ids, [statistics.experts] * 12)
    slots = [12 * statistics.top_k * rho for rho in (1, 2, 3, 4)]
    hits = POLICIES["lru-by-layer"](routing, slots).sum(axis=1)
    free = [min(n, 12 * statistics.experts) for n in slots]  # there the first fill counts as hits
    assert np.allclose((hits + free) / ids.size, published, atol=0.04)


def test_hit_rates_of_a_real_trace_are_those_that_others_found() -> None:
    """OLMoE's trace, the first fill free: figures of another simulation, made before this one, to a point."""
    trace = read_trace(Path(__file__).parents[3] / "benchmarks" / "traces" / "olmoe-1b-7b.npy")
    routing = routing_of(trace.ids, trace.experts)
    for policy, share, others in [
        ("belady", 0.0625, 0.417),
        ("lru", 0.0625, 0.0),
        ("lru-by-layer", 0.25, 0.61),
        ("least-stale", 0.25, 0.529),
        ("decayed-16", 0.125, 0.44),
        ("decayed-16", 0.25, 0.63),
        ("decayed-16", 0.5, 0.84),
    ]:
        slots = int(share * sum(trace.experts))
        rate = (POLICIES[policy](routing, [slots]).sum() + (slots if others else 0)) / trace.ids.size
        assert rate == pytest.approx(others, abs=0.01), (policy, share)


def test_synthetic_routing_is_repeatable() -> None:
    """The same seed gives the same ids; each token has distinct experts of its layer."""
    statistics = fitted_models()["qwen1.5-moe"]
    ids = synthetic_routing(statistics, [5, 7], seed=1)
    assert ids.shape == (12, 24, 4)
    assert np.array_equal(ids, synthetic_routing(statistics, [5, 7], seed=1))
    ranked = np.sort(ids, axis=2)
    assert (ranked[:, :, 1:] > ranked[:, :, :-1]).all()
    assert ids.min() >= 0
    assert ids.max() < 60
