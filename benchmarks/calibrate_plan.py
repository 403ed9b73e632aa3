"""Constants of plan's decode-step model, from profiles of a quiet machine.

    python benchmarks/calibrate_plan.py --record tests/profiles/estimate/data/profiles/MACHINE [--write] BUNDLE ...
    python benchmarks/calibrate_plan.py [--write] PROFILE ...

The first measures each BUNDLE: all threads at five budgets and with slowed disks, one thread, and under a CPU quota of
half of the cores where a cgroup for it can be made (root); two to four minutes for each bundle of up to 4 GB. What has
been recorded of a bundle of the same name and size before is replaced. Each PROFILE is a profile.json, or its
directory, with everything in memory as its last budget.

Several sizes are needed to tell the constants apart: a model of few bytes and many layers (the reference model) gives
what a layer takes, one of many bytes (OLMoE's shape) what weights stream at. Printed are the constants of the machine's
class beside those in pocketmoe/profiles/estimate/speed.toml, and each profile's error before and after; --write puts
them there. Then `python docs/generate_plan.py` writes docs/PLAN.md anew.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.estimate import classes
from pocketmoe.profiles.estimate.classes import Machine, Moved, class_costs, machine_of_profile
from pocketmoe.profiles.estimate.device_prediction import moved_of_profile
from pocketmoe.profiles.estimate.predict import costs_here
from pocketmoe.profiles.profile import Profile, read_profile

ROUNDS = 200
LARGE = 2_000_000_000  # bytes of experts from which on little is measured
SMALL_EXPERT = 200_000
SPEEDS = Path(classes.__file__).with_name("speed.toml")
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")  # version 1: in version 2 a run's memory limit would take it out of the quota


@dataclass(frozen=True)
class Sample:
    """A profile as the model sees it. Seconds of a step without waits."""

    name: str
    machine: Machine
    moved: Moved
    measured_s: float
    slower: float  # after waits
    loaded: bool


def main() -> None:
    """Measure, where asked to; read the profiles; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="BUNDLE|PROFILE")
    parser.add_argument("--record", type=Path, metavar="DIR", help="measure bundles into DIR")
    parser.add_argument("--write", action="store_true", help="put the constants into speed.toml")
    given = parser.parse_args()
    paths: list[Path] = given.sources
    if given.record:
        began = time.monotonic()
        paths = [path for bundle in given.sources for path in record(bundle, given.record)]
        print(f"recorded {len(paths)} profiles in {time.monotonic() - began:.0f} s")
    samples = [sample(path) for path in paths]
    whole = [found for found in samples if found.machine.int8_ops_per_s == samples[0].machine.int8_ops_per_s]
    streams, layer_s, after_waits = show(whole, samples)
    if given.write:
        if any(found.loaded for found in whole):
            raise SystemExit("others were at work: nothing is written. Measure again when the machine is idle.")
        write(samples[0].machine.instructions, streams, layer_s, after_waits)
        print(f"wrote {SPEEDS}; now: python docs/generate_plan.py")


def record(bundle: Path, folder: Path) -> list[Path]:
    """The profiles of a bundle: with all threads, with one, under a quota."""
    opened = Bundle.open(bundle)
    kinds = opened.manifest.expert_kinds
    experts = sum(layer.n_experts for layer in opened.manifest.moe_layers)
    large = experts * kinds[0].nbytes > LARGE
    small = kinds[0].nbytes < SMALL_EXPERT  # whose tokens take a millisecond: a second of them is needed
    length = ("--prompt-tokens", "64", "--output-tokens", "32" if large else "512" if small else "64")
    slow = "100MB,30MB" if small else "500MB"
    every, few = ("--memory", "least,25%,50%,75%,100%"), ("--memory", "25%,100%")
    slowed = (*few, "--slow-disk", slow) if large else (*every, "--slow-disk", slow)
    folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    name = f"{bundle.resolve().name}-{opened.manifest.model.n_parameters / 1e6:.0f}M"
    found = [profile(bundle, folder / f"{name}.json", (*length, *every), (*length, *slowed))]
    found.append(profile(bundle, folder / f"{name}-1-thread.json", (*length, "--threads", "1", *few)))
    with quota(cores / 2) as group:
        if group is not None and not large:
            found.append(profile(bundle, folder / f"{name}-quota.json", (*length, *few), group=group))
    return found


def profile(bundle: Path, path: Path, *asked: Sequence[str], group: Path | None = None) -> Path:
    """One profile by the command, once for each choice of budgets; kept without what no prediction reads.

    In a cgroup where one is given.
    """
    print(f"{path.stem} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for options in asked:
            command = [sys.executable, "-m", "pocketmoe", "profile", str(bundle), "-o", folder, "--prefetch", "off"]
            command += options
            if group is not None:
                command = ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = read_profile(Path(folder))
    model = msgspec.structs.replace(found.model, expert_kind_of=(), expert_kinds=())
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(found, model=model)))
    return path


@contextlib.contextmanager
def quota(cores: float) -> Generator[Path | None]:
    """A cgroup whose processes get the time of so many cores; None, said, where none can be made."""
    group = CPU_GROUPS / f"pocketmoe-calibrate-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as problem:
        print(f"no profiles under a CPU quota: {problem}")
        yield None
        return
    try:
        (group / "cpu.cfs_quota_us").write_text(f"{round(100_000 * cores)}")
        yield group
    finally:
        group.rmdir()


def sample(path: Path) -> Sample:
    """Raises BadInput or DamagedFile."""
    found: Profile = read_profile(path)
    costs = costs_here(found)
    return Sample(
        name=path.stem if path.suffix == ".json" and path.stem != "profile" else found.model.name,
        machine=machine_of_profile(found),
        moved=moved_of_profile(found),
        measured_s=costs.steady.total_s,
        slower=costs.after_waits.total_s / costs.steady.total_s,
        loaded=any(run.loaded for run in found.runs),
    )


def show(fitted: Sequence[Sample], every: Sequence[Sample]) -> tuple[float, float, float]:
    """Print the constants of those with all threads, and what they say of every sample."""
    for found in every:
        if found.loaded:
            print(f"{found.name}: others were at work; do not use these constants")
    machine = fitted[0].machine
    if any(found.machine.instructions != machine.instructions for found in every):
        raise SystemExit("the profiles are of different classes of processors: give those of one")
    streams, layer_s = fit(fitted)
    after_waits = float(np.median([found.slower for found in fitted]))
    known = machine.speed_class
    print(f"[{machine.instructions}] fitted on {len(fitted)} profiles, in brackets what speed.toml has")
    print(f"seconds of weights, times those of speed.toml: {streams:.2f} (1.00)")
    print(f"layer_s {layer_s:.6f} ({known.layer_s.value:.6f})")
    print(f"after_waits {after_waits:.2f} ({known.after_waits.value:.2f})")
    for found in every:
        costs = class_costs(found.machine, found.moved)
        fitted_s = sum(parts(found, streams, layer_s))
        before, after = costs.steady.total_s / found.measured_s - 1, fitted_s / found.measured_s - 1
        print(f"{found.name}: {1e3 * found.measured_s:.1f} ms a token, predicted {before:+.0%}, fitted {after:+.0%}")
    return streams, layer_s, after_waits


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


def write(instructions: str, streams: float, layer_s: float, after_waits: float) -> None:
    """New figures of one class into speed.toml, with this script as their source."""
    today = datetime.now(UTC).date().isoformat()
    head, mark, rest = SPEEDS.read_text().partition(f"[{instructions}]\n")
    body, others, after = rest.partition("\n[")
    for name, change in (
        ("memory_share", lambda old: old / streams),
        ("int8_share", lambda old: old / streams),
        ("int4_share", lambda old: old / streams),
        ("layer_s", lambda _: layer_s),
        ("after_waits", lambda _: max(1.0, after_waits)),
    ):
        old = re.search(rf"^{name} = {{ value = ([0-9.e-]+), .*$", body, re.MULTILINE)
        assert old is not None, f"speed.toml has {name} of {instructions}"
        value, source = f"{change(float(old[1])):.4g}", '"benchmarks/calibrate_plan.py"'
        figure = f'value = {value}, source = {source}, as_of = {today}, confidence = "V"'
        body = body.replace(old[0], f"{name} = {{ {figure} }}")
    SPEEDS.write_text(head + mark + body + others + after)


if __name__ == "__main__":
    main()
