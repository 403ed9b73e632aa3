"""A CPU for the thread that feeds an engine, which its helpers stay off while it feeds.

When the first operator after a wait wakes ONNX Runtime's worker, Linux likes to put it on the CPU of the thread that
wakes it. That thread then waits in a spinning loop, so the worker waits for a CPU that the waiting thread occupies, for
about 1 ms, until the scheduler moves one of them. Segments of 16 layers of OLMoE-1B-7B's shape took 35 ms a token so
where a layer misses one expert, and 13 ms with helpers elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

from pocketmoe.system.cpus import can_place, cpu_speed, current_cpu, place, usable_cpus


class OwnCpu:
    """A context in which the calling thread has one CPU, and `helpers` all others that it may use.

    Outside of it the thread goes where it went before. Without effect where there is one CPU only, or no such call.
    """

    def __init__(self, helpers: Iterable[int]) -> None:
        """`helpers`: ids of threads, which from now on stay off that CPU."""
        self._own: set[int] = set()
        self._before: set[int] = set()
        allowed = usable_cpus()
        if len(allowed) < 2 or not can_place():
            return
        self._own = {_choose(allowed)}
        for helper in helpers:
            place(helper, allowed - self._own)

    def __enter__(self) -> None:
        if self._own:
            self._before = usable_cpus()
            place(0, self._own)

    def __exit__(self, *_: object) -> None:
        if self._own:
            place(0, self._before)


class DecodeCpu:
    """Gives the thread that feeds an engine its own CPU, from the first decode step on that finds all slots made.

    Until then the readers make slots, for which they need every CPU.
    """

    def __init__(self, helpers: Iterable[int], making_slots: Callable[[], bool]) -> None:
        """`helpers`: ids of threads that are to stay off that CPU; without any the thread goes where it likes."""
        self._helpers = set(helpers)
        self._making_slots = making_slots
        self._own: OwnCpu | None = None

    def context(self, decoding: bool) -> contextlib.AbstractContextManager[None]:
        """Where the tokens that are fed now are to be computed."""
        if self._own is None and decoding and self._helpers and not self._making_slots():
            self._own = OwnCpu(self._helpers)
        return self._own or contextlib.nullcontext()


def _choose(allowed: set[int]) -> int:
    """The CPU that the thread is on, or one that can go faster, where not all are alike."""
    speeds = {cpu: cpu_speed(cpu) for cpu in allowed}
    fastest = {cpu for cpu, speed in speeds.items() if speed == max(speeds.values())}
    here = current_cpu()
    return here if here in fastest else min(fastest)
