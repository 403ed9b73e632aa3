"""One decode step from what a token moves and what a machine costs: the model behind `plan` and `profile --predict`.

A step is the sum of its layers. In a layer the experts that are there compute while the readers fetch the rest, and
each of the rest computes when it arrives:

    layer = attention and norms + experts + Python + waiting(misses)
    waiting(m) = max(0, seconds of m reads - seconds of the experts that are there)

`plan` takes the seconds of computing from constants of the device's class (`classes.py`), `profile --predict` from two
measured runs (`predict.py`). How often a layer misses how many experts comes from recorded routing where there is one,
else from an expected hit rate.

Two things that measurements asked for (docs/LOG.md). Computing after waiting is slower, so there are two sets of costs,
and a step lies between them by how long its layers wait. And prefetched experts are read while the disk is idle,
between a layer's last read and the next layer's first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

_READERS = 2
AFTER_WAIT_S = 0.00085  # of computing in a layer after a long wait: the reference model computes little else
WAIT_SCALE_S = 0.002  # after a wait this long, computing is slowed by 63% of what it is at most; measured with pauses


@dataclass(frozen=True)
class Compute:
    """Seconds of a step: attention, norms and head; experts; Python."""

    segments_s: float
    experts_s: float
    python_s: float

    @property
    def total_s(self) -> float:
        return self.segments_s + self.experts_s + self.python_s

    def mix(self, other: Compute, part: float) -> Compute:
        """`part` of the way to another."""
        mine, others = ((c.segments_s, c.experts_s, c.python_s) for c in (self, other))
        return Compute(*(max(0.0, m + part * (o - m)) for m, o in zip(mine, others, strict=True)))

    def scaled(self, factor: float) -> Compute:
        """Each part times a factor."""
        return Compute(self.segments_s * factor, self.experts_s * factor, self.python_s * factor)


class Slowing(NamedTuple):
    """What slows computing down: 0 nothing, 1 as far as it can.

    `waited`: after a wait caches are cold and the clock is low, whatever the size of what is computed then; by how
    long a layer waits. `missed`: the share of choices that were not in memory; each is computed when it arrives, alone,
    where others are computed two at a time, and Python takes it in: the larger the experts, the more.
    """

    waited: float
    missed: float


@dataclass(frozen=True)
class Work:
    """What a decode step visits. `head_share`: of the dense bytes, the head's, which no layer computes with."""

    layers: int
    top_k: float
    head_share: float


@dataclass(frozen=True)
class Costs:
    """What a step takes on some machine.

    `steady`: computing without waits; `after_waits`: where it is slowed down as far as `most`, beyond which nothing is
    known and nothing is assumed. Of their difference, a layer's visit takes `after_wait_s` at most for having waited.

    `least_s`: of a step, because a CPU quota lets no more through: while it stops the process, nothing computes.
    """

    steady: Compute
    after_waits: Compute
    most: Slowing
    read_one_s: float  # an expert, with nothing else under way
    read_more_s: float  # each read beyond the first, in a layer that misses several
    prefetch_precision: float  # of prefetches; 0: none are made
    after_wait_s: float = AFTER_WAIT_S
    least_s: float = 0.0

    def scaled(self, compute: float, reads: float) -> Costs:
        """With computing and reading taking so many times as long."""
        return replace(
            self,
            steady=self.steady.scaled(compute),
            after_waits=self.after_waits.scaled(compute),
            read_one_s=self.read_one_s * reads,
            read_more_s=self.read_more_s * reads,
            after_wait_s=self.after_wait_s * compute,
            least_s=self.least_s * compute,
        )


@dataclass(frozen=True)
class Step:
    """A predicted decode step."""

    compute: Compute
    waiting_s: float
    misses: float
    least_s: float = 0.0

    @property
    def total_s(self) -> float:
        return max(self.least_s, self.compute.total_s + self.waiting_s)

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.total_s


def decode_step(work: Work, costs: Costs, visits: np.ndarray, overlapping_reads: bool = True) -> Step:
    """Predict a step.

    `visits`: float [most misses + 1], the share of a layer's visits that miss 0, 1, 2, ... experts, adding up to 1.
    `overlapping_reads`: false where there are too few slots to read into two at once.
    """
    waits = _waits(work, costs, visits, overlapping_reads)
    found = _slowing(work, waits, visits)
    waited, missed = (min(1.0, here / most) for here, most in zip(found, costs.most, strict=True))
    share = wait_share(work, costs)
    return Step(
        compute=costs.steady.mix(costs.after_waits, share * waited + (1 - share) * missed),
        waiting_s=work.layers * float(visits @ waits),
        misses=float(visits @ np.arange(len(visits))) * work.layers,
        least_s=costs.least_s,
    )


def can_overlap(expert_slots: int) -> bool:
    """Whether there are slots for both readers beside the one that computes."""
    return expert_slots > _READERS


def wait_share(work: Work, costs: Costs) -> float:
    """The share of the slowing that comes of waits, the rest of misses."""
    slower_s = costs.after_waits.total_s - costs.steady.total_s
    return min(1.0, work.layers * costs.after_wait_s * costs.most.waited / slower_s) if slower_s > 0 else 1.0


def slowing(work: Work, costs: Costs, visits: np.ndarray, overlapping_reads: bool = True) -> Slowing:
    """How far computing is slowed down. `visits`: float [most misses + 1], as in `decode_step`."""
    return _slowing(work, _waits(work, costs, visits, overlapping_reads), visits)


def _slowing(work: Work, waits: np.ndarray, visits: np.ndarray) -> Slowing:
    """The same from seconds that each kind of visit waits, float [most misses + 1]."""
    waited = float(visits @ (1 - np.exp(-waits / WAIT_SCALE_S)))
    return Slowing(waited, float(visits @ np.arange(len(visits))) / work.top_k)


def visits_at(hit_rate: float, top_k: int) -> np.ndarray:
    """Shares of visits that miss 0, 1, ... top_k experts, float [top_k + 1], when each misses by itself."""
    miss = min(1.0, max(0.0, 1 - hit_rate))
    if miss in (0.0, 1.0):
        return np.eye(top_k + 1)[int(miss) * top_k]
    n = np.arange(top_k + 1)
    ways = np.array([math.lgamma(top_k + 1) - math.lgamma(m + 1) - math.lgamma(top_k - m + 1) for m in n])
    shares = np.exp(ways + n * math.log(miss) + (top_k - n) * math.log(1 - miss))
    return shares / shares.sum()


def _waits(work: Work, costs: Costs, visits: np.ndarray, overlapping_reads: bool) -> np.ndarray:
    """Seconds that a layer waits which misses 0, 1, 2, ... experts; float [len(visits)]."""
    expert_s = costs.steady.experts_s / work.layers / work.top_k
    missed = float(visits @ np.arange(len(visits)))
    segment_s = (1 - work.head_share) * costs.steady.segments_s / work.layers
    idle_disk_s = segment_s + expert_s + costs.steady.python_s / work.layers
    candidates = missed / 2  # what is prefetched is the likelier half of a choice, and read when it is not there
    in_time = _prefetched(costs.prefetch_precision, candidates, idle_disk_s / costs.read_one_s)
    in_time *= (work.layers - 1) / work.layers
    waits: list[float] = []
    for misses in range(len(visits)):
        reads = max(0.0, misses - in_time * misses / max(missed, 1e-9))
        waits.append(_wait(reads, (work.top_k - misses) * expert_s, costs, overlapping_reads))
    return np.array(waits)


def _prefetched(precision: float, candidates: float, in_window: float) -> float:
    """Reads that prefetching saves a layer, less those wrong ones that are still under way when the layer begins."""
    if not precision:
        return 0.0
    done, begun = min(candidates, in_window), min(candidates, math.ceil(in_window))
    return precision * done - (1 - precision) * (begun - done)


def _wait(reads: float, meanwhile_s: float, costs: Costs, overlapping_reads: bool) -> float:
    """Seconds without anything to compute in a layer with so many reads, beside so many seconds of computing."""
    more_s = costs.read_more_s if overlapping_reads else costs.read_one_s
    return max(0.0, min(1.0, reads) * costs.read_one_s + max(0.0, reads - 1) * more_s - meanwhile_s)
