"""The cache against the words of its module, reckoned anew for each question from everything that ever happened."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.store import ExpertId
from pocketmoe.runtime.paging.cache import ExpertCache, Scoring


class SlowCache:
    """What `ExpertCache` promises of one pool, with a list of all tokens that came in place of running sums."""

    def __init__(self, n_slots: int, experts: dict[int, int], scoring: Scoring) -> None:
        self.everyone = [ExpertId(layer, e) for layer, count in experts.items() for e in range(count)]
        self.n_slots = min(n_slots, len(self.everyone))
        self.judged = scoring
        self.layers = sorted(experts)
        self.tokens: dict[int, list[list[int]]] = {layer: [] for layer in experts}  # choices of each token
        self.expected: dict[int, list[float]] = {layer: [0.0] * 9 for layer in experts}
        self.residents: set[ExpertId] = set()

    def scoring(self, expert: ExpertId) -> float:
        """Its share of recent tokens, and more if its layer's last token chose it."""
        tokens = self.tokens[expert.layer]
        fading = [0.5 ** (age / self.judged.half_life) for age in range(len(tokens) + 1)]
        one = 1 - 0.5 ** (1 / self.judged.half_life)
        share = self.expected[expert.layer][expert.expert] * fading[len(tokens)]
        share += sum(one * fading[age] for age, chosen in enumerate(tokens[::-1]) if expert.expert in chosen)
        return share + self.judged.recency_bonus * (bool(tokens) and expert.expert in tokens[-1])

    def value(self, expert: ExpertId, layer: int) -> float:
        """What its place is scoring when `layer` needs one: less the later its own layer's turn comes."""
        turns = 0
        while self.layers[(self.layers.index(layer) + 1 + turns) % len(self.layers)] != expert.layer:
            turns += 1
        return self.scoring(expert) - self.judged.distance_weight * turns / max(1, len(self.layers) - 1)


@st.composite
def pools(draw: st.DrawFn) -> tuple[ExpertCache, SlowCache]:
    """A pool of some layers, which may be of different sizes, and whose layers may have other pools' experts too."""
    counts = draw(st.dictionaries(st.integers(0, 6), st.integers(1, 5), min_size=1, max_size=4))
    scoring = draw(st.sampled_from([Scoring(), Scoring(2.0, 0.0, 0.0), Scoring(8.0, 0.125, 3.0)]))
    n_slots = draw(st.integers(1, sum(counts.values()) + 2))
    width = draw(st.sampled_from([None, 7]))
    return ExpertCache(n_slots, counts, width, scoring), SlowCache(n_slots, counts, scoring)


def place(cache: ExpertCache, slow: SlowCache, expert: ExpertId, keep: set[ExpertId]) -> None:
    """Place an expert beside some that are kept, and see who went."""
    before = {e: cache.slot_of(e) for e in slow.residents}
    taken = set(before.values())
    slot = cache.place(expert, keep)
    candidates = slow.residents - keep
    if len(slow.residents) < slow.n_slots:
        assert slot not in taken
    elif not candidates:
        assert slot is None
        assert cache.slot_of(expert) is None
        return
    else:
        (gone,) = [e for e in before if cache.slot_of(e) is None]
        assert slot == before[gone]
        assert gone in candidates
        least = min(slow.value(e, expert.layer) for e in candidates)
        assert slow.value(gone, expert.layer) <= least + 1e-9
        slow.residents.remove(gone)
    slow.residents.add(expert)
    assert slot in range(slow.n_slots)
    assert cache.slot_of(expert) == slot


def count(data: st.DataObject, cache: ExpertCache, slow: SlowCache) -> None:
    """Several tokens at once or one, of a layer of the pool or of none of it."""
    layer = data.draw(st.sampled_from([*slow.layers, 99]))
    top_k = data.draw(st.integers(1, 2))
    most = min(len([e for e in slow.everyone if e.layer == layer]) or 5, 5)
    token = st.lists(st.integers(0, most - 1), min_size=min(top_k, most), max_size=min(top_k, most), unique=True)
    chosen = data.draw(st.lists(token, min_size=1, max_size=4))
    cache.count(layer, np.array(chosen))
    if layer in slow.tokens:
        slow.tokens[layer] += chosen


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_does_what_the_slow_model_does(data: st.DataObject) -> None:
    """Whatever is expected, counted, placed and forgotten: the same residents, the victim one of least value."""
    cache, slow = data.draw(pools())
    assert cache.n_slots == slow.n_slots
    for layer in data.draw(st.lists(st.sampled_from([*slow.layers, 99]), unique=True)):
        shares = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=1 + max(e.expert for e in slow.everyone)))
        cache.expect(layer, np.array(shares))
        if layer in slow.expected:
            slow.expected[layer][: len(shares)] = shares
    for _ in range(data.draw(st.integers(1, 25))):
        expert = data.draw(st.sampled_from(slow.everyone))
        if data.draw(st.booleans()):
            count(data, cache, slow)
        if expert not in slow.residents:
            place(cache, slow, expert, set(data.draw(st.lists(st.sampled_from(slow.everyone), max_size=6))))
        elif data.draw(st.booleans()):
            cache.forget(expert)
            slow.residents.remove(expert)
        slots = {e: cache.slot_of(e) for e in slow.everyone if cache.slot_of(e) is not None}
        assert set(slots) == slow.residents
        assert len(set(slots.values())) == len(slots)
        for layer in (*slow.layers, 99):
            mine = {e.expert for e in slow.residents if e.layer == layer}
            assert set(np.flatnonzero(cache.residents(layer)).tolist()) == mine


@pytest.mark.parametrize(
    "scoring", [Scoring(), Scoring(2.0, 0.0, 0.0), Scoring(8.0, 0.125, 3.0), Scoring(4.0, 1.0, 0.5)]
)
def test_a_long_walk_evicts_what_the_slow_model_does(scoring: Scoring) -> None:
    """Some hundred evictions under each weighing, of one seed: what few examples would only find by luck."""
    rng = np.random.default_rng(0)
    counts = {0: 5, 2: 3, 3: 5}
    cache, slow = ExpertCache(6, counts, scoring=scoring), SlowCache(6, counts, scoring)
    for layer in counts:
        shares = rng.random(counts[layer])
        cache.expect(layer, shares)
        slow.expected[layer][: counts[layer]] = shares.tolist()
    for step in range(150):
        layer = list(counts)[step % 3]
        tokens = [rng.choice(counts[layer], 2, replace=False).tolist() for _ in range(int(rng.integers(1, 3)))]
        cache.count(layer, np.array(tokens))
        slow.tokens[layer] += tokens
        expert = ExpertId(layer, int(rng.integers(counts[layer])))
        if expert not in slow.residents:
            place(cache, slow, expert, {slow.everyone[int(i)] for i in rng.integers(0, 13, 3)})


def test_the_first_slots_are_taken_first_and_a_freed_one_again() -> None:
    """Slots are made when they are first taken: those that there are come before others."""
    cache = ExpertCache(3, {0: 5})
    assert [cache.place(ExpertId(0, e), ()) for e in range(2)] == [0, 1]
    cache.forget(ExpertId(0, 0))
    assert [cache.place(ExpertId(0, e), ()) for e in (2, 3)] == [0, 2]


def test_residents_are_as_many_as_the_widest_layer_scores() -> None:
    """One answer a score, for layers of other pools too."""
    cache = ExpertCache(2, {0: 2, 3: 4}, 6)
    cache.place(ExpertId(3, 3), ())
    assert cache.residents(3).tolist() == [False, False, False, True, False, False]
    assert cache.residents(0).tolist() == cache.residents(1).tolist() == [False] * 6
    assert ExpertCache(2, {0: 2, 3: 4}).residents(0).shape == (4,)
    assert cache.residents(1).dtype == bool
    assert ExpertCache(1, {}).n_slots == 0


def test_what_the_constants_are() -> None:
    """A replay of real traces chose them (docs/LOG.md); the policy without arguments has them."""
    assert Scoring() == Scoring(half_life=24.0, recency_bonus=0.25, distance_weight=0.1)
    given_, default = ExpertCache(2, {0: 3, 1: 3}, scoring=Scoring()), ExpertCache(2, {0: 3, 1: 3})
    for cache in (given_, default):
        for layer, chosen in ((0, [[0, 1], [1, 2]]), (1, [[2, 0]]), (0, [[2, 1]])):
            cache.count(layer, np.array(chosen))
        for expert in (ExpertId(0, 1), ExpertId(1, 2), ExpertId(0, 0)):
            cache.place(expert, ())
    assert [given_.residents(layer).tolist() for layer in (0, 1)] == [
        default.residents(layer).tolist() for layer in (0, 1)
    ]
