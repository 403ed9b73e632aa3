"""The engine: token ids in, logits out, experts paged in within a budget.

Each step walks the bundle's segments; between two of them run the experts that the first one's router chose.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, GraphRefused
from pocketmoe.runtime.backends.choice import open_backend
from pocketmoe.runtime.backends.graph_checks import check_graphs
from pocketmoe.runtime.backends.protocol import Slot
from pocketmoe.runtime.engine.affinity import OwnCpu, thread_ids
from pocketmoe.runtime.engine.cache_routing import BONUS, ROUTED, Preference
from pocketmoe.runtime.engine.claims import (
    LOADING,
    available_for_slots,
    bytes_while_loading,
    experts_by_kind,
    fit_chunks,
    fit_slots,
    open_budget,
)
from pocketmoe.runtime.engine.kv_cache import States
from pocketmoe.runtime.engine.memory_plan import Load, ModelSizes
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.engine.prefix import Prefix
from pocketmoe.runtime.engine.segments import Values, last_row, last_uses, open_segments
from pocketmoe.runtime.engine.statistics import Dropped, StepTimes
from pocketmoe.runtime.memory.budget import return_freed_memory, trim
from pocketmoe.runtime.memory.ceiling import Allowance, stack_bytes
from pocketmoe.runtime.memory.mlock import lock_large_blocks
from pocketmoe.runtime.paging.cache import ExpertCache
from pocketmoe.runtime.paging.expert_counts import shares
from pocketmoe.runtime.paging.pager import Pager, PagerStats, Pool, Routed, combine
from pocketmoe.runtime.paging.prefetch import GuessStats, Prefetcher
from pocketmoe.runtime.paging.rate_limiter import Pace
from pocketmoe.runtime.paging.workers import worthwhile_threads

_OBSERVED_EVERY = 16  # decode steps; looking costs 0.15 ms, and from one step to the next memory hardly changes

RouteObserver = Callable[[int, np.ndarray], None]  # MoE layer, expert ids int64 [tokens, top_k]; called for each chunk
# MoE layer, x float32 [tokens, width], expert ids, weights [tokens, top_k], output float32 [tokens, width], which it
# may change in place; called for each chunk
ExpertsObserver = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
# Tokens in the text by now, and once all that are being fed are; called within a long prompt, to end it by raising.
FeedObserver = Callable[[int, int], None]
Rows = Literal["last", "all", "none"]


@dataclass(frozen=True)
class Opened:
    """What opening came to: the backend in use and, where it is not the fast one, why; slots by expert kind."""

    backend: str
    backend_reason: str
    slots: dict[int, int]
    experts: dict[int, int]


class Engine:
    """A model that is ready to run, as a context manager."""

    def __init__(self, bundle: Bundle, options: EngineOptions, progress: Progress = no_progress) -> None:
        """Check and load a bundle within the memory asked for.

        Raises BadInput or DamagedFile for the bundle, BudgetTooSmall or OverBudget for the memory. A first use on a
        machine packs the experts for its CPU, which `progress` shows.
        """
        manifest = bundle.manifest
        if options.capacity > manifest.model.context_length:
            raise BadInput(
                f"{options.capacity} tokens do not fit the model's context of {manifest.model.context_length}",
                "Shorten the prompt or ask for fewer tokens.",
            )
        bundle.check_all_but_store()
        check_graphs(bundle)
        self.bundle = bundle
        self.on_routes: RouteObserver | None = None
        self.on_experts: ExpertsObserver | None = None
        self.on_segment: Callable[[Values], None] | None = None  # called with what there is after each segment
        self.on_fed: FeedObserver | None = None
        self.times = StepTimes()
        self.dropped = Dropped()
        self.preference = Preference(options.prefer_cached, manifest.moe_layers)
        self._segments_s = 0.0
        self._drop_cold = options.drop_cold
        self._chunk = options.chunk
        self._closing: list = []
        try:
            self._open(options, progress)
        except BaseException:
            self.close()
            raise

    def _open(self, options: EngineOptions, progress: Progress) -> None:
        return_freed_memory()
        threads_before = thread_ids()
        manifest = self.bundle.manifest
        store = self.bundle.open_store()
        self._closing.append(store)
        load = Load.of_text(options.capacity, options.chunk, options.reuses)
        model = ModelSizes.of(manifest)
        self.budget = open_budget(options.memory, manifest, load)
        ceiling = Allowance() if options.capped else None
        if ceiling:
            self._closing.insert(0, ceiling)
            ceiling.set(bytes_while_loading(self.budget, model, options.threads))
        room = available_for_slots(self.budget, options.memory, store.records.values())
        backend, reason = open_backend(options.backend, self.bundle, store, room, progress)
        self._closing.append(backend)
        self.backend = backend
        threads = worthwhile_threads(options.threads, model.dense_bytes // model.segments)
        self._segments = open_segments(self.bundle, threads, self.preference.on)
        self._dead_after = last_uses([runner.segment for runner in self._segments])
        self._states = States(manifest, options.capacity)
        self.length = 0  # tokens in the states
        self.prefix = Prefix(self._states, self._chunk, options.reuses and manifest.inputs.last_position is None)
        self._prefetcher = Prefetcher(self.bundle, threads, options.prefetch)
        self._together = fit_chunks(self.budget, options.memory, model, load) if self._states.local else 1
        trim()
        lock_large_blocks()
        self.budget.close_loading()
        self.budget.map_slot(backend.making_bytes())
        self.budget.release(LOADING)
        counts = experts_by_kind(store.records.values())
        slots = fit_slots(self.budget, options.memory, backend, counts)
        pools = {k: Pool(backend, k, ExpertCache(slots[k], counts[k], self._most_experts), self.budget) for k in counts}
        chosen = max(layer.top_k for layer in manifest.moe_layers) * max(kind.nbytes for kind in manifest.expert_kinds)
        helpers = worthwhile_threads(options.threads, chosen)
        if ceiling:  # nothing of the bundle's is computed while threads start
            ceiling.set(self.budget.total_bytes - self.budget.observe() + stack_bytes(helpers + 3))
        pace = Pace(options.read_bytes_per_s) if options.read_bytes_per_s else None
        self._pager = Pager(backend, pools, (len(manifest.moe_layers), self._most_experts), helpers, pace)
        self._closing.append(self._pager)
        if ceiling:
            ceiling.set(self.budget.total_bytes - self.budget.observe())
        self._helpers = thread_ids() - threads_before if options.threads > 1 else set()
        self._own_cpu: OwnCpu | None = None
        self.opened = Opened(backend.name, reason, slots, {k: sum(layers.values()) for k, layers in counts.items()})

    @property
    def stats(self) -> PagerStats:
        """Hits, misses, bytes and waiting since the engine was opened."""
        return self._pager.stats

    @property
    def guesses(self) -> GuessStats:
        """How good the guesses of the next layer's experts were."""
        return self._prefetcher.stats

    def expect(self, uses: np.ndarray) -> None:
        """Load the experts that were used most so far, int [layers, most experts], while nothing else is read."""
        chosen = shares(uses, [layer.top_k for layer in self.bundle.manifest.moe_layers])
        self._pager.warm(chosen)

    def feed(self, tokens: Sequence[int], rows: Rows = "last") -> np.ndarray:
        """Append tokens to the text. Returns logits, float32 [rows, vocab]: of the last token, of all, or of none.

        Raises BadInput when the text would outgrow the states, DamagedFile when an expert cannot be read or a graph
        gives what it must not, OverBudget when one needs more memory than there is.
        """
        if self.length + len(tokens) > self._states.capacity:
            raise BadInput(f"{self.length + len(tokens)} tokens do not fit the {self._states.capacity} asked for")
        before = self._anew(len(tokens))
        if before:
            return self._feed([*before, *tokens], rows)[-len(tokens) if rows == "all" else 0 :]
        return self._feed(tokens, rows)

    def _anew(self, more: int) -> list[int]:
        """The text so far, which is then forgotten, where `more` tokens make it one that is computed anew."""
        limit = self.bundle.manifest.model.computed_anew_beyond
        if limit is None or not 0 < self.length <= limit < self.length + more:
            return []
        before = self.prefix.tokens
        self.reset()
        return before

    def _feed(self, tokens: Sequence[int], rows: Rows) -> np.ndarray:
        chunks = [
            np.asarray(tokens[start : start + self._chunk], np.int64) for start in range(0, len(tokens), self._chunk)
        ]
        logits = []
        decoding = len(tokens) == 1
        last = self.length + len(tokens) - 1
        with self._place(decoding=decoding):
            for start in range(0, len(chunks), self._together):
                walk = chunks[start : start + self._together]
                is_last = start + self._together >= len(chunks)
                logits += self._walk(walk, rows if rows == "all" or is_last else "none", decoding, last)
                self.prefix.add(walk)
                if self.on_fed and not is_last:
                    self.on_fed(self.length, last + 1)
        return np.concatenate(logits)

    def lend_slots(self, count: int) -> dict[int, list[Slot]]:
        """Up to `count` slots by expert kind, to measure what reading costs; feed no more after that."""
        return self._pager.lend_slots(count)

    def reset(self) -> None:
        """Forget the text; experts stay where they are."""
        self._states.reset()
        self.prefix.reset()
        self.length = 0

    def truncate(self, length: int) -> int:
        """Forget what follows the text's first `length` tokens, and of those what has to be computed anew.

        Returns how many tokens are kept (see `prefix`). Also right after a feeding that an error has ended.
        """
        self.length = self.prefix.cut(length)
        return self.length

    def state(self, name: str) -> np.ndarray:
        """A copy of the state whose input the manifest calls `name`, as the text so far has left it."""
        return self._states.contents(name, self.length)

    def close(self) -> None:
        """Stop the threads, give the slots back."""
        while self._closing:
            self._closing.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, decoding: bool) -> contextlib.AbstractContextManager[None]:
        """Where to run: with the helpers elsewhere from the first decode step on that finds all slots made.

        Until then the readers make slots, for which they need every CPU.
        """
        if self._own_cpu is None and decoding and self._helpers and not self._pager.making_slots:
            self._own_cpu = OwnCpu(self._helpers)
        return self._own_cpu or contextlib.nullcontext()

    @property
    def _most_experts(self) -> int:
        return max(layer.n_experts for layer in self.bundle.manifest.moe_layers)

    def _walk(self, chunks: Sequence[np.ndarray], rows: Rows, decoding: bool, last: int) -> list[np.ndarray]:
        """Take chunks of tokens, int64 [n] each, through the layers together; logits, float32 [rows, vocab], of each.

        `last`: the position of the last token that is being fed, in these chunks or in later ones.
        Each chunk is computed by itself, as if it walked alone: only the reading of experts is shared.
        """
        began, before = time.perf_counter(), (self._segments_s, self.stats.run_s, self.stats.wait_s, self.stats.misses)
        guessing = decoding and self._prefetcher.on
        preferring = decoding and self.opened.slots != self.opened.experts  # where all fit, a first use is no harm
        walkers = self._start(chunks, last)
        for index, layer in enumerate(self.bundle.manifest.moe_layers):
            for values in walkers:
                if self.preference.on:
                    bonus = self.preference.bonus(index, self._pager.residents(index), preferring)
                    values[BONUS] = ort.OrtValue.ortvalue_from_numpy(bonus)
                self._run_segment(index, values)
            routed = [
                self._routed(index, values, len(tokens), decoding)
                for values, tokens in zip(walkers, chunks, strict=True)
            ]
            self._note_routes(index, routed, guessing)
            guess = partial(self._prefetcher.guess, index, routed[0].x) if guessing else None
            for chunk, values, parts in zip(routed, walkers, self._pager.run_layer(index, routed, guess), strict=True):
                weights = values[layer.expert_weights].numpy()
                summed = combine(parts, weights)
                if self.on_experts:
                    self.on_experts(index, chunk.x, chunk.expert_ids, weights, summed)
                values[layer.output] = ort.OrtValue.ortvalue_from_numpy(summed)
        if not decoding or not self.times.steps % _OBSERVED_EVERY:
            self.budget.observe()
        sizes = [len(tokens) for tokens in chunks]
        early = rows if rows == "all" else "none"
        logits = [self._head(values, size, early) for values, size in zip(walkers[:-1], sizes, strict=False)]
        logits.append(self._head(walkers[-1], sizes[-1], rows))
        if not decoding:
            trim()
        else:
            self._note_step(time.perf_counter() - began, *before)
        return logits

    def _note_step(self, seconds: float, segments_s: float, run_s: float, wait_s: float, misses: int) -> None:
        """Enter a decode step into the statistics; all but the first are counters as they were before it."""
        self.times.add(seconds, self._segments_s - segments_s, self.stats.run_s - run_s, self.stats.wait_s - wait_s)
        self._prefetcher.note_step(seconds, missed=self.stats.misses > misses)

    def _start(self, chunks: Sequence[np.ndarray], last: int) -> list[Values]:
        """The first segment's inputs for each chunk, which are then part of the text."""
        names = self.bundle.manifest.inputs
        walkers = []
        for tokens in chunks:
            positions = np.arange(self.length, self.length + len(tokens), dtype=np.int64)
            values = {names.token_ids: ort.OrtValue.ortvalue_from_numpy(tokens[None])}
            if names.positions:
                values[names.positions] = ort.OrtValue.ortvalue_from_numpy(positions[None])
            if names.past_length:
                values[names.past_length] = ort.OrtValue.ortvalue_from_numpy(np.array([self.length], np.int64))
            if names.last_position:
                values[names.last_position] = ort.OrtValue.ortvalue_from_numpy(np.array([last], np.int64))
            walkers.append(values)
            self.prefix.starts(tokens, self.length, values)
            self.length += len(tokens)
        return walkers

    def _routed(self, index: int, values: Values, tokens: int, decoding: bool) -> Routed:
        layer = self.bundle.manifest.moe_layers[index]
        x, expert_ids = values[layer.x].numpy(), values[layer.expert_ids].numpy()
        weights = values[layer.expert_weights].numpy()
        self._segments[index].check_routes(layer, tokens, x, expert_ids, weights)
        if self.preference.on and decoding:
            self.preference.note(expert_ids, values[ROUTED].numpy())
        if not self._drop_cold:
            return Routed(x, expert_ids)
        light = weights < self._drop_cold * weights.mean(axis=1, keepdims=True)
        dropped = light & self._pager.is_cold(index, expert_ids)
        self.dropped.choices += int(dropped.sum())
        self.dropped.weight += float(weights[dropped].sum())
        self.dropped.of_weight += float(weights.sum())
        return Routed(x, expert_ids, dropped)

    def _note_routes(self, index: int, routed: Sequence[Routed], guessing: bool) -> None:
        if guessing:
            self._prefetcher.note_choice(index, routed[0].expert_ids)
        if self.on_routes:
            for chunk in routed:
                self.on_routes(index, chunk.expert_ids)

    def _head(self, values: Values, tokens: int, rows: Rows) -> np.ndarray:
        """Run the last segment, on as few rows as are wanted where it treats each row by itself."""
        manifest = self.bundle.manifest
        last = len(manifest.segments) - 1
        by_row = not any(state.output in manifest.segments[last].outputs for state in manifest.states)
        if rows == "none" and by_row:
            return np.empty((0, manifest.model.vocab_size), np.float32)
        if rows == "last" and by_row:
            for name in manifest.segments[last].inputs:
                values[name] = last_row(values[name])
            tokens = 1
        self._run_segment(last, values)
        logits = values[manifest.logits].numpy()
        if logits.shape != (1, tokens, manifest.model.vocab_size):
            raise GraphRefused(self._segments[last].graph, f"gives logits {list(logits.shape)} for {tokens} tokens")
        return {"all": logits[0], "last": logits[0, -1:], "none": logits[0, :0]}[rows]

    def _run_segment(self, index: int, values: Values) -> None:
        began = time.perf_counter()
        segment = self._segments[index].segment
        self._states.provide(values, segment.inputs)
        self._segments[index].run(values, self._states.shared)
        self._states.advance(values, segment.outputs)
        self.prefix.passes(values, segment.outputs)
        if self.on_segment:
            self.on_segment(values)
        for name in self._dead_after[index]:
            del values[name]
        self._segments_s += time.perf_counter() - began
