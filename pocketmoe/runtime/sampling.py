"""Choosing the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pocketmoe.errors import BadInput

Sampler = Callable[[np.ndarray], int]


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. `top_p` keeps the likeliest tokens that together have that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


def make_sampler(sampling: Sampling) -> Sampler:
    """A function from logits, float32 [vocab], to a token id. The same seed gives the same choices.

    It raises BadInput for logits that are not numbers; minus infinity rules a token out.
    """
    if sampling.temperature == 0:
        return greedy
    rng = np.random.default_rng(sampling.seed)

    def sample(logits: np.ndarray) -> int:
        greedy(logits)  # refuses what cannot be sampled from
        scaled = logits.astype(np.float64) / sampling.temperature
        odds = np.exp(scaled - scaled.max())
        odds /= odds.sum()
        if sampling.top_p < 1:
            odds = nucleus(odds, sampling.top_p)
        return int(rng.choice(len(odds), p=odds))

    return sample


def greedy(logits: np.ndarray) -> int:
    """The likeliest token of logits, float32 [vocab]. Raises BadInput for logits that are not numbers."""
    best = int(np.argmax(logits))  # the first NaN, where there is one
    if not math.isfinite(logits[best]):
        raise BadInput("the model's output is not a number", "Export or quantize it again; `eval` says how good it is.")
    return best


def nucleus(odds: np.ndarray, top_p: float) -> np.ndarray:
    """Probabilities, float64 [vocab], without the tail beyond `top_p` (Holtzman et al., arXiv 1904.09751)."""
    order = np.argsort(-odds, kind="stable")
    before = np.cumsum(odds[order]) - odds[order]  # the likeliest token always stays
    kept = np.where(before < top_p, odds[order], 0.0)
    result = np.empty_like(odds)
    result[order] = kept / kept.sum()
    return result
