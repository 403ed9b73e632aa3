"""An answer while it is generated: token ids from an engine, text from ids as it becomes certain, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from pocketmoe.errors import ContextFull
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.scheduler import Ask, Work
from pocketmoe.runtime.marks import StopStrings
from pocketmoe.runtime.memory.budget import major_faults
from pocketmoe.runtime.paging.pager import PagerStats
from pocketmoe.runtime.sampling import Sampling, make_sampler
from pocketmoe.runtime.tokenizer import Text

StopReason = Literal["eos", "length", "stop", "context", "stopped"]


@dataclass(frozen=True)
class Asked:
    """What kind of answer is wanted. `max_tokens` None: as long as the context allows."""

    max_tokens: int | None = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # the answer ends before the first of these strings
    top_logprobs: int | None = None  # None: no log probabilities


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model itself held a token, in nats, before temperature and penalties; and its likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log probabilities of logits, float [..., vocab], in nats, float64."""
    below = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))


def token_logprob(logprobs: np.ndarray, token: int, top: int) -> TokenLogprob:
    """A token's entry, out of log probabilities, float64 [vocab]."""
    likeliest = np.argsort(-logprobs, kind="stable")[:top].tolist()
    return TokenLogprob(token, float(logprobs[token]), tuple((other, float(logprobs[other])) for other in likeliest))


class Answer:
    """Iterate over `pieces` for the text, or have a scheduler take its `steps`; the fields say how far it has come."""

    def __init__(self, engine: Engine, text: Text, prompt: Sequence[int], asked: Asked, context: int) -> None:
        """`context`: the most tokens of prompt and answer. What the engine holds of the prompt is not computed again.

        Raises ContextFull for a prompt that leaves no room for an answer.
        """
        if len(prompt) >= context:
            raise ContextFull(len(prompt), context)
        self._engine, self._text, self.prompt, self.asked = engine, text, prompt, asked
        left = context - len(prompt)
        self._most = left if asked.max_tokens is None else min(asked.max_tokens, left)
        self._at_most: StopReason = "context" if asked.max_tokens is None or asked.max_tokens > left else "length"
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.shown: list[str] = []  # the pieces of text
        self.stop_reason: StopReason = "stopped"  # until it has ended otherwise
        self.reused_tokens = 0
        self.began = self.first = self.last = time.perf_counter()  # seconds, as perf_counter has them
        self.faults = major_faults()  # before the second token
        self.counts = Counts(0, 0, 0)  # what had been counted when it began

    def pieces(self) -> Iterator[str]:
        """The text as it becomes certain, by the engine's first text, with no other beside it."""
        steps, text, given = self.steps(), self._engine.sequences[0], 0
        ask = next(steps)
        self.reused_tokens = text.truncate(text.reusable(ask.tokens, len(ask.tokens) - 1))
        logits = self._engine.feed(ask.tokens[self.reused_tokens :], ask.rows)
        while True:
            try:
                ask = steps.send(logits)
            except StopIteration:
                yield from self.shown[given:]
                return
            yield from self.shown[given:]
            given = len(self.shown)
            logits = self._feed(ask)

    def steps(self) -> Work:
        """What has to be fed next; is sent the logits. What becomes certain of the text appears in `shown`."""
        ends = set(self._engine.bundle.manifest.model.eos_token_ids)
        stream, stops = self._text.stream(), StopStrings(self.asked.stop)
        sampler = make_sampler(self.asked.sampling, self.prompt, sorted(ends))
        self.counts = Counts.of(self._engine.stats)
        self.began = self.first = self.last = time.perf_counter()
        logits = yield Ask(self.prompt)
        while True:
            token = sampler(logits[-1])
            self._note(token, logits[-1])
            if token in ends:
                self.stop_reason = "eos"
                break
            self._show(stops.push(stream.push(token)))
            if stops.found is not None:
                self.stop_reason = "stop"
                return
            if len(self.tokens) == self._most:
                self.stop_reason = self._at_most
                break
            logits = yield Ask([token])
        self._show(stops.push(stream.finish()))
        if stops.found is not None:
            self.stop_reason = "stop"
        self._show(stops.finish())

    def _feed(self, ask: Ask) -> np.ndarray:
        """The logits of what is asked, float32 [rows, vocab]."""
        if not ask.apart:
            return self._engine.feed(ask.tokens, ask.rows)
        return np.concatenate([self._engine.feed([token], ask.rows) for token in ask.tokens])

    def _show(self, piece: str) -> None:
        if piece:
            self.shown.append(piece)

    def _note(self, token: int, logits: np.ndarray) -> None:
        """Enter a token that has come, and the logits that it was chosen by, float32 [vocab]."""
        self.last = time.perf_counter()
        if not self.tokens:
            self.first, self.faults = self.last, major_faults()
        self.tokens.append(token)
        if self.asked.top_logprobs is not None:
            self.logprobs.append(token_logprob(log_softmax(logits), token, self.asked.top_logprobs))


class Counts(NamedTuple):
    """What a pager had counted at some moment."""

    hits: int
    wanted: int
    bytes_read: int

    @classmethod
    def of(cls, stats: PagerStats) -> Counts:
        return cls(stats.hits, stats.hits + stats.prefetch_hits + stats.misses, stats.bytes_read)
