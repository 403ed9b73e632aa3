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

    def __post_init__(self) -> None:
        """Raises BadInput for what is no temperature, probability or seed."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadInput(f"the temperature {self.temperature} is not 0 or above", "0 is greedy, 1 the model's own.")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top-p {self.top_p} is not above 0 and at most 1", "1 leaves nothing out.")
        if self.seed is not None and self.seed < 0:
            raise BadInput(f"the seed {self.seed} is below 0", "Leave it out for another answer each time.")


def make_sampler(sampling: Sampling) -> Sampler:
    """A function from logits, float32 [vocab], to a token id. The same seed gives the same choices.

    It raises BadInput for logits that are not numbers; minus infinity rules a token out.
    """
    if sampling.temperature == 0:
        return greedy
    rng = np.random.default_rng(sampling.seed)

    def sample(logits: np.ndarray) -> int:
        greedy(logits)  # refuses what cannot be sampled from
        below = logits.astype(np.float64) - np.max(logits)
        with np.errstate(over="ignore"):  # a temperature close to 0 leaves the largest alone
            odds = np.exp(below / sampling.temperature)
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
