"""Choosing the next token from logits.

In this order, each where it is asked for, as transformers has it:

1. what changes logits: bias, repetition penalty (tokens of prompt and answer), frequency and presence penalty (of the
   answer), no repeated n-gram (in prompt and answer), no end before the least number of tokens; then what a grammar
   does not allow is ruled out, and where these leave nothing that it allows, they do not count for this token;
2. temperature 0 takes the likeliest now; any other divides the logits;
3. what cuts off unlikely tokens, each from what the one before has left: top-k, top-p, min-p, typical;
4. a draw by what is left.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pocketmoe.bundle import manifest
from pocketmoe.errors import BadInput

Cut = Callable[[np.ndarray], np.ndarray]  # odds, float64 [vocab], to odds without some of them
# Logits, float64 [vocab], which may be changed in place; prompt and answer so far; how many of them are the prompt.
Penalty = Callable[[np.ndarray, Sequence[int], int], np.ndarray]

_MOST_PENALTY = 1e6
_TRANSFORMERS_TOP_K = 50


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. The other defaults leave everything as it is. See the module for their order."""

    temperature: float = 0.0
    top_p: float = 1.0  # the likeliest tokens that together have that probability
    seed: int | None = None
    top_k: int = 0  # the k likeliest tokens
    min_p: float = 0.0  # tokens at least so probable as that share of the likeliest
    typical_p: float = 1.0  # tokens whose -log p is closest to the entropy, together of that probability
    repetition_penalty: float = 1.0  # above 1: against every token of the text so far, once
    frequency_penalty: float = 0.0  # taken from a token's logit for each time that the answer has it
    presence_penalty: float = 0.0  # taken once
    no_repeat_ngram: int = 0  # no n tokens in a row twice
    min_tokens: int = 0  # before the answer may end
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)

    def __post_init__(self) -> None:
        """Raises BadInput for what is no temperature, probability, penalty or seed."""
        self._refuse_odd_shares()
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadInput(f"the temperature {self.temperature} is not 0 or above", "0 is greedy, 1 the model's own.")
        if self.seed is not None and self.seed < 0:
            raise BadInput(f"the seed {self.seed} is below 0", "Leave it out for another answer each time.")
        if not 0 < self.repetition_penalty <= _MOST_PENALTY:
            raise BadInput(f"the repetition penalty {self.repetition_penalty} is not above 0", "1 changes nothing.")
        numbers = (self.frequency_penalty, self.presence_penalty, *(value for _, value in self.logit_bias))
        if not all(abs(number) <= _MOST_PENALTY for number in numbers):
            raise BadInput("a penalty or bias is no number that can be reckoned with", "0 changes nothing.")
        for name in ("top_k", "no_repeat_ngram", "min_tokens"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name} {getattr(self, name)} is below 0", "0 changes nothing.")

    def _refuse_odd_shares(self) -> None:
        for name, value in (("top-p", self.top_p), ("typical-p", self.typical_p)):
            if not 0 < value <= 1:
                raise BadInput(f"{name} {value} is not above 0 and at most 1", "1 leaves nothing out.")
        if not 0 <= self.min_p <= 1:
            raise BadInput(f"min-p {self.min_p} is not between 0 and 1", "0 leaves nothing out.")


def authors_sampling(authors: manifest.Sampling | None) -> Sampling:
    """How a model's authors sample, by the defaults of transformers where they say nothing: greedy, unless they say so.

    Penalties hold either way, as they do there.
    """
    if authors is None:
        return Sampling()
    always = Sampling(
        repetition_penalty=authors.repetition_penalty or 1.0, no_repeat_ngram=authors.no_repeat_ngram_size or 0
    )
    if not authors.do_sample:
        return always
    return replace(
        always,
        temperature=1.0 if authors.temperature is None else authors.temperature,
        top_k=_TRANSFORMERS_TOP_K if authors.top_k is None else authors.top_k,
        top_p=_share(authors.top_p),
        min_p=authors.min_p or 0.0,
        typical_p=_share(authors.typical_p),
    )


def _share(given: float | None) -> float:
    """A share to keep, of which nothing is not one."""
    return 1.0 if given is None else max(given, sys.float_info.epsilon)


def make_sampler(sampling: Sampling, prompt: Sequence[int] = (), ends: Sequence[int] = ()) -> Sampler:
    """What chooses an answer's tokens after a prompt. `ends`: the ids that end a text."""
    return Sampler(sampling, prompt, ends)


class Sampler:
    """A function from logits, float32 [vocab], to a token id. The same seed gives the same choices.

    It remembers what it chose, for the penalties.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], ends: Sequence[int]) -> None:
        self._temperature = sampling.temperature
        self._penalties, self._cuts = make_penalties(sampling, ends), make_cuts(sampling)
        self._rng = np.random.default_rng(sampling.seed)
        self._text, self._prompt = [*prompt], len(prompt)

    def __call__(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> int:
        """The next token, of those that are `allowed`, bool [vocab]; None: of all.

        Raises BadInput for logits that are not numbers; minus infinity rules a token out.
        """
        greedy(logits)  # refuses what cannot be sampled from
        chosen_from = self._penalized(logits, allowed)
        if self._temperature == 0:
            token = greedy(chosen_from)
        else:
            odds = probabilities(chosen_from, self._temperature)
            for cut in self._cuts:
                odds = cut(odds)
            token = int(self._rng.choice(len(odds), p=odds))
        self.note([token])
        return token

    def note(self, tokens: Sequence[int]) -> None:
        """These are the answer's next tokens, which nobody had to choose."""
        self._text += tokens

    def _penalized(self, logits: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
        """Logits after what changes them; minus infinity for what is not allowed."""
        changed = logits
        if self._penalties:
            changed = logits.astype(np.float64)
            for change in self._penalties:
                changed = change(changed, self._text, self._prompt)
        if allowed is not None:
            changed = _only(changed, allowed)
            if not np.isfinite(changed.max()):  # penalties rule out all that the grammar allows, which comes first
                changed = _only(logits, allowed)
        if not np.isfinite(changed.max()):
            raise BadInput("the penalties leave no token to choose", "Use weaker ones, or longer n-grams.")
        return changed


def _only(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    return np.where(allowed, logits, -np.inf)


def greedy(logits: np.ndarray) -> int:
    """The likeliest token of logits, float [vocab]. Raises BadInput for logits that are not numbers."""
    best = int(np.argmax(logits))  # the first NaN, where there is one
    if not math.isfinite(logits[best]):
        raise BadInput("the model's output is not a number", "Export or quantize it again; `eval` says how good it is.")
    return best


def make_penalties(sampling: Sampling, ends: Sequence[int] = ()) -> list[Penalty]:
    """What changes logits, in order; only what changes anything."""
    found: list[tuple[bool, Penalty]] = [
        (bool(sampling.logit_bias), bias(sampling.logit_bias)),
        (sampling.repetition_penalty != 1, penalize_repetition(sampling.repetition_penalty)),
        (
            bool(sampling.frequency_penalty or sampling.presence_penalty),
            penalize_counts(sampling.frequency_penalty, sampling.presence_penalty),
        ),
        (sampling.no_repeat_ngram > 0, forbid_repeated_ngrams(sampling.no_repeat_ngram)),
        (sampling.min_tokens > 0, forbid_early_end(sampling.min_tokens, ends)),
    ]
    return [penalty for wanted, penalty in found if wanted]


def make_cuts(sampling: Sampling) -> list[Cut]:
    """What cuts off unlikely tokens, in order; only what cuts off anything."""
    found: list[tuple[bool, Cut]] = [
        (sampling.top_k > 0, lambda odds: top_k(odds, sampling.top_k)),
        (sampling.top_p < 1, lambda odds: nucleus(odds, sampling.top_p)),
        (sampling.min_p > 0, lambda odds: min_p(odds, sampling.min_p)),
        (sampling.typical_p < 1, lambda odds: typical(odds, sampling.typical_p)),
    ]
    return [cut for wanted, cut in found if wanted]


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The softmax of logits, float64 [vocab]."""
    below = logits.astype(np.float64) - np.max(logits)
    with np.errstate(over="ignore"):  # a temperature close to 0 leaves the largest alone
        odds = np.exp(below / temperature)
    return odds / odds.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log probabilities of logits, float [..., vocab], in nats, float64 [..., vocab]; the sums are in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def top_k(odds: np.ndarray, k: int) -> np.ndarray:
    """Probabilities, float64 [vocab], of the k likeliest tokens, and of what is as likely as the last of them."""
    if k >= len(odds):
        return odds
    return _kept(odds, odds >= np.partition(odds, -k)[-k])


def nucleus(odds: np.ndarray, top_p: float) -> np.ndarray:
    """Probabilities, float64 [vocab], without the tail beyond `top_p` (Holtzman et al., arXiv 1904.09751)."""
    return _first(odds, -odds, top_p)


def min_p(odds: np.ndarray, share: float) -> np.ndarray:
    """Probabilities, float64 [vocab], of at least `share` of the largest (Nguyen et al., arXiv 2407.01082)."""
    return _kept(odds, odds >= share * odds.max())


def typical(odds: np.ndarray, mass: float) -> np.ndarray:
    """Probabilities, float64 [vocab], of the tokens whose negative log-likelihood is closest to the entropy, as many as
    together have `mass` (Meister et al., arXiv 2202.00666)."""
    with np.errstate(divide="ignore"):
        nll = -np.log(odds)
    present = odds > 0
    expected = float((odds[present] * nll[present]).sum())
    return _first(odds, np.abs(nll - expected), mass)


def _first(odds: np.ndarray, rank: np.ndarray, mass: float) -> np.ndarray:
    """The tokens of the lowest rank, as many as together have `mass`; always one."""
    order = np.argsort(rank, kind="stable")
    likely = odds[order]
    before = np.cumsum(likely) - likely
    before[0] = -np.inf
    kept = np.where(before < mass, likely, 0.0)
    result = np.empty_like(odds)
    result[order] = kept / kept.sum()
    return result


def _kept(odds: np.ndarray, kept: np.ndarray) -> np.ndarray:
    left = np.where(kept, odds, 0.0)
    return left / left.sum()


def bias(added: Sequence[tuple[int, float]]) -> Penalty:
    """Add a number to the logits of some tokens; ids beyond the vocabulary say nothing."""

    def change(logits: np.ndarray, text: Sequence[int], prompt: int) -> np.ndarray:  # noqa: ARG001
        for token, number in added:
            if 0 <= token < len(logits):
                logits[token] += number
        return logits

    return change


def penalize_repetition(penalty: float) -> Penalty:
    """Divide the logits of tokens that the text has, or multiply where they are negative (Keskar, arXiv 1909.05858)."""

    def change(logits: np.ndarray, text: Sequence[int], prompt: int) -> np.ndarray:  # noqa: ARG001
        seen = np.unique(np.asarray(text, np.int64))
        found = logits[seen]
        with np.errstate(over="ignore"):  # of a penalty near 0: infinities, which are refused where tokens are chosen
            logits[seen] = np.where(found < 0, found * penalty, found / penalty)
        return logits

    return change


def penalize_counts(frequency: float, presence: float) -> Penalty:
    """Take `frequency` from a token's logit for each time that the answer has it, and `presence` once."""

    def change(logits: np.ndarray, text: Sequence[int], prompt: int) -> np.ndarray:
        seen, counts = np.unique(np.asarray(text[prompt:], np.int64), return_counts=True)
        logits[seen] -= frequency * counts + presence
        return logits

    return change


def forbid_repeated_ngrams(length: int) -> Penalty:
    """Rule out each token that would make the text's last `length` tokens ones that it has already."""

    def change(logits: np.ndarray, text: Sequence[int], prompt: int) -> np.ndarray:  # noqa: ARG001
        ids = np.asarray(text, np.int64)
        if len(ids) >= length:
            last = ids[len(ids) - length + 1 :]
            windows = np.lib.stride_tricks.sliding_window_view(ids, length)
            logits[windows[(windows[:, :-1] == last).all(axis=1), -1]] = -np.inf
        return logits

    return change


def forbid_early_end(tokens: int, ends: Sequence[int]) -> Penalty:
    """Rule out the ends of a text until the answer has so many tokens."""

    def change(logits: np.ndarray, text: Sequence[int], prompt: int) -> np.ndarray:
        if len(text) - prompt < tokens:
            logits[list(ends)] = -np.inf
        return logits

    return change
