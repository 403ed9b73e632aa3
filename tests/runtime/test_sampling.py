"""Choosing tokens, at the ends of what its settings can be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.errors import BadInput
from pocketmoe.runtime.sampling import Sampling, make_sampler

LOGITS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=50, unique=True).map(
    lambda values: np.array(values, np.float32)
)


@given(LOGITS, st.sampled_from([5e-324, 1e-300, 1e-45]), st.integers(0, 1 << 64))
def test_a_temperature_close_to_nothing_is_greedy(logits: np.ndarray, temperature: float, seed: int) -> None:
    """The largest logit is chosen however small the temperature is, and however far apart logits are."""
    assert make_sampler(Sampling(temperature, seed=seed))(logits) == int(np.argmax(logits))


@given(LOGITS, st.floats(0.1, 1e3), st.floats(1e-9, 1), st.integers(0, 1 << 64))
def test_a_choice_is_a_token_and_the_same_again(
    logits: np.ndarray, temperature: float, top_p: float, seed: int
) -> None:
    """Any settings choose one of the tokens, and the same seed chooses it again."""
    sampling = Sampling(temperature, top_p, seed)
    first, again = make_sampler(sampling)(logits), make_sampler(sampling)(logits)
    assert 0 <= first == again < len(logits)


@pytest.mark.parametrize("wrong", [{"temperature": math.nan}, {"temperature": -1}, {"temperature": math.inf},
                                   {"top_p": 0}, {"top_p": math.nan}, {"top_p": 1.1}, {"seed": -1}])  # fmt: skip
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    """Before a model is loaded, by whatever way they came."""
    with pytest.raises(BadInput):
        Sampling(**wrong)  # type: ignore[arg-type]
