"""The engine: token ids in, logits out, experts paged in within a budget.

Tokens go through the bundle's segments; between two of them run the experts that the first one's router chose. Several
texts go through the layers together: each is computed as if it were alone, only the reading of experts is shared.
"""

from __future__ import annotations

import threading
import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.backends.protocol import Slot
from pocketmoe.runtime.engine.claims import (
    SLOTS,
    TEXTS,
    beside_slots,
    least_as_open,
    more_texts,
    refit_slots,
    slots_bytes,
    text_bytes,
)
from pocketmoe.runtime.engine.opening import open_parts
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.engine.segments import Rows, SegmentObserver
from pocketmoe.runtime.engine.sequence import Sequence, Values
from pocketmoe.runtime.engine.statistics import Activity, Skipped, StepTimes
from pocketmoe.runtime.memory.budget import trim
from pocketmoe.runtime.paging.pager import Routed, combine

_TOKENS_TOGETHER = 16  # of an answer, each computed by itself
_OBSERVED_EVERY = 16  # decode steps; looking costs 0.15 ms, and from one step to the next memory hardly changes

RouteObserver = Callable[[int, np.ndarray], None]  # MoE layer, expert ids int64 [tokens, top_k]; called for each chunk
# MoE layer, x float32 [tokens, width], expert ids, weights [tokens, top_k], output float32 [tokens, width], which it
# may change in place; called for each chunk
ExpertsObserver = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
Retired = dict[int, list[Slot]]  # slots by expert kind
Resizing = Callable[[], Retired]


def _at_once(act: Resizing) -> Retired:
    return act()


@dataclass(frozen=True)
class Feed:
    """Tokens that follow a text, a chunk of them at most."""

    sequence: Sequence
    tokens: abc.Sequence[int]
    rows: Rows = "last"  # whose logits are wanted
    last: int | None = None  # the position of the last token that is being fed, where more chunks come later
    decoding: bool = False  # a token of an answer, not of a prompt


def feeds_of(
    sequence: Sequence, tokens: abc.Sequence[int], rows: Rows, *, decoding: bool = False, apart: bool = False
) -> list[Feed]:
    """Tokens that follow a text, in its chunks; `apart`: each by itself, as a decode step would have it."""
    size, last = (1, None) if apart else (sequence.layout.chunk, sequence.length + len(tokens) - 1)
    pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    before: Rows = rows if rows == "all" else "none"
    wanted: list[Rows] = [before for _ in pieces[1:]]
    wanted.append(rows)
    return [Feed(sequence, piece, row, last, decoding) for piece, row in zip(pieces, wanted, strict=True)]


class Engine:
    """A model that is ready to run, as a context manager. It has `sequences`; without one named, the first is meant.

    `at_once` of them are computed together at most. Where texts will begin alike there may be more, which keep what
    they have, as many as there is memory for when every expert has its slot.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions, progress: Progress = no_progress) -> None:
        """Check and load a bundle within the memory asked for.

        Raises BadInput or DamagedFile for the bundle, BudgetTooSmall or OverBudget for the memory. A first use on a
        machine packs the experts for its CPU, which `progress` shows.
        """
        self.bundle = bundle
        self.on_routes: RouteObserver | None = None
        self.on_experts: ExpertsObserver | None = None
        self.on_segment: SegmentObserver | None = None
        self.times = StepTimes()
        self.skipped = Skipped()
        self._layers = bundle.manifest.moe_layers
        self._options = options
        parts = open_parts(bundle, options, progress)
        self._closing = parts.closing
        self.budget, self.backend, self.opened = parts.budget, parts.backend, parts.opened
        self.sequences, self.chunks_together = parts.sequences, parts.chunks_together
        self.at_once = len(parts.sequences)
        self.cache_routing = parts.cache_routing
        self._prefetcher, self._segments, self._pager = parts.prefetcher, parts.segments, parts.pager
        self._resizing = threading.Lock()
        self._decode_cpu, self._cap = parts.decode_cpu, parts.cap
        self.lend_slots = parts.pager.lend_slots
        self.stats = parts.pager.stats  # since the engine was opened
        self.predictions = parts.prefetcher.stats
        self._keep_texts(self._more_texts(self.budget.total_bytes, self.opened.slots), [])

    def expect(self, counts: np.ndarray) -> None:
        """Load the experts that were used most so far, while nothing else is read.

        counts: int or float [layers, most experts of a layer], tokens routed to each.
        """
        self._pager.warm(counts, [layer.top_k for layer in self._layers])

    @property
    def least_bytes(self) -> int:
        """The least budget that `resize` takes."""
        return least_as_open(self.budget, self.backend, self.opened.experts)

    def resize(
        self,
        total_bytes: int,
        between_steps: Callable[[Resizing], Retired] = _at_once,
        idle: list[Sequence] | None = None,
    ) -> None:
        """Keep to another budget from now on. Slots go back to the system, or come when experts are wanted again.

        What it computes stays the same. `between_steps` calls what it is given while no step is computed; memory goes
        back after that, beside the steps that follow. `idle`: texts that are not being computed, the least useful
        first, by default those beyond the ones that are computed at once; those that go leave it, those that come join
        it. Raises BudgetTooSmall.
        """
        with self._resizing:
            slots = refit_slots(self.budget, total_bytes, self.backend, self.opened.experts)
            more = self._more_texts(total_bytes, slots)

            def act() -> Retired:
                self._keep_texts(more, self.sequences[self.at_once :] if idle is None else idle)
                return self._pager.resize(slots)

            retired = between_steps(act)
            for kind, gone in retired.items():
                for slot in gone:
                    slot.close()
                    self.budget.map_slot(-self.backend.mapped_bytes(kind))
            trim()
            self.opened = replace(self.opened, slots=slots)
            self.budget.resize(total_bytes)
            self.budget.release(SLOTS)
            self.budget.claim(SLOTS, slots_bytes(slots, self.backend))
            self._cap()

    def activity(self) -> Activity:
        """What it has done so far, and what is in memory now. From any thread."""
        sizes = [layer.n_experts for layer in self._layers]
        return Activity.of(self.budget, self._pager, self.times, sizes)

    def feed(self, tokens: abc.Sequence[int], rows: Rows = "last") -> np.ndarray:
        """Append tokens to the first text. Returns logits, float32 [rows, vocab]: of the last token, all, or none.

        Raises BadInput when the text would outgrow the KV caches, DamagedFile when an expert cannot be read or a graph
        gives what it must not, OverBudget when one needs more memory than there is.
        """
        sequence = self.sequences[0]
        feeds = feeds_of(sequence, sequence.to_feed(tokens), rows, decoding=len(tokens) == 1)
        found = self._in_turns(feeds, self.chunks_together if sequence.layout.local else 1)
        return found[-len(tokens) :] if rows == "all" else found

    def feed_each(self, tokens: abc.Sequence[int], rows: Rows = "last") -> np.ndarray:
        """As `feed` of one token after the other, bit for bit; together where that can be: experts are read once.

        Returns logits, float32 [rows, vocab]: of the last token, or of all.
        """
        sequence = self.sequences[0]
        limit = sequence.layout.computed_anew_beyond
        if limit is not None and 0 < sequence.length <= limit < sequence.length + len(tokens):
            each = [self.feed([token]) for token in tokens]
            return np.concatenate(each if rows == "all" else each[-1:])
        feeds = feeds_of(sequence, sequence.to_feed(tokens), rows, decoding=len(tokens) == 1, apart=True)
        return self._in_turns(feeds, _TOKENS_TOGETHER if sequence.layout.local else 1)

    def step(self, feeds: abc.Sequence[Feed]) -> list[np.ndarray]:
        """Take chunks of texts through the layers together; logits, float32 [rows, vocab], of each.

        A text may have several chunks in their order where its layout is `local`. Each chunk is computed by itself, as
        if it came alone: only the reading of experts is shared. Raises what `feed` raises, and then each text is as it
        was before, or as much of its beginning as was kept.
        """
        sequences = {id(feed.sequence): feed.sequence for feed in feeds}.values()
        decoding = all(feed.decoding for feed in feeds)
        for sequence in sequences:
            sequence.begin_step()
        try:
            with self._decode_cpu.context(decoding):
                logits = self._run(feeds, decoding)
        except BaseException:
            for sequence in sequences:
                sequence.roll_back()
            raise
        for sequence in sequences:
            sequence.end_step()
        return logits

    def reset(self) -> None:
        """Forget the first text; experts stay where they are."""
        self.sequences[0].reset()

    @property
    def length(self) -> int:
        """Tokens of the first text."""
        return self.sequences[0].length

    def close(self) -> None:
        """Stop the threads, give the slots back."""
        with self._resizing:
            self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _more_texts(self, total_bytes: int, slots: dict[int, int]) -> int:
        """How many texts there is memory for beyond those that are computed at once, with so many slots by kind."""
        options = self._options
        if not options.reuses or not self.sequences[0].layout.keeps or slots != self.opened.experts:
            return 0
        left = total_bytes - beside_slots(self.budget) - slots_bytes(slots, self.backend)
        return more_texts(left, total_bytes, options.memory, text_bytes(self.bundle.manifest, options.load))

    def _keep_texts(self, more: int, idle: list[Sequence]) -> None:
        """Have so many texts beyond those that are computed at once."""
        surplus = len(self.sequences) - self.at_once - more
        for text in sorted(idle, key=lambda text: bool(text.tokens))[: max(0, surplus)]:
            idle.remove(text)
            self.sequences.remove(text)
        added = [Sequence(self.sequences[0].layout) for _ in range(-surplus)]
        self.sequences += added
        idle[:0] = added
        if TEXTS in self.budget.claims:
            self.budget.release(TEXTS)
        if more:
            self.budget.claim(TEXTS, more * text_bytes(self.bundle.manifest, self._options.load))

    def _in_turns(self, feeds: abc.Sequence[Feed], together: int) -> np.ndarray:
        """The logits of chunks of which so many go through the layers together, float32 [rows, vocab]."""
        starts = range(0, len(feeds), together)
        return np.concatenate([rows for start in starts for rows in self.step(feeds[start : start + together])])

    def _run(self, feeds: abc.Sequence[Feed], decoding: bool) -> list[np.ndarray]:
        stats, began = self.stats, time.perf_counter()
        before = (self._segments.seconds, stats.run_s, stats.wait_s, stats.misses)
        prefetching = decoding and len(feeds) == 1 and self._prefetcher.on
        batch = [feed.sequence.start_chunk(feed.tokens, feed.last) for feed in feeds]
        for index, layer in enumerate(self._layers):
            routed: list[Routed] = []
            for feed, values in zip(feeds, batch, strict=True):
                self._provide_preference(index, values, feed.decoding)
                self._segments.run(index, values, feed.sequence, self.on_segment)
            for feed, values in zip(feeds, batch, strict=True):
                routed.append(self._routed(index, values, len(feed.tokens), feed.decoding))
            self._note_routes(index, routed, prefetching)
            predict = partial(self._prefetcher.predict, index, routed[0].x) if prefetching else None
            for chunk, values, parts in zip(routed, batch, self._pager.run_layer(index, routed, predict), strict=True):
                weights = values[layer.expert_weights].numpy()
                summed = combine(parts, weights)
                if self.on_experts:
                    self.on_experts(index, chunk.x, chunk.expert_ids, weights, summed)
                self._segments.forget_routed(index, values)
                values[layer.output] = ort.OrtValue.ortvalue_from_numpy(summed)
        if not decoding or not self.times.steps % _OBSERVED_EVERY:
            self.budget.observe()
        logits = [
            self._segments.logits(values, len(feed.tokens), feed.sequence, feed.rows, self.on_segment)
            for feed, values in zip(feeds, batch, strict=True)
        ]
        if decoding:
            self.times.tokens += len(feeds)
            self._note_step(time.perf_counter() - began, *before)
        else:
            trim()
        return logits

    def _provide_preference(self, index: int, values: Values, decoding: bool) -> None:
        """What the segment before an MoE layer needs to prefer experts in memory."""
        if self.cache_routing.on:
            preferring = decoding and self.opened.slots != self.opened.experts  # where all fit, a first use is no harm
            self.cache_routing.provide(values, index, self._pager.residents(index), preferring)

    def _routed(self, index: int, values: Values, tokens: int, decoding: bool) -> Routed:
        """What a chunk brings to an MoE layer, as its segment has left it in `values`."""
        layer = self._layers[index]
        x, expert_ids = values[layer.x].numpy(), values[layer.expert_ids].numpy()
        weights = values[layer.expert_weights].numpy()
        self._segments.check_routes(index, layer, tokens, x, expert_ids, weights)
        if decoding and self.cache_routing.on:
            self.cache_routing.note(expert_ids, values)
        if not self._options.drop_cold:
            return Routed(x, expert_ids)
        light = weights < self._options.drop_cold * weights.mean(axis=1, keepdims=True)
        skipped = light & self._pager.is_absent(index, expert_ids)
        self.skipped.note(skipped, weights)
        return Routed(x, expert_ids, skipped)

    def _note_routes(self, index: int, routed: abc.Sequence[Routed], prefetching: bool) -> None:
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
