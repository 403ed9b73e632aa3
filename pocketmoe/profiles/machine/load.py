"""How busy others keep this machine's processors while something is measured."""

from __future__ import annotations

import psutil

BUSY = 0.05  # of the processors' time: above it, what is measured is not what the machine can do


class OthersLoad:
    """How much of the processors' time others take: processes beside this one, and a hypervisor's other guests."""

    def __init__(self) -> None:
        self._before = self._times()

    def share(self) -> float:
        """Since it was made."""
        total, idle, own = (now - then for now, then in zip(self._times(), self._before, strict=True))
        return min(1.0, max(0.0, (total - idle - own) / total)) if total > 0 else 0.0

    @staticmethod
    def _times() -> tuple[float, float, float]:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        counted = (every.user, every.nice, every.system, every.irq, every.softirq, every.steal)  # guests are in user
        idle = every.idle + every.iowait
        return sum(counted) + idle, idle, own.user + own.system
