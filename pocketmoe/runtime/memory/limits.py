"""What the system limits beside memory: files that are open at a time, and mapped stretches of address space.

A slot keeps no file open. Each packed weight of one is a mapped stretch, of which Linux allows 65,530 by default.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from pocketmoe.system.limits import limit_of

_USUAL_MAPS = 65530
_FOR_OTHERS = 4096  # maps: libraries, heaps, large blocks, the segments' weights


@dataclass(frozen=True)
class Limits:
    """Of this process. A limit of files is None where there is none."""

    open_files: int | None  # the one that holds now
    open_files_hard: int | None  # what it may be raised to
    maps: int
    maps_used: int

    @property
    def maps_for_slots(self) -> int:
        """How many maps slots may take, with enough left for everything else."""
        return max(0, self.maps - self.maps_used - min(_FOR_OTHERS, self.maps // 4))


def read_limits() -> Limits:
    """As they are now."""
    files = limit_of("NOFILE")
    maps, used = _USUAL_MAPS, 0
    with contextlib.suppress(OSError, ValueError):
        maps = int(Path("/proc/sys/vm/max_map_count").read_text())
    with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as file:
        used = sum(1 for _ in file)
    return Limits(files.soft, files.hard, maps, used)
