"""profile.json: what a profile holds, as typed records that are checked before anything is used (docs/PROFILE.md).

Fields added later carry defaults; an unknown field or another format number is refused. Nothing in it tells what a text
said: of routing it keeps how many tokens chose each expert, and how many experts each layer had to read, but never
which token chose which expert.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from pocketmoe.bundle.files import read_whole, write_whole
from pocketmoe.errors import DamagedFile

FORMAT = 1
PROFILE = "profile.json"
REPORT = "report.html"
MAX_PROFILE_BYTES = 64 << 20
_REMEDY = "Measure it again: pocketmoe profile BUNDLE -o DIR, into another directory."

Label = Literal["measured", "estimated", "unavailable"]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a profile."""


class ReadSpeed(Record, frozen=True, kw_only=True):
    """Random reads of one size."""

    block_bytes: Count
    in_flight: Count
    bytes_per_s: Positive


class Products(Record, frozen=True, kw_only=True):
    """Weights of one format through this runtime's kernels, one token at a time, on so many threads.

    Experts: eight of 3 x 2048 x 1024 weights, as a layer has them, handing them to the helpers included. Dense: one
    product after another. Caches: keys and values through attention. Near: what was used just before; far: what nothing
    has used for long.
    """

    what: Literal["experts", "dense", "caches"]
    scheme: str  # as manifests name it: int4-b64-asym
    threads: Count
    near_bytes_per_s: Positive
    far_bytes_per_s: Positive
    busy_cpus: Share  # processors that were busy meanwhile, in the mean


LONG_READ_S = 0.002
"""Of an expert: about what one of a large model takes."""


class LayerCosts(Record, frozen=True, kw_only=True):
    """What a layer takes whatever its size, in seconds: a small bundle through the whole runtime.

    Near: as its code and data are in the caches; far: as a layer's weights have displaced them.
    """

    near_segment_s: Positive  # small operators of attention, norms and router
    near_expert_s: Positive  # one expert's call
    near_python_s: Positive
    far_segment_s: Positive
    far_expert_s: Positive
    far_python_s: Positive
    miss_s: Share  # what each expert takes more that was not in memory, read at once
    long_miss_s: Share  # and more than that where each read takes `LONG_READ_S`
    long_wait_s: Share  # what a layer's small operators take more then


class Computing(Record, frozen=True, kw_only=True):
    """How fast this runtime computed on a machine, by itself."""

    products: tuple[Products, ...]
    layer: LayerCosts
    pace_s: Positive  # what some small work took meanwhile, in the mean: a virtual machine's speed changes
    spread: Share = 1.0  # and it took so many times as long at slow moments as at fast ones


class Machine(Record, frozen=True, kw_only=True):
    """Where it was measured. `disk` is empty, with the reason, where it could not be measured."""

    cpu: str
    architecture: str
    features: tuple[str, ...]
    cores: Count
    memory_bytes: Count
    ram_one_thread_bytes_per_s: Positive
    ram_bytes_per_s: Positive  # all threads together: the peak that shares of bandwidth are of
    disk: tuple[ReadSpeed, ...] = ()
    disk_direct: bool = True  # False: through the page cache, so faster than the disk
    disk_problem: str = ""
    disk_spread: Share = 1.0  # of large reads, seconds apart: so many times as fast or slow
    slots_problem: str = ""  # why expert slots do not work here; "" when they do
    system: str = ""
    software: dict[str, str] = {}
    quota_cores: Positive | None = None  # whose time a cgroup's quota allowed
    loaded: bool = False  # others were at work while memory and disk were measured
    load: str = ""  # in words
    computing: Computing | None = None  # None where it could not be measured, or was not yet


class StoredKind(Record, frozen=True, kw_only=True):
    """Experts that are stored alike: the formats of their matrices, and bytes on disk of each."""

    scheme: str
    nbytes: Count


class Model(Record, frozen=True, kw_only=True):
    """What was measured, and what a prediction needs to know of it. Tuples have an entry for each MoE layer."""

    name: str  # of the bundle's directory
    bundle_sha256: str  # the manifest's own
    source: str = ""  # where the weights come from: a directory's name or a hub id
    architecture: str
    parameters: Count
    context_length: Count
    experts: tuple[Count, ...]
    experts_per_token: tuple[Count, ...]
    expert_read_bytes: Count  # of a miss, the mean over all experts
    expert_slot_bytes: Count  # of one expert in memory, the mean over all experts
    dense_bytes: Count  # weights that every token reads: attention, shared experts, routers, head
    head_bytes: Count  # of these, the head's
    state_bytes_per_token: Count  # caches of keys and values
    schemes: dict[str, str]  # by class of tensors
    expert_kinds: tuple[StoredKind, ...] = ()
    expert_kind_of: tuple[tuple[Count, ...], ...] = ()  # places in `expert_kinds`, by layer and expert


class Memory(Record, frozen=True, kw_only=True):
    """What the process takes: `fixed_bytes` without expert slots, `loading_bytes` more before there are slots."""

    fixed_bytes: Count
    loading_bytes: Count
    least_bytes: Count  # the least budget that `run` accepts for this workload


class Workload(Record, frozen=True, kw_only=True):
    """The same at every budget. The answer is sampled at temperature 1 with `seed`, and never ends early."""

    source: Literal["seeded tokens", "text"]
    text: str = ""  # the file's name
    seed: Count = 0
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1)]
    output_tokens: Annotated[int, msgspec.Meta(ge=2)]
    prompt_sha256: str  # of the ids, int64


class Settings(Record, frozen=True, kw_only=True):
    """How it was run."""

    threads: Annotated[int, msgspec.Meta(ge=1)]
    backend: str = "auto"
    prefetch: str = "auto"


class Step(Record, frozen=True, kw_only=True):
    """Mean seconds of a decode step, and the shares of it: attention and head, experts, waiting for them, Python."""

    mean_s: Positive
    segments: float
    experts: float
    waiting: float
    python: float


class Energy(Record, frozen=True, kw_only=True):
    """Of the answer's tokens. `joules_per_token` is None where it is unavailable, and `reason` says why."""

    label: Label = "unavailable"
    source: str = ""  # RAPL package, battery, tegrastats rails ...
    joules_per_token: float | None = None
    watts: float | None = None  # mean while decoding
    reason: str = ""


class Thermal(Record, frozen=True, kw_only=True):
    """The hottest sensor, and whether the CPU's clock was throttled meanwhile. None where the machine does not tell."""

    source: str = ""
    start_celsius: float | None = None
    highest_celsius: float | None = None
    throttled: bool | None = None
    reason: str = ""


class Run(Record, frozen=True, kw_only=True):
    """One budget, in a process of its own, cold: nothing loaded, nothing known of earlier runs."""

    memory: str  # as it was asked for: least, 25%, 800MB
    memory_budget_bytes: Count
    read_bytes_per_s: float | None = None  # expert reads were slowed down to this, to test predictions
    limited_by: Literal["cgroup", "process"]  # "process": it was not limited, it kept to the budget by itself
    # Above it the kernel would have killed the process: the budget or, where that was a share, a little more.
    limit_bytes: Count | None = None
    limit_problem: str = ""  # why there was no cgroup
    peak_memory_bytes: Count  # as the process counted it
    cgroup_peak_bytes: Count | None = None  # as the kernel counted it, page cache included
    expert_slots: Count
    expert_share: Share
    start_s: Positive
    ttft_s: Positive
    prefill_tokens_per_s: Positive
    decode_tokens_per_s: Positive  # 1 / median step; where a CPU quota stopped the process, 1 / mean step
    mean_tokens_per_s: Positive  # steps / time
    step_median_s: Positive
    step_p95_s: Positive
    step: Step
    hit_rate: Share  # while decoding: resident, and not because of a prefetch
    prefetch_hit_rate: Share = msgspec.field(name="guessed_hit_rate")
    misses_per_token: Share
    prompt_reads: Count  # experts read for the prompt
    bytes_read: Count  # in all
    bytes_read_per_token: Share  # while decoding
    bytes_prefetched: Count = msgspec.field(name="bytes_guessed")
    prefetch_precision: Share = msgspec.field(name="guess_precision")  # of the predictions, read or not
    load_s: float  # mean time of one expert's read while decoding, two of them at once; 0 with no misses
    read_one_s: Positive  # as `ExpertCosts` has them, but right after this run, since disks are moody
    read_more_s: Positive
    major_faults: Count  # while decoding
    energy: Energy = Energy()
    thermal: Thermal = Thermal()
    tokens_sha256: str  # of the answer's ids: the same at every budget
    backend: str
    backend_reason: str = ""
    threads: Count
    others_cpu: Share = 0.0  # of the processors' time while decoding that others took, the hypervisor too
    throttled: Share = 0.0  # of the time, for which a CPU quota stopped the process
    others_disk_bytes_per_s: Share | None = None  # read and written by others; None where the system does not tell
    loaded: bool = False  # others took much: slower than the machine can do
    tries: Count = 1  # how often it was measured, of which this is the quietest
    pace_s: Positive | None = None  # while decoding, as `Computing` has it, but the median
    measured_at: str = ""  # ISO 8601, UTC


class CachePoint(Record, frozen=True, kw_only=True):
    """What the routing asks of so many slots, replayed through the runtime's own cache from empty, without prefetch.

    `visits_by_misses`: of the answer's visits (a token in a layer), how many had 0, 1, 2, ... experts to read.
    """

    expert_slots: Count
    expert_share: Share
    hit_rate: Share
    lru_hit_rate: Share
    belady_hit_rate: Share  # the most that any policy can have
    prompt_reads: Count
    visits_by_misses: tuple[Count, ...]


class Routing(Record, frozen=True, kw_only=True):
    """How many tokens of prompt and answer chose each expert, [layer][expert]; the cache curve, few slots first."""

    counts: tuple[tuple[Count, ...], ...] = msgspec.field(name="uses")
    entropy: float  # mean over the layers, as a share of the highest possible
    hottest_quarter: float  # share of the choices that fall on the most used quarter of the experts
    repeated: float  # share of a token's experts that the token before it chose too
    new_experts: Count  # that the answer chose and the prompt had not
    prompt_visits: Count  # walks of the prompt x layers
    prompt_experts: Count  # distinct experts in them, summed
    curve: tuple[CachePoint, ...]


class ExpertCosts(Record, frozen=True, kw_only=True):
    """What getting one expert into memory costs here, in seconds, by the runtime's own readers on the bundle's file."""

    read_one_s: Positive  # a read with nothing else under way
    read_more_s: Positive  # each read beyond the first, in a layer that misses several
    check_s: Share  # its hash, the first time a process reads it
    slot_s: Share  # making the slot for it, the first time the slot is filled


class Profile(Record, frozen=True, kw_only=True):
    """The whole of profile.json."""

    format: int = FORMAT
    machine: Machine
    model: Model
    memory: Memory
    workload: Workload
    settings: Settings
    expert: ExpertCosts
    routing: Routing | None = None  # None until the first budget has been measured
    runs: tuple[Run, ...] = ()  # least memory first
    created: str = ""

    @property
    def active_bytes(self) -> int:
        """Bytes of weights that one token computes with."""
        return self.model.dense_bytes + sum(self.model.experts_per_token) * self.model.expert_slot_bytes

    def bandwidth_share(self, run: Run) -> float:
        """S-MBU (MoE-CAP): active weights and caches of keys and values, per mean step, over the peak bandwidth.

        The caches count at the mean length of the text while decoding.
        """
        length = self.workload.prompt_tokens + self.workload.output_tokens / 2
        moved = self.active_bytes + length * self.model.state_bytes_per_token
        return moved / run.step.mean_s / self.machine.ram_bytes_per_s


def write_profile(path: Path, profile: Profile) -> None:
    """Put profile.json in place in one step; what was there stays until then. Raises OutputError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(profile), indent=1))


def is_profile(path: Path) -> bool:
    """Whether a path is a profile.json, or a directory with one, rather than a bundle."""
    return path.name == PROFILE or os.path.isfile(path / PROFILE)  # noqa: PTH113 - never raises


def read_profile(path: Path) -> Profile:
    """Read and check a profile.json, or the one in a directory. Raises BadInput or DamagedFile."""
    if path.is_dir():
        path = path / PROFILE
    data = read_whole(path, MAX_PROFILE_BYTES, "Make one: pocketmoe profile BUNDLE -o DIR.")
    try:
        found = msgspec.json.decode(data, type=_FormatOnly).format
        if found != FORMAT:
            raise DamagedFile(path, f"has format {found}, this version reads {FORMAT}", "Install a matching version.")
        profile = msgspec.json.decode(data, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedFile(path, f"cannot be read ({error})", _REMEDY) from error
    _validate(path, profile)
    return profile


class _FormatOnly(msgspec.Struct):
    format: int


def _validate(path: Path, profile: Profile) -> None:
    """Its parts agree with each other, and no text could steer a terminal. Raises DamagedFile."""
    for value in _values(msgspec.to_builtins(profile)):
        if isinstance(value, str) and not value.isprintable():
            raise DamagedFile(path, "holds control characters, which could steer a terminal", _REMEDY)
        if isinstance(value, float) and not math.isfinite(value):
            raise DamagedFile(path, "holds a number that is none", _REMEDY)
    model, routing = profile.model, profile.routing
    if not model.experts or len(model.experts) != len(model.experts_per_token) or not all(model.experts):
        raise DamagedFile(path, "does not say of every layer how many experts it has", _REMEDY)
    if not profile.runs:
        raise DamagedFile(path, "has no run", _REMEDY)
    _validate_kinds(path, model)
    if profile.machine.computing is not None:
        _validate_computing(path, profile.machine.computing)
    if routing is not None:
        visits = profile.workload.output_tokens * len(model.experts)
        if [len(row) for row in routing.counts] != [*model.experts]:
            raise DamagedFile(path, "counts other experts than the model has", _REMEDY)
        if any(sum(point.visits_by_misses) > visits for point in routing.curve) or not routing.curve:
            raise DamagedFile(path, "has a cache curve of another text", _REMEDY)


def _validate_computing(path: Path, found: Computing) -> None:
    """One thread's figures are what all predictions fall back on. Raises DamagedFile."""
    if {"experts", "dense", "caches"} - {each.what for each in found.products if each.threads == 1}:
        raise DamagedFile(path, "does not say what this runtime computed on one thread", _REMEDY)


def _validate_kinds(path: Path, model: Model) -> None:
    """Raises DamagedFile."""
    kinds = model.expert_kind_of
    if kinds and [len(row) for row in kinds] != [*model.experts]:
        raise DamagedFile(path, "tells the kind of other experts than the model has", _REMEDY)
    if any(number >= len(model.expert_kinds) for row in kinds for number in row):
        raise DamagedFile(path, "has experts of a kind that it does not describe", _REMEDY)


def _values(value: Any) -> list[Any]:
    """Every string and number in a value made of JSON's types."""
    found: list[Any] = []
    rest: list[Any] = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
        else:
            found.append(item)
    return found
