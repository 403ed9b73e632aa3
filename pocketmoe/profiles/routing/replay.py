"""Replays a routing trace at several budgets: how often experts would be in memory, and how much would be read.

Figures are of the answer's tokens, without prefetch; the prompt only fills the cache. A budget in bytes is the whole
process, as it is for `run`; a share is of the experts, the same in every pool of equal slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import padded
from pocketmoe.errors import BadInput, BudgetTooSmall
from pocketmoe.profiles.routing.policies import BELADY, PINNED, POLICIES, Routing, routing_of
from pocketmoe.runtime.engine.claims import fixed_part_here
from pocketmoe.runtime.engine.memory_plan import LEAST_SLOTS, Load, MemoryRequest, peak_bytes, slot_share, slots_by_kind
from pocketmoe.runtime.trace import Trace


@dataclass(frozen=True)
class Sizes:
    """What experts take, by pool: bytes read for a miss, bytes of a slot; and what the process takes without slots.

    `loading_bytes` are needed before there are slots, so that a process may peak while it loads.
    """

    read_bytes: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    fixed_bytes: int
    loading_bytes: int
    source: str

    def total_bytes(self, slots: Sequence[int]) -> int:
        """What the whole process takes at its peak with so many slots in each pool."""
        least = _dot([LEAST_SLOTS] * len(slots), self.slot_bytes)
        return peak_bytes(self.fixed_bytes, self.loading_bytes + least, _dot(slots, self.slot_bytes))


@dataclass(frozen=True)
class PolicyResult:
    """One policy at one budget. Rates are shares of the experts that tokens wanted."""

    policy: str
    hit_rate: float | None  # None for `pinned`, which has seen the first half of what it would be judged by
    second_half_hit_rate: float
    behind_belady: float | None  # Belady's hit rate less this one's
    misses_per_token: float
    misses_per_token_median: float
    misses_per_token_p95: float
    bytes_per_token: float | None  # None where the experts' sizes are not known


@dataclass(frozen=True)
class BudgetResult:
    """`total_bytes`: what `run --memory` would be given for it, None where sizes are not known."""

    memory: str
    slots: int
    expert_share: float
    total_bytes: int | None
    below_one_token: bool  # fewer slots than one token's experts
    warnings: list[str]
    policies: list[PolicyResult]


@dataclass(frozen=True)
class ReplayReport:
    """The fields of `replay --json`."""

    trace: str
    architecture: str | None
    tokens: int
    prompt_tokens: int
    moe_layers: int
    experts: int
    experts_per_token: int  # over all layers
    sizes: str  # where the experts' sizes come from; "" where they are not known
    budgets: list[BudgetResult]


def replay(
    path: Path,
    trace: Trace,
    memory: Sequence[tuple[str, MemoryRequest]],
    policies: Sequence[str] = (),
    bundle: Bundle | None = None,
    progress: Progress = no_progress,
) -> ReplayReport:
    """Replay a trace under some of POLICIES, by default all.

    `memory`: each budget as it was written, and what that means. Raises BadInput for a trace without an answer, a
    bundle of another model, or bytes where no sizes are known; BudgetTooSmall for bytes without room for two slots.
    """
    answer = len(trace.ids) - sum(trace.prompt_walks)
    if answer < 2:
        raise BadInput(f"{path} has {answer} tokens after the prompt", "Record a longer answer.")
    names = list(dict.fromkeys(policies)) or list(POLICIES)
    if bundle is not None:
        trace = _of_model(trace, bundle)
    members, sizes = _pools(trace), _sizes(trace, bundle)
    pools = [routing_of(trace.ids, trace.experts, trace.prompt_walks, pool) for pool in members]
    plans = [_plan(text, request, pools, sizes) for text, request in memory]
    hits: dict[str, np.ndarray] = {}
    for done, name in enumerate(wanted := dict.fromkeys([*names, BELADY])):
        progress("replaying", done, len(wanted))
        by_pool = [POLICIES[name](pool, [plan.slots[k] for plan in plans]) for k, pool in enumerate(pools)]
        hits[name] = np.stack(by_pool, axis=1)
    judged = _Judge(pools, sizes)
    one_token = int((trace.ids[0] >= 0).sum())
    return ReplayReport(
        trace=str(path),
        architecture=trace.info.architecture if trace.info else None,
        tokens=len(trace.ids),
        prompt_tokens=sum(trace.prompt_walks),
        moe_layers=len(trace.experts),
        experts=sum(trace.experts),
        experts_per_token=one_token,
        sizes=sizes.source if sizes else "",
        budgets=[
            _result(plan, [judged(name, hits[name][b], hits[BELADY][b]) for name in names], pools, one_token)
            for b, plan in enumerate(plans)
        ],
    )


@dataclass(frozen=True)
class _BudgetSlots:
    memory: str
    slots: tuple[int, ...]  # by pool
    total_bytes: int | None


def _of_model(trace: Trace, bundle: Bundle) -> Trace:
    """The trace with the model's number of experts, of which it may not have met all. Raises BadInput."""
    layers = bundle.manifest.moe_layers
    experts = tuple(layer.n_experts for layer in layers)
    same = trace.info is None or trace.experts == experts
    most = np.array([layer.top_k for layer in layers])
    per_token = (trace.ids[0] >= 0).sum(axis=1)
    if (
        len(experts) != len(trace.experts)
        or not same
        or (per_token > most).any()
        or any(map(int.__gt__, trace.experts, experts))
    ):
        raise BadInput(f"{bundle.root} is another model than the trace's: layers or experts differ")
    return replace(trace, experts=experts)


def _pools(trace: Trace) -> list[list[np.ndarray]]:
    """For each pool and layer which experts belong to it, bool [experts]."""
    if trace.info is None or not trace.info.pool_of:
        return [[np.ones(count, bool) for count in trace.experts]]
    return [[np.asarray(row) == pool for row in trace.info.pool_of] for pool in range(len(trace.info.pools))]


def _sizes(trace: Trace, bundle: Bundle | None) -> Sizes | None:
    if bundle is not None:
        return _sizes_of_bundle(trace, bundle)
    if trace.info is None:
        return None
    pools = trace.info.pools
    return Sizes(
        tuple(pool.read_bytes for pool in pools),
        tuple(pool.slot_bytes for pool in pools),
        trace.info.fixed_bytes,
        trace.info.loading_bytes,
        "measured by the run that was recorded",
    )


def _sizes_of_bundle(trace: Trace, bundle: Bundle) -> Sizes:
    """Sizes of a bundle that nobody need have run: its records, which packed for a CPU may take a tenth more."""
    record = max(kind.nbytes for kind in bundle.manifest.expert_kinds)
    n_pools = len(trace.info.pools) if trace.info else 1
    fixed = fixed_part_here(bundle.manifest, Load.of_text(len(trace.ids)))
    each = (padded(record),) * n_pools
    return Sizes(each, each, fixed.without_loading, fixed.loading, f"estimated from {bundle.root}")


def _plan(text: str, request: MemoryRequest, pools: Sequence[Routing], sizes: Sizes | None) -> _BudgetSlots:
    """How many slots each pool gets: the same share of each."""
    experts = [sum(pool.experts.values()) for pool in pools]
    share = request.expert_share
    if share is None:
        if sizes is None:
            raise BadInput(
                f"the trace does not say what an expert takes, so {text} means nothing",
                "Give shares, such as 25%, or the model: --bundle BUNDLE.",
            )
        share = _share(request.total_bytes or 0, experts, sizes)
    slots = tuple(slots_by_kind(share, dict(enumerate(experts))).values())
    return _BudgetSlots(text, slots, sizes.total_bytes(slots) if sizes else None)


def _share(total_bytes: int, experts: Sequence[int], sizes: Sizes) -> float:
    least = sizes.total_bytes([0] * len(experts))
    if total_bytes < least:
        raise BudgetTooSmall(total_bytes, least)
    return slot_share(total_bytes - sizes.fixed_bytes, _dot(experts, sizes.slot_bytes))


def _dot(counts: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


class _Judge:
    """Turns hits, [pools, steps], into figures of the answer."""

    def __init__(self, pools: Sequence[Routing], sizes: Sizes | None) -> None:
        self._wanted = np.stack([p.tally(np.array([len(v.wanted) for v in p.visits])) for p in pools])
        self._answer = slice(pools[0].n_prompt_steps, None)
        self._second_half = slice((pools[0].n_prompt_steps + pools[0].n_steps) // 2, None)
        self._sizes = sizes

    def __call__(self, name: str, hits: np.ndarray, best: np.ndarray) -> PolicyResult:
        part = self._second_half if name == PINNED else self._answer
        misses = (self._wanted - hits)[:, part]
        per_token = misses.sum(axis=0)
        rate = self._rate(hits, part)
        return PolicyResult(
            policy=name,
            hit_rate=None if name == PINNED else rate,
            second_half_hit_rate=self._rate(hits, self._second_half),
            behind_belady=None if name == PINNED else self._rate(best, part) - rate,
            misses_per_token=float(per_token.mean()),
            misses_per_token_median=float(np.median(per_token)),
            misses_per_token_p95=float(np.percentile(per_token, 95)),
            bytes_per_token=float(misses.mean(axis=1) @ self._sizes.read_bytes) if self._sizes else None,
        )

    def _rate(self, hits: np.ndarray, part: slice) -> float:
        return float(hits[:, part].sum() / self._wanted[:, part].sum())


def _result(plan: _BudgetSlots, policies: list[PolicyResult], pools: Sequence[Routing], one_token: int) -> BudgetResult:
    slots = sum(plan.slots)
    return BudgetResult(
        memory=plan.memory,
        slots=slots,
        expert_share=slots / sum(sum(pool.experts.values()) for pool in pools),
        total_bytes=plan.total_bytes,
        below_one_token=slots < one_token,
        warnings=_warnings(slots, one_token, policies),
        policies=policies,
    )


def _warnings(slots: int, one_token: int, policies: Sequence[PolicyResult]) -> list[str]:
    if slots >= one_token:
        return []
    nothing = [result.policy for result in policies if result.hit_rate is not None and result.hit_rate < 0.01]
    warning = f"{slots} slots hold less than the {one_token} experts of one token"
    return [f"{warning}: {', '.join(nothing)} would hit nothing" if nothing else warning]
