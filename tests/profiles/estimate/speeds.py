"""Speeds that were measured or published (`data/speeds.toml`) beside what the decode-step model says of them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketmoe.profiles.catalogue.devices import find_device
from pocketmoe.profiles.estimate.classes import (
    DISK_UNCERTAINTY,
    Machine,
    Moved,
    class_costs,
    machine_of_device,
    machine_of_profile,
    uncertainty,
)
from pocketmoe.profiles.estimate.device_prediction import moved_of_profile
from pocketmoe.profiles.estimate.measured import step_costs
from pocketmoe.profiles.estimate.predict import check_predictions, predict
from pocketmoe.profiles.estimate.step import decode_step, visits_at
from pocketmoe.profiles.profile import Profile, Run, read_profile

DATA = Path(__file__).parent / "data" / "speeds.toml"
PROFILES = Path(__file__).parent / "data" / "profiles"
_NO_DISK = 1e9


@dataclass(frozen=True)
class Row:
    """A speed and its prediction. `low` and `high`: the range that `plan` would print."""

    what: str
    where: str
    source: str
    known: float
    predicted: float
    low: float
    high: float
    disk_changed: bool  # while it was measured

    @property
    def error(self) -> float:
        return self.predicted / self.known - 1


def measured() -> list[Row]:
    """Of this runtime, on machines whose memory was measured."""
    data = _read()
    return [_row(data, entry, _machine(data, entry)) for entry in data["ours"]]


def published() -> list[Row]:
    """Of llama.cpp, on devices of devices.toml."""
    data, rows = _read(), []
    for entry in data["published"]:
        machine = machine_of_device(entry["device"], find_device(entry["device"]), 0)
        rows.append(_row(data, entry, replace(machine, instructions=entry.get("instructions", machine.instructions))))
    return rows


@dataclass(frozen=True)
class Recorded:
    """A run of a recorded profile beside both predictions: by the machine's figures, and from two of its own budgets.

    `planned`: as `plan --device this` would have it, by what was measured of the machine before the profile; computing
    by its class where that had not been measured, else at the pace that the run saw.
    """

    profile: Profile
    run: Run
    planned: Row
    plain_tokens_per_s: float  # the same without the run's pace
    fitted_tokens_per_s: float
    calibrated: bool  # one of the two budgets

    @property
    def plain_error(self) -> float:
        return self.plain_tokens_per_s / self.run.decode_tokens_per_s - 1

    @property
    def fitted_error(self) -> float:
        return self.fitted_tokens_per_s / self.run.decode_tokens_per_s - 1


def recorded() -> list[Recorded]:
    """Every run of every profile in data/profiles, by machine, which benchmarks/calibrate_plan.py records."""
    return [entry for path in sorted(PROFILES.glob("*/*.json")) for entry in recorded_in(path)]


def recorded_in(path: Path) -> list[Recorded]:
    profile = read_profile(path)
    machine = machine_of_profile(profile)
    moved, spread = moved_of_profile(profile), uncertainty(machine)
    found: list[Recorded] = []
    for checked in check_predictions(profile):
        run = checked.run
        pace = run.pace_s / machine.computing.pace_s if run.pace_s and machine.computing else 1.0
        disk = machine.with_disk(run.read_bytes_per_s) if run.read_bytes_per_s else machine
        costs = step_costs(disk, moved, pace)
        middle, low, high = (
            predict(profile, costs.scaled(factor, disk), run.expert_slots).tokens_per_s
            for factor, disk in ((1.0, 1.0), (spread, DISK_UNCERTAINTY), (1 / spread, 1 / DISK_UNCERTAINTY))
        )
        row = Row(path.stem, profile.machine.cpu, path.name, run.decode_tokens_per_s, middle, low, high, run.loaded)
        plain = predict(profile, step_costs(disk, moved), run.expert_slots).tokens_per_s
        found.append(Recorded(profile, run, row, plain, checked.prediction.tokens_per_s, checked.calibrated))
    return found


def _read() -> dict[str, Any]:
    return tomllib.loads(DATA.read_text())


def _machine(data: dict[str, Any], entry: dict[str, Any]) -> Machine:
    machine = data["machine"][entry["machine"]]
    return Machine(
        name="",
        title=machine["title"],
        memory_bytes=0,
        usable_bytes=0,
        memory_bytes_per_s=entry["memory_bytes_per_s"],
        int8_ops_per_s=machine["int8_ops_per_s"],
        instructions=machine["instructions"],
        disk=((4096, entry.get("disk_bytes_per_s", _NO_DISK)),),
        basis="measured",
        measured=True,
    )


def _row(data: dict[str, Any], entry: dict[str, Any], machine: Machine) -> Row:
    moved = _moved(data["model"][entry["model"]], entry)
    visits = visits_at(entry.get("hit_rate", 1.0), moved.top_k)
    costs, spread = class_costs(machine, moved), uncertainty(machine)
    low, middle, high = (
        decode_step(moved.work, costs.scaled(factor, factor), visits).tokens_per_s
        for factor in (spread, 1.0, 1 / spread)
    )
    return Row(
        entry["what"],
        machine.title,
        entry["source"],
        entry["tokens_per_s"],
        middle,
        low,
        high,
        entry.get("disk_changed", False),
    )


def _moved(model: dict[str, Any], entry: dict[str, Any]) -> Moved:
    dense_bits = entry["dense_bits"] if "dense_bits" in entry else entry["bits"]
    if "bytes" in model:
        return Moved(model["layers"], 1, model["bytes"], 0, dense_bits, 0, dense_bits, 0)
    expert_bits = entry["expert_bits"] if "expert_bits" in entry else entry["bits"]
    each = model["expert"] * expert_bits / 8
    dense = np.dot([model["layers"], 1], [model["attention"], model["head"]]) * dense_bits / 8
    head = model["head"] * dense_bits / 8
    return Moved(
        model["layers"], model["top_k"], dense, head, dense_bits, each, expert_bits, each, entry.get("kv_bytes", 0.0)
    )
