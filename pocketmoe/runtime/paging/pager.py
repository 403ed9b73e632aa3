"""Runs a layer's experts: what is resident computes while the rest is read, each expert once for all tokens.

Results are kept apart and summed by the caller in the router's order, so that the order of arrival, and with it the
budget, the backend and the number of threads, cannot change a bit of the output.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pocketmoe.bundle.store import ExpertId
from pocketmoe.runtime.backends.protocol import Backend, Slot
from pocketmoe.runtime.memory.budget import Budget
from pocketmoe.runtime.paging.cache import ExpertCache
from pocketmoe.runtime.paging.expert_counts import shares, to_load_first
from pocketmoe.runtime.paging.rate_limiter import RateLimiter
from pocketmoe.runtime.paging.readers import Fetched, Fetcher
from pocketmoe.runtime.paging.workers import Workers


@dataclass
class PagerStats:
    """Counts since the pager was made; an expert counts once per layer and batch, however many tokens want it.

    Each is a hit, resident and not because of a prefetch; a prefetch hit, which a prefetch has read or is reading; or a
    miss. `bytes_read` includes what prefetches read, wanted or not.
    """

    hits: int = 0
    misses: int = 0
    prefetches: int = 0  # reads begun because a prediction named the expert
    prefetch_hits: int = 0
    bytes_read: int = 0
    bytes_prefetched: int = 0
    load_s: float = 0.0  # of the reads themselves, by several threads at once
    run_s: float = 0.0  # inside experts' sessions
    wait_s: float = 0.0  # with nothing to compute for want of an expert
    # Tokens routed to each expert, int64 [layers, most experts of a layer].
    expert_counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    @property
    def hit_rate(self) -> float | None:
        """None before any expert was wanted."""
        return self._share(self.hits)

    @property
    def prefetch_hit_rate(self) -> float | None:
        """None before any expert was wanted."""
        return self._share(self.prefetch_hits)

    def _share(self, count: int) -> float | None:
        wanted = self.hits + self.prefetch_hits + self.misses
        return count / wanted if wanted else None


class Routed(NamedTuple):
    """What a chunk of tokens brings to a layer: x, float32 [tokens, hidden]; expert_ids, int64 [tokens, top_k].

    `skipped`: bool [tokens, top_k], choices that are not run and give zeros; None for exact routing.
    """

    x: np.ndarray
    expert_ids: np.ndarray
    skipped: np.ndarray | None = None


class _Rows(NamedTuple):
    """The tokens of one chunk that want an expert, and the places it has in their choice."""

    chunk: int
    tokens: np.ndarray | slice
    places: np.ndarray | int


class Pool:
    """The slots of one kind of expert and the policy that fills them."""

    def __init__(self, backend: Backend, kind: int, cache: ExpertCache, budget: Budget) -> None:
        self._backend = backend
        self._kind = kind
        self._budget = budget
        self._slots: dict[int, Slot] = {}
        self.cache = cache

    @property
    def n_made(self) -> int:
        """How many slots there are so far."""
        return len(self._slots)

    def slot(self, number: int) -> Slot:
        """The slot of that number, made when it is first filled, by the reader that fills it."""
        slot = self._slots.get(number)
        if slot is None:
            slot = self._backend.make_slot(self._kind)
            self._slots[number] = slot
            self._budget.map_slot(self._backend.mapped_bytes(self._kind))
        return slot

    def resize(self, n_slots: int) -> list[Slot]:
        """Have another number of slots; those that go."""
        return [self._slots.pop(number) for number in self.cache.resize(n_slots) if number in self._slots]


class Pager:
    """Experts of all layers behind one call. One lock guards the caches, the queues and what is under way."""

    def __init__(
        self,
        backend: Backend,
        pools: Mapping[int, Pool],
        counts_shape: tuple[int, int],
        threads: int,
        rate_limiter: RateLimiter | None = None,
    ) -> None:
        """`pools`: by expert kind. `counts_shape`: layers, most experts of a layer. `threads` >= 1 run experts.

        `rate_limiter` slows reads down, None does not.
        """
        self._backend = backend
        self._rate_limiter = rate_limiter
        self._pools: Mapping[int, Pool] = pools
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)
        self._arrived: deque[ExpertId] = deque()  # of the layer that is running, read and not yet run
        self._wanted: dict[ExpertId, list[_Rows]] = {}  # of the layer that is running, not yet run
        self._loading: set[ExpertId] = set()  # with a reader, or in its queue
        self._prefetched: set[ExpertId] = set()  # read by a prefetch, and their layer has not run since
        self._missing: deque[ExpertId] = deque()  # of the layer that is running, in file order, without a slot yet
        self._error: Exception | None = None
        self._broken: Exception | None = None  # for good: a reader has ended
        self.stats = PagerStats(expert_counts=np.zeros(counts_shape, np.int64))
        self._fetcher = Fetcher(
            self._lock, self._load, self._place_prefetch, self._on_fetched, self._on_broken, lambda: self.making_slots
        )
        self._workers = Workers(threads - 1)

    def run_layer(
        self, layer: int, chunks: Sequence[Routed], predict_next: Callable[[], Sequence[ExpertId]] | None = None
    ) -> list[np.ndarray]:
        """For each chunk, each token's experts' outputs, float32 [tokens, top_k, hidden], unweighted.

        `predict_next` says what the next layer is likely to want, likeliest first; it is asked when the disk has
        nothing to do, or while this layer would wait for it, and its answer is read once this layer's reads have ended.
        An expert is run once for each chunk that wants it, on that chunk's rows alone, so that how many chunks come
        together changes no bit. Raises what reading or running an expert raises.
        """
        parts = [_empty_parts(chunk) for chunk in chunks]
        with self._lock:
            if predict_next:
                self._fetcher.prefetch([])  # what was predicted for this layer and is not being read comes too late
            ready = self._want(layer, chunks)
            idle = not self._loading
        if idle:
            self._prefetch(predict_next)
        try:
            while True:
                before = time.perf_counter()
                self._workers.run(ready, lambda expert: self._run(expert, chunks, parts))
                self.stats.run_s += time.perf_counter() - before
                if not idle:
                    self._prefetch(predict_next)
                    idle = True
                ready = self._wait()
                if not ready:
                    return parts
        except BaseException:
            self._abandon()
            raise

    def _prefetch(self, predict: Callable[[], Sequence[ExpertId]] | None) -> None:
        if predict:
            likely = predict()
            with self._lock:
                self._fetcher.prefetch([e for e in likely if self._pool(e).cache.slot_of(e) is None])

    def is_absent(self, layer: int, expert_ids: np.ndarray) -> np.ndarray:
        """Which choices, int64 [tokens, top_k], would have to be read from disk: bool of the same shape."""
        with self._lock:
            absent = [
                self._pool(ExpertId(layer, expert)).cache.slot_of(ExpertId(layer, expert)) is None
                for expert in expert_ids.ravel().tolist()
            ]
        return np.array(absent).reshape(expert_ids.shape)

    def residents(self, layer: int) -> np.ndarray:
        """Which experts of a layer are in memory or being read, bool [most experts of a layer]."""
        with self._lock:
            return np.logical_or.reduce([pool.cache.residents(layer) for pool in self._pools.values()])

    def warm(self, counts: np.ndarray, top_k: Sequence[int]) -> None:
        """Say how many tokens chose each expert so far, int or float [layers, most experts], `top_k` of each layer's.

        Call it before the first layer: those that were chosen most are read while nothing else is.
        """
        chosen_shares = shares(counts, top_k)
        with self._lock:
            chosen = [ExpertId(int(layer), int(expert)) for layer, expert in np.argwhere(chosen_shares)]
            ranked: list[ExpertId] = []
            for pool in self._pools.values():
                for layer, layer_shares in enumerate(chosen_shares):
                    pool.cache.expect(layer, layer_shares)
                mine = (expert for expert in chosen if self._pool(expert) is pool)
                ranked += to_load_first(chosen_shares, mine, pool.cache.n_slots)
            self._fetcher.prefetch(ranked)

    def resize(self, slots: Mapping[int, int]) -> dict[int, list[Slot]]:
        """Have another number of slots of each kind, between two steps; by kind those that go, for the caller to close.

        What was in them is read again when it is wanted.
        """
        with self._lock:
            self._fetcher.prefetch([])
            while self._loading and self._broken is None:
                self._arrival.wait()
            for pool in self._pools.values():
                if not pool.cache.evicts:  # it has not noted what was chosen
                    for layer, counts in enumerate(self.stats.expert_counts):
                        pool.cache.expect(layer, counts / max(1, counts.sum()))
            return {kind: self._pools[kind].resize(count) for kind, count in slots.items()}

    def lend_slots(self, count: int) -> dict[int, list[Slot]]:
        """Up to `count` slots of each kind for reading into by hand; run no layer after that."""
        lent = {kind: range(min(count, pool.cache.n_slots)) for kind, pool in self._pools.items()}
        return {kind: [self._pools[kind].slot(number) for number in numbers] for kind, numbers in lent.items()}

    def close(self) -> None:
        """Stop the threads and drop the slots, so that a reference to the pager does not keep them in memory."""
        self._fetcher.close()
        self._workers.close()
        self._pools = {}

    def _pool(self, expert: ExpertId) -> Pool:
        return self._pools[self._backend.kind_of(expert)]

    def _want(self, layer: int, chunks: Sequence[Routed]) -> list[ExpertId]:
        """Note what a layer wants and start its reads; what can run at once. The lock is held."""
        self._wanted = _rows_by_expert(layer, chunks)
        for chunk in chunks:
            self.stats.expert_counts[layer] += np.bincount(
                chunk.expert_ids.ravel(), minlength=self.stats.expert_counts.shape[1]
            )
            for pool in self._pools.values():
                pool.cache.count(layer, chunk.expert_ids)
        ready: list[ExpertId] = []
        for expert in self._wanted:
            if self._pool(expert).cache.slot_of(expert) is None:
                self._missing.append(expert)
                continue
            prefetched = expert in self._prefetched or expert in self._loading
            self.stats.prefetch_hits += prefetched
            self.stats.hits += not prefetched
            if expert not in self._loading:
                ready.append(expert)
        self.stats.misses += len(self._missing)
        self._prefetched.difference_update([e for e in self._prefetched if e.layer == layer])
        self._start_reads()
        return ready

    def _start_reads(self) -> None:
        """Give every missing expert that can have a slot now to the readers. The lock is held."""
        keep = self._wanted.keys() | self._loading  # what a prefetch has read can go
        full: set[int] = set()  # kinds whose slots are all kept
        waiting: deque[ExpertId] = deque()
        for expert in self._missing:
            kind = self._backend.kind_of(expert)
            slot = None if kind in full else self._pools[kind].cache.place(expert, keep)
            if slot is None:
                full.add(kind)
                waiting.append(expert)
            else:
                self._loading.add(expert)
                self._fetcher.read(expert, slot)
        self._missing = waiting

    def _place_prefetch(self, expert: ExpertId) -> int | None:
        """A slot for an expert to prefetch, or None: what is wanted, loading or prefetched stays. The lock is held."""
        cache = self._pool(expert).cache
        if cache.slot_of(expert) is not None:
            return None
        # It may evict any other resident: in replays none was needed as soon as an expert that was predicted.
        slot = cache.place(expert, self._wanted.keys() | self._loading | self._prefetched)
        if slot is not None:
            self._loading.add(expert)
            self.stats.prefetches += 1
        return slot

    @property
    def making_slots(self) -> bool:
        """Whether there are slots that no expert has been in yet."""
        return any(pool.n_made < pool.cache.n_slots for pool in self._pools.values())

    def _load(self, expert: ExpertId, slot: int) -> int:
        began = time.perf_counter()
        nbytes = self._pool(expert).slot(slot).load(expert)
        if self._rate_limiter:
            self._rate_limiter.wait(nbytes, began)
        return nbytes

    def _on_fetched(self, fetched: Fetched) -> None:
        """A read has ended. The lock is held."""
        expert = fetched.expert
        self._loading.discard(expert)
        self.stats.bytes_read += fetched.nbytes
        self.stats.load_s += fetched.seconds
        self.stats.bytes_prefetched += fetched.nbytes if fetched.prefetched else 0
        if fetched.error is not None:
            self._pool(expert).cache.forget(expert)
            if expert in self._wanted:
                self._error = self._error or fetched.error
        elif expert in self._wanted:
            self._arrived.append(expert)
        elif fetched.prefetched:
            self._prefetched.add(expert)
        if self._missing and self._error is None:  # a prefetch has ended, and its slot can be had
            self._start_reads()
        self._arrival.notify()

    def _on_broken(self, error: Exception) -> None:
        """A reader is gone. The lock is held."""
        self._broken = error
        self._arrival.notify()

    def _wait(self) -> list[ExpertId]:
        """Experts that have arrived, after waiting for one if need be; none when the layer is done."""
        with self._lock:
            if self._wanted and not self._arrived:
                before = time.perf_counter()
                while not self._arrived and self._error is None and self._broken is None:
                    self._arrival.wait()
                self.stats.wait_s += time.perf_counter() - before
            error = self._error or self._broken
            if error is not None:
                raise error
            ready = list(self._arrived)
            self._arrived.clear()
            return ready

    def _run(self, expert: ExpertId, chunks: Sequence[Routed], parts: list[np.ndarray]) -> None:
        pool = self._pool(expert)
        number = pool.cache.slot_of(expert)
        assert number is not None, "an expert that is wanted keeps its slot"
        slot = pool.slot(number)
        for rows in self._wanted[expert]:
            parts[rows.chunk][rows.tokens, rows.places] = slot.run(chunks[rows.chunk].x[rows.tokens])
        with self._lock:
            del self._wanted[expert]
            if self._missing:
                self._start_reads()

    def _abandon(self) -> None:
        """After an error: nothing new is begun; what is under way ends, and its experts stay where they were put."""
        with self._lock:
            for expert in self._fetcher.cancel():
                self._loading.discard(expert)
                self._pool(expert).cache.forget(expert)
            while self._loading and self._broken is None:
                self._arrival.wait()
            self._wanted.clear()
            self._missing.clear()
            self._arrived.clear()
            self._error = None


def _empty_parts(chunk: Routed) -> np.ndarray:
    shape = (*chunk.expert_ids.shape, chunk.x.shape[1])
    return np.empty(shape, np.float32) if chunk.skipped is None else np.zeros(shape, np.float32)


def _rows_by_expert(layer: int, chunks: Sequence[Routed]) -> dict[ExpertId, list[_Rows]]:
    """Which rows want which expert, by expert number, which is file order."""
    if len(chunks) == 1 and len(chunks[0].expert_ids) == 1 and chunks[0].skipped is None:  # decode
        chosen = chunks[0].expert_ids[0].tolist()
        rows = {ExpertId(layer, expert): [_Rows(0, slice(0, 1), place)] for place, expert in enumerate(chosen)}
        if len(rows) == len(chosen):  # else a router has chosen an expert twice
            return rows
    found: dict[ExpertId, list[_Rows]] = {}
    for number, chunk in enumerate(chunks):
        ids = chunk.expert_ids if chunk.skipped is None else np.where(chunk.skipped, -1, chunk.expert_ids)
        for expert in np.unique(ids[ids >= 0]).tolist():
            tokens, places = np.nonzero(ids == expert)
            found.setdefault(ExpertId(layer, expert), []).append(_Rows(number, tokens, places))
    return dict(sorted(found.items()))


def combine(parts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted sum of each token's experts in the router's order, float32 [tokens, hidden].

    parts: float32 [tokens, top_k, hidden]; weights: float32 [tokens, top_k].
    """
    return np.add.reduce(parts * weights[:, :, None], axis=1)  # which adds one place after the other
