"""What a decode step costs on a machine that was not profiled: its figures, and constants of its class (`speed.toml`).

Weights are fetched from memory and then computed with, and the two add up, since the kernels fetch no weights ahead:

    bytes per second = 1 / (1 / (memory_share * memory) + 1 / (share of the int8 peak, in bytes of that format))
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import msgspec

from pocketmoe.profiles.catalogue.devices import Device, Instructions, rate_at
from pocketmoe.profiles.catalogue.sourced_value import Figure, read_toml
from pocketmoe.profiles.estimate.step import Compute, Costs, Slowing, Work
from pocketmoe.profiles.profile import Computing, Profile
from pocketmoe.profiles.profile import Machine as ProfiledMachine

_DATA = Path(__file__).with_name("speed.toml")
STREAM_SHARE = 0.67
"""Of the bus's peak, what processors stream from memory."""
# int8 operations of the peak for each byte that cores load: an A78 loads 3 bytes a cycle, so that slow cores leave a
# wide bus idle.
_OPERATIONS_PER_BYTE = 20
_CYCLES_PER_S = 3e9  # of a core that nothing more is known of
_OPERATIONS_PER_CYCLE: Mapping[Instructions, float] = {  # int8, of a core; as the peaks of devices.toml are reckoned
    "avx2": 43,
    "avx512_vnni": 128,
    "amx": 256,
    "neon_dotprod": 64,
}
INT8_PER_FLOAT32: Mapping[Instructions, float] = {"avx2": 1.35, "avx512_vnni": 4, "amx": 4, "neon_dotprod": 4}
"""Int8 operations for each float32 operation of the peak."""
_FLOAT32_SHARE = 0.1  # of the int8 peak, in weights a second: a quarter as many fit a register, and kernels reach less
_KV_EFFICIENCY = 0.25  # of memory's bandwidth: caches are read in short rows
_NO_READ_S = 1e-6
_TESTED, _LOOKED_UP, _UNTESTED = 1.15, 1.3, 1.4  # factors between predicted and true: docs/PLAN.md
DISK_UNCERTAINTY = 1.4  # disks change by that within minutes (docs/LOG.md)
_HANDED_OVER_BYTES = 1_000_000  # a layer of smaller experts is computed by one thread, as the runtime does


class _Read(Protocol):
    """Reads of one size, by a profile or a doctor."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def bytes_per_s(self) -> float: ...


class SpeedClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Constants of `speed.toml`, which explains them."""

    tested: bool
    memory_share: Figure
    int8_share: Figure
    int4_share: Figure
    float4_share: Figure
    layer_s: Figure
    hand_over_s: Figure
    after_waits: Figure
    prompt_share: Figure


@dataclass(frozen=True)
class Machine:
    """What a prediction needs to know. `disk`: (read size, bytes per second), ascending."""

    name: str
    title: str
    memory_bytes: float
    usable_bytes: float  # for the process
    memory_bytes_per_s: float  # as a processor streams it
    int8_ops_per_s: float
    instructions: Instructions
    disk: tuple[tuple[float, float], ...]
    basis: str
    note: str = ""
    measured: bool = False  # rather than looked up
    disk_free_bytes: float | None = None  # where that is known
    computing: Computing | None = None  # measured; None: what its class takes
    disk_alone: tuple[tuple[float, float], ...] = ()  # with one read under way; `disk`: as many as are best
    threads: int = 1  # as the runtime would have it; of interest where `computing` is measured
    cores: float = 1.0  # whose time a CPU quota allows, at most `threads`
    loaded: bool = False  # others were at work while it was measured

    def disk_bytes_per_s(self, read_bytes: float) -> float:
        return rate_at(self.disk, read_bytes)

    def reads_s(self, read_bytes: float) -> tuple[float, float]:
        """Seconds of a read with nothing else under way, and of each more."""
        more_s = read_bytes / self.disk_bytes_per_s(read_bytes) if read_bytes else _NO_READ_S
        if not (self.disk_alone and read_bytes):
            return more_s, more_s
        return max(more_s, read_bytes / rate_at(self.disk_alone, read_bytes)), more_s

    def with_disk(self, bytes_per_s: float) -> Machine:
        """The same with a disk that is no faster, whatever the size of a read."""
        return replace(
            self,
            disk=tuple((size, min(rate, bytes_per_s)) for size, rate in self.disk),
            disk_alone=tuple((size, min(rate, bytes_per_s)) for size, rate in self.disk_alone),
        )

    @property
    def speed_class(self) -> SpeedClass:
        return speed_classes()[self.instructions]


@dataclass(frozen=True)
class Moved:
    """What a token moves. Bits are of a weight, scales included."""

    layers: int  # with experts
    top_k: int
    dense_bytes: float
    head_bytes: float  # of these, the head's
    dense_bits: float
    expert_bytes: float  # of one, as it is computed with
    expert_bits: float
    read_bytes: float  # of one, as it is read from disk
    kv_bytes: float = 0.0  # keys and values of the text so far
    float4: bool = False  # experts are four-bit floats

    @property
    def active_expert_bytes(self) -> float:
        return self.layers * self.top_k * self.expert_bytes

    @property
    def work(self) -> Work:
        return Work(self.layers, self.top_k, self.head_bytes / self.dense_bytes if self.dense_bytes else 0.0)


@cache
def speed_classes() -> Mapping[Instructions, SpeedClass]:
    """By instruction set."""
    return read_toml(_DATA, dict[Instructions, SpeedClass])


def instructions_of(features: Collection[str], architecture: str = "") -> Instructions:
    """The class of a processor from its features."""
    have = {*features}
    if {"asimddp", "dotprod"} & have or architecture in ("aarch64", "arm64"):
        return "neon_dotprod"
    if "amx_int8" in have:
        return "amx"
    return "avx512_vnni" if {"avx_vnni", "avx512_vnni"} & have else "avx2"


def nominal_int8_ops_per_s(instructions: Instructions, cores: float) -> float:
    """The peak of so many cores at a usual clock."""
    return cores * _CYCLES_PER_S * _OPERATIONS_PER_CYCLE[instructions]


def usual_cores(machine: Machine) -> float:
    """How many cores of a usual clock its peak is worth."""
    return machine.int8_ops_per_s / nominal_int8_ops_per_s(machine.instructions, 1)


def machine_of_device(name: str, device: Device, usable_bytes: float) -> Machine:
    """A device of devices.toml."""
    disk = ", ".join(f"{rate.bytes_per_s / 1e9:.2g} GB/s at {rate.read_bytes / 1024:.0f} KiB" for rate in device.disk)
    return Machine(
        name=name,
        title=device.title,
        memory_bytes=device.memory_bytes.value,
        usable_bytes=usable_bytes,
        memory_bytes_per_s=streamed(device),
        int8_ops_per_s=device.int8_ops_per_s.value,
        instructions=device.instructions,
        disk=tuple((rate.read_bytes, rate.bytes_per_s) for rate in device.disk),
        basis=f"devices.toml: {device.memory_bandwidth_bytes_per_s.value / 1e9:.0f} GB/s of memory, {device.disk_name} "
        f"with {disk}",
        note=device.note,
    )


def streamed(device: Device) -> float:
    """Bytes per second that its processor gets from memory."""
    bus = STREAM_SHARE * device.memory_bandwidth_bytes_per_s.value
    return min(bus, device.int8_ops_per_s.value / _OPERATIONS_PER_BYTE)


def machine_of_profile(profile: Profile) -> Machine:
    """Where a profile was measured, as far as a class knows it."""
    there: ProfiledMachine = profile.machine
    instructions = instructions_of(there.features, there.architecture)
    threads = min(there.cores, profile.settings.threads)
    cores = min(float(threads), there.quota_cores or there.cores)
    streamed_by = there.ram_one_thread_bytes_per_s if threads == 1 else there.ram_bytes_per_s
    streamed_by *= min(1.0, cores / threads)  # measured in bursts, which a quota lets through
    return Machine(
        name="profiled",
        title=there.cpu,
        memory_bytes=there.memory_bytes,
        usable_bytes=there.memory_bytes,
        memory_bytes_per_s=streamed_by,
        int8_ops_per_s=nominal_int8_ops_per_s(instructions, cores),
        instructions=instructions,
        disk=rates(there.disk) or ((1 << 20, 1e8),),
        disk_alone=rates(there.disk, 1),
        basis="measured",
        measured=True,
        computing=there.computing,
        threads=profile.settings.threads,
        cores=cores,
    )


def rates(reads: Sequence[_Read], in_flight: int | None = None) -> tuple[tuple[float, float], ...]:
    """Bytes per second by read size, with that many reads under way, else with as many as are best."""
    best: dict[int, float] = {}
    for read in reads:
        if in_flight in (None, read.in_flight):
            best[read.block_bytes] = max(read.bytes_per_s, best.get(read.block_bytes, 0.0))
    return tuple(sorted((float(size), rate) for size, rate in best.items()))


def weights_bytes_per_s(machine: Machine, bits: float, float4: bool = False) -> float:
    """Bytes of weights of that format that one token's products get through in a second."""
    known = machine.speed_class
    four = known.float4_share if float4 else known.int4_share
    share = _FLOAT32_SHARE if bits > 16 else known.int8_share.value if bits > 6 else four.value
    computed = machine.int8_ops_per_s / 2 * share * bits / 8
    return 1 / (1 / (known.memory_share.value * machine.memory_bytes_per_s) + 1 / computed)


def class_costs(machine: Machine, moved: Moved) -> Costs:
    """Costs of a step by the constants of the machine's class; nothing is prefetched."""
    known = machine.speed_class
    attention_s = moved.kv_bytes / (_KV_EFFICIENCY * machine.memory_bytes_per_s)
    many = moved.top_k * moved.expert_bytes > _HANDED_OVER_BYTES
    hand_over_s = known.hand_over_s.value if many else 0.0
    steady = Compute(
        segments_s=moved.dense_bytes / weights_bytes_per_s(machine, moved.dense_bits) + attention_s,
        experts_s=moved.active_expert_bytes / weights_bytes_per_s(machine, moved.expert_bits, moved.float4),
        python_s=moved.layers * (known.layer_s.value + hand_over_s),
    )
    slower = known.after_waits.value
    read_one_s, read_more_s = machine.reads_s(moved.read_bytes)
    return Costs(
        steady=steady,
        after_waits=steady.scaled(slower),
        most=Slowing(1.0, 1.0),
        read_one_s=read_one_s,
        read_more_s=read_more_s,
        prefetch_precision=0.0,
    )


def uncertainty(machine: Machine) -> float:
    """The factor by which computing may be faster or slower: see docs/PLAN.md for the errors that it stands on."""
    if machine.computing is not None and not machine.loaded:
        return max(_TESTED, math.sqrt(machine.computing.spread))  # either way from the mean
    if not machine.speed_class.tested:
        return _UNTESTED
    return _TESTED if machine.measured else _LOOKED_UP


def prompt_s(machine: Machine, parameters: float, tokens: int) -> float:
    """Seconds of computing a prompt, whose tokens share each weight that is fetched."""
    return 2 * parameters * tokens / (machine.speed_class.prompt_share.value * machine.int8_ops_per_s)
