"""The knapsack against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.quantize.mixed.allocate import BudgetImpossible, Budgets, Option, allocate

option = st.builds(
    Option, st.just("x"), st.integers(1, 50), st.floats(0, 50), st.floats(0, 10), st.sampled_from([None, "a", "b", "c"])
)
parts_of_options = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


def cheapest(parts: list[list[Option]], budgets: Budgets) -> float | None:
    """The least loss of all choices, one by one."""
    losses = [
        sum(o.loss for o in choice)
        for choice in itertools.product(*parts)
        if sum(o.nbytes for o in choice) <= (budgets.nbytes or np.inf)
        and sum(o.fetched_bytes for o in choice) <= (budgets.fetched_bytes or np.inf)
    ]
    return min(losses, default=None)


@given(parts_of_options, st.integers(5, 150))
@settings(max_examples=60, deadline=None)
def test_no_other_choice_loses_less(parts: list[list[Option]], nbytes: int) -> None:
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
