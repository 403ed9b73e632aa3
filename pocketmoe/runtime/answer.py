"""An answer while it is generated: token ids from an engine, text from ids as it becomes certain, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from pocketmoe.errors import BadInput, ContextFull
from pocketmoe.grammar.constraint import Constraint, constraint
from pocketmoe.grammar.guide import Guide
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.scheduler import Ask, Prefixes, Work
from pocketmoe.runtime.engine.segments import Rows
from pocketmoe.runtime.paging.pager import PagerStats
from pocketmoe.runtime.sampling import Sampling, log_softmax, make_sampler
from pocketmoe.runtime.stop_strings import StopStrings
from pocketmoe.runtime.tokenizer import Text
from pocketmoe.system.memory import major_faults
from pocketmoe.tools.forced import Term
from pocketmoe.tools.speech import Speech

DEFAULT_TOKENS = 512  # of an answer
_SAMPLING = {field.name for field in fields(Sampling)}
StopReason = Literal["eos", "complete", "length", "stop", "context", "stopped"]


@dataclass(frozen=True)
class Asked:
    """What kind of answer is wanted. `max_tokens` None: as long as the context allows."""

    max_tokens: int | None = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # the answer ends before the first of these strings
    top_logprobs: int | None = None  # None: no log probabilities
    constraint: Constraint | None = None  # what the text is held to
    marks: frozenset[str] = frozenset()  # special tokens that the text shows


def asked_for(base: Sampling, options: Mapping[str, Any], spoken: Speech, term: Term) -> Asked:
    """What options (`model.Options`) ask for; where they say nothing of sampling, `base`. Raises BadInput."""
    changes = {name: value for name, value in options.items() if name in _SAMPLING}
    if "logit_bias" in changes:
        changes["logit_bias"] = tuple(changes["logit_bias"].items())
    stop = options.get("stop", ())
    most = options.get("max_tokens", DEFAULT_TOKENS)
    if most is not None and most < 1:
        raise BadInput(f"an answer of {most} tokens is none", "Ask for one at least.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    held = constraint(*(options.get(name) for name in ("json_schema", "regex", "grammar")))
    held = spoken.held(held, term)
    return Asked(most, replace(base, **changes), stops, options.get("logprobs"), held, spoken.marks)


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model itself held a token, in nats, before temperature and penalties; and its likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logprobs: np.ndarray, token: int, top: int) -> TokenLogprob:
    """A token's entry, out of log probabilities, float64 [vocab]."""
    likeliest = np.argsort(-logprobs, kind="stable")[:top].tolist()
    return TokenLogprob(token, float(logprobs[token]), tuple((other, float(logprobs[other])) for other in likeliest))


class Answer:
    """Iterate over `pieces` for the text, or have a scheduler take its `steps`; the fields say how far it has come."""

    def __init__(
        self,
        engine: Engine,
        text: Text,
        prompt: Sequence[int],
        asked: Asked,
        context: int,
        guide: Guide | None = None,
    ) -> None:
        """`context`: the most tokens of prompt and answer. What the engine holds of the prompt is not computed again.

        `guide`: that of what the answer is held to, at its start.

        Raises ContextFull for a prompt that leaves no room for an answer.
        """
        if len(prompt) >= context:
            raise ContextFull(len(prompt), context)
        self._engine, self._text, self._guide, self.prompt, self.asked = engine, text, guide, prompt, asked
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

    def pieces(self, prefixes: Prefixes | None = None) -> Iterator[str]:
        """The text as it becomes certain, by the engine's first text, with no other beside it.

        `prefixes`: where beginnings are kept that this text does not have.
        """
        steps, text, given = self.steps(), self._engine.sequences[0], 0
        ask = next(steps)
        most = len(ask.tokens) - 1
        kept = text.reusable(ask.tokens, most)
        restored = prefixes.restore(text, ask.tokens, most, kept) if prefixes else 0
        self.reused_tokens = restored or text.truncate(kept)
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
        """What has to be fed next; is sent the logits. What becomes certain of the text appears in `shown`.

        Tokens that a grammar forces are computed together; their own log probabilities are known after that.
        """
        ends = set(self._engine.bundle.manifest.model.eos_token_ids)
        stream, stops = self._text.stream(self.asked.marks), StopStrings(self.asked.stop)
        choose, wants_logprobs = self._chooser(ends), self.asked.top_logprobs is not None

        def goes_on(token: int, logits: np.ndarray) -> bool:
            self._note(token, logits)
            if token in ends:
                self.stop_reason = "eos"
                return False
            self._show(stops.push(stream.push(token)))
            self.stop_reason = "stop" if stops.found is not None else self.stop_reason
            return stops.found is None

        self.counts = Counts.of(self._engine.stats)
        self.began = self.first = self.last = time.perf_counter()
        logits = yield Ask(self.prompt)
        while True:
            tokens = choose(logits[-1])
            later = tokens[1:] if wants_logprobs else []
            if not all(goes_on(token, logits[-1]) for token in tokens[: len(tokens) - len(later)]):
                break
            is_last = self._is_complete or len(self.tokens) + len(later) == self._most
            if later or not is_last:
                logits = yield from self._computed(tokens[:-1] if is_last else tokens)
            if not all(goes_on(token, row) for token, row in zip(later, logits, strict=False)):
                break
            if is_last:
                self.stop_reason = "complete" if self._is_complete else self._at_most
                break
        self._show(stops.push(stream.finish()))
        if stops.found is not None:
            self.stop_reason = "stop"
        self._show(stops.finish())

    @property
    def _is_complete(self) -> bool:
        return self._guide is not None and self._guide.complete

    def _chooser(self, ends: set[int]) -> Callable[[np.ndarray], list[int]]:
        """From a row of logits to the next token, and those after it that a grammar forces."""
        sampler, guide = make_sampler(self.asked.sampling, self.prompt, sorted(ends)), self._guide
        if guide is None:
            return lambda logits: [sampler(logits)]

        def choose(logits: np.ndarray) -> list[int]:
            tokens = guide.forced(self._most) if not self.tokens else []
            sampler.note(tokens)
            if not tokens:
                tokens = [sampler(logits, guide.allowed)]
                guide.accept(tokens[0])
            more = guide.forced(self._most - len(self.tokens) - len(tokens))
            sampler.note(more)
            return [*tokens, *more]

        return choose

    def _computed(self, tokens: Sequence[int]) -> Generator[Ask, np.ndarray, np.ndarray]:
        """Tokens of the answer, together where that changes no bit: a text that is computed anew is not fed apart."""
        rows: Rows = "last" if self.asked.top_logprobs is None else "all"
        if len(tokens) == 1 or self._engine.bundle.manifest.model.computed_anew_beyond is None:
            return (yield Ask(tokens, rows, apart=len(tokens) > 1))
        before = yield from self._computed(tokens[:-1])
        return np.concatenate([before, (yield Ask(tokens[-1:]))])

    def _feed(self, ask: Ask) -> np.ndarray:
        """The logits of what is asked, float32 [rows, vocab]."""
        return (self._engine.feed_each if ask.apart else self._engine.feed)(ask.tokens, ask.rows)

    @property
    def text(self) -> str:
        """What there is of it."""
        return "".join(self.shown)

    @property
    def ttft_s(self) -> float:
        """From the prompt to the first token."""
        return self.first - self.began

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None with fewer than two tokens."""
        return (len(self.tokens) - 1) / (self.last - self.first) if len(self.tokens) > 1 else None

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
