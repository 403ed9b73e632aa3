"""Free-running answers: by hand, and against a model that is fine on given text but writes garbage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.quality.free_running import FreeScores, answer_both, choose_prompts, summarize_answers
from pocketmoe.profiles.quality.gate import judge
from pocketmoe.profiles.quality.quality import Slice, evaluate
from pocketmoe.profiles.quality.scoring import Engine

VOCAB = 5
TEXT = "The quick brown fox jumps over the lazy dog; Zürich, naïve, 12345 mixtures of experts. " * 8


class Scripted:
    """An engine's twin whose next token is `table` of the last one, with certainty `odds`; token 4 ends a text."""

    def __init__(self, table: dict[int, int], odds: float) -> None:
        self.table, self.odds = table, odds
        self.about = self  # as of a reference that is no bundle
        self.eos_token_ids = (4,)
        self.fed: list[int] = []

    def reset(self) -> None:
        self.fed = []

    def feed(self, tokens: list[int], rows: str = "last") -> np.ndarray:
        self.fed += tokens
        logits = np.full((len(tokens), VOCAB), np.log((1 - self.odds) / (VOCAB - 1)), np.float32)
        logits[np.arange(len(tokens)), [self.table[token] for token in tokens]] = np.log(self.odds)
        return logits if rows == "all" else logits[-1:]


def answered(candidate: Scripted, reference: Scripted, prompt: list[int], max_tokens: int) -> FreeScores:
    return answer_both(candidate, reference, prompt, max_tokens)  # type: ignore[arg-type]


def test_by_hand() -> None:
    """The candidate goes 1 2 3 1 2 3 ..., the reference 1 2 3 and ends: the same for three tokens of nine."""
    circle, ending = {0: 1, 1: 2, 2: 3, 3: 1, 4: 0}, {0: 1, 1: 2, 2: 3, 3: 4, 4: 0}
    found = answered(Scripted(circle, 0.6), Scripted(ending, 0.6), [4, 0], 9)
    assert (found.places, found.same, found.until_difference) == (9, 3, 3)
    assert (found.tokens, found.reference_tokens) == (9, 4)
    assert (found.grams, found.repeated) == (6, 3)  # 1231 2312 3123, each twice
    assert (found.reference_grams, found.reference_repeated) == (1, 0)
    assert found.reference_nll == pytest.approx(4 * -np.log(0.6), rel=1e-6)
    # The reference does not expect the two steps from 3 to 1, and agrees on all others.
    assert found.nll == pytest.approx(7 * -np.log(0.6) + 2 * -np.log(0.1), rel=1e-6)
    assert found.kl == pytest.approx(2 * (0.6 - 0.1) * np.log(0.6 / 0.1), rel=1e-6)
    figures = summarize_answers([found, found])
    assert figures.same_tokens.value == pytest.approx(1 / 3)
    assert figures.excess_repetition.value == pytest.approx(0.5)
    assert figures.excess_nll_nats.value == pytest.approx(2 / 9 * np.log(6), rel=1e-6)


def test_prompts_are_spread_over_the_texts() -> None:
    assert choose_prompts([100, 40], 5, 10) == [(0, 0), (0, 30), (0, 60), (1, 0), (1, 15)]
    assert choose_prompts([5, 8, 9], 2, 10) == [(0, 0), (1, 0)]
    assert choose_prompts([100], 0, 10) == []


def test_a_bundle_answers_as_itself(tiny_bundle: Callable[[str], Bundle]) -> None:
    bundle = tiny_bundle("olmoe")
    report = evaluate(bundle, [Slice("one", TEXT)], reference=bundle, window=64, max_tokens=65, free_prompts=2)
    found = report.overall.free_running
    assert found is not None
    assert found.prompts == 2
    assert found.same_tokens.value == 1
    assert found.tokens_until_difference.value == found.tokens / 2
    assert found.mean_kl_nats.value < 1e-9
    assert found.excess_repetition.value == 0
    assert abs(found.excess_nll_nats.value) < 1e-6
    assert [verdict.passed for verdict in judge(report)] == [True] * 4


def test_garbage_although_perplexity_is_fine(
    tiny_bundle: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in llama.cpp's issue 4927: the path that decodes one token at a time is broken in the candidate alone."""
    bundle = tiny_bundle("olmoe")
    whole = Engine.feed
    first: list[Engine] = []

    def feed(self: Engine, tokens: list[int], rows: str = "last") -> np.ndarray:
        first.extend([self] if not first else [])  # the candidate is fed first
        logits = whole(self, tokens, rows)  # type: ignore[arg-type]
        if self is first[0] and len(tokens) == 1 and rows == "last":
            return np.roll(20 * logits, 1 + self.length, axis=1)
        return 20 * logits  # a random model is sure of nothing: this one is

    monkeypatch.setattr(Engine, "feed", feed)
    slices = [Slice("one", TEXT)]
    report = evaluate(bundle, slices, reference=bundle, window=64, max_tokens=129, free_prompts=4)
    divergence = report.overall.divergence
    assert divergence is not None
    assert divergence.perplexity_ratio.value == pytest.approx(1)
    assert divergence.mean_kl_nats.value < 1e-6
    broken = [verdict for verdict in judge(report) if not verdict.passed]
    assert [verdict.metric for verdict in broken] == ["free_kl", "free_excess_surprise"]
