"""The decode-step model with constants fitted from a profile: other budgets, other disks, and how wrong that is here.

Seconds of computing come from two measured runs, the one with the least memory and the one with the most; all other
runs, slowed disks among them, then test the prediction. How often a layer misses how many experts comes from the
recorded routing, replayed through the runtime's own cache (`Routing.curve`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pocketmoe.profiles.estimate.step import (
    Compute,
    Costs,
    Slowing,
    Work,
    can_overlap,
    decode_step,
    slowing,
    wait_share,
)
from pocketmoe.profiles.profile import Profile, Run

_ENOUGH_MISSES = 1.0  # a token: fewer are those that a run begins with


@dataclass(frozen=True)
class Prediction:
    """A decode step at one budget."""

    expert_slots: int
    expert_share: float
    hit_rate: float  # without prefetch
    misses_per_token: float
    bytes_read_per_token: float
    compute: Compute
    waiting_s: float
    least_s: float = 0.0

    @property
    def step_s(self) -> float:
        return max(self.least_s, self.compute.total_s + self.waiting_s)

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.step_s


@dataclass(frozen=True)
class Checked:
    """A prediction for this machine beside what was measured. `calibrated`: computing was taken from this very run."""

    run: Run
    prediction: Prediction
    calibrated: bool

    @property
    def error(self) -> float:
        """Of the predicted tokens per second, as a share of the measured ones; negative: predicted too slow."""
        return self.prediction.tokens_per_s / self.run.decode_tokens_per_s - 1


def check_predictions(profile: Profile) -> list[Checked]:
    """Predict every run."""
    ends, here = _ends(profile), costs_here(profile)
    found: list[Checked] = []
    for run in profile.runs:
        costs = slowed(here, profile, run.read_bytes_per_s) if run.read_bytes_per_s else here
        found.append(Checked(run, predict(profile, costs, run.expert_slots), any(run is end for end in ends)))
    return found


def costs_here(profile: Profile) -> Costs:
    """This machine's costs; its disk as it was in the median of the runs, since disks are moody."""
    low, high = _ends(profile)
    full = [run for run in profile.runs if run.read_bytes_per_s is None] or [*profile.runs]
    prefetching = profile.settings.prefetch != "off"
    one_s, more_s = _read_costs(full)
    costs = Costs(
        steady=_compute(high),
        after_waits=_compute(low),
        most=Slowing(1.0, 1.0),
        read_one_s=one_s,
        read_more_s=more_s,
        prefetch_precision=statistics.median(run.prefetch_precision for run in full) if prefetching else 0.0,
    )
    least, most = (_slowing(profile, costs, run.expert_slots) for run in (high, low))
    if min(b - a for a, b in zip(least, most, strict=True)) < 0.01:  # nothing to tell the two speeds apart by
        return replace(costs, after_waits=costs.steady)
    share = wait_share(_work(profile), replace(costs, most=most))
    left = share * least.waited / most.waited + (1 - share) * least.missed / most.missed
    steady = costs.steady.mix(costs.after_waits, -left / (1 - left))
    return replace(costs, steady=_possible(profile, steady, costs.steady), most=most)


def _read_costs(runs: Sequence[Run]) -> tuple[float, float]:
    """Seconds that a layer waits for one read, and for each more, in the median of the runs.

    By the reads while decoding, two of which are under way at once, where there were enough: bursts afterwards find a
    disk that has been idle, and were up to twice as slow. What the bursts tell is how a read alone compares: two at
    once take as long as one where latency decides, and twice as long where bandwidth does.
    """
    one_s = statistics.median(run.read_one_s for run in runs)
    more_s = statistics.median(run.read_more_s for run in runs)
    seen = [run.load_s / 2 for run in runs if run.load_s and run.misses_per_token >= _ENOUGH_MISSES]
    if not seen:
        return one_s, more_s
    each_s = statistics.median(seen)
    return each_s * min(2.0, max(1.0, one_s / more_s)), each_s


def _possible(profile: Profile, steady: Compute, measured: Compute) -> Compute:
    """`steady`, but no faster than memory delivers the weights, nor than a third of the seconds that were measured."""
    model, per_s = profile.model, profile.machine.ram_bytes_per_s
    experts_bytes = sum(model.experts_per_token) * model.expert_slot_bytes
    floors = Compute(model.dense_bytes / per_s, experts_bytes / per_s, 0.0)
    return Compute(
        max(steady.segments_s, measured.segments_s / 3, min(floors.segments_s, measured.segments_s)),
        max(steady.experts_s, measured.experts_s / 3, min(floors.experts_s, measured.experts_s)),
        max(steady.python_s, measured.python_s / 3),
    )


def slowed(costs: Costs, profile: Profile, read_bytes_per_s: float) -> Costs:
    """The same machine with a disk of that bandwidth, where it is not slower already."""
    each_s = profile.model.expert_read_bytes / read_bytes_per_s
    return replace(costs, read_one_s=max(costs.read_one_s, each_s), read_more_s=max(costs.read_more_s, each_s))


def predict(profile: Profile, costs: Costs, expert_slots: int) -> Prediction:
    """A step with so many slots. The profile must have its routing."""
    model = profile.model
    step = decode_step(_work(profile), costs, _visits(profile, expert_slots), can_overlap(expert_slots))
    return Prediction(
        expert_slots=expert_slots,
        expert_share=expert_slots / sum(model.experts),
        hit_rate=1 - step.misses / sum(model.experts_per_token),
        misses_per_token=step.misses,
        bytes_read_per_token=step.misses * model.expert_read_bytes,
        compute=step.compute,
        waiting_s=step.waiting_s,
        least_s=step.least_s,
    )


def _ends(profile: Profile) -> tuple[Run, Run]:
    """The full-speed runs with the least and with the most experts in memory."""
    full = [run for run in profile.runs if run.read_bytes_per_s is None] or [*profile.runs]
    return min(full, key=lambda run: run.expert_slots), max(full, key=lambda run: run.expert_slots)


def _compute(run: Run) -> Compute:
    step = run.step  # its shares are of the mean step, and the median one is less disturbed
    return Compute(*(share / run.decode_tokens_per_s for share in (step.segments, step.experts, step.python)))


def _work(profile: Profile) -> Work:
    model, layers = profile.model, len(profile.model.experts)
    return Work(layers, sum(model.experts_per_token) / layers, model.head_bytes / model.dense_bytes)


def _slowing(profile: Profile, costs: Costs, expert_slots: int) -> Slowing:
    """How far computing is from steady with so many slots."""
    return slowing(_work(profile), costs, _visits(profile, expert_slots), can_overlap(expert_slots))


def _visits(profile: Profile, expert_slots: int) -> np.ndarray:
    """The share of visits that miss 0, 1, 2, ... experts with so many slots, between the points of the curve."""
    assert profile.routing is not None, "a profile with a run has its routing"
    curve = profile.routing.curve
    width = max(len(point.visits_by_misses) for point in curve)
    rows = np.array([[*p.visits_by_misses, *[0] * (width - len(p.visits_by_misses))] for p in curve], float)
    at = [point.expert_slots for point in curve]
    found = np.array([np.interp(expert_slots, at, rows[:, m]) for m in range(width)])
    return found / found.sum()
