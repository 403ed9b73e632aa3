"""Generation in two layers: token ids from an engine, and text with a report of what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.statistics import StepTimes
from pocketmoe.runtime.memory.budget import locked_bytes, major_faults
from pocketmoe.runtime.paging.expert_counts import RoutingSummary, summarize
from pocketmoe.runtime.sampling import Sampler, Sampling, make_sampler
from pocketmoe.runtime.text_stream import TextStream
from pocketmoe.runtime.tokenizer import Text


@dataclass(frozen=True)
class StepShares:
    """Mean seconds of a decode step, and the shares of it: attention and head, experts, waiting for them, Python."""

    mean_s: float
    segments: float
    experts: float
    waiting: float
    python: float

    @classmethod
    def of(cls, times: StepTimes) -> StepShares | None:
        """None before the first step."""
        if not times.steps:
            return None
        parts = [part / times.total_s for part in (times.segments_s, times.experts_s, times.waiting_s)]
        return cls(times.total_s / times.steps, *parts, python=1 - sum(parts))


@dataclass(frozen=True)
class RunReport:
    """What a run produced and what it took; the fields of `run --json`."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    generated_tokens: int
    stop_reason: str  # "eos" or "length"
    start_s: float  # from the start of loading to a ready engine
    ttft_s: float  # from the prompt to the first token
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None  # None with fewer than two tokens
    peak_memory_bytes: int
    memory_budget_bytes: int
    expert_hit_rate: float | None  # resident without a guess
    guessed_hit_rate: float | None  # read, or being read, because of a guess
    expert_slots: int
    experts: int
    experts_per_token: int  # over all layers; with fewer slots, even repeating a token's experts misses
    bytes_read: int
    dropped_weight_share: float  # of the router's weight, by --drop-cold; 0 with exact routing
    replaced_choices_share: float  # of the answer's choices of experts, by --prefer-cached; 0 with exact routing
    bytes_guessed: int  # of those, read because of a guess, wanted or not
    guess_precision_by_rank: list[float]  # of the next layer's experts, likeliest first, read or not
    read_wait_s: float  # time in which nothing could be computed for want of an expert
    major_faults: int  # during decode
    locked_bytes: int  # weights and states that the system cannot swap out, as far as `ulimit -l` allowed
    step: StepShares | None  # where a decode step's time goes; None with fewer than two tokens
    routing: RoutingSummary | None  # of prompt and answer; counts of uses are all that is kept of a text
    backend: str
    backend_reason: str
    threads: int


def generate_ids(engine: Engine, prompt: Sequence[int], sampler: Sampler, max_tokens: int) -> Iterator[int]:
    """Append the prompt to the engine's text and yield up to `max_tokens` ids, an end-of-text id last."""
    stop = set(engine.bundle.manifest.model.eos_token_ids)
    logits = engine.feed(prompt)[-1]
    for count in range(1, max_tokens + 1):
        token = sampler(logits)
        yield token
        if token in stop or count == max_tokens:
            return
        logits = engine.feed([token])[-1]


class _Answer:
    """Gives an answer's text to `on_text` as it becomes certain, and keeps it."""

    def __init__(self, stream: TextStream, on_text: Callable[[str], None]) -> None:
        self._stream, self._on_text = stream, on_text
        self.pieces: list[str] = []

    def push(self, token: int) -> None:
        self._give(self._stream.push(token))

    def finish(self) -> None:
        self._give(self._stream.finish())

    def _give(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            self._on_text(piece)


def generate(
    engine: Engine,
    text: Text,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    on_text: Callable[[str], None],
    *,
    start_s: float = 0.0,
    threads: int = 1,
) -> RunReport:
    """Generate from a prompt's token ids, giving text to `on_text` as it becomes certain."""
    began = time.perf_counter()
    first, last, faults = began, began, major_faults()
    tokens: list[int] = []
    stop = set(engine.bundle.manifest.model.eos_token_ids)
    answer = _Answer(text.stream(), on_text)
    for token in generate_ids(engine, prompt, make_sampler(sampling), max_tokens):
        last = time.perf_counter()
        if not tokens:
            first, faults = last, major_faults()
        tokens.append(token)
        if token not in stop:
            answer.push(token)
    answer.finish()
    engine.budget.observe()
    stats, opened, layers = engine.stats, engine.opened, engine.bundle.manifest.moe_layers
    return RunReport(
        text="".join(answer.pieces),
        tokens=tokens,
        prompt_tokens=len(prompt),
        generated_tokens=len(tokens),
        stop_reason="eos" if tokens and tokens[-1] in stop else "length",
        start_s=start_s,
        ttft_s=first - began,
        prefill_tokens_per_s=len(prompt) / (first - began),
        decode_tokens_per_s=(len(tokens) - 1) / (last - first) if len(tokens) > 1 else None,
        peak_memory_bytes=engine.budget.peak_bytes,
        memory_budget_bytes=engine.budget.total_bytes,
        expert_hit_rate=stats.hit_rate,
        guessed_hit_rate=stats.guessed_hit_rate,
        expert_slots=sum(opened.slots.values()),
        experts=sum(opened.experts.values()),
        experts_per_token=sum(layer.top_k for layer in layers),
        bytes_read=stats.bytes_read,
        dropped_weight_share=engine.dropped.share,
        replaced_choices_share=engine.preference.replaced_share,
        bytes_guessed=stats.bytes_guessed,
        guess_precision_by_rank=engine.guesses.precision_by_rank,
        read_wait_s=stats.wait_s,
        major_faults=major_faults() - faults,
        locked_bytes=locked_bytes(),
        step=StepShares.of(engine.times),
        routing=summarize(stats.uses, [layer.n_experts for layer in layers]),
        backend=opened.backend,
        backend_reason=opened.backend_reason,
        threads=threads,
    )
