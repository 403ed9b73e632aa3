"""The cache policy, replayed on traces with a routing of known statistics."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.runtime.cache import ExpertCache
from pocketmoe.store import ExpertId


def routing(tokens: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """A trace, int [tokens, layers, top_k], from logits with a fixed bias, a slow topic and fast noise.

    The shares are those fitted to OLMoE: 0.30 fixed, 0.07 slow (0.981 from token to token), 0.63 fast (0.41).
    """
    rng = np.random.default_rng(1)
    bias, mixing = rng.standard_normal((layers, experts)), rng.standard_normal((layers, experts, 64)) / 8
    slow, fast = rng.standard_normal((layers, 64)), rng.standard_normal((layers, 64))
    trace = np.empty((tokens, layers, top_k), np.int64)
    for token in range(tokens):
        slow = 0.981 * slow + np.sqrt(1 - 0.981**2) * rng.standard_normal(slow.shape)
        fast = 0.41 * fast + np.sqrt(1 - 0.41**2) * rng.standard_normal(fast.shape)
        state = np.sqrt(0.07) * slow + np.sqrt(0.63) * fast
        logits = np.sqrt(0.30) * bias + np.einsum("led,ld->le", mixing, state)
        trace[token] = np.argsort(-logits, axis=1)[:, :top_k]
    return trace


def replay(trace: np.ndarray, experts: int, slots: int) -> float:
    """The share of uses that find their expert resident."""
    tokens, layers, top_k = trace.shape
    cache = ExpertCache(slots, dict.fromkeys(range(layers), experts))
    hits = 0
    for token in range(tokens):
        for layer in range(layers):
            needed = [ExpertId(layer, int(e)) for e in trace[token, layer]]
            cache.count(layer, trace[token, layer][None])
            missing = [expert for expert in needed if cache.slot_of(expert) is None]
            hits += top_k - len(missing)
            keep = set(needed)
            for expert in missing:
                if cache.place(expert, keep) is None:
                    keep.clear()  # what is resident has run by now
                    assert cache.place(expert, keep) is not None
    return hits / trace.size


def least_recently_used(trace: np.ndarray, slots: int) -> float:
    resident: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for token in trace:
        for layer, chosen in enumerate(token):
            for expert in chosen:
                key = (layer, int(expert))
                hits += key in resident
                resident[key] = None
                resident.move_to_end(key)
                if len(resident) > slots:
                    resident.popitem(last=False)
    return hits / trace.size


def test_never_behind_one_recency_list_and_no_cliff() -> None:
    """At 6% to 75% of the experts the policy hits at least as often as one LRU list, which falls to 0 at 6%."""
    trace = routing(tokens=200, layers=16, experts=64, top_k=8)
    for share in (0.06, 0.125, 0.25, 0.5, 0.75):
        slots = int(share * 16 * 64)
        ours, recency = replay(trace, 64, slots), least_recently_used(trace, slots)
        assert ours >= recency - 0.005, (share, ours, recency)
    assert least_recently_used(trace, 61) == 0
    assert replay(trace, 64, 61) > 0.1


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_slots_are_never_shared_or_lost(data: st.DataObject) -> None:
    """Whatever is placed, two experts never have one slot, a kept expert stays, and no slot is lost."""
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    slots = data.draw(st.integers(1, layers * experts + 3))
    cache = ExpertCache(slots, dict.fromkeys(range(layers), experts))
    everyone = [ExpertId(layer, e) for layer in range(layers) for e in range(experts)]
    for _ in range(data.draw(st.integers(1, 40))):
        expert = data.draw(st.sampled_from(everyone))
        if cache.slot_of(expert) is not None:
            if data.draw(st.booleans()):
                cache.forget(expert)
            continue
        keep = set(data.draw(st.lists(st.sampled_from(everyone), max_size=3)))
        before = {e: cache.slot_of(e) for e in everyone}
        slot = cache.place(expert, keep)
        held = [cache.slot_of(e) for e in everyone if cache.slot_of(e) is not None]
        assert len(held) == len(set(held)) <= cache.n_slots
        assert all(0 <= s < cache.n_slots for s in held)
        assert all(cache.slot_of(e) == before[e] for e in keep if e != expert)
        if slot is None:
            assert len(keep) >= 1
        if not keep:
            assert slot is not None
