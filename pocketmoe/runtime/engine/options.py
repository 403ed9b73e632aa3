"""How to open a bundle: every choice that an engine takes, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Self, get_args

from pocketmoe.errors import BadInput
from pocketmoe.runtime.backends.choice import BackendMaker, BackendName
from pocketmoe.runtime.engine.memory_plan import CHUNK, Load, MemoryRequest
from pocketmoe.runtime.paging.prefetch import PrefetchMode


@dataclass(frozen=True)
class EngineOptions:
    """How to open a bundle. Raises BadInput, which names the option, for a value that it does not have."""

    memory: MemoryRequest = field(default_factory=MemoryRequest)
    capacity: int = 1024  # tokens of text, prompt and answer together
    threads: int = 1
    backend: BackendName | BackendMaker = "auto"  # a maker: another backend than the runtime's own
    prefetch: PrefetchMode = "auto"
    read_bytes_per_s: float | None = None  # slow expert reads down to this, as a slower disk would
    # Expert skipping. 0: exact routing. Else an expert is skipped that would have to be read and whose weight is below
    # this share of the mean weight of its token's experts.
    drop_cold: float = 0.0
    # Cache-aware routing, in decode. 0: exact routing. Else the scores of experts in memory rise by this share of the
    # range of the token's scores.
    prefer_cached: float = 0.0
    reuses: bool = False  # texts will begin alike: states that do not grow are kept for `truncate`
    sequences: int = 1  # texts that there are at once, and go through the layers together
    snapshots: int = 1  # of each text's states that do not grow, at most, where texts will begin alike
    capped: bool = False  # have the system refuse this process memory beyond the budget (`ceiling`)
    beside_bytes: int = 0  # of the budget, for what the rest of the process will come to take
    chunk: int = CHUNK  # tokens of a prompt that are computed together; another number rounds otherwise

    def __post_init__(self) -> None:
        for name in ("capacity", "threads", "chunk", "sequences", "snapshots"):
            number = getattr(self, name)
            _require(isinstance(number, int) and number >= 1, name, number, "a whole number from 1 up")
        _require(callable(self.backend) or self.backend in get_args(BackendName), "backend", self.backend, _BACKENDS)
        _require(self.prefetch in get_args(PrefetchMode), "prefetch", self.prefetch, _PREFETCH)
        rate = self.read_bytes_per_s
        measured = isinstance(rate, int | float) and 0 < rate < math.inf
        _require(rate is None or measured, "read_bytes_per_s", rate, "bytes per second, above 0, or None")
        for name in ("drop_cold", "prefer_cached"):
            share = getattr(self, name)
            _require(isinstance(share, int | float) and 0 <= share <= 1, name, share, "a share from 0 to 1")

    @property
    def load(self) -> Load:
        """What this asks of memory."""
        load = Load.of_text(self.capacity, self.chunk, self.snapshots if self.reuses else 0, self.sequences)
        return replace(load, beside_bytes=self.beside_bytes)

    @property
    def exact(self) -> bool:
        """Whether every token gets its router's own experts, all of them, whatever is in memory."""
        return not (self.drop_cold or self.prefer_cached)

    def exactly(self) -> Self:
        """The same with exact routing."""
        return replace(self, drop_cold=0.0, prefer_cached=0.0)


_BACKENDS = f"one of {', '.join(get_args(BackendName))}"
_PREFETCH = f"one of {', '.join(get_args(PrefetchMode))}"


def _require(possible: bool, name: str, value: object, wanted: str) -> None:
    if not possible:
        raise BadInput(f"the engine's option {name} is {value!r}", f"Give {wanted}.")
