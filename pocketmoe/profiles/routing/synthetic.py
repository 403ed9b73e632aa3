"""Routing traces with the statistics of real models, where no trace of the model itself is at hand.

    logit[t, l, e] = sqrt(fixed) B[l, e] + W[l, e] . u[t, l]        u = sqrt(slow) S + sqrt(fast) F

B and W are the model: standard normal, and normal with variance 1/64. S and F in R^64 are the text: each forgets a
little from token to token, and what is new in it is alike in neighbouring layers. The largest top_k logits are chosen.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

_STATISTICS = Path(__file__).with_name("routing.toml")
_WIDTH = 64  # of S and F
_LIKENESS = 0.95  # correlation with the layer before; predicting the next layer's router then recalls .80


@dataclass(frozen=True)
class RoutingStatistics:
    """A router's shape and statistics; the fields are explained in routing.toml."""

    experts: int
    top_k: int
    layers: int
    fixed: float
    slow: float
    fast: float
    slow_kept: float
    fast_kept: float
    model_types: tuple[str, ...] = ()
    shared_experts: bool = False


@cache
def fitted_models() -> dict[str, RoutingStatistics]:
    """The models whose statistics are known, by name."""
    with open(_STATISTICS, "rb") as file:
        return {name: RoutingStatistics(**fields) for name, fields in tomllib.load(file).items()}


def synthetic_routing(model: RoutingStatistics, text_tokens: Sequence[int], seed: int = 0) -> np.ndarray:
    """Expert ids, int16 [sum of text_tokens, layers, top_k], of texts of these lengths one after the other.

    A new text draws S anew; the model, B and W, is the same throughout and depends on the seed alone.
    """
    rng = np.random.default_rng(seed)
    bias = np.sqrt(model.fixed) * rng.standard_normal((model.layers, model.experts), np.float32)
    mixing = rng.standard_normal((model.layers, model.experts, _WIDTH), np.float32) / np.sqrt(_WIDTH)
    slow = np.concatenate([_fading(rng, model.slow_kept, length, model.layers) for length in text_tokens])
    fast = _fading(rng, model.fast_kept, len(slow), model.layers)
    state = np.sqrt(model.slow) * slow + np.sqrt(model.fast) * fast
    ids = np.empty((len(state), model.layers, model.top_k), np.int16)
    for layer in range(model.layers):
        logits = bias[layer] + state[:, layer] @ mixing[layer].T
        ids[:, layer] = np.argpartition(-logits, model.top_k - 1, axis=1)[:, : model.top_k]
    return ids


def _fading(rng: np.random.Generator, kept: float, tokens: int, layers: int) -> np.ndarray:
    """float32 [tokens, layers, _WIDTH], each value standard normal; `kept`: correlation of a token with the next."""
    innovations = rng.standard_normal((tokens, layers, _WIDTH), np.float32)
    for layer in range(1, layers):
        own = np.sqrt(1 - _LIKENESS**2) * innovations[:, layer]
        innovations[:, layer] = _LIKENESS * innovations[:, layer - 1] + own
    for token in range(1, tokens):
        innovations[token] = kept * innovations[token - 1] + np.sqrt(1 - kept**2) * innovations[token]
    return innovations
