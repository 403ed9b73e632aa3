"""This machine as PocketMoE sees it: what it has, how fast it reads, whether expert slots work, what that means."""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.errors import OutputError, printable
from pocketmoe.profiles.machine.bandwidth import Disk, Ram, measure_disk, measure_ram
from pocketmoe.profiles.machine.computing import measure_computing
from pocketmoe.profiles.machine.load import LoadMeter, OthersLoad, quietest, quota_cores
from pocketmoe.profiles.profile import Computing
from pocketmoe.runtime.backends.probe import probe_slots
from pocketmoe.runtime.backends.slots import SHARED_MEMORY
from pocketmoe.runtime.memory.budget import memory_cgroups
from pocketmoe.runtime.memory.limits import Limits, read_limits
from pocketmoe.sizes import in_words
from pocketmoe.system.cpus import cpuinfo, usable_cpus
from pocketmoe.system.limits import limit_of
from pocketmoe.system.memory import MachineMemory, machine_memory

# What ONNX Runtime's CPU kernels ask for (MLAS: platform.cpp), by the flags the kernel lists; all of a row are needed.
_FEATURES: Mapping[str, tuple[str, ...]] = {
    "avx2": ("avx2", "fma"),
    "avx_vnni": ("avx_vnni",),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_int8": ("amx_tile", "amx_int8"),
    "amx_bf16": ("amx_tile", "amx_bf16"),
    "neon": ("asimd",),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "bf16": ("bf16",),
    "sve": ("sve",),
    "sve2": ("sve2",),
    "sme": ("sme",),
}
_LEAST_FEATURE = {"x86_64": "avx2", "aarch64": "dotprod"}  # without it int4 kernels run scalar or nearly so

# OLMoE-1B-7B in int4: 8 experts of 3.5 MB in each of 16 layers, 0.23 GB of dense weights, 63% hits at 25% in memory.
_REFERENCE_MODEL = "OLMoE-1B-7B in int4"
_REFERENCE_MODEL_MISSED_BYTES = 166e6  # read from disk for a token with a quarter of the experts in memory
_REFERENCE_MODEL_TOKEN_BYTES = 0.68e9  # read from memory for a token
TRIES = 2  # of measuring, while others are at work
_MANY_EXPERTS = 15_000  # DeepSeek-V3 has 58 layers of 256
_WEIGHTS = 3  # of an expert: gate, up, down
_SLOW_DISK = 500e6  # bytes per second
_CHANGING_PACE, _CHANGING_DISK = 1.25, 1.4  # beyond which it is said
_SMALL_SHARED = 0.4  # of available memory


@dataclass(frozen=True)
class Cpu:
    """`cores` this process may use; `features` that ONNX Runtime's kernels make use of."""

    model: str
    architecture: str
    features: tuple[str, ...]
    cores: int
    quota_cores: float | None = None  # whose time a cgroup's quota allows


@dataclass(frozen=True)
class Memory:
    """In bytes; a limit is None where there is none."""

    total_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None
    lock_limit_bytes: int | None  # RLIMIT_MEMLOCK
    shared_total_bytes: int  # of the file system in memory where slots live; 0 where there is none
    shared_free_bytes: int


@dataclass(frozen=True)
class Software:
    """Versions, and what ONNX Runtime can run on."""

    python: str
    onnxruntime: str
    numpy: str
    providers: tuple[str, ...]


@dataclass(frozen=True)
class DoctorReport:
    """Everything `doctor` found. `disk` is None, with the reason, where it could not be measured."""

    cpu: Cpu
    memory: Memory
    software: Software
    ram: Ram
    disk: Disk | None
    disk_problem: str
    slots_work: bool
    slots_problem: str
    limits: Limits
    load: OthersLoad = field(default_factory=OthersLoad)  # while speeds were measured
    computing: Computing | None = None  # None, with the reason, where it was not measured
    computing_problem: str = ""
    tries: int = 1  # until others left the machine alone, or the quietest of so many

    @property
    def most_experts(self) -> int:
        """How many experts of three packed weights may have slots at once, by the limit of memory maps."""
        return self.limits.maps_for_slots // _WEIGHTS


def examine(
    directory: Path,
    progress: Progress = no_progress,
    tries: int = TRIES,
    meter: Callable[[], LoadMeter] = LoadMeter,
    threads: Sequence[int] = (),
) -> DoctorReport:
    """Look at this machine, in some 8 s where nobody else is at work, else up to `tries` times as long.

    `directory`: where bundles would be kept, for the speed of its disk; `meter`: what watches what others take;
    `threads`: on how many the runtime would compute, each of which is measured; none: that is left out.
    """
    cpu, memory = read_cpu(), read_memory()

    def measure() -> _Speeds:
        found = _Speeds()

        def compute() -> None:
            found.ram = measure_ram(cpu.cores)
            found.computing, found.computing_problem = _computing(threads, progress)

        try:
            found.disk = measure_disk(directory, progress, compute)
        except OutputError as problem:
            found.disk_problem = str(problem)
            compute()
        return found

    def say(load: OthersLoad) -> None:
        progress(f"{load.in_words()}: measuring again", 0, 0)

    found, load, tried = quietest(measure, tries, meter, say)
    assert found.ram is not None, "memory is measured whatever the disk does"
    slots_problem = probe_slots()
    return DoctorReport(
        cpu=cpu,
        memory=memory,
        software=_software(),
        ram=found.ram,
        load=load,
        tries=tried,
        computing=found.computing,
        computing_problem=found.computing_problem,
        disk=found.disk,
        disk_problem=found.disk_problem,
        slots_work=not slots_problem,
        slots_problem=slots_problem,
        limits=read_limits(),
    )


@dataclass
class _Speeds:
    """What is measured together."""

    disk: Disk | None = None
    disk_problem: str = ""
    ram: Ram | None = None
    computing: Computing | None = None
    computing_problem: str = ""


def _computing(threads: Sequence[int], progress: Progress) -> tuple[Computing | None, str]:
    """Measured, or why not: what is too small, or has no slots, cannot be told by its own kernels."""
    if not threads:
        return None, "it was not asked for"
    try:
        return measure_computing((1, *threads), progress), ""
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common class, and a doctor survives all
        return None, printable(str(error), "")[:200] or type(error).__name__


def read_cpu() -> Cpu:
    """What the kernel says of the CPU."""
    model, features = parse_cpuinfo(cpuinfo())
    with contextlib.suppress(OSError):  # boards name themselves, their ARM cores do not
        model = model or Path("/proc/device-tree/model").read_text(errors="replace").rstrip("\0")
    return Cpu(model or "unknown", platform.machine(), features, len(usable_cpus()), quota_cores())


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name, "" where it is not given, and features, from the text of /proc/cpuinfo.

    On cores of several kinds a feature counts when all of them have it.
    """
    model, flags = "", None
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name":
            model = model or value
        elif name in ("flags", "Features"):
            flags = {*value.split()} if flags is None else flags & {*value.split()}
    return model, tuple(label for label, needed in _FEATURES.items() if {*needed} <= (flags or set()))


def read_memory() -> Memory:
    """Memory of the machine, and what limits this process."""
    memory = machine_memory() or MachineMemory(0, 0, 0)
    limit = min((group.limit_bytes for group in memory_cgroups()), default=memory.total)
    shared_total = shared_free = 0
    with contextlib.suppress(OSError):
        shared_total, _, shared_free = shutil.disk_usage(SHARED_MEMORY)
    return Memory(
        total_bytes=memory.total,
        available_bytes=memory.available,
        cgroup_limit_bytes=limit if limit < memory.total else None,
        lock_limit_bytes=limit_of("MEMLOCK").soft,
        shared_total_bytes=shared_total,
        shared_free_bytes=shared_free,
    )


def _software() -> Software:
    return Software(
        python=platform.python_version(),
        onnxruntime=ort.__version__,
        numpy=np.__version__,
        providers=tuple(ort.get_available_providers()),
    )


def advice(report: DoctorReport) -> list[str]:
    """What the findings mean for someone who wants to run a model here, one sentence or two per line, worst first."""
    return [
        *_load_advice(report),
        *_slot_advice(report),
        *_machine_advice(report),
        *_pace_advice(report),
        *_disk_advice(report),
        *_ram_advice(report),
    ]


def _load_advice(report: DoctorReport) -> Iterator[str]:
    if report.load.is_busy:
        words = report.load.in_words()
        best = f", in the quietest of {report.tries} tries" if report.tries > 1 else ""
        yield (
            f"{words[0].upper()}{words[1:]} while speeds were measured{best}: they are lower than this machine can do. "
            "Run it again when the machine is idle."
        )


def _slot_advice(report: DoctorReport) -> Iterator[str]:
    memory = report.memory
    if not report.slots_work:
        yield (
            f"Expert slots do not work here: {report.slots_problem}. "
            "Each expert that is read makes a new session instead, which costs 1-15 ms of CPU."
        )
    elif memory.shared_free_bytes < _SMALL_SHARED * memory.available_bytes:
        yield (
            f"Slots live in {SHARED_MEMORY}, which has only {in_words(memory.shared_free_bytes)} free: experts can "
            "take no more. Enlarge it (docker run --shm-size, mount -o remount,size=), or use --backend sessions."
        )
    if report.slots_work and report.most_experts < _MANY_EXPERTS:
        yield (
            f"Memory maps are limited to {report.limits.maps}, which is enough for slots of about "
            f"{report.most_experts} experts. Raise it for larger models: sysctl vm.max_map_count=262144."
        )


def _machine_advice(report: DoctorReport) -> Iterator[str]:
    cpu, memory = report.cpu, report.memory
    least = _LEAST_FEATURE.get(cpu.architecture)
    if least and least not in cpu.features:
        yield f"This CPU has no {least}: ONNX Runtime's int4 kernels will be slow."
    if cpu.quota_cores is not None and cpu.quota_cores < cpu.cores:
        yield (
            f"A CPU quota allows the time of {cpu.quota_cores:g} of {cpu.cores} cores: beyond it all threads stop. "
            f"Give --threads {max(1, int(cpu.quota_cores))}."
        )
    if memory.cgroup_limit_bytes is not None:
        limit = in_words(memory.cgroup_limit_bytes)
        yield f"A memory cgroup limits this process to {limit}: give --memory less than that."


def _pace_advice(report: DoctorReport) -> Iterator[str]:
    spread = report.computing.spread if report.computing else 1.0
    if spread > _CHANGING_PACE:
        yield (
            f"The same work took {spread:.1f} times as long at slow moments as at fast ones, as where a hypervisor "
            "gives others the other half of a core: speeds of answers will vary by as much."
        )


def _disk_advice(report: DoctorReport) -> Iterator[str]:
    disk = report.disk
    if disk is None:
        yield f"The disk could not be measured: {report.disk_problem}."
        return
    if not disk.direct:
        yield f"{disk.directory} takes no direct reads: experts come through the page cache, as did the figures above."
    if disk.spread > _CHANGING_DISK:
        yield (
            f"Large reads were up to {disk.spread:.1f} times as fast at one moment as seconds before or after: "
            "predictions that the disk decides are off by as much."
        )
    speed = disk.best_bytes_per_s
    bound = speed / _REFERENCE_MODEL_MISSED_BYTES
    slow = " Paging will be slow: give the bundle a faster disk or more memory." if speed < _SLOW_DISK else ""
    yield (
        f"The disk reads {in_words(speed)}/s: a bound of {bound:.1f} tokens/s for {_REFERENCE_MODEL} with a quarter of "
        f"its experts in memory (a prediction).{slow}"
    )


def _ram_advice(report: DoctorReport) -> Iterator[str]:
    speed = max(report.ram.one_thread_bytes_per_s, report.ram.all_threads_bytes_per_s)
    bound = speed / _REFERENCE_MODEL_TOKEN_BYTES
    yield (
        f"Memory reads {speed / 1e9:.0f} GB/s: a bound of {bound:.0f} tokens/s for {_REFERENCE_MODEL} with all experts "
        "in memory (a prediction)."
    )
