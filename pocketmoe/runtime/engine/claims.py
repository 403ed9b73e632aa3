"""The memory plan as claims on the process's one budget, in the order in which an engine is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from pocketmoe.bundle.manifest import Manifest
from pocketmoe.bundle.store import Record
from pocketmoe.errors import BudgetTooSmall
from pocketmoe.runtime.backends.protocol import Backend
from pocketmoe.runtime.engine.kv_cache import fixed_bytes, state_bytes
from pocketmoe.runtime.engine.memory_plan import (
    ID_BYTES,
    LEAST_SLOTS,
    USUAL_PROCESS_BYTES,
    FixedPart,
    Load,
    MemoryRequest,
    ModelSizes,
    bytes_per_further_chunk,
    chunks_together,
    fixed_part,
    slot_bound,
    slot_share,
    slots_by_kind,
)
from pocketmoe.runtime.memory.budget import Budget, available_bytes, machine_bytes
from pocketmoe.runtime.memory.ceiling import stack_bytes
from pocketmoe.runtime.paging.workers import worthwhile_threads
from pocketmoe.system.memory import process_bytes

LOADING = "loading"  # released before there are slots
SLOTS = "expert slots"
TEXTS = "texts kept"  # beyond those that are computed at once
_MOST_TEXTS = 16  # of these; to find a beginning, all are compared with a prompt
_DEFAULT_SHARE = 0.8  # of the memory that is free, where no budget is given


def fixed_part_here(manifest: Manifest, load: Load) -> FixedPart:
    """What everything but the experts takes in this process."""
    kept = load.sequences * (load.snapshots + load.rolls_back) * fixed_bytes(manifest.states)
    states = state_bytes(manifest.states, load.capacity, load.sequences) + kept
    process = process_bytes() or USUAL_PROCESS_BYTES  # the usual, where nobody can say what it is
    return fixed_part(ModelSizes.of(manifest), load, state_bytes=states, process_bytes=process)


def least_budget(fixed: FixedPart, expert_bytes: Iterable[int]) -> int:
    """The least budget for experts of these kinds, by their longest records.

    It depends on the bundle and the load alone, not on what has been packed or loaded before.
    """
    return fixed.least_bytes(sum(LEAST_SLOTS * slot_bound(nbytes) for nbytes in expert_bytes))


def open_budget(request: MemoryRequest, manifest: Manifest, load: Load) -> Budget:
    """The budget of the process with its fixed part claimed; what a share of the experts comes to, `fit_slots` adds.

    Raises BudgetTooSmall when the least number of slots does not fit.
    """
    fixed = fixed_part_here(manifest, load)
    budget = Budget(0)
    budget.claim("process", fixed.process - load.beside_bytes)
    if load.beside_bytes:
        budget.claim("beside the engine", load.beside_bytes)
    budget.claim("onnxruntime", fixed.onnxruntime)
    budget.claim("dense weights", fixed.dense_weights)
    budget.claim("states", fixed.states)
    budget.claim("activations", fixed.activations)
    budget.claim("slot scratch", fixed.slot_scratch)
    budget.claim(LOADING, fixed.loading)
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
    budget.require(least_budget(fixed, (kind.nbytes for kind in manifest.expert_kinds)))
    return budget


def bytes_while_loading(budget: Budget, model: ModelSizes, threads: int) -> int:
    """What this process may come to reserve while a bundle is loaded, for `ceiling`.

    All that is promised; the dense weights, which each segment that reads them maps, twice where two do; the stacks of
    the sessions' own threads.
    """
    helpers = worthwhile_threads(threads, model.dense_bytes // model.segments) - 1
    stacks = stack_bytes(helpers * (model.segments + model.routers))
    return budget.claimed_bytes - budget.claims["process"] + 2 * model.dense_bytes + stacks


def available_for_slots(budget: Budget, request: MemoryRequest, records: Iterable[Record]) -> int:
    """About what slots may take, in bytes, before it is known what one of them costs."""
    if request.expert_share is None:
        return max(0, budget.remaining_bytes)
    return int(request.expert_share * sum(record.nbytes for record in records))


def fit_chunks(budget: Budget, request: MemoryRequest, model: ModelSizes, load: Load) -> int:
    """How many chunks of a prompt go through the layers together; claims the memory of all but the first."""
    available = budget.remaining_bytes
    if request.expert_share is not None:
        available = int(request.expert_share * model.experts * max(model.expert_bytes))
    chunks = chunks_together(model, load, available)
    more = (chunks - 1) * bytes_per_further_chunk(model, load)
    budget.claim("chunks together", more)
    if request.expert_share is not None:
        budget.total_bytes += more
    return chunks


def experts_by_kind(records: Iterable[Record]) -> dict[int, Counter[int]]:
    """For each expert kind, how many experts of it each layer has."""
    counts: dict[int, Counter[int]] = {}
    for record in records:
        counts.setdefault(record.kind, Counter())[record.layer] += 1
    return counts


def fit_slots(
    budget: Budget, request: MemoryRequest, backend: Backend, counts: Mapping[int, Mapping[int, int]]
) -> dict[int, int]:
    """How many slots each expert kind gets, the same share of each kind: what was asked for, or what remains pays for.

    Claims them, and never more than the backend has shared memory for. A share of 40% means room for 40% of the
    experts, with what their slots cost beyond the weights.
    """
    experts = {kind: sum(layers.values()) for kind, layers in counts.items()}
    share = request.expert_share
    slots = _slots_of(experts, backend, budget.remaining_bytes if share is None else None, share or 0)
    cost = slots_bytes(slots, backend)
    if request.expert_share is not None:
        budget.total_bytes += cost
    budget.claim(SLOTS, cost)
    return slots


def text_bytes(manifest: Manifest, load: Load) -> int:
    """What one more text takes that is kept for what begins alike, and not computed at the same time as all others."""
    states = state_bytes(manifest.states, load.capacity, 1) - state_bytes(manifest.states, load.capacity, 0)
    copies = (load.snapshots + load.rolls_back) * fixed_bytes(manifest.states)
    return states + copies + ID_BYTES * load.capacity


def more_texts(available_bytes: int, total_bytes: int, request: MemoryRequest, each_bytes: int) -> int:
    """How many of these there are, of `available_bytes` that are left of a budget when every expert has its slot.

    Where nobody said how much may be taken, they get a tenth of it at most.
    """
    if request.total_bytes is None:
        available_bytes = min(available_bytes, total_bytes // 10)
    return min(_MOST_TEXTS, max(0, available_bytes) // each_bytes)


def refit_slots(budget: Budget, total_bytes: int, backend: Backend, experts: Mapping[int, int]) -> dict[int, int]:
    """How many slots each expert kind gets within another total, everything else as it is. Claims nothing.

    Texts that are kept beyond those that are computed give way.

    Raises BudgetTooSmall.
    """
    least = least_as_open(budget, backend, experts)
    if total_bytes < least:
        raise BudgetTooSmall(total_bytes, least)
    return _slots_of(experts, backend, total_bytes - beside_slots(budget))


def least_as_open(budget: Budget, backend: Backend, experts: Mapping[int, int]) -> int:
    """The least total of an engine that is open: that of everything else, and of the least slots."""
    return beside_slots(budget) + slots_bytes(slots_by_kind(0, experts), backend)


def beside_slots(budget: Budget) -> int:
    """All that is claimed but for what gives way to a smaller budget."""
    return budget.claimed_bytes - budget.claims[SLOTS] - budget.claims.get(TEXTS, 0)


def slots_bytes(slots: Mapping[int, int], backend: Backend) -> int:
    """What so many slots by kind take."""
    return sum(count * backend.slot_bytes(kind) for kind, count in slots.items())


def _slots_of(
    experts: Mapping[int, int], backend: Backend, available_bytes: int | None, share: float = 0.0
) -> dict[int, int]:
    """So many slots by kind as fit into what is available, or the share of the experts where that is None."""
    if available_bytes is not None:
        share = slot_share(available_bytes, slots_bytes(experts, backend))
    mapped = sum(count * backend.mapped_bytes(kind) for kind, count in experts.items())
    if mapped:
        share = min(share, backend.available_bytes() / mapped)
    return slots_by_kind(share, experts)
