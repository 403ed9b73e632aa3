"""Whether prefetching pays, and how often predictions are right: the pure parts."""

from __future__ import annotations

import pytest

from pocketmoe.runtime.paging.prefetch import PredictionStats, Trial


@pytest.mark.parametrize(("tried", "left_out"), [(1.0, 2.0), (2.0, 1.0)])
def test_a_trial_keeps_what_was_faster(tried: float, left_out: float) -> None:
    """With it for some steps, without for as many, then the faster way until the next trial; outliers do not decide."""
    trial = Trial(turn=5, rest=7)
    for _ in range(3):
        assert [step(trial, tried) for _ in range(4)] == [True] * 4
        assert step(trial, 100.0)
        assert [step(trial, left_out) for _ in range(4)] == [False] * 4
        assert not step(trial, 0.0)
        assert [step(trial, 1.0) for _ in range(7)] == [tried < left_out] * 7


def step(trial: Trial, seconds: float) -> bool:
    on = trial.on
    trial.note(seconds)
    return on


def test_precision_by_rank_counts_each_place_of_a_prediction() -> None:
    """Layers may predict different numbers of experts; a rank is right as often as the router chose what it named."""
    stats = PredictionStats()
    stats.note([3, 1], [1, 3, 5])
    stats.note([4, 2, 0], [4, 7, 8])
    stats.note([6, 4, 5], [5, 6, 9])
    assert stats.precision_by_rank == [1.0, 0.3333, 0.5]
