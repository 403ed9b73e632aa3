"""What an engine counts while it runs: where its steps went, and what was not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pocketmoe.runtime.memory.budget import Budget
from pocketmoe.runtime.paging.pager import Pager


@dataclass
class Skipped:
    """Choices of the router that were not run for want of their experts in memory."""

    choices: int = 0
    weight: float = 0.0
    of_weight: float = 0.0

    def note(self, skipped: np.ndarray, weights: np.ndarray) -> None:
        """Count the choices of a chunk that were not run: bool, of weights float32, both [tokens, top_k]."""
        self.choices += int(skipped.sum())
        self.weight += float(weights[skipped].sum())
        self.of_weight += float(weights.sum())

    @property
    def share(self) -> float:
        """Of the router's weight."""
        return self.weight / self.of_weight if self.of_weight else 0.0


@dataclass
class StepTimes:
    """Where decode steps went, in seconds, since the engine was opened. What is left is Python's."""

    steps: int = 0
    tokens: int = 0  # of answers; several texts may decode in one step
    total_s: float = 0.0
    segments_s: float = 0.0  # attention, norms, routers, head
    experts_s: float = 0.0
    waiting_s: float = 0.0  # for experts, with nothing to compute

    def add(self, total_s: float, segments_s: float, experts_s: float, waiting_s: float) -> None:
        """Enter one step."""
        self.steps += 1
        self.total_s += total_s
        self.segments_s += segments_s
        self.experts_s += experts_s
        self.waiting_s += waiting_s


@dataclass(frozen=True)
class Activity:
    """Counts since an engine was opened, and what is in memory now.

    The counts of uses, watched closely, tell which experts the tokens of a text chose: show them to its author alone.
    """

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    claims: Mapping[str, int]  # bytes promised, by what for
    hits: int
    prefetch_hits: int
    misses: int
    bytes_read: int
    decoded_tokens: int
    decoding_s: float
    waiting_s: float  # of that, for experts, with nothing to compute
    expert_counts: tuple[np.ndarray, ...]  # of each MoE layer int64 [experts], tokens routed to each
    residents: tuple[np.ndarray, ...]  # of each MoE layer bool [experts], in memory or being read

    @classmethod
    def of(cls, budget: Budget, pager: Pager, times: StepTimes, sizes: Sequence[int]) -> Activity:
        """`sizes`: how many experts each layer has."""
        stats = pager.stats
        return cls(
            budget_bytes=budget.total_bytes,
            used_bytes=budget.observe(),
            peak_bytes=budget.peak_bytes,
            claims=budget.claims,
            hits=stats.hits,
            prefetch_hits=stats.prefetch_hits,
            misses=stats.misses,
            bytes_read=stats.bytes_read,
            decoded_tokens=times.tokens,
            decoding_s=times.total_s,
            waiting_s=times.waiting_s,
            expert_counts=tuple(row[:size].copy() for row, size in zip(stats.expert_counts, sizes, strict=True)),
            residents=tuple(pager.residents(index)[:size] for index, size in enumerate(sizes)),
        )
