"""From a profile to the speed at another budget, on another disk or on another machine, and how wrong that is here.

A decode step is the sum of its layers. In a layer the experts that are there compute while the readers fetch the rest,
and each of the rest computes when it arrives:

    layer = segment + experts + waiting(m misses)        waiting(m) = max(0, reads(m) - experts that are there)

How often a layer misses how many experts comes from the recorded routing, replayed through the runtime's own cache
(`Routing.curve`). Seconds of computing come from two measured runs, the one with the least memory and the one with the
most; all other runs, slowed disks among them, then test the prediction. On another machine what moves weights is scaled
by the bandwidth of memory, reads by the disk's bandwidth at that read size, Python not at all.

Two things that measurements asked for. After a wait computing is slower, by a factor of up to 2.7 on a virtual machine
(docs/LOG.md): the processor went to sleep. And guesses are read while the disk is idle, between a layer's last read and
the next one's first.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import numpy as np

from pocketmoe.profiles.profile import Profile, Run

_READERS = 2
_FALLS_ASLEEP_S = 0.002  # computing after a wait of this has lost 63% of what it loses at most; measured with sleeps


@dataclass(frozen=True)
class Compute:
    """Seconds of a step: attention and head, experts, Python."""

    segments_s: float
    experts_s: float
    python_s: float

    def mix(self, other: Compute, part: float) -> Compute:
        """`part` of the way to another."""
        mine, others = ((c.segments_s, c.experts_s, c.python_s) for c in (self, other))
        return Compute(*(max(0.0, m + part * (o - m)) for m, o in zip(mine, others, strict=True)))


@dataclass(frozen=True)
class Parts:
    """What a step is made of on some machine.

    `awake`: computing without waits; `asleep`: where waits have slowed it down `most_asleep`, beyond which nothing is
    known and nothing is assumed.
    """

    awake: Compute
    asleep: Compute
    most_asleep: float
    read_one_s: float
    read_more_s: float
    guess_precision: float  # 0: no guesses are made


@dataclass(frozen=True)
class Prediction:
    """A decode step at one budget."""

    expert_slots: int
    expert_share: float
    hit_rate: float  # without guesses
    misses_per_token: float
    bytes_read_per_token: float
    compute: Compute
    waiting_s: float

    @property
    def step_s(self) -> float:
        return self.compute.segments_s + self.compute.experts_s + self.compute.python_s + self.waiting_s

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
    ends, here = _ends(profile), parts_here(profile)
    found: list[Checked] = []
    for run in profile.runs:
        parts = slowed(here, profile, run.read_bytes_per_s) if run.read_bytes_per_s else here
        found.append(Checked(run, predict(profile, parts, run.expert_slots), any(run is end for end in ends)))
    return found


def parts_here(profile: Profile) -> Parts:
    """This machine's parts; its disk as it was in the median of the runs, since disks are moody."""
    low, high = _ends(profile)
    full = [run for run in profile.runs if run.read_bytes_per_s is None] or [*profile.runs]
    guessing = profile.settings.prefetch != "off"
    parts = Parts(
        awake=_compute(high),
        asleep=_compute(low),
        most_asleep=1.0,
        read_one_s=statistics.median(run.read_one_s for run in full),
        read_more_s=statistics.median(run.read_more_s for run in full),
        guess_precision=statistics.median(run.guess_precision for run in full) if guessing else 0.0,
    )
    asleep = [_asleep(profile, parts, run.expert_slots) for run in (high, low)]
    if asleep[1] - asleep[0] < 0.01:  # both waited alike: nothing to tell the two speeds apart by
        return replace(parts, asleep=parts.awake)
    awake = parts.awake.mix(parts.asleep, -asleep[0] / (asleep[1] - asleep[0]))
    return replace(parts, awake=_possible(profile, awake, parts.awake), most_asleep=asleep[1])


def _possible(profile: Profile, awake: Compute, measured: Compute) -> Compute:
    """What is not faster than memory gives the weights, nor than a third of what was measured with some waits."""
    model, per_s = profile.model, profile.machine.ram_bytes_per_s
    experts_bytes = sum(model.experts_per_token) * model.expert_slot_bytes
    floors = Compute(model.dense_bytes / per_s, experts_bytes / per_s, 0.0)
    return Compute(
        max(awake.segments_s, measured.segments_s / 3, min(floors.segments_s, measured.segments_s)),
        max(awake.experts_s, measured.experts_s / 3, min(floors.experts_s, measured.experts_s)),
        max(awake.python_s, measured.python_s / 3),
    )


def slowed(parts: Parts, profile: Profile, read_bytes_per_s: float) -> Parts:
    """The same machine with a disk of that bandwidth, where it is not slower already."""
    each_s = profile.model.expert_read_bytes / read_bytes_per_s
    return replace(parts, read_one_s=max(parts.read_one_s, each_s), read_more_s=max(parts.read_more_s, each_s))


def predict(profile: Profile, parts: Parts, expert_slots: int) -> Prediction:
    """A step with so many slots. The profile must have its routing."""
    model = profile.model
    n_layers, used = len(model.experts), sum(model.experts_per_token)
    visits, waits = _visits(profile, expert_slots), _waits(profile, parts, expert_slots)
    missed = float(visits @ np.arange(len(visits))) * n_layers
    sleeping = min(parts.most_asleep, float(visits @ (1 - np.exp(-waits / _FALLS_ASLEEP_S))))
    compute = parts.awake.mix(parts.asleep, sleeping / parts.most_asleep)
    return Prediction(
        expert_slots=expert_slots,
        expert_share=expert_slots / sum(model.experts),
        hit_rate=1 - missed / used,
        misses_per_token=missed,
        bytes_read_per_token=missed * model.expert_read_bytes,
        compute=compute,
        waiting_s=n_layers * float(visits @ waits),
    )


def _ends(profile: Profile) -> tuple[Run, Run]:
    """The full-speed runs with the least and with the most experts in memory."""
    full = [run for run in profile.runs if run.read_bytes_per_s is None] or [*profile.runs]
    return min(full, key=lambda run: run.expert_slots), max(full, key=lambda run: run.expert_slots)


def _compute(run: Run) -> Compute:
    step = run.step  # its shares are of the mean step, and the median one is less disturbed
    return Compute(*(run.step_median_s * share for share in (step.segments, step.experts, step.python)))


def _asleep(profile: Profile, parts: Parts, expert_slots: int) -> float:
    """How far from awake to asleep computing is with so many slots."""
    waits = _waits(profile, parts, expert_slots)
    return float(_visits(profile, expert_slots) @ (1 - np.exp(-waits / _FALLS_ASLEEP_S)))


def _visits(profile: Profile, expert_slots: int) -> np.ndarray:
    """The share of visits that miss 0, 1, 2, ... experts with so many slots, between the points of the curve."""
    assert profile.routing is not None, "a profile with a run has its routing"
    curve = profile.routing.curve
    width = max(len(point.visits_by_misses) for point in curve)
    rows = np.array([[*p.visits_by_misses, *[0] * (width - len(p.visits_by_misses))] for p in curve], float)
    at = [point.expert_slots for point in curve]
    found = np.array([np.interp(expert_slots, at, rows[:, m]) for m in range(width)])
    return found / found.sum()


def _waits(profile: Profile, parts: Parts, expert_slots: int) -> np.ndarray:
    """Seconds that a layer waits which misses 0, 1, 2, ... experts."""
    model = profile.model
    n_layers = len(model.experts)
    top_k = sum(model.experts_per_token) / n_layers
    expert_s = parts.awake.experts_s / n_layers / top_k
    visits = _visits(profile, expert_slots)
    missed = float(visits @ np.arange(len(visits)))
    segment_s = (1 - model.head_bytes / model.dense_bytes) * parts.awake.segments_s / n_layers
    window_s = segment_s + expert_s + parts.awake.python_s / n_layers
    candidates = missed / 2  # guesses are the likelier half of a choice, and read when they are not there
    in_time = _guessed(parts.guess_precision, candidates, window_s / parts.read_one_s) * (n_layers - 1) / n_layers
    waits: list[float] = []
    for misses in range(len(visits)):
        reads = max(0.0, misses - in_time * misses / max(missed, 1e-9))
        waits.append(_wait(reads, top_k - misses, expert_s, parts, expert_slots))
    return np.array(waits)


def _guessed(precision: float, candidates: float, in_window: float) -> float:
    """Reads that guesses save a layer, on balance: a wrong one that is not done when the layer begins is in its way."""
    if not precision:
        return 0.0
    done, begun = min(candidates, in_window), min(candidates, math.ceil(in_window))
    return precision * done - (1 - precision) * (begun - done)


def _wait(reads: float, there: float, expert_s: float, parts: Parts, expert_slots: int) -> float:
    """Seconds without anything to compute in a layer with so many reads, and so many experts that are there."""
    more_s = parts.read_more_s if expert_slots > _READERS else parts.read_one_s
    return max(0.0, min(1.0, reads) * parts.read_one_s + max(0.0, reads - 1) * more_s - there * expert_s)
