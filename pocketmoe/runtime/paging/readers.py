"""Threads that read experts into slots: first what a layer waits for, then prefetches for the next one while idle.

A prefetch begins only where nothing that a layer waits for is being read: a disk that serves two reads at once serves
each half as fast.

Everything here that is shared is guarded by the pager's one lock, which a read itself does not hold.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pocketmoe.bundle.store import ExpertId

READERS = 2  # with two reads in flight the disks measured so far are busy


@dataclass(frozen=True)
class Fetched:
    """How a read ended: the bytes and the time it took, or the error."""

    expert: ExpertId
    nbytes: int
    seconds: float
    error: Exception | None
    prefetched: bool


class Fetcher:
    """Two queues and the threads that serve them. Call its methods with `lock` held, but `close` without."""

    def __init__(
        self,
        lock: threading.Lock,
        load: Callable[[ExpertId, int], int],
        place_prefetch: Callable[[ExpertId], int | None],
        done: Callable[[Fetched], None],
        broken: Callable[[Exception], None],
        making: Callable[[], bool] = lambda: False,
    ) -> None:
        """`load` reads an expert into a slot and returns the bytes; it runs without the lock, the others with it.

        `place_prefetch`: a slot that may be filled with that prefetched expert now, or None. `done`: a read has ended.
        `broken`: a reader has ended by an error that is not the disk's; nobody is to wait for it. `making`: whether
        slots are still to be made, by `load`. That leaves the disk idle, so that one more reader helps as long as it
        lasts: a first prompt on 4 layers of OLMoE-1B-7B's shape takes 2.55 s instead of 2.9; later it would cost 5%.
        """
        self._load, self._place_prefetch, self._done, self._broken = load, place_prefetch, done, broken
        self._work = threading.Condition(lock)
        self._exact: deque[tuple[ExpertId, int]] = deque()
        self._prefetches: deque[ExpertId] = deque()
        self._prefetching = 0
        self._reading = 0  # reads of what is wanted now
        self._closing = False
        self._making = making
        helping = [False] * READERS + [True] * making()
        self._threads = [threading.Thread(target=self._read_forever, args=(helps,), daemon=True) for helps in helping]
        for thread in self._threads:
            thread.start()

    def read(self, expert: ExpertId, slot: int) -> None:
        """Read an expert that is wanted now."""
        self._exact.append((expert, slot))
        self._work.notify()

    def prefetch(self, experts: list[ExpertId]) -> None:
        """Replace the prefetches that no reader has begun, likeliest first."""
        self._prefetches = deque(experts)
        if experts and not self._prefetching:
            self._work.notify()

    def cancel(self) -> list[ExpertId]:
        """Forget what no reader has begun; the experts among it that were wanted."""
        wanted = [expert for expert, _ in self._exact]
        self._exact.clear()
        self._prefetches.clear()
        return wanted

    def close(self) -> None:
        """Stop the threads; what is being read is read to its end."""
        with self._work:
            self._closing = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _read_forever(self, helps: bool) -> None:
        try:
            self._serve(helps)
        except Exception as error:  # noqa: BLE001 - carried to the thread that waits
            with self._work:
                self._broken(error)

    def _serve(self, helps: bool) -> None:
        while (job := self._next(helps)) is not None:
            expert, slot, prefetched = job
            nbytes, error = 0, None
            began = time.perf_counter()
            try:
                nbytes = self._load(expert, slot)
            except Exception as raised:  # noqa: BLE001 - carried to the thread that waits
                error = raised
            with self._work:
                self._prefetching -= prefetched
                self._reading -= not prefetched
                self._done(Fetched(expert, nbytes, time.perf_counter() - began, error, prefetched))

    def _next(self, helps: bool) -> tuple[ExpertId, int, bool] | None:
        """Wait for something to read; None once closed. One prefetch at a time, and none beside a read in need."""
        with self._work:
            while not self._closing:
                if helps and not self._making():
                    self._work.notify()  # all slots are made: this reader ends, and another takes the read
                    break
                if self._exact:
                    self._reading += 1
                    return (*self._exact.popleft(), False)
                while self._prefetches and not (self._prefetching or self._reading):
                    expert = self._prefetches.popleft()
                    slot = self._place_prefetch(expert)
                    if slot is not None:
                        self._prefetching += 1
                        return expert, slot, True
                self._work.wait()
        return None
