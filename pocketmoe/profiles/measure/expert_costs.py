"""What getting one expert into memory costs on this machine, by the runtime's own readers on the bundle's own file.

A layer that misses some experts reads them in a burst, and runs each when it arrives. So that is what is timed: how
long it waits in bursts of one expert, and of as many as a token chooses, out of random places of the file.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.store import ExpertId
from pocketmoe.profiles.profile import ExpertCosts
from pocketmoe.runtime.backends.graph_checks import expert_width
from pocketmoe.runtime.backends.protocol import Slot
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.paging.readers import Fetched, Fetcher

_LONGEST_S = 1.0
_MOST_BURSTS = 60
_LEAST_BURSTS = 4
_PAUSE_S = 0.001  # between bursts


def expert_costs(engine: Engine, progress: Progress = no_progress) -> tuple[ExpertCosts, int]:
    """The costs, and the bytes that reading one expert takes, means over experts drawn at random.

    It reads into the engine's own slots, so that it takes no memory of its own; the engine is of no use afterwards.
    """
    with engine.bundle.open_store() as store:
        everyone = sorted(store.records)
    top_k = max(layer.top_k for layer in engine.bundle.manifest.moe_layers)
    rng = np.random.default_rng(0)
    bursts = _Bursts(engine, max(2, top_k))
    alone: list[float] = []  # seconds, of each burst
    checked: list[float] = []
    many: list[float] = []
    deadline = time.perf_counter() + _LONGEST_S
    try:
        while len(many) < _LEAST_BURSTS or (time.perf_counter() < deadline and len(many) < _MOST_BURSTS):
            progress("reading experts", len(many), _MOST_BURSTS)
            experts = [everyone[int(n)] for n in rng.choice(len(everyone), bursts.longest, replace=False)]
            checked.append(bursts.read(experts[:1]))
            bursts.read(experts)  # each has been checked then
            alone.append(bursts.read(experts[:1]))
            many.append(bursts.read(experts))
    finally:
        bursts.close()
    one_s = _usual(alone)
    more_s = (_usual(many) - one_s) / max(1, bursts.longest - 1)
    costs = ExpertCosts(
        read_one_s=one_s,
        read_more_s=max(more_s, one_s / 10),
        check_s=max(0.0, statistics.median(checked[:_LEAST_BURSTS]) - one_s),
        slot_s=bursts.slot_s,
    )
    return costs, round(bursts.bytes_read / bursts.reads)


def _usual(seconds: Sequence[float]) -> float:
    """The mean of the middle half: stalls of a disk are long and rare."""
    quarter = len(seconds) // 4
    return statistics.mean(sorted(seconds)[quarter : len(seconds) - quarter])


class _Bursts:
    """The runtime's readers and slots. `slot_s`: seconds for making a slot, where that had not been done."""

    def __init__(self, engine: Engine, longest: int) -> None:
        self._backend = engine.backend
        began = time.perf_counter()
        self._slots = engine.lend_slots(longest)
        self.longest = min(len(slots) for slots in self._slots.values())
        self.slot_s = (time.perf_counter() - began) / sum(map(len, self._slots.values()))
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._arrived: list[Fetched] = []
        self._broken: Exception | None = None
        self._slot_of: dict[ExpertId, int] = {}
        self._x = np.ones((1, expert_width(engine.bundle)), np.float32)
        self.bytes_read = self.reads = 0
        self._fetcher = Fetcher(self._lock, self._load, lambda _: None, self._done, self._on_broken)

    def read(self, experts: Sequence[ExpertId]) -> float:
        """Seconds of waiting for them all, each of which is run when it is there. Raises what a read raises."""
        wait_s, left = 0.0, len(experts)
        began = time.perf_counter()
        while time.perf_counter() - began < _PAUSE_S:
            pass  # the thread computes before a layer's reads, too, and does not sleep
        before = time.perf_counter()
        with self._lock:
            for slot, expert in enumerate(sorted(experts)):
                self._fetcher.read(expert, slot)
                self._slot_of[expert] = slot
        while left:
            with self._lock:
                while not self._arrived and self._broken is None:
                    self._ended.wait()
                if self._broken is not None:
                    raise self._broken
                arrived, self._arrived = self._arrived, []
            wait_s += time.perf_counter() - before
            for fetched in arrived:
                if fetched.error:
                    raise fetched.error
                self._slot(fetched.expert).run(self._x)
            left -= len(arrived)
            before = time.perf_counter()
        return wait_s

    def close(self) -> None:
        self._fetcher.close()

    def _slot(self, expert: ExpertId) -> Slot:
        return self._slots[self._backend.kind_of(expert)][self._slot_of[expert]]

    def _load(self, expert: ExpertId, slot: int) -> int:
        return self._slots[self._backend.kind_of(expert)][slot].load(expert)

    def _on_broken(self, error: Exception) -> None:
        self._broken = error
        self._ended.notify()

    def _done(self, fetched: Fetched) -> None:
        self._arrived.append(fetched)
        self.reads += 1
        self.bytes_read += fetched.nbytes
        self._ended.notify()
