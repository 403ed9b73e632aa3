"""An answer while it is generated: token ids from an engine, text from ids as it becomes certain, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pocketmoe.errors import ContextFull
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.marks import StopStrings
from pocketmoe.runtime.memory.budget import major_faults
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
    """Iterate over `pieces` for the text; the other fields say how far it has come."""

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

    def pieces(self) -> Iterator[str]:
        """The text as it becomes certain."""
        ends = set(self._engine.bundle.manifest.model.eos_token_ids)
        stream, stops = self._text.stream(), StopStrings(self.asked.stop)
        self.began = self.first = self.last = time.perf_counter()
        for token in self._ids(ends):
            if token in ends:
                self.stop_reason = "eos"
                break
            yield from self._show(stops.push(stream.push(token)))
            if stops.found is not None:
                self.stop_reason = "stop"
                return
        else:
            self.stop_reason = self._at_most
        yield from self._show(stops.push(stream.finish()))
        if stops.found is not None:
            self.stop_reason = "stop"
        yield from self._show(stops.finish())

    def _show(self, piece: str) -> Iterator[str]:
        if piece:
            self.shown.append(piece)
            yield piece

    def _ids(self, ends: set[int]) -> Iterator[int]:
        """Up to the most token ids."""
        sampler = make_sampler(self.asked.sampling, self.prompt, sorted(ends))
        logits = self._read_prompt()
        while True:
            token = sampler(logits)
            self.last = time.perf_counter()
            if not self.tokens:
                self.first, self.faults = self.last, major_faults()
            self.tokens.append(token)
            if self.asked.top_logprobs is not None:
                self.logprobs.append(token_logprob(log_softmax(logits), token, self.asked.top_logprobs))
            yield token
            if len(self.tokens) == self._most:
                return
            logits = self._engine.feed([token])[-1]

    def _read_prompt(self) -> np.ndarray:
        """The prompt's last logits, float32 [vocab]; its beginning is taken from the text that the engine holds."""
        engine, prompt, text = self._engine, self.prompt, self._engine.sequences[0]
        self.reused_tokens = text.truncate(text.reusable(prompt, len(prompt) - 1))
        return engine.feed(prompt[self.reused_tokens :])[-1]
