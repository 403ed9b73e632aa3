"""How fast the machine is at this moment: the seconds of some small work that is always the same.

A virtual machine's processor is half of a core whose other half is somebody else's: on one of ours all computing takes
1.6 times as long for a tenth of a second, and then does not, and nothing tells. So what is timed within a tenth of a
second is divided by what this work takes beside it, and multiplied by what it takes in the mean. Not so what
waits for memory, which has a pace of its own.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

_REPEATS = 20  # some 50 us in all


class Pace:
    """Call it beside what is timed."""

    def __init__(self) -> None:
        self._data = np.ones(4096)
        self._seen: list[float] = []

    def __call__(self) -> float:
        """Seconds of the work, now."""
        began = time.perf_counter()
        for _ in range(_REPEATS):
            np.add.reduce(self._data)
        self._seen.append(time.perf_counter() - began)
        return self._seen[-1]

    @property
    def mean_s(self) -> float:
        """Of the middle nine tenths so far."""
        twentieth = len(self._seen) // 20
        return statistics.mean(sorted(self._seen)[twentieth : len(self._seen) - twentieth])

    @property
    def median_s(self) -> float:
        """So far: what goes with a median of what was timed beside it."""
        return statistics.median(self._seen)

    @property
    def spread(self) -> float:
        """How many times as long the work took at slow moments as at fast ones: ninth and first tenth."""
        ordered = sorted(self._seen)
        return ordered[len(ordered) * 9 // 10] / ordered[len(ordered) // 10]
