"""Fits a model into a memory budget: what is fixed, and how many expert slots the rest pays for.

The fixed part is reckoned before anything is loaded, from the manifest and from what the process takes already, so that
a budget too small is refused instead of overrun. Each figure is an upper bound; tests hold the sum to what is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pocketmoe.bundle.manifest import DenseTensor
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import PAGE, ExpertId, Record, padded
from pocketmoe.errors import BudgetTooSmall
from pocketmoe.runtime.backends.protocol import Backend
from pocketmoe.runtime.engine.kv_cache import kept_bytes, state_bytes
from pocketmoe.runtime.memory.budget import Budget, available_bytes, machine_bytes, process_bytes
from pocketmoe.runtime.memory.ceiling import stack_bytes
from pocketmoe.runtime.paging.workers import worthwhile_threads
from pocketmoe.sizes import parse_share, parse_size

_MB = 10**6
_UNFORESEEN = 4 * _MB  # page tables of the kernel's, allocator slack, threads' stacks
_ONNXRUNTIME = 18 * _MB  # its code and tables that the first session and the first run touch; 14 MB and 4.5 MB measured
_SESSION = 700_000  # a segment's session beyond its weights, measured on onnxruntime 1.32
_SLOT_OVERHEAD = 192 * 1024  # a slot's session and the rounding to pages
_SLOT_SCRATCH = 2 * 3  # expert records; what making slots, one in each reader, holds for a moment
_PACK_SCRATCH = 2 * 8  # expert records; what packing, two at a time, and the self-test hold for a moment
_LEAST_SLOTS = 2  # one computes while the other is filled
_MOST_CHUNKS = 8  # beyond, reading is a small part of a prompt's time
LOADING = "loading"
_RUNNING = ("activations", "slot scratch")
_DEFAULT_SHARE = 0.8  # of the memory that is free, where no budget is given


@dataclass(frozen=True)
class MemoryRequest:
    """What the user asked for: bytes for the whole process, or a share of the expert bytes on top of the fixed part."""

    total_bytes: int | None = None
    expert_share: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> MemoryRequest:
        """`800MB`, `1.5GiB`, `40%`, or None for what is free. Raises ValueError."""
        if text is None:
            return cls()
        share = parse_share(text)
        return cls(expert_share=share) if share is not None else cls(total_bytes=parse_size(text))


@dataclass(frozen=True)
class Load:
    """What a run will ask of memory."""

    capacity: int  # tokens in the states
    chunk: int  # tokens that walk the layers together
    keeps_states: bool = False  # a second copy of states that do not grow, for texts that begin alike


def claim_fixed(budget: Budget, bundle: Bundle, load: Load) -> None:
    """Promise memory to everything but the experts.

    `LOADING` is what only loading takes: packing and the self-test first, then the plain bytes of the dense weight
    that is being packed. It is to be released before there are slots.
    """
    manifest = bundle.manifest
    budget.claim("process", process_bytes() + _UNFORESEEN)
    budget.claim("onnxruntime", _ONNXRUNTIME)
    graphs = sum(manifest.files[segment.graph].nbytes for segment in manifest.segments)
    budget.claim("dense weights", _dense_bytes(bundle, load) + 2 * graphs + _SESSION * len(manifest.segments))
    budget.claim("states", state_bytes(manifest.states, load.capacity))
    if load.keeps_states:
        budget.claim("kept states", kept_bytes(manifest.states))
    budget.claim("activations", _activation_bytes(bundle, load))
    largest = max(kind.nbytes for kind in manifest.expert_kinds)
    budget.claim("slot scratch", _SLOT_SCRATCH * largest)
    budget.claim(LOADING, max(_PACK_SCRATCH * largest, max((t.nbytes for t in _resident(bundle)), default=0)))


def _resident(bundle: Bundle) -> list[DenseTensor]:
    """Dense tensors that are in memory as a whole.

    An embedding of its own is not: it stays a mapped file, of which each token touches a row.
    """
    dense = bundle.manifest.dense
    tied = not any(tensor.role == "head" for tensor in dense)
    return [tensor for tensor in dense if tied or tensor.role != "embedding"]


def _dense_bytes(bundle: Bundle, load: Load) -> int:
    """Resident weights once, in place or packed, which for int4 takes a little more; the rows of the embedding."""
    resident = _resident(bundle)
    mapped = [tensor.nbytes for tensor in bundle.manifest.dense if tensor not in resident]
    rows = sum(min(nbytes, 2 * PAGE * load.capacity) for nbytes in mapped)
    return int(1.1 * sum(tensor.nbytes for tensor in resident)) + rows


def _activation_bytes(bundle: Bundle, load: Load) -> int:
    """Values between operators at their widest: hidden rows, expert outputs, attention scores, one row of logits."""
    manifest = bundle.manifest
    model = manifest.model
    rows = min(load.chunk, load.capacity)
    top_k = max((layer.top_k for layer in manifest.moe_layers), default=0)
    hidden = rows * model.hidden_size * (24 + 3 * top_k)
    scores = 3 * rows * load.capacity * (model.attention_heads + 4)
    return 4 * (hidden + scores + 6 * model.vocab_size)


def fit_walk(budget: Budget, request: MemoryRequest, bundle: Bundle, load: Load) -> int:
    """How many chunks of a prompt walk the layers together, so that an expert is read once for all; claims the memory.

    As many as the text has, at most `_MOST_CHUNKS`, for a tenth of what is left or asked for the experts.
    """
    model = bundle.manifest.model
    top_k = max((layer.top_k for layer in bundle.manifest.moe_layers), default=0)
    one_more = 4 * load.chunk * model.hidden_size * (top_k + 8)  # experts' outputs; values between segments
    room = budget.remaining_bytes
    if request.expert_share is not None:
        experts = sum(layer.n_experts for layer in bundle.manifest.moe_layers)
        room = int(request.expert_share * experts * max(kind.nbytes for kind in bundle.manifest.expert_kinds))
    wanted = min(_MOST_CHUNKS, -(-load.capacity // load.chunk))
    more = max(0, min(wanted - 1, room // 10 // one_more))
    budget.claim("walk", more * one_more)
    if request.expert_share is not None:
        budget.total_bytes += more * one_more
    return 1 + more


def experts_by_kind(records: Mapping[ExpertId, Record]) -> dict[int, Counter[int]]:
    """For each expert kind, how many experts of it each layer has."""
    counts: dict[int, Counter[int]] = {}
    for record in records.values():
        counts.setdefault(record.kind, Counter())[record.layer] += 1
    return counts


def open_budget(request: MemoryRequest, bundle: Bundle, load: Load) -> Budget:
    """The budget of the process with its fixed part claimed; what a share of the experts comes to, `fit_slots` adds.

    Raises BudgetTooSmall when the least number of slots does not fit; that least depends on the bundle and the load
    alone, not on what has been packed or loaded before.
    """
    budget = Budget(0)
    claim_fixed(budget, bundle, load)
    if request.expert_share is not None:
        budget.total_bytes = budget.claimed_bytes
        if budget.total_bytes > machine_bytes():  # which no share could be told
            raise BudgetTooSmall(machine_bytes(), budget.total_bytes)
        return budget
    budget.total_bytes = (
        process_bytes() + int(_DEFAULT_SHARE * available_bytes())
        if request.total_bytes is None
        else request.total_bytes
    )
    slots = sum(_LEAST_SLOTS * slot_bound(kind.nbytes) for kind in bundle.manifest.expert_kinds)
    claims = budget.claims
    running = slots + sum(claims[name] for name in _RUNNING)  # loading is over by then
    always = budget.claimed_bytes - claims[LOADING] - sum(claims[name] for name in _RUNNING)
    budget.require(always + max(claims[LOADING], running))
    return budget


def loading_bytes(budget: Budget, bundle: Bundle, threads: int) -> int:
    """What this process may come to reserve while a bundle is loaded, for `ceiling`.

    All that is promised; the dense weights, which each segment that reads them maps, twice where two do; the stacks of
    the sessions' own threads.
    """
    manifest = bundle.manifest
    dense = sum(tensor.nbytes for tensor in manifest.dense)
    sessions = len(manifest.segments) + sum(1 for layer in manifest.moe_layers if layer.router)
    helpers = worthwhile_threads(threads, dense // len(manifest.segments)) - 1
    return budget.claimed_bytes - budget.claims["process"] + 2 * dense + stack_bytes(helpers * sessions)


def slot_room(budget: Budget, request: MemoryRequest, records: Mapping[ExpertId, Record]) -> int:
    """About what slots may take, in bytes, before it is known what one of them costs."""
    if request.expert_share is None:
        return max(0, budget.remaining_bytes)
    return int(request.expert_share * sum(record.nbytes for record in records.values()))


def slot_bound(record_bytes: int) -> int:
    """What one slot takes at most, whatever the backend: a session's own record, its packed copy, its bookkeeping."""
    return padded(record_bytes * 5 // 2) + _SLOT_OVERHEAD


def fit_slots(
    budget: Budget, request: MemoryRequest, backend: Backend, counts: Mapping[int, Mapping[int, int]]
) -> dict[int, int]:
    """How many slots each expert kind gets, the same share of each kind: what was asked for, or what remains pays for.

    Claims them, and never more than the backend has shared memory for. A share of 40% means room for 40% of the
    experts, with what their slots cost beyond the weights.
    """
    experts = {kind: sum(layers.values()) for kind, layers in counts.items()}
    size = {kind: backend.slot_bytes(kind) for kind in counts}
    share = request.expert_share
    if share is None:
        share = budget.remaining_bytes / sum(experts[kind] * size[kind] for kind in counts)
    mapped = sum(experts[kind] * backend.mapped_bytes(kind) for kind in counts)
    if mapped:
        share = min(share, backend.room_bytes() / mapped)
    slots = {kind: min(experts[kind], max(_LEAST_SLOTS, int(share * experts[kind]))) for kind in counts}
    cost = sum(slots[kind] * size[kind] for kind in counts)
    if request.expert_share is not None:
        budget.total_bytes += cost
    budget.claim("expert slots", cost)
    return slots
