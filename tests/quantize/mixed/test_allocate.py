"""The knapsack against trying everything, and what it does about kinds against trying its rule on that."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.quantize.mixed.allocate import BudgetImpossible, Budgets, Option, allocate

option = st.builds(
    Option, st.just("x"), st.integers(1, 50), st.floats(0, 50), st.floats(0, 10), st.sampled_from([None, "a", "b", "c"])
)
parts_of_options = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


def fits(choice: Sequence[Option], budgets: Budgets) -> bool:
    """Both budgets, the second one to what float64 can tell."""
    nbytes, fetched = sum(o.nbytes for o in choice), sum(o.fetched_bytes for o in choice)
    within = budgets.fetched_bytes is None or fetched <= budgets.fetched_bytes * (1 + 1e-9)
    return within and (budgets.nbytes is None or nbytes <= budgets.nbytes)


def ranked(parts: list[list[Option]], budgets: Budgets) -> list[tuple[Option, ...]]:
    """All choices that fit, the least loss first."""
    fitting = (choice for choice in itertools.product(*parts) if fits(choice, budgets))
    return sorted(fitting, key=lambda choice: sum(o.loss for o in choice))


def cheapest(parts: list[list[Option]], budgets: Budgets) -> float | None:
    """The least loss of all choices, one by one."""
    return next((sum(o.loss for o in choice) for choice in ranked(parts, budgets)), None)


@given(parts_of_options, st.integers(5, 150))
@settings(max_examples=60, deadline=None)
def test_no_other_choice_loses_less(parts: list[list[Option]], nbytes: int) -> None:
    """Within a thousandth; where nothing fits, what is named is what the smallest options take."""
    best = cheapest(parts, Budgets(nbytes))
    if best is None:
        with pytest.raises(BudgetImpossible) as caught:
            allocate(parts, Budgets(nbytes), most_kinds=9)
        assert caught.value.least_bytes == sum(min(o.nbytes for o in options) for options in parts)
        return
    chosen = allocate(parts, Budgets(nbytes), most_kinds=9)
    assert sum(o.nbytes for o in chosen) <= nbytes
    assert all(o in options for o, options in zip(chosen, parts, strict=True))
    assert sum(o.loss for o in chosen) <= best * 1.002 + 1e-6


def test_the_second_budget_binds_too() -> None:
    """Large and rare against large and often: what is fetched decides between parts that are the same on disk."""
    often = [Option("2", 20, 20.0, 1.0), Option("8", 80, 80.0, 0.0)]
    rare = [Option("2", 20, 2.0, 1.0), Option("8", 80, 8.0, 0.0)]
    assert [o.label for o in allocate([often, rare], Budgets(None, 30.0), 9)] == ["2", "8"]
    assert [o.label for o in allocate([often, rare], Budgets(60, 300.0), 9)] == ["2", "2"]
    with pytest.raises(BudgetImpossible) as caught:
        allocate([often, rare], Budgets(None, 10.0), 9)
    assert caught.value.least_fetched_bytes == 22.0


costly = st.builds(  # smaller loses more, so that each is worth having; what is fetched goes another way
    lambda size, rarity, kind: Option(kind, size, size * rarity / 8, 1000 / size, kind),
    st.integers(10, 60),
    st.integers(0, 8),
    st.sampled_from(["a", "b", "c", "d"]),
)


@given(st.lists(st.lists(costly, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(10, 250), st.data())
@settings(max_examples=60, deadline=None)
def test_both_budgets_are_kept_and_nothing_better_fits(
    parts: list[list[Option]], nbytes: int, data: st.DataObject
) -> None:
    """Each of the two, neither, or both may be given."""
    fetched = data.draw(st.sampled_from([None, 0.0, 10.0, 40.0, 100.0]))
    budgets = Budgets(data.draw(st.sampled_from([None, nbytes])), fetched)
    wanted = ranked([_undominated(options) for options in parts], budgets)
    if not wanted:
        with pytest.raises(BudgetImpossible):
            allocate(parts, budgets, 9)
        return
    chosen = allocate(parts, budgets, 9)
    assert fits(chosen, budgets)
    assert sum(o.loss for o in chosen) <= sum(o.loss for o in wanted[0]) * 1.002


def _undominated(options: list[Option]) -> list[Option]:
    """Those that no other beats in bytes and loss both: by what is fetched alone, none is kept."""
    return [
        o
        for o in options
        if not any(
            (p.nbytes, p.loss) != (o.nbytes, o.loss) and p.nbytes <= o.nbytes and p.loss <= o.loss for p in options
        )
    ]


def by_rule(parts: list[list[Option]], budgets: Budgets, most_kinds: int) -> list[list[tuple[Option, ...]]]:
    """What is best in each round, and what comes second, until few enough kinds are left."""
    smallest = {min(options, key=lambda o: o.nbytes).kind for options in parts}
    rounds, gone = [], set()
    while True:
        rounds.append(ranked([[o for o in options if o.kind not in gone] for options in parts], budgets)[:2])
        used = Counter(o.kind for o in rounds[-1][0] if o.kind is not None) if rounds[-1] else Counter()
        if len(used) <= most_kinds:
            return rounds
        may_go = [kind for kind in used if kind not in smallest] or list(used)
        gone.add(min(may_go, key=lambda kind: (used[kind], kind)))


def well_apart(rounds: list[list[tuple[Option, ...]]]) -> bool:
    """Whether what comes second in each round is worse by more than the solver's gap."""
    losses = [[sum(o.loss for o in choice) for choice in choices] for choices in rounds]
    return all(len(found) < 2 or found[1] > 1.003 * found[0] for found in losses)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("most_kinds", [1, 2, 3])
def test_the_kind_that_fewest_parts_chose_goes_until_few_are_left(seed: int, most_kinds: int) -> None:
    """Of equals the first by name; a kind that is some part's smallest option goes last of all."""
    rng = np.random.default_rng(seed)
    sizes = {"a": 10, "b": 14, "c": 20, "d": 26, "e": 40}
    while True:
        parts = []
        for _ in range(5):
            kinds = ["a", *rng.choice(list("bcde"), 3, replace=False).tolist()]
            losses = [float(rng.uniform(0.8, 1.2)) * 100 / sizes[kind] ** 2 for kind in kinds]
            parts.append([Option(k, sizes[k], 1.0, loss, k) for k, loss in zip(kinds, losses, strict=True)])
        budgets = Budgets(int(rng.integers(60, 180)))
        rounds = by_rule(parts, budgets, most_kinds)
        if well_apart(rounds):
            break
    assert allocate(parts, budgets, most_kinds) == list(rounds[-1][0])


def test_kinds_that_do_not_matter_are_not_counted() -> None:
    """Options without a kind stay whatever is dropped, and the labels are the caller's."""
    mixed = [[Option("n", 10, 1.0, 1.0), Option("k", 20, 1.0, 0.5, "k")], [Option("j", 10, 1.0, 1.0, "j")]]
    assert [o.label for o in allocate(mixed, Budgets(100), 1)] == ["n", "j"]
    assert [o.label for o in allocate(mixed, Budgets(100), 2)] == ["k", "j"]
    plain = [[Option("x", 10, 1.0, 1.0), Option("y", 20, 1.0, 0.5)]] * 3
    assert [o.label for o in allocate(plain, Budgets(50), 0)].count("y") == 2


def test_of_options_of_one_size_the_one_that_loses_least_and_of_equals_the_smaller() -> None:
    same = [Option("worse", 10, 1.0, 2.0), Option("better", 10, 1.0, 1.0), Option("larger", 11, 0.0, 1.0)]
    assert [o.label for o in allocate([same], Budgets(), 9)] == ["better"]
    nothing = [Option("zero", 0, 0.0, 0.0), Option("more", 1, 0.0, 0.0)]
    assert [o.label for o in allocate([nothing, nothing], Budgets(0, 0.0), 9)] == ["zero", "zero"]


def test_large_models_are_solved_to_the_byte() -> None:
    """Hundreds of gigabytes, of which one byte is over: numbers that a solver dislikes are made small for it."""
    big = 200 * 10**9
    parts = [[Option("s", big, 1e9, 3.0), Option("l", 2 * big, 2e9, 1.0)] for _ in range(3)]
    assert [o.label for o in allocate(parts, Budgets(4 * big, 9e9), 9)].count("l") == 1
    with pytest.raises(BudgetImpossible) as caught:
        allocate(parts, Budgets(2 * big), 9)
    assert (caught.value.least_bytes, caught.value.least_fetched_bytes) == (3 * big, 3e9)
    assert caught.value.args == (3 * big, 3e9)


def test_few_kinds_are_kept_and_the_budget_with_them() -> None:
    rng = np.random.default_rng(0)
    sizes = {"a": 10, "b": 14, "c": 20, "d": 26, "e": 40}
    parts = [
        [Option(kind, size, size, float(rng.random() / size), kind) for kind, size in sizes.items()] for _ in range(200)
    ]
    free = allocate(parts, Budgets(4000), most_kinds=5)
    few = allocate(parts, Budgets(4000), most_kinds=2)
    assert len({o.kind for o in free}) > 2
    assert len({o.kind for o in few}) == 2
    assert sum(o.nbytes for o in few) <= 4000
    assert sum(o.loss for o in free) <= sum(o.loss for o in few) < 2 * sum(o.loss for o in free)
