"""From a bundle's path and a prompt to text and a report: what `pocketmoe run` does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketmoe.bundle.packed import PackedPlace
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, ContextFull
from pocketmoe.grammar.constraint import Constraint
from pocketmoe.grammar.guide import guide_bytes
from pocketmoe.runtime.answer import Asked
from pocketmoe.runtime.backends.choice import BackendName
from pocketmoe.runtime.backends.packing import packed_folder
from pocketmoe.runtime.backends.slots import SlotBackend
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.generate import RunReport, generate
from pocketmoe.runtime.paging.expert_counts import ExpertCounts, calibrated_counts
from pocketmoe.runtime.paging.prefetch import PrefetchMode
from pocketmoe.runtime.prefix_cache.cache import MEMORY_BYTES
from pocketmoe.runtime.prefix_cache.kept import KeptPrefixes, PrefixCacheRequest
from pocketmoe.runtime.sampling import Sampling
from pocketmoe.runtime.tokenizer import Text
from pocketmoe.runtime.trace import TraceWriter, describe
from pocketmoe.system.cpus import physical_cores


@dataclass(frozen=True)
class RunRequest:
    """What to generate and how. `threads` None: one per physical core this process may use.

    `messages`: what comes before the prompt, or, where that is empty, the whole conversation.
    """

    prompt: str
    raw: bool = False
    messages: tuple[Mapping[str, Any], ...] = ()
    memory: MemoryRequest | None = None
    max_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # the answer ends before the first of these strings
    constraint: Constraint | None = None  # what the answer is held to
    threads: int | None = None
    backend: BackendName = "auto"
    prefetch: PrefetchMode = "auto"
    drop_cold: float = 0.0
    prefer_cached: float = 0.0
    trace: Path | None = None  # where to record the routing, which reveals the text
    n: int = 1  # answers to the prompt
    top_logprobs: int | None = None  # log probabilities of each token, and of so many likeliest ones
    prefix_cache: PrefixCacheRequest | None = None  # where what the prompt computes is kept on disk
    packed: PackedPlace | None = None  # for packed experts that cannot, or are not to, lie in the bundle
    template: Mapping[str, Any] = field(default_factory=dict[str, Any])  # variables for the chat template

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be meant together."""
        if self.n > 1 and self.sampling.temperature == 0:
            raise ValueError("Several greedy answers are the same one: give a --temperature above 0.")
        if self.n > 1 and self.trace:
            raise ValueError("A trace is of one answer: leave out -n or --trace.")


def run_prompt(
    path: Path, request: RunRequest, *, on_text: Callable[[str, int], None], progress: Progress = no_progress
) -> RunReport:
    """Generate from a prompt; `on_text` gets pieces, and which answer they are of, from 0.

    The text is as long as `max_tokens` allows and the model's context holds; a prompt that leaves no room is refused.
    Raises BadInput, DamagedFile, OutputError or BudgetTooSmall.
    """
    began = time.perf_counter()
    if request.trace and request.prefer_cached:
        raise BadInput(
            "with --prefer-cached the routing depends on this budget, so that a trace of it says nothing of others",
            "Use --trace without --prefer-cached.",
        )
    bundle = Bundle.open(path, request.packed)
    text = Text(bundle)
    ids, rendered = _prompt_ids(text, request)
    manifest = bundle.manifest
    context = manifest.model.context_length
    if len(ids) >= context:
        raise ContextFull(len(ids), context)
    max_tokens = min(request.max_tokens, context - len(ids))
    if request.constraint:
        text.guide(request.constraint, rendered)  # refused before anything is loaded
    options = _engine_options(request, len(ids) + max_tokens)
    with contextlib.ExitStack() as stack:
        recorder = None
        if request.trace:
            recorder = stack.enter_context(TraceWriter(request.trace, manifest.moe_layers, len(ids)))
        prefixes = KeptPrefixes.open(request.prefix_cache, bundle, options.exact, progress)
        if prefixes:
            stack.enter_context(prefixes)
        engine = stack.enter_context(Engine(bundle, options, progress))
        engine.on_routes = recorder
        counts = expect_usual(engine)
        start_s = time.perf_counter() - began
        asked = Asked(max_tokens, request.sampling, request.stop, request.top_logprobs, request.constraint)
        report = generate(
            engine,
            text,
            ids,
            asked,
            on_text,
            context=options.capacity,
            n=request.n,
            rendered=rendered,
            prefixes=prefixes,
            start_s=start_s,
            threads=options.threads,
        )
        if recorder:
            recorder.publish(describe(engine))
        # With --prefer-cached the choices follow what was loaded, which follows these very counts.
        if engine.opened.backend == SlotBackend.name and not request.prefer_cached:
            counts.add(engine.stats.expert_counts, manifest.moe_layers[0].top_k)
        return report


def _engine_options(request: RunRequest, capacity: int) -> EngineOptions:
    """For a text of `capacity` tokens."""
    return EngineOptions(
        memory=request.memory or MemoryRequest(),
        capacity=capacity,
        threads=request.threads or default_threads(),
        backend=request.backend,
        prefetch=request.prefetch,
        drop_cold=request.drop_cold,
        prefer_cached=request.prefer_cached,
        reuses=request.n > 1 or request.prefix_cache is not None,
        capped=True,
        beside_bytes=(guide_bytes(0) if request.constraint else 0) + (MEMORY_BYTES if request.prefix_cache else 0),
    )


def _prompt_ids(text: Text, request: RunRequest) -> tuple[list[int], str | None]:
    """The token ids of what is asked: of a text as it is, or of a conversation by the model's chat template.

    And what the template has made of it, where it was used.
    """
    if not request.prompt and not request.messages:
        raise BadInput("the prompt is empty", 'Give some text: --prompt "Once upon a time".')
    messages = list(request.messages)
    if request.prompt:
        messages.append({"role": "user", "content": request.prompt})
    if request.raw or (text.chat is None and len(messages) == 1):
        return text.encode(request.prompt), None
    if text.chat is None:
        raise BadInput("this model has no chat template", "Give a prompt alone, which it continues.")
    rendered = text.chat.render(messages, **request.template)
    return text.encode(rendered, add_special_tokens=False), rendered


def expect_usual(engine: Engine) -> ExpertCounts:
    """Load the experts that earlier runs, or calibration, chose most. Returns where to add this run's counts."""
    bundle = engine.bundle
    counts = ExpertCounts(packed_folder(bundle), [layer.n_experts for layer in bundle.manifest.moe_layers])
    counted = counts.read()
    if counted is None:
        counted = calibrated_counts(bundle)
    if counted is not None:
        engine.expect(counted)
    return counts


def default_threads() -> int:
    """One per physical core, no more than this process may use."""
    return physical_cores()
