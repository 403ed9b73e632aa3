"""A profile's model on a machine that is not at hand, from what `devices.toml` says of it: all of it predictions.

What is assumed, and shown with the result: a processor gets 60% of its memory's peak bandwidth (0.5 to 0.75 fits
published figures); three quarters of the memory are for the model; Python takes as long as it takes here; and waits
slow computing down as much as they do here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pocketmoe.errors import BudgetTooSmall
from pocketmoe.profiles.catalogue.devices import Device
from pocketmoe.profiles.estimate.predict import (
    Checked,
    Compute,
    Parts,
    Prediction,
    check_predictions,
    parts_here,
    predict,
)
from pocketmoe.profiles.profile import Profile

BUS_SHARE = 0.6
MEMORY_SHARE = 0.75
_SHARES = (0.25, 0.5, 0.75, 1.0)

ASSUMPTIONS = (
    f"the processor gets {BUS_SHARE:.0%} of its memory's peak bandwidth",
    f"{MEMORY_SHARE:.0%} of the memory are for this process",
    "Python takes as long as on the profiled machine, and waits slow computing down as much as there",
    "the routing is that of the profile",
)


@dataclass(frozen=True)
class DeviceBudget:
    """A budget on another machine."""

    memory_budget_bytes: int
    prediction: Prediction


@dataclass(frozen=True)
class DevicePrediction:
    """`budgets`: least memory first, the last the largest that fits. `checked`: the same way of predicting, here."""

    device: str
    title: str
    memory_bytes: int
    assumptions: Sequence[str]
    sources: Sequence[str]
    budgets: Sequence[DeviceBudget]
    checked: Sequence[Checked]


def predict_device(profile: Profile, name: str, device: Device) -> DevicePrediction:
    """Speeds at the budgets that the device has memory for. Raises BudgetTooSmall where it has too little for any."""
    memory, model = profile.memory, profile.model
    room = int(MEMORY_SHARE * device.memory_bytes.value)
    if room < memory.least_bytes:
        raise BudgetTooSmall(room, memory.least_bytes)
    most = min(sum(model.experts), (room - memory.fixed_bytes) // model.expert_slot_bytes)
    slots = sorted({min(most, max(2, round(share * sum(model.experts)))) for share in _SHARES})
    parts = parts_on(profile, device)
    figures = [device.memory_bytes, device.memory_bandwidth_bytes_per_s, *device.disk]
    return DevicePrediction(
        device=name,
        title=device.title,
        memory_bytes=int(device.memory_bytes.value),
        assumptions=ASSUMPTIONS,
        sources=[f"{figure.source} ({figure.as_of}, {figure.confidence})" for figure in figures],
        budgets=[
            DeviceBudget(
                max(memory.least_bytes, memory.fixed_bytes + n * model.expert_slot_bytes), predict(profile, parts, n)
            )
            for n in slots
        ],
        checked=check_predictions(profile),
    )


def parts_on(profile: Profile, device: Device) -> Parts:
    """This machine's parts, scaled to a device's."""
    here, read_bytes = parts_here(profile), profile.model.expert_read_bytes
    slower = profile.machine.ram_bytes_per_s / (BUS_SHARE * device.memory_bandwidth_bytes_per_s.value)
    each_s = read_bytes / device.disk_bytes_per_s(read_bytes)
    awake, asleep = (
        Compute(c.segments_s * slower, c.experts_s * slower, c.python_s) for c in (here.awake, here.asleep)
    )
    return replace(here, awake=awake, asleep=asleep, read_one_s=each_s, read_more_s=each_s)


def worst_error(checked: Sequence[Checked]) -> float | None:
    """The largest error, either way, of predictions for runs that computing was not calibrated on; None without any."""
    return max((abs(c.error) for c in checked if not c.calibrated), default=None)
