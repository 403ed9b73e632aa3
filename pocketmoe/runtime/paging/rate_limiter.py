"""Slows reads down to the bandwidth of another disk, so that predictions for it can be tested here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimiter:
    """A disk of one bandwidth that serves its readers one after the other."""

    def __init__(
        self,
        bytes_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free = 0.0  # when the slower disk has served everything before

    def wait(self, nbytes: int, began: float) -> None:
        """Return when the slower disk would have ended a read of `nbytes` that began at `began` on the clock."""
        with self._lock:
            self._free = max(self._free, began) + nbytes / self._bytes_per_s
            due = self._free
        left = due - self._clock()
        if left > 0:
            self._sleep(left)
