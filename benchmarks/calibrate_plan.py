"""Constants of plan's decode-step model, from profiles of a quiet machine.

    python benchmarks/calibrate_plan.py PROFILE ...

Each PROFILE is a profile.json, or its directory, with everything in memory as its last budget. Several of different
sizes on one machine are needed to tell the constants apart: a model of few bytes and many layers (the reference model)
gives what a layer takes, one of many bytes (OLMoE's shape) what weights stream at. Printed are the constants of the
machine's class beside those in pocketmoe/profiles/estimate/speed.toml, and each profile's error before and after.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketmoe.profiles.estimate.classes import Machine, Moved, class_costs, machine_of_profile
from pocketmoe.profiles.estimate.device_prediction import moved_of_profile
from pocketmoe.profiles.estimate.predict import costs_here
from pocketmoe.profiles.profile import read_profile

BUSY = 0.05
ROUNDS = 200


@dataclass(frozen=True)
class Sample:
    """A profile as the model sees it. Seconds of a step without waits."""

    name: str
    machine: Machine
    moved: Moved
    measured_s: float
    slower: float  # after waits
    others_cpu: float


def main() -> None:
    """Read the profiles and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="+", type=Path, metavar="PROFILE")
    samples = [sample(path) for path in parser.parse_args().profiles]
    for found in samples:
        if found.others_cpu > BUSY:
            print(f"{found.name}: others took {found.others_cpu:.0%} of the processors; do not use these constants")
    machine = samples[0].machine
    if any(found.machine.instructions != machine.instructions for found in samples):
        raise SystemExit("the profiles are of different classes of processors: give those of one")
    streams, layer_s = fit(samples)
    known = machine.speed_class
    print(f"[{machine.instructions}] fitted on {len(samples)} profiles, in brackets what speed.toml has")
    print(
        f"seconds of weights, times those of speed.toml: {streams:.2f} (1.00); divide memory_share and int4_share by it"
    )
    print(f"layer_s {layer_s:.6f} ({known.layer_s.value:.6f})")
    print(f"after_waits {np.median([found.slower for found in samples]):.2f} ({known.after_waits.value:.2f})")
    for found in samples:
        costs = class_costs(found.machine, found.moved)
        fitted_s = sum(parts(found, streams, layer_s))
        before, after = costs.steady.total_s / found.measured_s - 1, fitted_s / found.measured_s - 1
        print(f"{found.name}: {1e3 * found.measured_s:.1f} ms a token, predicted {before:+.0%}, fitted {after:+.0%}")


def sample(path: Path) -> Sample:
    """Raises BadInput or DamagedFile."""
    profile = read_profile(path)
    costs = costs_here(profile)
    return Sample(
        name=profile.model.name,
        machine=machine_of_profile(profile),
        moved=moved_of_profile(profile),
        measured_s=costs.steady.total_s,
        slower=costs.after_waits.total_s / costs.steady.total_s,
        others_cpu=max(run.others_cpu for run in profile.runs),
    )


def parts(found: Sample, streams: float, layer_s: float) -> tuple[float, float]:
    """Seconds of weights, and of what each layer takes beside."""
    by_class = class_costs(found.machine, found.moved).steady
    hand_over_s = by_class.python_s - found.moved.layers * found.machine.speed_class.layer_s.value
    return streams * (by_class.segments_s + by_class.experts_s), hand_over_s + found.moved.layers * layer_s


def fit(samples: Sequence[Sample]) -> tuple[float, float]:
    """The factor on seconds of weights and the seconds of a layer that make the least relative error, both above 0."""
    rows = np.array([[parts(found, 1.0, 0.0)[0], found.moved.layers] for found in samples])
    rest = np.array([found.measured_s - parts(found, 1.0, 0.0)[1] for found in samples])
    weights = np.array([1 / found.measured_s for found in samples])
    streams, layer_s = 1.0, samples[0].machine.speed_class.layer_s.value
    for _ in range(ROUNDS):  # coordinate descent: two numbers, each of which must stay above 0
        streams = _least(rows[:, 0] * weights, (rest - layer_s * rows[:, 1]) * weights)
        if len(samples) > 1:
            layer_s = _least(rows[:, 1] * weights, (rest - streams * rows[:, 0]) * weights)
    return streams, layer_s


def _least(column: np.ndarray, wanted: np.ndarray) -> float:
    """The factor of one column, float [n], that comes nearest to another."""
    return max(1e-9, float(column @ wanted / (column @ column)))


if __name__ == "__main__":
    main()
