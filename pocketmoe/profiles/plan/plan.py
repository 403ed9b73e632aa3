"""Which scheme and budget a machine can run a model in, how fast, and if none will do, what would.

All of it is predicted: from the model's shape, the machine's figures, routing like that of real models, and the
decode-step model with the constants of the machine's class (`profiles/estimate`; docs/PLAN.md has its errors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pocketmoe.profiles.catalogue.devices import Device
from pocketmoe.profiles.estimate import classes
from pocketmoe.profiles.estimate.classes import DISK_UNCERTAINTY, Machine, Moved, uncertainty
from pocketmoe.profiles.estimate.footprint import Caches, Footprint
from pocketmoe.profiles.estimate.hit_curve import HitCurve
from pocketmoe.profiles.estimate.measured import step_costs
from pocketmoe.profiles.estimate.roofline import distinct_experts
from pocketmoe.profiles.estimate.step import Step, decode_step, visits_at
from pocketmoe.profiles.plan.making import Making

if TYPE_CHECKING:
    from pocketmoe.profiles.machine.doctor import DoctorReport

Verdict = Literal["fast", "good", "usable", "slow"]
VERDICTS: tuple[tuple[float, Verdict], ...] = ((15, "fast"), (8, "good"), (3, "usable"), (0, "slow"))  # bigrig's words
VERDICT_WORDS = "fast from 15 tokens/s on, good from 8, usable from 3, slow below"
UNQUANTIZED = "fp32"
AIMS = (8.0, 3.0)  # tokens/s, where no target is given: the first that something reaches
_SHARES = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
_SLOT_S = 0.003  # making a slot when it is first filled (docs/LOG.md: 2 to 4 ms)
_RESERVE_SHARE, _RESERVE_BYTES = 0.15, 800_000_000  # for the system and others
_CACHES_MATTER = 0.05  # of the least budget: caches that take less are not worth rounding to int8


@dataclass(frozen=True)
class Speed:
    """Predicted at a share of the experts in memory."""

    hit_rate: float
    hit_rate_low: float
    hit_rate_high: float
    tokens_per_s: float
    tokens_per_s_low: float
    tokens_per_s_high: float
    ttft_s: float  # from a cold start
    ttft_s_low: float
    ttft_s_high: float
    ttft_warm_s: float  # of the next prompt
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
    kv: Caches = "float32"
    packed_bytes: int = 0  # on disk beside the bundle, from the first run on, unless `pack --in-place` packed it


@dataclass(frozen=True)
class Remedy:
    """What would reach the target (or run at all): each by itself, with all else as it is; None where nothing would.

    Memory is the machine's, with what the system keeps.
    """

    scheme: str
    memory_bytes: int | None
    disk_bytes_per_s: float | None
    most_tokens_per_s: float  # with all experts in memory
    wanted_tokens_per_s: float
    all_memory_bytes: int = 0  # for that
    least_memory_bytes: int = 0  # to run at all, in the scheme that takes the least
    least_tokens_per_s: float = 0.0  # then
    kv: Caches = "float32"


@dataclass(frozen=True)
class Advice:
    """Candidates that fit, each the best in one way; None where none is. Weights as they were trained never count.

    `best_quality`: the scheme of most bits that reaches the target, in the memory beyond which it gains no 5%.
    """

    fastest: Candidate | None
    best_quality: Candidate | None
    least_memory: Candidate | None  # that reaches the target
    aimed_tokens_per_s: float = 0.0  # the target, or what stood for it


@dataclass(frozen=True)
class PlanReport:
    """The fields of `plan --json`."""

    model: str
    architecture: str
    counted_from: str
    parameters: int
    active_parameters: int  # that a token is multiplied with
    moe_layers: int
    experts: int
    experts_per_token: int
    context_tokens: int
    asked_context_tokens: int  # more than `context_tokens` where the model has less
    prompt_tokens: int
    sequences: int  # texts at once; speeds are those of one
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
    advice: Advice
    remedy: Remedy | None
    predicted: bool = True
    asked_prompt_tokens: int = 0  # more than `prompt_tokens` where the context has less
    measured_on: str = ""  # what all `quality` is of
    making: Making | None = None  # None for a bundle
    device_disk_free_bytes: int | None = None  # where it is this one
    loaded: bool = False  # others were at work while this machine was measured
    expert_parameters: int = 0  # of one expert


def verdict_of(tokens_per_s: float) -> Verdict:
    """fast from 15 tokens/s on, good from 8, usable from 3."""
    return next(word for least, word in VERDICTS if tokens_per_s >= least)


def machine_of_device(name: str, device: Device, reserve_bytes: float | None = None) -> Machine:
    """A device of devices.toml."""
    memory = device.memory_bytes.value
    return classes.machine_of_device(name, device, memory - _reserve(memory, reserve_bytes))


def machine_here(
    report: DoctorReport,
    sgemm_flops_per_s: float,
    threads: int,
    reserve_bytes: float | None = None,
    disk_free_bytes: float | None = None,
) -> Machine:
    """This machine, measured. Its int8 peak, by which prompts go, is that of a float32 product, by its class."""
    memory = report.memory
    limit = memory.cgroup_limit_bytes or memory.total_bytes
    ram = max(report.ram.one_thread_bytes_per_s, report.ram.all_threads_bytes_per_s)
    reads = report.disk.reads if report.disk else ()
    instructions = classes.instructions_of(report.cpu.features, report.cpu.architecture)
    rates = classes.rates(reads) or ((float(1 << 20), 1e8),)
    where = "measured" if report.disk else f"the disk could not be measured ({report.disk_problem}): 100 MB/s assumed"
    return Machine(
        name="this",
        title=f"{report.cpu.model}, {report.cpu.cores} cores",
        memory_bytes=memory.total_bytes,
        usable_bytes=limit - _reserve(limit, reserve_bytes),
        memory_bytes_per_s=ram,
        int8_ops_per_s=sgemm_flops_per_s * classes.INT8_PER_FLOAT32[instructions],
        instructions=instructions,
        disk=rates,
        disk_alone=classes.rates(reads, 1),
        measured=True,
        computing=report.computing,
        threads=threads,
        cores=min(float(threads), report.cpu.quota_cores or threads),
        disk_free_bytes=disk_free_bytes,
        basis=f"{where}: {ram / 1e9:.0f} GB/s of memory, {rates[-1][1] / 1e9:.2g} GB/s of disk at "
        f"{rates[-1][0] / 1024:.0f} KiB, {_about_computing(report, threads)}",
    )


def _about_computing(report: DoctorReport, threads: int) -> str:
    """What computing is predicted by."""
    if report.computing is None:
        return f"computing by its class of processor ({report.computing_problem})"
    return f"this runtime's own kernels on {threads} thread{'s' * (threads > 1)}"


def _reserve(memory: float, given: float | None) -> float:
    return max(_RESERVE_BYTES, _RESERVE_SHARE * memory) if given is None else given


def predict(footprint: Footprint, share: float, hits: HitCurve, machine: Machine, prompt_tokens: int) -> Speed:
    """A decode step after the prompt with a share of the experts in memory, and the prompt itself, cold and warm."""
    hit, (hit_low, hit_high) = hits.at(share), hits.range_at(share)
    middle = _step(footprint, hit, machine, prompt_tokens)
    spread = uncertainty(machine)
    low = _step(footprint, hit_low, machine, prompt_tokens, spread, DISK_UNCERTAINTY)
    high = _step(footprint, hit_high, machine, prompt_tokens, 1 / spread, 1 / DISK_UNCERTAINTY)
    touched = footprint.moe_layers * distinct_experts(footprint.experts, footprint.top_k, prompt_tokens)
    slots = min(touched, share * footprint.moe_layers * footprint.experts)
    read_s = touched * footprint.expert_bytes / machine.disk_bytes_per_s(footprint.expert_bytes)
    parameters = footprint.dense_parameters + footprint.active_expert_parameters
    moving_s = moved(footprint).dense_bytes / machine.memory_bytes_per_s
    prompt_s = max(moving_s, classes.prompt_s(machine, parameters, prompt_tokens))
    cold_s = read_s + slots * _SLOT_S + prompt_s
    return Speed(
        hit_rate=hit,
        hit_rate_low=hit_low,
        hit_rate_high=hit_high,
        tokens_per_s=middle.tokens_per_s,
        tokens_per_s_low=low.tokens_per_s,
        tokens_per_s_high=high.tokens_per_s,
        ttft_s=cold_s,
        ttft_s_low=cold_s / max(spread, DISK_UNCERTAINTY),
        ttft_s_high=cold_s * max(spread, DISK_UNCERTAINTY),
        ttft_warm_s=(1 - share) * read_s + prompt_s,
        read_bytes_per_token=middle.misses * footprint.expert_bytes,
        bound_by="disk" if middle.waiting_s > middle.compute.total_s else "computing",
    )


def moved(footprint: Footprint, cached_tokens: int = 0) -> Moved:
    """What a token moves over a text of `cached_tokens`."""
    each = footprint.active_expert_parameters / (footprint.moe_layers * footprint.top_k)
    dense_bits = 8 * footprint.dense_bytes / max(1, footprint.dense_parameters)
    head = footprint.vocab_size * footprint.hidden_size * dense_bits / 8
    return Moved(
        layers=footprint.moe_layers,
        top_k=footprint.top_k,
        dense_bytes=footprint.dense_bytes,
        head_bytes=min(head, footprint.dense_bytes),
        dense_bits=dense_bits,
        expert_bytes=footprint.expert_bytes,
        expert_bits=8 * footprint.expert_bytes / each,
        read_bytes=footprint.expert_bytes,
        kv_bytes=cached_tokens * footprint.state_bytes_per_token,
        float4=footprint.float4,
    )


def _step(
    footprint: Footprint, hit: float, machine: Machine, cached_tokens: int, slower: float = 1, disk: float = 1
) -> Step:
    work = moved(footprint, cached_tokens)
    costs = step_costs(machine, work).scaled(slower, disk)
    return decode_step(work.work, costs, visits_at(hit, footprint.top_k))


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
        kv=footprint.kv,
        packed_bytes=footprint.packed_bytes,
    )


def with_int8_caches(footprints: Sequence[Footprint], context: int) -> list[Footprint]:
    """Each, and after it itself with int8 caches, where these take much of what it needs at least."""
    found: list[Footprint] = []
    for footprint in footprints:
        found.append(footprint)
        much = footprint.cache_bytes(context) > _CACHES_MATTER * footprint.least_bytes(context)
        if much and footprint.kv == "float32" and footprint.scheme != UNQUANTIZED:
            found.append(footprint.with_int8_caches())
    return found
