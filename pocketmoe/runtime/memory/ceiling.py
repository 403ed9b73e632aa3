"""A limit that the system itself holds, so that a graph which asks for more memory than the budget has does not get it.

The budget is kept by reckoning what is needed; a hostile or broken graph asks for what no reckoning foresees. The limit
is RLIMIT_DATA, on private writable memory, reserved or in use (Linux 4.7 and later): what is beyond it is an allocation
that fails, which ONNX Runtime reports, and Python raises as MemoryError. Shared memory, that of slots, does not count.

The limit is the whole process's. It is what the process had reserved before the first engine opened, and what each open
engine may come to reserve on top.
"""

from __future__ import annotations

import threading

from pocketmoe.system.limits import limit_of, set_limit
from pocketmoe.system.memory import reserved_bytes

# What is reserved and never used: heaps' rest, and what a slot's session reserves beyond its claim. On the reference
# model reserved memory grew by 3 to 11 MB more than memory in use, of budgets of 127 to 195 MB.
_SLACK_BYTES = 32 << 20
_SLACK_SHARE = 0.05
_STACK_BYTES = 8 << 20  # of a thread, where the system does not limit it

_lock = threading.Lock()
_open: dict[Allowance, int] = {}
_before: tuple[int | None, int] | None = None  # the limit and the reserved memory as they were without an allowance


class Allowance:
    """What one engine may come to reserve, as long as it is open."""

    def __init__(self) -> None:
        self._reserved = reserved_bytes()  # before there was the engine

    def set(self, nbytes: int) -> None:
        """So much more than now, and the slack; replaces what was said before."""
        global _before
        with _lock:
            now = reserved_bytes()
            if now is None or self._reserved is None:
                return  # nobody could say what a limit would mean: the budget is kept by reckoning alone
            if _before is None:
                _before = (limit_of("DATA").soft, self._reserved)
            _open[self] = now - self._reserved + int((1 + _SLACK_SHARE) * max(0, nbytes)) + _SLACK_BYTES
            _apply(_before)

    def close(self) -> None:
        """Without any allowance the limit is as it was."""
        global _before
        with _lock:
            _open.pop(self, None)
            if _before is not None:
                _apply(_before)
            if not _open:
                _before = None


def stack_bytes(threads: int) -> int:
    """What so many new threads reserve for their stacks."""
    soft = limit_of("STACK").soft
    return threads * (_STACK_BYTES if soft is None else max(soft, _STACK_BYTES))


def _apply(before: tuple[int | None, int]) -> None:
    soft, reserved = before
    wanted = reserved + sum(_open.values())
    if not _open or (soft is not None and soft < wanted):
        set_limit("DATA", soft)
    else:
        set_limit("DATA", wanted)  # where that is not allowed the budget is kept by reckoning alone
