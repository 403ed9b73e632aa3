"""Opens a bundle for an engine: takes it apart once, and hands each part what it needs, within one memory plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from pocketmoe.bundle.manifest import Manifest
from pocketmoe.bundle.progress import Progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import StoreReader
from pocketmoe.errors import BadInput
from pocketmoe.runtime.backends.choice import open_backend
from pocketmoe.runtime.backends.graph_checks import check_graphs
from pocketmoe.runtime.backends.protocol import Backend
from pocketmoe.runtime.engine.affinity import DecodeCpu
from pocketmoe.runtime.engine.cache_routing import CacheAwareRouting
from pocketmoe.runtime.engine.claims import (
    LOADING,
    available_for_slots,
    bytes_while_loading,
    experts_by_kind,
    fit_chunks,
    fit_slots,
    open_budget,
)
from pocketmoe.runtime.engine.kv_cache import are_local
from pocketmoe.runtime.engine.memory_plan import ModelSizes
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.engine.segments import Segments, open_segments
from pocketmoe.runtime.engine.sequence import Layout, Sequence
from pocketmoe.runtime.memory.budget import Budget, return_freed_memory, trim
from pocketmoe.runtime.memory.ceiling import Allowance, stack_bytes
from pocketmoe.runtime.memory.mlock import lock_large_blocks
from pocketmoe.runtime.paging.cache import ExpertCache
from pocketmoe.runtime.paging.pager import Pager, Pool
from pocketmoe.runtime.paging.prefetch import Prefetcher
from pocketmoe.runtime.paging.rate_limiter import RateLimiter
from pocketmoe.runtime.paging.workers import worthwhile_threads
from pocketmoe.system.cpus import thread_ids


@dataclass(frozen=True)
class Opened:
    """What opening came to: the backend in use and, where it is not the fast one, why; slots by expert kind."""

    backend: str
    backend_reason: str
    slots: dict[int, int]
    experts: dict[int, int]


@dataclass(frozen=True)
class Parts:
    """What an engine runs on. `closing` closes all of it."""

    closing: contextlib.ExitStack
    budget: Budget
    backend: Backend
    segments: Segments
    sequences: list[Sequence]
    cache_routing: CacheAwareRouting
    prefetcher: Prefetcher
    pager: Pager
    chunks_together: int
    decode_cpu: DecodeCpu
    opened: Opened
    cap: Callable[[], None]  # have the system refuse what is beyond the budget as it is now, where that was asked for


def open_parts(bundle: Bundle, options: EngineOptions, progress: Progress) -> Parts:
    """Check and load a bundle within the memory asked for.

    Raises BadInput, DamagedFile or GraphRefused for the bundle, BudgetTooSmall or OverBudget for the memory.
    """
    manifest = bundle.manifest
    if options.capacity > manifest.model.context_length:
        raise BadInput(
            f"{options.capacity} tokens do not fit the model's context of {manifest.model.context_length}",
            "Shorten the prompt or ask for fewer tokens.",
        )
    bundle.check_all_but_store()
    check_graphs(bundle)
    return_freed_memory()
    with contextlib.ExitStack() as closing:
        ceiling = closing.enter_context(contextlib.closing(Allowance())) if options.capped else None
        threads_before = thread_ids()
        store = closing.enter_context(bundle.open_store())
        load, model = options.load, ModelSizes.of(manifest)
        budget = open_budget(options.memory, manifest, load)
        if ceiling:
            ceiling.set(bytes_while_loading(budget, model, options.threads))
        available = available_for_slots(budget, options.memory, store.records.values())
        backend, reason = open_backend(options.backend, bundle, store, available, progress)
        closing.callback(backend.close)
        cache_routing = CacheAwareRouting(options.prefer_cached, manifest.moe_layers)
        threads = segment_threads(options.threads, model)
        segments = _open_segments(bundle, threads, cache_routing)
        prefetcher = _open_prefetcher(bundle, options, threads)
        sequences = _open_sequences(manifest, options)
        alone = options.sequences == 1 and not sequences[0].layout.local
        together = 1 if alone else fit_chunks(budget, options.memory, model, load)
        _end_loading(budget, backend)
        pager, slots, experts = _open_pager(manifest, options, budget, backend, store, ceiling)
        closing.callback(pager.close)

        def cap() -> None:
            if ceiling:
                ceiling.set(budget.total_bytes - budget.observe() + stack_bytes(options.sequences - 1))

        cap()
        helpers: set[int] = thread_ids() - threads_before if options.threads > 1 else set()
        return Parts(
            closing=closing.pop_all(),
            budget=budget,
            backend=backend,
            segments=segments,
            sequences=sequences,
            cache_routing=cache_routing,
            prefetcher=prefetcher,
            pager=pager,
            chunks_together=together,
            decode_cpu=DecodeCpu(helpers, lambda: pager.making_slots),
            opened=Opened(backend.name, reason, slots, experts),
            cap=cap,
        )


def segment_threads(threads: int, model: ModelSizes) -> int:
    """On how many of `threads` to run a segment: as many as its weights are worth, and no more than it has heads.

    With more threads than heads of queries ONNX Runtime's GroupQueryAttention divides the keys of a long text among
    threads, and sums otherwise than with fewer: after 3,000 tokens of 4 heads, with 5 threads and more.
    """
    useful = worthwhile_threads(threads, model.dense_bytes // model.segments)
    return min(useful, model.attention_heads or useful)


def _open_segments(bundle: Bundle, threads: int, cache_routing: CacheAwareRouting) -> Segments:
    manifest = bundle.manifest
    graphs = [bundle.path(segment.graph) for segment in manifest.segments]
    models = cache_routing.models(graphs[:-1])
    runners = open_segments(manifest.segments, graphs, threads, models)
    return Segments(runners, manifest.moe_layers, manifest.states, manifest.logits, manifest.model)


def _open_sequences(manifest: Manifest, options: EngineOptions) -> list[Sequence]:
    layout = Layout(
        inputs=manifest.inputs,
        states=manifest.states,
        capacity=options.capacity,
        chunk=options.chunk,
        local=are_local(manifest.states, manifest.segments),
        keeps=options.reuses and manifest.inputs.last_position is None,
        snapshots=options.snapshots,
        rolls_back=options.load.rolls_back,
        computed_anew_beyond=manifest.model.computed_anew_beyond,
    )
    return [Sequence(layout) for _ in range(options.sequences)]


def _open_prefetcher(bundle: Bundle, options: EngineOptions, threads: int) -> Prefetcher:
    layers = bundle.manifest.moe_layers
    routers = {number: bundle.path(layer.router) for number, layer in enumerate(layers) if layer.router}
    return Prefetcher(layers, routers, threads, options.prefetch)


def _end_loading(budget: Budget, backend: Backend) -> None:
    """What only loading took is free for slots."""
    trim()
    lock_large_blocks()
    budget.close_loading()
    budget.map_slot(backend.making_bytes())
    budget.release(LOADING)


def _open_pager(
    manifest: Manifest,
    options: EngineOptions,
    budget: Budget,
    backend: Backend,
    store: StoreReader,
    ceiling: Allowance | None,
) -> tuple[Pager, dict[int, int], dict[int, int]]:
    """The pager; slots and experts by kind."""
    counts = experts_by_kind(store.records.values())
    slots = fit_slots(budget, options.memory, backend, counts)
    most_experts = max(layer.n_experts for layer in manifest.moe_layers)
    pools = {
        kind: Pool(backend, kind, ExpertCache(slots[kind], layers, most_experts), budget)
        for kind, layers in counts.items()
    }
    chosen = max(layer.top_k for layer in manifest.moe_layers) * max(kind.nbytes for kind in manifest.expert_kinds)
    helpers = worthwhile_threads(options.threads, chosen)
    if ceiling:  # nothing of the bundle's is computed while threads start
        ceiling.set(budget.total_bytes - budget.observe() + stack_bytes(helpers + 3))
    limiter = RateLimiter(options.read_bytes_per_s) if options.read_bytes_per_s else None
    pager = Pager(backend, pools, (len(manifest.moe_layers), most_experts), helpers, limiter)
    return pager, slots, {kind: sum(layers.values()) for kind, layers in counts.items()}
