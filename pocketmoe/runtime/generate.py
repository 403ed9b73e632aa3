"""An answer with a report of what it took: the fields of `run --json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
from msgspec import field

from pocketmoe.grammar.constraint import Kind
from pocketmoe.runtime.answer import Answer, Asked, TokenLogprob
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.scheduler import Prefixes
from pocketmoe.runtime.engine.statistics import StepTimes
from pocketmoe.runtime.paging.expert_counts import RoutingSummary, summarize
from pocketmoe.runtime.sampling import Sampling
from pocketmoe.runtime.tokenizer import Text
from pocketmoe.system.memory import MeasuredBy, locked_bytes, major_faults


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
class AnswerReport:
    """One of the answers to a prompt."""

    text: str
    tokens: list[int]
    stop_reason: str
    seed: int | None
    ttft_s: float  # from the prompt to the first token
    decode_tokens_per_s: float | None  # None with fewer than two tokens
    logprobs: tuple[TokenLogprob, ...] | None

    @classmethod
    def of(cls, answer: Answer) -> AnswerReport:
        """Of an answer that has ended."""
        return cls(
            text=answer.text,
            tokens=answer.tokens,
            stop_reason=answer.stop_reason,
            seed=answer.asked.sampling.seed,
            ttft_s=answer.ttft_s,
            decode_tokens_per_s=answer.decode_tokens_per_s,
            logprobs=tuple(answer.logprobs) if answer.asked.top_logprobs is not None else None,
        )


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run produced and what it took. Of a text, only how often each expert was chosen is kept (`routing`).

    The JSON of `run` has these fields; where it says `guess` it means a prefetch, by an older word.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    generated_tokens: int
    stop_reason: str  # "eos", "length", or "stop" for a stop string
    start_s: float  # from the start of loading to a ready engine
    ttft_s: float  # from the prompt to the first token
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None  # None with fewer than two tokens
    peak_memory_bytes: int  # 0 where that is not measurable
    memory_measured_by: MeasuredBy  # kernel: its own pages, slots once; resident set: with what it shares with others
    memory_budget_bytes: int
    expert_hit_rate: float | None  # resident, and not because of a prefetch
    prefetch_hit_rate: float | None = field(name="guessed_hit_rate")  # read, or being read, by a prefetch
    expert_slots: int
    experts: int
    experts_per_token: int  # over all layers; with fewer slots, even repeating a token's experts misses
    bytes_read: int
    dropped_weight_share: float  # of the router's weight, by --drop-cold; 0 with exact routing
    replaced_choices_share: float  # of the answer's choices of experts, by --prefer-cached; 0 with exact routing
    bytes_prefetched: int = field(name="bytes_guessed")  # of those, read by a prefetch, wanted or not
    # Shares of predictions of the next layer's experts that were right, the likeliest first, read or not.
    prefetch_precision_by_rank: list[float] = field(name="guess_precision_by_rank")
    read_wait_s: float  # time in which nothing could be computed for want of an expert
    major_faults: int  # during decode
    locked_bytes: int  # weights and states that the system cannot swap out, as far as `ulimit -l` allowed
    step: StepShares | None  # where a decode step's time goes; None with fewer than two tokens
    routing: RoutingSummary | None  # of prompt and answer
    backend: str
    backend_reason: str
    caches: int
    caches_copied: int  # of those, not filled in place: each token copies them, the more the longer the text is
    threads: int
    sampling: Sampling  # how tokens were chosen
    logprobs: tuple[TokenLogprob, ...] | None  # of each token, where they were asked for
    constraint: Kind | None  # what the text is held to
    reused_tokens: int  # of the prompt: computed by an earlier run, and kept on disk
    answers: tuple[AnswerReport, ...]  # all of them; what is said of one above is of the first


def generate(
    engine: Engine,
    text: Text,
    prompt: Sequence[int],
    asked: Asked,
    on_text: Callable[[str, int], None],
    *,
    context: int,
    n: int = 1,
    rendered: str | None = None,
    prefixes: Prefixes | None = None,
    start_s: float = 0.0,
    threads: int = 1,
) -> RunReport:
    """Generate `n` answers to a prompt's token ids, giving text to `on_text` as it becomes certain.

    `on_text` gets a piece and which answer it is of, from 0. `context`: the most tokens of prompt and answer. A seed is
    that of the first answer; the next ones have the numbers after it. `rendered`: the prompt by the chat template.
    `prefixes`: where the prompt's beginning may be kept, and will be.
    """
    answers: list[Answer] = []
    for index in range(n):
        guide = text.guide(asked.constraint, rendered) if asked.constraint else None
        answer = Answer(engine, text, prompt, of_number(asked, index), context, guide)
        for piece in answer.pieces(prefixes):
            on_text(piece, index)
        answers.append(answer)
    if prefixes:
        prefixes.keep(engine.sequences[0])
    return report_of(answers, engine, start_s=start_s, threads=threads)


def of_number(asked: Asked, index: int) -> Asked:
    """What is asked of the answer of that number, from 0, among several to one prompt."""
    seed = asked.sampling.seed
    return asked if seed is None else replace(asked, sampling=replace(asked.sampling, seed=seed + index))


def report_of(answers: Sequence[Answer], engine: Engine, *, start_s: float, threads: int) -> RunReport:
    """What finished answers came to and what their engine has counted since it was opened."""
    engine.budget.observe()
    stats, opened, layers = engine.stats, engine.opened, engine.bundle.manifest.moe_layers
    reports, first = [AnswerReport.of(answer) for answer in answers], answers[0]
    caches = [state for state in engine.bundle.manifest.states if state.growing_axis is not None]
    return RunReport(
        text=reports[0].text,
        tokens=reports[0].tokens,
        prompt_tokens=len(first.prompt),
        generated_tokens=len(reports[0].tokens),
        stop_reason=reports[0].stop_reason,
        start_s=start_s,
        ttft_s=reports[0].ttft_s,
        prefill_tokens_per_s=len(first.prompt) / reports[0].ttft_s,
        decode_tokens_per_s=reports[0].decode_tokens_per_s,
        peak_memory_bytes=engine.budget.peak_bytes,
        memory_measured_by=engine.budget.measured_by,
        memory_budget_bytes=engine.budget.total_bytes,
        expert_hit_rate=stats.hit_rate,
        prefetch_hit_rate=stats.prefetch_hit_rate,
        expert_slots=sum(opened.slots.values()),
        experts=sum(opened.experts.values()),
        experts_per_token=sum(layer.top_k for layer in layers),
        bytes_read=stats.bytes_read,
        dropped_weight_share=engine.skipped.share,
        replaced_choices_share=engine.cache_routing.replaced_share,
        bytes_prefetched=stats.bytes_prefetched,
        prefetch_precision_by_rank=engine.predictions.precision_by_rank,
        read_wait_s=stats.wait_s,
        major_faults=major_faults() - first.faults,
        locked_bytes=locked_bytes(),
        step=StepShares.of(engine.times),
        routing=summarize(stats.expert_counts, [layer.n_experts for layer in layers]),
        backend=opened.backend,
        backend_reason=opened.backend_reason,
        caches=len(caches),
        caches_copied=sum(not state.buffered for state in caches),
        threads=threads,
        sampling=first.asked.sampling,
        logprobs=reports[0].logprobs,
        constraint=first.asked.constraint.kind if first.asked.constraint else None,
        reused_tokens=first.reused_tokens,
        answers=tuple(reports),
    )
