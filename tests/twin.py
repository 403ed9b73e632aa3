"""A backend in memory: no bundle, no session, an expert multiplies by a number that only it has.

It keeps the contract of tests/runtime/backends/test_contract.py, so that what is tested with it holds for the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from pocketmoe.bundle.store import ExpertId
from pocketmoe.errors import DamagedFile

SLOT_BYTES = 100


class TwinSlot:
    """Room for one number; fails when two threads are in it."""

    def __init__(self, backend: TwinBackend) -> None:
        self._backend = backend
        self._alone = threading.Lock()
        self._factor: float | None = None

    def load(self, expert: ExpertId) -> int:
        assert self._alone.acquire(blocking=False), "a slot was loaded while it was in use"
        try:
            self._backend.on_load(expert)
            if expert in self._backend.broken:
                raise DamagedFile("experts.bin", f"{expert} is broken")
            self._factor = factor(expert)
            time.sleep(self._backend.read_s)
            return SLOT_BYTES
        finally:
            self._alone.release()

    def run(self, x: np.ndarray) -> np.ndarray:
        assert self._factor is not None, "a slot is run before it is loaded"
        assert self._alone.acquire(blocking=False), "a slot was run while it was in use"
        try:
            self._backend.on_run()
            time.sleep(self._backend.read_s / 2)
            return x * np.float32(self._factor)
        finally:
            self._alone.release()

    def close(self) -> None:
        assert self._alone.acquire(blocking=False), "a slot was closed while it was in use"
        self._backend.closed += 1


class TwinBackend:
    """Makes such slots. Experts in `broken` cannot be read; `on_load` and `on_run` are called inside a slot."""

    name = "twin"

    def __init__(self, kinds: int = 1, read_s: float = 0.0) -> None:
        self.kinds = kinds
        self.read_s = read_s
        self.broken: set[ExpertId] = set()
        self.made = self.closed = 0  # slots
        self.on_load: Callable[[ExpertId], object] = lambda _: None
        self.on_run: Callable[[], object] = lambda: None

    def kind_of(self, expert: ExpertId) -> int:
        return expert.expert % self.kinds

    def slot_bytes(self, kind: int) -> int:
        return SLOT_BYTES

    def mapped_bytes(self, kind: int) -> int:
        return SLOT_BYTES

    def making_bytes(self) -> int:
        return 0

    def available_bytes(self) -> int:
        return 1 << 40

    def make_slot(self, kind: int) -> TwinSlot:
        self.made += 1
        return TwinSlot(self)

    def close(self) -> None:
        """Nothing outlives the slots."""


def factor(expert: ExpertId) -> float:
    """What an expert multiplies by."""
    return 1.0 + expert.layer * 100 + expert.expert
