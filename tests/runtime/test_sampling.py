"""Choosing tokens: against softmax and the definition of a nucleus, and at the ends of what settings can be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.errors import BadInput
from pocketmoe.runtime.sampling import Sampling, greedy, log_softmax, make_sampler, nucleus

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


def softmax(logits: np.ndarray, temperature: float) -> list[float]:
    """Token by token, in Python's own numbers."""
    top = max(map(float, logits))
    powers = [math.exp((float(logit) - top) / temperature) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def smallest_nucleus(odds: list[float], top_p: float) -> set[int]:
    """The fewest of the likeliest tokens that together have `top_p`; of equals the first."""
    kept: set[int] = set()
    for token in sorted(range(len(odds)), key=lambda token: -odds[token]):
        if math.fsum(odds[other] for other in kept) >= top_p:
            break
        kept.add(token)
    return kept


def by_inversion(odds: list[float], uniform: float) -> int:
    """The token into whose share of [0, 1) a number falls, shares in the order of ids."""
    reached = 0.0
    for token, share in enumerate(odds):
        reached += share
        if uniform < reached:
            return token
    return len(odds) - 1


SETTINGS = [(1.0, 1.0), (0.6, 1.0), (2.5, 1.0), (1.0, 0.5), (0.7, 0.9), (1.3, 0.05)]


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_each_choice_is_the_inverse_of_the_distribution(temperature: float, top_p: float) -> None:
    """One uniform number of the seed's generator a token: what it is mapped to follows from the probabilities alone."""
    logits = np.array([1.5, -0.5, 3.0, -np.inf, 2.9, 0.25, -4.0, 2.0], np.float32)
    odds = softmax(logits, temperature)
    kept = smallest_nucleus(odds, top_p)
    total = math.fsum(odds[token] for token in kept)
    left = [odds[token] / total if token in kept else 0.0 for token in range(len(odds))]
    sample, uniforms = make_sampler(Sampling(temperature, top_p, 7)), np.random.default_rng(7)
    chosen = [sample(logits) for _ in range(2000)]
    assert chosen == [by_inversion(left, uniform) for uniform in uniforms.random(2000)]
    assert set(chosen) <= kept
    expected = {token: 2000 * left[token] for token in kept if left[token]}
    chi_square = sum((chosen.count(token) - count) ** 2 / count for token, count in expected.items())
    assert chi_square < len(expected) + 4 * math.sqrt(2 * len(expected))  # of a fixed seed: no luck in it


@given(LOGITS, st.floats(1e-6, 1))
def test_a_nucleus_is_the_smallest_set_of_the_likeliest(logits: np.ndarray, top_p: float) -> None:
    """What stays keeps its ratios and sums to one, all else gets nothing; one token less would not do."""
    odds = np.array(softmax(logits / 1e3, 1.0))
    found = nucleus(odds, top_p)
    kept = found > 0
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found[kept], odds[kept] / odds[kept].sum(), rtol=1e-9)
    assert odds[kept].min() >= odds[~kept].max(initial=0)
    assert odds[kept].sum() >= top_p - 1e-9
    assert kept.sum() == 1 or odds[kept].sum() - odds[kept].min() < top_p + 1e-9


def test_of_equally_likely_tokens_the_nucleus_takes_the_first() -> None:
    """Ties go to the lower id, at the edge too: what is left out begins where `top_p` is reached, not beyond it."""
    assert nucleus(np.full(4, 0.25), 0.5).tolist() == [0.5, 0.5, 0, 0]
    assert nucleus(np.full(4096, 2**-12), 0.5).argmin() == 2048
    assert nucleus(np.full(4, 0.25), 0.51).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert nucleus(np.array([0.125, 0.5, 0.125, 0.25]), 0.75).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert nucleus(np.array([0.125, 0.5, 0.125, 0.25]), 1e-9).tolist() == [0, 1, 0, 0]


@given(LOGITS, st.integers(0, 1 << 32), st.sampled_from([-64.0, 32.0, 1024.0]))
def test_a_shift_of_all_logits_changes_nothing(logits: np.ndarray, seed: int, shift: float) -> None:
    """Only differences count, in whatever range they are."""
    whole = np.round(logits)  # float32 holds the sums exactly
    settings = Sampling(50.0, 0.9, seed)
    assert make_sampler(settings)(whole) == make_sampler(settings)(whole + np.float32(shift))


def test_a_high_temperature_makes_all_tokens_alike_but_those_ruled_out() -> None:
    """At 1e300 every finite logit is as good as another; minus infinity stays out."""
    logits = np.array([50.0, -50.0, -np.inf, 0.0], np.float32)
    sample, uniforms = make_sampler(Sampling(1e300, seed=3)), np.random.default_rng(3)
    chosen = [sample(logits) for _ in range(300)]
    assert chosen == [(0, 1, 3)[int(3 * uniform)] for uniform in uniforms.random(300)]


def test_without_a_seed_answers_differ_and_without_a_temperature_they_do_not() -> None:
    """Defaults are greedy; a temperature without a seed draws anew each time."""
    logits = np.zeros(1 << 16, np.float32)
    some = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert {make_sampler(Sampling())(some) for _ in range(4)} == {greedy(some)} == {int(np.argmax(some))}
    assert make_sampler(Sampling(seed=5))(logits) == 0  # the first of equals
    assert len({make_sampler(Sampling(1.0))(logits) for _ in range(4)}) > 1


@pytest.mark.parametrize("logits", [[1, math.nan], [math.nan, 9], [math.inf, 0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(logits: list[float], temperature: float) -> None:
    with pytest.raises(BadInput) as refused:
        make_sampler(Sampling(temperature))(np.array(logits, np.float32))
    assert str(refused.value) == "the model's output is not a number"
    assert refused.value.remedy == "Export or quantize it again; `eval` says how good it is."


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"temperature": math.nan}, "the temperature nan is not 0 or above. 0 is greedy, 1 the model's own."),
        ({"temperature": -1}, "the temperature -1 is not 0 or above. 0 is greedy, 1 the model's own."),
        ({"temperature": -1e-9}, "the temperature -1e-09 is not 0 or above. 0 is greedy, 1 the model's own."),
        ({"temperature": math.inf}, "the temperature inf is not 0 or above. 0 is greedy, 1 the model's own."),
        ({"top_p": 0}, "top-p 0 is not above 0 and at most 1. 1 leaves nothing out."),
        ({"top_p": math.nan}, "top-p nan is not above 0 and at most 1. 1 leaves nothing out."),
        ({"top_p": 1.1}, "top-p 1.1 is not above 0 and at most 1. 1 leaves nothing out."),
        ({"seed": -1}, "the seed -1 is below 0. Leave it out for another answer each time."),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float], line: str) -> None:
    """Before a model is loaded, by whatever way they came; the ends of what can be are taken."""
    with pytest.raises(BadInput) as refused:
        Sampling(**wrong)  # type: ignore[arg-type]
    assert refused.value.one_line() == line
    Sampling(temperature=0, top_p=1, seed=0)
    Sampling(top_p=5e-324)


@given(LOGITS, st.data())
def test_only_what_is_allowed_is_chosen(logits: np.ndarray, data: st.DataObject) -> None:
    """By whatever odds, with and without penalties; the likeliest of it where that is greedy."""
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)).filter(any)))
    for temperature, penalty in ((0.0, 0.0), (0.0, 1e-30), (1.5, 0.0)):
        token = make_sampler(Sampling(temperature, seed=1, presence_penalty=penalty))(logits, allowed)
        assert allowed[token]
        if not temperature:
            assert logits[token] == logits[allowed].max()


def test_a_form_comes_before_penalties_and_they_before_nothing() -> None:
    """Where n-grams rule out all that a form allows, its likeliest is chosen; where they rule out all, it is said."""
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    sampling = Sampling(no_repeat_ngram=1)
    assert make_sampler(sampling, [1, 2])(logits, np.array([False, True, True])) == 1
    assert make_sampler(sampling, [1, 2])(logits, np.array([True, True, True])) == 0
    with pytest.raises(BadInput) as refused:
        make_sampler(sampling, [0, 1, 2])(logits)
    assert str(refused.value) == "the penalties leave no token to choose"
    assert refused.value.remedy == "Use weaker ones, or longer n-grams."


@given(LOGITS, st.floats(-1e3, 1e3, width=32))
def test_log_probabilities(logits: np.ndarray, shift: float) -> None:
    """In float64, of odds that add up to one, whatever is added to all; of each row by itself."""
    found = log_softmax(logits)
    assert found.dtype == np.float64
    expected = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    assert np.allclose(found, expected, rtol=1e-12, atol=1e-9)
    assert math.isclose(math.fsum(np.exp(found)), 1, rel_tol=1e-9)
    rows = np.stack([logits.astype(np.float64) + shift, -logits.astype(np.float64)])
    assert np.allclose(log_softmax(rows)[0], found, atol=1e-6)
    assert np.allclose(log_softmax(rows)[1], log_softmax(rows[1]))


MOST = 1e6
REFUSED = {
    ("repetition_penalty", 0.0): ("the repetition penalty 0.0 is not above 0", "1 changes nothing."),
    ("repetition_penalty", MOST * 1.01): ("the repetition penalty 1010000.0 is not above 0", "1 changes nothing."),
    ("frequency_penalty", math.nan): ("a penalty or bias is no number that can be reckoned with", "0 changes nothing."),
    ("presence_penalty", -MOST * 1.01): (
        "a penalty or bias is no number that can be reckoned with",
        "0 changes nothing.",
    ),
    ("logit_bias", ((3, math.inf),)): (
        "a penalty or bias is no number that can be reckoned with",
        "0 changes nothing.",
    ),
    ("top_k", -1): ("top_k -1 is below 0", "0 changes nothing."),
    ("no_repeat_ngram", -2): ("no_repeat_ngram -2 is below 0", "0 changes nothing."),
    ("min_tokens", -1): ("min_tokens -1 is below 0", "0 changes nothing."),
}


@pytest.mark.parametrize(("setting", "said"), REFUSED.items(), ids=lambda pair: str(pair[0]))
def test_what_is_refused_is_named_with_its_remedy(setting: tuple[str, object], said: tuple[str, str]) -> None:
    with pytest.raises(BadInput) as refused:
        Sampling(**{setting[0]: setting[1]})  # pyright: ignore[reportArgumentType]
    assert (str(refused.value), refused.value.remedy) == said


def test_the_ends_of_what_is_allowed() -> None:
    """The largest penalties, and those that change nothing."""
    most = Sampling(repetition_penalty=MOST, frequency_penalty=-MOST, presence_penalty=MOST, logit_bias=((0, -MOST),))
    assert most.repetition_penalty == MOST
    assert Sampling(top_k=0, no_repeat_ngram=0, min_tokens=0, frequency_penalty=0.0) == Sampling()
