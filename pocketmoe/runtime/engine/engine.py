"""The engine: token ids in, logits out, experts paged in within a budget.

Tokens go through the bundle's segments; between two of them run the experts that the first one's router chose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.backends.protocol import Slot
from pocketmoe.runtime.engine.opening import open_parts
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.engine.segments import Rows, SegmentObserver, Values
from pocketmoe.runtime.engine.statistics import Dropped, StepTimes
from pocketmoe.runtime.memory.budget import trim
from pocketmoe.runtime.paging.pager import Routed, combine

_OBSERVED_EVERY = 16  # decode steps; looking costs 0.15 ms, and from one step to the next memory hardly changes

RouteObserver = Callable[[int, np.ndarray], None]  # MoE layer, expert ids int64 [tokens, top_k]; called for each chunk
# MoE layer, x float32 [tokens, width], expert ids, weights [tokens, top_k], output float32 [tokens, width], which it
# may change in place; called for each chunk
ExpertsObserver = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
# Tokens in the text by now, and once all that are being fed are; called within a long prompt, to end it by raising.
FeedObserver = Callable[[int, int], None]


class Engine:
    """A model that is ready to run, as a context manager."""

    def __init__(self, bundle: Bundle, options: EngineOptions, progress: Progress = no_progress) -> None:
        """Check and load a bundle within the memory asked for.

        Raises BadInput or DamagedFile for the bundle, BudgetTooSmall or OverBudget for the memory. A first use on a
        machine packs the experts for its CPU, which `progress` shows.
        """
        self.bundle = bundle
        self.on_routes: RouteObserver | None = None
        self.on_experts: ExpertsObserver | None = None
        self.on_segment: SegmentObserver | None = None
        self.on_fed: FeedObserver | None = None
        self.times = StepTimes()
        self.dropped = Dropped()
        self.length = 0  # tokens in the KV caches
        self._layers = bundle.manifest.moe_layers
        self._skip_below, self._chunk = options.drop_cold, options.chunk
        parts = open_parts(bundle, options, progress)
        self._closing = parts.closing
        self.budget, self.backend, self.opened = parts.budget, parts.backend, parts.opened
        self.preference = parts.preference
        self._prefetcher = parts.prefetcher
        self._segments, self._pager, self._chunks_together = parts.segments, parts.pager, parts.chunks_together
        self.prefix = parts.segments.prefix
        self._own_cpu = parts.own_cpu
        self.stats = parts.pager.stats  # since the engine was opened
        self.guesses = parts.prefetcher.stats

    def expect(self, counts: np.ndarray) -> None:
        """Load the experts that were used most so far, while nothing else is read.

        counts: int or float [layers, most experts of a layer], tokens routed to each.
        """
        self._pager.warm(counts, [layer.top_k for layer in self._layers])

    def feed(self, tokens: Sequence[int], rows: Rows = "last") -> np.ndarray:
        """Append tokens to the text. Returns logits, float32 [rows, vocab]: of the last token, of all, or of none.

        Raises BadInput when the text would outgrow the KV caches, DamagedFile when an expert cannot be read or a graph
        gives what it must not, OverBudget when one needs more memory than there is.
        """
        self._segments.states.refuse_beyond_capacity(self.length + len(tokens))
        before = self._computed_anew(len(tokens))
        if before:
            return self._feed([*before, *tokens], rows)[-len(tokens) if rows == "all" else 0 :]
        return self._feed(tokens, rows)

    def lend_slots(self, count: int) -> dict[int, list[Slot]]:
        """Up to `count` slots by expert kind, to measure what reading costs; feed no more after that."""
        return self._pager.lend_slots(count)

    def reset(self) -> None:
        """Forget the text; experts stay where they are."""
        self._segments.states.reset()
        self.prefix.reset()
        self.length = 0

    def truncate(self, length: int) -> int:
        """Forget what follows the text's first `length` tokens, and of those what has to be computed anew.

        Returns how many tokens are kept (see `prefix`). Also right after a feeding that an error has ended.
        """
        self.length = self.prefix.cut(length)
        return self.length

    def state(self, name: str) -> np.ndarray:
        """A copy of the KV cache or recurrent state whose input the manifest calls `name`, after the text so far.

        Of the manifest's shape and dtype, a cache with as many tokens as the text.
        """
        return self._segments.states.contents(name, self.length)

    def close(self) -> None:
        """Stop the threads, give the slots back."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _computed_anew(self, more: int) -> list[int]:
        """The text so far, which is then forgotten, where `more` tokens make it one that is computed anew."""
        limit = self.bundle.manifest.model.computed_anew_beyond
        if limit is None or not 0 < self.length <= limit < self.length + more:
            return []
        before = self.prefix.tokens
        self.reset()
        return before

    def _feed(self, tokens: Sequence[int], rows: Rows) -> np.ndarray:
        starts = range(0, len(tokens), self._chunk)
        chunks = [np.asarray(tokens[start : start + self._chunk], np.int64) for start in starts]
        logits: list[np.ndarray] = []
        decoding = len(tokens) == 1
        last = self.length + len(tokens) - 1
        with self._own_cpu.context(decoding):
            for start in range(0, len(chunks), self._chunks_together):
                batch = chunks[start : start + self._chunks_together]
                is_last = start + self._chunks_together >= len(chunks)
                logits += self._run_batch(batch, rows if rows == "all" or is_last else "none", decoding, last)
                self.prefix.add(batch)
                if self.on_fed and not is_last:
                    self.on_fed(self.length, last + 1)
        return np.concatenate(logits)

    def _run_batch(self, chunks: Sequence[np.ndarray], rows: Rows, decoding: bool, last: int) -> list[np.ndarray]:
        """Take chunks of tokens, int64 [n] each, through the layers together; logits, float32 [rows, vocab], of each.

        `last`: the position of the last token that is being fed, in these chunks or in later ones.
        Each chunk is computed by itself, as if it came alone: only the reading of experts is shared.
        """
        stats, began = self.stats, time.perf_counter()
        before = (self._segments.seconds, stats.run_s, stats.wait_s, stats.misses)
        prefetching = decoding and self._prefetcher.on
        preferring = decoding and self.opened.slots != self.opened.experts  # where all fit, a first use is no harm
        batch = [self._inputs(tokens, last) for tokens in chunks]
        for index, layer in enumerate(self._layers):
            for values in batch:
                if self.preference.on:
                    self.preference.provide(values, index, self._pager.residents(index), preferring)
                self._segments.run(index, values, self.on_segment)
            routed = [
                self._routed(index, values, len(tokens), decoding) for values, tokens in zip(batch, chunks, strict=True)
            ]
            self._note_routes(index, routed, prefetching)
            predict = partial(self._prefetcher.predict, index, routed[0].x) if prefetching else None
            for chunk, values, parts in zip(routed, batch, self._pager.run_layer(index, routed, predict), strict=True):
                weights = values[layer.expert_weights].numpy()
                summed = combine(parts, weights)
                if self.on_experts:
                    self.on_experts(index, chunk.x, chunk.expert_ids, weights, summed)
                values[layer.output] = ort.OrtValue.ortvalue_from_numpy(summed)
        if not decoding or not self.times.steps % _OBSERVED_EVERY:
            self.budget.observe()
        logits = [
            self._segments.logits(
                values, len(tokens), rows if rows == "all" or values is batch[-1] else "none", self.on_segment
            )
            for values, tokens in zip(batch, chunks, strict=True)
        ]
        if decoding:
            self._note_step(time.perf_counter() - began, *before)
        else:
            trim()
        return logits

    def _inputs(self, tokens: np.ndarray, last: int) -> Values:
        """The first segment's inputs for a chunk, int64 [n], which is then part of the text."""
        names = self.bundle.manifest.inputs
        inputs = {names.token_ids: tokens[None]}
        if names.positions:
            inputs[names.positions] = np.arange(self.length, self.length + len(tokens), dtype=np.int64)[None]
        if names.past_length:
            inputs[names.past_length] = np.array([self.length], np.int64)
        if names.last_position:
            inputs[names.last_position] = np.array([last], np.int64)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        self.prefix.starts(tokens, self.length, values)
        self.length += len(tokens)
        return values

    def _routed(self, index: int, values: Values, tokens: int, decoding: bool) -> Routed:
        """What a chunk brings to an MoE layer, as its segment has left it in `values`."""
        layer = self._layers[index]
        x, expert_ids = values[layer.x].numpy(), values[layer.expert_ids].numpy()
        weights = values[layer.expert_weights].numpy()
        self._segments.check_routes(index, layer, tokens, x, expert_ids, weights)
        if decoding and self.preference.on:
            self.preference.note(expert_ids, values)
        if not self._skip_below:
            return Routed(x, expert_ids)
        light = weights < self._skip_below * weights.mean(axis=1, keepdims=True)
        skipped = light & self._pager.is_cold(index, expert_ids)
        self.dropped.note(skipped, weights)
        return Routed(x, expert_ids, skipped)

    def _note_routes(self, index: int, routed: Sequence[Routed], prefetching: bool) -> None:
        if prefetching:
            self._prefetcher.note_choice(index, routed[0].expert_ids)
        if self.on_routes:
            for chunk in routed:
                self.on_routes(index, chunk.expert_ids)

    def _note_step(self, seconds: float, segments_s: float, run_s: float, wait_s: float, misses: int) -> None:
        """Enter a decode step into the statistics; all but the first are counters as they were before it."""
        stats = self.stats
        self.times.add(seconds, self._segments.seconds - segments_s, stats.run_s - run_s, stats.wait_s - wait_s)
        self._prefetcher.note_step(seconds, missed=stats.misses > misses)
