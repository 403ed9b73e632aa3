"""Which scheme and budget a machine can run a model in, how fast, and if none will do, what would.

All of it is predicted: from the model's shape, the machine's figures, routing like that of real models, and constants
measured on one machine with two cores (`docs/LOG.md`): how much of the CPU's peak one token's products reach, and what
each layer takes beside. A machine whose instructions are narrower is probably faster than this says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pocketmoe.profiles.catalogue.devices import Device, rate_at
from pocketmoe.profiles.estimate.footprint import Footprint
from pocketmoe.profiles.estimate.hit_curve import HitCurve
from pocketmoe.profiles.estimate.roofline import distinct_experts, step_s

if TYPE_CHECKING:
    from pocketmoe.profiles.machine.doctor import DoctorReport

Verdict = Literal["fast", "good", "usable", "slow"]
VERDICTS: tuple[tuple[float, Verdict], ...] = ((15, "fast"), (8, "good"), (3, "usable"), (0, "slow"))  # bigrig's words
_GOOD = 8.0  # tokens/s that are aimed at where no target is given
_SHARES = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
_TOKEN_EFFICIENCY = 0.03  # of the CPU's int8 peak, one token at a time
_PROMPT_EFFICIENCY = 0.13  # and many at once
_LAYER_S = 0.25e-3  # Python and calls into sessions
_RESERVE_SHARE, _RESERVE_BYTES = 0.15, 800_000_000  # for the system and others
_MOST = 1 << 44


@dataclass(frozen=True)
class Machine:
    """What a prediction needs to know. `disk`: (read size, bytes per second), ascending."""

    name: str
    title: str
    memory_bytes: float
    usable_bytes: float  # for the process
    memory_bytes_per_s: float
    int8_ops_per_s: float
    disk: tuple[tuple[float, float], ...]
    basis: str
    note: str = ""

    def disk_bytes_per_s(self, read_bytes: float) -> float:
        return rate_at(self.disk, read_bytes)


@dataclass(frozen=True)
class Speed:
    """Predicted at a share of the experts in memory."""

    hit_rate: float
    tokens_per_s: float
    ttft_s: float
    read_bytes_per_token: float
    bound_by: Literal["disk", "computing"]


@dataclass(frozen=True)
class Candidate:
    """One scheme at one budget. `memory_bytes` is what `run --memory` would be given."""

    scheme: str
    share: float
    memory_bytes: int
    bundle_bytes: int
    fits: bool
    speed: Speed
    verdict: Verdict
    quality: str


@dataclass(frozen=True)
class Remedy:
    """What would reach the target (or run at all): each by itself, with all else as it is; None where nothing would."""

    scheme: str
    memory_bytes: int | None
    disk_bytes_per_s: float | None
    most_tokens_per_s: float  # with all experts in memory
    wanted_tokens_per_s: float


@dataclass(frozen=True)
class PlanReport:
    """The fields of `plan --json`."""

    model: str
    architecture: str
    counted_from: str
    parameters: int
    active_parameters: int
    moe_layers: int
    experts: int
    experts_per_token: int
    context_tokens: int
    prompt_tokens: int
    device: str
    device_title: str
    device_memory_bytes: int
    usable_memory_bytes: int
    device_basis: str
    device_note: str
    routing: str
    target_tokens_per_s: float | None
    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    remedy: Remedy | None
    predicted: bool = True


def verdict_of(tokens_per_s: float) -> Verdict:
    """fast from 15 tokens/s on, good from 8, usable from 3."""
    return next(word for least, word in VERDICTS if tokens_per_s >= least)


def machine_of_device(name: str, device: Device, reserve_bytes: float | None = None) -> Machine:
    """A device of devices.toml."""
    memory = device.memory_bytes.value
    disk = ", ".join(f"{rate.bytes_per_s / 1e9:.2g} GB/s at {rate.read_bytes / 1024:.0f} KiB" for rate in device.disk)
    return Machine(
        name=name,
        title=device.title,
        memory_bytes=memory,
        usable_bytes=memory - _reserve(memory, reserve_bytes),
        memory_bytes_per_s=device.memory_bandwidth_bytes_per_s.value,
        int8_ops_per_s=device.int8_ops_per_s.value,
        disk=tuple((rate.read_bytes, rate.bytes_per_s) for rate in device.disk),
        basis=f"devices.toml: {device.memory_bandwidth_bytes_per_s.value / 1e9:.0f} GB/s of memory, {device.disk_name} "
        f"with {disk}",
        note=device.note,
    )


def machine_here(report: DoctorReport, sgemm_flops_per_s: float, reserve_bytes: float | None = None) -> Machine:
    """This machine, measured. Its int8 peak is estimated from a float32 matrix product and the CPU's features."""
    memory = report.memory
    limit = memory.cgroup_limit_bytes or memory.total_bytes
    ram = max(report.ram.one_thread_bytes_per_s, report.ram.all_threads_bytes_per_s)
    best: dict[int, float] = {}
    for read in report.disk.reads if report.disk else ():
        best[read.block_bytes] = max(read.bytes_per_s, best.get(read.block_bytes, 0))
    vnni = {"avx_vnni", "avx512_vnni", "dotprod"} & {*report.cpu.features}
    rates = tuple(sorted(best.items())) or ((1 << 20, 1e8),)
    where = "measured" if report.disk else f"the disk could not be measured ({report.disk_problem}): 100 MB/s assumed"
    return Machine(
        name="this",
        title=f"{report.cpu.model}, {report.cpu.cores} cores",
        memory_bytes=memory.total_bytes,
        usable_bytes=limit - _reserve(limit, reserve_bytes),
        memory_bytes_per_s=ram,
        int8_ops_per_s=sgemm_flops_per_s * (4 if vnni else 1.35),
        disk=tuple((float(size), rate) for size, rate in rates),
        basis=f"{where}: {ram / 1e9:.0f} GB/s of memory, {rates[-1][1] / 1e9:.2g} GB/s of disk at "
        f"{rates[-1][0] >> 10} KiB",
    )


def _reserve(memory: float, given: float | None) -> float:
    return max(_RESERVE_BYTES, _RESERVE_SHARE * memory) if given is None else given


def predict(footprint: Footprint, share: float, hits: HitCurve, machine: Machine, prompt_tokens: int) -> Speed:
    """A decode step, in which what is resident computes while the rest is read; and a prompt from a cold start."""
    hit = hits.at(share)
    expert_s = _compute_s(machine, footprint.active_expert_bytes, footprint.active_expert_parameters)
    dense_s = _compute_s(machine, footprint.dense_bytes, footprint.dense_parameters)
    compute_s = dense_s + expert_s + _LAYER_S * footprint.moe_layers
    missed = (1 - hit) * footprint.active_expert_bytes
    disk = machine.disk_bytes_per_s(footprint.expert_bytes)
    meanwhile = expert_s * (footprint.top_k - 1) / footprint.top_k
    waiting_s = max(0.0, missed / disk - meanwhile)
    touched = footprint.moe_layers * distinct_experts(footprint.experts, footprint.top_k, prompt_tokens)
    read = touched * footprint.expert_bytes
    parameters = footprint.dense_parameters + footprint.active_expert_parameters
    prompt_s = _compute_s(machine, footprint.dense_bytes + read, parameters, prompt_tokens, _PROMPT_EFFICIENCY)
    return Speed(
        hit_rate=hit,
        tokens_per_s=1 / (compute_s + waiting_s),
        ttft_s=read / disk + prompt_s,
        read_bytes_per_token=missed,
        bound_by="disk" if waiting_s > compute_s else "computing",
    )


def _compute_s(
    machine: Machine, nbytes: float, parameters: float, tokens: int = 1, efficiency: float = _TOKEN_EFFICIENCY
) -> float:
    operations = 2 * parameters * tokens
    peak = machine.int8_ops_per_s
    return step_s(nbytes, operations, machine.memory_bytes_per_s, peak, compute_efficiency=efficiency)


def candidates(
    footprints: Sequence[Footprint], hits: HitCurve, machine: Machine, context: int, prompt_tokens: int
) -> list[Candidate]:
    """For each scheme the least budget, usual shares, and the most that the machine has room for."""
    found: list[Candidate] = []
    for footprint in footprints:
        most = footprint.share_in(machine.usable_bytes, context)
        shares: list[float] = sorted({0.0, *_SHARES, max(0.0, most)})
        found += [_candidate(footprint, share, hits, machine, context, prompt_tokens) for share in shares]
    return found


def _candidate(
    footprint: Footprint, share: float, hits: HitCurve, machine: Machine, context: int, prompt_tokens: int
) -> Candidate:
    memory = footprint.budget_bytes(share, context)
    share = max(share, min(1.0, footprint.share_in(memory, context)))
    speed = predict(footprint, share, hits, machine, prompt_tokens)
    return Candidate(
        scheme=footprint.scheme,
        share=share,
        memory_bytes=memory,
        bundle_bytes=footprint.total_bytes,
        fits=memory <= machine.usable_bytes,
        speed=speed,
        verdict=verdict_of(speed.tokens_per_s),
        quality=footprint.quality,
    )


def recommend(found: Sequence[Candidate], target: float | None) -> Candidate | None:
    """The best scheme that reaches the target (8 tokens/s without one), in as little memory as that takes.

    Without a target and where nothing is that fast: the fastest. None when nothing fits, or reaches the target.
    """
    fitting = [candidate for candidate in found if candidate.fits]
    wanted = _GOOD if target is None else target
    schemes = list(dict.fromkeys(candidate.scheme for candidate in found))  # the best first
    for scheme in schemes:
        enough = [c for c in fitting if c.scheme == scheme and c.speed.tokens_per_s >= wanted]
        if enough:
            return min(enough, key=lambda c: c.memory_bytes)
    if target is not None or not fitting:
        return None
    return max(fitting, key=lambda c: c.speed.tokens_per_s)


def remedy(
    footprints: Sequence[Footprint],
    hits: HitCurve,
    machine: Machine,
    context: int,
    prompt_tokens: int,
    target: float | None,
) -> Remedy:
    """For the fastest scheme: the least memory that would do on this disk, and the slowest disk with this memory."""
    wanted = target if target is not None else VERDICTS[2][0]
    fastest = max(footprints, key=lambda f: predict(f, 1.0, hits, machine, prompt_tokens).tokens_per_s)

    def speed_in(memory: float, on: Machine = machine) -> float:
        share = fastest.share_in(memory, context)
        return predict(fastest, share, hits, on, prompt_tokens).tokens_per_s if share >= 0 else 0.0

    def speed_from(disk: float) -> float:
        on = replace(machine, disk=((float(fastest.expert_bytes), disk),))
        return speed_in(machine.usable_bytes, on)

    needed = _least(lambda memory: speed_in(memory) >= wanted, _MOST)
    disk = _least(lambda rate: speed_from(rate) >= wanted, _MOST)
    return Remedy(
        scheme=fastest.scheme,
        memory_bytes=None if needed is None else int(needed + machine.memory_bytes - machine.usable_bytes),
        disk_bytes_per_s=disk,
        most_tokens_per_s=predict(fastest, 1.0, hits, machine, prompt_tokens).tokens_per_s,
        wanted_tokens_per_s=wanted,
    )


def _least(enough: Callable[[float], bool], most: float) -> float | None:
    """The least value that is enough, to a thousandth, where more is never worse; None when `most` is not."""
    if not enough(most):
        return None
    low, high = 1.0, most
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
