"""Measures a bundle at some budgets, each in a fresh process under a real memory limit where the system allows one.

What has been measured is in profile.json at once, so that a killed profile goes on where it was.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from pocketmoe import __version__
from pocketmoe.bundle.packed import PackedPlace
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.errors import BadInput, BudgetTooSmall, PocketMoEError
from pocketmoe.profiles.machine.doctor import DoctorReport, examine
from pocketmoe.profiles.machine.limit import Limited, LimitUnavailable, run_limited, run_plain
from pocketmoe.profiles.machine.load import OthersLoad
from pocketmoe.profiles.measure.curve import summarize_routing
from pocketmoe.profiles.measure.worker import Measured, Order, Survey
from pocketmoe.profiles.profile import (
    PROFILE,
    Machine,
    Profile,
    ReadSpeed,
    Run,
    Settings,
    read_profile,
    write_profile,
)
from pocketmoe.runtime.engine.memory_plan import peak_bytes
from pocketmoe.runtime.memory.budget import START_TO_START_BYTES
from pocketmoe.sizes import in_words, parse_share, parse_size

LEAST = "least"
DEFAULT_MEMORY = (LEAST, "25%", "50%", "75%", "100%")
WORKER = (sys.executable, "-m", "pocketmoe", "measure")
_ROUND = 10**5  # bytes
_EXIT_CODES = (3, 4, 5)

Answer = TypeVar("Answer", Survey, Measured)


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure. `text` None: seeded tokens. `slow_disks`: bandwidths at which to measure again, bytes/s.

    `repeats`: how often a budget is measured again while others are at work.
    """

    bundle: Path
    memory: Sequence[str] = DEFAULT_MEMORY
    prompt_tokens: int = 128
    output_tokens: int = 64
    text: Path | None = None
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    prefetch: str = "auto"
    slow_disks: Sequence[float] = ()
    repeats: int = 1
    packed: PackedPlace | None = None  # for packed experts that cannot, or are not to, lie in the bundle


class _Job(NamedTuple):
    """`memory`, as it was asked for, comes to about `budget_bytes`, 0 for none."""

    memory: str
    budget_bytes: int
    read_bytes_per_s: float | None = None

    @property
    def expert_share(self) -> float | None:
        return parse_share(self.memory)

    @property
    def limit_bytes(self) -> int | None:
        return self.budget_bytes + START_TO_START_BYTES * (self.expert_share is not None) or None


def profile_bundle(request: ProfileRequest, folder: Path, progress: Progress = no_progress) -> Profile:
    """Measure every budget that profile.json in `folder` does not have yet; the whole profile.

    Raises BadInput for the bundle, or where `folder` has the profile of something else; BudgetTooSmall, OutputError.
    """
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    Bundle.open(request.bundle)  # refused here rather than in another process
    path = folder / PROFILE
    before = read_profile(path) if path.exists() else None
    found = _ask(request, Survey, _Job("looking at the bundle", 0), progress)
    profile = _resumed(path, before, found, request) if before else _new(found, request, progress)
    jobs = _jobs(request, profile)
    done = {(run.memory, run.read_bytes_per_s) for run in profile.runs}
    left = [job for job in jobs if (job.memory, job.read_bytes_per_s) not in done]
    for number, job in enumerate(left):
        where = f"{number + 1} of {len(left)}, {_name(job)}"
        measured = _measured(request, job, _prefixed(where, progress), not profile.routing)
        profile = _with(profile, measured, jobs, progress)
        write_profile(path, profile)
        progress(f"{where}: {_in_words(measured.run)}", 0, 0)
    return profile


def _measured(request: ProfileRequest, job: _Job, progress: Progress, want_routes: bool) -> Measured:
    """A job's run; of several, where others were at work, the one with the least of that."""
    found = _ask(request, Measured, job, progress, want_routes)
    tries = 1
    while found.run.loaded and tries <= request.repeats:
        progress(f"{_load(found.run).in_words()}: measuring it again", 0, 0)
        again, tries = _ask(request, Measured, job, progress, want_routes), tries + 1
        if _load(again.run).rank < _load(found.run).rank:
            found = again
    return msgspec.structs.replace(found, run=msgspec.structs.replace(found.run, tries=tries))


def _load(run: Run) -> OthersLoad:
    return OthersLoad(run.others_cpu, run.throttled, run.others_disk_bytes_per_s)


def _in_words(run: Run) -> str:
    load = f"; {words}" if (words := _load(run).in_words()) else ""
    return (
        f"{in_words(run.peak_memory_bytes)} of {in_words(run.memory_budget_bytes)}, {run.decode_tokens_per_s:.1f} "
        f"tokens/s, first token after {run.ttft_s:.2f} s, {run.hit_rate + run.prefetch_hit_rate:.0%} hits{load}"
    )


def _new(found: Survey, request: ProfileRequest, progress: Progress) -> Profile:
    return Profile(
        machine=_machine(examine(request.bundle, progress, 1 + request.repeats, threads=[found.threads])),
        model=found.model,
        memory=found.memory,
        workload=found.workload,
        settings=Settings(threads=found.threads, backend=request.backend, prefetch=request.prefetch),
        expert=found.expert,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _resumed(path: Path, before: Profile, found: Survey, request: ProfileRequest) -> Profile:
    """The profile that is there, when it is of the same bundle, workload and settings. Raises BadInput."""
    settings = Settings(threads=found.threads, backend=request.backend, prefetch=request.prefetch)
    same = (
        before.model.bundle_sha256 == found.model.bundle_sha256
        and before.workload == found.workload
        and before.settings == settings
        and before.machine.architecture == platform.machine()
    )
    if not same:
        raise BadInput(
            f"{path} is the profile of another bundle, workload or setting, which would be lost",
            "Give another directory, or remove it.",
        )
    return before


def _jobs(request: ProfileRequest, profile: Profile) -> list[_Job]:
    """Every budget at full speed, least first; then, for each slow disk, all but the largest, which reads least."""
    texts = dict.fromkeys(request.memory)
    budgets = sorted((budget_bytes(profile, text), parse_share(text) or 0.0, text) for text in texts)
    slowed = [(rate, budget) for rate in request.slow_disks for budget in budgets[:-1] or budgets]
    at_full_speed = [_Job(text, nbytes) for nbytes, _, text in budgets]
    return at_full_speed + [_Job(text, nbytes, rate) for rate, (nbytes, _, text) in slowed]


def budget_bytes(profile: Profile, text: str) -> int:
    """What a budget comes to, in bytes, for the whole process. Raises BudgetTooSmall, ValueError."""
    memory = profile.memory
    if text == LEAST:
        return memory.least_bytes
    share = parse_share(text)
    if share is not None:
        slots = round(share * sum(profile.model.experts)) * profile.model.expert_slot_bytes
        total = peak_bytes(memory.fixed_bytes, memory.loading_bytes, slots)
        return max(memory.least_bytes, -(-total // _ROUND) * _ROUND)
    total = parse_size(text)
    if total < memory.least_bytes:
        raise BudgetTooSmall(total, memory.least_bytes)
    return total


def _with(profile: Profile, measured: Measured, jobs: Sequence[_Job], progress: Progress) -> Profile:
    """The profile with one run more and, where the run brought it, the routing."""
    model, routing = profile.model, profile.routing
    if measured.routes:
        ids = np.frombuffer(measured.routes, np.int16).reshape(-1, len(model.experts), max(model.experts_per_token))
        slots = [(job.budget_bytes - profile.memory.fixed_bytes) // model.expert_slot_bytes for job in jobs]
        routing = summarize_routing(ids, model.experts, measured.prompt_walks, slots, progress)
    runs = sorted([*profile.runs, measured.run], key=lambda r: (r.read_bytes_per_s or 0, r.expert_slots))
    return msgspec.structs.replace(profile, routing=routing, runs=tuple(runs))


def _ask(
    request: ProfileRequest, answer: type[Answer], job: _Job, progress: Progress, want_routes: bool = False
) -> Answer:
    """Have a process look at the bundle, or run a job. Raises what its error line says."""
    order = Order(
        bundle=str(request.bundle),
        text=str(request.text or ""),
        seed=request.seed,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        threads=request.threads,
        backend=request.backend,
        prefetch=request.prefetch,
        memory_bytes=None if job.expert_share is not None else job.budget_bytes or None,
        expert_share=job.expert_share,
        read_bytes_per_s=job.read_bytes_per_s,
        want_routes=want_routes,
        packed_dir=str(request.packed.directory) if request.packed else "",
        packed_always=request.packed is not None and request.packed.always,
    )
    command = [*WORKER, msgspec.json.encode(order).decode()]
    ended, problem = _run(command, job.limit_bytes, progress)
    if ended.returncode:
        raise _failure(ended, job)
    found = msgspec.json.decode(ended.stdout, type=answer)
    if isinstance(found, Measured):
        run = msgspec.structs.replace(
            found.run,
            memory=job.memory,
            limited_by="process" if problem else "cgroup",
            limit_bytes=None if problem else job.limit_bytes,
            limit_problem=problem,
            cgroup_peak_bytes=ended.peak_bytes,
        )
        found = msgspec.structs.replace(found, run=run)
    return found


def _run(command: Sequence[str], limit_bytes: int | None, progress: Progress) -> tuple[Limited, str]:
    """How it ended, and why there was no limit where there was none."""

    def relay(line: str) -> None:
        if line.startswith("["):
            what, done, total = json.loads(line)
            progress(what, done, total)

    if limit_bytes is None:
        return run_plain(command, None, relay), ""
    try:
        return run_limited(command, limit_bytes, None, relay), ""
    except LimitUnavailable as reason:
        return run_plain(command, None, relay), str(reason)


def _failure(ended: Limited, job: _Job) -> PocketMoEError:
    if ended.returncode < 0:
        return PocketMoEError(
            f"the process that measured {_name(job)} was killed by signal {-ended.returncode}",
            "A kill by signal 9 means that it took more than its budget, which is a bug: please report it.",
        )
    lines = [line for line in ended.stderr.splitlines() if line and not line.startswith("[")]
    error = PocketMoEError(
        f"measuring {_name(job)} failed: {lines[-1].removeprefix('Error: ') if lines else 'no word'}"
    )
    if ended.returncode in _EXIT_CODES:
        error.exit_code = ended.returncode
    return error


def _name(job: _Job) -> str:
    slowed = f" with a disk of {job.read_bytes_per_s / 1e6:.0f} MB/s" if job.read_bytes_per_s else ""
    return f"{job.memory}{slowed}"


def _prefixed(where: str, progress: Progress) -> Progress:
    return lambda what, done, total: progress(f"{where}: {what}", done, total)


def _machine(found: DoctorReport) -> Machine:
    disk = found.disk
    reads = [] if disk is None else [r for r in disk.reads if r.bytes_per_s > 0]
    return Machine(
        cpu=found.cpu.model,
        architecture=found.cpu.architecture,
        features=found.cpu.features,
        cores=found.cpu.cores,
        memory_bytes=found.memory.total_bytes,
        ram_one_thread_bytes_per_s=found.ram.one_thread_bytes_per_s,
        ram_bytes_per_s=max(found.ram.one_thread_bytes_per_s, found.ram.all_threads_bytes_per_s),
        disk=tuple(
            ReadSpeed(block_bytes=r.block_bytes, in_flight=r.in_flight, bytes_per_s=r.bytes_per_s) for r in reads
        ),
        disk_direct=disk is None or disk.direct,
        disk_problem=found.disk_problem,
        slots_problem=found.slots_problem,
        system=f"{platform.system()} {platform.release()}",
        software={
            "pocketmoe": __version__,
            "onnxruntime": found.software.onnxruntime,
            "python": found.software.python,
            "numpy": found.software.numpy,
        },
        quota_cores=found.cpu.quota_cores,
        loaded=found.load.is_busy,
        load=found.load.in_words(),
        computing=found.computing,
        disk_spread=1.0 if disk is None else disk.spread,
    )
