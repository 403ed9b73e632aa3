"""The mathematics of comparing two models, against figures worked out by hand and against scipy-free closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from pocketmoe.profiles.quality.divergence import (
    Bootstrap,
    compare_rows,
    negative_log_likelihood,
    shared_share,
)
from pocketmoe.runtime.sampling import log_softmax


def logits_of(*distributions: list[float]) -> np.ndarray:
    """Logits, shifted by a constant per row, whose softmax is the given distributions."""
    logits = np.log(np.array(distributions)) + np.arange(len(distributions))[:, None] * 7.0
    return logits.astype(np.float32)


def test_by_hand() -> None:
    # KL((1/2, 1/4, 1/4) || (1/4, 1/2, 1/4)) = 1/2 ln 2 - 1/4 ln 2 = ln(2) / 4; the second row is the same in both.
    reference = logits_of([0.5, 0.25, 0.25], [0.1, 0.2, 0.7])
    candidate = logits_of([0.25, 0.5, 0.25], [0.1, 0.2, 0.7])
    scores = compare_rows(candidate, reference, np.array([0, 2]))
    np.testing.assert_allclose(scores.kl, [np.log(2) / 4, 0], atol=1e-7)
    np.testing.assert_allclose(scores.nll, [np.log(4), -np.log(0.7)], rtol=1e-6)
    np.testing.assert_allclose(scores.reference_nll, [np.log(2), -np.log(0.7)], rtol=1e-6)
    assert scores.same_top1.tolist() == [False, True]


def test_blocks_of_rows_change_nothing() -> None:
    """More logits than are turned into float64 at a time, against each row by itself."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 5, (2, 50, 70_000)).astype(np.float32)
    targets = rng.integers(0, 70_000, 50)
    whole = compare_rows(a, b, targets)
    rows = [compare_rows(a[row : row + 1], b[row : row + 1], targets[row : row + 1]) for row in range(50)]
    for together, apart in zip(whole, zip(*rows, strict=True), strict=True):
        # numpy may add up a row otherwise where it lies otherwise in memory
        np.testing.assert_allclose(together, np.concatenate(apart), rtol=1e-12)
    np.testing.assert_allclose(whole.nll, negative_log_likelihood(a, targets), rtol=1e-12)


def test_extreme_logits_stay_finite_and_impossible_tokens_count_nothing() -> None:
    logits = np.array([[1e30, 0, -np.inf], [-1e30, -1e30, -np.inf]], np.float32)
    scores = compare_rows(logits, logits, np.array([0, 1]))
    np.testing.assert_allclose(scores.nll, [0, np.log(2)])
    assert scores.kl.tolist() == [0, 0]
    assert np.exp(log_softmax(logits)).sum(axis=1).tolist() == [1, 1]


def test_shared_share() -> None:
    ids = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert shared_share(ids, np.array([[3, 2, 9, 8], [7, 6, 5, 4]])).tolist() == [0.5, 1.0]


def test_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    """For windows of one size the bootstrap must give mean +- 1.96 standard errors."""
    values = np.random.default_rng(1).normal(10, 3, 400)
    estimate = Bootstrap(400).ratio(values, np.ones(400))
    error = 1.96 * values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert estimate.high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_interval_of_a_quantile() -> None:
    values = np.random.default_rng(2).permutation(1000) / 1000.0
    estimate = Bootstrap(1000).quantile(values, np.arange(1000), 0.9)
    error = 1.96 * np.sqrt(0.9 * 0.1 / 1000)  # of a uniform variable's quantile
    assert estimate.value == np.quantile(values, 0.9, method="inverted_cdf")
    assert estimate.low == pytest.approx(0.9 - error, abs=0.2 * error)
    assert estimate.high == pytest.approx(0.9 + error, abs=0.2 * error)


def test_pairing_makes_a_constant_ratio_certain() -> None:
    nll = np.random.default_rng(3).uniform(50, 500, 30)
    estimate = Bootstrap(30).ratio(nll * 0 + 10 * 0.1, np.full(30, 10.0), np.exp)
    assert estimate.low == pytest.approx(estimate.high) == pytest.approx(np.exp(0.1))


def test_one_window_has_no_interval() -> None:
    bootstrap = Bootstrap(1)
    assert bootstrap.ratio(np.array([4.0]), np.array([2.0])).low is None
    assert bootstrap.quantile(np.array([1.0, 2.0]), np.zeros(2, int), 0.99).high is None
