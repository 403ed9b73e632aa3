"""The mathematics of comparing two models on the same text: arrays in, numbers with confidence intervals out.

Perplexity, Kullback-Leibler divergence and top-1 agreement are those that llama.cpp's `perplexity --kl-divergence`
reports. Intervals are by a bootstrap whose blocks are windows of text (Efron 1979; Kuensch 1989): tokens of one window
depend on each other, windows are drawn with replacement. They need some 20 windows to be worth much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pocketmoe.runtime.sampling import log_softmax

Doubles = npt.NDArray[np.float64]

_DRAWS = 1000
_SEED = 0
_BLOCK_VALUES = 1 << 20  # logits turned into float64 at a time


class RowScores(NamedTuple):
    """How a model did on each row, and how far it is from a reference, each [rows]."""

    nll: Doubles  # nats
    reference_nll: Doubles  # nats
    kl: Doubles  # nats, of the reference's distribution from the model's
    same_top1: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% confidence interval; no interval from fewer than two windows."""

    value: float
    low: float | None
    high: float | None


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> Doubles:
    """Of each target, in nats, float64 [rows]. logits: float32 [rows, vocab]; targets: int [rows]."""
    parts = [-log_softmax(logits[rows])[_at(targets[rows])] for rows in _blocks(logits)]
    return np.concatenate(parts)


def compare_rows(candidate: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> RowScores:
    """Both models on the same rows. Logits: float32 [rows, vocab], of both; targets: int [rows]."""
    parts: list[RowScores] = []
    for rows in _blocks(candidate):
        log_q, log_p = log_softmax(candidate[rows]), log_softmax(reference[rows])
        at = _at(targets[rows])
        same = candidate[rows].argmax(axis=1) == reference[rows].argmax(axis=1)
        parts.append(RowScores(-log_q[at], -log_p[at], kl_divergence(log_p, log_q), same))
    return RowScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def kl_divergence(log_p: Doubles, log_q: Doubles) -> Doubles:
    """sum p (log p - log q) in nats, [rows], never below 0; both arguments are log probabilities, [rows, vocab]."""
    p = np.exp(log_p)
    gap = np.subtract(log_p, log_q, out=np.zeros_like(p), where=p > 0)
    return np.maximum(np.einsum("ij,ij->i", p, gap), 0.0)


def shared_share(ids: np.ndarray, other_ids: np.ndarray) -> Doubles:
    """What share of each token's experts is also among the other's, [tokens]; both int [tokens, top_k]."""
    return (ids[:, :, None] == other_ids[:, None, :]).any(axis=2).mean(axis=1)


class Bootstrap:
    """Resamples of one set of windows, the same for every figure, so that ratios of figures are paired."""

    def __init__(self, n_windows: int) -> None:
        """`n_windows` >= 1."""
        rng = np.random.default_rng(_SEED)
        self._counts: npt.NDArray[np.integer] | None = None
        if n_windows > 1:
            self._counts = rng.multinomial(n_windows, np.full(n_windows, 1 / n_windows), size=_DRAWS)

    def ratio(
        self,
        above: np.ndarray,
        below: np.ndarray,
        transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> Estimate:
        """transform(sum of `above` / sum of `below`), each [n_windows]: what each window adds to the two sums."""
        value = float(transform(above.sum() / below.sum()))
        if self._counts is None:
            return Estimate(value, None, None)
        return self._interval(value, transform((self._counts @ above) / (self._counts @ below)))

    def quantile(self, values: np.ndarray, window_of: np.ndarray, share: float) -> Estimate:
        """The least of `values`, [n], that a `share` of them does not exceed; `window_of`: each one's window, [n]."""
        order = np.argsort(values, kind="stable")
        ranked, windows = values[order], window_of[order]
        value = float(ranked[_rank(np.arange(1, len(ranked) + 1), share)])
        if self._counts is None:
            return Estimate(value, None, None)
        draws = [ranked[_rank(np.cumsum(counts[windows]), share)] for counts in self._counts]
        return self._interval(value, np.array(draws))

    @staticmethod
    def _interval(value: float, draws: np.ndarray) -> Estimate:
        low, high = np.quantile(draws, (0.025, 0.975), method="inverted_cdf")
        return Estimate(value, float(low), float(high))


def difference(first: tuple[Doubles, Doubles], second: tuple[Doubles, Doubles]) -> Estimate:
    """The ratio of sums of one set of windows less that of another; each is resampled by itself.

    Both are what each window adds to the sums above and below, [n_windows]. No interval where one has a single window.
    """
    value = float(first[0].sum() / first[1].sum() - second[0].sum() / second[1].sum())
    sizes = [len(first[0]), len(second[0])]
    if min(sizes) < 2:
        return Estimate(value, None, None)
    rng = np.random.default_rng(_SEED)
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS) for n in sizes]
    ratios = [(drawn @ above) / (drawn @ below) for drawn, (above, below) in zip(counts, (first, second), strict=True)]
    low, high = np.quantile(ratios[0] - ratios[1], (0.025, 0.975), method="inverted_cdf")
    return Estimate(value, float(low), float(high))


def _rank(cumulative: np.ndarray, share: float) -> int:
    """The first place where a cumulative count reaches `share` of its total."""
    return int(np.searchsorted(cumulative, float(share * cumulative[-1]) - 1e-9))


def _blocks(logits: np.ndarray) -> Iterator[slice]:
    """Slices of rows, so that float64 copies stay small beside the logits themselves."""
    step = max(1, _BLOCK_VALUES // logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _at(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(targets)), targets
