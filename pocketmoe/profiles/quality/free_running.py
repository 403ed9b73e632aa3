"""Greedy answers of a bundle and of its reference to the same prompts: where they part, and whether they are any good.

Perplexity and KL on given text never see a model read its own words, nor the path that decodes one token at a time:
a bundle can do well on them and write garbage (llama.cpp issue 4927). So both models answer; the reference then reads
the candidate's answer, which tells a different but likely answer from one that it would not have written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec import field

from pocketmoe.profiles.quality.divergence import Bootstrap, Doubles, Estimate, compare_rows, negative_log_likelihood
from pocketmoe.profiles.quality.models import Model, ends_of
from pocketmoe.profiles.quality.scoring import finite
from pocketmoe.runtime.engine.memory_plan import CHUNK

PROMPT_TOKENS = 32
ANSWER_TOKENS = CHUNK // 2  # so that the logits of two answers take no more than those of a chunk
_GRAM = 4  # tokens; the measure of repetition of Welleck et al., arXiv 1908.04319 (seq-rep-4)


class FreeRunning(msgspec.Struct, frozen=True, kw_only=True):
    """Figures over some prompts; intervals by resampling the prompts. Shares are from 0 to 1.

    The JSON of `eval` has these fields; where it says `surprise` it means negative log-likelihood, by an older word.
    """

    prompts: int
    tokens: int  # of the candidate's answers
    same_tokens: Estimate  # share of the answers' places with the same token
    tokens_until_difference: Estimate  # mean; an answer that is the same throughout counts with its length
    mean_kl_nats: Estimate  # KL(reference || candidate) along the candidate's answer
    repetition: Estimate  # share of the candidate's 4-grams that its answer had before
    excess_repetition: Estimate  # less that of the reference's own answers
    # Mean negative log-likelihood of a token of the candidate's answer, by the reference.
    nll_nats: Estimate = field(name="surprise_nats")
    excess_nll_nats: Estimate = field(name="excess_surprise_nats")  # less that of the reference's own answers


class FreeScores(NamedTuple):
    """What one prompt came to, float64 [1] each: sums, and what they are to be divided by."""

    places: Doubles  # the longer answer's length
    same: Doubles
    until_difference: Doubles
    tokens: Doubles
    kl: Doubles
    nll: Doubles
    grams: Doubles
    repeated: Doubles
    reference_tokens: Doubles
    reference_nll: Doubles
    reference_grams: Doubles
    reference_repeated: Doubles
    seconds: Doubles  # of the candidate's decode steps
    steps: Doubles  # those after the prompt


def choose_prompts(lengths: Sequence[int], count: int, prompt_tokens: int) -> list[tuple[int, int]]:
    """(text, first token) of `count` prompts: texts in turn, spread evenly over each; `lengths` of texts in tokens.

    A text that is shorter than a prompt gives one that is as long as it is.
    """
    shares = [count // len(lengths) + (index < count % len(lengths)) for index in range(len(lengths))]
    return [
        (index, place * max(0, length - prompt_tokens) // share)
        for index, (length, share) in enumerate(zip(lengths, shares, strict=True))
        for place in range(share)
    ]


def answer_both(candidate: Model, reference: Model, prompt: Sequence[int], max_tokens: int) -> FreeScores:
    """Let both answer a prompt greedily, and the reference read the candidate's answer. Raises BadInput."""
    tokens, logits, seconds = _answer(candidate, prompt, max_tokens)
    own, own_logits, _ = _answer(reference, prompt, max_tokens)
    own_nll = negative_log_likelihood(own_logits, np.array(own)).sum()
    del own_logits
    reference.reset()
    read = finite(reference, reference.feed([*prompt, *tokens[:-1]], rows="all"))[len(prompt) - 1 :]
    scores = compare_rows(logits, read, np.array(tokens))
    pairs = [ours == theirs for ours, theirs in zip(tokens, own, strict=False)]
    until = pairs.index(False) if False in pairs else len(pairs)
    figures = (
        *(max(len(tokens), len(own)), sum(pairs), until),
        *(len(tokens), scores.kl.sum(), scores.reference_nll.sum(), *_repetition(tokens)),
        *(len(own), own_nll, *_repetition(own)),
        *(seconds, len(tokens) - 1),
    )
    return FreeScores(*(np.array([figure], np.float64) for figure in figures))


def summarize_answers(answers: Sequence[FreeScores]) -> FreeRunning:
    """The figures of some prompts, at least one."""
    sums = FreeScores(*(np.concatenate(column) for column in zip(*answers, strict=True)))
    bootstrap = Bootstrap(len(answers))
    prompts = np.ones(len(answers))
    grams, reference_grams = np.maximum(sums.grams, 1), np.maximum(sums.reference_grams, 1)
    # Each prompt counts the same in a difference, so that it is paired.
    more_repeated = sums.repeated / grams - sums.reference_repeated / reference_grams
    excess_nll = sums.nll / sums.tokens - sums.reference_nll / sums.reference_tokens
    return FreeRunning(
        prompts=len(answers),
        tokens=int(sums.tokens.sum()),
        same_tokens=bootstrap.ratio(sums.same, sums.places),
        tokens_until_difference=bootstrap.ratio(sums.until_difference, prompts),
        mean_kl_nats=bootstrap.ratio(sums.kl, sums.tokens),
        repetition=bootstrap.ratio(sums.repeated, grams),
        excess_repetition=bootstrap.ratio(more_repeated, prompts),
        nll_nats=bootstrap.ratio(sums.nll, sums.tokens),
        excess_nll_nats=bootstrap.ratio(excess_nll, prompts),
    )


def _answer(engine: Model, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], np.ndarray, float]:
    """Greedy ids up to an end of text, the logits behind each, float32 [ids, vocab], and the seconds of the steps."""
    stop = ends_of(engine)
    engine.reset()
    rows = [finite(engine, engine.feed(prompt))]
    tokens = [int(rows[0].argmax())]
    began = time.perf_counter()
    while tokens[-1] not in stop and len(tokens) < max_tokens:
        rows.append(finite(engine, engine.feed(tokens[-1:])))
        tokens.append(int(rows[-1].argmax()))
    return tokens, np.concatenate(rows), time.perf_counter() - began


def _repetition(tokens: Sequence[int]) -> tuple[int, int]:
    """How many 4-grams there are, and how many of them came before."""
    grams = [tuple(tokens[start : start + _GRAM]) for start in range(len(tokens) - _GRAM + 1)]
    return len(grams), len(grams) - len(set(grams))
