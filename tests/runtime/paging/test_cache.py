"""The cache policy, replayed on traces with a routing of known statistics."""

# pyright: reportOperatorIssue=false, reportOptionalOperand=false

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.store import ExpertId
from pocketmoe.profiles.routing.policies import POLICIES, Routing, drive, routing_of
from pocketmoe.profiles.routing.synthetic import fitted_models, synthetic_routing
from pocketmoe.runtime.paging.cache import ExpertCache
from pocketmoe.runtime.paging.expert_counts import shares, to_load_first
from pocketmoe.runtime.trace import read_trace

TRACES = Path(__file__).parents[3] / "benchmarks" / "traces"
BUDGETS = (0.0625, 0.125, 0.25, 0.5, 0.75)


def routing(model: str, texts: list[int]) -> Routing:
    statistics = fitted_models()[model]
    ids = synthetic_routing(statistics, texts, seed=1)[:, :16]
    return routing_of(ids, [statistics.experts] * ids.shape[1])


@pytest.mark.parametrize(("model", "texts"), [("olmoe", [200]), ("qwen1.5-moe", [80, 80])])
def test_never_behind_recency_and_no_cliff(model: str, texts: list[int]) -> None:
    """At 6% to 75% of the experts as many hits as one recency list, a list per layer, and counts alone; at 6% some."""
    trace = routing(model, texts)
    slots = [int(share * sum(trace.experts.values())) for share in BUDGETS]
    wanted = sum(len(visit.wanted) for visit in trace.visits)
    ours = POLICIES["pocketmoe"](trace, slots).sum(axis=1) / wanted
    assert ours[0] > 0.1
    for other in ("lru", "lru-by-layer", "lfu", "decayed-24"):
        rate = POLICIES[other](trace, slots).sum(axis=1) / wanted
        # A share per layer reads what it does not keep into memory of its own, which counts below one token's experts.
        assert (ours >= rate - (0.025, 0.01, 0.005, 0.005, 0.005)).all(), (other, ours - rate)


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "qwen3-30b-a3b-top6"])
def test_ahead_of_the_others_on_real_traces(name: str) -> None:
    """With a slot for each of a token's experts or more, no other policy has more hits than noise; below, some."""
    trace = read_trace(TRACES / f"{name}.npy")
    routing = routing_of(trace.ids, trace.experts)
    one_token = trace.ids[0].size
    slots = [one_token // 2, one_token, 2 * one_token, 4 * one_token]
    rates = {n: policy(routing, slots).sum(axis=1) / trace.ids.size for n, policy in POLICIES.items()}
    ours, best = rates.pop("pocketmoe"), rates.pop("belady")
    rates.pop("pinned")
    for other, rate in rates.items():
        assert (ours[1:] >= rate[1:] - 0.005).all(), (other, ours - rate)
    assert ours[0] > 0.6 * best[0]


def test_knowing_the_hottest_beforehand_helps_from_the_first_token() -> None:
    """Half filled by the counts of an earlier text: a seventh more hits in another text's first 8 tokens."""
    statistics = fitted_models()["olmoe"]
    ids = synthetic_routing(statistics, [200, 8], seed=2)
    uses = np.stack([np.bincount(ids[:200, layer].ravel(), minlength=64) for layer in range(16)])
    after = routing_of(ids[200:], [64] * 16)
    cold, warm = (ExpertCache(256, after.experts, 64) for _ in range(2))
    share = shares(uses, [8] * 16)
    for layer in range(16):
        warm.expect(layer, share[layer])
    for expert in to_load_first(share, [ExpertId(*divmod(flat, 64)) for flat in range(1024)], 256):
        assert warm.place(expert, ()) is not None
    assert drive(warm, after).sum() > 1.14 * drive(cold, after).sum()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_slots_are_never_shared_or_lost(data: st.DataObject) -> None:
    """Whatever is placed, two experts never have one slot, a kept expert stays, and no slot is lost.

    Nor when there are more slots from then on, or fewer.
    """
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    slots = data.draw(st.integers(1, layers * experts + 3))
    cache = ExpertCache(slots, dict.fromkeys(range(layers), experts))
    everyone = [ExpertId(layer, e) for layer in range(layers) for e in range(experts)]
    numbers = set(range(cache.n_slots))
    for _ in range(data.draw(st.integers(1, 40))):
        if data.draw(st.integers(0, 4)) == 0:
            numbers = resized(cache, numbers, data.draw(st.integers(0, layers * experts + 3)), everyone)
        expert = data.draw(st.sampled_from(everyone))
        if data.draw(st.booleans()):
            cache.count(expert.layer, np.array([[expert.expert]]))
        if cache.slot_of(expert) is not None:
            if data.draw(st.booleans()):
                cache.forget(expert)
            continue
        keep = set(data.draw(st.lists(st.sampled_from(everyone), max_size=3)))
        before = {e: cache.slot_of(e) for e in everyone}
        slot = cache.place(expert, keep)
        held = [cache.slot_of(e) for e in everyone if cache.slot_of(e) is not None]
        assert len(held) == len(set(held)) <= cache.n_slots
        assert numbers >= set(held)
        assert all(cache.slot_of(e) == before[e] for e in keep if e != expert)
        gone = [e for e in everyone if before[e] is not None and cache.slot_of(e) is None]
        assert len(gone) <= 1
        if slot is None:
            assert {e for e in everyone if before[e] is not None} <= keep
            assert len(held) == len(numbers) == cache.n_slots


def resized(cache: ExpertCache, numbers: set[int], wanted: int, everyone: list[ExpertId]) -> set[int]:
    """The slots of a cache that is given `wanted` of them, and had `numbers`: only as many residents go as must."""
    before = {e: slot for e in everyone if (slot := cache.slot_of(e)) is not None}
    gone = cache.resize(wanted)
    after = {e: slot for e in everyone if (slot := cache.slot_of(e)) is not None}
    assert cache.n_slots == min(max(1, wanted), len(everyone))
    assert after.items() <= before.items()
    assert len(after) == min(len(before), cache.n_slots)
    assert len(set(gone)) == len(gone) == max(0, len(numbers) - cache.n_slots)
    left = numbers - set(gone)
    new = set(range(len(everyone))) - left
    return left | set(sorted(new)[: cache.n_slots - len(left)])


def worth(uses: list[tuple[int, int]], layer: int, expert: int, turn: int, n_layers: int) -> float:
    """By the words of the module: `uses` are (layer, expert) of each token that came, one a token."""
    mine = [e for at, e in uses if at == layer]
    share = sum((1 - 0.5 ** (1 / 24)) * 0.5 ** (age / 24) for age, e in enumerate(reversed(mine)) if e == expert)
    rounds = (layer - turn - 1) % n_layers / max(1, n_layers - 1)
    return share + 0.25 * (bool(mine) and mine[-1] == expert) - 0.1 * rounds


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_victim_is_the_resident_of_least_worth(data: st.DataObject) -> None:
    """Out goes the resident outside `keep` whose worth, reckoned from scratch, is least."""
    layers, experts = data.draw(st.integers(1, 3)), 5
    cache = ExpertCache(data.draw(st.integers(1, 8 if layers > 1 else 4)), dict.fromkeys(range(layers), experts))
    everyone = [ExpertId(layer, e) for layer in range(layers) for e in range(experts)]
    uses: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(5, 40))):
        expert = data.draw(st.sampled_from(everyone))
        if data.draw(st.integers(0, 6)) == 0:
            before = {e for e in everyone if cache.slot_of(e) is not None}
            wanted = cache.n_slots + data.draw(st.sampled_from([-1, 1]))
            cache.resize(min(max(1, wanted), len(everyone) - 1))
            worths = {e: worth(uses, *e, layers - 1, layers) for e in before}
            assert all(worths[e] <= min(worths.values()) + 1e-9 for e in before if cache.slot_of(e) is None)
        uses.append(expert)
        cache.count(expert.layer, np.array([[expert.expert]]))
        if cache.slot_of(expert) is not None:
            continue
        keep = {expert, *data.draw(st.lists(st.sampled_from(everyone), max_size=3))}
        before = {e for e in everyone if cache.slot_of(e) is not None}
        cache.place(expert, keep)
        for gone in (e for e in before if cache.slot_of(e) is None):
            worths = {e: worth(uses, *e, expert.layer, layers) for e in before - keep}
            assert worths[gone] <= min(worths.values()) + 1e-9
