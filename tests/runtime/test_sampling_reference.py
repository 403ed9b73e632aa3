"""Every way of sampling against transformers' own logits processors, on the same logits."""

# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pocketmoe.bundle import manifest
from pocketmoe.errors import BadInput
from pocketmoe.runtime.sampling import (
    Sampling,
    authors_sampling,
    make_cuts,
    make_penalties,
    make_sampler,
    probabilities,
)

VOCAB, END = 40, 3
LOGITS = st.lists(st.integers(-400, 400), min_size=VOCAB, max_size=VOCAB, unique=True).map(
    lambda values: np.array(values, np.float32) / 50
)
TEXTS = st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=12)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-2.5, 0.5, 3.0]), max_size=3).map(
            lambda bias: tuple(bias.items())
        ),
        "repetition_penalty": st.sampled_from([0.8, 1.1, 1.5]),
        "no_repeat_ngram": st.integers(2, 3),
        "min_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.7]),
        "top_k": st.integers(1, VOCAB),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 0.99]),
        "min_p": st.sampled_from([0.01, 0.05, 0.3]),
        "typical_p": st.sampled_from([0.2, 0.5, 0.9]),
    },
)


def ours(logits: np.ndarray, text: Sequence[int], prompt: int, sampling: Sampling) -> np.ndarray:
    changed = logits.astype(np.float64)
    for change in make_penalties(sampling, [END]):
        changed = change(changed, text, prompt)
    odds = probabilities(changed, sampling.temperature)
    for cut in make_cuts(sampling):
        odds = cut(odds)
    return odds


def theirs(logits: np.ndarray, text: Sequence[int], prompt: int, given: dict[str, Any]) -> np.ndarray:
    makers = {
        "logit_bias": lambda bias: SequenceBiasLogitsProcessor({(token,): number for token, number in bias}),
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram": NoRepeatNGramLogitsProcessor,
        "min_tokens": lambda least: MinNewTokensLengthLogitsProcessor(prompt, least, torch.tensor([END])),
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
        "typical_p": TypicalLogitsWarper,
    }
    processors = LogitsProcessorList([make(given[name]) for name, make in makers.items() if given.get(name)])
    scores = processors(torch.tensor([list(text)]), torch.tensor(logits[None], dtype=torch.float64))
    return torch.softmax(scores, -1)[0].numpy()


@given(LOGITS, TEXTS, st.integers(1, 3), SETTINGS)
def test_the_odds_are_those_of_transformers(
    logits: np.ndarray, text: list[int], prompt: int, settings: dict[str, Any]
) -> None:
    """Any settings together leave the same tokens, with the same odds; but for a token at the very edge of a share."""
    settings.setdefault("temperature", 1.0)
    expected = theirs(logits, text, prompt, settings)
    shares = [name for name in ("top_p", "min_p", "typical_p") if 0 < settings.get(name, 1) < 1]
    at_edges = [
        ours(logits, text, prompt, Sampling(**{**settings, **{name: settings[name] + by for name in shares}}))
        for by in (0, 1e-12, -1e-12)
    ]
    assert any(
        (found > 0).sum() == (expected > 0).sum() and np.abs(found - expected).max() < 1e-9 for found in at_edges
    )


@given(LOGITS, TEXTS, st.integers(0, 3), st.floats(-2, 2), st.floats(-2, 2))
def test_counts_are_of_the_answer(
    logits: np.ndarray, text: list[int], prompt: int, frequency: float, presence: float
) -> None:
    """OpenAI's formula: frequency times the count, and presence once, for tokens of the answer alone."""
    expected = logits.astype(np.float64)
    for token in set(text[prompt:]):
        expected[token] -= frequency * text[prompt:].count(token) + presence
    changed = logits.astype(np.float64)
    for change in make_penalties(Sampling(frequency_penalty=frequency, presence_penalty=presence)):
        changed = change(changed, text, prompt)
    assert np.allclose(changed, expected, atol=1e-12)


def test_a_sampler_remembers_what_it_chose() -> None:
    """Penalties see the sampler's own choices; an answer has its least tokens before its end; nothing left is said."""
    logits = np.array([0, 3, 2.5, 9], np.float32)
    assert [make_sampler(Sampling(), (), [3])(logits)] == [3]
    sampler = make_sampler(Sampling(min_tokens=2, presence_penalty=1.0), (1,), [3])
    assert [sampler(logits) for _ in range(3)] == [1, 2, 3]
    once = make_sampler(Sampling(no_repeat_ngram=1))
    assert [once(logits) for _ in range(4)] == [3, 1, 2, 0]
    with pytest.raises(BadInput, match="no token"):
        once(logits)


def test_the_authors_way_is_that_of_transformers() -> None:
    """Greedy unless they say `do_sample`, with their penalties; transformers' defaults where they say nothing."""
    assert authors_sampling(None) == Sampling()
    greedy = authors_sampling(manifest.Sampling(temperature=0.7, repetition_penalty=1.2))
    assert greedy == Sampling(repetition_penalty=1.2)
    sampled = authors_sampling(manifest.Sampling(do_sample=True, top_p=0.8))
    assert sampled == Sampling(temperature=1.0, top_p=0.8, top_k=50)


@pytest.mark.parametrize("wrong", [{"top_k": -1}, {"min_p": 1.1}, {"typical_p": 0}, {"repetition_penalty": 0},
                                   {"frequency_penalty": float("nan")}, {"no_repeat_ngram": -1},
                                   {"logit_bias": ((1, float("inf")),)}])  # fmt: skip
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    """Before a model is loaded."""
    with pytest.raises(BadInput):
        Sampling(**wrong)
