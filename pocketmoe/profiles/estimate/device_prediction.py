"""A profile's model on a machine that is not at hand, from what `devices.toml` says of it: all of it predictions.

The device's costs are those of its class for this model, as `plan` has them, times what the profile taught: how much
longer the model took on the profiled machine than that machine's class would have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pocketmoe.errors import BudgetTooSmall
from pocketmoe.profiles.catalogue.devices import Device
from pocketmoe.profiles.estimate.classes import (
    DISK_UNCERTAINTY,
    STREAM_SHARE,
    Moved,
    class_costs,
    machine_of_device,
    machine_of_profile,
    uncertainty,
)
from pocketmoe.profiles.estimate.predict import Checked, Prediction, check_predictions, costs_here, predict
from pocketmoe.profiles.estimate.roofline import scheme_bits
from pocketmoe.profiles.estimate.step import Costs
from pocketmoe.profiles.profile import Profile

MEMORY_SHARE = 0.75
_SHARES = (0.25, 0.5, 0.75, 1.0)
_MOST_TAUGHT = 2.0  # at most: other work during the profile makes its model look slower than it is

ASSUMPTIONS = (
    f"the processor gets {STREAM_SHARE:.0%} of its memory's peak bandwidth",
    f"{MEMORY_SHARE:.0%} of the memory are for this process",
    "computing takes what its class of processors takes, by as much more or less as on the profiled machine",
    "waits slow computing down as much as there",
    "the routing is that of the profile",
)


@dataclass(frozen=True)
class DeviceBudget:
    """A budget on another machine, and the range that the speed is expected in."""

    memory_budget_bytes: int
    prediction: Prediction
    tokens_per_s_low: float
    tokens_per_s_high: float


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
    available = int(MEMORY_SHARE * device.memory_bytes.value)
    if available < memory.least_bytes:
        raise BudgetTooSmall(available, memory.least_bytes)
    most = min(sum(model.experts), (available - memory.fixed_bytes) // model.expert_slot_bytes)
    slots = sorted({min(most, max(2, round(share * sum(model.experts)))) for share in _SHARES})
    costs = costs_on(profile, device)
    checked = check_predictions(profile)
    spread = uncertainty(machine_of_device(name, device, available))
    spread = max(spread, 1 + (worst_error(checked) or 0.0))
    figures = [device.memory_bytes, device.memory_bandwidth_bytes_per_s, *device.disk]
    return DevicePrediction(
        device=name,
        title=device.title,
        memory_bytes=int(device.memory_bytes.value),
        assumptions=(device.note.rstrip("."), *ASSUMPTIONS) if device.note else ASSUMPTIONS,
        sources=[f"{figure.source} ({figure.as_of}, {figure.confidence})" for figure in figures],
        budgets=[_budget(profile, costs, n, spread) for n in slots],
        checked=checked,
    )


def _budget(profile: Profile, costs: Costs, expert_slots: int, spread: float) -> DeviceBudget:
    memory, slot_bytes = profile.memory, profile.model.expert_slot_bytes
    low, high = (
        predict(profile, costs.scaled(spread**sign, DISK_UNCERTAINTY**sign), expert_slots).tokens_per_s
        for sign in (1, -1)
    )
    return DeviceBudget(
        memory_budget_bytes=max(memory.least_bytes, memory.fixed_bytes + expert_slots * slot_bytes),
        prediction=predict(profile, costs, expert_slots),
        tokens_per_s_low=low,
        tokens_per_s_high=high,
    )


def moved_of_profile(profile: Profile) -> Moved:
    """What a token of the profiled model moves, at the mean length of the profile's text while decoding."""
    model, workload = profile.model, profile.workload
    layers = len(model.experts)
    length = workload.prompt_tokens + workload.output_tokens / 2
    return Moved(
        layers=layers,
        top_k=round(sum(model.experts_per_token) / layers),
        dense_bytes=model.dense_bytes,
        head_bytes=model.head_bytes,
        dense_bits=scheme_bits(model.schemes.get("attention", "fp32")),
        expert_bytes=model.expert_read_bytes,
        expert_bits=scheme_bits(model.schemes.get("experts", "fp32")),
        read_bytes=model.expert_read_bytes,
        kv_bytes=length * model.state_bytes_per_token,
        float4=model.schemes.get("experts", "").startswith(("nf4", "fp4")),
    )


def costs_on(profile: Profile, device: Device) -> Costs:
    """A device's costs for the profiled model."""
    here, moved = costs_here(profile), moved_of_profile(profile)
    there = class_costs(machine_of_device("", device, 0), moved)
    taught = here.steady.total_s / class_costs(machine_of_profile(profile), moved).steady.total_s
    steady = there.steady.scaled(min(_MOST_TAUGHT, max(1 / _MOST_TAUGHT, taught)))
    slower = here.after_waits.total_s / here.steady.total_s
    return replace(
        there,
        steady=steady,
        after_waits=steady.scaled(slower),
        most=here.most,
        prefetch_precision=here.prefetch_precision,
    )


def worst_error(checked: Sequence[Checked]) -> float | None:
    """The largest error, either way, of predictions for runs that computing was not calibrated on; None without any."""
    return max((abs(c.error) for c in checked if not c.calibrated), default=None)
