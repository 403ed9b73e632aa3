"""Runs a layer's experts for a chunk of tokens: what is resident computes while the rest is read.

Readers fetch experts into slots, workers (this thread among them) run what has arrived, each expert once for all the
tokens that want it. Results are kept apart and summed by the caller in the router's order, so that the order of
arrival, and with it the budget, the backend and the number of threads, cannot change a bit of the output.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from pocketmoe.runtime.backend import Backend, Slot
from pocketmoe.runtime.budget import Budget
from pocketmoe.runtime.cache import ExpertCache
from pocketmoe.store import ExpertId

_READERS = 2  # with two reads in flight the disks measured so far are busy


_Item = TypeVar("_Item")


@dataclass
class PagerStats:
    """Counts since the pager was made; an expert counts once per layer and chunk, however many tokens want it."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    wait_s: float = 0.0  # time in which the main thread had nothing to compute
    uses: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # [layers, experts], tokens routed

    @property
    def hit_rate(self) -> float | None:
        """None before any expert was wanted."""
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else None


class _Job(NamedTuple):
    """One expert, and where its rows come from and go to: indices into [tokens] and [tokens, top_k]."""

    expert: ExpertId
    tokens: np.ndarray
    places: np.ndarray


class Pool:
    """The slots of one kind of expert and the policy that fills them."""

    def __init__(self, backend: Backend, kind: int, cache: ExpertCache, budget: Budget) -> None:
        self._backend = backend
        self._kind = kind
        self._budget = budget
        self._slots: dict[int, Slot] = {}
        self._making = threading.Lock()
        self.cache = cache

    def slot(self, number: int) -> Slot:
        """The slot of that number, made when it is first wanted."""
        slot = self._slots.get(number)
        if slot is None:
            with self._making:  # one at a time, so that its scratch memory is needed once
                slot = self._backend.make_slot(self._kind)
            self._slots[number] = slot
            self._budget.map_slot(self._backend.mapped_bytes(self._kind))
        return slot


class _Layer:
    """One call of `run_layer`: its data, and which experts are still to be run."""

    def __init__(self, x: np.ndarray, parts: np.ndarray, jobs: list[_Job]) -> None:
        self.x = x
        self.parts = parts
        self.waiting = {job.expert for job in jobs}  # their slots are not given to others
        self.missing: deque[_Job] = deque()  # in file order, not yet with a reader
        self.error: Exception | None = None


class Pager:
    """Experts of all layers behind one call. One lock guards the caches, the queues and the layer that is running."""

    def __init__(self, backend: Backend, pools: Mapping[int, Pool], uses_shape: tuple[int, int], threads: int) -> None:
        """`pools`: by expert kind. `uses_shape`: layers, most experts of a layer. `threads` >= 1 run experts."""
        self._backend = backend
        self._pools = pools
        self._changed = threading.Condition()
        self._to_read: deque[tuple[_Layer, _Job, int]] = deque()
        self._to_run: deque[tuple[_Layer, _Job]] = deque()
        self._closing = False
        self.stats = PagerStats(uses=np.zeros(uses_shape, np.int64))
        targets = [self._read_forever] * _READERS + [self._run_forever] * (threads - 1)
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def run_layer(self, layer: int, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        """Each token's experts' outputs, float32 [tokens, top_k, hidden], unweighted.

        x: float32 [tokens, hidden]; expert_ids: int64 [tokens, top_k]. Raises what reading an expert raises.
        """
        jobs = _jobs(layer, expert_ids)
        parts = np.empty((*expert_ids.shape, x.shape[1]), np.float32)
        run = _Layer(x, parts, jobs)
        with self._changed:
            self._count(layer, expert_ids)
            for job in jobs:
                if self._pool(job.expert).cache.slot_of(job.expert) is None:
                    run.missing.append(job)
                else:
                    self._to_run.append((run, job))
            self.stats.hits += len(jobs) - len(run.missing)
            self.stats.misses += len(run.missing)
            self._start_reads(run)
            self._changed.notify_all()
        self._run_until_done(run)
        if run.error is not None:
            raise run.error
        return parts

    def close(self) -> None:
        """Stop the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _pool(self, expert: ExpertId) -> Pool:
        return self._pools[self._backend.kind_of(expert)]

    def _count(self, layer: int, expert_ids: np.ndarray) -> None:
        self.stats.uses[layer] += np.bincount(expert_ids.ravel(), minlength=self.stats.uses.shape[1])
        for pool in self._pools.values():
            pool.cache.count(layer, expert_ids)

    def _start_reads(self, run: _Layer) -> None:
        """Give every missing expert that can have a slot now to the readers. The lock is held."""
        for _ in range(len(run.missing)):
            job = run.missing.popleft()
            number = self._pool(job.expert).cache.place(job.expert, run.waiting)
            if number is None:
                run.missing.append(job)
            else:
                self._to_read.append((run, job, number))

    def _run_until_done(self, run: _Layer) -> None:
        """Run experts in this thread too, until all of the layer's are done."""
        while True:
            with self._changed:
                before = time.perf_counter()
                while run.waiting and not self._to_run:
                    self._changed.wait()
                self.stats.wait_s += time.perf_counter() - before
                if not run.waiting:
                    return
                item = self._to_run.popleft()
            self._run(*item)

    def _run_forever(self) -> None:
        while (item := self._next(self._to_run)) is not None:
            self._run(*item)

    def _read_forever(self) -> None:
        while (item := self._next(self._to_read)) is not None:
            run, job, number = item
            try:
                nbytes = self._pool(job.expert).slot(number).load(job.expert)
            except Exception as error:  # noqa: BLE001 - carried to the thread that waits
                self._fail(run, job, error)
                continue
            with self._changed:
                self.stats.bytes_read += nbytes
                self._to_run.append((run, job))
                self._changed.notify_all()

    def _next(self, queue: deque[_Item]) -> _Item | None:
        """Wait for an item; None when the pager closes."""
        with self._changed:
            while not queue and not self._closing:
                self._changed.wait()
            return None if self._closing else queue.popleft()

    def _run(self, run: _Layer, job: _Job) -> None:
        try:
            pool = self._pool(job.expert)
            number = pool.cache.slot_of(job.expert)
            assert number is not None, "an expert that waits keeps its slot"
            run.parts[job.tokens, job.places] = pool.slot(number).run(run.x[job.tokens])
        except Exception as error:  # noqa: BLE001 - carried to the thread that waits
            self._fail(run, job, error)
            return
        with self._changed:
            run.waiting.discard(job.expert)
            if run.missing:
                self._start_reads(run)
            self._changed.notify_all()

    def _fail(self, run: _Layer, job: _Job, error: Exception) -> None:
        """Remember the error; nothing new is begun for the layer, what is under way ends by itself."""
        with self._changed:
            self._pool(job.expert).cache.forget(job.expert)
            run.error = run.error or error
            run.waiting.discard(job.expert)
            run.waiting.difference_update(missing.expert for missing in run.missing)
            run.missing.clear()
            self._changed.notify_all()


def _jobs(layer: int, expert_ids: np.ndarray) -> list[_Job]:
    """One job for each expert that is wanted, by expert number, which is file order."""
    jobs = []
    for expert in np.unique(expert_ids):
        tokens, places = np.nonzero(expert_ids == expert)
        jobs.append(_Job(ExpertId(layer, int(expert)), tokens, places))
    return jobs
